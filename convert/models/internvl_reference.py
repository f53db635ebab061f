"""
InternViT and InternLM2 in plain torch, by their original names, for folders that were converted to be held against.
Tensors are read block by block, so that what is held is never a model.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, rearrange, repeat
from safetensors import safe_open
from torch.nn import functional

from ..storage.errors import VerificationError
from ..storage.tensors import load_float32
from ..verify.outputs import PICTURE, TOLERANCE, run_in_clean_process


if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from .internlm2 import InternLM2Plan
    from .internvit import InternViTPlan
    from .internvl_common import InternVLPlan

    Weights = Callable[[str], torch.Tensor | None]

TOKENS = 24  # of the text that a language model is shown


def verify_internvit(folder: Path, job: "InternViTPlan") -> dict[str, Any]:
    """
    Loads a folder in a fresh process and compares its tokens on a fixed picture with those of the original names, both
    in float32.

    Returns:
        As verify.verify_folder.

    Raises:
        VerificationError: The folder does not load, or the difference is above the tolerance.
    """
    with tempfile.TemporaryDirectory() as scratch:
        alone = run_in_clean_process(folder, Path(scratch))
    with torch.inference_mode():
        tokens = internvit_tokens(_weights(job), job.config, alone["pixel_values"])
    return _compare(alone["tokens"], tokens, "an InternViT in plain torch", "tokens", picture=PICTURE.name)


def verify_internlm2(folder: Path, job: "InternLM2Plan") -> dict[str, Any]:
    """
    Compares the logits of a folder for a few tokens with those of the original names, both in float32. transformers
    loads it with its first block; the others take that one's place, one after the other.

    Returns:
        As verify.verify_folder.

    Raises:
        VerificationError: The folder does not load strictly, or the difference is above the tolerance.
    """
    count = min(TOKENS, job.config["max_position_embeddings"])  # beyond them, a dynamic rotation is another
    ids = torch.arange(1, count + 1) * 7919 % job.shape.vocab_size
    with torch.inference_mode():
        logits = _llama_logits(folder, job.shape.num_hidden_layers, ids)
        expected = internlm2_logits(_weights(job), job.said, job.config, ids)
    return _compare(logits, expected, "an InternLM2 in plain torch", "logits", text=f"{count} tokens")


def _compare(ours: torch.Tensor, truth: torch.Tensor, name: str, what: str, **shown: str) -> dict[str, Any]:
    difference = ((ours.double() - truth).norm() / truth.double().norm()).item()
    if not difference <= TOLERANCE:
        raise VerificationError(f"the folder's {what} are {difference:.1e} from those of {name}, relative")
    return {"reference": name, "relative_difference": difference, "tolerance": TOLERANCE, **shown}


def _weights(job: "InternVLPlan") -> "Weights":
    """Original name -> its numbers, rounded to the dtype of the folder, in float32; None if there is no such tensor."""
    return lambda name: load_float32(job.stored[name], job.dtype) if name in job.stored else None


def internvit_tokens(weights: "Weights", config: dict[str, Any], pixels: torch.Tensor) -> torch.Tensor:
    """
    Pixels (B, C, H, W) -> tokens (B, 1 + N, D), the class token first.

    Args:
        config: That of the InternVLVisionModel, for heads, epsilon and activation.
    """
    convolution = [weights(f"embeddings.patch_embedding.{end}") for end in ("weight", "bias")]
    patches = functional.conv2d(pixels, *convolution, stride=config["patch_size"][0])
    patches = rearrange(patches, "b d h w -> b (h w) d")
    first = repeat(weights("embeddings.class_embedding"), "1 1 d -> b 1 d", b=len(pixels))
    tokens = torch.cat([first, patches], 1) + weights("embeddings.position_embedding")
    for block in range(config["num_hidden_layers"]):
        tokens = _internvit_block(lambda name, at=block: weights(f"encoder.layers.{at}.{name}"), config, tokens)
    return tokens


def _internvit_block(weights: "Weights", config: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    x = x + weights("ls1") * _internvit_attention(weights, config, _norm(weights, "norm1", x, config["layer_norm_eps"]))
    inner = _linear(weights, "mlp.fc1", _norm(weights, "norm2", x, config["layer_norm_eps"]))
    return x + weights("ls2") * _linear(weights, "mlp.fc2", _activation(config)(inner))


def _internvit_attention(weights: "Weights", config: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    query, key, value = _linear(weights, "attn.qkv", x).chunk(3, -1)
    if config["use_qk_norm"]:
        query, key = (
            _norm(weights, f"attn.{name}_norm", part, config["layer_norm_eps"])
            for name, part in (("q", query), ("k", key))
        )
    heads = [rearrange(part, "b n (h d) -> b h n d", h=config["num_attention_heads"]) for part in (query, key, value)]
    seen = functional.scaled_dot_product_attention(*heads)
    return _linear(weights, "attn.proj", rearrange(seen, "b h n d -> b n (h d)"))


def _linear(weights: "Weights", name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, weights(name + ".weight"), weights(name + ".bias"))


def _norm(weights: "Weights", name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm where there is a bias, else RMSNorm."""
    weight, bias = weights(name + ".weight"), weights(name + ".bias")
    if bias is None:
        return functional.rms_norm(x, weight.shape, weight, eps)
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def _activation(config: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers.activations import ACT2FN

    return ACT2FN[config["hidden_act"]]


def internlm2_logits(
    weights: "Weights", said: dict[str, Any], config: dict[str, Any], ids: torch.Tensor
) -> torch.Tensor:
    """
    Token ids (N,) -> logits (N, vocabulary), for texts that are not longer than the model's positions.

    Args:
        said: The original configuration, for the rotation.
        config: That of the LlamaForCausalLM, for heads, epsilon and activation.
    """
    x = functional.embedding(ids, weights("model.tok_embeddings.weight"))
    for block in range(config["num_hidden_layers"]):
        x = _internlm2_block(lambda name, at=block: weights(f"model.layers.{at}.{name}"), said, config, x)
    head = "model.tok_embeddings.weight" if config["tie_word_embeddings"] else "output.weight"
    return functional.linear(_norm(weights, "model.norm", x, config["rms_norm_eps"]), weights(head))


def _internlm2_block(weights: "Weights", said: dict[str, Any], config: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    eps = config["rms_norm_eps"]
    x = x + _linear(
        weights, "attention.wo", _grouped_attention(weights, said, config, _norm(weights, "attention_norm", x, eps))
    )
    inner = _norm(weights, "ffn_norm", x, eps)
    gated = _activation(config)(_linear(weights, "feed_forward.w1", inner)) * _linear(weights, "feed_forward.w3", inner)
    return x + _linear(weights, "feed_forward.w2", gated)


def _grouped_attention(
    weights: "Weights", said: dict[str, Any], config: dict[str, Any], x: torch.Tensor
) -> torch.Tensor:
    groups, width = config["num_key_value_heads"], config["head_dim"]
    qkv = rearrange(_linear(weights, "attention.wqkv", x), "n (k s d) -> k s n d", k=groups, d=width)
    query, key, value = _rotate(qkv[:, :-2], said), _rotate(qkv[:, -2], said), qkv[:, -1]
    scores = einsum(query, key, "k s n d, k m d -> k s n m") / width**0.5
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    seen = einsum(scores.masked_fill(later, float("-inf")).softmax(-1), value, "k s n m, k m d -> k s n d")
    return rearrange(seen, "k s n d -> n (k s d)")


def _rotate(x: torch.Tensor, said: dict[str, Any]) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864), the first half of a head with the second. x is (..., N, D)."""
    scaling = said.get("rope_scaling") or {}
    slower = scaling["factor"] if scaling.get("rope_type", scaling.get("type")) == "linear" else 1.0
    frequencies = said.get("rope_theta", 10000) ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = torch.outer(torch.arange(x.shape[-2]) / slower, frequencies)
    first, second = x.chunk(2, -1)
    turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    return torch.cat(turned, -1)


def _llama_logits(folder: Path, blocks: int, ids: torch.Tensor) -> torch.Tensor:
    """Token ids (N,) -> logits (N, vocabulary), by transformers, one block at a time."""
    model, files = _load_first_block(folder), _names_of_blocks(folder)
    if set(files) != set(range(blocks)):
        raise VerificationError(f"the folder has the blocks {sorted(files)}, {blocks} are wanted")
    norm, model.model.norm = model.model.norm, torch.nn.Identity()
    x = model.get_input_embeddings()(ids[None])
    for block in range(blocks):
        try:
            model.model.layers[0].load_state_dict(_read_block(files[block]), strict=True)
        except RuntimeError as error:
            raise VerificationError(f"block {block} of the folder does not load: {error}") from error
        x = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
    return model.lm_head(norm(x))[0]


def _load_first_block(folder: Path) -> "LlamaForCausalLM":
    """
    Raises:
        VerificationError: Names are missing, or there are others than those of further blocks.
    """
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "num_hidden_layers": 1, "output_loading_info": True}
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise VerificationError(f"the folder does not load: {error}") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    further = [name for name in wrong.get("unexpected_keys", []) if name.startswith("model.layers.")]
    wrong["unexpected_keys"] = sorted({*wrong.get("unexpected_keys", [])} - {*further})
    if any(wrong.values()):
        raise VerificationError(f"the folder is not loaded strictly: {wrong}")
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of the blocks that are left out on purpose."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _names_of_blocks(folder: Path) -> dict[int, dict[str, tuple[Path, str]]]:
    """Block -> name in it -> file and name there."""
    found: dict[int, dict[str, tuple[Path, str]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                if name.startswith("model.layers."):
                    _, _, block, rest = name.split(".", 3)
                    found.setdefault(int(block), {})[rest] = (path, name)
    return found


def _read_block(names: dict[str, tuple[Path, str]]) -> dict[str, torch.Tensor]:
    tensors = {}
    for short, (path, name) in names.items():
        with safe_open(path, "pt") as file:
            tensors[short] = file.get_tensor(name).float()
    return tensors
