"""Adapters of peft: two low-rank matrices a module, merged into the base they were trained on, or lie inside of."""

import math
import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .checkpoint import Checkpoint
from .deepspeed_zero import MASTERS
from .errors import CheckpointError
from .names import strip_wrapper_prefixes
from .overlay import CompositeCheckpoint
from .sources import ADAPTER
from .tensors import CHUNK, StoredTensor, cast, is_same, load, read_bytes, to_bytes
from .tied_embeddings import Ends, find_ends, is_tied, untied


if TYPE_CHECKING:
    import torch

ADAPTER_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.(?P<matrix>lora_(?:embedding_)?[AB])(?:\.(?!bias)[^.]+)??(?:\.weight)?)?"
)

# Parts that InternVL wraps -> where its config.json has the rank; alpha is twice the rank (wrap_llm_lora,
# wrap_backbone_lora of its modeling_internvl_chat.py).
RANKS = {"language_model": "use_llm_lora", "vision_model": "use_backbone_lora"}

MERGE_FIRST = "merge it first (peft's merge_and_unload)"


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


class AdaptedModel(CompositeCheckpoint):
    """
    Checkpoints whose low-rank matrices are merged into what they were trained on.

    Attributes:
        changes: Name of a tensor -> what becomes of it: "low" and "high", to be added to what is there or to "base", or
            "whole", to take its place -> the name it is stored under.
        adapter: Where these are stored.
        ends: Embeddings and head, where config.json ties them.
    """

    changes: dict[str, dict[str, str]]
    adapter: Checkpoint
    ends: Ends | None

    @property
    def dtype(self) -> str:
        """Of what was adapted, a key of ITEM_SIZES."""
        return self.original(next(name for name, change in self.changes.items() if change.keys() != {"whole"})).dtype

    @cached_property
    def is_untied(self) -> bool:
        """Whether what config.json ties was trained apart: peft changes one of two names, or each for itself."""
        changed = {name for name, change in self.changes.items() if self._is_changed(change)}
        if self.ends is None or not changed & {self.ends.embeddings, self.ends.head}:
            return False
        return not is_same(self[self.ends.embeddings], self[self.ends.head])

    def document(self, file: str) -> dict[str, Any]:
        """config.json says that embeddings and head are two tensors, if they are now."""
        content = super().document(file)
        return untied(content) if file == "config.json" and self.is_untied else content

    def __getitem__(self, name: str) -> StoredTensor:
        change, tensor = self.changes.get(name, {}), self.original(name)
        if "whole" in change:
            found = self.adapter[change["whole"]]
            if found.shape != tensor.shape:
                self.refuse(name, f"is {list(found.shape)} in the adapter, {list(tensor.shape)} in the base")
            return found
        matrices = {role: stored for role, stored in change.items() if role != "base"}
        if matrices and matrices.keys() != {"low", "high"}:
            self.refuse(name, f"the adapter has only one of its two matrices: {', '.join(matrices.values())}")
        return self._merge(name, tensor, matrices) if matrices else tensor

    def original(self, name: str) -> StoredTensor:
        """A tensor before anything was added to it; of tied ones, which were one then, what is stored of either."""
        for end in (name, self.ends.other(name) if self.ends else None):
            if end is not None and "base" in self.changes.get(end, {}):
                return self.adapter[self.changes[end]["base"]]
        return self.stored_original(name)

    def _merge(self, name: str, tensor: StoredTensor, matrices: Mapping[str, str]) -> MergedTensor:
        low, high = self.adapter[matrices["low"]], self.adapter[matrices["high"]]
        kind = "convolution" if len(tensor.shape) == 4 else "linear"
        if "lora_embedding_" in matrices["low"] or self.is_transposed:
            kind = "transposed"
        made = (*high.shape[:1], *low.shape[1:2])
        if kind == "transposed":
            made = made[::-1]
        if 0 in low.shape or high.shape[1:2] != low.shape[:1] or made != tensor.shape[:2]:
            self.refuse(name, f"{list(tensor.shape)} is not what {list(high.shape)} by {list(low.shape)} makes")
        scale = self.scale(matrices["low"], low.shape[0])
        return MergedTensor(tensor.file, "F32", tensor.shape, base=tensor, low=low, high=high, kind=kind, scale=scale)

    def _add(self, changes: dict[str, dict[str, str]], place: str, role: str, name: str) -> None:
        change = changes.setdefault(place, {})
        if role in change:
            what = f"{name} and {change[role]} change the same tensor: keep one adapter, or merge them with peft"
            raise CheckpointError(f"{self.adapter.source.name}: {what}")
        change[role] = name

    @property
    def is_transposed(self) -> bool:
        """Whether linear layers hold their weights the other way round."""
        return False

    @abstractmethod
    def stored_original(self, name: str) -> StoredTensor:
        """A tensor as it is stored where the adapter began."""

    @abstractmethod
    def scale(self, name: str, rank: int) -> float:
        """What the product of two matrices, the lower of this name, is multiplied by."""

    @abstractmethod
    def refuse(self, name: str, what: str) -> NoReturn:
        """
        Raises:
            CheckpointError: A tensor and what is to be merged into it do not fit.
        """

    @staticmethod
    def _is_changed(change: Mapping[str, str]) -> bool:
        return bool(change.keys() & {"low", "high"})


