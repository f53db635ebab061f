# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
What is trained: freezing, LoRA, rows of added tokens, parameter groups of the optimizer, activation checkpointing.

Everything is applied to a loaded model: transformers may replace parameters while it loads, and with them their
requires_grad.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from ..processing_sailvl import SAILVLProcessor
from .flops import COMPONENTS


if TYPE_CHECKING:
    from .recipe import Recipe

# Fields of config.json with rank and alpha of LoRA, for `sailvit convert`; the ranks are those of InternVL.
LORA_FIELDS = {
    "vision": ("use_backbone_lora", "backbone_lora_alpha"),
    "language": ("use_llm_lora", "llm_lora_alpha"),
}


# Attributes of the processor with the tokens around the visual tokens, whose rows are new in a composed model.
ADDED_TOKENS = ("image_start_token", "image_end_token")


HEAD = "head"  # of next-patch prediction: trained together with the encoder, at its rate, and dropped at the end


def components_of(model: PreTrainedModel) -> dict[str, str]:
    """Return component -> the module of a model: of a SAIL-VL, or of an encoder with the head that pretrains it."""
    return getattr(model, "components", COMPONENTS)


# Freezing


def set_trainable(model: PreTrainedModel, recipe: "Recipe", added_tokens: Sequence[int] = ()) -> None:
    """
    Freeze all components that the recipe does not train, and add LoRA to those that it trains by adapters.

    A frozen component stays in eval mode, so that its dropout does not run: Trainer calls `model.train()` in every
    step, which undoes a plain `eval()`.

    Args:
        model: A SAIL-VL or NextPatchModel, just loaded, not wrapped by an engine.
        recipe: Its fields trainable, lora, train_added_tokens and gradient_checkpointing are used.
        added_tokens: Ids of the tokens whose rows are trained with `train_added_tokens`; see `added_token_ids`.

    Raises:
        ValueError: A component is unknown, or the options do not fit each other.
    """
    _check_options(recipe, added_tokens)
    model.requires_grad_(False)
    for name, attribute in components_of(model).items():
        part = getattr(model, attribute)
        if name in recipe.lora:
            _add_lora(model, name, recipe.lora[name], recipe.seed)
        elif _trains(recipe, name):
            part.requires_grad_(True)
        else:
            _pin_to_eval(part)
    if recipe.train_added_tokens and "language" not in recipe.trainable:
        train_rows(model.get_input_embeddings().weight, added_tokens)
    enable_checkpointing(model, checkpointed_components(recipe))


def _trains(recipe: "Recipe", component: str) -> bool:
    return component in (*recipe.trainable, HEAD)


def _check_options(recipe: "Recipe", added_tokens: Sequence[int]) -> None:
    known = ", ".join(COMPONENTS)
    for field in ("trainable", "lora"):
        for name in getattr(recipe, field):
            if name not in COMPONENTS:
                raise ValueError(f"{field}: expected components of {known}, got {name!r}")
    for name in recipe.lora:
        if name not in LORA_FIELDS:
            raise ValueError(f"lora: expected components of {', '.join(LORA_FIELDS)}, got {name!r}: train it in full")
        if name not in recipe.trainable:
            raise ValueError(f"lora: {name} is not in trainable: add it there, or remove its LoRA")
    if not recipe.trainable and not recipe.train_added_tokens:
        raise ValueError(f"trainable: expected at least one component of {known}, got none")
    if recipe.train_added_tokens and not added_tokens:
        raise ValueError("train_added_tokens: the ids of the added tokens are missing: pass added_token_ids(processor)")
    if recipe.train_added_tokens and "language" in recipe.lora:
        raise ValueError("train_added_tokens: LoRA keeps the embeddings frozen: train the rows in a stage before it")


def _pin_to_eval(part: nn.Module) -> None:
    """Put a module into eval mode for good; `model.train()` of a parent calls `train` of its children."""
    part.eval()
    part.train = lambda mode=True: part


def added_token_ids(processor: SAILVLProcessor) -> list[int]:
    """
    Return the ids of ADDED_TOKENS.

    The row of <IMG_CONTEXT> is not among them: the model never reads it, since visual tokens take its place.
    """
    return processor.tokenizer.convert_tokens_to_ids([getattr(processor, name) for name in ADDED_TOKENS])


def train_rows(weight: nn.Parameter, rows: Sequence[int]) -> None:
    """
    Train some rows of an embedding: the gradient of the others is set to 0, and with it their update.

    Names and shapes in a checkpoint stay those of the model. The optimizer keeps its state for the whole table.
    """
    mask = torch.zeros(getattr(weight, "ds_shape", weight.shape)[0], 1)
    mask[list(rows)] = 1
    weight.requires_grad_(True)
    weight.trained_rows = sorted(rows)
    weight.register_hook(lambda gradient: gradient * mask.to(gradient.device, gradient.dtype))


def check_trainable(model: PreTrainedModel, recipe: "Recipe") -> None:
    """
    Check that a model trains what its recipe says.

    Raises:
        RuntimeError: A parameter is trained, frozen, or in training mode against the recipe.
    """
    for name, attribute in components_of(model).items():
        part, is_trained = getattr(model, attribute), _trains(recipe, name)
        if not is_trained and any(module.training for module in part.modules() if not _may_checkpoint(module)):
            raise RuntimeError(f"{name}: expected eval mode, since it is frozen: call set_trainable after loading")
        for key, parameter in part.named_parameters():
            expected = is_trained and (name not in recipe.lora or ".lora_" in key)
            if parameter.requires_grad != (expected or hasattr(parameter, "trained_rows")):
                state = "trained" if expected else "frozen"
                raise RuntimeError(f"{attribute}.{key}: expected to be {state}: call set_trainable after loading")


