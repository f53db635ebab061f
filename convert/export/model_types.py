"""How a folder is loaded, by its config.json: the Auto class, the task as the Hub names it, and Python code."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..storage.files import read_json
from ..storage.sources import LocalFolder, weight_files


@dataclass(frozen=True)
class ModelType:
    """What the model in a folder is."""

    title: str  # in a sentence
    auto_class: str  # of transformers; "timm" for a model of timm, "onnx" for ONNX files
    pipeline_tag: str  # the task, as the Hub names it
    code: str = ""  # file in usage/ that loads and runs it, by default auto_class
    onnx_file: str = ""

    @property
    def library(self) -> str:
        return {"timm": "timm", "onnx": "transformers.js"}.get(self.auto_class, "transformers")

    def usage(self, name: str, revision: str | None = None, has_code: bool = False) -> str:
        """Return Python code for a folder or, with a revision, a repository; `has_code`: it has Python files."""
        pin, trust = [f'revision="{revision}"'] if revision else [], ["trust_remote_code=True"] if has_code else []
        source, file = ", ".join([f'"{name}"', *pin, *trust]), self.code or self.auto_class
        if self.auto_class == "timm":
            source = f'"hf-hub:{name}@{revision}"' if revision else f'"local-dir:{name}"'
        elif self.auto_class == "onnx" and revision:
            source, file = ", ".join(["folder", *trust]), "onnx_hub"
        code = (USAGE / f"{file}.txt").read_text(encoding="utf-8").strip()
        return code.format(source=source, name=name, revision=revision, onnx_file=self.onnx_file)


USAGE = Path(__file__).with_name("usage")
MODEL_TYPES = (
    ModelType("vision encoder", "AutoModel", "image-feature-extraction"),
    ModelType("vision encoder", "timm", "image-feature-extraction"),
    ModelType("vision encoder in ONNX", "onnx", "image-feature-extraction"),
    ModelType("image classifier", "AutoModelForImageClassification", "image-classification"),
    ModelType("multimodal language model", "AutoModelForImageTextToText", "image-text-to-text"),
    ModelType("language model", "AutoModelForCausalLM", "text-generation"),
)


def auto_class_of(folder: Path) -> str:
    """Return the Auto class of transformers that loads a folder with a config.json; or "timm", or "onnx"."""
    if [*folder.glob("onnx/*.onnx")] and not weight_files(LocalFolder(folder)):
        return "onnx"
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
    if auto_class == "onnx":  # the most precise file, by the names of transformers.js
        return replace(model_type, onnx_file=min(path.name for path in folder.glob("onnx/*.onnx")))
    has_tokenizer = auto_class != "AutoModelForCausalLM" or (folder / "tokenizer_config.json").exists()
    return model_type if has_tokenizer else replace(model_type, code="no_tokenizer")
