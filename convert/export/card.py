"""
The card of a published model: README.md, from provenance.json, config.json and the results of an evaluation.

A conversion writes a first card, for a folder on this machine. The one here takes its place when the folder is
published: it names the repository and a revision. What a person wrote below MARK stays, and so do entries of the YAML
that are not made here.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage.errors import CheckpointError, Problem
from ..storage.files import read_json
from ..storage.sources import PROVENANCE
from .model_types import Kind, model_type_of


MARK = "<!-- What stands above this line is written by `sailvit push`. What stands below it is kept. -->"

RESULTS = "evaluation.json"  # a list of maps, each with the arguments of huggingface_hub.EvalResult

FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|\Z)", re.DOTALL)

# What a conversion or a composition writes.
FIRST_CARD = re.compile(
    r"# .*?(?:`provenance\.json` says how, with the hashes of what was read and written\."
    r"|The connector is fresh: .*?```python\n.*?\n```)[ \t]*(?:\n|\Z)",
    re.DOTALL,
)

LICENCE_KEYS = ("license", "license_name", "license_link")

NO_LICENCE = "no licence is stated"

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

CITATION = """@article{yin2025sailvit,
  title   = {SAILViT: Towards Robust and Generalizable Visual Backbones for MLLMs via Gradual Feature Refinement},
  author  = {Yin, Weijie and Yang, Dingkang and Dong, Hongyuan and Kang, Zijian and Wang, Jiacong and Liang, Xiao and
             Feng, Chao and Ran, Jiao},
  journal = {arXiv preprint arXiv:2507.01643},
  year    = {2025}
}"""


@dataclass(frozen=True)
class Component:
    """
    Something that the weights were made from.

    Attributes:
        role: "weights" of all that there are, "base" of a training, else "vision", "language", ...
        name: On the Hub, or that of a folder or file.
        revision: Commit on the Hub, if it came from there.
        licence: What its own card states, of LICENCE_KEYS.
        base: The model on the Hub that it goes back to, if there is one.
        is_own: Whether the licence is what the folder's own card says, not what the source's does.
    """

    role: str
    name: str
    revision: str | None
    licence: Mapping[str, Any]
    base: str | None
    is_own: bool = False

    def licence_name(self) -> str | None:
        return self.licence.get("license_name") or self.licence.get("license")


def write_card(folder: Path, name: str | None = None, revision: str = "main", published: str = "") -> str:
    """
    Writes README.md, in place of one that is there. A person's text is taken from the folder, or else from the Hub.

    Args:
        folder: With config.json; provenance.json and evaluation.json are read if they are there.
        name: Of the repository; the folder's if not given.
        revision: Which the usage pins: a tag, a branch or a commit.
        published: README.md as it is on the Hub, where people edit it too.

    Returns:
        A person's text on the Hub that is not kept, because the folder has another.

    Raises:
        CheckpointError: A file that it is made from is broken; nothing was written.
    """
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    own, text = split_card(path.read_text(encoding="utf-8") if path.exists() else "", str(path))
    try:
        theirs, their_text = split_card(published, "README.md on the Hub")
        if their_text and MARK not in published:  # of another model, for all that is known
            theirs = {}
    except CheckpointError:  # it is replaced by one that is right
        theirs, their_text = {}, ""
    text = text or their_text
    model = _Model.read(folder, name or folder.resolve().name, revision, {**theirs, **own})
    made = _metadata(model)
    tags = [*made.pop("tags"), *_listed(own, "tags"), *_listed(theirs, "tags")]
    data = {**theirs, **own, **made, "tags": list(dict.fromkeys(tags))}
    body = f"{_yaml(model, data)}\n{_sections(model)}\n\n{MARK}\n"
    card = ModelCard(body + (f"\n{text}\n" if text else ""))
    scratch = path.with_name(".README.md.part")
    card.save(scratch)
    scratch.replace(path)
    return their_text if their_text not in text else ""


def split_card(text: str, where: str) -> tuple[dict[str, Any], str]:
    """
    The YAML of a card, and what a person wrote: all below MARK, or below the card of a conversion, or all of it if
    there is neither.

    Raises:
        CheckpointError: The YAML is broken.
    """
    import yaml

    match = FRONT_MATTER.match(text.replace("\r\n", "\n"))
    body = text.replace("\r\n", "\n")[match.end() :] if match else text
    try:
        metadata = yaml.safe_load(match[1] or "") if match else {}
    except yaml.YAMLError as error:
        raise CheckpointError(f"{where}: its YAML is broken: {' '.join(str(error).split())}") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise CheckpointError(f"{where}: its YAML is no map")
    first = FIRST_CARD.match(body.lstrip())
    if MARK in body:
        body = body.partition(MARK)[2]
    elif first:
        body = body.lstrip()[first.end() :]
    return metadata or {}, body.strip()


def components(record: Mapping[str, Any], own: Mapping[str, Any]) -> list[Component]:
    """
    What a folder was made from.

    Args:
        record: Its provenance.json.
        own: The YAML of its card, whose licence is taken where no source states one.
    """
    source = record.get("source")
    if not isinstance(source, Mapping):
        return [Component("weights", "", None, _licence(own), None, is_own=True)]
    parts = {role: source[role] for role in ("vision", "connector", "language") if isinstance(source.get(role), dict)}
    if parts:
        return [_component(role, part, {}) for role, part in parts.items()]
    found = [_component("weights", source, own)]
    if isinstance(inserted := record.get("inserted"), Mapping):
        found.append(_component("vision", inserted, {}))
    if isinstance(training := record.get("training"), Mapping) and isinstance(training.get("base"), Mapping):
        found.append(_component("base", training["base"], {}))
    return found


def _component(role: str, record: Mapping[str, Any], own: Mapping[str, Any]) -> Component:
    stated = _licence(record)
    licence = stated or _licence(own)
    return Component(role, str(record.get("name", "")), record.get("revision"), licence, _base(record), not stated)


def _licence(said: Mapping[str, Any]) -> dict[str, Any]:
    return {key: said[key] for key in LICENCE_KEYS if said.get(key)} if said.get("license") else {}


def _base(record: Mapping[str, Any]) -> str | None:
    """The nearest of its sources that is on the Hub."""
    while isinstance(record, Mapping):
        if record.get("revision") and HUB_NAME.fullmatch(str(record.get("name"))):
            return record["name"]
        record = record.get("source")
    return None


def common_licence(parts: list[Component]) -> dict[str, Any]:
    """
    What the YAML says of the licence: that of the only component, or of all of them. If they differ, it says so, and
    the text names each; if one names none, so does the whole.
    """
    licences = [dict(part.licence) for part in parts]
    if not all(licences):
        return {}
    if all(licence == licences[0] for licence in licences):
        return licences[0]
    return {"license": "other", "license_name": "by-component"}


def read_results(folder: Path) -> list[Any]:
    """
    The results of an evaluation, as EvalResults; none if there is no file of them.

    Raises:
        CheckpointError: The file is none of the form that is wanted.
    """
    from huggingface_hub import EvalResult

    path = folder / RESULTS
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise TypeError(f"it is a {type(entries).__name__}")
        return [EvalResult(**entry) for entry in entries]
    except (TypeError, ValueError) as error:
        wanted = "a list of maps with task_type, dataset_type, dataset_name, metric_type, metric_value is wanted"
        raise CheckpointError(f"{path}: {wanted}: {' '.join(str(error).split())}") from error


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _listed(data: Mapping[str, Any], key: str) -> list[Any]:
    return data[key] if isinstance(data.get(key), list) else []


@dataclass(frozen=True)
class _Model:
    """What a card is made from."""

    folder: Path
    name: str
    revision: str
    kind: Kind
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    parts: list[Component]
    results: list[Any]

    @classmethod
    def read(cls, folder: Path, name: str, revision: str, own: Mapping[str, Any]) -> "_Model":
        config, record = _read(folder / "config.json"), _read(folder / PROVENANCE)
        kind, parts = model_type_of(config), components(record, own)
        return cls(folder, name, revision, kind, config, record, parts, read_results(folder))

    @property
    def has_code(self) -> bool:
        return "auto_map" in self.config


def _metadata(model: _Model) -> dict[str, Any]:
    kind, is_ours = model.kind, model.config.get("model_type") in ("sailvit", "sailvl")
    made: dict[str, Any] = {"library_name": kind.library, "pipeline_tag": kind.pipeline_tag}
    made |= common_licence(model.parts)
    bases = list(dict.fromkeys(part.base for part in model.parts if part.base))
    if bases:
        made |= {"base_model": bases[0] if len(bases) == 1 else bases, **_relation(model.record, model.parts)}
    tags = [*([model.config["model_type"]] if is_ours else []), *(["custom_code"] if model.has_code else [])]
    return {**made, "tags": tags}


def _relation(record: Mapping[str, Any], parts: list[Component]) -> dict[str, str]:
    """
    What the model is to its base. The Hub knows finetune, merge, adapter and quantized: the same weights under other
    names are none of these, and nothing is said then.
    """
    if record.get("training"):
        return {"base_model_relation": "finetune"}
    return {"base_model_relation": "merge"} if len(parts) > 1 else {}


def _yaml(model: _Model, data: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    if model.results:
        kept = {key: value for key, value in data.items() if key != "model-index"}
        data = {**kept, "model_name": model.name.split("/")[-1], "eval_results": model.results}
    return f"---\n{ModelCardData(**data).to_yaml()}\n---"


def _sections(model: _Model) -> str:
    trust = ", trust_remote_code=True" if model.has_code else ""
    usage = model.kind.usage.format(name=model.name, revision=model.revision, trust=trust)
    lines = [f"# {model.name.split('/')[-1]}", "", describe(model.kind, model.config)]
    lines += ["", "## Usage", "", f"```python\n{usage}\n```"]
    if model.has_code:
        pin = "A branch may move: give a tag or a commit instead" if model.revision == "main" else "`revision` pins it"
        lines += ["", f"The model comes with code that runs on your machine. {pin}."]
    lines += ["", "## Where it comes from", "", *_origin(model.record, model.parts), *_training(model.record)]
    lines += _table_of_results(model.results)
    lines += ["", "## Licence", "", *_licences(model.folder, model.parts)]
    return "\n".join([*lines, "", "## Citation", "", f"```bibtex\n{CITATION}\n```"])


def describe(kind: Kind, config: Mapping[str, Any]) -> str:
    """A sentence on what the model is."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    said = [kind.name, *([str(dtype)] if dtype else [])]
    if isinstance(vision := config.get("vision_config"), Mapping):
        text = config.get("text_config") or config.get("llm_config") or {}
        said.append(f"a tower ({_size(vision)}), a connector and a language model ({_size(text)})")
    else:
        said.append(_size(config))
        pixels = config.get("image_size") or config.get("model_args", {}).get("img_size")
        said += [f"{pixels} pixels"] if pixels else []
    article = "An" if kind.name[0] in "aeiou" else "A"
    return f"{article} {', '.join(filter(None, said))}."


