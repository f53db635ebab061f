"""Inspect a checkpoint: format, contents, integrity, from headers only; with `deep`, from the data too."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from .detect import AIMV2, detect_components
from .export.code_files import Code, find_code
from .export.image_settings import read_image_settings
from .models.aimv2_config import find_aimv2, size_name
from .models.sailvl_config import component_facts, quantized_by
from .storage.checkpoint import Checkpoint, FileCheckpoint, recorded_hashes, value_problems
from .storage.errors import CheckpointError, Problem
from .storage.files import count_bytes, hash_file, is_hard_link
from .storage.sources import ENGINE_ENTRIES, PROVENANCE, LocalFolder, find_source, weight_files
from .storage.tensors import torch_name


SAILVL_NAMES = ("mlp1", "language_model")
LEFTOVERS = (".part", ".tmp", ".incomplete", ".lock")


@dataclass
class Report:
    """The result of inspect_checkpoint. Of an AIMv2 also its layout, prefix, size, fields, dtypes and head."""

    source: str
    revision: str | None = None
    files: dict[str, dict[str, int]] = field(default_factory=dict)  # weight file -> its count of tensors and bytes
    layout: str | None = None
    prefix: str | None = None
    reason: str | None = None  # why this layout was detected
    size: str | None = None  # the published one with these dimensions, if there is one
    fields: dict[str, Any] = field(default_factory=dict)  # of SAILViTConfig
    parameters: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict)  # dtype -> count of tensors
    heads: list[str] = field(default_factory=list)  # names of the tensors of its head
    others: dict[str, int] = field(default_factory=dict)  # first segment of the names that are not its -> count
    wrappers: list[str] = field(default_factory=list)  # name segments that wrappers such as torch.compile added
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # component that is no AIMv2 -> facts about it
    provenance: dict[str, Any] | None = None  # provenance.json, without the tensors
    linked: list[str] = field(default_factory=list)  # weight files that are hard links
    code: Code | None = None  # this package's code in the folder
    deep: bool = False
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        problems = [{"kind": each.kind, "where": each.location, "what": each.message} for each in self.problems]
        return {**asdict(self), "problems": problems, "whole": self.ok}

    def add(self, kind: str, location: str, message: str) -> None:
        self.problems.append(Problem(kind, location, message))

    @contextmanager
    def collect_errors(self) -> Iterator[None]:
        """Add a CheckpointError to the problems, so that the other checks still run."""
        try:
            yield
        except CheckpointError as error:
            location, separator, message = str(error).partition(": ")
            self.add("layout", *((location, message) if separator else (self.source, location)))


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
    Report what a checkpoint is and what is wrong with it.

    Args:
        source: File, folder or name on the Hub; of a repository's safetensors only the headers are downloaded.
        revision: Branch, tag or commit on the Hub.
        from_layout: Layout of the AIMv2; detected by default.
        prefix: Prefix of the AIMv2's names, where several could be meant.
        trust_pickle: Skip objects of unknown classes in torch.save files; otherwise they are refused.
        deep: Whether to read (and download) the data too: NaN, infinities, hashes against provenance.json.
        on_progress: With `deep`, called with the bytes read so far and the total.

    Raises:
        CheckpointError: The source does not exist, or has no weights. Other problems are in the report.
    """
    origin, entry = find_source(str(source), revision, headers_only=not deep)
    checkpoint, report = FileCheckpoint(origin, entry, trust_pickle), Report(str(source), origin.revision, deep=deep)
    checks: list[Callable[[Report, FileCheckpoint], object]] = [
        _check_weight_files,
        _check_extra_files,
        _check_code,
        lambda _, checkpoint: read_image_settings(checkpoint),
        _check_provenance,
        partial(_check_architectures, from_layout=from_layout, prefix=prefix),
    ]
    if deep:
        checks.append(partial(_check_values, on_progress=on_progress))
    for check in checks:
        with report.collect_errors():
            check(report, checkpoint)
    report.problems = list(dict.fromkeys(report.problems))
    return report


