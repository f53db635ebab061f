"""LoRA adapters of peft on linear layers, merged into their base model or into the model that contains them."""

import math
import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .checkpoint import Checkpoint, FileCheckpoint
from .deepspeed_zero import MASTERS
from .errors import CheckpointError
from .files import is_number
from .names import find_ends, is_tied, strip_wrapper_prefixes
from .overlay import CompositeCheckpoint, origin_of_base
from .sources import ADAPTER
from .tensors import CHUNK, ComputedTensor, StoredTensor, cast, load_float32, read_bytes, spans, to_bytes, torch_name


MERGE_WITH_PEFT = "merge it with peft (model.merge_and_unload())"

LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])(?:\.(?!bias)[^.]+)??(?:\.weight)?")

# Options of adapter_config.json that change more than two matrices of a linear layer and their scale.
UNSUPPORTED_OPTIONS = (
    "use_dora", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters", "use_qalora",
    "alora_invocation_tokens", "arrow_config", "use_bdlora", "fan_in_fan_out", "alpha_pattern",
)  # fmt: skip

# Initialisations that change the base.
UNSUPPORTED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Components that InternVL wraps -> the field of config.json with the rank. Its lora_alpha is twice the rank
# (wrap_llm_lora and wrap_backbone_lora of its modeling_internvl_chat.py); sailvit.train writes it to the field below.
RANK_FIELDS = {"language_model": "use_llm_lora", "vision_model": "use_backbone_lora"}
ALPHA_FIELDS = {"language_model": "llm_lora_alpha", "vision_model": "backbone_lora_alpha"}


class AdaptedModel(CompositeCheckpoint):
    """A model with LoRA merged into it."""

    adapter: Checkpoint  # with the matrices
    hint: str  # how to fix an adapter that does not fit
    # Tensor -> role ("lora_A", "lora_B", "base_layer", "whole" for a replacement) -> name in `adapter`.
    changes: dict[str, dict[str, str]]

    def __getitem__(self, name: str) -> StoredTensor:
        change, tensor = self.changes.get(name, {}), self.original(name)
        matrices = {role: self.adapter[change[role]] for role in ("lora_A", "lora_B", "whole") if role in change}
        shape, replacement = list(tensor.shape), matrices.pop("whole", None)
        if replacement and replacement.shape != tensor.shape:
            raise self.error(f"{name}: expected {shape} as in the base, got {list(replacement.shape)}: {self.hint}")
        if replacement or not matrices:
            return replacement or tensor
        if len(matrices) == 1:
            only = change[min(matrices)]
            raise self.error(f"{name}: the adapter has only one of its two matrices, {only}: {self.hint}")
        a, b = matrices.values()
        if not (len(a.shape) == len(b.shape) == len(shape) == 2):
            raise self.error(f"{name}: LoRA on {shape}, which is no linear layer: {MERGE_WITH_PEFT}")
        rank = a.shape[0]
        if not rank or b.shape[1] != rank or (b.shape[0], a.shape[1]) != tensor.shape:
            raise self.error(f"{name}: {shape} is not what {list(b.shape)} by {list(a.shape)} makes: {self.hint}")
        return _merge(tensor, a, b, self.scale(change["lora_A"], rank))

    def default_dtype(self, names: Collection[str] = ()) -> str:
        """The precision of the adapted tensors before merging."""
        return torch_name(self.original(min(self.changes, key=lambda name: "lora_A" not in self.changes[name])).dtype)

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.adapter.source.name}: {what}")

    def parse(self, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Name in the adapter -> the tensor that it changes, without peft's segments, and its role."""
        # peft keeps modules of `modules_to_save` as they were before the training in original_module
        return {name: self._parse(name) for name in names if "original_module" not in name.split(".")}

    def _parse(self, name: str) -> tuple[str, str]:
        short = re.sub(r"(^|\.)base_model\.model\.", r"\1", strip_wrapper_prefixes(name), count=1)
        short = re.sub(r"\.modules_to_save\.[^.]+", "", short)
        if match := LORA_NAME.fullmatch(short):
            return match["module"] + ".weight", "lora_" + match["matrix"]
        if "lora_" in short:
            kind = "LoRA on embeddings" if "lora_embedding_" in short else "it"
            raise self.error(f"{name}: {kind} is not supported: {MERGE_WITH_PEFT}")
        return short.replace(".base_layer.", "."), "base_layer" if ".base_layer." in short else "whole"

    def group(self, targets: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, str]]:
        """Return `changes`; raise a CheckpointError if two of the adapter's tensors have one role."""
        changes: dict[str, dict[str, str]] = {}
        for name, (target, role) in targets.items():
            if (other := changes.setdefault(target, {}).setdefault(role, name)) != name:
                raise self.error(f"{name} and {other} change the same tensor: keep one adapter, or {MERGE_WITH_PEFT}")
        return changes

    @abstractmethod
    def original(self, name: str) -> StoredTensor:
        """A tensor before merging."""

    @abstractmethod
    def scale(self, name: str, rank: int) -> float:
        """The factor of lora_B @ lora_A, for the name of lora_A."""


