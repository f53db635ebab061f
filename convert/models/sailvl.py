"""
SAIL-VL as a whole: a tower, a connector and a language model to a folder that loads. Files of weights that are right
as they are stay so, as reflinks, copies or, on request, hard links; what has to be other is written anew.
"""

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.card import write_conversion_card
from ..export.code_files import copy_code
from ..export.image_settings import has_normalization
from ..export.sailvl_files import build_processor, write_config, write_processor
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
    first_line,
    hash_file,
    is_cached,
    link_files,
    write_json,
)
from ..storage.names import without_wrapper_prefixes
from ..storage.output_folder import check_space
from ..storage.safetensors_io import write_weights
from ..storage.sources import WEIGHTS, find_source, licence_of, public_name
from ..storage.tensors import NewTensor, StoredTensor, cast_stream, is_same, torch_name
from ..storage.tied_embeddings import text_fields
from ..verify.outputs import run_in_clean_process
from .aimv2 import AIMv2Plan, plan_aimv2


if TYPE_CHECKING:
    from torch import nn

    from ...configuration_sailvl import SAILVLConfig
    from ...processing_sailvl import SAILVLProcessor

VISION, CONNECTOR, LANGUAGE = "vision_model.", "mlp1.", "language_model."

PREFIXES = {"vision": VISION, "connector": CONNECTOR, "language": LANGUAGE}

MODEL_TYPES = ("sailvl", "internvl_chat")

PART_NAME = re.compile(r"(?P<prefix>(?:.*?\.)??)(?:vision_model|mlp1|language_model)\.")

TEMPLATE = "sailvl-chat"


@dataclass(frozen=True)
class Names:
    """
    The names of a checkpoint, as a SAIL-VL has them.

    Attributes:
        stored: Released name -> name in the checkpoint.
        prefix: What stands before them there.
        wrappers: Segments that were left out.
        others: Names outside the prefix.
    """

    stored: dict[str, str]
    prefix: str = ""
    wrappers: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def under(self, prefix: str) -> dict[str, str]:
        """Those of one part, without its prefix."""
        return {name.removeprefix(prefix): place for name, place in self.stored.items() if name.startswith(prefix)}

    @property
    def is_canonical(self) -> bool:
        return not self.prefix and not self.wrappers


def match_names(names: Iterable[str]) -> Names:
    """
    Raises:
        CheckpointError: Two names are one when wrappers are left out.
    """
    cleaned, wrappers = without_wrapper_prefixes(names)
    prefixes = Counter(match["prefix"] for short in cleaned if (match := PART_NAME.match(short)))
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    stored = {short.removeprefix(prefix): name for short, name in cleaned.items() if short.startswith(prefix)}
    others = [name for short, name in cleaned.items() if not short.startswith(prefix)]
    return Names(stored, prefix, wrappers, others)


def is_sailvl(checkpoint: Checkpoint) -> bool:
    """Whether it has the names of a SAIL-VL: a language model, and a connector unless config.json tells of one."""
    parts = {name.split(".")[0] for name in match_names(checkpoint.weight_map).stored}
    is_called = checkpoint.document("config.json").get("model_type") in MODEL_TYPES
    return "language_model" in parts and ("mlp1" in parts or is_called)


def read_config(checkpoint: Checkpoint, **changes: Any) -> "SAILVLConfig":
    """
    Raises:
        CheckpointError: There is no configuration, or one that cannot be.
    """
    from ...configuration_sailvl import SAILVLConfig

    fields = checkpoint.document("config.json")
    if not text_fields(fields):
        raise CheckpointError(
            f"{checkpoint.source.name}: config.json {'says nothing of a language model' if fields else 'is missing'}: "
            "put the one of the model beside its weights, or convert with --base"
        )
    try:
        return SAILVLConfig.from_dict({**fields, **changes, "model_type": SAILVLConfig.model_type})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"config.json: {first_line(error)} (--part vision, connector or language takes one part out)"
        raise CheckpointError(f"{checkpoint.source.name}: {what}") from error


