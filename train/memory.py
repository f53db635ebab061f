# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Memory of training on a rank, from shapes: weights, gradients, optimizer states by rules of the engine, activations by a
run of the model on fake tensors, which have shapes, but no memory.

Every engine trains with AdamW, in bfloat16 mixed precision with float32 master weights, or in float32.
"""

import copy
import weakref
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..modeling_sailvl import SAILVLForConditionalGeneration
from .components import enable_checkpointing, train_rows
from .flops import blocks_of
from .recipe import ENGINES


SHARDING = tuple(engine for engine in ENGINES if engine not in ("single", "ddp"))
# Defaults of DeepSpeed: reduce_bucket_size, stage3_max_live_parameters (deepspeed.ai/docs/config-json).
REDUCE_BUCKET_ELEMENTS = 500_000_000
LIVE_ELEMENTS = 1_000_000_000


@dataclass(frozen=True)
class PackShape:
    """A pack: its tokens (visual tokens included), tiles and supervised positions."""

    tokens: int
    tiles: int
    answers: int


@dataclass(frozen=True)
class Peak:
    """
    Bytes in forward and backward pass, without weights and their gradients.

    Attributes:
        activations: Peak without logits.
        logits: What logits, their copies and gradients add to the peak, if they are there at the same time.
    """

    activations: int
    logits: int


@dataclass(frozen=True)
class Memory:
    """
    Bytes on a rank.

    Attributes:
        weights: As the engine stores them: in bfloat16 by ZeRO, in float32 otherwise.
        gradients: Of all trained parameters, which stay between the packs of a step.
        optimizer: Both moments of Adam; also the float32 master weights of ZeRO.
        gathered: Weights that a sharding engine gathers from all ranks, and buffers for gradients.
        activations, logits: As in `Peak`.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float

    @property
    def states(self) -> float:
        """What does not depend on the pack."""
        return self.weights + self.gradients + self.optimizer + self.gathered

    @property
    def total(self) -> float:
        return self.states + self.activations + self.logits

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}


def memory_of_engines(
    model: SAILVLForConditionalGeneration,
    engines: Collection[str],
    ranks: int,
    pack: PackShape,
    precision: str = "bfloat16",
    checkpointed: Collection[str] = (),
    is_masked: bool = True,
) -> dict[str, Memory]:
    """
    Return engine -> memory of a rank, in a step of several packs after the first step.

    Args:
        model: On the meta device; `requires_grad` of its parameters decides what is trained.
        ranks: Over which the engine shards.
        precision: "bfloat16" for mixed precision, or "float32".
        checkpointed: Components under gradient checkpointing: vision, language.
        is_masked: A mask keeps the samples of a pack apart, as sdpa and eager attention need it.

    Raises:
        ValueError: The engine or precision is unknown, or a single process has several ranks.
    """
    states = {engine: memory_of_states(model, engine, ranks, precision) for engine in engines}
    precisions = {engine: _computed(engine, precision) for engine in engines}
    peaks = {
        computed: peak_of_pack(model, pack, computed, checkpointed, is_masked) for computed in {*precisions.values()}
    }
    return {engine: Memory(**states[engine], **asdict(peaks[precisions[engine]])) for engine in engines}


def _computed(engine: str, precision: str) -> str:
    """Return the precision of `peak_of_pack`: sharding engines compute on weights that are bfloat16 already."""
    return "autocast" if engine in ("single", "ddp") and precision == "bfloat16" else precision


def memory_of_states(
    model: SAILVLForConditionalGeneration, engine: str, ranks: int, precision: str = "bfloat16"
) -> dict[str, float]:
    """Return the bytes of weights, gradients, optimizer and gathered weights on a rank, as in `Memory`."""
    _check(engine, ranks, precision)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    width = 4 if precision == "float32" else 2
    if engine in ("single", "ddp"):
        buckets = 4 * trained if engine == "ddp" else 0  # of gradients, in which DDP reduces them
        return {"weights": 4 * parameters, "gradients": 4 * trained, "optimizer": 8 * trained, "gathered": buckets}
    if engine == "fsdp2":
        sharded = {"weights": 4 * parameters, "gradients": 4 * trained, "optimizer": 8 * trained}
        return {name: size / ranks for name, size in sharded.items()} | {"gathered": _gathered_by_fsdp(model, width)}
    bucket = width * min(REDUCE_BUCKET_ELEMENTS, trained)
    live = width * min(LIVE_ELEMENTS, parameters) if engine == "zero3" else 0
    weights = width * parameters / (ranks if engine == "zero3" else 1)
    sharded = {"gradients": width * trained / ranks, "optimizer": 12 * trained / ranks}
    return {"weights": weights, **sharded, "gathered": bucket + live}


