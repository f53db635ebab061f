"""
The model card, README.md: a first one of a conversion, for a local folder; and that of a published repository, which
pins a revision and shows what provenance.json, config.json and evaluation.json record. The latter keeps what a person
wrote below MARK, and YAML entries of other origin.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage.errors import CheckpointError, Problem
from ..storage.files import read_json, replace_text
from ..storage.output_folder import final_name
from ..storage.sources import LICENCE_KEYS, PROVENANCE, Source, licence_of, public_name
from ..storage.training_record import read_training
from .model_types import model_type_of


MARK = "<!-- Written by sailvit up to this line. Text below it is kept. -->"
OLD_MARK = "<!-- What stands above this line is written by `sailvit push`. What stands below it is kept. -->"
# Up to where the text is of this package: of this version; of push, convert and compose of earlier ones.
WRITTEN = (
    re.escape(MARK),
    re.escape(OLD_MARK),
    r"\A\s*# .*?`provenance\.json` says how, with the hashes of what was read and written\.",
    r"The connector is fresh: it has to be trained before the model can say anything.*?```python\n.*?\n```",
)

TEMPLATE = Path(__file__).with_name("card.md.jinja")  # of jinja2
RESULTS = "evaluation.json"  # a list of maps, each with the arguments of huggingface_hub.EvalResult
RESULT_FIELDS = "task_type, dataset_type, dataset_name, metric_type, metric_value"
NO_LICENCE = "no licence is stated"
FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|\Z)", re.DOTALL)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Component:
    """What the weights, or a part of them, were made from."""

    role: str  # "weights" of all of them, "base" of a training, else "vision", "language", ...
    name: str  # on the Hub, or of a folder or file
    revision: str | None  # commit on the Hub, if it came from there
    licence: dict[str, Any]  # LICENCE_KEYS, as `licensor` states them
    licensor: str
    base: str | None  # the nearest of its sources that is on the Hub


class _Model:
    """What a folder records of its model; `own` is the YAML of its card, for a licence that no source states."""

    def __init__(self, folder: Path, own: Mapping[str, Any]):
        def document(file: str) -> dict[str, Any]:
            return read_json(folder / file) if (folder / file).exists() else {}

        self.folder, self.type, self.config = folder, model_type_of(folder), document("config.json")
        self.provenance, self.training = document(PROVENANCE), read_training(document)
        self.parts = _components(self.provenance, self.training, own)


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
    blocks = [f"# {final_name(folder)}", description]
    if (folder / "config.json").exists():
        model_type, has_code = model_type_of(folder), "auto_map" in read_json(folder / "config.json")
        metadata |= {"library_name": model_type.library, "pipeline_tag": model_type.pipeline_tag}
        blocks.append(f"```python\n{model_type.usage(final_name(folder), has_code=has_code)}\n```")
    names = " and ".join(public_name(source) for source in sources)
    blocks.append(f"Made from {names}; `{PROVENANCE}` records how, with the hashes of what was read and written.")
    metadata |= _base_models([source.name for source in sources if source.revision])
    _save(folder, metadata | (licence_of(sources[0]) if len(sources) == 1 else {}), blocks)


def write_model_card(
    folder: str | Path, name: str | None = None, revision: str | None = "main", published: str = ""
) -> str:
    """
    Write README.md for publishing, in place of one that is there.

    Args:
        folder: With config.json; provenance.json, training.json and evaluation.json are read if they exist.
        name: Of the repository; the folder's if not given.
        revision: Which the usage pins: a tag, a branch or a commit; None for the usage of a local folder.
        published: README.md as it is on the Hub. A person's text is taken from there if the folder has none.

    Returns:
        A person's text on the Hub that is not kept, because the folder has another.

    Raises:
        CheckpointError: A file that it is made from is broken; nothing was written.
    """
    path, name = (folder := Path(folder)) / "README.md", name or folder.resolve().name
    own, text = _split_card(path.read_text(encoding="utf-8") if path.exists() else "", str(path))
    theirs, their_text = {}, ""
    with suppress(CheckpointError):  # a valid one replaces it
        theirs, their_text = _split_card(published, "README.md on the Hub")
    if their_text and MARK not in published and OLD_MARK not in published:  # possibly of another model
        theirs = {}
    text = text or their_text
    model, results = _Model(folder, {**theirs, **own}), _read_results(folder)
    made = _metadata(model)
    tags = [tag for data in (made, own, theirs) for tag in data.get("tags") or [] if isinstance(data["tags"], list)]
    metadata = {**theirs, **own, **made, "tags": list(dict.fromkeys(tags))}
    if results:
        metadata.pop("model-index", None)
        metadata |= {"model_name": name.split("/")[-1], "eval_results": results}
    _save(folder, metadata, [_render(model, name, revision, results)], text)
    return their_text if their_text not in text else ""


def _save(folder: Path, metadata: Mapping[str, Any], blocks: Iterable[str], text: str = "") -> None:
    from huggingface_hub import ModelCardData

    body = "\n\n".join(filter(None, [*blocks, MARK, text]))
    replace_text(folder / "README.md", f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n{body}\n")


def _split_card(card: str, name: str) -> tuple[dict[str, Any], str]:
    """Return the YAML of a card and what a person wrote: all below the text of this package, or all without one."""
    import yaml

    card = card.replace("\r\n", "\n")
    match = FRONT_MATTER.match(card)
    try:
        metadata = yaml.safe_load(match[1] or "") if match else None
    except yaml.YAMLError as error:
        raise CheckpointError(f"{name}: its YAML is broken: {_one_line(error)}") from error
    if not isinstance(metadata, dict | None):
        raise CheckpointError(f"{name}: its YAML is no map")
    body = card[match.end() :] if match else card
    written = next(filter(None, (re.search(pattern, body, re.DOTALL) for pattern in WRITTEN)), None)
    return metadata or {}, (body[written.end() :] if written else body).strip()


def _components(provenance: Mapping[str, Any], training: Mapping[str, Any], own: Mapping[str, Any]) -> list[Component]:
    source, inserted = provenance.get("source"), provenance.get("inserted")
    if not isinstance(source, Mapping):
        return [_component("weights", {}, own)]
    if parts := [role for role in ("vision", "connector", "language") if isinstance(source.get(role), dict)]:
        return [_component(role, source[role]) for role in parts]
    found = [_component("weights", source, own)]
    found += [_component("vision", inserted)] if isinstance(inserted, Mapping) else []
    return found + ([_component("base", training["base"])] if "base" in training else [])


def _component(role: str, record: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> Component:
    stated, base = _licence(record), record
    while isinstance(base, Mapping) and not (base.get("revision") and HUB_NAME.fullmatch(str(base.get("name")))):
        base = base.get("source")
    licence, licensor = (stated, "its own card") if stated else (_licence(own or {}), "the publisher of this model")
    name, base_name = str(record.get("name", "")), base["name"] if isinstance(base, Mapping) else None
    return Component(role, name, record.get("revision"), licence, licensor, base_name)


def _licence(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in LICENCE_KEYS if record.get(key)} if record.get("license") else {}


def _read_results(folder: Path) -> list[Any]:
    """Return the EvalResults of evaluation.json; none if there is no such file."""
    from huggingface_hub import EvalResult

    path = folder / RESULTS
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if not isinstance(entries, list):
            raise TypeError(f"got a {type(entries).__name__}")
        return [EvalResult(**entry) for entry in entries]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a list of maps with {RESULT_FIELDS}: {_one_line(error)}") from error


def _metadata(model: _Model) -> dict[str, Any]:
    made: dict[str, Any] = {"library_name": model.type.library, "pipeline_tag": model.type.pipeline_tag}
    licences = [part.licence for part in model.parts]
    if all(licences):
        is_common = all(licence == licences[0] for licence in licences)
        made |= licences[0] if is_common else {"license": "other", "license_name": "by-component"}
    made |= _base_models(list(dict.fromkeys(part.base for part in model.parts if part.base)))
    # The Hub knows finetune, merge, adapter and quantized; the same weights under other names are none of these.
    is_quantized = model.config.get("quantization_config") or model.provenance.get("dtype") == ["int8"]
    relation = "finetune" if model.training else "merge" if len(model.parts) > 1 else None
    relation = "quantized" if is_quantized else relation
    if is_quantized or ("base_model" in made and relation):  # without provenance a person names the base
        made["base_model_relation"] = relation
    tags = [model.config["model_type"]] if model.config.get("model_type") in ("sailvit", "sailvl") else []
    return {**made, "tags": tags + (["custom_code"] if "auto_map" in model.config else [])}


def _base_models(names: list[str]) -> dict[str, Any]:
    return {"base_model": names[0] if len(names) == 1 else names} if names else {}


def _render(model: _Model, name: str, revision: str | None, results: list[Any]) -> str:
    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = _cell
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(model=model, name=name, revision=revision, results=results, NO_LICENCE=NO_LICENCE)


def _cell(value: Any) -> str:
    """Return a value in one line; of a source its name and revision."""
    if isinstance(value, Mapping) and "name" in value:
        value = f"{value['name']} at {value['revision']}" if value.get("revision") else value["name"]
    return _one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).replace("|", "\\|")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def card_problems(folder: Path) -> list[Problem]:
    """Return what is wrong with README.md in a folder; write_model_card, which `sailvit push` calls, corrects most."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    try:
        metadata, _ = _split_card(text, "README.md")
    except CheckpointError as error:
        return [Problem("card", "README.md", f"{str(error).partition(': ')[2]}: correct it by hand")]
    if not metadata:
        what = "has no YAML between two lines of ---" if path.exists() else "missing"
        return [Problem("card", "README.md", f"{what}: write_model_card writes it")]
    return [Problem(kind, "README.md", message) for kind, message in _wrong_entries(folder, metadata, text)]


