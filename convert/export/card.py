"""
The model card, README.md. A conversion writes a first one, for a folder on this machine; publishing writes another,
which names the repository, pins a revision and shows what provenance.json, config.json and evaluation.json record. Both
keep what a person wrote below MARK, and YAML entries of other origin.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage.errors import CheckpointError, Problem
from ..storage.files import read_json
from ..storage.output_folder import final_name
from ..storage.sources import PROVENANCE, Source, licence_of, public_name
from ..storage.training_record import read_training
from .model_types import ModelType, model_type_of


MARK = "<!-- Written by sailvit up to this line. Text below it is kept. -->"

# How the text that earlier versions wrote ends: that of push, of convert, of compose.
OLD_MARK = "<!-- What stands above this line is written by `sailvit push`. What stands below it is kept. -->"
OLD_CONVERTED = "`provenance.json` says how, with the hashes of what was read and written."
OLD_COMPOSED = "The connector is fresh: it has to be trained before the model can say anything of a picture."

RESULTS = "evaluation.json"  # a list of maps, each with the arguments of huggingface_hub.EvalResult
RESULT_FIELDS = "task_type, dataset_type, dataset_name, metric_type, metric_value"
LICENCE_KEYS = ("license", "license_name", "license_link")
NO_LICENCE = "no licence is stated"
FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|\Z)", re.DOTALL)
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
    What the weights, or a part of them, were made from.

    Attributes:
        role: "weights" of all of them, "base" of a training, else "vision", "language", ...
        name: On the Hub, or that of a folder or file.
        revision: Commit on the Hub, if it came from there.
        licence: LICENCE_KEYS, as its own card states them.
        base: The nearest of its sources that is on the Hub.
        is_own: Whether the licence is from the folder's own card instead.
    """

    role: str
    name: str
    revision: str | None
    licence: Mapping[str, Any]
    base: str | None
    is_own: bool = False


def write_conversion_card(
    folder: Path, sources: Sequence[Source], description: str, tags: Sequence[str] = ("vision",)
) -> None:
    """
    Write README.md of a folder that was made from checkpoints.

    Args:
        folder: With a config.json, unless nothing loads the folder by itself.
        sources: One, whose licence is taken over; or several, whose licences the description has to name.
    """
    metadata: dict[str, Any] = {"tags": [*tags]}
    lines = [f"# {final_name(folder)}", "", description, ""]
    if (folder / "config.json").exists():
        model_type, has_code = model_type_of(folder), "auto_map" in read_json(folder / "config.json")
        metadata |= {"library_name": model_type.library, "pipeline_tag": model_type.pipeline_tag}
        lines += ["```python", model_type.usage(final_name(folder), has_code=has_code), "```", ""]
    names = " and ".join(public_name(source) for source in sources)
    lines += [f"Made from {names}; `{PROVENANCE}` records how, with the hashes of what was read and written."]
    metadata |= _base_models([source.name for source in sources if source.revision])
    _save(folder, metadata | (licence_of(sources[0]) if len(sources) == 1 else {}), lines)


def write_model_card(folder: Path, name: str | None = None, revision: str = "main", published: str = "") -> str:
    """
    Write README.md for publishing, in place of one that is there.

    Args:
        folder: With config.json; provenance.json, training.json and evaluation.json are read if they exist.
        name: Of the repository; the folder's if not given.
        revision: Which the usage pins: a tag, a branch or a commit.
        published: README.md as it is on the Hub. A person's text is taken from there if the folder has none.

    Returns:
        A person's text on the Hub that is not kept, because the folder has another.

    Raises:
        CheckpointError: A file that it is made from is broken; nothing was written.
    """
    path = folder / "README.md"
    own, text = split_card(path.read_text(encoding="utf-8") if path.exists() else "", str(path))
    try:
        theirs, their_text = split_card(published, "README.md on the Hub")
        if their_text and MARK not in published and OLD_MARK not in published:  # possibly of another model
            theirs = {}
    except CheckpointError:  # a valid one replaces it
        theirs, their_text = {}, ""
    text = text or their_text
    model = _Model(folder, name or folder.resolve().name, {**theirs, **own})
    made = _metadata(model)
    tags = [tag for data in (made, own, theirs) for tag in data.get("tags") or [] if isinstance(data["tags"], list)]
    metadata = {**theirs, **own, **made, "tags": list(dict.fromkeys(tags))}
    if model.results:
        metadata.pop("model-index", None)
        metadata |= {"model_name": model.name.split("/")[-1], "eval_results": model.results}
    _save(folder, metadata, _sections(model, revision), text)
    return their_text if their_text not in text else ""


