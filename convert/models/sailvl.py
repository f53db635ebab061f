"""
Conversion of a SAIL-VL, or of one of its components to a folder of its own. Weight files that need no change are
reflinked, copied or, on request, hard-linked; the others are rewritten.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from ..export.card import write_conversion_card
from ..export.image_settings import clip_settings, has_normalization
from ..export.model_types import auto_class_of
from ..export.provenance import read_files, source_provenance
from ..export.sailvl_files import build_processor, own_template, portable, write_sailvl_card, write_sailvl_files
from ..export.tokenizer_files import (
    VOCABULARIES,
    copy_tokenizer,
    find_image_token,
    load_tokenizer,
    mark_tokenizer,
    padding_notes,
    write_generation_config,
)
from ..plan import ConversionPlan, Options, output_dtype
from ..storage.checkpoint import Checkpoint, FileCheckpoint
from ..storage.errors import CheckpointError, VerificationError, raise_if_any
from ..storage.files import COPIED, LINKED, REFLINKED, copy_file, count_bytes, is_cached, link_files, write_json
from ..storage.output_folder import check_space
from ..storage.safetensors_io import write_weights
from ..storage.sources import WEIGHTS, find_source
from ..storage.tensors import NewTensor, StoredTensor, cast_stream, load_float32, torch_name
from ..verify.outputs import compare_outputs, run_in_clean_process
from .aimv2 import AIMv2Plan, plan_aimv2
from .sailvl_config import PREFIXES, Component, build_meta_component, component_problems, find_component, read_config


if TYPE_CHECKING:
    from ...configuration_sailvl import SAILVLConfig
    from ...processing_sailvl import SAILVLProcessor


def renamed_tensors(checkpoint: Checkpoint, names: Mapping[str, str], dtype: str) -> list[NewTensor]:
    """Return tensors as they are stored, but for name and dtype; names: written name -> name in the checkpoint."""
    tensors = []
    for name, stored_name in names.items():
        stored = checkpoint[stored_name]
        tensors.append(NewTensor(name, dtype, stored.shape, partial(cast_stream, stored, stored_name, dtype)))
    return tensors


@dataclass(kw_only=True)
class SAILVLPlan(ConversionPlan):
    """Writes all of a SAIL-VL."""

    names: dict[str, str]  # written name -> name in the checkpoint, without a replaced vision encoder
    config: "SAILVLConfig"
    processor: "SAILVLProcessor"
    vision: AIMv2Plan | None = None  # the vision encoder that replaces the source's
    link: bool = False  # whether unchanged files may be hard links
    placed: dict[str, str] = field(default_factory=dict)  # name of an unchanged file -> REFLINKED, LINKED or COPIED
    copied: int = 0  # bytes of unchanged files that were copied

    def tensors(self) -> list[NewTensor]:
        inserted = self.vision.tensors() if self.vision else []
        renamed = renamed_tensors(self.checkpoint, self.names, self.dtype)
        return renamed + [replace(tensor, name=PREFIXES["vision"] + tensor.name) for tensor in inserted]

    def source_tensors(self) -> Iterable[StoredTensor]:
        return map(self.checkpoint.__getitem__, self.checkpoint.weight_map)

    def write_weights(
        self, folder: Path, max_shard_size: int | str, on_progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        if not self.unchanged_files:
            return super().write_weights(folder, max_shard_size, on_progress)
        source, tensors, weight_map = self.checkpoint.source, self.tensors(), self._weight_map()
        rewritten = sorted({*weight_map.values()} - {*self.unchanged_files})
        shards = {file: [tensor for tensor in tensors if weight_map[tensor.name] == file] for file in rewritten}
        files = {folder / name: source.path(file) for name, file in self._unchanged_names().items()}
        made = link_files(files, self.link)
        self.placed = {target.name: made.get(target, COPIED) for target in files}
        copies = {target: file for target, file in files.items() if target not in made}
        self.copied = sum(file.stat().st_size for file in copies.values())
        total = self.copied + sum(tensor.nbytes for shard in shards.values() for tensor in shard)
        check_space(folder, total)
        count, digests = count_bytes(total, on_progress), {}
        for target, file in copies.items():
            copy_file(file, target, count)
        for file, shard in shards.items():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                digests |= write_weights(Path(scratch), shard, 1 << 62, count)
                Path(scratch, WEIGHTS[0]).rename(folder / file)
        if shards:
            metadata = {"total_size": sum(tensor.nbytes for tensor in tensors)}
            write_json(folder / WEIGHTS[1], {"metadata": metadata, "weight_map": weight_map})
        elif self.checkpoint.entry.endswith(".index.json"):
            shutil.copyfile(source.path(self.checkpoint.entry), folder / WEIGHTS[1])
        self.notes += self._placed_notes()
        return digests

    def _unchanged_names(self) -> dict[str, str]:
        """Return written name -> name in the source of the unchanged files."""
        is_sharded = self.checkpoint.entry.endswith(".index.json")
        return {file if is_sharded else WEIGHTS[0]: file for file in self.unchanged_files}

    def _weight_map(self) -> dict[str, str]:
        """Return written name -> file; a new vision encoder goes to the first file that held the replaced one."""
        files, unchanged = self.checkpoint.weight_map, {*self.unchanged_files}
        first = next((file for file in self.checkpoint.files if file not in unchanged), "")
        names = {tensor.name: self.names.get(tensor.name) for tensor in self.tensors()}
        return {name: files[stored] if stored else first for name, stored in names.items()}

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
        copy_tokenizer(self.checkpoint, folder)
        mark_tokenizer(folder, self.config.image_token)
        write_generation_config(self.checkpoint, folder)
        text, vision = (find_component(self.checkpoint, part).config for part in ("language", "vision"))
        write_sailvl_files(folder, self.config, text, vision, self.dtype, self.processor)
        write_sailvl_card(folder, [self.checkpoint.source], self.config, self.dtype)

    def verify(self, folder: Path) -> dict[str, Any]:
        return verify_sailvl(folder)

    def provenance(self) -> dict[str, Any]:
        record = {"source": {"layout": "sailvl"}, "part": "all", "kept": self._unchanged_names()}
        if self.placed:
            record["placed"] = self.placed
        if self.vision:
            match, checkpoint = self.vision.match, self.vision.checkpoint
            details = source_provenance(checkpoint, read_files(checkpoint))
            record["inserted"] = {**details, "layout": match.scheme.name, "prefix": match.prefix}
        return record


def plan_sailvl(checkpoint: Checkpoint, options: Options) -> SAILVLPlan:
    """Return the conversion of a SAIL-VL; raises CheckpointError if it is not whole, or an option does not fit it."""
    source, found = checkpoint.source.name, find_component(checkpoint, "all")
    names = found.names
    raise_if_any(component_problems(checkpoint, "all"), source)
    dtype = output_dtype(options.dtype, {name: checkpoint[stored] for name, stored in names.items()}, source)
    config, vision = read_config(checkpoint), None
    if options.insert_vision:
        (taken,) = checkpoint[names[PREFIXES["connector"] + "0.weight"]].shape
        vision = _plan_insertion(checkpoint, options, dtype, taken, config.pixel_shuffle_factor)
        changes: dict[str, Any] = {"vision_config": {"model_type": "sailvit", **vision.fields}}
        if "force_image_size" in checkpoint.document("config.json"):
            changes["force_image_size"] = vision.fields["image_size"]
        config = read_config(checkpoint, **changes)
    config.image_token_id = find_image_token(checkpoint, config)
    kept = {name: stored for name, stored in names.items() if not (vision and name.startswith(PREFIXES["vision"]))}
    changed = {checkpoint.weight_map[names[name]] for name in names.keys() - kept.keys()}
    is_renamed = found.prefix or found.wrappers or found.others
    if options.max_shard_size is not None or is_renamed or not _loads_as_stored(checkpoint, dtype):
        changed = {*checkpoint.files}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(checkpoint, Path(scratch))
    processor = build_processor(tokenizer, checkpoint, config, source, own_template(checkpoint))
    unchanged = [file for file in checkpoint.files if file not in changed]
    plan = SAILVLPlan(
        checkpoint=checkpoint, dtype=dtype, names=kept, config=config, processor=processor, unchanged_files=unchanged,
        vision=vision, link=options.link,
    )  # fmt: skip
    plan.notes = _notes(plan, found)
    return plan


def _plan_insertion(checkpoint: Checkpoint, options: Options, dtype: str, taken: int, factor: int) -> AIMv2Plan:
    """Plan the conversion of the vision encoder to insert; taken: width of the connector's input."""
    origin, entry = find_source(str(options.insert_vision))
    plan = plan_aimv2(FileCheckpoint(origin, entry, checkpoint.trust_pickle), Options(dtype=torch_name(dtype)))
    width, grid = plan.fields["hidden_size"], plan.fields["image_size"] // plan.fields["patch_size"]
    if factor**2 * width != taken:
        expected = f"expected a width of {taken // factor**2} ({factor} x {factor} tokens), got {width}"
        fix = "build a new model around it with `sailvit compose`"
        raise CheckpointError(f"{origin.name}: the connector takes {taken} numbers: {expected}: {fix}")
    if grid % factor:
        expected = f"expected a grid that {factor} divides, got {grid} x {grid} patches"
        fix = "convert it with another --image-size first"
        raise CheckpointError(f"{origin.name}: the connector folds {factor} x {factor} tokens: {expected}: {fix}")
    return plan