def _size(config: Mapping[str, Any]) -> str:
    told = {"model_type": "", "architecture": "", "hidden_size": "width ", "num_hidden_layers": "layers "}
    return ", ".join(f"{word}{config[key]}" for key, word in told.items() if config.get(key))


def _origin(record: Mapping[str, Any], parts: list[Component]) -> Iterator[str]:
    named = [part for part in parts if part.name]
    if not named:
        yield "Nothing was recorded of it."
        return
    for part in named:
        at = f" at commit `{part.revision}`" if part.revision else ""
        link = f"[{part.name}](https://huggingface.co/{part.name})" if part.revision else part.name
        yield f"- {part.role}: {link}{at}" + (f", from {part.base}" if part.base and part.base != part.name else "")
    yield ""
    yield f"`{PROVENANCE}` says how it was made, with the hashes of what was read and written.{_verified(record)}"


def _verified(record: Mapping[str, Any]) -> str:
    said = record.get("verification")
    if not isinstance(said, Mapping) or "relative_difference" not in said:
        return ""
    difference = float(said["relative_difference"])
    return f" Its tokens on a picture were {difference:.1e} from those of {said.get('reference')}, relative."


def _training(record: Mapping[str, Any]) -> Iterator[str]:
    """The recipe as it was recorded: a line for each thing, a table for a list of stages or of checkpoints."""
    said = record.get("training")
    if not said:
        return
    yield from ("", "## Training", "")
    facts = said if isinstance(said, Mapping) else {"stages": said}
    tables = {key: value for key, value in facts.items() if isinstance(value, list) and _is_table(value)}
    yield from (f"- {_spaced(key)}: {_cell(value)}" for key, value in facts.items() if key not in tables)
    for key, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        yield from ("", f"{_spaced(key)}:", "", _row(map(_spaced, columns)), "|" + "---|" * len(columns))
        yield from (_row(row.get(column, "") for column in columns) for row in rows)