def build_empty(config: "SAILVLConfig", source: str) -> "nn.Module":
    """
    The model without numbers.

    Raises:
        CheckpointError: transformers has no such language model.
    """
    import torch

    from ...modeling_sailvl import SAILVLForConditionalGeneration

    try:
        with torch.device("meta"):
            model = SAILVLForConditionalGeneration(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: config.json: {first_line(error)}") from error
    model.tie_weights()
    return model


def model_problems(
    checkpoint: Checkpoint, names: Mapping[str, str], model: "nn.Module", prefix: str = ""
) -> list[Problem]:
    """
    Where a model and the tensors of a checkpoint differ, by names and shapes.

    Args:
        names: Name in the model -> name in the checkpoint.
        prefix: What would stand there before the name of a tensor that is missing.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parameters: dict[int, str] = {}
    twins = {
        name: parameters[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameters.setdefault(id(parameter), name) != name
    }
    found = {name: checkpoint[place] for name, place in names.items()}
    problems = [*_shape_problems(names, found, wanted)]
    for name in wanted.keys() - found.keys() - twins.keys():
        problems.append(Problem("missing", prefix + name, f"missing; {list(wanted[name])} is wanted"))
    for name, first in () if checkpoint.headers_only else twins.items():
        if name in found and first in found and not is_same(found[name], found[first]):
            what = f"differs from {first}, to which config.json ties it: correct tie_word_embeddings"
            problems.append(Problem("values", names[name], what))
    for file in checkpoint.opened:
        problems += checkpoint.name_problems(file)
    return sorted(problems, key=lambda problem: problem.location)


def _shape_problems(
    names: Mapping[str, str], found: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]]
) -> Iterable[Problem]:
    for name, tensor in found.items():
        if name not in wanted:
            adapter = "lora_" in name or ".base_layer." in name
            mend = "belongs to an adapter: merge it first (peft's merge_and_unload)" if adapter else "is none of its"
            yield Problem("unexpected", names[name], f"{mend} tensors, by config.json" if not adapter else mend)
        elif not prod(tensor.shape):
            what = f"empty, {list(tensor.shape)}: saved under ZeRO-3 without gathering its parts? Save it whole"
            yield Problem("empty", names[name], what)
        elif tensor.shape != wanted[name]:
            yield Problem("shape", names[name], f"is {list(tensor.shape)}, by config.json {list(wanted[name])}")


def has_weight_conversions(model_type: str) -> bool:
    """Whether transformers (>= 5) has tensors of such a language model in another form than they are stored."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # transformers < 5
        return False
    return bool(get_checkpoint_conversion_mapping(model_type))


@dataclass(kw_only=True)
class StoredJob(ConversionPlan):
    """
    Tensors that are written as they are stored, but for their names and precision.

    Attributes:
        names: Name that is written -> name in the checkpoint.
    """

    names: dict[str, str]

    def tensors(self) -> list[NewTensor]:
        return [self._tensor(name, place) for name, place in self.names.items()]

    def inputs(self) -> Iterable[StoredTensor]:
        return map(self.checkpoint.__getitem__, self.names.values())

    def _tensor(self, name: str, place: str) -> NewTensor:
        tensor = self.checkpoint[place]
        return NewTensor(name, self.dtype, tensor.shape, lambda: cast_stream(tensor, place, self.dtype))


@dataclass(kw_only=True)
class SAILVLPlan(StoredJob):
    """
    A SAIL-VL, all of it.

    Attributes:
        config: Of what is written.
        processor: Likewise.
        keeps_files: Whether files of weights stay as they are, those of another tower apart.
        tower: What is to take the place of the source's tower.
        link: Whether files that stay as they are may be hard links.
        placed: Name of a file that stayed as it is -> how it got there: REFLINKED, LINKED or COPIED.
        copied: Bytes that were copied.
    """

    config: "SAILVLConfig"
    processor: "SAILVLProcessor"
    keeps_files: bool
    tower: AIMv2Plan | None = None
    link: bool = False
    placed: dict[str, str] = field(default_factory=dict)
    copied: int = 0

    def tensors(self) -> list[NewTensor]:
        return [*self._stored_tensors(), *self._tower_tensors()]

    def inputs(self) -> Iterable[StoredTensor]:
        return map(self.checkpoint.__getitem__, self.checkpoint.weight_map)

    def _stored_tensors(self) -> list[NewTensor]:
        return super().tensors()

    def _tower_tensors(self) -> list[NewTensor]:
        tensors = self.tower.tensors() if self.tower else []
        return [NewTensor(VISION + tensor.name, tensor.dtype, tensor.shape, tensor.chunks) for tensor in tensors]

    @property
    def kept(self) -> list[str]:
        """The files that stay as they are."""
        changed = {self.checkpoint.weight_map[place] for place in self._left_out()} if self.tower else set()
        return [file for file in self.checkpoint.files if file not in changed] if self.keeps_files else []

    def _left_out(self) -> set[str]:
        """Names in the checkpoint of what is not written."""
        return self.checkpoint.weight_map.keys() - {*self.names.values()}

    def write_weights(
        self, folder: Path, max_shard_size: int | str, on_progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        if not self.keeps_files:
            return super().write_weights(folder, max_shard_size, on_progress)
        kept = {folder / self._file_name(file): self.checkpoint.source.path(file) for file in self.kept}
        linked = link_files(kept, self.link)
        copies, shards = {target: kept[target] for target in kept if target not in linked}, self._changed_shards()
        self.placed = {target.name: linked.get(target, COPIED) for target in kept}
        self.copied = sum(source.stat().st_size for source in copies.values())
        total, done = self.copied + sum(tensor.nbytes for shard in shards.values() for tensor in shard), 0

        def count(written: int) -> None:
            nonlocal done
            done += written
            on_progress(done, total)

        check_space(folder, total)
        for target, source in copies.items():
            copy_file(source, target, count)
        written = {file: _write_shard(folder / self._file_name(file), shard, count) for file, shard in shards.items()}
        if self.checkpoint.entry.endswith(".index.json"):
            self._write_index(folder, written)
        return {name: digest for digests in written.values() for name, digest in digests.items()}

    def write_notes(self) -> list[str]:
        counts = Counter(self.placed.values())
        why = "this file system has no reflinks between the two (--link makes hard links)"
        if self.link:
            cached = any(is_cached(self.checkpoint.source.path(file)) for file in self.kept)
            why = "a cache of the Hub is never linked to" if cached else "no link can be made there"
        size = f"{self.copied / 1e9:.1f} GB" if self.copied > 1e9 else f"{self.copied / 1e6:.1f} MB"
        told = {
            REFLINKED: "reflinked: no room taken, and writing into one side leaves the other as it is",
            LINKED: "hard links: whatever writes into them in place changes the source too",
            COPIED: f"copied, {size}: {why}",
        }
        return [f"files of weights that stay as they are: {count} {told[how]}" for how, count in sorted(counts.items())]

    def _file_name(self, file: str) -> str:
        return file if self.checkpoint.entry.endswith(".index.json") else WEIGHTS[0]

    def _changed_shards(self) -> dict[str, list[NewTensor]]:
        """File -> what is written into it anew: those that held the tower before; the first of them holds the new."""
        changed = [file for file in self.checkpoint.files if file not in self.kept] if self.tower else []
        shards: dict[str, list[NewTensor]] = {file: [] for file in changed}
        for tensor in self._stored_tensors() if changed else ():
            if (file := self.checkpoint.weight_map[self.names[tensor.name]]) in shards:
                shards[file].append(tensor)
        if changed:
            shards[changed[0]] += self._tower_tensors()
        return {file: shard for file, shard in shards.items() if shard}

    def _write_index(self, folder: Path, written: Mapping[str, Mapping[str, str]]) -> None:
        target = folder / WEIGHTS[1]
        if not written:
            shutil.copyfile(self.checkpoint.source.path(self.checkpoint.entry), target)
            return
        weight_map = {name: self.checkpoint.weight_map[place] for name, place in self.names.items()}
        weight_map |= {name: file for file, digests in written.items() for name in digests}
        total = sum(tensor.nbytes for tensor in self.tensors())
        write_json(target, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def write_folder(self, folder: Path) -> None:
        fields = self.checkpoint.document("config.json")
        write_config(folder, self.config, text_fields(fields), fields.get("vision_config") or {}, self.dtype)
        copy_tokenizer(self.checkpoint, folder)
        mark_tokenizer(folder, self.config.image_token)
        write_generation_config(self.checkpoint, folder)
        write_processor(self.processor, folder)
        copy_code(folder)
        tags = ["sailvl", "custom_code", "conversational"]
        write_conversion_card(folder, [self.checkpoint.source], describe_all(self.config, self.dtype), tags)

    def verify(self, folder: Path) -> dict[str, Any]:
        return verify_all(folder)

    def record(self) -> dict[str, Any]:
        record = {
            "source": {"layout": "sailvl"},
            "part": "all",
            "kept": {self._file_name(file): file for file in self.kept},
            **({"placed": self.placed} if self.placed else {}),
        }
        if self.tower:
            match, checkpoint = self.tower.match, self.tower.checkpoint
            record["inserted"] = {
                "name": public_name(checkpoint.source),
                "revision": checkpoint.source.revision,
                **licence_of(checkpoint.source),
                "layout": match.scheme.name,
                "prefix": match.prefix,
                "files": {file: {"sha256": hash_file(checkpoint.source.path(file))}
                          for file in (*checkpoint.opened, *checkpoint.documents) if file in checkpoint.source.files},
            }  # fmt: skip
        return record


def plan_whole(checkpoint: Checkpoint, asked: Options) -> SAILVLPlan:
    """
    Raises:
        CheckpointError: It is no whole SAIL-VL, or what is wanted of it cannot be.
    """
    source, names = checkpoint.source.name, match_names(checkpoint.weight_map)
    raise_if_any(checkpoint.shard_problems(), source)
    config = read_config(checkpoint)
    raise_if_any(whole_problems(checkpoint, names, config), source)
    dtype = output_dtype(asked.dtype, {name: checkpoint[place] for name, place in names.stored.items()}, source)
    tower = _plan_insertion(checkpoint, names, asked, dtype, config) if asked.insert_vision else None
    if tower:
        config = read_config(checkpoint, **_tower_changes(tower, checkpoint))
    config.image_token_id = find_image_token(checkpoint, config)
    kept = {name: place for name, place in names.stored.items() if not (tower and name.startswith(VISION))}
    job = SAILVLPlan(
        checkpoint=checkpoint,
        dtype=dtype,
        names=kept,
        config=config,
        processor=build_processor(checkpoint, config),
        keeps_files=_keeps_files(checkpoint, names, asked, dtype),
        tower=tower,
        link=asked.link,
    )
    job.notes = _notes(job, names)
    return job


def whole_problems(checkpoint: Checkpoint, names: Names, config: "SAILVLConfig") -> list[Problem]:
    """What is missing, too much, empty or of another shape than config.json says."""
    model = build_empty(config, checkpoint.source.name)
    problems = model_problems(checkpoint, names.stored, model, names.prefix)
    if has_weight_conversions(config.text_config.model_type):
        problems = [problem for problem in problems if LANGUAGE not in problem.location or problem.kind == "values"]
    return problems


def _plan_insertion(
    checkpoint: Checkpoint, names: Names, asked: Options, dtype: str, config: "SAILVLConfig"
) -> AIMv2Plan:
    origin, entry = find_source(str(asked.insert_vision))
    inserted = FileCheckpoint(origin, entry, checkpoint.trust_pickle)
    job = plan_aimv2(inserted, Options(dtype=torch_name(dtype)))
    factor, (taken,) = config.pixel_shuffle_factor, checkpoint[names.stored[CONNECTOR + "0.weight"]].shape
    width, grid = job.fields["hidden_size"], job.fields["image_size"] // job.fields["patch_size"]
    if factor**2 * width != taken:
        raise CheckpointError(
            f"{origin.name}: the connector takes {taken} numbers, {factor} x {factor} tokens of {taken // factor**2}; "
            f"this tower's are {width} wide: build a new model around it with `sailvit compose`"
        )
    if grid % factor:
        raise CheckpointError(
            f"{origin.name}: the connector folds {factor} x {factor} tokens, which the tower's {grid} x {grid} cannot "
            "be cut into: convert it with another --image-size first"
        )
    return job


def _tower_changes(tower: AIMv2Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    """What another tower changes in the configuration."""
    changes: dict[str, Any] = {"vision_config": {"model_type": "sailvit", **tower.fields}}
    if "force_image_size" in checkpoint.document("config.json"):
        changes["force_image_size"] = tower.fields["image_size"]
    return changes


def _keeps_files(checkpoint: Checkpoint, names: Names, asked: Options, dtype: str) -> bool:
    """Whether transformers reads the files as they are."""
    if asked.max_shard_size is not None or not names.is_canonical or names.others:
        return False
    if any(tensor.dtype != dtype for tensors in checkpoint.opened.values() for tensor in tensors.values()):
        return False
    files = checkpoint.files
    return all(file.endswith(".safetensors") and "/" not in file for file in files) and all(
        _has_pt_metadata(checkpoint.source.path(file)) for file in files
    )


def _has_pt_metadata(path: Path) -> bool:
    """Whether a safetensors file has no metadata, or such as transformers wants."""
    with path.open("rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__")
    return metadata is None or metadata.get("format") == "pt"


def _notes(job: SAILVLPlan, names: Names) -> list[str]:
    config, fields = job.config, job.checkpoint.document("config.json")
    vision, text = config.vision_config, config.text_config
    notes = [
        f"a SAIL-VL: {vision.model_type} of width {vision.hidden_size}, {text.model_type} of width {text.hidden_size}, "
        f"{config.image_seq_length} visual tokens a tile"
    ]
    if names.wrappers:
        notes.append(f"left out of the names: {', '.join(names.wrappers)}")
    if names.others:
        notes.append(f"not of the model, left: {len(names.others)} tensors ({names.others[0]}, ...)")
    if job.kept:
        notes.append(f"{len(job.kept)} of {len(job.checkpoint.files)} files of weights stay as they are")
    notes += padding_notes(job.checkpoint)
    if not has_normalization(job.checkpoint):
        notes.append("the source does not say how pictures are normalised: ImageNet's mean and std, SAILViT's, assumed")
    if fields.get("template", TEMPLATE) != TEMPLATE:
        notes.append(f"the source's prompt is {fields['template']!r}; chat_template.jinja is that of {TEMPLATE!r}")
    if job.tower:
        notes += [f"inserted: {note}" for note in job.tower.notes]
        rounded = sorted({tensor.dtype for tensor in job.tower.inputs()} - {job.dtype})
        if rounded:
            before = ", ".join(torch_name(dtype) for dtype in rounded)
            notes.append(f"inserted: {before} became {torch_name(job.dtype)}, as the rest of the model is")
    return notes


def _write_shard(path: Path, tensors: list[NewTensor], on_progress: Callable[[int], None]) -> dict[str, str]:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        digests = write_weights(Path(scratch), tensors, 1 << 62, on_progress)
        (Path(scratch) / WEIGHTS[0]).rename(path)
    return digests


def describe_all(config: "SAILVLConfig", dtype: str) -> str:
    vision, text = config.vision_config, config.text_config
    return (
        f"A multimodal language model, {torch_name(dtype)}: a vision encoder ({vision.model_type}, width "
        f"{vision.hidden_size}, {vision.num_hidden_layers} blocks), a connector and a language model "
        f"({text.model_type}, width {text.hidden_size}, {text.num_hidden_layers} layers). A tile becomes "
        f"{config.image_seq_length} visual tokens."
    )


def verify_all(folder: Path) -> dict[str, Any]:
    """
    Loads a folder in a fresh process, and has a picture and a question made into a prompt there.

    Raises:
        VerificationError: It does not load, or makes another number of placeholders than the model wants.
    """
    alone = {key: int(value) for key, value in run_in_clean_process(folder).items()}
    if alone["placeholders"] != alone["tiles"] * alone["image_seq_length"] or not alone["tiles"]:
        raise VerificationError(f"the folder's processor and model do not fit each other: {alone}")
    return alone