def _check(engine: str, ranks: int, precision: str) -> None:
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    if precision not in ("bfloat16", "float32"):
        raise ValueError(f"precision: expected bfloat16 or float32, got {precision!r}")
    if ranks < 1 or (engine == "single" and ranks > 1):
        expected = "1" if engine == "single" else "at least 1"
        raise ValueError(f"ranks: expected {expected} with engine {engine}, got {ranks}: use {', '.join(ENGINES[1:])}")


def _gathered_by_fsdp(model: SAILVLForConditionalGeneration, width: int) -> float:
    """
    Return the bytes of gathered weights and of gradients before they are reduced, when every block is a unit.

    Two blocks, the one that is computed and the next, and what is in no block (embeddings, connector, LM head), which
    FSDP2 keeps from forward to backward pass.
    """
    parts = [(model.vision_model, model.config.vision_config), (model.get_decoder(), model.config.text_config)]
    blocks = [block for part, config in parts for block in blocks_of(part, config)]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    largest = max(blocks, key=lambda block: sum(parameter.numel() for parameter in block.parameters()))
    parameters = [*outside, *largest.parameters(), *largest.parameters()]
    return width * sum(parameter.numel() * (2 if parameter.requires_grad else 1) for parameter in parameters)


# Activations: a run on fake tensors


def peak_of_pack(
    model: SAILVLForConditionalGeneration,
    pack: PackShape,
    precision: str,
    checkpointed: Collection[str] = (),
    is_masked: bool = True,
) -> Peak:
    """
    Return the peak of forward and backward pass.

    Args:
        precision: "float32", "bfloat16" (weights, too), or "autocast": float32 weights, bfloat16 products.
    """
    rows = {name: weight.trained_rows for name, weight in model.named_parameters() if hasattr(weight, "trained_rows")}
    model = copy.deepcopy(model).to(torch.bfloat16 if precision == "bfloat16" else torch.float32).train()
    with FakeTensorMode():
        _allocate(model)
        for name, trained in rows.items():
            train_rows(model.get_parameter(name), trained)
        enable_checkpointing(model, checkpointed)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        live = LiveBytes([*model.parameters(), *model.buffers(), *gradients], model.config.text_config.vocab_size)
        with live:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
                loss = _loss(model, pack, is_masked)
            loss.backward()
    return Peak(live.peak_without_logits, live.peak - live.peak_without_logits)


def _allocate(model: nn.Module) -> None:
    """Replace tensors on the meta device by fake tensors; shared ones stay shared."""
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in fakes:
                fakes[id(parameter)] = nn.Parameter(_fake(parameter), parameter.requires_grad)
            module._parameters[name] = fakes[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = _fake(buffer)


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _loss(model: SAILVLForConditionalGeneration, pack: PackShape, is_masked: bool) -> torch.Tensor:
    """
    Run the model as `forward` does, without its checks of values, which fake tensors do not have.

    The mask is that of transformers for packed samples: (1, 1, tokens, tokens).
    """
    embeds = model.get_input_embeddings()(torch.empty(1, pack.tokens, dtype=torch.long))
    if pack.tiles:
        (rows, columns), (height, width) = model.config.grid_size, model.config.patch_size
        channels = model.config.vision_config.num_channels
        tiles = torch.empty(pack.tiles, channels, rows * height, columns * width)
        visual = model.get_image_features(tiles).flatten(0, 1).to(embeds.dtype)
        embeds = embeds.masked_scatter(torch.empty(1, pack.tokens, 1, dtype=torch.bool), visual)
    logits = model.language_model(
        inputs_embeds=embeds,
        attention_mask=torch.empty(1, 1, pack.tokens, pack.tokens, dtype=torch.bool) if is_masked else None,
        logits_to_keep=torch.empty(pack.answers, dtype=torch.long),
        use_cache=False,
    ).logits
    labels = torch.empty(pack.answers, dtype=torch.long)
    return F.cross_entropy(logits[0].float(), labels, reduction="sum")


class LiveBytes(TorchDispatchMode):
    """
    Counts the bytes of tensors that exist at the same time.

    Args:
        tensors: Not counted.
        vocab_size: Tensors whose last dimension has this size are logits.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.live = self.live_logits = self.peak = self.peak_without_logits = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), tensor.shape[-1:] == (self.vocab_size,))
        return output

    def _count(self, storage: torch.UntypedStorage, is_logits: bool) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self._add(storage.nbytes(), is_logits)
        self.peak = max(self.peak, self.live)
        self.peak_without_logits = max(self.peak_without_logits, self.live - self.live_logits)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes(), is_logits)

    def _forget(self, address: int, size: int, is_logits: bool) -> None:
        self._known.discard(address)
        self._add(-size, is_logits)

    def _add(self, size: int, is_logits: bool) -> None:
        self.live += size
        self.live_logits += size if is_logits else 0
