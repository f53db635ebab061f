# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Plan of a training run, from shapes alone: parameters, FLOPs, memory of a rank, steps, hours. Nothing is loaded.

    plan = make_plan(config, recipe, samples=36_500_000, ranks=64, card="h100")
    print(plan.describe())
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from ..configuration_sailvl import SAILVLConfig
from ..modeling_sailvl import SAILVLForConditionalGeneration
from .attention import PER_SAMPLE
from .components import ADDED_TOKENS, checkpointed_components, component_sizes, set_trainable
from .flops import COMPONENTS, Flops, meta_model, sample_flops
from .memory import SHARDING, Memory, PackShape, memory_of_engines, memory_of_states


GIB = 2**30
# The model FLOPs utilisation that hours are stated at unless a measured one is given: 0.40 is the goal on an H200 of
# a plain recipe, 45% HFU the best public figure of a multimodal model (LLaVA-OneVision-1.5, arXiv 2509.23661).
DEFAULT_MFU = 0.35
# Samples that the statistics of a corpus are taken from.
MOST_MEASURED_SAMPLES = 1_000_000
MOST_RANKS = 2**16


@dataclass(frozen=True)
class Card:
    """
    An accelerator.

    Attributes:
        bfloat16_flops: Dense peak of bfloat16 products with float32 accumulation, FLOPs per second.
        memory: Bytes.
    """

    bfloat16_flops: float
    memory: float


# Vendors' data sheets; those that state figures "with sparsity" are halved.
CARDS = {
    "a100": Card(312e12, 80e9),  # NVIDIA A100 80GB data sheet: 312 TFLOPS
    "h100": Card(989e12, 80e9),  # NVIDIA H100 SXM data sheet: 1,979 with sparsity
    "h200": Card(989e12, 141e9),  # NVIDIA H200 SXM data sheet: 1,979 with sparsity
    "b200": Card(2250e12, 180e9),  # NVIDIA HGX B200 data sheet: 36 PFLOPS of 8 with sparsity, 1.44 TB
    "l40s": Card(362e12, 48e9),  # NVIDIA L40S data sheet: 362.05, 733 with sparsity
    "mi300x": Card(1307e12, 192e9),  # AMD Instinct MI300X data sheet: 1,307.4
}


# In the names of devices that are slower than the card of CARDS with the same name.
SLOWER_CARDS = {"pcie", "nvl", "mig"}


def card_of(device_name: str) -> str | None:
    """Return the key of CARDS of a device as torch names it, such as "NVIDIA H100 80GB HBM3"; None if it has none."""
    words = {*re.split("[^a-z0-9]+", device_name.lower())}
    return None if words & SLOWER_CARDS else next((card for card in CARDS if card in words), None)


@dataclass(frozen=True)
class PaperStage:
    """Samples and reported cost of a stage in the paper (arXiv 2507.01643)."""

    samples: int
    npu_hours: int


PAPER_STAGES = {
    "stage1": PaperStage(8_000_000, 1664),
    "stage2": PaperStage(6_700_000, 2200),
    "stage3": PaperStage(36_500_000, 10304),
}


@dataclass(frozen=True)
class SampleShape:
    """
    The mean sample of a corpus.

    Attributes:
        tokens: Visual tokens included.
        squared_tokens: Mean of the squares of tokens, which attention depends on.
        longest: Tokens of the longest sample.
    """

    tokens: float
    tiles: float
    answers: float
    squared_tokens: float
    longest: int

    @classmethod
    def of_corpus(cls, corpus: Any) -> "SampleShape":
        """Measure a Corpus: its `tokens`, `tiles` and `answers`; evenly spaced samples of a large one."""
        every = slice(None, None, max(1, math.ceil(len(corpus) / MOST_MEASURED_SAMPLES)))
        tokens, tiles, answers = (
            np.asarray(lengths[every], np.float64) for lengths in (corpus.tokens, corpus.tiles, corpus.answers)
        )
        means = (lengths.mean() for lengths in (tokens, tiles, answers, tokens**2))
        return cls(*map(float, means), longest=int(np.max(corpus.tokens)))

    @classmethod
    def assumed(cls, config: SAILVLConfig, tiles: float = 4.5, text: int = 240, answers: int = 200) -> "SampleShape":
        """
        Return a mean sample for a plan without a corpus: the mix that benchmarks/packing.py simulates.

        10% of it is text only, the rest has 1 to 9 tiles; answers are log-normal, hence the 1.31 (mean of squares /
        square of the mean). The paper publishes no such figures.
        """
        tokens = tiles * config.image_seq_length + text
        return cls(tokens, tiles, answers, 1.31 * tokens**2, round(9 * config.image_seq_length + 4 * text))