def _is_table(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(row, Mapping) for row in value)


def _spaced(key: str) -> str:
    return key.replace("_", " ")


def _table_of_results(results: list[Any]) -> Iterator[str]:
    if not results:
        return
    yield from ("", "## Results", "", "| task | data | measure | value |", "|---|---|---|---|")
    for result in results:
        data = " ".join(filter(None, (result.dataset_name, result.dataset_config, result.dataset_split)))
        measure = result.metric_name or result.metric_type
        yield _row([result.task_name or result.task_type, data, measure, result.metric_value])


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(value: Any) -> str:
    """A value in a line; of what has a name, that and its revision."""
    if isinstance(value, Mapping) and "name" in value:
        value = f"{value['name']} at {value['revision']}" if value.get("revision") else value["name"]
    said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(said.split()).replace("|", "\\|")


def _licences(folder: Path, parts: list[Component]) -> Iterator[str]:
    for part in parts:
        stated = part.licence_name()
        whose = f" ({part.name})" if part.name else ""
        link = part.licence.get("license_link")
        who = "whoever publishes this model" if part.is_own else "its own card"
        said = f"{stated}, as {who} states" + (f": {link}" if link else "") if stated else NO_LICENCE
        yield f"- {part.role}{whose}: {said}"
    if any(folder.glob("*.py")):
        yield "- the Python files: apache-2.0"


