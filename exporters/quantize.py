# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""int8 weights by onnxruntime's quantizer."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .graph import LARGEST_FILE, data_file


def quantize(source: Path, target: Path, largest_file: int = LARGEST_FILE) -> None:
    """
    Write a float32 ONNX file with int8 weights, one scale for each output channel. Activations become 8 bits when it
    runs, with one scale for all tiles of a call.

    Only products with weights are quantized; docs/decisions.md has what was measured for the patch convolution,
    products of activations and unsigned weights. The weights have 7 bits, as x86 processors without VNNI need: they add
    two products in 16 bits.

    Args:
        source: With weights in a file of their own, so that they are not in memory while shapes are inferred.
        target: Has its weights in it, unless they are more than `largest_file` bytes.
    """
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _without_root_log(), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        quantized, is_large = Path(scratch, target.name), data_file(source).stat().st_size / 4 > largest_file
        quantize_dynamic(
            source,
            quantized,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=is_large,
        )
        if is_large:  # under the name of transformers.js
            onnx_ir.save(onnx_ir.load(quantized), target, external_data=data_file(target).name)
        else:
            quantized.rename(target)


@contextmanager
def _without_root_log() -> Iterator[None]:
    """Drop the quantizer's advice to preprocess, which it logs at the root, whose handler it would install."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
