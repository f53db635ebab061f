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
from .models.sailvl_config import PREFIXES, component_problems, is_component, is_sailvl, quantized_by
from .plan import COMPONENTS, ConversionPlan, Options
from .storage.checkpoint import Checkpoint
from .storage.errors import CheckpointError, Problem
from .storage.lora import is_wrapped
from .storage.sources import ADAPTER
from .storage.training_run import training_notes


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint may be."""

    title: str  # its name in messages
    part: str | None  # one of PARTS; None for LoRA, which has to be merged first
    matches: Callable[[Collection[str], Mapping[str, Any]], bool]  # tensor names, config.json -> whether it is there
    plan: Callable[[Checkpoint, Options], ConversionPlan]  # raises CheckpointError if that is not possible
    options: tuple[str, ...] = ()  # fields of Options that apply to it, but not to all
    check: Callable[[Checkpoint], list[Problem]] | None = None  # None if planning a conversion finds the problems

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
    matches, plan, check = (partial(f, part=part) for f in (is_component, plan_component, component_problems))
    return Architecture(title, part, matches, plan, check=check)


LORA = Architecture("LoRA", None, lambda names, config: "peft_type" in config or is_wrapped(names), _plan_lora)
SAILVL = Architecture(
    "SAIL-VL", "all", is_sailvl, plan_sailvl, ("insert_vision",), partial(component_problems, part="all")
)
CONNECTOR = _component("connector", "connector")
INTERNLM2 = Architecture("InternLM2", "language", lambda names, _: is_internlm2(names), plan_internlm2, ("prefix",))
INTERNVIT = Architecture("InternViT", "vision", lambda names, _: is_internvit(names), plan_internvit, ("prefix",))
AIMV2 = Architecture(
    "AIMv2", "vision", lambda names, _: is_aimv2(names), plan_aimv2,
    ("to_layout", "from_layout", "prefix", "image_size"), lambda checkpoint: find_aimv2(checkpoint).problems,
)  # fmt: skip
LANGUAGE = _component("language model", "language")
VISION = _component("vision encoder that is no AIMv2", "vision")

# The first that matches is the answer.
ARCHITECTURES = (LORA, SAILVL, CONNECTOR, INTERNLM2, INTERNVIT, AIMV2, LANGUAGE, VISION)


def detect(checkpoint: Checkpoint, part: str | None = None) -> Architecture | None:
    """Return what a checkpoint is, or what `part` of it (one of PARTS) is; None if no architecture matches."""
    config = {**checkpoint.document(ADAPTER), **checkpoint.document("config.json")}
    candidates = (each for each in ARCHITECTURES if part in (None, each.part))
    return next((each for each in candidates if each.matches(checkpoint.weight_map, config)), None)


def detect_components(checkpoint: Checkpoint) -> list[Architecture]:
    """Return the architectures of the three components of a SAIL-VL, else what the checkpoint is; AIMv2 by default."""
    return [detect(checkpoint, part) or AIMV2 for part in (COMPONENTS if detect(checkpoint) is SAILVL else (None,))]


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
    if method := quantized_by(checkpoint, architecture.part):
        what = f"{architecture.title}: expected weights that are not quantized, got weights quantized by {method}"
        fix = "convert what they were made from, then load the result with a quantization_config and save it"
        raise CheckpointError(f"{checkpoint.source.name}: {what}: {fix}")
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
    source, whole, part, inserts = checkpoint.source.name, detect(checkpoint), options.part, options.insert_vision
    if inserts is not None and part not in (None, "all"):
        raise CheckpointError(f"{source}: --insert-vision writes a whole SAIL-VL: leave out --part {part}")
    needs_sailvl = architecture in (CONNECTOR, LANGUAGE, VISION) or part not in (None, architecture.part)
    if whole is not SAILVL and (needs_sailvl or inserts is not None):
        option = "--insert-vision" if inserts is not None else f"--part {part}" if part else "convert"
        what = "expected a SAIL-VL (vision_model.*, mlp1.*, language_model.*)"
        fix = "`sailvit compose` makes one of a vision encoder and a language model"
        raise CheckpointError(f"{source}: {option}: {what}, got {whole.title if whole else 'other names'}; {fix}")
    for option in dict.fromkeys(option for each in ARCHITECTURES for option in each.options):
        if getattr(options, option) is not None and option not in architecture.options:
            takers = " or ".join(each.title for each in ARCHITECTURES if option in each.options)
            fix = "add --part vision" if architecture is SAILVL else "leave it out"
            name = option.replace("_", "-")
            raise CheckpointError(f"{source}: --{name}: expected {takers}, got {architecture.title}: {fix}")