def _check_weight_files(report: Report, checkpoint: Checkpoint) -> None:
    try:
        report.problems += checkpoint.shard_problems()
    finally:
        for file, tensors in checkpoint.opened.items():
            report.files[file] = {"tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors.values())}
        if isinstance(checkpoint.source, LocalFolder):
            report.linked = [file for file in report.files if is_hard_link(checkpoint.source.folder / file)]


def _check_extra_files(report: Report, checkpoint: Checkpoint) -> None:
    for file in checkpoint.source.files:
        if file.endswith(LEFTOVERS):
            report.add("stray", file, "left over from a process that did not finish: remove it")
    for file in weight_files(checkpoint.source):
        if file not in (*checkpoint.files, checkpoint.entry):
            report.add("stray", file, f"stray weights: {checkpoint.entry} is loaded instead; remove or name this file")


def _check_code(report: Report, checkpoint: Checkpoint) -> None:
    """Code that config.json names, a processor's only if there is a processor; and its version."""
    config, files = checkpoint.document("config.json"), checkpoint.source.files
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, Mapping):
        raise CheckpointError(f"config.json: auto_map: expected a map, got {auto_map!r}")
    for auto_class, target in auto_map.items():
        file = str(target).split(".")[0] + ".py"
        unused = auto_class in ("AutoImageProcessor", "AutoProcessor") and "preprocessor_config.json" not in files
        if "--" not in file and file not in files and not unused:
            report.add("code", file, f"missing, but auto_map in config.json names {target}")
    report.code = find_code(checkpoint.source, config)
    for lack in report.code.lacks if report.code else ():
        what = f"version {report.code.version} cannot {lack}: update it with `sailvit convert FOLDER --refresh-code`"
        report.add("code", "the folder's code", what)


def _check_provenance(report: Report, checkpoint: Checkpoint) -> None:
    """Tensors and files that provenance.json records, and that are missing."""
    record = checkpoint.document(PROVENANCE)
    report.provenance = {key: value for key, value in record.items() if key != "tensors"} if record else None
    for section, present in {"tensors": checkpoint.weight_map, "files": checkpoint.source.files}.items():
        for name in sorted(recorded_hashes(record, section).keys() - {*present}):
            report.add("missing", name, f"missing, but {PROVENANCE} recorded it")


def _check_architectures(report: Report, checkpoint: Checkpoint, from_layout: str | None, prefix: str | None) -> None:
    found = detect_components(checkpoint)
    if (from_layout or prefix) and AIMV2 not in found:
        found.append(AIMV2)
    for architecture in found:
        with report.collect_errors():
            is_quantized = quantized_by(checkpoint, architecture.part) is not None
            if architecture is AIMV2 and not is_quantized:
                _check_aimv2(report, checkpoint, from_layout, prefix)
                continue
            if architecture.part:
                report.parts[architecture.part] = component_facts(checkpoint, architecture.part)
            report.problems += [] if is_quantized else architecture.problems(checkpoint)


def _check_aimv2(report: Report, checkpoint: Checkpoint, from_layout: str | None, prefix: str | None) -> None:
    tower = find_aimv2(checkpoint, from_layout, prefix)
    match, pixels = tower.match, tower.fields["image_size"]
    report.layout, report.prefix, report.reason = match.scheme.name, match.prefix, match.reason
    report.heads, report.others, report.wrappers = match.dropped, dict(match.others), match.wrappers
    report.size, report.fields = size_name(tower.dimensions), tower.fields
    report.parameters = sum(prod(tensor.shape) for tensor in tower.tensors.values())
    report.dtypes = dict(Counter(torch_name(tensor.dtype) for tensor in tower.tensors.values()))
    is_mixed = checkpoint.entry.endswith(ENGINE_ENTRIES)  # fp32 master weights besides rounded frozen ones
    report.problems += [problem for problem in tower.problems if not (is_mixed and problem.kind == "mixed")]
    size = checkpoint.document("preprocessor_config.json").get("size")
    is_sailvit = checkpoint.document("config.json").get("model_type") in ("sailvit", "sailvl")
    if is_sailvit and size not in (None, pixels, {"height": pixels, "width": pixels}):
        what = f"expected tiles of {pixels} pixels, as the position embeddings have, got {size}"
        report.add("config", "preprocessor_config.json", what)


