"""Holds a written folder against the source: both see one picture, and their tokens are compared."""

import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.runtimes import RUNTIMES, timm_config, transformers_config
from ..storage.errors import VerificationError
from ..storage.tensors import load_float32, torch_name
from ..verify.outputs import PICTURE, TOLERANCE, run_in_clean_process
from .aimv2_names import RELEASED
from .aimv2_state_dict import compute_positions, convert_tensors


if TYPE_CHECKING:
    import torch

    from .aimv2 import AIMv2Plan

    Tokens = Callable[[torch.Tensor], torch.Tensor]  # pixels (1, C, H, W) -> tokens (1, N, D)


def verify_folder(folder: Path, job: "AIMv2Plan") -> dict[str, Any]:
    """
    Loads a folder in a fresh process and compares its tokens on a fixed picture with those of the source's weights, in
    code that is not the folder's, where there is any. Both run in float32, on weights rounded to the folder's dtype.

    Returns:
        The reference's name, the relative difference, its tolerance, the picture.

    Raises:
        VerificationError: The folder does not load, or the difference is above the tolerance.
    """
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        alone = run_in_clean_process(folder, Path(scratch))
    with torch.inference_mode():
        name, model = _reference(job)
        tokens = model(alone["pixel_values"])
    difference = ((alone["tokens"].double() - tokens).norm() / tokens.double().norm()).item()
    figures = {"reference": name, "relative_difference": difference, "tolerance": TOLERANCE, "picture": PICTURE.name}
    if not difference <= TOLERANCE:
        raise VerificationError(f"the folder's tokens are {difference:.1e} from those of {name}, relative")
    return figures


def _reference(job: "AIMv2Plan") -> "tuple[str, Tokens]":
    """The source's weights in the code its names are of, or else in code that is not the folder's; and its name."""
    layout, fields = job.tower.found.layout, job.fields
    released, learned = layout.modules is RELEASED, job.learned is not None
    if (
        find_spec("timm")
        and learned
        and (released or layout.name == "timm")
        and not RUNTIMES["timm"].unsupported_reason(fields)
    ):
        return f"timm {version('timm')}", _timm_reference(job)
    if released and (job.layout.name != "sailvit" or RUNTIMES["transformers"].unsupported_reason(fields)):
        return "SAILViTModel of this package", _sailvit_reference(job)
    if layout.name == "ovis2-transformers":
        return f"Ovis2VisionModel of transformers {version('transformers')}", _ovis2_reference(job)
    return f"Aimv2VisionModel of transformers {version('transformers')}", _native_reference(job)


def _timm_reference(job: "AIMv2Plan") -> "Tokens":
    """timm reads Apple's names as it reads its own, and resamples positions, by its own code."""
    import timm
    import torch
    from timm.models.vision_transformer import checkpoint_filter_fn

    config = timm_config(job.fields)
    with torch.device("meta"):  # random weights of Large, to be replaced at once, would take several seconds
        model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    tensors = _stored(job)
    tensors[_position_name(job)] = load_float32(job.learned)
    model.load_state_dict(checkpoint_filter_fn(tensors, model), strict=True, assign=True)
    model.pos_embed.data = _rounded(model.pos_embed.data, job.dtype)
    return model.eval().forward_features


def _native_reference(job: "AIMv2Plan") -> "Tokens":
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    model = Aimv2VisionModel(Aimv2VisionConfig(**transformers_config(_source_fields(job))))
    tensors = convert_tensors(_stored(job), "transformers")
    if job.resampled:
        tensors["embeddings.position_embedding.weight"] = _new_positions(job)[0]
    model.load_state_dict(tensors, strict=True)
    return lambda pixel_values: model.eval()(pixel_values).last_hidden_state


def _sailvit_reference(job: "AIMv2Plan") -> "Tokens":
    from ...configuration_sailvit import SAILViTConfig
    from ...modeling_sailvit import SAILViTModel

    model, tensors = SAILViTModel(SAILViTConfig(**_source_fields(job))), _stored(job)
    if job.resampled:
        tensors[_position_name(job)] = _new_positions(job)
    model.load_state_dict(tensors, strict=True)
    return lambda pixel_values: model.eval()(pixel_values).last_hidden_state


def _ovis2_reference(job: "AIMv2Plan") -> "Tokens":
    from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionConfig, Ovis2VisionModel

    fields = transformers_config(_source_fields(job))
    model, tensors = Ovis2VisionModel(Ovis2VisionConfig(**fields, vocab_size=8)).transformer, _stored(job)  # no head
    if job.resampled:
        tensors[_position_name(job)] = _new_positions(job)[0]
    model.load_state_dict(tensors, strict=True)
    return lambda pixel_values: model.eval()(pixel_values).last_hidden_state


def _stored(job: "AIMv2Plan") -> "dict[str, torch.Tensor]":
    """The source's tensors under its own names, without prefix, rounded to the dtype of the folder, in float32."""
    return {name: load_float32(stored, job.dtype) for name, stored in job.tower.tensors.items()}


def _source_fields(job: "AIMv2Plan") -> dict[str, Any]:
    """The folder's fields, but with sine-cosine positions if the source has those, and the folder's written out."""
    return {**job.fields, "pos_embed_type": "absolute" if job.learned else "sincos"}


def _position_name(job: "AIMv2Plan") -> str:
    return job.tower.found.layout.names_of("preprocessor.pos_embed")[0]


def _new_positions(job: "AIMv2Plan") -> "torch.Tensor":
    return _rounded(compute_positions(job.learned, job.fields["hidden_size"], job.grid_size), job.dtype)


def _rounded(tensor: "torch.Tensor", dtype: str) -> "torch.Tensor":
    import torch

    return tensor.to(getattr(torch, torch_name(dtype))).float()
