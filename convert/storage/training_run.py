"""Open any kind of checkpoint: weights, an adapter, a training checkpoint, several to average."""

from collections.abc import Sequence
from pathlib import Path

from .checkpoint import Checkpoint, FileCheckpoint
from .errors import CheckpointError
from .lora import MergedLoRA, unwrap
from .overlay import Average, CompositeCheckpoint, Overlay
from .sources import ADAPTER, find_source, without_local_path


def open_checkpoint(
    source: str,
    revision: str | None = None,
    *,
    base: str | None = None,
    average: Sequence[str] = (),
    trust_pickle: bool = False,
) -> Checkpoint:
    """
    A checkpoint of any kind: a file, a folder or a repository on the Hub (at a branch, tag or commit, its `revision`),
    as are `base`, which the training began with, and those in `average`, more checkpoints of the same run. Adapters are
    merged into their base; tensors that a training left out, or rounded without changing them, come from the base.
    With `trust_pickle`, pickles may name unknown classes. Raises a CheckpointError if one of them does not exist or is
    corrupt, or they do not belong together.
    """
    checkpoint = _open_one(source, revision, base, trust_pickle)
    if not average:
        return checkpoint
    paths = [str(Path(each).resolve()) if Path(each).exists() else each for each in (source, *average)]
    if len({*paths}) < len(paths):
        raise CheckpointError(f"{source}: --average is for different checkpoints: one is named twice")
    return Average([checkpoint, *(_open_one(other, None, base, trust_pickle) for other in average)])


def _open_one(source: str, revision: str | None, base: str | None, trust: bool) -> Checkpoint:
    checkpoint = FileCheckpoint(*find_source(source, revision), trust)
    is_adapter = ADAPTER in checkpoint.source.files
    if is_adapter and not base:
        base = _base_of_adapter(checkpoint)
    opened_base = unwrap(FileCheckpoint(*find_source(base), trust)) if base else None
    if is_adapter:
        return MergedLoRA(checkpoint, opened_base)
    return Overlay(unwrap(checkpoint), opened_base) if opened_base else unwrap(checkpoint)


def _base_of_adapter(checkpoint: Checkpoint) -> str:
    """The base that an adapter names, if it is a local folder."""
    base = checkpoint.document(ADAPTER).get("base_model_name_or_path")
    if isinstance(base, str) and base and Path(base).is_dir():
        return base
    what = f"an adapter to {without_local_path(base)!r}" if isinstance(base, str) and base else "an adapter"
    raise CheckpointError(f"{checkpoint.source.name}: {what}: name the base that it is merged into with --base")


def training_notes(checkpoint: Checkpoint) -> list[str]:
    """Lines about the training and the base, for the log."""
    metadata = checkpoint.training_metadata
    merged = metadata if isinstance(checkpoint, CompositeCheckpoint) else {}  # else recorded by an earlier conversion
    if "mean_of" in merged:
        steps = ", ".join(str(part.get("step", part["name"])) for part in merged["mean_of"])
        return [f"the mean, in float32, of {len(merged['mean_of'])} checkpoints: {steps}"]
    formats = {"engine": "{}", "ranks": "{} ranks", "step": "step {}", "tokens_seen": "{} tokens seen"}
    training = ", ".join(text.format(metadata[key]) for key, text in formats.items() if key in metadata)
    notes = [f"trained: {training}"] if training else []
    base, adapter = merged.get("base", {}), merged.get("adapter", {})
    if base:
        verb = "merged into" if adapter else "missing tensors are taken from"
        exact = f", and {base['exact']} rounded tensors exact" if base.get("exact") else ""
        notes.append(f"{verb} {base['name']}{exact}")
    if adapter and metadata.get("trained_from") not in (None, base["name"]):
        notes.append(f"the adapter was trained on {metadata['trained_from']}, by its own account")
    if "of" in adapter:
        notes.append(f"the adapter was trained on {adapter['of']} alone")
    for part, lora in merged.get("merged", {}).items():
        scale = f"rank {lora['r']}, alpha {lora['lora_alpha']} as InternVL has it"
        notes.append(f"{part} was saved with LoRA in it, merged: {scale}")
    if rounded := base.get("rounded"):
        notes.append(f"not the base's, so rounded by the engine: {len(rounded)} tensors ({rounded[0]}, ...)")
    return notes
