"""
Tensor names without the segments that wrappers add, and those of tied embeddings: the input embeddings and the head of
a language model may be one tensor with two names.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .errors import CheckpointError


# DDP and DeepSpeed, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# Embeddings and head of most language models, InternLM2, GPT-2, BLOOM.
ENDS = (
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("model.tok_embeddings.weight", "output.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("transformer.word_embeddings.weight", "lm_head.weight"),
)

SECTIONS = ("llm_config", "text_config")


def strip_wrapper_prefixes(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def without_wrapper_prefixes(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """
    Map names without wrapper segments to stored names, and list the wrapper segments that occur. Raises a
    CheckpointError if two names become equal.
    """
    cleaned: dict[str, str] = {}
    wrappers = set()
    for name in names:
        wrappers |= WRAPPERS.intersection(name.split("."))
        short = strip_wrapper_prefixes(name)
        if cleaned.setdefault(short, name) != name:
            raise CheckpointError(f"{name} and {cleaned[short]} are both {short} without wrappers: remove one of them")
    return cleaned, sorted(wrappers)


class Ends(NamedTuple):
    """Names in a checkpoint; it has the embeddings, and perhaps not the head."""

    embeddings: str
    head: str


def find_ends(names: Iterable[str]) -> Ends | None:
    """The embeddings in a checkpoint, behind any prefix, and their head; None without embeddings."""
    stored_names = {strip_wrapper_prefixes(name): name for name in names}
    for short, name in stored_names.items():
        for embeddings, head in ENDS:
            if short == embeddings or short.endswith("." + embeddings):
                head_name = short.removesuffix(embeddings) + head
                return Ends(name, stored_names.get(head_name, head_name))
    return None


def text_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's section of a config.json of SAIL-VL, `llm_config` in releases; empty if there is none."""
    fields = next((config[key] for key in SECTIONS if config.get(key)), {})
    return fields if isinstance(fields, Mapping) else {}


def shuffle_factor(config: Mapping[str, Any]) -> Any:
    """Return the pixel shuffle factor in the config.json of a SAIL-VL, `downsample_ratio` in releases."""
    ratio = config.get("downsample_ratio")
    is_ratio = isinstance(ratio, int | float) and 0 < ratio <= 1
    return round(1 / ratio) if is_ratio else config.get("pixel_shuffle_factor", 2)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the config.json of a SAIL-VL or language model ties them; by default as its config class does."""
    fields = text_fields(config) or config
    if "tie_word_embeddings" in fields:
        return bool(fields["tie_word_embeddings"])
    from transformers import CONFIG_MAPPING

    kind = fields.get("model_type")
    return kind in CONFIG_MAPPING and bool(getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", False))
