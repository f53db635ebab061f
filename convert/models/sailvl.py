"""
A complete SAIL-VL: the names of its tensors, and its conversion. Weight files that need no change are reflinked, copied
or, on request, hard-linked; the others are rewritten.
"""

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from ..export.card import write_conversion_card
from ..export.image_settings import has_normalization
from ..export.sailvl_files import build_processor, write_sailvl_files
from ..export.tokenizer_files import (
    copy_tokenizer,
    find_image_token,
    mark_tokenizer,
    padding_notes,
    write_generation_config,
)
from ..plan import ConversionPlan, Options, output_dtype
from ..storage.checkpoint import Checkpoint, FileCheckpoint
from ..storage.errors import CheckpointError, Problem, VerificationError, raise_if_any
from ..storage.files import (
    COPIED,
    LINKED,
    REFLINKED,
    copy_file,
    count_bytes,
    hash_file,
    is_cached,
    link_files,
    write_json,
)
from ..storage.names import text_fields, without_wrapper_prefixes
from ..storage.output_folder import check_space
from ..storage.safetensors_io import write_weights
from ..storage.sources import WEIGHTS, Source, find_source, licence_of, public_name
from ..storage.tensors import NewTensor, StoredTensor, cast_stream, torch_name
from ..verify.outputs import run_in_clean_process
from .aimv2 import AIMv2Plan, plan_aimv2
from .sailvl_config import (
    MODEL_TYPES,
    build_meta_model,
    model_problems,
    read_config,
    vision_fields,
    without_converted,
)


if TYPE_CHECKING:
    from ...configuration_sailvl import SAILVLConfig
    from ...processing_sailvl import SAILVLProcessor

VISION, CONNECTOR, LANGUAGE = "vision_model.", "mlp1.", "language_model."

PREFIXES = {"vision": VISION, "connector": CONNECTOR, "language": LANGUAGE}

COMPONENT_NAME = re.compile(r"(?P<prefix>(?:.*?\.)??)(?:vision_model|mlp1|language_model)\.")

TEMPLATE = "sailvl-chat"


@dataclass(frozen=True)
class Names:
    """
    The tensor names of a checkpoint, mapped to those of a SAIL-VL.

    Attributes:
        stored: Released name -> name in the checkpoint.
        prefix: Prefix of all of them in the checkpoint.
        wrappers: Name segments that wrappers such as torch.compile added.
        others: Names without the prefix.
    """

    stored: dict[str, str]
    prefix: str = ""
    wrappers: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def under(self, prefix: str) -> dict[str, str]:
        """Return those of one component, without its prefix -> name in the checkpoint."""
        own = {name: stored_name for name, stored_name in self.stored.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): stored_name for name, stored_name in own.items()}

    @property
    def are_canonical(self) -> bool:
        return not (self.prefix or self.wrappers or self.others)


def match_names(names: Iterable[str]) -> Names:
    """Raises CheckpointError if two names are the same without wrappers."""
    cleaned, wrappers = without_wrapper_prefixes(names)
    prefixes = Counter(match["prefix"] for short in cleaned if (match := COMPONENT_NAME.match(short)))
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    stored = {short.removeprefix(prefix): name for short, name in cleaned.items() if short.startswith(prefix)}
    others = [name for short, name in cleaned.items() if not short.startswith(prefix)]
    return Names(stored, prefix, wrappers, others)


def is_sailvl(names: Iterable[str], config: Mapping[str, Any]) -> bool:
    """Whether there are names of a language model, and of a connector unless config.json has the model type."""
    components = {name.split(".")[0] for name in match_names(names).stored}
    return "language_model" in components and ("mlp1" in components or config.get("model_type") in MODEL_TYPES)


def renamed_tensors(checkpoint: Checkpoint, names: Mapping[str, str], dtype: str) -> list[NewTensor]:
    """
    Return tensors that are written as they are stored, but for name and dtype.

    Args:
        names: Written name -> name in the checkpoint.
    """

    def tensor(name: str, stored_name: str) -> NewTensor:
        stored = checkpoint[stored_name]
        return NewTensor(name, dtype, stored.shape, lambda: cast_stream(stored, stored_name, dtype))

    return [tensor(name, stored_name) for name, stored_name in names.items()]


