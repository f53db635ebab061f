"""Identify a checkpoint by its tensor names and config.json: a registry of architectures."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .models.aimv2 import plan_aimv2
from .models.aimv2_config import find_aimv2
from .models.aimv2_names import is_aimv2
from .models.internlm2 import is_internlm2, plan_internlm2
from .models.internvit import is_internvit, plan_internvit
from .models.sailvl import plan_component, plan_sailvl
from .models.sailvl_config import PREFIXES, component_problems, is_component, is_sailvl
from .plan import COMPONENTS, ConversionPlan, Options
from .storage.checkpoint import Checkpoint
from .storage.errors import CheckpointError, Problem
from .storage.lora import is_wrapped
from .storage.sources import ADAPTER
from .storage.training_run import training_notes


SPECIFIC_OPTIONS = ("to_layout", "from_layout", "prefix", "image_size", "insert_vision")


@dataclass(frozen=True)
class Architecture:
    """
    What a checkpoint may be.

    Attributes:
        title: Its name in messages.
        part: One of PARTS; None for LoRA, which has to be merged first.
        matches: (tensor names, config.json) -> whether a checkpoint contains it.
        plan: (checkpoint, options) -> its conversion; raises CheckpointError if that is not possible.
        check: checkpoint -> its problems; None if planning a conversion finds them.
        options: Those of SPECIFIC_OPTIONS that apply to it.
    """

    title: str
    part: str | None
    matches: Callable[[Collection[str], Mapping[str, Any]], bool]
    plan: Callable[[Checkpoint, Options], ConversionPlan]
    check: Callable[[Checkpoint], list[Problem]] | None = None
    options: tuple[str, ...] = ()

    def problems(self, checkpoint: Checkpoint) -> list[Problem]:
        """Return what is wrong with names, shapes and config; raises CheckpointError for what hides other problems."""
        if self.check:
            return self.check(checkpoint)
        self.plan(checkpoint, Options())
        return []


def _plan_lora(checkpoint: Checkpoint, options: Options) -> ConversionPlan:
    """Only a checkpoint that open_checkpoint did not open gets here: that merges LoRA."""
    if ADAPTER in checkpoint.source.files:
        what = "an adapter of peft, no model: `sailvit convert ADAPTER OUT --base BASE` merges it"
        raise CheckpointError(f"{ADAPTER}: {what}")
    what = "a model with LoRA in it, as peft wraps its components: `sailvit convert SRC OUT` merges it"
    raise CheckpointError(f"{checkpoint.entry}: {what}")


def _component(title: str, part: str) -> Architecture:
    functions = (is_component, plan_component, component_problems)
    return Architecture(title, part, *(partial(function, part=part) for function in functions))


LORA = Architecture("LoRA", None, lambda names, config: "peft_type" in config or is_wrapped(names), _plan_lora)
SAILVL = Architecture(
    "SAIL-VL", "all", is_sailvl, plan_sailvl, partial(component_problems, part="all"), ("insert_vision",)
)
CONNECTOR = _component("connector", "connector")
INTERNLM2 = Architecture(
    "InternLM2", "language", lambda names, config: is_internlm2(names), plan_internlm2, options=("prefix",)
)
INTERNVIT = Architecture(
    "InternViT", "vision", lambda names, config: is_internvit(names), plan_internvit, options=("prefix",)
)
AIMV2 = Architecture(
    "AIMv2", "vision", lambda names, config: is_aimv2(names), plan_aimv2,
    lambda checkpoint: find_aimv2(checkpoint).problems, ("to_layout", "from_layout", "prefix", "image_size"),
)  # fmt: skip
LANGUAGE = _component("language model", "language")
VISION = _component("vision encoder that is no AIMv2", "vision")

# The first that matches is the answer.
ARCHITECTURES = (LORA, SAILVL, CONNECTOR, INTERNLM2, INTERNVIT, AIMV2, LANGUAGE, VISION)


def detect(checkpoint: Checkpoint, part: str | None = None) -> Architecture | None:
    """
    Return what a checkpoint is, or what one part of it is; None if no architecture matches.

    Args:
        part: One of PARTS.
    """
    names = checkpoint.weight_map
    config = {**checkpoint.document(ADAPTER), **checkpoint.document("config.json")}
    candidates = (each for each in ARCHITECTURES if part in (None, each.part))
    return next((each for each in candidates if each.matches(names, config)), None)


def detect_components(checkpoint: Checkpoint) -> list[Architecture]:
    """Return the architectures of the three components of a SAIL-VL, else what the checkpoint is; AIMv2 by default."""
    parts = COMPONENTS if detect(checkpoint) is SAILVL else (None,)
    return [detect(checkpoint, part) or AIMV2 for part in parts]


def plan_conversion(checkpoint: Checkpoint, options: Options) -> ConversionPlan:
    """
    Return the conversion of a checkpoint, or of the part that the options name.

    Raises:
        CheckpointError: The checkpoint is not valid, or an option does not apply to it.
    """
    architecture = detect(checkpoint, options.part) or AIMV2
    if architecture.part == "vision" and options.from_layout is not None:
        architecture = AIMV2
    _check_options(checkpoint, architecture, options)
    if options.dtype is None:
        prefix = PREFIXES.get(architecture.part, "")
        own = [name for name in checkpoint.weight_map if f".{prefix}" in f".{name}"]
        options = replace(options, dtype=checkpoint.default_dtype(own))
    plan = architecture.plan(checkpoint, options)
    if options.link and not plan.unchanged_files:
        raise CheckpointError(f"{checkpoint.source.name}: --link: all weight files are rewritten: leave it out")
    plan.notes += training_notes(checkpoint)
    return plan


def _check_options(checkpoint: Checkpoint, architecture: Architecture, options: Options) -> None:
    source, whole = checkpoint.source.name, detect(checkpoint)
    if options.insert_vision is not None and options.part not in (None, "all"):
        raise CheckpointError(f"{source}: --insert-vision writes a whole SAIL-VL: leave out --part {options.part}")
    needs_sailvl = architecture in (CONNECTOR, LANGUAGE, VISION) or options.part not in (None, architecture.part)
    if whole is not SAILVL and (needs_sailvl or options.insert_vision is not None):
        option = "--insert-vision" if options.insert_vision is not None else f"--part {options.part}"
        raise CheckpointError(
            f"{source}: {option if options.part or options.insert_vision else 'convert'}: expected a SAIL-VL "
            f"(vision_model.*, mlp1.*, language_model.*), got {whole.title if whole else 'other names'}; "
            "`sailvit compose` makes one of a vision encoder and a language model"
        )
    for option in SPECIFIC_OPTIONS:
        if getattr(options, option) is not None and option not in architecture.options:
            takers = " or ".join(each.title for each in ARCHITECTURES if option in each.options)
            fix = "add --part vision" if architecture is SAILVL else "leave it out"
            raise CheckpointError(
                f"{source}: --{option.replace('_', '-')}: expected {takers}, got {architecture.title}: {fix}"
            )
