"""
Loads a folder as a stranger does, in a process of its own that does not import this package, shows it a picture, and
writes what it made of it: of a tower `pixel_values` (1, C, H, W) and `tokens` (1, N, D), in float32; of a multimodal
model counts of tiles and placeholders; of a language model the count of its parameters.

Usage: python load_alone.py FOLDER PICTURE OUT.safetensors
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file


SMALL = 1 << 30  # bytes


def main(folder: str, picture: str, out: str) -> None:
    config = json.loads((Path(folder) / "config.json").read_text())
    folder = plainly_named(folder, Path(out).parent)
    with Image.open(picture) as image, torch.inference_mode():
        if config.get("model_type") == "sailvl":
            found = run_multimodal(folder, image.convert("RGB"))
        elif str(config.get("architectures")).endswith("ForCausalLM']"):
            found = {"parameters": torch.tensor(load_model("AutoModelForCausalLM", folder, False).num_parameters())}
        else:
            run = run_timm if "architecture" in config else run_transformers
            found = dict(zip(("pixel_values", "tokens"), run(folder, image.convert("RGB"), config), strict=True))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)


def plainly_named(folder: str, scratch: Path) -> str:
    """The folder under a name without dots, with which transformers < 4.57 cannot import its code."""
    link = scratch / "folder"
    try:
        link.symlink_to(Path(folder).resolve(), target_is_directory=True)
    except OSError:  # a system without links
        return folder
    return str(link)


def run_timm(folder: str, image: Image.Image, config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixel_values = transform(image)[None]
    return pixel_values, model.forward_features(pixel_values)


def run_transformers(folder: str, image: Image.Image, config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    is_classifier = "ForImageClassification" in str(config.get("architectures"))
    auto = AutoModelForImageClassification if is_classifier else AutoModel
    options = {"trust_remote_code": True} if "auto_map" in config else {}
    model, report = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise SystemExit(f"not loaded strictly: {wrong}")
    if config["model_type"] == "sailvit":
        options["do_tile"] = False
    processor = AutoImageProcessor.from_pretrained(folder, **options)
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    output = model.eval()(pixel_values)
    return pixel_values, output.logits if is_classifier else output.last_hidden_state


def run_multimodal(folder: str, image: Image.Image) -> dict[str, torch.Tensor]:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    config = load_model("AutoModelForImageTextToText", folder, True).config
    counts = {
        "tiles": len(inputs["pixel_values"]),
        "placeholders": int((inputs["input_ids"] == config.image_token_id).sum()),
        "image_seq_length": config.image_seq_length,
    }
    return {name: torch.tensor(count) for name, count in counts.items()}


def load_model(auto_class: str, folder: str, trust: bool) -> torch.nn.Module:
    """Strictly; of what is too large to be loaded for a look, the code and the names alone."""
    import transformers

    auto = getattr(transformers, auto_class)
    if sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) < SMALL:
        model, report = auto.from_pretrained(folder, dtype="auto", trust_remote_code=trust, output_loading_info=True)
        wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    else:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=trust)
        wrong = compare_names(folder, model)
    if any(wrong.values()):
        raise SystemExit(f"not loaded strictly: {wrong}")
    return model


def compare_names(folder: str, model: torch.nn.Module) -> dict[str, list[str]]:
    """Return the missing and unexpected names, and those of other shapes, without reading any values."""
    stored: dict[str, list[int]] = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    model.tie_weights()
    expected = model.state_dict(keep_vars=True)
    tied = {id(expected[name]) for name in stored.keys() & expected.keys()}
    return {
        "missing": sorted(name for name, tensor in expected.items() if name not in stored and id(tensor) not in tied),
        "unexpected": sorted(stored.keys() - expected.keys()),
        "shape": sorted(name for name in stored.keys() & expected.keys() if [*expected[name].shape] != stored[name]),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