def card_problems(folder: Path) -> list[Problem]:
    """What is wrong with the README.md of a folder; the mend is to publish by `sailvit push`, which writes it."""
    path = folder / "README.md"
    if not path.exists():
        return [Problem("card", "README.md", "missing: write_card writes it")]
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        data, _ = split_card(text, "README.md")
    except CheckpointError as error:
        return [Problem("card", "README.md", f"{str(error).partition(': ')[2]}: correct it by hand")]
    if not data:
        return [Problem("card", "README.md", "has no YAML between two lines of ---: write_card writes it")]
    problems = [Problem("card", "README.md", what) for what in _wrong_entries(folder, data)]
    return problems + [Problem("licence", "README.md", what) for what in _wrong_licence(folder, data, text)]


def _wrong_entries(folder: Path, data: Mapping[str, Any]) -> Iterator[str]:
    from huggingface_hub import ModelCardData

    try:
        ModelCardData(**data, ignore_metadata_errors=False)
    except (TypeError, ValueError, KeyError) as error:
        yield f"its YAML is not what the Hub takes: {' '.join(str(error).split())}: correct it"
    config = _read(folder / "config.json")
    kind = model_type_of(config)
    for key, wanted in {"library_name": kind.library, "pipeline_tag": kind.pipeline_tag}.items():
        if data.get(key) != wanted:
            yield f"{key} is {data.get(key)!r}, {wanted!r} is wanted: write_card writes it"
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not HUB_NAME.fullmatch(str(base)):
            yield f"base_model {base!r} is no name on the Hub: name the model that it goes back to, or take it out"


def _wrong_licence(folder: Path, data: Mapping[str, Any], text: str) -> Iterator[str]:
    stated = data.get("license")
    if not stated and NO_LICENCE not in text:
        yield f"names no licence, and does not say that {NO_LICENCE}: write_card says it"
    if stated == "other" and not data.get("license_name"):
        yield "license is 'other' without a license_name: add it"
    wanted = common_licence(components(_read(folder / PROVENANCE), data)).get("license")
    if wanted and stated != wanted:
        yield f"license is {stated!r}, the sources' cards state {wanted!r}: write_card writes it"
