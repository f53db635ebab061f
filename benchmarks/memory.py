"""
Benchmark of the peak memory of `sailvit encode` (Base, stored in bf16) by tiles per image and batch size.

Each run is a process; the baseline is a run with one tile per image and batch size 1.

    python benchmarks/memory.py
"""

import tempfile
from pathlib import Path

from processes import SAILVIT, measure
from random_tower import make_random_tower

from sailvit.encode.demo import PHOTOGRAPH


def peak_megabytes(folder: Path, out: Path, tiles: int, batch_size: int) -> float:
    """Return the peak resident memory of encoding three copies of the photo, in MB."""
    command = [*SAILVIT, "encode", folder / "album", "--model", folder / "tower", "--out", out]
    command += ["--batch-size", batch_size, *(["--no-tile"] if tiles == 1 else ["--max-tiles", tiles])]
    return measure(*command)[1] / 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_random_tower(folder / "tower", "base")
        (folder / "album").mkdir()
        for index in range(3):
            (folder / "album" / f"{index}.jpg").write_bytes(PHOTOGRAPH.read_bytes())
        baseline = peak_megabytes(folder, folder / "baseline", 1, 1)
        for batch_size, tiles in [(1, 8), (1, 24), (8, 8), (8, 24), (24, 24)]:
            peak = peak_megabytes(folder, folder / f"{batch_size}-{tiles}", tiles, batch_size)
            print(f"batch size {batch_size:2}, at most {tiles:2} tiles per image: {peak - baseline:6.0f} MB more")


if __name__ == "__main__":
    main()