@dataclass(kw_only=True)
class SAILVLPlan(ConversionPlan):
    """
    Writes all of a SAIL-VL.

    Attributes:
        names: Written name -> name in the checkpoint, without a replaced vision encoder.
        config: As written.
        processor: As written.
        vision: The vision encoder that replaces the source's.
        link: Whether unchanged files may be hard links.
        placed: Written name of an unchanged file -> REFLINKED, LINKED or COPIED.
        copied: Bytes of unchanged files that were copied.
    """

    names: dict[str, str]
    config: "SAILVLConfig"
    processor: "SAILVLProcessor"
    vision: AIMv2Plan | None = None
    link: bool = False
    placed: dict[str, str] = field(default_factory=dict)
    copied: int = 0

    def tensors(self) -> list[NewTensor]:
        return [*renamed_tensors(self.checkpoint, self.names, self.dtype), *self._inserted_tensors()]

    def source_tensors(self) -> Iterable[StoredTensor]:
        return map(self.checkpoint.__getitem__, self.checkpoint.weight_map)

    def _inserted_tensors(self) -> list[NewTensor]:
        tensors = self.vision.tensors() if self.vision else []
        return [NewTensor(VISION + tensor.name, tensor.dtype, tensor.shape, tensor.chunks) for tensor in tensors]

    def write_weights(
        self, folder: Path, max_shard_size: int | str, on_progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        if not self.unchanged_files:
            return super().write_weights(folder, max_shard_size, on_progress)
        shards, path = self._rewritten_shards(), self.checkpoint.source.path
        files = {folder / name: path(file) for name, file in self._unchanged_names().items()}
        made = link_files(files, self.link)
        self.placed = {target.name: made.get(target, COPIED) for target in files}
        self.copied = sum(file.stat().st_size for target, file in files.items() if target not in made)
        total = self.copied + sum(tensor.nbytes for shard in shards.values() for tensor in shard)
        check_space(folder, total)
        count = count_bytes(total, on_progress)
        for target, file in files.items():
            if target not in made:
                copy_file(file, target, count)
        digests = {file: _write_shard(folder / file, shard, count) for file, shard in shards.items()}
        if self.checkpoint.entry.endswith(".index.json"):
            self._write_index(folder / WEIGHTS[1], digests)
        self.notes += self._placed_notes()
        return {name: digest for file in digests for name, digest in digests[file].items()}

    def _write_index(self, path: Path, written: Mapping[str, Iterable[str]]) -> None:
        """Write the index of the shards; written: file -> tensors of the rewritten ones."""
        if not written:
            shutil.copyfile(self.checkpoint.source.path(self.checkpoint.entry), path)
            return
        weight_map = {name: self.checkpoint.weight_map[stored_name] for name, stored_name in self.names.items()}
        weight_map |= {name: file for file, names in written.items() for name in names}
        size = sum(tensor.nbytes for tensor in self.tensors())
        write_json(path, {"metadata": {"total_size": size}, "weight_map": weight_map})

    def _unchanged_names(self) -> dict[str, str]:
        """Return written name -> name in the source of the unchanged files."""
        is_sharded = self.checkpoint.entry.endswith(".index.json")
        return {file if is_sharded else WEIGHTS[0]: file for file in self.unchanged_files}

    def _rewritten_shards(self) -> dict[str, list[NewTensor]]:
        """Return file -> tensors, of files with tensors of the replaced vision encoder; the first gets the new ones."""
        shards, weight_map = {}, self.checkpoint.weight_map
        for file in [file for file in self.checkpoint.files if file not in self.unchanged_files]:
            held = {name: stored for name, stored in self.names.items() if weight_map[stored] == file}
            inserted = [] if shards else self._inserted_tensors()
            shards[file] = [*renamed_tensors(self.checkpoint, held, self.dtype), *inserted]
        return {file: shard for file, shard in shards.items() if shard}

    def _placed_notes(self) -> list[str]:
        why = "this file system has no reflinks between the two (--link makes hard links)"
        if self.link:
            cached = any(is_cached(self.checkpoint.source.path(file)) for file in self.unchanged_files)
            why = "a cache of the Hub is never linked to" if cached else "no link can be made there"
        size = f"{self.copied / 1e9:.1f} GB" if self.copied > 1e9 else f"{self.copied / 1e6:.1f} MB"
        meaning = {
            REFLINKED: "reflinked: they take no space, and writing into one side leaves the other as it is",
            LINKED: "hard links: whatever writes into them in place changes the source too",
            COPIED: f"copied, {size}: {why}",
        }
        counts = sorted(Counter(self.placed.values()).items())
        return [f"unchanged weight files: {count} {meaning[how]}" for how, count in counts]

    def write_folder(self, folder: Path) -> None:
        fields = self.checkpoint.document("config.json")
        copy_tokenizer(self.checkpoint, folder)
        mark_tokenizer(folder, self.config.image_token)
        write_generation_config(self.checkpoint, folder)
        components = text_fields(fields), vision_fields(fields)
        write_sailvl_files(folder, self.config, *components, self.dtype, self.processor)
        description = describe_sailvl(self.config, self.dtype)
        write_conversion_card(folder, [self.checkpoint.source], description, CARD_TAGS)

    def verify(self, folder: Path) -> dict[str, Any]:
        return verify_sailvl(folder)

    def provenance(self) -> dict[str, Any]:
        record = {"source": {"layout": "sailvl"}, "part": "all", "kept": self._unchanged_names()}
        if self.placed:
            record["placed"] = self.placed
        if self.vision:
            match, checkpoint = self.vision.match, self.vision.checkpoint
            files = [file for file in (*checkpoint.opened, *checkpoint.documents) if file in checkpoint.source.files]
            record["inserted"] = {
                **source_provenance(checkpoint.source, files), "layout": match.scheme.name, "prefix": match.prefix,
            }  # fmt: skip
        return record


def source_provenance(source: Source, files: Iterable[str]) -> dict[str, Any]:
    """Return the entries of provenance.json about another source, with the hashes of the files that were read."""
    hashes = {file: {"sha256": hash_file(source.path(file))} for file in files}
    return {"name": public_name(source), "revision": source.revision, **licence_of(source), "files": hashes}


def _write_shard(path: Path, tensors: list[NewTensor], on_progress: Callable[[int], None]) -> dict[str, str]:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        digests = write_weights(Path(scratch), tensors, 1 << 62, on_progress)
        (Path(scratch) / WEIGHTS[0]).rename(path)
    return digests


def plan_sailvl(checkpoint: Checkpoint, options: Options) -> SAILVLPlan:
    """Raises CheckpointError if the checkpoint is no complete SAIL-VL, or an option does not fit it."""
    source, names = checkpoint.source.name, match_names(checkpoint.weight_map)
    raise_if_any(sailvl_problems(checkpoint), source)
    dtype = output_dtype(options.dtype, {name: checkpoint[stored] for name, stored in names.stored.items()}, source)
    config, vision = read_config(checkpoint), None
    if options.insert_vision:
        vision = _plan_insertion(checkpoint, names, options, dtype, config)
        config = read_config(checkpoint, **_config_changes(vision, checkpoint))
    config.image_token_id = find_image_token(checkpoint, config)
    kept = {name: stored for name, stored in names.stored.items() if not (vision and name.startswith(VISION))}
    changed = {checkpoint.weight_map[names.stored[name]] for name in names.stored.keys() - kept.keys()}
    if options.max_shard_size is not None or not names.are_canonical or not _loads_as_stored(checkpoint, dtype):
        changed = {*checkpoint.files}
    plan = SAILVLPlan(
        checkpoint=checkpoint,
        dtype=dtype,
        names=kept,
        config=config,
        processor=build_processor(checkpoint, config),
        unchanged_files=[file for file in checkpoint.files if file not in changed],
        vision=vision,
        link=options.link,
    )
    plan.notes = _notes(plan, names)
    return plan


def sailvl_problems(checkpoint: Checkpoint) -> list[Problem]:
    """
    Return the problems of the files; if there are none, those of the tensors: names and shapes that config.json does
    not describe.
    """
    if problems := checkpoint.shard_problems():
        return problems
    names, config = match_names(checkpoint.weight_map), read_config(checkpoint)
    model = build_meta_model(config, checkpoint.source.name)
    problems = model_problems(checkpoint, names.stored, model, names.prefix)
    return without_converted(problems, config.text_config.model_type, LANGUAGE)


def _plan_insertion(
    checkpoint: Checkpoint, names: Names, options: Options, dtype: str, config: "SAILVLConfig"
) -> AIMv2Plan:
    origin, entry = find_source(str(options.insert_vision))
    plan = plan_aimv2(FileCheckpoint(origin, entry, checkpoint.trust_pickle), Options(dtype=torch_name(dtype)))
    factor, (taken,) = config.pixel_shuffle_factor, checkpoint[names.stored[CONNECTOR + "0.weight"]].shape
    width, grid = plan.fields["hidden_size"], plan.fields["image_size"] // plan.fields["patch_size"]
    if factor**2 * width != taken:
        raise CheckpointError(
            f"{origin.name}: the connector takes {taken} numbers: expected a width of {taken // factor**2} "
            f"({factor} x {factor} tokens), got {width}: build a new model around it with `sailvit compose`"
        )
    if grid % factor:
        raise CheckpointError(
            f"{origin.name}: the connector folds {factor} x {factor} tokens: expected a grid that {factor} divides, "
            f"got {grid} x {grid} patches: convert it with another --image-size first"
        )
    return plan


def _config_changes(vision: AIMv2Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the fields of config.json that another vision encoder changes."""
    changes: dict[str, Any] = {"vision_config": {"model_type": "sailvit", **vision.fields}}
    if "force_image_size" in checkpoint.document("config.json"):
        changes["force_image_size"] = vision.fields["image_size"]
    return changes


def _loads_as_stored(checkpoint: Checkpoint, dtype: str) -> bool:
    """Whether transformers loads the weight files without changes, in this dtype."""
    if any(tensor.dtype != dtype for tensors in checkpoint.opened.values() for tensor in tensors.values()):
        return False
    are_safetensors = all(file.endswith(".safetensors") and "/" not in file for file in checkpoint.files)
    return are_safetensors and all(_has_pt_metadata(checkpoint.source.path(file)) for file in checkpoint.files)


def _has_pt_metadata(path: Path) -> bool:
    """Whether a safetensors file has no metadata, or that of the format "pt": transformers 4 loads no other."""
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    return metadata is None or metadata.get("format") == "pt"


def _notes(plan: SAILVLPlan, names: Names) -> list[str]:
    config, fields = plan.config, plan.checkpoint.document("config.json")
    vision, text = config.vision_config, config.text_config
    notes = [
        f"a SAIL-VL: {vision.model_type} of width {vision.hidden_size}, {text.model_type} of width {text.hidden_size}, "
        f"{config.image_seq_length} visual tokens a tile"
    ]
    if names.wrappers:
        notes.append(f"removed from the names: {', '.join(names.wrappers)}")
    if names.others:
        notes.append(f"dropped, not part of the model: {len(names.others)} tensors ({names.others[0]}, ...)")
    if plan.unchanged_files:
        notes.append(f"{len(plan.unchanged_files)} of {len(plan.checkpoint.files)} weight files are unchanged")
    notes += padding_notes(plan.checkpoint)
    if not has_normalization(plan.checkpoint):
        notes.append("the source has no image_mean and image_std: ImageNet's, which SAILViT uses, are assumed")
    if fields.get("template", TEMPLATE) != TEMPLATE:
        notes.append(f"the source's prompt is {fields['template']!r}; chat_template.jinja is that of {TEMPLATE!r}")
    for note in plan.vision.notes if plan.vision else ():
        notes.append(f"inserted: {note}")
    if (
        rounded := sorted(map(torch_name, {tensor.dtype for tensor in plan.vision.source_tensors()} - {plan.dtype}))
        if plan.vision
        else []
    ):
        notes.append(f"inserted: {', '.join(rounded)} became {torch_name(plan.dtype)}, as the rest of the model is")
    return notes


CARD_TAGS = ("sailvl", "custom_code", "conversational")


def describe_sailvl(config: "SAILVLConfig", dtype: str) -> str:
    vision, text = config.vision_config, config.text_config
    return (
        f"A multimodal language model, {torch_name(dtype)}: a vision encoder ({vision.model_type}, width "
        f"{vision.hidden_size}, {vision.num_hidden_layers} blocks), a connector and a language model "
        f"({text.model_type}, width {text.hidden_size}, {text.num_hidden_layers} layers). A tile becomes "
        f"{config.image_seq_length} visual tokens."
    )


def verify_sailvl(folder: Path) -> dict[str, Any]:
    """
    Load a folder in a clean process, and have its processor prepare an image and a question there; returns the counts
    of tiles and placeholders.

    Raises:
        VerificationError: It does not load, or the processor makes another number of placeholders than the model takes.
    """
    counts = {key: int(value) for key, value in run_in_clean_process(folder, "AutoModelForImageTextToText").items()}
    expected = counts["tiles"] * counts["image_seq_length"]
    if counts["placeholders"] != expected or not expected:
        raise VerificationError(
            f"the folder's processor does not fit its model: expected {expected} placeholders for {counts['tiles']} "
            f"tiles, got {counts['placeholders']}"
        )
    return counts