class Settings(Protocol):
    """What a plan depends on, under the names of a recipe."""

    trainable: Any
    samples_per_step: int
    epochs: float
    max_steps: int | None
    max_tokens_per_pack: int
    max_tiles_per_pack: int | None
    packing: bool
    precision: str
    engine: str
    gradient_checkpointing: bool | str
    attn_implementation: str | None
    lora: Any
    train_added_tokens: bool
    seed: int


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a plan without a recipe; the defaults are those of the paper's last stage."""

    trainable: tuple[str, ...] = tuple(COMPONENTS)
    samples_per_step: int = 512
    epochs: float = 1
    max_steps: int | None = None
    max_tokens_per_pack: int = 8192
    max_tiles_per_pack: int | None = None
    packing: bool = True
    precision: str = "auto"
    engine: str = "auto"
    gradient_checkpointing: bool | str = True
    attn_implementation: str | None = None
    lora: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    train_added_tokens: bool = False
    seed: int = 0

    @classmethod
    def of(cls, settings: Settings) -> "TrainingSettings":
        values = {name: getattr(settings, name) for name in cls.__dataclass_fields__}
        lora = {name: dict(options) for name, options in values["lora"].items()}
        return cls(**values | {"trainable": tuple(values["trainable"]), "lora": lora})

    @property
    def checkpointed(self) -> tuple[str, ...]:
        """Components under gradient checkpointing."""
        return checkpointed_components(self)

    def resolve(self, ranks: int) -> "TrainingSettings":
        """Return the settings without "auto": bfloat16; a single process, or ZeRO-3 on several ranks."""
        engine = ("single" if ranks == 1 else "zero3") if self.engine == "auto" else self.engine
        return replace(self, engine=engine, precision=self.precision.replace("auto", "bfloat16"))

    def pack(self, sample: SampleShape, visual_tokens: int) -> PackShape:
        """
        Return the costliest pack: full, of visual tokens as far as `max_tiles_per_pack` allows; the answers are those
        of mean samples that fill it.
        """
        tokens = self.max_tokens_per_pack if self.packing else min(sample.longest, self.max_tokens_per_pack)
        tiles = tokens // visual_tokens
        if self.max_tiles_per_pack is not None:
            tiles = min(tiles, self.max_tiles_per_pack)
        return PackShape(tokens, tiles if sample.tiles else 0, max(1, round(tokens * sample.answers / sample.tokens)))


# The plan