class MergedLoRA(AdaptedModel):
    """A base model with an adapter of peft merged into it: LoRA on linear layers, and `modules_to_save`."""

    def __init__(self, adapter: FileCheckpoint, base: Checkpoint):
        super().__init__({"": adapter, "base/": base})
        self.adapter, self.base, self.config = adapter, base, adapter.document(ADAPTER)
        self.hint = f"is {base.source.name} the base?"
        if problem := next(_config_problems(self.config), None):
            raise self.error(problem)
        ends = find_ends(base.weight_map)
        tied = {ends.embeddings, ends.head} if ends and is_tied(base.document("config.json")) else set()
        self._base_names = {strip_wrapper_prefixes(name): name for name in [*base.weight_map, *tied]}
        trained = adapter.engine_files.metadata.get(MASTERS, adapter.weight_map)  # without frozen tensors of the base
        targets = self.parse(name for name in adapter.weight_map if name in trained)
        self.prefix = self._find_prefix([target for target, _ in targets.values()])
        for name, (target, role) in targets.items():
            base_name = self._base_name(target, self.prefix)
            if base_name in tied:
                raise self.error(f"{name} changes embeddings or head, which {base.source.name} ties: {MERGE_WITH_PEFT}")
            if base_name is None:
                raise self.error(f"{name} belongs to {target}, which {base.source.name} does not have: is it the base?")
            targets[name] = base_name, role
        self.changes = self.group(targets)
        if not self.changes:
            raise self.error("there is nothing in it to merge: copy it again")
        merged = "merged/" + adapter.entry
        self.weight_map = {
            name: merged if name in self.changes else "base/" + file for name, file in base.weight_map.items()
        }

    def _find_prefix(self, targets: Collection[str]) -> str:
        """What precedes the adapter's names in the base: the component, if peft wrapped only one."""
        missing = next((target for target in targets if self._base_name(target, "") is None), None)
        if missing is None:
            return ""
        prefixes = {name.removesuffix(missing) for name in self._base_names if name.endswith("." + missing)}
        fitting = sorted(prefix for prefix in prefixes if all(self._base_name(each, prefix) for each in targets))
        if len(fitting) > 1:
            raise self.error(f"its names are those of several parts ({', '.join(fitting)}): {MERGE_WITH_PEFT}")
        return fitting[0] if fitting else ""

    def _base_name(self, target: str, prefix: str) -> str | None:
        candidates = (prefix + target,) if prefix else (target, "model." + target, target.removeprefix("model."))
        return next((self._base_names[name] for name in candidates if name in self._base_names), None)

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
        self.changes = self.group(self.parse(checkpoint.weight_map))
        self.weight_map = dict.fromkeys(self.changes, "merged/" + checkpoint.entry)

    def document(self, file: str) -> dict[str, Any]:
        """config.json without alphas, and with the ranks set to 0."""
        content = super().document(file)
        ranks = {key: 0 for key in RANK_FIELDS.values() if content.get(key)} if file == "config.json" else {}
        return {key: value for key, value in {**content, **ranks}.items() if key not in ALPHA_FIELDS.values()}

    def original(self, name: str) -> StoredTensor:
        change = self.changes[name]
        if not {"base_layer", "whole"} & change.keys():
            raise self.error(f"{name}: its base_layer is missing: {self.hint}")
        return self.adapter[change.get("base_layer") or change["whole"]]

    def scale(self, name: str, rank: int) -> float:
        part = next((part for part in RANK_FIELDS if part in name.split(".")), None)
        config, field = self.adapter.document("config.json"), RANK_FIELDS.get(part)
        if config.get(field) == rank:
            return config.get(ALPHA_FIELDS[part], 2 * rank) / rank
        known = f"{field} in config.json is {config.get(field)!r}" if field else "no component of InternVL"
        raise self.error(f"{name}: LoRA of rank {rank}, but {known}, so its scale is unknown: {MERGE_WITH_PEFT}")

    @property
    def training_metadata(self) -> dict[str, Any]:
        changes = sorted((name, change["lora_A"]) for name, change in self.changes.items() if "lora_A" in change)
        ranks = {name.partition(".")[0]: self.adapter[matrix].shape[0] for name, matrix in changes}
        config = self.adapter.document("config.json")
        merged = {name: {"r": r, "lora_alpha": config.get(ALPHA_FIELDS.get(name), 2 * r)} for name, r in ranks.items()}
        return self.adapter.training_metadata | {"merged": merged}