def _wrong_entries(folder: Path, metadata: Mapping[str, Any], text: str) -> Iterator[tuple[str, str]]:
    from huggingface_hub import ModelCardData

    try:
        ModelCardData(**metadata, ignore_metadata_errors=False)
    except (TypeError, ValueError, KeyError) as error:
        yield "card", f"the Hub does not accept its YAML: {_one_line(error)}: correct it"
    bases, stated = metadata.get("base_model") or [], metadata.get("license")
    for base in [bases] if isinstance(bases, str) else bases:
        if not HUB_NAME.fullmatch(str(base)):
            yield "card", f"base_model: expected a name on the Hub, got {base!r}: name the base model, or remove it"
    if not stated and NO_LICENCE not in text:
        yield "licence", f"has no licence, nor the sentence {NO_LICENCE!r}: write_model_card writes it"
    if stated == "other" and not metadata.get("license_name"):
        yield "licence", "license is 'other' without a license_name: add it"
    expected = _metadata(_Model(folder, metadata))
    for key, kind in {"library_name": "card", "pipeline_tag": "card", "license": "licence"}.items():
        if key in expected and metadata.get(key) != expected[key]:
            yield kind, f"{key}: expected {expected[key]!r}, got {metadata.get(key)!r}: write_model_card writes it"