@dataclass(frozen=True)
class Plan:
    """
    What a run needs.

    Attributes:
        parameters: Component -> all, trained.
        memory: Engine -> memory of a rank.
        samples: Of an epoch; None if unknown.
        mfu: Model FLOPs utilisation that `hours` assumes.
        paper: The stage of the paper that the recipe repeats.
        is_assumed: The sample is an assumption, not a corpus.
    """

    settings: TrainingSettings
    parameters: dict[str, tuple[int, int]]
    sample: SampleShape
    pack: PackShape
    flops: Flops
    memory: dict[str, Memory]
    samples: int | None
    ranks: int
    card: str | None
    mfu: float
    paper: PaperStage | None
    is_assumed: bool
    model: SAILVLForConditionalGeneration = field(repr=False)

    @property
    def steps(self) -> int | None:
        """Optimizer steps."""
        if self.settings.max_steps is not None or self.samples is None:
            return self.settings.max_steps
        return math.ceil(math.ceil(self.samples * self.settings.epochs) / self.settings.samples_per_step)

    @property
    def packs_per_rank(self) -> int:
        """Packs of a rank in a step, if all packs were full."""
        samples = self.settings.samples_per_step / self.ranks
        return math.ceil(samples * self.sample.tokens / self.pack.tokens if self.settings.packing else samples)

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation at `mfu`: the recomputation counts, too."""
        return self.mfu * self.flops.hardware / self.flops.model

    @property
    def stage_flops(self) -> Flops | None:
        """FLOPs of all steps."""
        return None if self.steps is None else self.flops * self._samples_seen

    @property
    def hours(self) -> float | None:
        """Hours of all steps on `ranks` cards."""
        if self.steps is None or self.card is None:
            return None
        return self.stage_flops.model / (self.mfu * CARDS[self.card].bfloat16_flops * self.ranks) / 3600

    @property
    def step_seconds(self) -> float | None:
        """Seconds of an optimizer step."""
        return None if self.hours is None else 3600 * self.hours / self.steps

    @property
    def received_per_step(self) -> float:
        """
        Bytes that a rank receives in a step, in rings: weights gathered before forward and backward of every pack
        (ZeRO-3, FSDP2) or after the optimizer (ZeRO-2), gradients reduced after every pack; DDP reduces them once.
        """
        sizes = [(weight.numel(), weight.requires_grad) for weight in self.model.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
        width = 4 if self.settings.precision == "float32" or self.settings.engine == "ddp" else 2
        whole = {"single": 0, "ddp": trained, "zero2": trained}
        gathered = whole.get(self.settings.engine, 2 * self.packs_per_rank * total)
        reduced = {"single": 0, "ddp": trained}.get(self.settings.engine, self.packs_per_rank * trained)
        return width * (gathered + reduced) * (1 - 1 / self.ranks)

    def on_ranks(self, ranks: int, engine: str | None = None) -> "Plan":
        """Return the plan for another number of ranks, and another engine; activations stay as they are."""
        settings = replace(self.settings, engine=engine or self.settings.engine)
        states = {name: memory_of_states(self.model, name, ranks, settings.precision) for name in self.memory}
        memory = {name: replace(memory, **states[name]) for name, memory in self.memory.items()}
        return replace(self, ranks=ranks, settings=settings, memory=memory)

    @property
    def _samples_seen(self) -> int:
        if self.settings.max_steps is not None or self.samples is None:
            return self.settings.max_steps * self.settings.samples_per_step
        return math.ceil(self.samples * self.settings.epochs)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as numbers and strings, for JSON."""
        flops = {"sample": asdict(self.flops), "stage": None if self.steps is None else asdict(self.stage_flops)}
        return {
            "parameters": {name: {"all": total, "trained": part} for name, (total, part) in self.parameters.items()},
            "settings": asdict(self.settings),
            "sample": asdict(self.sample) | {"assumed": self.is_assumed},
            "pack": asdict(self.pack) | {"per_rank_and_step": self.packs_per_rank},
            "flops": flops,
            "memory": {engine: memory.to_dict() for engine, memory in self.memory.items()},
            "samples": self.samples,
            "steps": self.steps,
            "ranks": self.ranks,
            "card": self.card,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "hours": self.hours,
            "paper": None if self.paper is None else asdict(self.paper),
        }

    def describe(self) -> str:
        """Return the plan as text, one line or more per topic."""
        lines = [*self._describe_work(), *self._describe_memory(), *self._describe_time()]
        return "\n".join(f"{topic:<12}{text}" for topic, text in lines)

    def _describe_work(self) -> Iterator[tuple[str, str]]:
        parts = (
            f"{name} {_count(total)}" + (f" ({_count(trained)} trained)" if trained else " (frozen)")
            for name, (total, trained) in self.parameters.items()
        )
        yield "parameters", ", ".join(parts)
        sample, origin = self.sample, "assumed, without a corpus" if self.is_assumed else "mean of the corpus"
        yield (
            "sample",
            f"{sample.tokens:,.0f} tokens, {sample.tiles:.1f} tiles, {sample.answers:,.0f} answer tokens ({origin})",
        )
        pack = self.pack
        yield (
            "pack",
            f"{pack.tokens:,} tokens, at most {pack.tiles} tiles, {pack.answers:,} answer tokens; "
            f"{self.packs_per_rank} per rank and step",
        )
        flops = self.flops
        yield (
            "TFLOP",
            "{} of a sample: forward {}, backward {}; recomputed {} on top".format(
                *(_decimal(v / 1e12, 2) for v in (flops.model, flops.forward, flops.backward, flops.recomputation))
            ),
        )

    def _describe_memory(self) -> Iterator[tuple[str, str]]:
        for engine, memory in self.memory.items():
            parts = ", ".join(f"{name} {_decimal(size / GIB)}" for name, size in asdict(memory).items())
            chosen = " (chosen)" if engine == self.settings.engine else ""
            yield "memory", f"{engine}{chosen} {_decimal(memory.total / GIB)} GiB of a rank: {parts}"
        if self.card is not None:
            yield "", f"a {self.card} has {CARDS[self.card].memory / GIB:,.1f} GiB"

    def _describe_time(self) -> Iterator[tuple[str, str]]:
        if self.steps is not None:
            yield "steps", f"{self.steps:,} of {self.settings.samples_per_step:,} samples"
        if self.hours is not None:
            yield (
                "hours",
                f"{_decimal(self.hours)} on {self.ranks} x {self.card} at {self.mfu:.0%} MFU ({self.hfu:.0%} HFU): "
                f"{self.hours * self.ranks:,.0f} card hours",
            )
        if self.paper is not None:
            yield "paper", f"{self.paper.npu_hours:,} NPU hours for {self.paper.samples:,} samples"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{_decimal(parameters / 1e6)}M"