def is_wrapped(names: Collection[str]) -> bool:
    """Whether names are those of a model wrapped by peft: LoRA and the layers below it."""
    marks = (r"\.lora_(?:embedding_)?A(?:\.|$)", r"\.base_layer\.")
    return all(any(re.search(mark, name) for name in names) for mark in marks)


def unwrap(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with the LoRA inside it merged, if there is any."""
    return Unwrapped(checkpoint) if is_wrapped(checkpoint.weight_map) else checkpoint


def _merge(base: StoredTensor, a: StoredTensor, b: StoredTensor, scale: float) -> ComputedTensor:
    """The weight of a linear layer with its LoRA merged, base + scale * lora_B @ lora_A, in float32."""

    def load(stored: StoredTensor) -> Any:
        values = load_float32(stored)
        if not values.isfinite().all():
            raise CheckpointError(f"{stored.file}: the adapter holds NaN or infinity: it is broken")
        return values

    def read(start: int, stop: int) -> Iterator[np.ndarray]:
        import torch

        delta = (load(b) @ load(a) * scale).reshape(-1)  # as peft computes it
        for first, last in spans(start, stop, CHUNK // 4):
            data = cast(read_bytes(base, first, last), base.dtype, "F32")
            yield to_bytes(torch.from_numpy(data).view(torch.float32) + delta[first:last])

    return ComputedTensor(base.file, "F32", base.shape, read=read, parents=(base, a, b))


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Why an adapter is not supported."""
    if (kind := config.get("peft_type")) != "LORA":
        yield f"an adapter of kind {kind!r}: {MERGE_WITH_PEFT}"
    yield from (f"an adapter with {option}: {MERGE_WITH_PEFT}" for option in UNSUPPORTED_OPTIONS if config.get(option))
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(UNSUPPORTED_INITS):
        fix = "save it with path_initial_model_for_weight_conversion"
        yield f"an adapter with init_lora_weights {init}, which changes the base: {fix}"
    alpha = config.get("lora_alpha")
    if not is_number(alpha):
        yield f"{ADAPTER}: lora_alpha is {alpha!r}, not a number"
