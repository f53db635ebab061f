"""
Benchmark of onnxruntime, float32 and int8, against torch eager on a CPU.

SAILViT-Large with 6 of 24 blocks, the same random weights, interleaved in one process, equally many threads.

    python benchmarks/onnx_runtime.py [THREADS]
"""

import sys
import tempfile
from pathlib import Path

import torch
from random_tower import make_random_tower
from timing import medians, print_ratios

from sailvit import SAILViTModel
from sailvit.encode.onnx_model import FILES, load_onnx
from sailvit.exporters.folder import convert_to_onnx


BLOCKS = 6
ROUNDS = {1: 7, 8: 3}  # tiles -> rounds


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as scratch:
        source, folder = Path(scratch, "torch"), Path(scratch, "onnx")
        make_random_tower(source, "large", num_hidden_layers=BLOCKS)
        convert_to_onnx(source, folder, dtypes=["float32", "int8"], verify=False)
        sizes = {dtype: (folder / "onnx" / FILES[dtype]).stat().st_size for dtype in ("float32", "int8")}
        models = {f"onnxruntime {dtype}": load_onnx(folder, "cpu", dtype) for dtype in sizes}
        models |= {"torch eager float32": SAILViTModel.from_pretrained(source, dtype=torch.float32).eval()}
        print(f"Large, {BLOCKS} blocks, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
        print(f"size of int8 / float32: {sizes['int8'] / sizes['float32']:.3f}")
        for tiles in ROUNDS:
            time_tiles(models, tiles)


@torch.inference_mode()
def time_tiles(models: dict, tiles: int) -> None:
    """Print the median seconds and the speed of every model, torch = 1."""
    pixel_values = torch.randn(tiles, 3, 448, 448, generator=torch.Generator().manual_seed(0))
    runs = {name: lambda model=model: model.get_image_features(pixel_values) for name, model in models.items()}
    seconds = medians(runs, ROUNDS[tiles])
    for name, value in seconds.items():
        print(f"{value:8.3f} s  {name}, {tiles} tiles")
    print_ratios(
        f"speed, torch = 1, {tiles} tiles", {name: seconds[[*models][-1]] / value for name, value in seconds.items()}
    )


if __name__ == "__main__":
    main()