def _decimal(number: float, digits: int = 1) -> str:
    """Return a number with so many decimals; a smaller one, of a toy, with one significant digit."""
    text = f"{number:,.{digits}f}"
    return text if float(text.replace(",", "")) else f"{number:.1g}"


def make_plan(
    config: SAILVLConfig,
    settings: Settings,
    *,
    corpus: Any = None,
    samples: int | None = None,
    sample: SampleShape | None = None,
    ranks: int = 1,
    card: str | None = None,
    mfu: float = DEFAULT_MFU,
    stage: str | None = None,
) -> Plan:
    """
    Return the plan of a run.

    Args:
        config: Of the model; no weights are read.
        settings: A recipe, or `TrainingSettings`.
        corpus: A Corpus, measured for the mean sample and their number.
        samples: Samples of an epoch, without a corpus.
        sample: The mean sample, without a corpus; default: `SampleShape.assumed(config)`.
        ranks: Accelerators.
        card: A key of CARDS, for hours.
        mfu: Model FLOPs utilisation, for hours.
        stage: Name of the recipe: the paper's hours are added to those of its stages.

    Raises:
        ValueError: A card, component, engine or precision is unknown, or a number is out of range.
    """
    _check_arguments(card, ranks, mfu, samples)
    settings = TrainingSettings.of(settings).resolve(ranks)
    model = trained_meta_model(config, settings)
    if corpus is not None:
        samples, measured = len(corpus), SampleShape.of_corpus(corpus)
    shape = measured if corpus is not None else sample or SampleShape.assumed(config)
    pack = settings.pack(shape, config.image_seq_length)
    flops = sample_flops(model, settings.checkpointed)
    return Plan(
        settings=settings,
        parameters=component_sizes(model),
        sample=shape,
        pack=pack,
        flops=flops.of(shape.tokens, shape.tiles, shape.answers, shape.squared_tokens),
        memory=_memory(model, settings, ranks, pack),
        samples=samples,
        ranks=ranks,
        card=card,
        mfu=mfu,
        paper=PAPER_STAGES.get(stage),
        is_assumed=corpus is None and sample is None,
        model=model,
    )


def trained_meta_model(config: SAILVLConfig, settings: TrainingSettings) -> SAILVLForConditionalGeneration:
    """Return a model on the meta device that trains what the settings say: LoRA and rows of added tokens, too."""
    model = meta_model(copy.deepcopy(config))  # LoRA writes to the config
    rows = range(len(ADDED_TOKENS)) if settings.train_added_tokens else ()  # which ones does not matter
    set_trainable(model, replace(settings, gradient_checkpointing=False), rows)
    return model


