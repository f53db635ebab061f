"""How a folder is loaded, by its config.json: the Auto class, the task as the Hub names it, and Python code."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..storage.files import read_json


@dataclass(frozen=True)
class ModelType:
    """What the model in a folder is."""

    title: str  # in a sentence
    auto_class: str  # of transformers; "timm" for a model of timm
    pipeline_tag: str  # the task, as the Hub names it
    code: str  # Python that loads and runs it; usage() fills in {source}

    @property
    def library(self) -> str:
        return "timm" if self.auto_class == "timm" else "transformers"

    def usage(self, name: str, revision: str | None = None, has_code: bool = False) -> str:
        """Return Python code for a folder or, with a revision, a repository; `has_code`: it has Python files."""
        if self.auto_class == "timm":
            return self.code.format(source=f'"hf-hub:{name}@{revision}"' if revision else f'"local-dir:{name}"')
        options = [f'revision="{revision}"'] if revision else []
        options += ["trust_remote_code=True"] if has_code else []
        return self.code.format(source=", ".join([f'"{name}"', *options]))


VISION_CODE = """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained({source})
model = AutoModel.from_pretrained({source}).eval()
batch = processor(Image.open("image.jpg").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    output = model(pixel_values=batch["pixel_values"])
print(output.last_hidden_state.shape)  # tiles, tokens, width"""

TIMM_CODE = """import timm

model = timm.create_model({source}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"""

CLASSIFIER_CODE = """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained({source})
model = AutoModelForImageClassification.from_pretrained({source}).eval()
batch = processor(Image.open("image.jpg").convert("RGB"), do_tile=False, return_tensors="pt")
with torch.inference_mode():
    logits = model(pixel_values=batch["pixel_values"]).logits
print(model.config.id2label[int(logits.argmax())])"""

MULTIMODAL_CODE = """from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained({source})
model = AutoModelForImageTextToText.from_pretrained({source}, dtype="auto").eval()
content = [{{"type": "image", "image": "image.jpg"}}, {{"type": "text", "text": "Describe the image."}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
written = model.generate(**inputs, max_new_tokens=256)
print(processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])"""

LANGUAGE_CODE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({source})
model = AutoModelForCausalLM.from_pretrained({source}, dtype="auto").eval()
inputs = tokenizer("The image shows", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""

NO_TOKENIZER_CODE = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({source}, dtype="auto").eval()"""

MODEL_TYPES = (
    ModelType("vision encoder", "AutoModel", "image-feature-extraction", VISION_CODE),
    ModelType("vision encoder", "timm", "image-feature-extraction", TIMM_CODE),
    ModelType("image classifier", "AutoModelForImageClassification", "image-classification", CLASSIFIER_CODE),
    ModelType("multimodal language model", "AutoModelForImageTextToText", "image-text-to-text", MULTIMODAL_CODE),
    ModelType("language model", "AutoModelForCausalLM", "text-generation", LANGUAGE_CODE),
)


def auto_class_of(folder: Path) -> str:
    """Return the Auto class of transformers that loads a folder with a config.json; "timm" if timm does."""
    config = read_json(folder / "config.json")
    if "architecture" in config:
        return "timm"
    if config.get("model_type") == "sailvl":
        return "AutoModelForImageTextToText"
    architectures = config.get("architectures")
    named = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    task = re.search("(ForImageClassification|ForCausalLM)$", named)
    return f"AutoModel{task[0] if task else ''}"


def model_type_of(folder: Path) -> ModelType:
    """Return the type of the model in a folder with a config.json."""
    auto_class = auto_class_of(folder)
    model_type = next(each for each in MODEL_TYPES if each.auto_class == auto_class)
    has_tokenizer = auto_class != "AutoModelForCausalLM" or (folder / "tokenizer_config.json").exists()
    return model_type if has_tokenizer else replace(model_type, code=NO_TOKENIZER_CODE)
