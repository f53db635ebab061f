"""InternLM2 and 2.5, as published with remote code, to transformers' LlamaForCausalLM."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..plan import Options
from ..storage.checkpoint import Checkpoint
from ..storage.errors import Problem, raise_if_any
from ..storage.files import is_number
from ..storage.tensors import is_same
from .checks import UNSEEN, config_problems, contradictions, head_problems, invalid_values, is_integer
from .internlm2_tokenizer import find_tokenizer
from .mapped_plan import InternVLPlan, check_source, match_notes, read_source
from .name_tables import Dimensions, Match, ModelFamily, NamingScheme


LLAMA = {
    "model.tok_embeddings": "model.embed_tokens",
    "model.layers.{}.attention_norm": "model.layers.{}.input_layernorm",
    "model.layers.{}.attention.wqkv": tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "model.layers.{}.attention.wo": "model.layers.{}.self_attn.o_proj",
    "model.layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "model.layers.{}.feed_forward.w1": "model.layers.{}.mlp.gate_proj",
    "model.layers.{}.feed_forward.w3": "model.layers.{}.mlp.up_proj",
    "model.layers.{}.feed_forward.w2": "model.layers.{}.mlp.down_proj",
    "model.norm": "model.norm",
    "output": "lm_head",
}

# Fields that the tensors do not show, and InternLM2's own defaults, as released.
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DEFAULTS = {
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "initializer_range": 0.02, **TOKEN_IDS,
}  # fmt: skip

SERVICE_FIELDS = {"transformers_version", "_from_model_config", "auto_map"}


@dataclass(frozen=True)
class InternLM2Dimensions(Dimensions):
    """The dimensions of an InternLM2; its heads and its tied embeddings are those of its configuration."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: bool
    tie_word_embeddings: bool

    @property
    def qkv_groups(self) -> tuple[int, tuple[int, ...]]:
        queries = self.num_attention_heads // self.num_key_value_heads
        return self.num_key_value_heads, (queries * self.head_dim, self.head_dim, self.head_dim)

    def parameters(self) -> dict[tuple[str, str], tuple[int, ...]]:
        width, mlp = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        rows = queries + 2 * self.num_key_value_heads * self.head_dim
        biases = {"attention.wqkv": rows, "attention.wo": width} if self.attention_bias else {}
        block = {
            "attention_norm": (width,), "attention.wqkv": (rows, width), "attention.wo": (width, queries),
            "ffn_norm": (width,), "feed_forward.w1": (mlp, width), "feed_forward.w3": (mlp, width),
            "feed_forward.w2": (width, mlp),
        }  # fmt: skip
        head = {} if self.tie_word_embeddings else {("output", ".weight"): (self.vocab_size, width)}
        return {
            ("model.tok_embeddings", ".weight"): (self.vocab_size, width),
            **{(f"model.layers.{{}}.{part}", ".weight"): shape for part, shape in block.items()},
            **{(f"model.layers.{{}}.{part}", ".bias"): (size,) for part, size in biases.items()},
            ("model.norm", ".weight"): (width,),
            **head,
        }


BUFFERS = r".*\.rotary_emb\.inv_freq"
ORIGINAL = NamingScheme("InternLM2", "InternLM2", {name: name for name in LLAMA}, ignored=BUFFERS)
CONVERTED = NamingScheme("LlamaForCausalLM", "transformers' LlamaForCausalLM", LLAMA)
ANCHORS = ("model.layers.{}.attention.wqkv",)
LARGEST = InternLM2Dimensions(1, 1, 1, 1, 1, 1, 1, attention_bias=True, tie_word_embeddings=False)
INTERNLM2 = ModelFamily("InternLM2", "language", {ORIGINAL.name: ORIGINAL}, ANCHORS, LARGEST)
is_internlm2 = INTERNLM2.is_in


def _infer_dimensions(match: Match, original: Mapping[str, Any]) -> tuple[InternLM2Dimensions, list[Problem]]:
    """Return the dimensions, and where the configuration contradicts the tensors."""
    vocabulary, width = match.required_shape("model.tok_embeddings.weight", 2)
    layer = "model.layers.{}."
    known = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": match.common_rows(layer + "feed_forward.w1") or 1,
        "num_hidden_layers": match.count_blocks(layer + "attention_norm"),
    }
    bias = match.has(".bias", layer + "attention.wqkv", layer + "attention.wo")
    heads, groups, head_dim = _heads(width, original)
    needed, rows = (heads + 2 * groups) * head_dim, match.common_rows(layer + "attention.wqkv")
    expected = f"{needed} rows of wqkv for {heads} heads and {groups} key-value heads of {head_dim}"
    tied = original.get("tie_word_embeddings", False)
    problems = [
        *contradictions({**known, "bias": bias}, original),
        *config_problems("num_key_value_heads", rows == needed, expected, rows),
        *config_problems("tie_word_embeddings", type(tied) is bool, "true or false", tied),
    ]
    dimensions = InternLM2Dimensions(
        **known, num_attention_heads=heads, num_key_value_heads=groups, head_dim=head_dim, attention_bias=bias,
        tie_word_embeddings=tied is True,
    )  # fmt: skip
    return dimensions, problems


