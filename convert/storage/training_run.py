"""What a stage of training left: opened, with its base and its adapter, and what it tells of the training."""

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .deepspeed_zero import MASTERS
from .errors import CheckpointError
from .lora import AdaptedModel, MergedLoRA, Unwrapped, unwrap
from .overlay import TRAINER_STATE, Average, CompositeCheckpoint, Overlay
from .sources import ADAPTER, ENGINE_ENTRIES, PROVENANCE, Source, find_source, licence_of, public_name
from .tensors import torch_name
from .training_record import read_training


def open_trained(
    source: str,
    revision: str | None = None,
    *,
    base: str | None = None,
    average: Sequence[str] = (),
    trust_pickle: bool = False,
) -> Checkpoint:
    """
    A checkpoint of any kind: an adapter is merged into its base, what a stage did not save comes from the base.

    Args:
        source: A file, a folder or a name on the Hub.
        revision: Branch, tag or commit of a name on the Hub.
        base: Likewise, what the training began with.
        average: More checkpoints of the same run; the mean of `source` and all of these is taken.
        trust_pickle: Whether files of torch.save may run code of their own.

    Raises:
        CheckpointError: One of them does not exist or is broken, or they do not belong together.
    """
    checkpoint = _open_one(source, revision, base, trust_pickle)
    if average:
        if len({_bare_path(each) for each in (source, *average)}) <= len(average):
            raise CheckpointError(f"{source}: --average is of different checkpoints: one is named twice")
        others = [_open_one(other, None, base, trust_pickle) for other in average]
        return Average([checkpoint, *others])
    return checkpoint


def _open_one(source: str, revision: str | None, base: str | None, trust: bool) -> Checkpoint:
    checkpoint = Checkpoint(*find_source(source, revision), trust)
    if ADAPTER in checkpoint.source.files:
        base = base or _local_base(checkpoint)
        return MergedLoRA(checkpoint, unwrap(Checkpoint(*find_source(base), trust)))
    checkpoint = unwrap(checkpoint)
    return Overlay(checkpoint, unwrap(Checkpoint(*find_source(base), trust))) if base else checkpoint