# LoRA


def _add_lora(model: PreTrainedModel, name: str, options: Any, seed: int) -> None:
    """
    Add LoRA to all linear layers of a component but the LM head.

    The layers are replaced in place, under the names of peft. Their rank and alpha are written to config.json, so that
    `sailvit convert` can merge a checkpoint. All ranks draw the same values: FSDP2 shards what each of them has.
    """
    rank, alpha, dropout = (dict(options)[key] for key in ("r", "alpha", "dropout"))  # of a mapping or pydantic model
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", bias="none")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, getattr(model, COMPONENTS[name]))
    for field, value in zip(LORA_FIELDS[name], (rank, alpha), strict=True):
        setattr(model.config, field, value)


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Merge all LoRA into the layers below, in place; the model then has its original names."""
    for attribute in components_of(model).values():
        part = getattr(model, attribute)
        for name, module in list(part.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge()
                part.set_submodule(name, module.get_base_layer())
    for field in (field for fields in LORA_FIELDS.values() for field in fields):
        if hasattr(model.config, field):
            delattr(model.config, field)


# Optimizer


def parameter_groups(model: PreTrainedModel, recipe: "Recipe") -> list[dict[str, Any]]:
    """
    Return the parameter groups of the optimizer: for every trained component one with weight decay and one without.

    Weight decay applies to tensors of two or more dimensions (weights of linear layers and convolutions, embeddings,
    position embeddings, LoRA), not to vectors (biases, scales of norms), as in GPT-3's and LLaMA's training codes. Rows
    of added tokens have none, since it would change the frozen rows of their table, too. There is no empty group: FSDP2
    cannot resume one.

    Raises:
        ValueError: The recipe has no learning rate for a trained component.
    """
    groups = []
    for name, parameters in _trained_parameters(model):
        rate = learning_rate_of(recipe, name)
        decays = [parameter for parameter in parameters if _decays(parameter)]
        others = [parameter for parameter in parameters if not _decays(parameter)]
        for members, decay in ((decays, recipe.weight_decay), (others, 0.0)):
            if members:
                groups.append({"params": members, "lr": rate, "weight_decay": decay})
    return groups


def _trained_parameters(model: PreTrainedModel) -> Iterator[tuple[str, list[nn.Parameter]]]:
    for name, attribute in components_of(model).items():
        if trained := [parameter for parameter in getattr(model, attribute).parameters() if parameter.requires_grad]:
            yield name, trained


def _decays(parameter: nn.Parameter) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor in place of a parameter
    return len(shape) > 1 and not hasattr(parameter, "trained_rows")


def learning_rate_of(recipe: "Recipe", component: str) -> float:
    """Return the peak learning rate of a component."""
    rates, component = recipe.learning_rate, "vision" if component == HEAD else component
    if isinstance(rates, (int, float)):
        return float(rates)
    if component not in rates:
        raise ValueError(f"learning_rate: expected a number for {component}, got only {', '.join(rates) or 'none'}")
    return float(rates[component])


def trainable_table(model: PreTrainedModel, recipe: "Recipe") -> str:
    """Return a table of components: parameters, trained parameters, learning rate."""
    lines = [f"{'component':<12}{'parameters':>16}{'trainable':>16}{'learning rate':>16}"]
    for name, (total, trained) in component_sizes(model).items():
        rate = f"{learning_rate_of(recipe, name):g}" if trained else "frozen"
        lines.append(f"{name:<12}{total:>16,}{trained:>16,}{rate:>16}")
    return "\n".join(lines)


def component_sizes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return component -> numbers of parameters, adapters included, and of trained ones."""
    parts = {name: list(getattr(model, attribute).parameters()) for name, attribute in components_of(model).items()}
    return {name: (sum(map(_size, part)), sum(map(_trained_size, part))) for name, part in parts.items()}


def tied_names(model: PreTrainedModel) -> list[str]:
    """Return the parameters that are an earlier one under another name, such as an lm_head tied to the embeddings."""
    own = {name for name, _ in model.named_parameters()}
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in own]


def _size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _trained_size(parameter: nn.Parameter) -> int:
    if rows := getattr(parameter, "trained_rows", None):
        return len(rows) * math.prod(getattr(parameter, "ds_shape", parameter.shape)[1:])
    return _size(parameter) if parameter.requires_grad else 0


# Activation checkpointing


def checkpointed_components(recipe: "Recipe") -> tuple[str, ...]:
    """Return the components whose activations a recipe recomputes."""
    chosen = recipe.gradient_checkpointing
    return (chosen,) if isinstance(chosen, str) else ("vision", "language") if chosen else ()


def enable_checkpointing(model: PreTrainedModel, components: Collection[str]) -> None:
    """
    Recompute the layers of vision encoder, language model or both in the backward pass.

    A frozen language model needs it, too, where the connector before it is trained: the gradient passes through it.
    """
    for name in components_of(model).keys() & {*components}:
        part = getattr(model, COMPONENTS[name])
        enable = getattr(part, "activation_checkpointing_enable", None)  # its name since transformers 5.24
        (enable or part.gradient_checkpointing_enable)({"use_reentrant": False})
        for layer in filter(_may_checkpoint, part.modules()):
            layer.training = True  # of the layer alone, not of the modules in it, which are in eval mode if frozen


def _may_checkpoint(module: nn.Module) -> bool:
    """Return whether a layer can be checkpointed while it is frozen: it has no dropout of its own that would run."""
    if not (isinstance(module, GradientCheckpointingLayer) and getattr(module, "gradient_checkpointing", False)):
        return False
    return not any("dropout" in name and value for name, value in vars(module).items() if isinstance(value, float))
