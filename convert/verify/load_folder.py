"""
Load a model folder in a clean process, where the package that wrote it is not imported, run one image through it and
save its outputs. outputs.py runs this script.

Its argument is JSON: folder, image, out; auto_class, of transformers, or "timm"; generate, whether to run a language
model too, however large; compare_with_package, whether to run the package's own classes as well.

What is saved, by the kind of model; of the package's classes as "package.NAME":
    vision: pixel_values (1, C, H, W) and tokens (1, N, D), a classifier's logits (1, classes) as tokens; float32
    multimodal: tiles, placeholders and image_seq_length, which are counts
    language: parameters, a count
    with generate also pixel_values, input_ids (1, T) and logits (1, vocabulary) of the last position
"""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file


PACKAGE = "sailvit"
# Bytes of weights from which a language model is not loaded in float32; without generate, not loaded at all.
LARGE = 1 << 30
Outputs = dict[str, torch.Tensor]


def main() -> None:
    options = SimpleNamespace(**json.loads(sys.argv[1]))
    options.folder = Path(options.folder)
    with Image.open(options.image) as file:
        image = file.convert("RGB")
    with torch.inference_mode():
        run = run_timm if options.auto_class == "timm" else run_transformers
        outputs = run(options, image)
        if any(name.split(".")[0] == PACKAGE for name in sys.modules):
            raise SystemExit(f"the folder's code imports the package {PACKAGE}, which others do not have")
        if options.compare_with_package:
            importlib.import_module(PACKAGE)
            package = run_transformers(options, image, PACKAGE)
            outputs |= {f"package.{name}": tensor for name, tensor in package.items()}
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, options.out)


def run_timm(options: SimpleNamespace, image: Image.Image) -> Outputs:
    import timm

    model = timm.create_model(f"local-dir:{options.folder}", pretrained=True).float().eval()
    pixel_values = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(image)[None]
    return {"pixel_values": pixel_values, "tokens": model.forward_features(pixel_values)}


def run_transformers(options: SimpleNamespace, image: Image.Image, package: str = "") -> Outputs:
    """Run the folder by its own code, where it has any, or by the classes that `package` registers."""
    stored = json.loads((options.folder / "config.json").read_text(encoding="utf-8"))
    trust = {"trust_remote_code": True} if "auto_map" in stored and not package else {}
    config = transformers.AutoConfig.from_pretrained(options.folder, **trust)
    if config.model_type != stored.get("model_type"):
        raise SystemExit(f"AutoConfig: expected model_type {stored.get('model_type')}, got {config.model_type}")
    model = load_model(options, config, trust)
    module = type(model).__module__.split(".")[0]
    if module != (package or ("transformers_modules" if trust else "transformers")):
        raise SystemExit(f"{options.auto_class} takes its code from {module}")
    if options.auto_class == "AutoModelForCausalLM":
        return run_language(options, model, trust)
    image_processor = transformers.AutoImageProcessor.from_pretrained(options.folder, **trust)
    if options.auto_class == "AutoModelForImageTextToText":
        return run_multimodal(options, model, image_processor, image, trust)
    one_tile = {"do_tile": False} if hasattr(image_processor, "do_tile") else {}
    pixel_values = image_processor(images=image, return_tensors="pt", **one_tile)["pixel_values"]
    output = model(pixel_values=pixel_values)
    return {"pixel_values": pixel_values, "tokens": output.logits if "logits" in output else output.last_hidden_state}


def load_model(options: SimpleNamespace, config: object, trust: dict[str, bool]) -> torch.nn.Module:
    """Load strictly. Of a large language model that is not to be run, only names and shapes are checked."""
    auto = getattr(transformers, options.auto_class)
    files = [*options.folder.glob("*.safetensors")]
    is_language = options.auto_class in ("AutoModelForImageTextToText", "AutoModelForCausalLM")
    is_large = is_language and sum(file.stat().st_size for file in files) >= LARGE
    if is_large and not options.generate:
        with torch.device("meta"):
            model = auto.from_config(config, **trust)
        report = compare_names(model, files)
    else:
        dtype = "auto" if is_large or hasattr(config, "quantization_config") else torch.float32
        model, report = auto.from_pretrained(options.folder, dtype=dtype, output_loading_info=True, **trust)
    if wrong := {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}:
        raise SystemExit(f"not loaded strictly: {wrong}")
    return model.eval()


def compare_names(model: torch.nn.Module, files: list[Path]) -> dict[str, list[str]]:
    """Return missing and unexpected names and those of other shapes, by the headers of the files."""
    stored: dict[str, list[int]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    model.tie_weights()
    expected = model.state_dict(keep_vars=True)
    common = expected.keys() & stored.keys()
    tied = {id(expected[name]) for name in common}
    return {
        "missing": sorted(name for name, tensor in expected.items() if name not in stored and id(tensor) not in tied),
        "unexpected": sorted(stored.keys() - common),
        "shape": sorted(name for name in common if [*expected[name].shape] != stored[name]),
    }


def run_multimodal(
    options: SimpleNamespace, model: torch.nn.Module, image_processor: object, image: Image.Image, trust: dict
) -> Outputs:
    processor = transformers.AutoProcessor.from_pretrained(options.folder, **trust)
    if type(processor.image_processor).__name__ != type(image_processor).__name__:
        raise SystemExit("AutoProcessor and AutoImageProcessor load different image processors")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    one_tile = {"do_tile": False} if options.generate else {}
    inputs = processor(text=prompt, images=image, return_tensors="pt", **one_tile)
    outputs = {
        "tiles": torch.tensor(len(inputs["pixel_values"])),
        "placeholders": (inputs["input_ids"] == model.config.image_token_id).sum(),
        "image_seq_length": torch.tensor(model.config.image_seq_length),
    }
    if options.generate:
        outputs |= {"pixel_values": inputs["pixel_values"], **generate(model, inputs)}
    return outputs


def run_language(options: SimpleNamespace, model: torch.nn.Module, trust: dict[str, bool]) -> Outputs:
    outputs = {"parameters": torch.tensor(model.num_parameters())}
    if options.generate:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder, **trust)
        outputs |= generate(model, tokenizer("The picture shows", return_tensors="pt"))
    return outputs


def generate(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Outputs:
    """Return the prompt and the logits of its last position, in the dtype of the weights; check that generate runs."""
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return {"input_ids": inputs["input_ids"], "logits": model(**inputs).logits[:, -1]}


if __name__ == "__main__":
    main()