class MergedLoRA(AdaptedModel):
    """A base, with an adapter of peft merged into it."""

    def __init__(self, adapter: Checkpoint, base: Checkpoint):
        super().__init__({"": adapter, "base/": base})
        self.adapter, self.base = adapter, base
        self.config = adapter.document(ADAPTER)
        _check_adapter(adapter.source.name, self.config)

    @cached_property
    def ends(self) -> Ends | None:
        ends = find_ends(self.base.weight_map)
        return ends if ends and is_tied(self.base.document("config.json")) else None

    @cached_property
    def places(self) -> dict[str, str]:
        """Name without wrappers and the prefix of the base -> name in the base, a tied head among them."""
        names = [*self.base.weight_map, *([self.ends.head] if self.ends else [])]
        return {strip_wrapper_prefixes(name): name for name in names}

    @cached_property
    def _parsed(self) -> dict[str, tuple[str, str]]:
        """Name in the adapter -> name of the tensor that it changes, and its role."""
        masters, parsed = self.adapter.engine.get(MASTERS) if self.adapter.weight_map else None, {}
        for name in self.adapter.weight_map:
            if (masters is None or name in masters) and "original_module" not in name.split("."):
                parsed[name] = _parse(name, self.adapter)  # else of the base, as the engine or peft holds it
        return parsed

    @cached_property
    def prefix(self) -> str:
        """
        What stands before the adapter's names in the base: that of a part, if only this was wrapped by peft.

        Raises:
            CheckpointError: They could be of several parts.
        """
        targets = [target for target, _ in self._parsed.values()]
        missing = [target for target in targets if self._place(target, "") is None]
        if not missing:
            return ""
        starts = {short.removesuffix(missing[0]) for short in self.places if short.endswith("." + missing[0])}
        fitting = sorted(start for start in starts if all(self._place(target, start) for target in targets))
        if len(fitting) > 1:
            what = f"its names are those of several parts ({', '.join(fitting)}): merge it with peft's merge_and_unload"
            raise CheckpointError(f"{self.adapter.source.name}: {what}")
        return fitting[0] if fitting else ""

    def _place(self, target: str, prefix: str) -> str | None:
        if prefix:
            return self.places.get(prefix + target)
        shorter = target.removeprefix("model.")
        return next((self.places[name] for name in (target, "model." + target, shorter) if name in self.places), None)

    @cached_property
    def changes(self) -> dict[str, dict[str, str]]:
        """
        As in Adapted, by names in the base.

        Raises:
            CheckpointError: Something of the adapter has no place in the base.
        """
        changes: dict[str, dict[str, str]] = {}
        for name, (target, role) in self._parsed.items():
            place = self._place(target, self.prefix)
            if place is None:
                what = f"{name} belongs to {target}, which {self.base.source.name} does not have: is it the base?"
                raise CheckpointError(f"{self.adapter.source.name}: {what}")
            self._add(changes, place, role, name)
        if not changes:
            raise CheckpointError(f"{self.adapter.source.name}: there is nothing in it to merge: copy it again")
        return changes

    @cached_property
    def weight_map(self) -> dict[str, str]:
        merged = "merged/" + self.adapter.entry
        names = {
            name: merged if name in self.changes else "base/" + file for name, file in self.base.weight_map.items()
        }
        return {**names, self.ends.head: merged} if self.is_untied else names

    @property
    def dtype(self) -> str:
        return self.stored_original(next(iter(self.changes))).dtype

    def stored_original(self, name: str) -> StoredTensor:
        is_virtual = self.ends and name == self.ends.head and name not in self.base.weight_map
        return self.base[self.ends.embeddings if is_virtual else name]

    @property
    def is_transposed(self) -> bool:
        return bool(self.config.get("fan_in_fan_out"))

    def scale(self, name: str, rank: int) -> float:
        return self._alpha(name) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _alpha(self, name: str) -> float:
        module = ADAPTER_NAME.fullmatch(strip_wrapper_prefixes(name))["module"]
        for pattern, alpha in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.config["lora_alpha"]

    def refuse(self, name: str, what: str) -> NoReturn:
        raise CheckpointError(f"{self.adapter.source.name}: {name}: {what}: is {self.base.source.name} the base?")

    @staticmethod
    def _is_changed(change: Mapping[str, str]) -> bool:
        return bool(change.keys() - {"base"})


