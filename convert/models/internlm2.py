"""InternLM2 and 2.5, as published with code of their own, to transformers' LlamaForCausalLM."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..export.converted_card import save_card
from ..export.runtimes import LOAD_LANGUAGE
from ..plan import Options
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError, Problem
from ..storage.files import write_json
from ..storage.output_folder import final_name
from ..storage.tensors import StoredTensor, is_same, torch_name
from .internlm2_tokenizer import NewTokenizer, find_tokenizer
from .internvl_common import (
    Found,
    InternVLPlan,
    Kind,
    check_model,
    common_rows,
    contradictions,
    count_blocks,
    describe_names,
    finds,
    has_names,
    is_whole,
    odd_numbers,
    read_model,
    tensor_shape,
)


INTERNLM2 = {
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

OF_INTERNLM2 = re.compile(r"(?P<prefix>(?:.*\.)?)model\.layers\.\d+\.attention\.wqkv\.(?:weight|bias)")

LOAD_LANGUAGE_ALONE = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto").eval()"""

# InternLM2's own defaults, as released.
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

NOT_OF_GENERATION = {"transformers_version", "_from_model_config", "auto_map"}


@dataclass(frozen=True)
class InternLM2Shape:
    """The dimensions of an InternLM2; its heads by its configuration, the others by its tensors."""

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
    def groups(self) -> tuple[int, tuple[int, int, int]]:
        """How many groups wqkv has; rows of query, key and value in each."""
        queries = self.num_attention_heads // self.num_key_value_heads
        return self.num_key_value_heads, (queries * self.head_dim, self.head_dim, self.head_dim)

    def parameters(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(module, "{}" for the block; parameter of it) -> shape of the tensor."""
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


LM = Kind("InternLM2", "language", INTERNLM2, OF_INTERNLM2)


def is_internlm2(names: Iterable[str]) -> bool:
    """Whether there is an InternLM2 or 2.5 among the names of a checkpoint, behind whatever prefix."""
    return finds(LM, names)


def measure_internlm2(
    found: Found, tensors: Mapping[str, StoredTensor], said: Mapping[str, Any]
) -> tuple[InternLM2Shape, list[Problem]]:
    """
    The dimensions of an InternLM2, and where its configuration contradicts its tensors.

    Args:
        said: The configuration, without which nobody knows the heads.

    Raises:
        CheckpointError: Nothing can be measured.
    """
    vocabulary, width = tensor_shape(tensors, found, "model.tok_embeddings.weight", 2)
    known = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": common_rows(tensors, ".feed_forward.w1.weight"),
        "num_hidden_layers": count_blocks(tensors, found, "model.layers."),
    }
    bias = has_names(tensors, ".attention.wqkv.bias", ".attention.wo.bias")
    problems = contradictions({**known, "bias": bias}, said)
    heads, groups, head_dim = _heads(width, said)
    wanted, rows = (heads + 2 * groups) * head_dim, common_rows(tensors, ".attention.wqkv.weight")
    if rows != wanted:
        what = f"{heads} heads and {groups} key-value heads of {head_dim} want {wanted} rows of wqkv, there are {rows}"
        problems.append(Problem("config", "num_key_value_heads", f"{what}: correct config.json"))
    tied = said.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        what = f"is {tied!r}, not true or false: correct config.json"
        problems.append(Problem("config", "tie_word_embeddings", what))
    shape = InternLM2Shape(
        **known, num_attention_heads=heads, num_key_value_heads=groups, head_dim=head_dim, attention_bias=bias,
        tie_word_embeddings=tied is True,
    )  # fmt: skip
    return shape, problems


def _heads(width: int, said: Mapping[str, Any]) -> tuple[int, int, int]:
    """
    Heads, key-value heads and the width of each, by the configuration.

    Raises:
        CheckpointError: It does not say them, or says what cannot be.
    """
    heads = said.get("num_attention_heads")
    groups = heads if said.get("num_key_value_heads") is None else said["num_key_value_heads"]
    for key, value, of in (("num_attention_heads", heads, None), ("num_key_value_heads", groups, heads)):
        if not is_whole(value) or (of and of % value):
            what = f"is {value!r}{f', to divide {of}' if of else ''}: tensors do not show it, so say it in config.json"
            raise CheckpointError(f"{key}: {what}")
    if said.get("head_dim") is None and width % heads:
        raise CheckpointError(f"num_attention_heads: is {heads}, to divide {width}: correct config.json")
    head_dim = width // heads if said.get("head_dim") is None else said["head_dim"]
    if not is_whole(head_dim, 2) or head_dim % 2:
        raise CheckpointError(f"head_dim: is {head_dim!r}, not an even number: correct config.json")
    return heads, groups, head_dim


def llama_config(shape: InternLM2Shape, said: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """
    config.json of a LlamaForCausalLM, as every transformers from 4.56 on reads it, and what cannot be expressed.

    Args:
        said: The original configuration; it decides what tensors do not show, and else InternLM2's defaults do.
    """
    problems = odd_numbers(said, ("rms_norm_eps", "initializer_range")) + _odd_ids(said, shape.vocab_size)
    positions, theta = said.get("max_position_embeddings", 2048), said.get("rope_theta", 10000)
    if not is_whole(positions):
        problems.append(Problem("config", "max_position_embeddings", f"is {positions!r}: correct config.json"))
    if type(theta) not in (int, float) or not 1 < theta < float("inf"):
        problems.append(Problem("config", "rope_theta", f"is {theta!r}: correct config.json"))
    scaling, odd = _rope_scaling(said.get("rope_scaling"))
    dimensions = {key: value for key, value in asdict(shape).items() if key != "tie_word_embeddings"}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dimensions,
        "mlp_bias": False,
        "hidden_act": said.get("hidden_act", "silu"),
        "max_position_embeddings": positions,
        "rms_norm_eps": said.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "initializer_range": said.get("initializer_range", 0.02),
        "tie_word_embeddings": shape.tie_word_embeddings,
        "use_cache": True,
        **{key: said.get(key, default) for key, default in TOKEN_IDS.items()},
    }
    return config, problems + odd


def _odd_ids(said: Mapping[str, Any], vocabulary: int) -> list[Problem]:
    problems = []
    for key in TOKEN_IDS:
        value = said.get(key)
        values = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if not all(one is None or (is_whole(one, 0) and one < vocabulary) for one in values):
            what = f"is {value!r}, but the vocabulary has {vocabulary} tokens: correct config.json"
            problems.append(Problem("config", key, what))
    return problems


def _rope_scaling(said: Any) -> tuple[dict[str, Any] | None, list[Problem]]:
    """What InternLM2 knows, in the form that transformers 4 and 5 read."""
    if said is None:
        return None, []
    kind = said.get("rope_type", said.get("type")) if isinstance(said, Mapping) else None
    factor = said.get("factor") if isinstance(said, Mapping) else None
    if kind not in ("dynamic", "linear") or type(factor) not in (int, float) or not 1 <= factor < float("inf"):
        what = f'is {said!r}, where {{"type": "dynamic" or "linear", "factor": 1 or more}} is wanted'
        return None, [Problem("config", "rope_scaling", f"{what}: correct config.json")]
    return {"rope_type": kind, "factor": float(factor)}, []


@dataclass(kw_only=True)
class InternLM2Plan(InternVLPlan):
    """
    An InternLM2, to be written as a LlamaForCausalLM.

    Attributes:
        tokenizer: Its tokenizer; None if there is none that runs without code of its own.
    """

    tokenizer: NewTokenizer | None = None

    def write_folder(self, folder: Path) -> None:
        write_json(folder / "config.json", {**self.config, "dtype": torch_name(self.dtype)})
        said = self.checkpoint.document("generation_config.json")
        kept = {key: value for key, value in said.items() if key not in NOT_OF_GENERATION}
        if kept:
            write_json(folder / "generation_config.json", kept)
        if self.tokenizer:
            self.tokenizer.write(folder)
        what = (
            f"An InternLM2, {self.shape.num_hidden_layers} blocks of width {self.shape.hidden_size}, "
            f"{torch_name(self.dtype)}, as transformers' LlamaForCausalLM."
        )
        load = LOAD_LANGUAGE if self.tokenizer else LOAD_LANGUAGE_ALONE
        usage = ["", "```python", load.format(name=final_name(folder)), "```"]
        save_card(folder, self.checkpoint, [what, *usage], library_name="transformers", pipeline_tag="text-generation")

    def verify(self, folder: Path) -> dict[str, Any]:
        from .internvl_reference import verify_internlm2

        return verify_internlm2(folder, self)

    def provenance(self) -> dict[str, Any]:
        return {**super().provenance(), "tokenizer": self.tokenizer.origin if self.tokenizer else None}


def plan_internlm2(checkpoint: Checkpoint, asked: Options) -> InternLM2Plan:
    """
    An InternLM2 or 2.5, bare or in a larger model, to transformers' LlamaForCausalLM.

    Raises:
        CheckpointError: There is no whole one, config.json contradicts it or has what a LlamaForCausalLM has not, or an
            option means nothing for it.
    """
    found, tensors, said = read_model(checkpoint, LM, asked)
    shape, problems = measure_internlm2(found, tensors, said)
    if shape.tie_word_embeddings:
        problems += _drop_tied_head(checkpoint, found, tensors)
    config, odd = llama_config(shape, said)
    dtype = check_model(checkpoint, asked, found, tensors, shape, problems + odd)
    tokenizer, note = find_tokenizer(checkpoint)
    job = InternLM2Plan(
        checkpoint=checkpoint, dtype=dtype, found=found, stored=tensors, shape=shape, said=said, config=config,
        tokenizer=tokenizer,
    )  # fmt: skip
    job.notes = [*describe_names(found), note]
    return job


def _drop_tied_head(checkpoint: Checkpoint, found: Found, tensors: dict[str, StoredTensor]) -> list[Problem]:
    """A head that is stored though it is tied is left out, if it is the embeddings."""
    if "output.weight" not in tensors or "model.tok_embeddings.weight" not in tensors:
        return []
    head, embeddings = tensors["output.weight"], tensors["model.tok_embeddings.weight"]
    if not checkpoint.headers_only and not is_same(head, embeddings):
        what = "is not model.tok_embeddings.weight, to which config.json ties it: correct tie_word_embeddings"
        return [Problem("config", found.names["output.weight"], what)]
    del tensors["output.weight"]
    found.dropped.append(found.names.pop("output.weight"))
    return []
