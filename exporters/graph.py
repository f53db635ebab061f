# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The encoder as an ONNX graph, by torch.export."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..modeling_sailvit import SAILViTModel
from .weights import data_file


if TYPE_CHECKING:
    import onnx_ir

# Of ai.onnx: every onnxruntime since 1.14 has it, and on a CPU it was faster than 23 with its fused operators.
OPSET = 18
INPUT = "pixel_values"
OUTPUTS = ("last_hidden_state", "image_features", "image_embeds")  # the last one only with a connector
IR_VERSION = 10  # onnxruntime since 1.18


class ExportedEncoder(nn.Module):
    """
    What an ONNX file computes: pixel_values (tiles, 3, S, S) float32 -> last_hidden_state (tiles, N, D), image_features
    (tiles, N / f^2, f^2 * D), the input of a connector, and with a connector image_embeds (tiles, N / f^2, E); float32
    in any dtype of the weights.
    """

    def __init__(self, model: SAILViTModel, connector: nn.Module | None = None):
        super().__init__()
        self.model, self.connector = model, connector
        self.eval()

    @property
    def output_names(self) -> tuple[str, ...]:
        return OUTPUTS if self.connector else OUTPUTS[:2]

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model.get_image_features(pixel_values, return_dict=True)
        outputs = [output.last_hidden_state, output.pooler_output]
        if self.connector:
            outputs.append(self.connector(output.pooler_output))
        return tuple(tensor.float() for tensor in outputs)


def export_program(encoder: ExportedEncoder) -> torch.export.ExportedProgram:
    """Return the encoder as a program for any number of tiles; torch.export.save writes it as .pt2."""
    with torch.no_grad():
        tiles = {INPUT: {0: torch.export.Dim("tiles", min=1)}}
        return torch.export.export(encoder, (_example(encoder),), dynamic_shapes=tiles)


def write_graph(encoder: ExportedEncoder, path: Path) -> None:
    """
    Write an encoder as an ONNX file, its weights, in the dtype that they have, in a file of their own: NAME.onnx_data.
    """
    import onnx_ir

    with torch.no_grad():
        program = torch.onnx.export(
            encoder,
            (_example(encoder),),
            input_names=[INPUT],
            output_names=encoder.output_names,
            dynamic_shapes={INPUT: {0: "tiles"}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    program.model.ir_version = IR_VERSION
    _strip_metadata(program.model)
    onnx_ir.save(program.model, path, external_data=data_file(path).name)


def _example(encoder: ExportedEncoder) -> torch.Tensor:
    """Two tiles, since torch.export would take one for a constant."""
    config = encoder.model.config
    return torch.zeros(2, config.num_channels, config.image_size, config.image_size)


def _strip_metadata(model: "onnx_ir.Model") -> None:
    """Remove what the exporter notes of every node: module names and stack traces, with paths of this machine."""
    for entry in (model, model.graph, *model.graph, *(value for node in model.graph for value in node.outputs)):
        entry.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