def _loads_as_stored(checkpoint: Checkpoint, dtype: str) -> bool:
    """Whether transformers loads the weight files as they are, in this dtype; version 4 refuses a format but "pt"."""
    if any(tensor.dtype != dtype for tensors in checkpoint.opened.values() for tensor in tensors.values()):
        return False
    for file in checkpoint.files:
        if not file.endswith(".safetensors") or "/" in file:
            return False
        with safe_open(checkpoint.source.path(file), "np") as opened:
            metadata = opened.metadata()
        if metadata is not None and metadata.get("format") != "pt":
            return False
    return True


def _notes(plan: SAILVLPlan, found: Component) -> list[str]:
    config, template = plan.config, plan.checkpoint.document("config.json").get("template", "sailvl-chat")
    vision, text = config.vision_config, config.text_config
    notes = [
        f"a SAIL-VL: {vision.model_type} of width {vision.hidden_size}, {text.model_type} of width {text.hidden_size}, "
        f"{config.image_seq_length} visual tokens a tile"
    ]
    if found.wrappers:
        notes.append(f"removed from the names: {', '.join(found.wrappers)}")
    if found.others:
        notes.append(f"dropped, not part of the model: {len(found.others)} tensors ({found.others[0]}, ...)")
    if plan.unchanged_files:
        notes.append(f"{len(plan.unchanged_files)} of {len(plan.checkpoint.files)} weight files are unchanged")
    notes += padding_notes(plan.checkpoint)
    if not has_normalization(plan.checkpoint):
        notes.append("the source has no image_mean and image_std: ImageNet's, which SAILViT uses, are assumed")
    if template != "sailvl-chat":
        notes.append(f"the source's prompt is {template!r}; chat_template.jinja is that of 'sailvl-chat'")
    if plan.vision:
        notes += [f"inserted: {note}" for note in plan.vision.notes]
        dtypes = {tensor.dtype for tensor in plan.vision.source_tensors()} - {plan.dtype}
        if rounded := ", ".join(sorted(map(torch_name, dtypes))):
            notes.append(f"inserted: {rounded} became {torch_name(plan.dtype)}, as the rest of the model is")
    return notes


