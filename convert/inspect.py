"""The doctor: what a checkpoint is, and whether it is whole. It reads headers; with `deep`, the data too."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from .export.code_files import Code, find_code
from .export.image_settings import read_image_settings
from .models.aimv2_config import Tower, find_aimv2, size_name
from .models.internlm2 import is_internlm2
from .models.internvit import is_internvit
from .models.sailvl import CONNECTOR, LANGUAGE, VISION, is_sailvl, match_names
from .models.sailvl_parts import has_other_tower, part_fields, part_problems
from .storage.checkpoint import Checkpoint, FileCheckpoint
from .storage.errors import CheckpointError, Problem
from .storage.files import hash_file, is_hard_link
from .storage.hashes import recorded_hashes, value_problems
from .storage.lora import is_wrapped
from .storage.sources import ADAPTER, ENGINE_ENTRIES, PROVENANCE, LocalFolder, find_source, weight_files
from .storage.tensors import StoredTensor, torch_name
from .storage.tied_embeddings import text_fields


PARTS = ("mlp1", "language_model")
LEFTOVERS = (".part", ".tmp", ".incomplete", ".lock")


@dataclass
class Report:
    """
    What was found.

    Attributes:
        source: As it was named.
        revision: Commit on the Hub.
        files: Name -> tensors and bytes of every file of weights.
        layout, prefix, reason: Of the tower's names.
        size: Published size of its dimensions, if they are those of one.
        fields: Of SAILViTConfig.
        parameters: Of the tower.
        dtypes: Data type -> tensors of the tower that have it.
        heads: Names of the tower's head.
        others: First segments of the other names -> how many there are.
        wrappers: Segments of names that tools left.
        parts: Of a multimodal model: what its connector and its language model are, and a tower that is no AIMv2.
        provenance: Where it came from, by its provenance.json.
        linked: Files of weights that have other names on this disk.
        code: Of this package, in the folder: its version and the installed one's, and what it lacks.
        deep: Whether the data were read.
        problems: What is wrong.
    """

    source: str
    revision: str | None = None
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    layout: str | None = None
    prefix: str | None = None
    reason: str | None = None
    size: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    wrappers: list[str] = field(default_factory=list)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    provenance: dict[str, Any] | None = None
    linked: list[str] = field(default_factory=list)
    code: Code | None = None
    deep: bool = False
    problems: list[Problem] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        problems = [{"kind": each.kind, "where": each.location, "what": each.message} for each in self.problems]
        return {**asdict(self), "problems": problems, "whole": self.whole}


def inspect_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    from_layout: str | None = None,
    prefix: str | None = None,
    trust_pickle: bool = False,
    deep: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """
    Looks a checkpoint over.

    Args:
        source: A file, a folder or a name on the Hub, of whose safetensors only the headers are downloaded.
        revision: Branch, tag or commit on the Hub.
        from_layout: The layout it has, if that is known.
        prefix: What stands before the tower's names, where more than one tower could be meant.
        trust_pickle: Skip objects of unknown classes in files of torch.save; else they are refused.
        deep: Whether to read the data, and so download it: NaN, infinities, hashes against provenance.json.
        on_progress: With `deep`, called with the bytes read so far and the total.

    Raises:
        CheckpointError: There is no such thing, or no weights in it. What is wrong with weights is in the report.
    """
    origin, entry = find_source(str(source), revision, headers_only=not deep)
    checkpoint, report = FileCheckpoint(origin, entry, trust_pickle), Report(str(source), origin.revision, deep=deep)
    with _collect_errors(report):
        report.problems += checkpoint.shard_problems()
    for file, tensors in checkpoint.opened.items():
        report.files[file] = {"tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors.values())}
    if isinstance(origin, LocalFolder):
        report.linked = [file for file in report.files if is_hard_link(origin.folder / file)]
    for look in (_check_extra_files, _check_code, _check_image_settings, _check_provenance):
        with _collect_errors(report):
            look(report, checkpoint)
    if ADAPTER in origin.files:
        what = "an adapter of peft, no model: `sailvit convert ADAPTER OUT --base BASE` merges it"
        report.problems.append(Problem("layout", ADAPTER, what))
        return report
    with _collect_errors(report):
        if is_wrapped(checkpoint.weight_map):
            what = "a model with LoRA in it, as peft wraps its parts: `sailvit convert SRC OUT` merges it"
            report.problems.append(Problem("layout", entry, what))
            return report
    parts: dict[str, tuple[str, Mapping[str, Any]]] = {}
    with _collect_errors(report):
        parts = _find_parts(checkpoint)
        _check_components(report, checkpoint, parts)
    if from_layout or prefix or parts.keys() in (set(), {"connector", "language"}):
        with _collect_errors(report):
            _check_vision(report, checkpoint, find_aimv2(checkpoint, from_layout, prefix))
    if deep:
        with _collect_errors(report):
            _check_values(report, checkpoint, on_progress)
    report.problems = list(dict.fromkeys(report.problems))
    return report


@contextmanager
def _collect_errors(report: Report) -> Iterator[None]:
    """What stops one look does not stop the others."""
    try:
        yield
    except CheckpointError as error:
        where, separator, what = str(error).partition(": ")
        report.problems.append(Problem("layout", where, what) if separator else Problem("layout", report.source, where))


def _check_vision(report: Report, checkpoint: Checkpoint, tower: Tower) -> None:
    match = tower.match
    report.layout, report.prefix, report.reason = match.scheme.name, match.prefix, match.reason
    report.heads, report.others, report.wrappers = match.dropped, match.others, match.wrappers
    report.size, report.fields = size_name(tower.dimensions), tower.fields
    report.parameters = sum(prod(tensor.shape) for tensor in tower.tensors.values())
    report.dtypes = {torch_name(dtype): count for dtype, count in tower.dtypes.items()}
    rounded = checkpoint.entry.endswith(ENGINE_ENTRIES)  # frozen parts are, beside float32 masters
    report.problems += [problem for problem in tower.problems if not (rounded and problem.kind == "mixed")]
    size, pixels = checkpoint.document("preprocessor_config.json").get("size"), tower.fields["image_size"]
    is_sailvit = checkpoint.document("config.json").get("model_type") in ("sailvit", "sailvl")
    if is_sailvit and size not in (None, pixels, {"height": pixels, "width": pixels}):
        what = f"has tiles of {size}, the positions are for {pixels} pixels"
        report.problems.append(Problem("config", "preprocessor_config.json", what))


def _find_parts(checkpoint: Checkpoint) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Parts of a SAIL-VL, or the one that a conversion took out of it, or an InternViT or InternLM2 -> their prefix and
    configuration. An AIMv2 tower is not among them."""
    config, taken = checkpoint.document("config.json"), checkpoint.document(PROVENANCE).get("part")
    if not is_sailvl(checkpoint):
        kinds = {"vision": is_internvit, "language": is_internlm2}
        found = {part for part, finds in kinds.items() if finds(checkpoint.weight_map)}
        return dict.fromkeys(found or {taken} & {"vision", "connector", "language"}, ("", config))
    parts = {"connector": (CONNECTOR, config), "language": (LANGUAGE, text_fields(config))}
    return {**parts, "vision": (VISION, config["vision_config"])} if has_other_tower(checkpoint) else parts


