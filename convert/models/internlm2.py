"""InternLM2 and 2.5, as published with remote code, to transformers' LlamaForCausalLM."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..plan import Options
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError, Problem
from ..storage.files import write_json
from ..storage.tensors import is_same
from .checks import config_problem, contradictions, invalid_values, is_integer
from .internlm2_tokenizer import NewTokenizer, find_tokenizer
from .internvl_common import InternVLPlan, check_source, read_source
from .mapped_plan import match_notes
from .name_tables import Dimensions, MatchedTensors, ModelFamily, NamingScheme


LLAMA = {
    "model.tok_embeddings": "model.embed_tokens",
    "model.layers.{}.attention_norm": "model.layers.{}.input_layernorm",
    "model.layers.{}.attention.wqkv": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "model.layers.{}.attention.wo": "model.layers.{}.self_attn.o_proj",
    "model.layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "model.layers.{}.feed_forward.w1": "model.layers.{}.mlp.gate_proj",
    "model.layers.{}.feed_forward.w3": "model.layers.{}.mlp.up_proj",
    "model.layers.{}.feed_forward.w2": "model.layers.{}.mlp.down_proj",
    "model.norm": "model.norm",
    "output": "lm_head",
}

# InternLM2's own defaults, as released.
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

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
            "attention_norm": (width,),
            "attention.wqkv": (rows, width),
            "attention.wo": (width, queries),
            "ffn_norm": (width,),
            "feed_forward.w1": (mlp, width),
            "feed_forward.w3": (mlp, width),
            "feed_forward.w2": (width, mlp),
        }
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


def is_internlm2(names: Iterable[str]) -> bool:
    """Return whether a checkpoint contains an InternLM2 or 2.5, under any prefix."""
    return INTERNLM2.is_in(names)


def _infer_dimensions(
    matched: MatchedTensors, original: Mapping[str, Any]
) -> tuple[InternLM2Dimensions, list[Problem]]:
    """Return the dimensions, and where the configuration contradicts the tensors."""
    vocabulary, width = matched.required_shape("model.tok_embeddings.weight", 2)
    layer = "model.layers.{}."
    known = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": matched.common_rows(layer + "feed_forward.w1") or 1,
        "num_hidden_layers": matched.count_blocks(layer + "attention_norm"),
    }
    bias = matched.has(".bias", layer + "attention.wqkv", layer + "attention.wo")
    problems = contradictions({**known, "bias": bias}, original)
    heads, groups, head_dim = _heads(width, original)
    expected, rows = (heads + 2 * groups) * head_dim, matched.common_rows(layer + "attention.wqkv")
    if rows != expected:
        for_heads = f"for {heads} heads and {groups} key-value heads of {head_dim}"
        what = f"expected {expected} rows of wqkv {for_heads}, got {rows}: fix config.json"
        problems.append(Problem("config", "num_key_value_heads", what))
    tied = original.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        problems.append(config_problem("tie_word_embeddings", "true or false", tied))
    dimensions = InternLM2Dimensions(
        **known, num_attention_heads=heads, num_key_value_heads=groups, head_dim=head_dim, attention_bias=bias,
        tie_word_embeddings=tied is True,
    )  # fmt: skip
    return dimensions, problems


def _heads(width: int, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the heads, the key-value heads and the width of a head, which only the configuration has."""
    heads, groups, head_dim = map(config.get, ("num_attention_heads", "num_key_value_heads", "head_dim"))
    fix = "tensors do not show it; set it in config.json"
    if not is_integer(heads):
        raise CheckpointError(str(config_problem("num_attention_heads", "a positive integer", heads, fix)))
    groups = heads if groups is None else groups
    if not is_integer(groups) or heads % groups:
        raise CheckpointError(str(config_problem("num_key_value_heads", f"a divisor of {heads}", groups, fix)))
    if head_dim is None and width % heads:
        raise CheckpointError(str(config_problem("num_attention_heads", f"a divisor of the width {width}", heads)))
    head_dim = width // heads if head_dim is None else head_dim
    if not is_integer(head_dim, 2) or head_dim % 2:
        raise CheckpointError(str(config_problem("head_dim", "an even number", head_dim)))
    return heads, groups, head_dim