def _heads(width: int, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the heads, the key-value heads and the width of a head, which only the configuration has."""
    heads, groups, head_dim = map(config.get, ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if head_dim is None:
        raise_if_any(head_problems(heads, width))
    raise_if_any(config_problems("num_attention_heads", is_integer(heads), "a positive integer", heads, UNSEEN))
    groups = heads if groups is None else groups
    is_valid = is_integer(groups) and heads % groups == 0
    raise_if_any(config_problems("num_key_value_heads", is_valid, f"a divisor of {heads}", groups, UNSEEN))
    head_dim = width // heads if head_dim is None else head_dim
    is_valid = is_integer(head_dim, 2) and head_dim % 2 == 0
    raise_if_any(config_problems("head_dim", is_valid, "an even number", head_dim))
    return heads, groups, head_dim


def llama_config(dimensions: InternLM2Dimensions, original: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return config.json of a LlamaForCausalLM, for transformers from 4.56 on, and impossible or unsupported values."""
    fields = {key: original.get(key, default) for key, default in DEFAULTS.items()}
    positions, theta, declared = fields["max_position_embeddings"], fields["rope_theta"], original.get("rope_scaling")
    scaling, expected = _rope_scaling(declared), '{"type": "dynamic" or "linear", "factor": 1 or more}'
    problems = [
        *invalid_values(original, ("rms_norm_eps", "initializer_range")),
        *_token_id_problems(original, dimensions.vocab_size),
        *config_problems("max_position_embeddings", is_integer(positions), "a positive integer", positions),
        *config_problems("rope_theta", is_number(theta) and theta > 1, "a number above 1", theta),
        *config_problems("rope_scaling", bool(scaling) or declared is None, expected, declared),
    ]
    config = {"architectures": [CONVERTED.name], "model_type": "llama", **asdict(dimensions), **fields}
    return {**config, "mlp_bias": False, "rope_scaling": scaling, "use_cache": True}, problems


def _token_id_problems(original: Mapping[str, Any], vocabulary: int) -> list[Problem]:
    problems = []
    for key in TOKEN_IDS:
        value = original.get(key)
        ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
        is_valid = all(one is None or (is_integer(one, 0) and one < vocabulary) for one in ids)
        problems += config_problems(key, is_valid, f"an id below the vocabulary size {vocabulary}", value)
    return problems


def _rope_scaling(declared: Any) -> dict[str, Any] | None:
    """Return InternLM2's rotary scaling as transformers 4 and 5 read it; None for none, or for others."""
    fields = declared if isinstance(declared, Mapping) else {}
    kind, factor = fields.get("rope_type", fields.get("type")), fields.get("factor")
    is_supported = kind in ("dynamic", "linear") and is_number(factor) and factor >= 1
    return {"rope_type": kind, "factor": float(factor)} if is_supported else None


def plan_internlm2(checkpoint: Checkpoint, options: Options) -> InternVLPlan:
    """
    Return the conversion of an InternLM2. Raises CheckpointError if there is no whole one, or config.json contradicts
    it or is not supported.
    """
    match, original = read_source(checkpoint, INTERNLM2, options.prefix)
    dimensions, problems = _infer_dimensions(match, original)
    if dimensions.tie_word_embeddings:
        problems += _drop_tied_head(checkpoint, match)
    config, invalid = llama_config(dimensions, original)
    dtype = check_source(checkpoint, match, dimensions, problems + invalid, options)
    files, origin, note = find_tokenizer(checkpoint)
    declared = checkpoint.document("generation_config.json")
    if generation := {key: value for key, value in declared.items() if key not in SERVICE_FIELDS}:
        files["generation_config.json"] = generation
    return InternVLPlan(
        checkpoint=checkpoint, dtype=dtype, match=match, dimensions=dimensions, layout=CONVERTED, config=config,
        files=files, details={"tokenizer": origin}, notes=[*match_notes(match, "buffers and tied weights"), note],
    )  # fmt: skip


def _drop_tied_head(checkpoint: Checkpoint, match: Match) -> list[Problem]:
    """Drop a stored head that is tied to the embeddings, if it equals them."""
    head, embeddings = map(match.tensors.get, ("output.weight", "model.tok_embeddings.weight"))
    if not head or not embeddings:
        return []
    if not checkpoint.source.headers_only and not is_same(head, embeddings):
        expected = "the values of model.tok_embeddings.weight, to which config.json ties it"
        what = f"expected {expected}, got others: fix tie_word_embeddings"
        return [Problem("config", match.names["output.weight"], what)]
    del match.tensors["output.weight"]
    match.dropped.append(match.names.pop("output.weight"))
    return []
