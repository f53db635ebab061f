"""LoRA adapters of peft on linear layers, merged into their base model or into the model that contains them."""

import math
import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from .checkpoint import Checkpoint
from .deepspeed_zero import MASTERS
from .errors import CheckpointError
from .names import strip_wrapper_prefixes
from .overlay import CompositeCheckpoint, origin_of_base
from .sources import ADAPTER
from .tensors import CHUNK, StoredTensor, cast, load_float32, read_bytes, spans, to_bytes, torch_name
from .tied_embeddings import find_ends, is_tied


if TYPE_CHECKING:
    import torch

MERGE_WITH_PEFT = "merge it with peft (model.merge_and_unload())"

LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])(?:\.(?!bias)[^.]+)??(?:\.weight)?")

# Options of adapter_config.json that change more than two matrices of a linear layer and their scale.
UNSUPPORTED_OPTIONS = (
    "use_dora", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters", "use_qalora",
    "alora_invocation_tokens", "arrow_config", "use_bdlora", "fan_in_fan_out", "alpha_pattern",
)  # fmt: skip

# Initialisations that change the base.
UNSUPPORTED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Components that InternVL wraps -> the field of config.json with the rank; lora_alpha is twice the rank (wrap_llm_lora
# and wrap_backbone_lora of its modeling_internvl_chat.py).
RANK_FIELDS = {"language_model": "use_llm_lora", "vision_model": "use_backbone_lora"}


@dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """The weight of a linear layer with its LoRA merged, base + scale * lora_B @ lora_A, in float32."""

    base: StoredTensor | None = field(default=None, repr=False, compare=False)
    a: StoredTensor | None = field(default=None, repr=False, compare=False)
    b: StoredTensor | None = field(default=None, repr=False, compare=False)
    scale: float = 1.0

    def leaves(self) -> Iterable[StoredTensor]:
        return chain.from_iterable(tensor.leaves() for tensor in (self.base, self.a, self.b))

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        import torch

        delta = (self._load(self.b) @ self._load(self.a) * self.scale).reshape(-1)  # as peft computes it
        for first, last in spans(start, math.prod(self.shape) if stop is None else stop, CHUNK // 4):
            data = cast(read_bytes(self.base, first, last), self.base.dtype, "F32")
            yield to_bytes(torch.from_numpy(data).view(torch.float32) + delta[first:last])

    @staticmethod
    def _load(stored: StoredTensor) -> "torch.Tensor":
        values = load_float32(stored)
        if not values.isfinite().all():
            raise CheckpointError(f"{stored.file}: the adapter holds NaN or infinity: it is broken")
        return values


class AdaptedModel(CompositeCheckpoint):
    """
    A model with LoRA merged into it.

    Attributes:
        adapter: The checkpoint with the matrices.
        hint: How to fix an adapter that does not fit.
        changes: Tensor -> role ("lora_A", "lora_B", "base_layer", "whole" for a replacement) -> name in `adapter`.
    """

    adapter: Checkpoint
    changes: dict[str, dict[str, str]]
    hint: str

    def __getitem__(self, name: str) -> StoredTensor:
        change, tensor = self.changes.get(name, {}), self.original(name)
        if "whole" in change:
            replacement = self.adapter[change["whole"]]
            if replacement.shape != tensor.shape:
                what = f"expected {list(tensor.shape)} as in the base, got {list(replacement.shape)}"
                raise self.error(f"{name}: {what}: {self.hint}")
            return replacement
        roles = change.keys() & {"lora_A", "lora_B"}
        if not roles:
            return tensor
        if len(roles) == 1:
            what = f"the adapter has only one of its two matrices, {change[roles.pop()]}"
            raise self.error(f"{name}: {what}: {self.hint}")
        a, b = self.adapter[change["lora_A"]], self.adapter[change["lora_B"]]
        if not (len(a.shape) == len(b.shape) == len(tensor.shape) == 2):
            raise self.error(f"{name}: LoRA on {list(tensor.shape)}, which is no linear layer: {MERGE_WITH_PEFT}")
        rank = a.shape[0]
        if not rank or b.shape[1] != rank or (b.shape[0], a.shape[1]) != tensor.shape:
            what = f"{list(tensor.shape)} is not what {list(b.shape)} by {list(a.shape)} makes"
            raise self.error(f"{name}: {what}: {self.hint}")
        scale = self.scale(change["lora_A"], rank)
        return MergedTensor(tensor.file, "F32", tensor.shape, base=tensor, a=a, b=b, scale=scale)

    def default_dtype(self, names: Collection[str] = ()) -> str:
        """The precision of the adapted tensors before merging."""
        return torch_name(self.original(min(self.changes, key=lambda name: "lora_A" not in self.changes[name])).dtype)

    def _add(self, changes: dict[str, dict[str, str]], target: str, role: str, name: str) -> None:
        change = changes.setdefault(target, {})
        if role in change:
            what = f"change the same tensor: keep one adapter, or {MERGE_WITH_PEFT}"
            raise self.error(f"{name} and {change[role]} {what}")
        change[role] = name

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.adapter.source.name}: {what}")

    @abstractmethod
    def original(self, name: str) -> StoredTensor:
        """A tensor before merging."""

    @abstractmethod
    def scale(self, name: str, rank: int) -> float:
        """The factor of lora_B @ lora_A, for the name of lora_A."""


class MergedLoRA(AdaptedModel):
    """A base model with an adapter of peft merged into it: LoRA on linear layers, and `modules_to_save`."""

    def __init__(self, adapter: Checkpoint, base: Checkpoint):
        super().__init__({"": adapter, "base/": base})
        self.adapter, self.base, self.config = adapter, base, adapter.document(ADAPTER)
        self.hint = f"is {base.source.name} the base?"
        _check_config(adapter.source.name, self.config)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        merged = "merged/" + self.adapter.entry
        return {name: merged if name in self.changes else "base/" + file for name, file in self.base.weight_map.items()}

    @cached_property
    def targets(self) -> dict[str, tuple[str, str]]:
        """Name in the adapter -> name of the tensor that it changes, its role; frozen tensors of the base left out."""
        names = self.adapter.weight_map
        trained = self.adapter.engine.get(MASTERS, names)
        return {name: _parse(name, self.adapter) for name in names if name in trained and not _is_copy(name)}

    @cached_property
    def prefix(self) -> str:
        """What precedes the adapter's names in the base: the component, if peft wrapped only one."""
        targets = [target for target, _ in self.targets.values()]
        missing = next((target for target in targets if self._base_name(target, "") is None), None)
        if missing is None:
            return ""
        prefixes = {name.removesuffix(missing) for name in self._base_names if name.endswith("." + missing)}
        fitting = sorted(prefix for prefix in prefixes if all(self._base_name(each, prefix) for each in targets))
        if len(fitting) > 1:
            raise self.error(f"its names are those of several parts ({', '.join(fitting)}): {MERGE_WITH_PEFT}")
        return fitting[0] if fitting else ""

    @cached_property
    def _base_names(self) -> dict[str, str]:
        return {strip_wrapper_prefixes(name): name for name in [*self.base.weight_map, *self._tied]}

    @cached_property
    def _tied(self) -> set[str]:
        ends = find_ends(self.base.weight_map)
        return {ends.embeddings, ends.head} if ends and is_tied(self.base.document("config.json")) else set()

    def _base_name(self, target: str, prefix: str) -> str | None:
        candidates = (prefix + target,) if prefix else (target, "model." + target, target.removeprefix("model."))
        return next((self._base_names[name] for name in candidates if name in self._base_names), None)

    @cached_property
    def changes(self) -> dict[str, dict[str, str]]:
        changes: dict[str, dict[str, str]] = {}
        for name, (target, role) in self.targets.items():
            base_name = self._base_name(target, self.prefix)
            if base_name in self._tied:
                what = f"embeddings or head, which {self.base.source.name} ties: {MERGE_WITH_PEFT}"
                raise self.error(f"{name} changes {what}")
            if base_name is None:
                what = f"{target}, which {self.base.source.name} does not have: is it the base?"
                raise self.error(f"{name} belongs to {what}")
            self._add(changes, base_name, role, name)
        if not changes:
            raise self.error("there is nothing in it to merge: copy it again")
        return changes

    def original(self, name: str) -> StoredTensor:
        base_layer = self.changes.get(name, {}).get("base_layer")
        return self.adapter[base_layer] if base_layer else self.base[name]

    def scale(self, name: str, rank: int) -> float:
        return self.config["lora_alpha"] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def training_metadata(self) -> dict[str, Any]:
        adapter = {key: self.config.get(key) for key in ("peft_type", "r", "lora_alpha")}
        adapter |= {"of": self.prefix.rstrip(".")} if self.prefix else {}
        return self.adapter.training_metadata | {"base": origin_of_base(self.base), "adapter": adapter}


class Unwrapped(AdaptedModel):
    """A SAIL-VL or InternVL saved while peft wrapped its components, as use_llm_lora and use_backbone_lora do."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__({"": checkpoint})
        self.adapter, self.hint = checkpoint, f"copy it again, or {MERGE_WITH_PEFT}"

    @cached_property
    def weight_map(self) -> dict[str, str]:
        return dict.fromkeys(self.changes, "merged/" + self.adapter.entry)

    @cached_property
    def changes(self) -> dict[str, dict[str, str]]:
        """Of every tensor, by its name without peft."""
        changes: dict[str, dict[str, str]] = {}
        for name in self.adapter.weight_map:
            if not _is_copy(name):
                self._add(changes, *_parse(name, self.adapter), name)
        return changes

    def document(self, file: str) -> dict[str, Any]:
        """config.json with the ranks set to 0."""
        content = super().document(file)
        ranks = {key: 0 for key in RANK_FIELDS.values() if content.get(key)} if file == "config.json" else {}
        return {**content, **ranks}

    def original(self, name: str) -> StoredTensor:
        change = self.changes[name]
        if not {"base_layer", "whole"} & change.keys():
            raise self.error(f"{name}: its base_layer is missing: {self.hint}")
        return self.adapter[change.get("base_layer") or change["whole"]]

    def scale(self, name: str, rank: int) -> float:
        component = next((part for part in RANK_FIELDS if part in name.split(".")), None)
        configured = self.adapter.document("config.json").get(RANK_FIELDS.get(component))
        if configured == rank:
            return 2.0
        known = (
            f"{RANK_FIELDS[component]} in config.json is {configured!r}" if component else "no component of InternVL"
        )
        what = f"LoRA of rank {rank}, but {known}, so its scale is unknown: {MERGE_WITH_PEFT}"
        raise self.error(f"{name}: {what}")

    @property
    def training_metadata(self) -> dict[str, Any]:
        matrices = {name.partition(".")[0]: change["lora_A"] for name, change in sorted(self.changes.items())
                    if "lora_A" in change}  # fmt: skip
        ranks = {component: self.adapter[matrix].shape[0] for component, matrix in matrices.items()}
        merged = {component: {"r": rank, "lora_alpha": 2 * rank} for component, rank in ranks.items()}
        return self.adapter.training_metadata | {"merged": merged}


def is_wrapped(names: Collection[str]) -> bool:
    """Whether names are those of a model wrapped by peft: LoRA and the layers below it."""
    marks = (r"\.lora_(?:embedding_)?A(?:\.|$)", r"\.base_layer\.")
    return all(any(re.search(mark, name) for name in names) for mark in marks)


def unwrap(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with the LoRA inside it merged, if there is any."""
    return Unwrapped(checkpoint) if is_wrapped(checkpoint.weight_map) else checkpoint


def _is_copy(name: str) -> bool:
    """Whether it is what peft keeps of a module in `modules_to_save` from before the training."""
    return "original_module" in name.split(".")


def _parse(name: str, adapter: Checkpoint) -> tuple[str, str]:
    """The tensor that one of an adapter changes, without peft's segments, and its role (AdaptedModel.changes)."""
    short = re.sub(r"(^|\.)base_model\.model\.", r"\1", strip_wrapper_prefixes(name), count=1)
    short = re.sub(r"\.modules_to_save\.[^.]+", "", short)
    if match := LORA_NAME.fullmatch(short):
        return match["module"] + ".weight", "lora_" + match["matrix"]
    if "lora_" in short:
        kind = "LoRA on embeddings" if "lora_embedding_" in short else "it"
        raise CheckpointError(f"{adapter.source.name}: {name}: {kind} is not supported: {MERGE_WITH_PEFT}")
    return short.replace(".base_layer.", "."), "base_layer" if ".base_layer." in short else "whole"


def _check_config(source: str, config: Mapping[str, Any]) -> None:
    """Refuse adapters of unsupported kinds, by name."""
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"{source}: an adapter of kind {kind!r}: {MERGE_WITH_PEFT}")
    for option in UNSUPPORTED_OPTIONS:
        if config.get(option):
            raise CheckpointError(f"{source}: an adapter with {option}: {MERGE_WITH_PEFT}")
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(UNSUPPORTED_INITS):
        what = f"an adapter with init_lora_weights {init}, which changes the base"
        raise CheckpointError(f"{source}: {what}: save it with path_initial_model_for_weight_conversion")
    alpha = config.get("lora_alpha")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CheckpointError(f"{source}: {ADAPTER}: lora_alpha is {alpha!r}, not a number")