def _check_components(
    report: Report, checkpoint: Checkpoint, parts: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> None:
    names = match_names(checkpoint.weight_map)
    for part, (prefix, fields) in parts.items():
        with _collect_errors(report):
            tensors = [checkpoint[place] for place in names.under(prefix).values()]
            report.parts[part] = {
                **part_fields(checkpoint, part, fields),
                "parameters": sum(prod(tensor.shape) for tensor in tensors),
                "dtypes": dict(Counter(torch_name(tensor.dtype) for tensor in tensors)),
            }
            report.problems += part_problems(checkpoint, part, prefix, fields)


def _check_extra_files(report: Report, checkpoint: Checkpoint) -> None:
    wanted = {*checkpoint.files, checkpoint.entry}
    for file in weight_files(checkpoint.source):
        if file not in wanted:
            what = f"stray weights: {checkpoint.entry} is what is loaded; remove it or name it"
            report.problems.append(Problem("stray", file, what))
    for file in checkpoint.source.files:
        if file.endswith(LEFTOVERS):
            report.problems.append(Problem("stray", file, "left over from work that did not end: remove it"))


def _check_code(report: Report, checkpoint: Checkpoint) -> None:
    """Code that config.json names, a processor's only where there is a processor; and how old it is."""
    files, auto_map = checkpoint.source.files, checkpoint.document("config.json").get("auto_map") or {}
    if not isinstance(auto_map, Mapping):
        raise CheckpointError(f"config.json: auto_map is {auto_map!r}, not a map")
    for auto, target in auto_map.items():
        file = str(target).split(".")[0] + ".py"
        unused = auto in ("AutoImageProcessor", "AutoProcessor") and "preprocessor_config.json" not in files
        if "--" not in file and file not in files and not unused:
            report.problems.append(Problem("code", file, f"missing, but config.json's auto_map wants {target}"))
    report.code = find_code(checkpoint.source, checkpoint.document("config.json"))
    for lack in report.code.lacks if report.code else ():
        what = f"version {report.code.version} cannot {lack}: `sailvit convert FOLDER --refresh-code` renews it"
        report.problems.append(Problem("code", "the folder's code", what))


def _check_image_settings(report: Report, checkpoint: Checkpoint) -> None:
    read_image_settings(checkpoint)


def _check_provenance(report: Report, checkpoint: Checkpoint) -> None:
    """What provenance.json names, and is no longer there."""
    record = checkpoint.document(PROVENANCE)
    if not record:
        return
    report.provenance = {key: value for key, value in record.items() if key != "tensors"}
    missing = recorded_hashes(record, "tensors").keys() - checkpoint.weight_map.keys()
    missing |= recorded_hashes(record, "files").keys() - {*checkpoint.source.files}
    for name in sorted(missing):
        report.problems.append(Problem("missing", name, f"missing, but {PROVENANCE} recorded it"))


def _check_values(report: Report, checkpoint: Checkpoint, on_progress: Callable[[int, int], None]) -> None:
    record = checkpoint.document(PROVENANCE)
    for file, recorded in recorded_hashes(record, "files").items():
        if file in checkpoint.source.files and hash_file(checkpoint.source.path(file)) != recorded:
            what = f"is not what {PROVENANCE} recorded: if it was changed on purpose, remove that file"
            report.problems.append(Problem("sha256", file, what))
    tensors: dict[str, StoredTensor] = {}
    for held in checkpoint.opened.values():
        tensors |= held
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        on_progress(done, total)

    report.problems += value_problems(tensors, recorded_hashes(record, "tensors"), count)


def table(report: Report) -> str:
    """A report for a person: what it is, then what is wrong."""
    fields = report.fields
    rows = {"source": report.source + (f" at {report.revision}" if report.revision else "")}
    for file, held in report.files.items():
        rows[f"file {file}"] = f"{held['tensors']} tensors, {held['bytes'] / 1e9:.3f} GB"
    if report.layout:
        learned = fields["pos_embed_type"] == "absolute"
        rows |= {
            "layout": f"{report.layout}: {report.reason}",
            "size": report.size or "none that is published",
            "dimensions": "width {hidden_size}, mlp {intermediate_size}, {num_hidden_layers} blocks, "
            "{num_attention_heads} heads, patches of {patch_size}".format(**fields),
            "resolution": f"{fields['image_size']} pixels, positions {'learned' if learned else 'sine-cosine'}",
            "parameters": f"{report.parameters / 1e6:.1f}M, {_counted(report.dtypes)}",
            "head": f"{len(report.heads)} tensors, not part of the tower" if report.heads else "none",
        }
    rows |= {part: _told(fields) for part, fields in report.parts.items()}
    if others := {name: count for name, count in report.others.items() if name not in PARTS or not report.parts}:
        rows["beside it"] = _counted(others)
    if report.wrappers:
        rows["wrappers"] = ", ".join(report.wrappers)
    if report.provenance:
        origin = report.provenance.get("source", {})
        rows["provenance"] = f"converted from {origin.get('name')} ({origin.get('layout')})"
    if report.code:
        rows["code"] = _told_of_code(report.code)
    if report.linked:
        rows["hard links"] = f"{', '.join(report.linked)}: writing into them in place changes what they are linked to"
    lines = [f"{key:<12} {value}" for key, value in rows.items()]
    lines += [f"{problem.kind:<12} {problem}" for problem in report.problems]
    verdict = f"NOT WHOLE: {len(report.problems)} problems" if report.problems else "whole"
    return "\n".join([*lines, f"{verdict}{', data read' if report.deep else ', by its headers'}"])


def _told_of_code(code: Code) -> str:
    if code.other:
        renews = "`sailvit convert FOLDER --refresh-code --overwrite` would replace it by the installed package's"
        return f"version {code.version}, but edited: {', '.join(code.other)}; {renews}"
    if code.version == code.package:
        return f"version {code.version}, as the installed package's"
    return f"version {code.version}, the installed package's is {code.package}"


def _told(fields: Mapping[str, Any]) -> str:
    """A part of a multimodal model, in a line."""
    names = {key: key.removeprefix("num_hidden_").replace("_", " ") for key in fields.keys() - {"parameters", "dtypes"}}
    said = [f"{names[key]} {value}" for key, value in fields.items() if key in names]
    return ", ".join([*said, f"{fields['parameters'] / 1e6:.1f}M", _counted(fields["dtypes"])])


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} tensors)" for name, count in counts.items())
