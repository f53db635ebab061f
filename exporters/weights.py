# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Weights of an ONNX file: quantized to int8, and moved into the file. It runs as a script, since both take copies of the
weights, and the process that exports has torch's.

Its argument is JSON: path, an ONNX file with its weights in a file of their own; int8, the file to write with int8
weights, or None; join, whether to move the weights of `path` into it. An error of the disk is printed as its number.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import onnx

INITIALIZER, GRAPH, RAW_DATA = 5, 7, 9  # numbers of fields in onnx.proto: of GraphProto, ModelProto, TensorProto
LARGEST_FILE = 2_000_000_000  # bytes of weights in a file of protobuf, which ends at 2 GiB


def process_weights(path: Path, int8: Path | None = None, join: bool = True, largest_file: int = LARGEST_FILE) -> None:
    """
    Run this script; the arguments are those of `quantize` and `join_weights`.

    Raises:
        OSError: A file cannot be written.
        RuntimeError: The quantizer failed.
    """
    options = {"path": str(path), "int8": int8 and str(int8), "join": join, "largest_file": largest_file}
    # As text, since a script's own folder becomes importable.
    command = [sys.executable, "-c", Path(__file__).read_text(encoding="utf-8"), json.dumps(options)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode and done.stdout.strip().isdecimal():
        raise OSError(number := int(done.stdout), os.strerror(number), str(path))
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"{path}: the weights cannot be quantized or moved: {reason}")


def main() -> None:
    options = json.loads(sys.argv[1])
    path = Path(options["path"])
    try:
        if options["int8"]:
            quantize(path, Path(options["int8"]), options["largest_file"])
        if options["join"]:
            join_weights(path, options["largest_file"])
    except OSError as error:
        print(error.errno)
        sys.exit(1)


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
    from onnxruntime.quantization import QuantType, onnx_quantizer, quantize_dynamic

    # It infers shapes once more, on two copies of the weights, for models with Gemm, of which ours have none.
    onnx_quantizer.save_and_reload_model_with_shape_infer = lambda model: model
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
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


def join_weights(path: Path, largest_file: int = LARGEST_FILE) -> None:
    """
    Move the weights of an ONNX file into it, unless they are more than `largest_file` bytes. They are copied from file
    to file, where onnx.save would hold them three times.
    """
    import onnx

    data = data_file(path)
    if data.stat().st_size > largest_file:
        return
    model = onnx.load(path, load_external_data=False)
    initializers = [_split_tensor(tensor) for tensor in model.graph.initializer]
    del model.graph.initializer[:]
    records = [(_field(INITIALIZER, len(head) + size) + head, start, size) for head, start, size in initializers]
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    length = len(graph) + sum(len(head) + size for head, _, size in records)
    part = path.with_name(f"{path.name}.part")
    with data.open("rb") as source, part.open("wb") as target:
        target.write(model.SerializeToString() + _field(GRAPH, length) + graph)
        for head, start, size in records:
            target.write(head)
            source.seek(start)
            target.write(source.read(size))
    part.rename(path)
    data.unlink()


def _split_tensor(tensor: "onnx.TensorProto") -> tuple[bytes, int, int]:
    """Return a serialized tensor up to its data, and offset and length of data in the other file, 0 if it is here."""
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    if not uses_external_data(tensor):
        return tensor.SerializeToString(), 0, 0
    info = ExternalDataInfo(tensor)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    return tensor.SerializeToString() + _field(RAW_DATA, info.length), info.offset or 0, info.length


def _field(number: int, length: int) -> bytes:
    """Return what protobuf has before `length` bytes of a field: number and kind, and the length as a varint."""
    header = bytearray([number << 3 | 2])
    while length > 127:
        header.append(length & 127 | 128)
        length >>= 7
    return bytes([*header, length])


def data_file(path: Path) -> Path:
    """Return the file of the weights of an ONNX file that has them outside, as transformers.js calls it."""
    return path.with_name(f"{path.name}_data")


if __name__ == "__main__":
    main()
