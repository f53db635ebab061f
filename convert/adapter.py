"""Adapters of peft: two low-rank matrices a module, merged into the base they were trained on."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from .fragments import read_bytes
from .layouts import strip_wrappers
from .problems import CheckpointError
from .readers import CHUNK, Checkpoint, StoredTensor
from .sources import ADAPTER
from .values import cast, load, to_bytes
from .woven import Woven
from .zero import MASTERS


if TYPE_CHECKING:
    import torch

ADAPTER_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.(?P<matrix>lora_(?:embedding_)?[AB])(?:\.(?!bias)[^.]+)??(?:\.weight)?)?"
)


@dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """
    A tensor of a base and what low-rank matrices add to it, in float32.

    Attributes:
        base: Of its shape.
        low, high: The two matrices; their product, `high` first, is what is added.
        kind: "linear", "transposed" or "convolution": how the product becomes the tensor's shape.
        scale: The product is multiplied by it.
    """

    base: StoredTensor | None = field(default=None, repr=False, compare=False)
    low: StoredTensor | None = field(default=None, repr=False, compare=False)
    high: StoredTensor | None = field(default=None, repr=False, compare=False)
    kind: str = "linear"
    scale: float = 1.0

    def pieces(self) -> Iterable[StoredTensor]:
        return chain.from_iterable(tensor.pieces() for tensor in (self.base, self.low, self.high))

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        import torch

        stop = math.prod(self.shape) if stop is None else stop
        added = self._added().reshape(-1)
        for first in range(start, stop, CHUNK // 4):
            last = min(first + CHUNK // 4, stop)
            data = cast(read_bytes(self.base, first, last), self.base.dtype, "F32")
            yield to_bytes(torch.from_numpy(data).view(torch.float32) + added[first:last])

    def _added(self) -> "torch.Tensor":
        """As peft computes it."""
        import torch

        low, high = load(self.low), load(self.high)
        for matrix, stored in ((low, self.low), (high, self.high)):
            if not matrix.isfinite().all():
                raise CheckpointError(f"{stored.file}: the adapter holds NaN or infinity: it is broken")
        if self.kind == "convolution" and self.shape[2:] != (1, 1):
            product = torch.nn.functional.conv2d(low.permute(1, 0, 2, 3), high).permute(1, 0, 2, 3)
        else:
            product = high.flatten(1) @ low.flatten(1)
        product = product.T if self.kind == "transposed" else product
        return (product * self.scale).reshape(self.shape)


class Merged(Woven):
    """A base, with an adapter of peft merged into it."""

    def __init__(self, adapter: Checkpoint, base: Checkpoint):
        super().__init__({"": adapter, "base/": base})
        self.adapter, self.base = adapter, base
        self.config = adapter.document(ADAPTER)
        _check_adapter(adapter.source.name, self.config)

    @cached_property
    def places(self) -> dict[str, str]:
        """Name without wrappers and the prefix of the base -> name in the base."""
        return {strip_wrappers(name): name for name in self.base.weight_map}

    @cached_property
    def changes(self) -> dict[str, dict[str, str]]:
        """
        Name in the base -> what the adapter has for it: "low" and "high", to be added to the base's or to "base", or
        "whole", to take its place -> name in the adapter.

        Raises:
            CheckpointError: Something of the adapter has no place in the base.
        """
        changes: dict[str, dict[str, str]] = {}
        for name in self.adapter.weight_map:
            if name not in self.adapter.engine.get(MASTERS, (name,)) or "original_module" in name.split("."):
                continue  # of the base, as the engine or peft holds it
            match = ADAPTER_NAME.fullmatch(re.sub(r"\.modules_to_save\.[^.]+", "", strip_wrappers(name)))
            short = match["module"] if match else "lora_"
            if match and match["matrix"]:
                target, role = short + ".weight", "low" if match["matrix"].endswith("A") else "high"
            elif "lora_" not in short:
                target, role = short.replace(".base_layer.", "."), "base" if ".base_layer." in short else "whole"
            else:
                raise CheckpointError(f"{self.adapter.source.name}: {name}: nothing here knows how to merge it")
            place = next((self.places[p + target] for p in ("", "model.") if p + target in self.places), None)
            if place is None and target.startswith("model."):
                place = self.places.get(target.removeprefix("model."))
            if place is None:
                what = f"{name} belongs to {target}, which {self.base.source.name} does not have: is it the base?"
                raise CheckpointError(f"{self.adapter.source.name}: {what}")
            changes.setdefault(place, {})[role] = name
        if not changes:
            raise CheckpointError(f"{self.adapter.source.name}: there is nothing in it to merge: copy it again")
        return changes

    @cached_property
    def weight_map(self) -> dict[str, str]:
        return {
            name: "merged/" + self.adapter.entry if name in self.changes else "base/" + file
            for name, file in self.base.weight_map.items()
        }

    def __getitem__(self, name: str) -> StoredTensor:
        change = dict(self.changes.get(name, {}))
        whole = change.pop("whole", None)
        tensor = self.adapter[change.pop("base")] if "base" in change else self.base[name]
        if whole:
            found = self.adapter[whole]
            if found.shape != tensor.shape:
                self._refuse(name, f"is {list(found.shape)} in the adapter, {list(tensor.shape)} in the base")
            return found
        if change and change.keys() != {"low", "high"}:
            self._refuse(name, f"the adapter has only one of its two matrices: {', '.join(change.values())}")
        return self._merge(name, tensor, change) if change else tensor

    def _merge(self, name: str, tensor: StoredTensor, change: Mapping[str, str]) -> MergedTensor:
        low, high = self.adapter[change["low"]], self.adapter[change["high"]]
        kind = "convolution" if len(tensor.shape) == 4 else "linear"
        if "lora_embedding_" in change["low"] or self.config.get("fan_in_fan_out"):
            kind = "transposed"
        made = (*high.shape[:1], *low.shape[1:2])
        if kind == "transposed":
            made = made[::-1]
        if 0 in low.shape or high.shape[1:2] != low.shape[:1] or made != tensor.shape[:2]:
            self._refuse(name, f"{list(tensor.shape)} is not what {list(high.shape)} by {list(low.shape)} makes")
        rank = low.shape[0]
        scale = self._alpha(change["low"]) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return MergedTensor(tensor.file, "F32", tensor.shape, base=tensor, low=low, high=high, kind=kind, scale=scale)

    def _alpha(self, name: str) -> float:
        module = ADAPTER_NAME.fullmatch(strip_wrappers(name))["module"]
        for pattern, alpha in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.config["lora_alpha"]

    def _refuse(self, name: str, what: str) -> None:
        raise CheckpointError(f"{self.adapter.source.name}: {name}: {what}: is {self.base.source.name} the base?")


def _check_adapter(source: str, config: Mapping[str, Any]) -> None:
    """
    Raises:
        CheckpointError: An adapter that is more than two matrices a module.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{source}: an adapter of kind {kind!r}: merge it with peft's merge_and_unload")
    for option in ("use_dora", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters",
                   "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora"):  # fmt: skip
        if config.get(option):
            raise CheckpointError(f"{source}: an adapter with {option}: merge it with peft's merge_and_unload")
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        what = f"it began as {begun}, which changes the base: save it with path_initial_model_for_weight_conversion"
        raise CheckpointError(f"{source}: {what}")
    patterns = config.get("alpha_pattern") or {}
    try:
        alphas = [config.get("lora_alpha"), *patterns.values()]
        for pattern in patterns:
            re.compile(pattern)
    except (AttributeError, TypeError, re.error) as error:
        raise CheckpointError(f"{source}: {ADAPTER}: alpha_pattern is {patterns!r}: {error}") from error
    if not all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas):
        raise CheckpointError(f"{source}: {ADAPTER}: lora_alpha is {alphas[0]!r}, not a number")