def _check_values(report: Report, checkpoint: Checkpoint, on_progress: Callable[[int, int], None]) -> None:
    record = checkpoint.document(PROVENANCE)
    for file, recorded in recorded_hashes(record, "files").items():
        if file in checkpoint.source.files and hash_file(checkpoint.source.path(file)) != recorded:
            report.add("sha256", file, f"differs from {PROVENANCE}: if it was changed on purpose, remove that file")
    tensors = {name: tensor for shard in checkpoint.opened.values() for name, tensor in shard.items()}
    count = count_bytes(sum(tensor.nbytes for tensor in tensors.values()), on_progress)
    report.problems += value_problems(tensors, recorded_hashes(record, "tensors"), count)


def table(report: Report) -> str:
    """Return a report as text: what the checkpoint is, then its problems."""
    rows = {"source": report.source + (f" at {report.revision}" if report.revision else "")}
    for file, size in report.files.items():
        rows[f"file {file}"] = f"{size['tensors']} tensors, {size['bytes'] / 1e9:.3f} GB"
    rows |= _aimv2_rows(report) if report.layout else {}
    rows |= {part: _component_line(facts) for part, facts in report.parts.items()}
    others = {name: count for name, count in report.others.items() if name not in SAILVL_NAMES or not report.parts}
    origin, linked = (report.provenance or {}).get("source", {}), ", ".join(report.linked)
    rows |= {
        "other names": _counts(others),
        "wrappers": ", ".join(report.wrappers),
        "provenance": report.provenance and f"converted from {origin.get('name')} ({origin.get('layout')})",
        "code": report.code and _code_line(report.code),
        "hard links": linked and f"{linked}: writing into them in place changes what they are linked to",
    }
    lines = [f"{key:<12} {value}" for key, value in rows.items() if value]
    lines += [f"{problem.kind:<12} {problem}" for problem in report.problems]
    verdict = "valid" if report.ok else f"INVALID: {len(report.problems)} problem{'s' * (len(report.problems) > 1)}"
    return "\n".join([*lines, f"{verdict}{', data read' if report.deep else ', by its headers'}"])


def _aimv2_rows(report: Report) -> dict[str, str]:
    fields, positions = report.fields, {"absolute": "learned", "sincos": "sine-cosine"}
    return {
        "layout": f"{report.layout}: {report.reason}",
        "size": report.size or "none that is published",
        "dimensions": "width {hidden_size}, mlp {intermediate_size}, {num_hidden_layers} blocks, "
        "{num_attention_heads} heads, patches of {patch_size}".format(**fields),
        "resolution": f"{fields['image_size']} pixels, positions {positions[fields['pos_embed_type']]}",
        "parameters": f"{report.parameters / 1e6:.1f}M, {_counts(report.dtypes)}",
        "head": f"{len(report.heads)} tensors, not part of the encoder" if report.heads else "none",
    }


def _component_line(facts: Mapping[str, Any]) -> str:
    named = {key.removeprefix("num_hidden_").replace("_", " "): value for key, value in facts.items()}
    parameters, dtypes = named.pop("parameters"), named.pop("dtypes")  # of quantized weights, what is stored
    shown = [f"{key} {value}" for key, value in named.items()]
    return ", ".join([*shown, f"{parameters / 1e6:.1f}M", _counts(dtypes)])


def _code_line(code: Code) -> str:
    if code.other:
        fix = "`sailvit convert FOLDER --refresh-code --overwrite` would replace it by the installed package's"
        return f"version {code.version}, but edited: {', '.join(code.other)}; {fix}"
    is_same, package = code.version == code.package, "the installed package's"
    return f"version {code.version}, {f'as {package}' if is_same else f'{package} is {code.package}'}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} tensors)" for name, count in counts.items())