def _save(folder: Path, metadata: Mapping[str, Any], lines: Iterable[str], text: str = "") -> None:
    from huggingface_hub import ModelCardData

    content = "\n".join(["---", ModelCardData(**metadata).to_yaml(), "---", *lines, "", MARK, ""])
    part = folder / ".README.md.part"
    part.write_text(content + (f"\n{text}\n" if text else ""), encoding="utf-8")
    part.replace(folder / "README.md")


def split_card(card: str, name: str) -> tuple[dict[str, Any], str]:
    """
    Return the YAML of a card and what a person wrote: all below the text of this package, or all of it without one.

    Raises:
        CheckpointError: The YAML is broken; the message names the card.
    """
    import yaml

    card = card.replace("\r\n", "\n")
    match = FRONT_MATTER.match(card)
    try:
        metadata = yaml.safe_load(match[1] or "") if match else None
    except yaml.YAMLError as error:
        raise CheckpointError(f"{name}: its YAML is broken: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict | None):
        raise CheckpointError(f"{name}: its YAML is no map")
    return metadata or {}, _text_below(card[match.end() :] if match else card).strip()


def _text_below(body: str) -> str:
    """Return what follows the text that this or an earlier version wrote; without any, all."""
    for end in (MARK, OLD_MARK, OLD_CONVERTED):
        if end in body and (end != OLD_CONVERTED or body.lstrip().startswith("# ")):
            return body.partition(end)[2]
    if OLD_COMPOSED in body:
        return body.partition(OLD_COMPOSED)[2].partition("```python\n")[2].partition("\n```")[2]
    return body


def components(provenance: Mapping[str, Any], training: Mapping[str, Any], own: Mapping[str, Any]) -> list[Component]:
    """
    Return what a folder was made from.

    Args:
        own: The YAML of its card, whose licence is taken where no source states one.
    """
    source = provenance.get("source")
    if not isinstance(source, Mapping):
        return [Component("weights", "", None, _licence(own), None, is_own=True)]
    parts = {role: source[role] for role in ("vision", "connector", "language") if isinstance(source.get(role), dict)}
    if parts:
        return [_component(role, part) for role, part in parts.items()]
    found = [_component("weights", source, own)]
    if isinstance(inserted := provenance.get("inserted"), Mapping):
        found.append(_component("vision", inserted))
    return found + ([_component("base", training["base"])] if "base" in training else [])


def _component(role: str, record: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> Component:
    stated, base = _licence(record), record
    while isinstance(base, Mapping) and not (base.get("revision") and HUB_NAME.fullmatch(str(base.get("name")))):
        base = base.get("source")
    name = base["name"] if isinstance(base, Mapping) else None
    licence = stated or _licence(own or {})
    return Component(role, str(record.get("name", "")), record.get("revision"), licence, name, not stated)


def _licence(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in LICENCE_KEYS if record.get(key)} if record.get("license") else {}


def common_licence(parts: list[Component]) -> dict[str, Any]:
    """Return the licence for the YAML: that of all components, "by-component" if they differ, none if one has none."""
    licences = [dict(part.licence) for part in parts]
    if not all(licences):
        return {}
    if all(licence == licences[0] for licence in licences):
        return licences[0]
    return {"license": "other", "license_name": "by-component"}


def read_results(folder: Path) -> list[Any]:
    """
    Return the EvalResults of evaluation.json; none if there is no such file.

    Raises:
        CheckpointError: The file has another form.
    """
    from huggingface_hub import EvalResult

    path = folder / RESULTS
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise TypeError(f"got a {type(entries).__name__}")
        return [EvalResult(**entry) for entry in entries]
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: expected a list of maps with {RESULT_FIELDS}: {reason}") from error


class _Model:
    """What a card for publishing is made from; `own` is the YAML of the card that it replaces."""

    def __init__(self, folder: Path, name: str, own: Mapping[str, Any]):
        self.folder, self.name, self.type = folder, name, model_type_of(folder)
        self.config = read_json(folder / "config.json")
        self.has_code = "auto_map" in self.config
        self.provenance, self.training = _read_records(folder)
        self.parts = components(self.provenance, self.training, own)
        self.results = read_results(folder)


def _read_records(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return provenance.json, empty if there is none, and the record of a training."""

    def document(file: str) -> dict[str, Any]:
        return read_json(folder / file) if (folder / file).exists() else {}

    return document(PROVENANCE), read_training(document)


def _metadata(model: _Model) -> dict[str, Any]:
    made: dict[str, Any] = {"library_name": model.type.library, "pipeline_tag": model.type.pipeline_tag}
    made |= common_licence(model.parts)
    made |= _base_models(list(dict.fromkeys(part.base for part in model.parts if part.base)))
    # The Hub knows finetune, merge, adapter and quantized; the same weights under other names are none of these.
    relation = "finetune" if model.training else "merge" if len(model.parts) > 1 else None
    if "base_model" in made and relation:
        made["base_model_relation"] = relation
    is_ours = model.config.get("model_type") in ("sailvit", "sailvl")
    tags = [*([model.config["model_type"]] if is_ours else []), *(["custom_code"] if model.has_code else [])]
    return {**made, "tags": tags}


def _base_models(names: list[str]) -> dict[str, Any]:
    return {"base_model": names[0] if len(names) == 1 else names} if names else {}


def _sections(model: _Model, revision: str) -> Iterator[str]:
    yield from (f"# {model.name.split('/')[-1]}", "", _describe(model.type, model.config))
    yield from ("", "## Usage", "", "```python", model.type.usage(model.name, revision, model.has_code), "```")
    if model.has_code:
        pin = "A branch can move: give a tag or a commit instead" if revision == "main" else "`revision` pins it"
        yield from ("", f"The model comes with code that runs on your machine. {pin}.")
    yield from ("", "## Where it comes from", "", *_origin(model.provenance, model.parts))
    yield from _training(model.training)
    yield from _results(model.results)
    yield from ("", "## Licence", "", *_licences(model.folder, model.parts))
    yield from ("", "## Citation", "", "```bibtex", CITATION, "```")


def _describe(model_type: ModelType, config: Mapping[str, Any]) -> str:
    """Return a sentence on what the model is."""
    facts = [model_type.title, str(config.get("dtype") or config.get("torch_dtype") or "")]
    if isinstance(vision := config.get("vision_config"), Mapping):
        text = config.get("text_config") or config.get("llm_config") or {}
        facts.append(f"a vision encoder ({_size(vision)}), a connector and a language model ({_size(text)})")
    else:
        pixels = config.get("image_size") or config.get("model_args", {}).get("img_size")
        facts += [_size(config), f"{pixels} pixels" if pixels else ""]
    article = "An" if model_type.title[0] in "aeiou" else "A"
    return f"{article} {', '.join(filter(None, facts))}."


def _size(config: Mapping[str, Any]) -> str:
    labels = {"model_type": "", "architecture": "", "hidden_size": "width ", "num_hidden_layers": "layers "}
    return ", ".join(f"{label}{config[key]}" for key, label in labels.items() if config.get(key))


def _origin(provenance: Mapping[str, Any], parts: list[Component]) -> Iterator[str]:
    named = [part for part in parts if part.name]
    if not named:
        yield "Not recorded."
        return
    for part in named:
        at = f" at commit `{part.revision}`" if part.revision else ""
        link = f"[{part.name}](https://huggingface.co/{part.name})" if part.revision else part.name
        yield f"- {part.role}: {link}{at}" + (f", from {part.base}" if part.base and part.base != part.name else "")
    verified, figures = "", provenance.get("verification")
    if isinstance(figures, Mapping) and "relative_difference" in figures:
        difference = f"{float(figures['relative_difference']):.1e}"
        verified = f" Its outputs on a test input match {figures.get('reference')} (relative difference {difference})."
    yield from ("", f"`{PROVENANCE}` records how it was made, with the hashes of all files.{verified}")


def _training(training: Mapping[str, Any]) -> Iterator[str]:
    """A line for each entry of the record; tables of stages and of averaged checkpoints."""
    entries = dict(training)
    if not entries:
        return
    tables = {name: entries.pop(name) for name in ("stages", "mean_of") if name in entries}
    yield from ("", "## Training", "")
    yield from (f"- {_spaced(name)}: {_cell(entry)}" for name, entry in entries.items())
    for name, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        yield from ("", f"{_spaced(name)}:", "", _row(map(_spaced, columns)), "|" + "---|" * len(columns))
        yield from (_row(row.get(column, "") for column in columns) for row in rows)


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _results(results: list[Any]) -> Iterator[str]:
    if not results:
        return
    yield from ("", "## Results", "", "| task | data | metric | value |", "|---|---|---|---|")
    for result in results:
        data = " ".join(filter(None, (result.dataset_name, result.dataset_config, result.dataset_split)))
        metric = result.metric_name or result.metric_type
        yield _row([result.task_name or result.task_type, data, metric, result.metric_value])


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(value: Any) -> str:
    """Return a value in one line; of a source its name and revision."""
    if isinstance(value, Mapping) and "name" in value:
        value = f"{value['name']} at {value['revision']}" if value.get("revision") else value["name"]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split()).replace("|", "\\|")


def _licences(folder: Path, parts: list[Component]) -> Iterator[str]:
    for part in parts:
        stated, link = part.licence.get("license_name") or part.licence.get("license"), part.licence.get("license_link")
        who = "the publisher of this model" if part.is_own else "its own card"
        text = f"{stated}, as {who} states" + (f": {link}" if link else "") if stated else NO_LICENCE
        yield f"- {part.role}{f' ({part.name})' if part.name else ''}: {text}"
    if any(folder.glob("*.py")):
        yield "- the Python files: apache-2.0"


def card_problems(folder: Path) -> list[Problem]:
    """Return what is wrong with README.md in a folder; write_model_card, which `sailvit push` calls, corrects most."""
    path = folder / "README.md"
    if not path.exists():
        return [Problem("card", "README.md", "missing: write_model_card writes it")]
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        metadata, _ = split_card(text, "README.md")
    except CheckpointError as error:
        return [Problem("card", "README.md", f"{str(error).partition(': ')[2]}: correct it by hand")]
    if not metadata:
        return [Problem("card", "README.md", "has no YAML between two lines of ---: write_model_card writes it")]
    return [Problem(kind, "README.md", message) for kind, message in _wrong_entries(folder, metadata, text)]


def _wrong_entries(folder: Path, metadata: Mapping[str, Any], text: str) -> Iterator[tuple[str, str]]:
    from huggingface_hub import ModelCardData

    try:
        ModelCardData(**metadata, ignore_metadata_errors=False)
    except (TypeError, ValueError, KeyError) as error:
        yield "card", f"the Hub does not accept its YAML: {' '.join(str(error).split())}: correct it"
    bases, stated = metadata.get("base_model") or [], metadata.get("license")
    for base in [bases] if isinstance(bases, str) else bases:
        if not HUB_NAME.fullmatch(str(base)):
            yield "card", f"base_model: expected a name on the Hub, got {base!r}: name the base model, or remove it"
    if not stated and NO_LICENCE not in text:
        yield "licence", f"has no licence, nor the sentence {NO_LICENCE!r}: write_model_card writes it"
    if stated == "other" and not metadata.get("license_name"):
        yield "licence", "license is 'other' without a license_name: add it"
    model_type, licence = model_type_of(folder), common_licence(components(*_read_records(folder), metadata))
    expected = {"library_name": model_type.library, "pipeline_tag": model_type.pipeline_tag, **licence}
    for key in ("library_name", "pipeline_tag", "license"):
        if key in expected and metadata.get(key) != expected[key]:
            message = f"{key}: expected {expected[key]!r}, got {metadata.get(key)!r}: write_model_card writes it"
            yield "licence" if key == "license" else "card", message
