# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""From weights to a run, and from a run to weights: what a stage takes over and hands over is float32, whole, exact."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_utils import PreTrainedModel

from ..convert.export.card import write_conversion_card
from ..convert.export.code_files import copy_code
from ..convert.export.provenance import save_record
from ..convert.export.sailvl_files import PROCESSOR_FILES, write_sailvl_card
from ..convert.export.tokenizer_files import TOKENIZER_FILES
from ..convert.storage.checkpoint import Checkpoint
from ..convert.storage.files import hash_file
from ..convert.storage.output_folder import sync
from ..convert.storage.sources import PROVENANCE, describe_source
from ..convert.storage.tensors import load_float32
from ..modeling_sailvit import SAILViTModel
from ..modeling_sailvl import SAILVLForConditionalGeneration
from .attention import PER_SAMPLE
from .checkpoints import read_json, write_json, write_training
from .components import merge_adapters, set_trainable
from .next_patch import PREFIX_CAUSAL, NextPatchModel


if TYPE_CHECKING:
    from .recipe import Recipe
    from .trainer import SAILVLTrainer

SHARD_SIZE = "5GB"


def load_model(source: Checkpoint, attn_implementation: str | None = None) -> PreTrainedModel:
    """
    Return the SAIL-VL of a folder in float32.

    Raises:
        ValueError: Its weights do not fit its config.json.
        OSError: A file cannot be read.
    """
    chosen = {"text_config": PER_SAMPLE} if attn_implementation == PER_SAMPLE else attn_implementation
    options = {} if chosen is None else {"attn_implementation": chosen}
    return _load(SAILVLForConditionalGeneration, source, **options)


def load_for(recipe: "Recipe", source: Checkpoint, attn_implementation: str | None = None) -> PreTrainedModel:
    """Return the model that a recipe trains: a SAIL-VL, or an encoder with a new head; see `load_model`."""
    if recipe.objective == "next_token":
        return load_model(source, attn_implementation)
    encoder = _load(SAILViTModel, source, attn_implementation=PREFIX_CAUSAL)
    return NextPatchModel(encoder, recipe.head_blocks, recipe.seed)


def _load(cls: type[PreTrainedModel], source: Checkpoint, **options: Any) -> PreTrainedModel:
    """Return the model of a folder in float32, every weight of it read."""
    name, folder = source.source.name, source.source.path("config.json").parent
    model, report = cls.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    # entries are names, in transformers >= 5 with the two shapes
    if mismatched := sorted(entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]):
        expected, stored = tuple(model.state_dict()[mismatched[0]].shape), source[mismatched[0]].shape
        raise ValueError(
            f"{name}: {mismatched[0]}: expected the shape {expected}, got {stored}: the weights are of another "
            "width than config.json says; build a model with `sailvit compose` or `sailvit convert`"
        )
    if missing := sorted(report.get("missing_keys") or []):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"{name}: the weights lack {missing[0]}{more}: copy or build the model again")
    return model


def weight_reader(model: PreTrainedModel, source: Checkpoint) -> Callable[[str], torch.Tensor]:
    """Return a function: name of a trained parameter -> its value at the start; adapters, in no file, are kept."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    fresh = {name: value.detach().clone() for name, value in trained.items() if name not in source.weight_map}
    return lambda name: fresh[name] if name in fresh else load_float32(source[name])


def trained_weights(trainer: "SAILVLTrainer") -> dict[str, torch.Tensor]:
    """Return the trained parameters in float32 on the first rank, {} on others; all ranks have to call it."""
    model, keeps = trainer.model, trainer.is_world_process_zero()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param

        whole = ((name, safe_get_full_fp32_param(model.get_parameter(name))) for name in names)
    elif trainer.is_fsdp_enabled:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors = get_model_state_dict(trainer.model_wrapped, options=options)
        whole = ((name, tensors[name]) for name in names if keeps)
    else:
        whole = ((name, model.get_parameter(name)) for name in names)
    return {name: tensor.detach().float().cpu() for name, tensor in whole if keeps}


def build_result(trained: Mapping[str, torch.Tensor], recipe: "Recipe", source: Checkpoint, rows: Any) -> Any:
    """
    Return the model of a stage: what it trained, over the source, whose other tensors stay as they are.

    Args:
        rows: Ids of the added tokens, see `set_trainable`.
    """
    model = load_for(recipe, source)
    set_trainable(model, recipe, rows)
    missing, unexpected = model.load_state_dict(trained, strict=False)  # frozen tensors stay those of the source
    lacking = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name in missing]
    if wrong := [*unexpected, *lacking]:
        raise RuntimeError(f"{wrong[0]}: the trained weights and the model do not match in {len(wrong)} tensors")
    merge_adapters(model)
    return model.vision_model if isinstance(model, NextPatchModel) else model  # without the head


# The folder


def write_result(model: PreTrainedModel, source: Checkpoint, output: Path, stages: list[dict[str, Any]]) -> None:
    """
    Write a model to the folder of its run, next to the checkpoints: weights, config, code, processor, card.

    training.json, which says that the run is finished, is the last file.
    """
    part = output / f".{output.resolve().name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    model.save_pretrained(part, max_shard_size=SHARD_SIZE)
    _write_config(part, source)
    names = (*PROCESSOR_FILES, *TOKENIZER_FILES, "generation_config.json")
    for name in [name for name in names if name in source.source.files]:
        shutil.copyfile(source.source.path(name), part / name)
    copy_code(part, model.config.model_type)
    _write_card(part, source, model.config)
    weights = {path.name: {"sha256": hash_file(path)} for path in part.glob("*.safetensors")}
    before = source.document(PROVENANCE).get("source")
    origin = {**describe_source(source.source), **({"source": before} if before else {})}
    save_record(part, {"source": origin, "dtype": "float32"}, weights, {})
    for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        shutil.copymode(part / "config.json", path)  # temporary files, as libraries write weights, are private
        path.replace(output / path.name)
    part.rmdir()
    sync(output)
    write_training(output, stages)


def _write_card(part: Path, source: Checkpoint, config: Any) -> None:
    if config.model_type == "sailvl":
        write_sailvl_card(part, [source.source], config, "F32")
        return
    size = f"width {config.hidden_size}, {config.num_hidden_layers} blocks, {config.image_size} pixels"
    description = f"A vision encoder, {size}, float32, pretrained to predict the next patch, as AIM (arXiv 2401.08541)."
    write_conversion_card(part, [source.source], description, ("vision", "sailvit", "custom_code"))


def _write_config(part: Path, source: Checkpoint) -> None:
    """Write the source's config.json, for float32 and with the code that the folder has."""
    own = read_json(part / "config.json")
    config = {name: value for name, value in source.document("config.json").items() if name != "torch_dtype"}
    for fields in (config, *(config[name] for name in ("text_config", "vision_config") if name in config)):
        fields.pop("torch_dtype", None)
        if "dtype" in fields:
            fields["dtype"] = "float32"
    config |= {"dtype": "float32", "auto_map": own["auto_map"], "architectures": own["architectures"]}
    write_json(part / "config.json", config)
