"""
Loads a folder as a stranger does, in a process of its own that does not import this package, shows it a picture, and
writes what it made of it: `pixel_values` (1, C, H, W) and `tokens` (1, N, D), in float32.

Usage: python load_alone.py FOLDER PICTURE OUT.safetensors
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file


def main(folder: str, picture: str, out: str) -> None:
    config = json.loads((Path(folder) / "config.json").read_text())
    with Image.open(picture) as image, torch.inference_mode():
        run = run_timm if "architecture" in config else run_transformers
        pixel_values, tokens = run(folder, image.convert("RGB"), config)
    save_file({"pixel_values": pixel_values.contiguous(), "tokens": tokens.contiguous()}, out)


def run_timm(folder: str, image: Image.Image, config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixel_values = transform(image)[None]
    return pixel_values, model.forward_features(pixel_values)


def run_transformers(folder: str, image: Image.Image, config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import AutoImageProcessor, AutoModel

    options = {"trust_remote_code": True} if "auto_map" in config else {}
    model, report = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise SystemExit(f"not loaded strictly: {wrong}")
    if config["model_type"] == "sailvit":
        options["do_tile"] = False
    processor = AutoImageProcessor.from_pretrained(folder, **options)
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    return pixel_values, model.eval()(pixel_values).last_hidden_state


if __name__ == "__main__":
    main(*sys.argv[1:])
