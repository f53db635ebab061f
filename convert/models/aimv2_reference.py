"""Verification of a converted AIMv2 tower: outputs of the folder and of the source weights on a test image."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.runtimes import RUNTIMES, timm_config, transformers_config
from ..storage.tensors import StoredTensor, load_float32, torch_name
from ..verify.outputs import compare_outputs, run_in_clean_process
from .aimv2_names import POSITIONS, RELEASED
from .aimv2_state_dict import compute_positions, convert_tensors
from .name_tables import NamingScheme


if TYPE_CHECKING:
    import torch
    from torch import nn

    Reference = Callable[[torch.Tensor], torch.Tensor]  # pixels (1, C, H, W) -> tokens (1, N, D)


@dataclass(frozen=True)
class SourceWeights:
    """
    The weights of a conversion's source.

    Attributes:
        scheme: Of its names.
        stored: Name in the scheme -> tensor.
        fields: SAILViTConfig's, of the folder.
        layout: Name of the folder's layout.
        dtype: Of the folder.
        new_grid: Side of the square of position embeddings in the folder, if they are resampled.
    """

    scheme: NamingScheme
    stored: Mapping[str, StoredTensor]
    fields: Mapping[str, Any]
    layout: str
    dtype: str
    new_grid: int | None

    @property
    def position_name(self) -> str:
        return self.scheme.names_of(POSITIONS)[0]

    @property
    def learned(self) -> StoredTensor | None:
        return self.stored.get(self.position_name)

    @property
    def source_fields(self) -> dict[str, Any]:
        """The folder's fields, with sine-cosine position embeddings if the source has those."""
        return {**self.fields, "pos_embed_type": "absolute" if self.learned else "sincos"}

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Return the tensors in float32, under the source's names, rounded to the folder's dtype; resampled."""
        tensors = {name: load_float32(stored, self.dtype) for name, stored in self.stored.items()}
        if self.new_grid is not None:
            new = compute_positions(self.learned, self.fields["hidden_size"], self.new_grid)
            tensors[self.position_name] = self.round(new[0] if POSITIONS in self.scheme.squeezed else new)
        return tensors

    def round(self, tensor: "torch.Tensor") -> "torch.Tensor":
        import torch

        return tensor.to(getattr(torch, torch_name(self.dtype))).float()


def verify_folder(folder: Path, source: SourceWeights) -> dict[str, Any]:
    """
    Load a folder in a clean process and compare its tokens for a test image with those of the source weights, in an
    implementation that is not the folder's, if there is one. Both run in float32, on weights rounded to the folder's
    dtype.

    Returns:
        Name of the reference, relative difference, tolerance, name of the image.

    Raises:
        VerificationError: The folder does not load, or the difference exceeds the tolerance.
    """
    import torch

    outputs = run_in_clean_process(folder)
    with torch.inference_mode():
        name, model = _reference(source)
        return compare_outputs(outputs["tokens"], model(outputs["pixel_values"]), name)


def _reference(source: SourceWeights) -> "tuple[str, Reference]":
    """Return the name of an implementation and the source weights in it: the one of the source's names, or another
    than the folder's."""
    released, scheme = source.scheme.modules is RELEASED, source.scheme.name
    in_timm = source.learned is not None and not RUNTIMES["timm"].unsupported_reason(source.fields)
    if (released or scheme == "timm") and in_timm and find_spec("timm"):
        return f"timm {version('timm')}", _timm_reference(source)
    if released and (source.layout != "sailvit" or RUNTIMES["transformers"].unsupported_reason(source.fields)):
        return "SAILViTModel of this package", _sailvit_reference(source)
    if scheme == "ovis2-transformers":
        return f"Ovis2VisionModel of transformers {version('transformers')}", _ovis2_reference(source)
    return f"Aimv2VisionModel of transformers {version('transformers')}", _native_reference(source)


def _timm_reference(source: SourceWeights) -> "Reference":
    """timm reads Apple's names as well as its own, and resamples position embeddings itself."""
    import timm
    import torch
    from timm.models.vision_transformer import checkpoint_filter_fn

    config = timm_config(source.fields)
    with torch.device("meta"):  # saves seconds of random initialization
        model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    tensors = {**source.tensors(), source.position_name: load_float32(source.learned)}
    model.load_state_dict(checkpoint_filter_fn(tensors, model), strict=True, assign=True)
    model.pos_embed.data = source.round(model.pos_embed.data)
    return model.eval().forward_features


def _native_reference(source: SourceWeights) -> "Reference":
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    model = Aimv2VisionModel(Aimv2VisionConfig(**transformers_config(source.source_fields)))
    return _load(model, convert_tensors(source.tensors(), "transformers"))


def _sailvit_reference(source: SourceWeights) -> "Reference":
    from ...configuration_sailvit import SAILViTConfig
    from ...modeling_sailvit import SAILViTModel

    return _load(SAILViTModel(SAILViTConfig(**source.source_fields)), source.tensors())


def _ovis2_reference(source: SourceWeights) -> "Reference":
    from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionConfig, Ovis2VisionModel

    config = Ovis2VisionConfig(
        **transformers_config(source.source_fields), vocab_size=8
    )  # of its head, which is unused
    return _load(Ovis2VisionModel(config).transformer, source.tensors())


def _load(model: "nn.Module", tensors: "Mapping[str, torch.Tensor]") -> "Reference":
    model.load_state_dict(tensors, strict=True)
    return lambda pixel_values: model.eval()(pixel_values).last_hidden_state
