"""
Benchmark of `from_pretrained` against transformers' Aimv2VisionModel.

SAILViT-Large with remote code and from the package; same weights, interleaved in one process, files in the page cache.

    python benchmarks/loading.py
"""

import tempfile
from pathlib import Path

import torch
from random_tower import make_random_tower
from timing import medians, print_ratios
from transformers import Aimv2VisionModel, AutoModel, logging
from twins import native_twin

from sailvit import SAILViTModel


def main() -> None:
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        ours, native = Path(folder) / "ours", Path(folder) / "native"
        native_twin(make_random_tower(ours, "large")).save_pretrained(native)
        dtype = torch.bfloat16
        seconds = medians(
            {
                "native": lambda: Aimv2VisionModel.from_pretrained(native, dtype=dtype),
                "ours": lambda: SAILViTModel.from_pretrained(ours, dtype=dtype),
                "ours, AutoModel": lambda: AutoModel.from_pretrained(ours, dtype=dtype, trust_remote_code=True),
            },
            rounds=15,
        )
    for name, value in seconds.items():
        print(f"{value * 1e3:8.1f} ms  {name}")
    print_ratios("speed of loading, native = 1", {name: seconds["native"] / value for name, value in seconds.items()})


if __name__ == "__main__":
    main()
