"""A toy SAIL-VL with the tiles of real ones, as harnesses load it."""

import json
from pathlib import Path

from safetensors.torch import save_file
from toy_sailvl import released_config, released_tensors, write_tokenizer

from sailvit.convert.conversion import convert_checkpoint


def write_suite_model(folder: Path, parts: Path, seed: int = 0) -> Path:
    """Write a model folder with code: 448-pixel tiles of 256 tokens, answers that depend on the picture."""
    config = released_config()
    config["force_image_size"] = config["vision_config"]["image_size"] = 448
    config["llm_config"]["max_position_embeddings"] = 16_384
    release = parts / f"release-{seed}"
    write_tokenizer(release)
    (release / "config.json").write_text(json.dumps(config))
    tensors = released_tensors(config, seed=seed, attentive=True)
    save_file(tensors, release / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(release, folder, verify=False)
    return folder
