"""Verification of a converted AIMv2 encoder: outputs of the folder and of the source weights on a test image."""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.model_types import auto_class_of
from ..export.runtimes import RUNTIMES, timm_config, transformers_config
from ..storage.tensors import StoredTensor, load_float32, torch_name
from ..verify.outputs import compare_outputs, run_in_clean_process
from .aimv2_names import POSITIONS, RELEASED
from .aimv2_state_dict import compute_positions, convert_tensors
from .mapped_plan import MappedPlan


if TYPE_CHECKING:
    import torch
    from torch import nn

    Reference = Callable[[torch.Tensor], torch.Tensor]  # pixels (1, C, H, W) -> tokens (1, N, D)


def verify_folder(folder: Path, plan: MappedPlan, fields: Mapping[str, Any], new_grid: int | None) -> dict[str, Any]:
    """
    Load a folder in a clean process, compare its tokens for a test image with those of the source weights in another
    implementation, if there is one, and return the entry of provenance.json. Both run in float32, on weights rounded to
    the folder's dtype.

    Args:
        fields: SAILViTConfig's, of the folder.
        new_grid: Side of the square of position embeddings in the folder, if they are resampled.

    Raises:
        VerificationError: The folder does not load, or the difference exceeds the tolerance.
    """
    import torch

    outputs = run_in_clean_process(folder, auto_class_of(folder))
    with torch.inference_mode():
        name, model = _reference(plan, fields, new_grid)
        return compare_outputs(outputs["tokens"], model(outputs["pixel_values"]), name)


def _reference(plan: MappedPlan, fields: Mapping[str, Any], new_grid: int | None) -> "tuple[str, Reference]":
    """Return the name of an implementation and the source weights in it: the one of the source's names, or another
    than the folder's."""
    scheme = plan.match.scheme
    released, learned = scheme.modules is RELEASED, plan.match.tensors.get(scheme.names_of(POSITIONS)[0])
    in_timm = learned is not None and not RUNTIMES["timm"].unsupported_reason(fields)
    if (released or scheme.name == "timm") and in_timm and find_spec("timm"):
        return f"timm {version('timm')}", _timm_reference(plan, fields, learned)
    source_fields = {**fields, "pos_embed_type": "absolute" if learned else "sincos"}
    tensors, config = _source_tensors(plan, fields, new_grid), transformers_config(source_fields)
    if released and (plan.layout.name != "sailvit" or RUNTIMES["transformers"].unsupported_reason(fields)):
        from ...configuration_sailvit import SAILViTConfig
        from ...modeling_sailvit import SAILViTModel

        return "SAILViTModel of this package", _load(SAILViTModel(SAILViTConfig(**source_fields)), tensors)
    if scheme.name == "ovis2-transformers":
        from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionConfig, Ovis2VisionModel

        name, model = "Ovis2VisionModel", Ovis2VisionModel(Ovis2VisionConfig(**config, vocab_size=8)).transformer
    else:
        from transformers import Aimv2VisionConfig, Aimv2VisionModel

        name, model = "Aimv2VisionModel", Aimv2VisionModel(Aimv2VisionConfig(**config))
        tensors = convert_tensors(tensors, "transformers")
    return f"{name} of transformers {version('transformers')}", _load(model, tensors)


def _source_tensors(plan: MappedPlan, fields: Mapping[str, Any], new_grid: int | None) -> "dict[str, torch.Tensor]":
    """Return the tensors in float32, under the source's names, rounded to the folder's dtype, positions resampled."""
    scheme, stored = plan.match.scheme, plan.match.tensors
    tensors, name = {key: load_float32(one, plan.dtype) for key, one in stored.items()}, scheme.names_of(POSITIONS)[0]
    if new_grid is not None:
        new = _round(compute_positions(stored[name], fields["hidden_size"], new_grid), plan.dtype)
        tensors[name] = new[0] if POSITIONS in scheme.squeezed else new
    return tensors


def _round(tensor: "torch.Tensor", dtype: str) -> "torch.Tensor":
    import torch

    return tensor.to(getattr(torch, torch_name(dtype))).float()


def _timm_reference(plan: MappedPlan, fields: Mapping[str, Any], learned: StoredTensor) -> "Reference":
    """timm reads Apple's names as well as its own, and resamples position embeddings itself."""
    import timm
    import torch
    from timm.models.vision_transformer import checkpoint_filter_fn

    config, positions = timm_config(fields), plan.match.scheme.names_of(POSITIONS)[0]
    with torch.device("meta"):  # saves seconds of random initialization
        model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    tensors = {**_source_tensors(plan, fields, None), positions: load_float32(learned)}
    model.load_state_dict(checkpoint_filter_fn(tensors, model), strict=True, assign=True)
    model.pos_embed.data = _round(model.pos_embed.data, plan.dtype)
    return model.eval().forward_features


def _load(model: "nn.Module", tensors: "dict[str, torch.Tensor]") -> "Reference":
    model.load_state_dict(tensors, strict=True)
    return lambda pixel_values: model.eval()(pixel_values).last_hidden_state
