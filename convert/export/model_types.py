"""What a folder holds, by its config.json: how it is loaded, what the Hub calls it, and how it is used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .sailvl_files import ASK


@dataclass(frozen=True)
class Kind:
    """
    A kind of model.

    Attributes:
        name: What to call it in a sentence.
        auto_class: Of transformers, which loads it; "timm" for timm's.
        pipeline_tag: The task, as the Hub names it.
        usage: Python; {name}, {revision} and {trust} are filled in, the last with an argument or nothing.
    """

    name: str
    auto_class: str
    pipeline_tag: str
    usage: str

    @property
    def library(self) -> str:
        return "timm" if self.auto_class == "timm" else "transformers"


USE_TOWER = """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

name, revision = "{name}", "{revision}"
processor = AutoImageProcessor.from_pretrained(name, revision=revision{trust})
model = AutoModel.from_pretrained(name, revision=revision{trust}).eval()
batch = processor(Image.open("picture.jpg").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    output = model(pixel_values=batch["pixel_values"])
print(output.last_hidden_state.shape)  # tiles, tokens, width"""

USE_CLASSIFIER = """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

name, revision = "{name}", "{revision}"
processor = AutoImageProcessor.from_pretrained(name, revision=revision{trust})
model = AutoModelForImageClassification.from_pretrained(name, revision=revision{trust}).eval()
batch = processor(Image.open("picture.jpg").convert("RGB"), do_tile=False, return_tensors="pt")
with torch.inference_mode():
    logits = model(pixel_values=batch["pixel_values"]).logits
print(model.config.id2label[int(logits.argmax())])"""

USE_MULTIMODAL = (
    """from transformers import AutoModelForImageTextToText, AutoProcessor

name, revision = "{name}", "{revision}"
processor = AutoProcessor.from_pretrained(name, revision=revision{trust})
model = AutoModelForImageTextToText.from_pretrained(name, revision=revision{trust}, dtype="auto").eval()
"""
    + ASK
)

USE_LANGUAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

name, revision = "{name}", "{revision}"
tokenizer = AutoTokenizer.from_pretrained(name, revision=revision{trust})
model = AutoModelForCausalLM.from_pretrained(name, revision=revision{trust}, dtype="auto").eval()
inputs = tokenizer("The picture shows", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""

USE_TIMM = """import timm

model = timm.create_model("hf-hub:{name}@{revision}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"""

TOWER = Kind("vision tower", "AutoModel", "image-feature-extraction", USE_TOWER)

TIMM = Kind("vision tower", "timm", "image-feature-extraction", USE_TIMM)

CLASSIFIER = Kind("image classifier", "AutoModelForImageClassification", "image-classification", USE_CLASSIFIER)

MULTIMODAL = Kind("multimodal language model", "AutoModelForImageTextToText", "image-text-to-text", USE_MULTIMODAL)

LANGUAGE = Kind("language model", "AutoModelForCausalLM", "text-generation", USE_LANGUAGE)


def model_type_of(config: Mapping[str, Any]) -> Kind:
    """The kind of model that a config.json is of."""
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if "architecture" in config:
        return TIMM
    if config.get("model_type") == "sailvl":
        return MULTIMODAL
    if architecture.endswith("ForImageClassification"):
        return CLASSIFIER
    return LANGUAGE if architecture.endswith("ForCausalLM") else TOWER
