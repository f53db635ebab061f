"""A language model's embeddings and its head, which may be one tensor under two names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .names import strip_wrapper_prefixes


# What language models call their embeddings and their head: most of them, InternLM2, GPT-2, BLOOM.
ENDS = (
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("model.tok_embeddings.weight", "output.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("transformer.word_embeddings.weight", "lm_head.weight"),
)

SECTIONS = ("llm_config", "text_config")


@dataclass(frozen=True)
class Ends:
    """
    Names in a checkpoint of what may be tied.

    Attributes:
        embeddings: It is there.
        head: As the checkpoint calls it, or would, if it is not there.
    """

    embeddings: str
    head: str


def find_ends(names: Iterable[str]) -> Ends | None:
    """The embeddings among the names of a checkpoint, behind whatever prefix, and their head; None without these."""
    places = {strip_wrapper_prefixes(name): name for name in names}
    for short, name in places.items():
        for embeddings, head in ENDS:
            if short == embeddings or short.endswith("." + embeddings):
                wanted = short.removesuffix(embeddings) + head
                return Ends(name, places.get(wanted, wanted))
    return None


def text_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the language model, in the config.json of a SAIL-VL: `llm_config` in releases."""
    fields = next((config[key] for key in SECTIONS if config.get(key)), {})
    return fields if isinstance(fields, Mapping) else {}


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config.json, of a SAIL-VL or of a language model, ties them; by its class, where it does not say so."""
    fields = text_fields(config) or config
    if "tie_word_embeddings" in fields:
        return bool(fields["tie_word_embeddings"])
    from transformers import CONFIG_MAPPING

    kind = fields.get("model_type")
    return kind in CONFIG_MAPPING and bool(getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", False))