class Unwrapped(AdaptedModel):
    """
    A SAIL-VL or InternVL whose parts were saved as peft had wrapped them, which use_llm_lora and use_backbone_lora of
    InternVL's training do: base and adapter are in one checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint):
        super().__init__({"": checkpoint})
        self.adapter = checkpoint

    @property
    def engine(self) -> dict[str, Any]:
        """What the checkpoint's engine says of the training."""
        return self.adapter.engine

    @engine.setter
    def engine(self, value: Any) -> None:
        """The checkpoint keeps its own."""

    @cached_property
    def ends(self) -> Ends | None:
        ends = find_ends(self.changes)
        return ends if ends and is_tied(self.adapter.document("config.json")) else None

    @cached_property
    def changes(self) -> dict[str, dict[str, str]]:
        """As in Adapted, for every tensor; by the names that it would have without peft."""
        changes: dict[str, dict[str, str]] = {}
        for name in self.adapter.weight_map:
            if "original_module" not in name.split("."):
                target, role = _parse(_without_peft(name), self.adapter)
                self._add(changes, target, role, name)
        return changes

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Part ("language_model.", ...) -> rank of the matrices in it."""
        lows = {name: change["low"] for name, change in self.changes.items() if "low" in change}
        return {name.partition(".")[0]: self.adapter[low].shape[0] for name, low in sorted(lows.items())}

    @cached_property
    def weight_map(self) -> dict[str, str]:
        merged = "merged/" + self.adapter.entry
        return dict.fromkeys([*self.changes, *([self.ends.head] if self.is_untied else [])], merged)

    def document(self, file: str) -> dict[str, Any]:
        """config.json says that nothing is wrapped any more."""
        content = super().document(file)
        return (
            {**content, **{key: 0 for key in RANKS.values() if content.get(key)}} if file == "config.json" else content
        )

    def stored_original(self, name: str) -> StoredTensor:
        change = self.changes.get(name) or self.changes[self.ends.other(name)]
        if "whole" not in change:
            self.refuse(name, "its base_layer is missing")
        return self.adapter[change["whole"]]

    def scale(self, name: str, rank: int) -> float:
        """InternVL's alpha is twice the rank, which config.json says."""
        part = next((part for part in RANKS if part in _without_peft(name).split(".")), None)
        stated = self.adapter.document("config.json").get(RANKS.get(part))
        if stated != rank:
            where = f"{RANKS[part]} in config.json is {stated!r}" if part else "it is in none of InternVL's parts"
            what = f"LoRA of rank {rank}, but {where}, so nothing says its scale: {MERGE_FIRST}"
            raise CheckpointError(f"{self.adapter.source.name}: {name}: {what}")
        return 2.0

    def refuse(self, name: str, what: str) -> NoReturn:
        raise CheckpointError(f"{self.adapter.source.name}: {name}: {what}: copy it again, or {MERGE_FIRST}")


def is_wrapped(names: Collection[str]) -> bool:
    """Whether a checkpoint holds, under the names of peft, both an adapter and what it was trained on."""
    marks = (r"\.lora_(?:embedding_)?A(?:\.|$)", r"\.base_layer\.")
    return all(any(re.search(mark, name) for name in names) for mark in marks)


def unwrap(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint, with the adapter in it merged, if there is one."""
    return Unwrapped(checkpoint) if is_wrapped(checkpoint.weight_map) else checkpoint


def _without_peft(name: str) -> str:
    """A name of a wrapped part as it was before, `base_model.model.` left out."""
    return re.sub(r"(^|\.)base_model\.model\.", r"\1", strip_wrapper_prefixes(name), count=1)


def _parse(name: str, adapter: Checkpoint) -> tuple[str, str]:
    """
    Name of the tensor that is changed by one of an adapter's, and its role: "low", "high", "base" or "whole".

    Raises:
        CheckpointError: It belongs to no kind of adapter that can be merged here.
    """
    match = ADAPTER_NAME.fullmatch(re.sub(r"\.modules_to_save\.[^.]+", "", strip_wrapper_prefixes(name)))
    short = match["module"] if match else "lora_"
    if match and match["matrix"]:
        return short + ".weight", "low" if match["matrix"].endswith("A") else "high"
    if "lora_" in short:
        raise CheckpointError(f"{adapter.source.name}: {name}: nothing here knows how to merge it: {MERGE_FIRST}")
    return short.replace(".base_layer.", "."), "base" if ".base_layer." in short else "whole"


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
