# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
A recipe: everything that a stage of training is set by, validated. The recipes of the paper are in recipes/.

    extends: stage3             # a recipe of this package, or the path of a file; the fields below replace its own
    trainable: [vision, connector]
    learning_rate: {vision: 1e-5, connector: 2e-5}
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from .foreign_settings import FOREIGN_SETTINGS
from .settings import Loader, Strict, dump_yaml, first_error, parse_yaml, read_mapping, suggest


FOLDER = Path(__file__).parent / "recipes"

Component = Literal["vision", "connector", "language"]
Engine = Literal["single", "ddp", "zero2", "zero3", "fsdp2"]
ENGINES: tuple[str, ...] = get_args(Engine)


def _split(value: Any) -> Any:
    """Return "vision,connector" as a list: brackets have a meaning in shells."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _sort_components(components: list[Component]) -> list[Component]:
    twice = {component for component in components if components.count(component) > 1}
    if twice:
        raise ValueError(f"{min(twice)} is given twice")
    return sorted(components, key=get_args(Component).index)


Components = Annotated[
    list[Component], Field(min_length=1), BeforeValidator(_split), AfterValidator(_sort_components)
]  # fmt: skip
Names = Annotated[list[str], BeforeValidator(_split)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
LearningRate = Annotated[
    Annotated[Positive, Tag("number")] | Annotated[dict[Component, Positive], Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, Mapping) else "number"),  # one error, not two
]


class LoRA(Strict):
    """
    A LoRA adapter of one component, with the names and defaults of peft's LoraConfig.

    Attributes:
        r: Rank.
        alpha: The update is scaled by alpha / r.
        dropout: Probability of dropout before the adapter.
    """

    model_config = ConfigDict(strict=True)

    r: Count = 8
    alpha: Count = 8
    dropout: Fraction = 0.0


class Recipe(Strict):
    """
    The settings of a stage of training. Defaults that the paper does not give are those of `SOURCES`.

    Attributes:
        name: Name in records; default: that of the file.
        description: One line for `sailvit train --list`.
        model: Folder or name on the Hub of the SAIL-VL to train; with next_patch of a SAILViT.
        data: corpus.yaml.
        output: Folder of the run, and of the trained model.
        objective: "next_token" trains a SAIL-VL on the answers of conversations, "next_patch" pretrains a SAILViT on
            pixels as AIM does: samples are the pictures of conversations, tokens are patches.
        head_blocks: With next_patch, the MLPs of the prediction head.
        trainable: The components that are trained.
        learning_rate: Peak learning rate, of all trained components or by component.
        samples_per_step: Samples of an optimizer step, all ranks together: the global batch.
        epochs: Passes over the corpus; may be a fraction.
        max_steps: The most steps; the learning rate ends there.
        max_tokens_per_pack, max_tiles_per_pack: The most tokens (visual tokens included) and tiles of a pack.
        packing: False for one sample per pack.
        too_long: What to do with a sample longer than a pack.
        loss_reduction: Mean of the loss over the answer tokens of a step ("token"), over its samples ("sample"), or
            over samples weighted by the square root of their answer tokens ("square").
        precision: Of forward and backward; "auto": bfloat16 where the device computes it natively, else float32.
            Weights and optimizer are float32.
        engine: "auto": "single" for one process, else "zero3". "ddp" is faster where model, gradients and optimizer fit
            on every GPU, as in stage 1.
        weight_decay, adam_beta1, adam_beta2, adam_epsilon: Of AdamW.
        max_grad_norm: Gradients with a larger norm are scaled down to it; 0 for no clipping.
        warmup_ratio: Part of the steps in which the learning rate rises.
        lr_scheduler_type: How it falls afterwards, in the terms of transformers.
        min_learning_rate_ratio: Where the cosine ends, as a part of the peak.
        gradient_checkpointing: Recompute activations in the backward pass, of all or of one component.
        lora: Component -> an adapter that is trained in place of its weights.
        train_added_tokens: Train the embeddings of the special tokens that SAIL-VL adds, though `language` is frozen,
            at its learning rate.
        attn_implementation: As in `from_pretrained`, or sdpa_per_sample; default: what transformers chooses, and on a
            CPU sdpa_per_sample in place of sdpa.
        save_steps, save_total_limit: Steps between checkpoints; how many are kept.
        logging_steps, report_to: Steps between reports; integrations of transformers that they go to.
        peak_tflops: What mfu and hfu are a share of: the most TFLOP/s of a device in `precision`; default: of a known
            card in bfloat16 that of its data sheet, else there is no mfu.
        workers: Processes of each rank that read and decode samples.
        seed: Of the order of samples and of dropout.
        max_hours: Save and exit after this time, so that a scheduler can requeue the run.
        timeout_minutes: How long a rank waits for the others before it ends.
        kinds: Kind -> the share of the samples that it must have in the corpus (`kinds` of corpus.yaml).
        language_parameters: The fewest and the most parameters that the language model may have.
    """

    model_config = ConfigDict(strict=True)

    name: str | None = None
    description: str = ""
    model: str | None = None
    data: str | None = None
    output: str | None = None
    objective: Literal["next_token", "next_patch"] = "next_token"
    head_blocks: int = Field(12, ge=0)
    trainable: Components
    learning_rate: LearningRate
    samples_per_step: Count
    epochs: Positive = 1.0
    max_steps: Count | None = None
    max_tokens_per_pack: Count = 8192
    max_tiles_per_pack: Count | None = None
    packing: bool = True
    too_long: Literal["drop", "truncate", "fail"] = "drop"
    loss_reduction: Literal["token", "sample", "square"] = "token"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    engine: Literal["auto", Engine] = "auto"
    weight_decay: float = Field(0.01, ge=0)
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Positive = 1e-8
    max_grad_norm: float = Field(1.0, ge=0)
    warmup_ratio: Fraction = 0.03
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    min_learning_rate_ratio: Fraction = 0.0
    gradient_checkpointing: Literal[True, False, "vision", "language"] = True
    lora: dict[Literal["vision", "language"], LoRA] = {}
    train_added_tokens: bool = False
    attn_implementation: str | None = None
    save_steps: Count = 500
    save_total_limit: Count = 3
    logging_steps: Count = 1
    report_to: Names = ["tensorboard"]
    peak_tflops: Positive | None = None
    workers: int = Field(4, ge=0)
    seed: int = Field(0, ge=0, lt=1 << 32)
    max_hours: Positive | None = None
    timeout_minutes: Positive = 30
    kinds: dict[str, Annotated[float, Field(gt=0, lt=1)]] | None = None
    language_parameters: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.objective == "next_patch":
            self._check_next_patch()
        if isinstance(self.learning_rate, dict):
            self._check_rates(self.learning_rate)
        frozen = [component for component in self.lora if component not in self.trainable]
        if frozen:
            raise ValueError(f"lora.{frozen[0]}: {frozen[0]} is not trained: add it to trainable")
        if self.train_added_tokens and "language" in self.lora:
            raise ValueError("train_added_tokens: LoRA keeps the embeddings frozen: train them in a stage before it")
        if self.min_learning_rate_ratio and self.lr_scheduler_type != "cosine":
            raise ValueError(f"min_learning_rate_ratio: expected 0 with lr_scheduler_type {self.lr_scheduler_type}")
        if sum((self.kinds or {}).values()) > 1 + 1e-9:
            raise ValueError(f"kinds: expected shares of at most 1 together, got {sum(self.kinds.values()):g}")
        return self

    def _check_next_patch(self) -> None:
        """Raise an error for what only a SAIL-VL has."""
        if self.trainable != ["vision"]:
            raise ValueError(f"trainable: expected [vision] with objective next_patch, got {self.trainable}")
        if self.gradient_checkpointing == "language":
            raise ValueError("gradient_checkpointing: expected true, false or vision with objective next_patch")
        for name in ("lora", "train_added_tokens", "attn_implementation", "language_parameters"):
            if getattr(self, name):
                raise ValueError(f"{name}: not supported with objective next_patch: remove it")

    def _check_rates(self, rates: Mapping[Component, float]) -> None:
        """Raise an error if a component that is trained has no rate, or another has one."""
        trained = {*self.trainable} | ({"language"} if self.train_added_tokens else set())
        for component in get_args(Component):
            if component in trained and component not in rates:
                raise ValueError(f"learning_rate.{component}: missing, but {component} is trained")
            if component in rates and component not in trained:
                raise ValueError(f"learning_rate.{component}: {component} is not trained: add it to trainable")


# Field -> where its default comes from. InternVL2.5: internvl_chat/shell/internvl2.5 of OpenGVLab/InternVL; LLaVA-1.5:
# scripts/v1_5 of haotian-liu/LLaVA.
SOURCES = {
    "head_blocks": "AIM, section 3.2",
    "epochs": "paper, section 3",
    "max_tokens_per_pack": "LLaVA-OneVision-1.5",
    "loss_reduction": "transformers.Trainer; InternVL2.5: square; the paper names none",
    "precision": "paper, section 3: bf16",
    "engine": "paper, section 3: ZeRO-3",
    "weight_decay": "InternVL2.5, stages 1 and 2 (1B, 2B)",
    "adam_beta1": "InternVL2.5, zero_stage1_config.json",
    "adam_beta2": "InternVL2.5, zero_stage1_config.json; LLaVA-OneVision-1.5: 0.95",
    "adam_epsilon": "InternVL2.5, zero_stage1_config.json; LLaVA-OneVision-1.5: 1e-5",
    "max_grad_norm": "transformers.TrainingArguments, as in InternVL2.5 and LLaVA-1.5",
    "warmup_ratio": "InternVL2.5, stage 2; LLaVA-1.5",
    "lr_scheduler_type": "InternVL2.5; LLaVA-1.5",
    "min_learning_rate_ratio": "InternVL2.5 and LLaVA-1.5; LLaVA-OneVision-1.5: 0.1",
    "gradient_checkpointing": "paper, section 3",
    "lora": "paper, section 3: all weights of the trained components",
    "train_added_tokens": "paper, section 3: a frozen language model stays as it is",
    "save_steps": "transformers.TrainingArguments",
    "save_total_limit": "InternVL2.5",
    "timeout_minutes": "transformers: ddp_timeout",
    "workers": "LLaVA-1.5",
}

TEXT_FIELDS = {name for name, field in Recipe.model_fields.items() if field.annotation in (str, str | None)}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """
    Return a recipe.

    Args:
        name_or_path: A recipe of this package, such as "stage1", or the path of a YAML file.
        overrides: `key=value` in YAML, also of one entry: "max_steps=10", "trainable=vision,connector",
            "learning_rate.vision=1e-5", "lora.language.r=16". A later one replaces an earlier one.

    Raises:
        ValueError: There is no such recipe, or a field is missing, unknown or out of range; one line.
        OSError: A file cannot be read.
    """
    return _resolve(name_or_path, overrides)[0]


def list_recipes() -> dict[str, str]:
    """Return the recipes of this package: name -> description."""
    return {name: load_recipe(name).description for name in _names()}


def describe_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> str:
    """Return a recipe as YAML with all of its fields, and the source of each as a comment; see `load_recipe`."""
    recipe, sources = _resolve(name_or_path, overrides)
    lines = []
    for name, value in recipe.model_dump().items():
        default = f"default: {SOURCES[name]}" if name in SOURCES else "default"
        lines.append(f"{name}: {dump_yaml(value)}  # {sources.get(name, default)}")
    return "\n".join(lines)


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """
    Return the path and the value of "learning_rate.vision=1e-5": ("learning_rate", "vision") and 0.00001.

    The value is YAML; that of a text field, such as a path, is taken as it is, but for "null".

    Raises:
        ValueError: There is no key or no "=", or the value is no YAML.
    """
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path) or key.startswith("-"):
        raise ValueError(f"expected key=value, such as max_steps=100, got {text!r:.80}")
    if key in TEXT_FIELDS:
        return path, None if value == "null" else value
    try:
        return path, parse_yaml(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _resolve(name_or_path: str, overrides: Sequence[str]) -> tuple[Recipe, dict[str, str]]:
    """Return a recipe, and field -> source of the fields that are not defaults."""
    path = _find(name_or_path, Path())
    fields, sources = _read_with_parents(path, ())
    fields.setdefault("name", path.stem)
    parsed = [parse_override(text) for text in overrides]
    for (name, *rest), value in sorted(parsed, key=lambda one: one[0] != ("trainable",)):  # rates depend on it
        fields[name] = _replaced(_expanded(name, fields) if rest else None, rest, value, name)
        sources[name] = f"command line, over {sources[name]}" if rest and name in sources else "command line"
    location = f"recipe {name_or_path}"
    _check_names(fields, location)
    try:
        return Recipe.model_validate(fields), {"name": "file", **sources}
    except ValidationError as error:
        adapters = {("lora", component): LoRA.model_fields for component in get_args(Component)}
        raise ValueError(f"{location}: {first_error(error, fields, {(): Recipe.model_fields, **adapters})}") from error


def _names() -> list[str]:
    """Return the names of the recipes of this package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _find(name_or_path: str, folder: Path) -> Path:
    """Return the file of a recipe: of a name of this package, or of a path, which has a folder or ends in .yaml."""
    if Path(name_or_path).suffix in (".yaml", ".yml") or len(Path(name_or_path).parts) > 1:
        return folder / name_or_path
    if name_or_path not in _names():
        raise ValueError(f"{name_or_path}: no such recipe; {suggest(name_or_path, _names())}; a path ends in .yaml")
    return FOLDER / f"{name_or_path}.yaml"


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return fields and sources of a file over those of the recipe that it extends."""
    if path.resolve() in children:
        raise ValueError(f"{path}: extends itself")
    fields, sources = _read_fields(path)
    if "extends" not in fields:
        return fields, sources
    parent = fields.pop("extends")
    del sources["extends"]
    if not isinstance(parent, str):
        raise ValueError(f"{path}: extends: expected a recipe, such as stage3, got {parent!r:.80}")
    above, above_sources = _read_with_parents(_find(parent, path.parent), (*children, path.resolve()))
    return above | fields, above_sources | sources


def _read_fields(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the fields of a file, and of each its source: the file, and the comment next to it."""
    fields, text = read_mapping(path, "trainable, learning_rate, ...")
    sources: dict[str, str] = {}
    for key, value in yaml.compose(text, Loader).value:
        is_one_line = value.start_mark.line == value.end_mark.line == key.start_mark.line
        end = value.end_mark.column if is_one_line else key.end_mark.column
        comment = text.splitlines()[key.start_mark.line][end:].partition("#")[2].strip()
        sources[key.value] = f"{path.stem}: {comment}" if comment else path.stem
    return fields, sources


def _expanded(name: str, fields: Mapping[str, Any]) -> Any:
    """Return a field; one learning rate of all components as a rate of each, one of which an override replaces."""
    value = fields.get(name)
    if name == "learning_rate" and value is not None and not isinstance(value, Mapping):
        components = _split(fields.get("trainable"))
        return {part: value for part in components if isinstance(part, str)} if isinstance(components, list) else None
    return value


def _replaced(value: Any, path: Sequence[str], new: Any, name: str) -> Any:
    """Return a value whose entry at a path is replaced."""
    if not path:
        return new
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name}.{path[0]}: {name} is {value!r:.80}, which has no entries")
    return {**(value or {}), path[0]: _replaced((value or {}).get(path[0]), path[1:], new, f"{name}.{path[0]}")}


def _check_names(fields: Mapping[str, Any], location: str) -> None:
    """Raise an error for the first unknown field, which names the nearest one or that of another framework here."""
    for name in fields:
        if name not in Recipe.model_fields:
            hint = FOREIGN_SETTINGS.get(str(name).lower().replace("-", "_"))
            raise ValueError(f"{location}: {name}: unknown field; {hint or suggest(str(name), Recipe.model_fields)}")
