"""The doctor: what a checkpoint is, and whether it is whole. It reads headers; with `deep`, the data too."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from .problems import CheckpointError, Problem
from .readers import PROVENANCE, Checkpoint, StoredTensor
from .sources import find_source, weight_files
from .tower import Tower, find_tower, read_tower_config, size_name, source_json
from .values import torch_name, value_problems


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
        provenance: Where it came from, by its provenance.json.
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
    provenance: dict[str, Any] | None = None
    deep: bool = False
    problems: list[Problem] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**asdict(self), "whole": self.whole}


def inspect_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    from_layout: str | None = None,
    prefix: str | None = None,
    trust_pickle: bool = False,
    deep: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """
    Looks a checkpoint over.

    Args:
        source: A file, a folder or a name on the Hub (whose weights are downloaded).
        revision: Branch, tag or commit on the Hub.
        from_layout: The layout it has, if that is known.
        prefix: What stands before the tower's names, where more than one tower could be meant.
        trust_pickle: Whether files of torch.save may run code of their own.
        deep: Whether to read the data: NaN, infinities, hashes against provenance.json.
        progress: With `deep`, told the bytes that were read, and how many there are.

    Raises:
        CheckpointError: There is no such thing, or no weights in it. What is wrong with weights is in the report.
    """
    origin, entry = find_source(str(source), revision)
    checkpoint, report = Checkpoint(origin, entry, trust_pickle), Report(str(source), origin.revision)
    try:
        report.problems += checkpoint.shard_problems()
    except CheckpointError as error:
        report.problems.append(_as_problem(error, entry))
        return report
    for file, tensors in checkpoint.opened.items():
        report.files[file] = {"tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors.values())}
    report.problems += _folder_problems(checkpoint)
    try:
        tower = find_tower(checkpoint, from_layout, prefix)
    except CheckpointError as error:
        report.problems.append(_as_problem(error, entry))
        tower = None
    if tower:
        _describe(report, tower)
        report.problems += tower.problems + _processor_problems(checkpoint, tower)
    _compare_with_record(report, checkpoint, deep, progress)
    report.problems = list(dict.fromkeys(report.problems))
    return report


def _as_problem(error: CheckpointError, entry: str) -> Problem:
    where, separator, what = str(error).partition(": ")
    return Problem("layout", where, what) if separator else Problem("layout", entry, where)


def _describe(report: Report, tower: Tower) -> None:
    found = tower.found
    report.layout, report.prefix, report.reason = found.layout.name, found.prefix, found.reason
    report.heads, report.others, report.wrappers = found.heads, found.others, found.wrappers
    report.size, report.fields = size_name(tower.shape), tower.fields
    report.parameters = sum(prod(tensor.shape) for tensor in tower.tensors.values())
    report.dtypes = {torch_name(dtype): count for dtype, count in tower.dtypes.items()}


def _folder_problems(checkpoint: Checkpoint) -> list[Problem]:
    """Files that should not be there, and code that should."""
    source, wanted = checkpoint.source, {*checkpoint.files, checkpoint.entry}
    problems = [
        Problem("stray", file, f"stray weights: {checkpoint.entry} is what is loaded; remove it or name it")
        for file in weight_files(source)
        if file not in wanted
    ]
    problems += [
        Problem("stray", file, "left over from work that did not end: remove it")
        for file in source.files
        if file.endswith(LEFTOVERS)
    ]
    for target in (source_json(checkpoint, "config.json").get("auto_map") or {}).values():
        file = str(target).split(".")[0] + ".py"
        if "--" not in file and file not in source.files:
            problems.append(Problem("code", file, f"missing, but config.json's auto_map wants {target}"))
    return problems


def _processor_problems(checkpoint: Checkpoint, tower: Tower) -> list[Problem]:
    size = source_json(checkpoint, "preprocessor_config.json").get("size")
    config = source_json(checkpoint, "config.json")
    pixels = tower.fields["image_size"]
    if not size or config.get("model_type") != "sailvit" or not read_tower_config(config):
        return []
    if size in (pixels, {"height": pixels, "width": pixels}):
        return []
    return [
        Problem("config", "preprocessor_config.json", f"has tiles of {size}, the positions are for {pixels} pixels")
    ]


def _compare_with_record(
    report: Report, checkpoint: Checkpoint, deep: bool, progress: Callable[[int, int], None]
) -> None:
    record = source_json(checkpoint, PROVENANCE)
    recorded: Mapping[str, Mapping[str, str]] = record.get("tensors") or {}
    if record:
        report.provenance = {key: value for key, value in record.items() if key != "tensors"}
    tensors: dict[str, StoredTensor] = {}
    for held in checkpoint.opened.values():
        tensors |= held
    for name in recorded.keys() - tensors.keys():
        report.problems.append(Problem("missing", name, f"missing, but {PROVENANCE} recorded it"))
    report.deep = deep
    if not deep:
        return
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        progress(done, total)

    hashes = {name: entry["sha256"] for name, entry in recorded.items()}
    report.problems += value_problems(tensors, hashes, count)


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
    if report.others:
        rows["beside it"] = _counted(report.others)
    if report.wrappers:
        rows["wrappers"] = ", ".join(report.wrappers)
    if report.provenance:
        origin = report.provenance.get("source", {})
        rows["provenance"] = f"converted from {origin.get('name')} ({origin.get('layout')})"
    lines = [f"{key:<12} {value}" for key, value in rows.items()]
    lines += [f"{problem.kind:<12} {problem}" for problem in report.problems]
    verdict = f"NOT WHOLE: {len(report.problems)} problems" if report.problems else "whole"
    return "\n".join([*lines, f"{verdict}{', data read' if report.deep else ', by its headers'}"])


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} tensors)" for name, count in counts.items())