def verify_sailvl(folder: Path) -> dict[str, Any]:
    """
    Load a folder in a clean process, whose processor prepares an image; return the counts of tiles and placeholders.

    Raises:
        VerificationError: It does not load, or the processor makes another number of placeholders than the model takes.
    """
    counts = {key: int(value) for key, value in run_in_clean_process(folder, "AutoModelForImageTextToText").items()}
    expected, got = counts["tiles"] * counts["image_seq_length"], counts["placeholders"]
    if got != expected or not expected:
        what = f"expected {expected} placeholders for {counts['tiles']} tiles, got {got}"
        raise VerificationError(f"the folder's processor does not fit its model: {what}")
    return counts


@dataclass(kw_only=True)
class ComponentPlan(ConversionPlan):
    """Writes one component of a SAIL-VL; config: its config.json, empty for a connector, which nothing loads alone."""

    component: Component
    config: dict[str, Any]

    @property
    def part(self) -> str:
        return self.component.part

    def tensors(self) -> list[NewTensor]:
        prefix = PREFIXES["connector"] if self.part == "connector" else ""
        names = {prefix + name: stored_name for name, stored_name in self.component.names.items()}
        return renamed_tensors(self.checkpoint, names, self.dtype)

    def source_tensors(self) -> Iterable[StoredTensor]:
        return map(self.checkpoint.__getitem__, self.component.names.values())

    def write_folder(self, folder: Path) -> None:
        dtype, sources = torch_name(self.dtype), [self.checkpoint.source]
        if self.part == "connector":
            rows, columns = self.component.matrix_shape
            widths = f"from {columns} numbers, those of a square of visual tokens, to the {rows} of its language model"
            what = f"The connector of a SAIL-VL, {dtype}: {widths}. It is part of a model: nothing loads it alone."
            write_conversion_card(folder, sources, what, ["sailvl"])
            return
        write_json(folder / "config.json", {**self.config, "dtype": dtype})
        if self.part == "vision":
            write_json(folder / "preprocessor_config.json", clip_settings(self.checkpoint, self.config["image_size"]))
        elif copy_tokenizer(self.checkpoint, folder):
            write_generation_config(self.checkpoint, folder)
        title, tags = ("vision encoder", ["vision"]) if self.part == "vision" else ("language model", [])
        description = f"The {title} of a SAIL-VL: {self.config['model_type']}, {dtype}."
        write_conversion_card(folder, sources, description, tags)

    def verify(self, folder: Path) -> dict[str, Any] | None:
        if self.part == "connector":
            return None
        outputs = run_in_clean_process(folder, auto_class_of(folder))
        if self.part == "vision":
            return self._compare_tokens(outputs)
        return {"loaded": self.config["architectures"][0], "parameters": int(outputs["parameters"])}

    def _compare_tokens(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compare the folder's outputs on a test image with those of the source's weights."""
        import torch
        from transformers import AutoModel, __version__

        stored, names = self.checkpoint, self.component.names
        model = AutoModel.from_config(build_meta_component(stored.source.name, "vision", self.config).config)
        model = model.float().eval()
        model.load_state_dict({name: load_float32(stored[key], self.dtype) for name, key in names.items()})
        with torch.inference_mode():
            expected = model(outputs["pixel_values"]).last_hidden_state
        return compare_outputs(outputs["tokens"], expected, f"{type(model).__name__} of transformers {__version__}")

    def provenance(self) -> dict[str, Any]:
        return {"source": {"layout": "sailvl", "prefix": self.component.prefix}, "part": self.part}


def plan_component(checkpoint: Checkpoint, options: Options, part: str) -> ComponentPlan:
    """
    Return the conversion of a component. Raises CheckpointError if it is not complete, contradicts config.json, or
    transformers lacks it.
    """
    source, found = checkpoint.source.name, find_component(checkpoint, part)
    raise_if_any(component_problems(checkpoint, part), source)
    config, title = {}, "the connector"
    if part != "connector":
        title = type(build_meta_component(source, part, found.config)).__name__
        config = {**portable(found.config), "architectures": [title]}
    dtype = output_dtype(options.dtype, {name: checkpoint[stored] for name, stored in found.names.items()}, source)
    plan = ComponentPlan(checkpoint=checkpoint, dtype=dtype, component=found, config=config)
    plan.notes.append(f"{len(found.names)} of {len(checkpoint.weight_map)} names are under {found.prefix}: {title}")
    if part == "language":
        if not VOCABULARIES & {*checkpoint.source.files}:
            plan.notes.append("there is no tokenizer next to the weights: none is written")
        plan.notes += padding_notes(checkpoint)
    return plan
