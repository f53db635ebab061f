"""A toy SAIL-VL with the tiles of real ones, as harnesses load it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from toy_sailvl import released_config, released_tensors, write_tokenizer

from sailvit.convert.conversion import convert_checkpoint


LETTERS = "ABCD"


def write_suite_model(folder: Path, parts: Path, seed: int = 0) -> Path:
    """Write a model folder with code: 448-pixel tiles of 256 tokens, answers are letters that depend on the picture."""
    config = released_config()
    config["force_image_size"] = config["vision_config"]["image_size"] = 448
    config["llm_config"]["max_position_embeddings"] = 16_384
    release = parts / f"release-{seed}"
    write_tokenizer(release)
    (release / "config.json").write_text(json.dumps(config))
    tensors = released_tensors(config, seed=seed, attentive=True)
    tensors["language_model.lm_head.weight"] = _letters_only(tensors["language_model.lm_head.weight"], release)
    save_file(tensors, release / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(release, folder, verify=False)
    return folder


def _letters_only(head: torch.Tensor, tokenizer: Path) -> torch.Tensor:
    """Return a head whose largest logit is that of a letter: these add up to 0, and all others are 0."""
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    ids = [vocabulary.token_to_id(letter) for letter in LETTERS]
    letters = torch.zeros_like(head)
    letters[ids] = head[ids] - head[ids].mean(0)
    return letters