def llama_config(dimensions: InternLM2Dimensions, original: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """
    Return the config.json of a LlamaForCausalLM, for transformers from 4.56 on, and impossible or unsupported values.

    Args:
        original: The original configuration; InternLM2's defaults apply where neither it nor the tensors have a value.
    """
    problems = invalid_values(original, ("rms_norm_eps", "initializer_range"))
    problems += _token_id_problems(original, dimensions.vocab_size)
    positions, theta = original.get("max_position_embeddings", 2048), original.get("rope_theta", 10000)
    if not is_integer(positions):
        problems.append(config_problem("max_position_embeddings", "a positive integer", positions))
    if type(theta) not in (int, float) or not 1 < theta < float("inf"):
        problems.append(config_problem("rope_theta", "a number above 1", theta))
    scaling, scaling_problems = _rope_scaling(original.get("rope_scaling"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(dimensions),
        "mlp_bias": False,
        "hidden_act": original.get("hidden_act", "silu"),
        "max_position_embeddings": positions,
        "rms_norm_eps": original.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "initializer_range": original.get("initializer_range", 0.02),
        "use_cache": True,
        **{key: original.get(key, default) for key, default in TOKEN_IDS.items()},
    }
    return config, problems + scaling_problems


def _token_id_problems(original: Mapping[str, Any], vocabulary: int) -> list[Problem]:
    problems = []
    for key in TOKEN_IDS:
        value = original.get(key)
        ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if not all(one is None or (is_integer(one, 0) and one < vocabulary) for one in ids):
            problems.append(config_problem(key, f"an id below the vocabulary size {vocabulary}", value))
    return problems


def _rope_scaling(declared: Any) -> tuple[dict[str, Any] | None, list[Problem]]:
    """Return InternLM2's rotary scaling, in the form that transformers 4 and 5 read."""
    if declared is None:
        return None, []
    fields = declared if isinstance(declared, Mapping) else {}
    kind, factor = fields.get("rope_type", fields.get("type")), fields.get("factor")
    if kind not in ("dynamic", "linear") or type(factor) not in (int, float) or not 1 <= factor < float("inf"):
        expected = '{"type": "dynamic" or "linear", "factor": 1 or more}'
        return None, [config_problem("rope_scaling", expected, declared)]
    return {"rope_type": kind, "factor": float(factor)}, []


@dataclass(kw_only=True)
class InternLM2Plan(InternVLPlan):
    """
    The conversion of an InternLM2 to a LlamaForCausalLM.

    Attributes:
        tokenizer: Its tokenizer; None if there is none that runs without remote code.
    """

    tokenizer: NewTokenizer | None = None

    def write_folder(self, folder: Path) -> None:
        self.write_config(folder)
        declared = self.checkpoint.document("generation_config.json")
        if kept := {key: value for key, value in declared.items() if key not in SERVICE_FIELDS}:
            write_json(folder / "generation_config.json", kept)
        if self.tokenizer:
            self.tokenizer.write(folder)
        self.write_card(folder)

    def provenance(self) -> dict[str, Any]:
        return {**super().provenance(), "tokenizer": self.tokenizer.origin if self.tokenizer else None}


def plan_internlm2(checkpoint: Checkpoint, options: Options) -> InternLM2Plan:
    """
    Plan the conversion of an InternLM2 or 2.5, bare or in a larger model, to transformers' LlamaForCausalLM.

    Raises:
        CheckpointError: There is no whole one, config.json contradicts it, LlamaForCausalLM does not support the
            variant, or an option does not apply.
    """
    matched, original = read_source(checkpoint, INTERNLM2, options)
    dimensions, problems = _infer_dimensions(matched, original)
    if dimensions.tie_word_embeddings:
        problems += _drop_tied_head(checkpoint, matched)
    config, config_problems = llama_config(dimensions, original)
    dtype = check_source(checkpoint, matched, dimensions, options, problems + config_problems)
    tokenizer, note = find_tokenizer(checkpoint)
    plan = InternLM2Plan(
        checkpoint=checkpoint, dtype=dtype, match=matched.match, stored=matched.tensors, dimensions=dimensions,
        layout=CONVERTED, config=config, tokenizer=tokenizer,
    )  # fmt: skip
    plan.notes = [*match_notes(matched.match, "buffers and tied weights"), note]
    return plan


def _drop_tied_head(checkpoint: Checkpoint, matched: MatchedTensors) -> list[Problem]:
    """Drop a stored head that is tied to the embeddings, if it equals them."""
    tensors, names = matched.tensors, matched.match.names
    if "output.weight" not in tensors or "model.tok_embeddings.weight" not in tensors:
        return []
    if not checkpoint.headers_only and not is_same(tensors["output.weight"], tensors["model.tok_embeddings.weight"]):
        expected = "the values of model.tok_embeddings.weight, to which config.json ties it"
        what = f"expected {expected}, got others: fix tie_word_embeddings"
        return [Problem("config", names["output.weight"], what)]
    del tensors["output.weight"]
    matched.match.dropped.append(names.pop("output.weight"))
    return []
