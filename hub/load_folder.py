"""
Loads a folder as a stranger does, in a process of its own that does not import this package, shows it a picture, and
writes what it made of it, in float32. With PACKAGE that package is imported thereafter, and its classes do the same;
their tensors are called "PACKAGE.NAME".

Usage: python load_folder.py FOLDER PICTURE OUT.safetensors AUTO_CLASS [PACKAGE]
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file


def main(folder: str, picture: str, out: str, auto_class: str, package: str = "") -> None:
    with Image.open(picture) as image:
        image = image.convert("RGB")
    shown = run_timm(folder, image) if auto_class == "timm" else run_auto(folder, image, auto_class)
    if any(name.split(".")[0] == "sailvit" for name in sys.modules):
        raise SystemExit("the folder's code imports the package sailvit, which others do not have")
    if package:
        importlib.import_module(package)
        ours = run_auto(folder, image, auto_class, package)
        shown |= {f"{package}.{name}": tensor for name, tensor in ours.items()}
    save_file({name: tensor.detach().float().contiguous() for name, tensor in shown.items()}, out)


def run_timm(folder: str, image: Image.Image) -> dict[str, torch.Tensor]:
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        return {"tokens": model.forward_features(transform(image)[None])}


def run_auto(folder: str, image: Image.Image, auto_class: str, package: str = "") -> dict[str, torch.Tensor]:
    said = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    trust = {"trust_remote_code": True} if not package and "auto_map" in said else {}
    config = transformers.AutoConfig.from_pretrained(folder, **trust)
    if config.model_type != said.get("model_type"):
        raise SystemExit(f"AutoConfig makes a {config.model_type} of a {said.get('model_type')}")
    model = load_model(getattr(transformers, auto_class), folder, **trust)
    module = type(model).__module__.split(".")[0]
    if module != (package or ("transformers_modules" if trust else "transformers")):
        raise SystemExit(f"{auto_class} takes its code from {module}")
    if auto_class == "AutoModelForCausalLM":
        return show_text(model, transformers.AutoTokenizer.from_pretrained(folder, **trust))
    pictures = transformers.AutoImageProcessor.from_pretrained(folder, **trust)
    if auto_class == "AutoModelForImageTextToText":
        processor = transformers.AutoProcessor.from_pretrained(folder, **trust)
        if type(processor.image_processor).__name__ != type(pictures).__name__:
            raise SystemExit("AutoProcessor and AutoImageProcessor load two kinds of image processors")
        return show_both(model, processor, image)
    return show_picture(model, pictures, image)


def load_model(auto: type, folder: str, **options: object) -> torch.nn.Module:
    """Strictly; a language model as it is stored, since it may not fit otherwise."""
    dtype = "auto" if auto.__name__ in ("AutoModelForImageTextToText", "AutoModelForCausalLM") else torch.float32
    model, report = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}
    if wrong:
        raise SystemExit(f"not loaded strictly: {wrong}")
    return model.eval()


@torch.inference_mode()
def show_picture(model: torch.nn.Module, processor: object, image: Image.Image) -> dict[str, torch.Tensor]:
    one_tile = {"do_tile": False} if hasattr(processor, "do_tile") else {}
    pixel_values = processor(images=image, return_tensors="pt", **one_tile)["pixel_values"]
    output = model(pixel_values=pixel_values)
    return {"pixels": pixel_values, "tokens": output.logits if "logits" in output else output.last_hidden_state}


@torch.inference_mode()
def show_both(model: torch.nn.Module, processor: object, image: Image.Image) -> dict[str, torch.Tensor]:
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=image, return_tensors="pt", do_tile=False)
    logits = model(**inputs).logits[:, -1]
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return {"pixels": inputs["pixel_values"], "prompt": inputs["input_ids"], "tokens": logits}


@torch.inference_mode()
def show_text(model: torch.nn.Module, tokenizer: object) -> dict[str, torch.Tensor]:
    inputs = tokenizer("The picture shows", return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return {"prompt": inputs["input_ids"], "tokens": model(**inputs).logits[:, -1]}


if __name__ == "__main__":
    main(*sys.argv[1:])
