"""Conversion of one component of a SAIL-VL to a folder of its own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.card import write_conversion_card
from ..export.image_settings import clip_settings
from ..export.model_types import auto_class_of
from ..export.sailvl_files import portable
from ..export.tokenizer_files import VOCABULARIES, copy_tokenizer, padding_notes, write_generation_config
from ..plan import ConversionPlan, Options, output_dtype
from ..storage.checkpoint import Checkpoint
from ..storage.errors import raise_if_any
from ..storage.files import write_json
from ..storage.tensors import NewTensor, StoredTensor, load_float32, torch_name
from ..verify.outputs import compare_outputs, run_in_clean_process
from .sailvl_config import (
    CONNECTOR,
    Component,
    build_meta_component,
    component_problems,
    find_component,
    renamed_tensors,
)


CARDS = {"language": ("The language model", ()), "vision": ("The vision encoder", ("vision",))}  # title, tags


@dataclass(kw_only=True)
class ComponentPlan(ConversionPlan):
    """Writes one component of a SAIL-VL; config: its config.json, empty for a connector, which nothing loads alone."""

    component: Component
    config: dict[str, Any]

    @property
    def part(self) -> str:
        return self.component.part

    def tensors(self) -> list[NewTensor]:
        prefix = CONNECTOR if self.part == "connector" else ""
        names = {prefix + name: stored_name for name, stored_name in self.component.names.items()}
        return renamed_tensors(self.checkpoint, names, self.dtype)

    def source_tensors(self) -> Iterable[StoredTensor]:
        return map(self.checkpoint.__getitem__, self.component.names.values())

    def write_folder(self, folder: Path) -> None:
        dtype, sources = torch_name(self.dtype), [self.checkpoint.source]
        if self.part == "connector":
            rows, columns = self.component.matrix_shape
            what = (
                f"The connector of a SAIL-VL, {dtype}: from {columns} numbers, those of a square of visual tokens, to "
                f"the {rows} of its language model. It is part of a model: nothing loads it alone."
            )
            write_conversion_card(folder, sources, what, ["sailvl"])
            return
        write_json(folder / "config.json", {**self.config, "dtype": dtype})
        if self.part == "vision":
            settings = clip_settings(self.checkpoint, self.config["image_size"])
            write_json(folder / "preprocessor_config.json", settings)
        elif copy_tokenizer(self.checkpoint, folder):
            write_generation_config(self.checkpoint, folder)
        title, tags = CARDS[self.part]
        write_conversion_card(folder, sources, f"{title} of a SAIL-VL: {self.config['model_type']}, {dtype}.", tags)

    def verify(self, folder: Path) -> dict[str, Any] | None:
        if self.part == "connector":
            return None
        outputs = run_in_clean_process(folder, auto_class_of(folder))
        if self.part == "vision":
            return self._compare_tokens(outputs)
        return {"loaded": self.config["architectures"][0], "parameters": int(outputs["parameters"])}

    def _compare_tokens(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compare the folder's outputs on a test image with those of the source's weights."""
        import torch
        from transformers import AutoModel, __version__

        config = build_meta_component(self.checkpoint.source.name, "vision", self.config).config
        model, stored = AutoModel.from_config(config).float().eval(), self.checkpoint
        model.load_state_dict(
            {name: load_float32(stored[key], self.dtype) for name, key in self.component.names.items()}
        )
        with torch.inference_mode():
            expected = model(outputs["pixel_values"]).last_hidden_state
        return compare_outputs(outputs["tokens"], expected, f"{type(model).__name__} of transformers {__version__}")

    def provenance(self) -> dict[str, Any]:
        return {"source": {"layout": "sailvl", "prefix": self.component.prefix}, "part": self.part}


def plan_component(checkpoint: Checkpoint, options: Options, part: str) -> ComponentPlan:
    """Raises CheckpointError if the component is not complete, contradicts config.json, or transformers lacks it."""
    source, found = checkpoint.source.name, find_component(checkpoint, part)
    raise_if_any(component_problems(checkpoint, part), source)
    config, title = {}, "the connector"
    if part != "connector":
        title = type(build_meta_component(source, part, found.config)).__name__
        config = {**portable(found.config), "architectures": [title]}
    dtype = output_dtype(options.dtype, {name: checkpoint[stored] for name, stored in found.names.items()}, source)
    plan = ComponentPlan(checkpoint=checkpoint, dtype=dtype, component=found, config=config)
    plan.notes.append(f"{len(found.names)} of {len(checkpoint.weight_map)} names are under {found.prefix}: {title}")
    if part == "language":
        if not VOCABULARIES & {*checkpoint.source.files}:
            plan.notes.append("there is no tokenizer next to the weights: none is written")
        plan.notes += padding_notes(checkpoint)
    return plan