def _bare_path(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source


def _local_base(checkpoint: Checkpoint) -> str:
    """
    Raises:
        CheckpointError: The base of an adapter is not on this machine.
    """
    base = checkpoint.document(ADAPTER).get("base_model_name_or_path")
    if isinstance(base, str) and base and Path(base).is_dir():
        return base
    what = f"an adapter to {_without_local_path(base)!r}" if isinstance(base, str) and base else "an adapter"
    raise CheckpointError(f"{checkpoint.source.name}: {what}: say what it is to be merged into, with --base")


def training_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """
    For provenance.json: what the folder's own says of its training, stages and recipes; engine, ranks, step, epoch,
    tokens seen, the base and what came from it, where that is known.
    """
    if isinstance(checkpoint, Average):
        return {"mean_of": [_part_metadata(part) | training_metadata(part) for part in checkpoint.parts.values()]}
    own = checkpoint.parts[""] if isinstance(checkpoint, (Overlay, MergedLoRA)) else checkpoint
    facts = source_metadata(own)
    if isinstance(own, Unwrapped):
        facts["merged"] = {part: {"r": rank, "lora_alpha": 2 * rank} for part, rank in own.ranks.items()}
    if isinstance(checkpoint, (Overlay, MergedLoRA)):
        facts["base"] = _part_metadata(checkpoint.base) | training_metadata(checkpoint.base)
        before = checkpoint.base.document(PROVENANCE).get("source")
        facts["base"] |= {"source": before} if before else {}
    if isinstance(checkpoint, Overlay):
        kept = sorted(name for name, exact in checkpoint.exact.items() if not exact)
        facts["base"]["exact"] = sum(checkpoint.exact.values())
        facts["base"] |= {"rounded": kept} if kept else {}
    if isinstance(checkpoint, MergedLoRA):
        facts["adapter"] = {key: checkpoint.config.get(key) for key in ("peft_type", "r", "lora_alpha")}
        facts["adapter"] |= {"of": checkpoint.prefix.rstrip(".")} if checkpoint.prefix else {}
    return facts


def _part_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    source = checkpoint.source
    return {"name": public_name(source), "revision": source.revision, **licence_of(source)}


def _without_local_path(name: str) -> str:
    """The name of a folder without its place on this machine; that of a repository as it is."""
    is_place = Path(name).is_absolute() or "\\" in name or name.startswith((".", "~")) or Path(name).exists()
    return Path(name).resolve().name if is_place else name


def source_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.entry.endswith(ENGINE_ENTRIES):
        checkpoint.open(checkpoint.entry)
    facts = read_training(checkpoint.document).to_json()
    facts |= {key: value for key, value in checkpoint.engine.items() if key != MASTERS and _is_plain(value)}
    state = checkpoint.document(TRAINER_STATE)
    if state:
        facts.setdefault("engine", "transformers Trainer")
    for fact, key in {"step": "global_step", "epoch": "epoch", "tokens_seen": "num_input_tokens_seen"}.items():
        value = state.get(key)
        if type(value) in (int, float) and math.isfinite(value) and (value or fact != "tokens_seen"):
            facts[fact] = value
    adapted = checkpoint.document(ADAPTER).get("base_model_name_or_path")
    base = adapted or checkpoint.document("config.json").get("_name_or_path")
    if (facts or adapted) and isinstance(base, str) and base:  # a model's alone is where a copy was loaded from
        facts["trained_from"] = _without_local_path(base)
    return facts


def _is_plain(value: Any) -> bool:
    """Whether it is a number or a short text, such as a version: engines' files may say anything."""
    return type(value) in (int, float) or (isinstance(value, str) and bool(re.fullmatch(r"[\w.+ -]{1,40}", value)))


def training_notes(checkpoint: Checkpoint) -> list[str]:
    """The same for a person, line by line."""
    facts = training_metadata(checkpoint)
    if "mean_of" in facts:
        steps = ", ".join(str(part.get("step", part["name"])) for part in facts["mean_of"])
        return [f"the mean, in float32, of {len(facts['mean_of'])} checkpoints: {steps}"]
    told = {"engine": "{}", "ranks": "{} ranks", "step": "step {}", "tokens_seen": "{} tokens seen"}
    said = [text.format(facts[key]) for key, text in told.items() if key in facts]
    notes = [f"trained: {', '.join(said)}"] if said else []
    if base := facts.get("base"):
        how = "merged into" if "adapter" in facts else "what it lacks comes from"
        exact = f", and {base['exact']} rounded tensors exact" if base.get("exact") else ""
        notes.append(f"{how} {base['name']}{exact}")
        if "adapter" in facts and facts.get("trained_from") not in (None, base["name"]):
            notes.append(f"the adapter says that it was trained on {facts['trained_from']}")
    if isinstance(checkpoint, MergedLoRA) and checkpoint.prefix:
        notes.append(f"the adapter was trained on {checkpoint.prefix.rstrip('.')} alone")
    own = checkpoint.trained if isinstance(checkpoint, Overlay) else checkpoint
    for part, rank in own.ranks.items() if isinstance(own, Unwrapped) else ():
        notes.append(f"{part} was saved with LoRA in it, merged: rank {rank}, alpha {2 * rank} as InternVL has it")
    if isinstance(checkpoint, AdaptedModel) and checkpoint.is_untied:
        notes.append("embeddings and head, tied in the base, were trained apart: both are written, and not tied")
    if rounded := (base or {}).get("rounded"):
        notes.append(f"not the base's, so as the engine rounded them: {len(rounded)} tensors ({rounded[0]}, ...)")
    return notes


def default_dtype(checkpoint: Checkpoint, names: Collection[str] = ()) -> str | None:
    """
    The precision to write where none was asked for and the tensors have several by nature: float32 where masters stand
    beside rounded frozen ones, that of the base where an adapter is merged. None where nothing is to be said.

    Args:
        names: Those that are to be written; all if there are none.
    """
    trained = checkpoint.trained if isinstance(checkpoint, Overlay) else checkpoint
    if isinstance(trained, AdaptedModel):
        return torch_name(trained.dtype)
    if not trained.entry.endswith(ENGINE_ENTRIES):
        return None
    tensors = trained.open(trained.entry)
    dtypes = {tensors[name].dtype for name in names or tensors if name in tensors}
    return "float32" if "F32" in dtypes and dtypes <= {"F32", "BF16", "F16"} and len(dtypes) > 1 else None


def all_sources(checkpoint: Checkpoint) -> list[Source]:
    """Every source a checkpoint is made of."""
    if isinstance(checkpoint, CompositeCheckpoint):
        return [source for part in checkpoint.parts.values() for source in all_sources(part)]
    return [checkpoint.source]