def index_bytes(samples: int) -> dict[str, int]:
    """
    Return the bytes of what a node keeps about the samples of an epoch, shared by its processes.

    `arrays`: lengths, rows, kinds and turns (Corpus.arrays), on disk, memory-mapped. `order`: the permutation of an
    epoch, on disk, memory-mapped. `sorting`: memory of the one process that computes a permutation, while it does.
    """
    order = 4 if samples <= 2**31 else 8
    return {"arrays": 28 * samples, "order": order * samples, "sorting": 16 * samples}


def _check_arguments(card: str | None, ranks: int, mfu: float, samples: int | None) -> None:
    if card is not None and card not in CARDS:
        raise ValueError(f"card: expected one of {', '.join(CARDS)}, got {card!r}")
    if ranks < 1:
        raise ValueError(f"ranks: expected at least 1, got {ranks}")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu: expected above 0, at most 1, got {mfu}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")


def _memory(
    model: SAILVLForConditionalGeneration,
    settings: TrainingSettings,
    ranks: int,
    pack: PackShape,
    engines: tuple[str, ...] | None = None,
) -> dict[str, Memory]:
    """Return engine -> memory of a rank; by default of the chosen engine, and on several ranks of all that shard."""
    attention = settings.attn_implementation or ""
    engines = engines or tuple(dict.fromkeys([settings.engine, *(SHARDING if ranks > 1 else ())]))
    return memory_of_engines(
        model,
        engines,
        ranks,
        pack,
        settings.precision,
        settings.checkpointed,
        is_masked=settings.packing and "flash" not in attention and attention != PER_SAMPLE,
    )


# Out of memory


def oom_hint(plan: Plan, available: float) -> str:
    """
    Return one line with settings that fit into `available` bytes, those that cost the least time first.

    Gradient checkpointing, then ZeRO-3 (on several ranks), then packs half as large, but not smaller than the longest
    sample. The estimate leaves no room for fragmentation: pass 0.9 of a card's memory.
    """
    memory, current = plan.memory[plan.settings.engine], plan.settings
    for settings in _smaller_settings(plan):
        current, pack = settings, settings.pack(plan.sample, plan.model.config.image_seq_length)
        memory = _memory(plan.model, settings, plan.ranks, pack, (settings.engine,))[settings.engine]
        if memory.total <= available:
            return f"{_changes(plan.settings, settings)} would fit: {_of(memory.total, available)}"
    needed = f"the smallest settings ({_changes(plan.settings, current)}) need {_of(memory.total, available)}"
    return f"{needed}: {_more_ranks(plan, memory, available)}"


def _of(size: float, available: float) -> str:
    return f"{size / GIB:.2f} of {available / GIB:.2f} GiB"


def _smaller_settings(plan: Plan) -> Iterator[TrainingSettings]:
    """Yield settings that need less memory than those of the plan; the last ones need the least."""
    current = plan.settings
    engines = dict.fromkeys([current.engine, *(["zero3"] if plan.ranks > 1 else [])])
    checkpointing = dict.fromkeys([current.gradient_checkpointing, True])
    tokens, smallest = current.max_tokens_per_pack, min(plan.sample.longest, current.max_tokens_per_pack)
    while tokens >= smallest:
        for engine in engines:
            for is_checkpointed in checkpointing:
                changes = {"engine": engine, "gradient_checkpointing": is_checkpointed, "max_tokens_per_pack": tokens}
                if (settings := replace(current, **changes)) != current:
                    yield settings
        tokens //= 2


def _changes(old: TrainingSettings, new: TrainingSettings) -> str:
    """Return the overrides of a recipe that lead from one to the other."""
    changed = {name: value for name, value in vars(new).items() if value != getattr(old, name)}
    text = (f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in changed.items())
    return " ".join(text) or "unchanged"


def _more_ranks(plan: Plan, memory: Memory, available: float) -> str:
    ranks = plan.ranks
    while (ranks := 2 * ranks) <= MOST_RANKS:
        states = sum(memory_of_states(plan.model, "zero3", ranks, plan.settings.precision).values())
        if states + memory.activations + memory.logits <= available:
            return f"engine=zero3 on {ranks} ranks would fit"
    return "train fewer components, a smaller model, or lower max_tiles of the corpus and max_tokens_per_pack"
