"""
Benchmark of `sailvit convert`, `sailvit inspect` and `sailvit --help`, each run in its own process.

Conversion (`--no-verify`, AIMv2-Huge in float32, 2.7 GB, 200 MB shards): speed relative to `cp` of the same bytes,
interleaved; peak memory above an idle interpreter, relative to the largest tensor plus one shard. Inspection: time for
16 GB in sparse shards.

    python benchmarks/conversion.py
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from processes import SAILVIT, idle_bytes, measure

from sailvit.convert.models.aimv2_names import LAYOUTS
from sailvit.convert.models.name_tables import tensor_specs
from sailvit.convert.storage.files import hash_file
from sailvit.convert.storage.safetensors_io import read_safetensors, safetensors_header
from sailvit.convert.storage.tensors import NewTensor
from sailvit.convert.synthetic import apple_config, published_shape, write_synthetic


SHARD = 200_000_000


def compare_with_cp(folder: Path, rounds: int) -> None:
    source = write_synthetic(folder / "huge", published_shape("huge")) / "model.safetensors"
    commands = {
        "cp": ["cp", source, folder / "copy"],
        "cp and sync": ["sh", "-c", f"cp {source} {folder / 'copy'} && sync {folder / 'copy'}"],
        "sailvit convert": [
            *SAILVIT,
            "convert",
            source.parent,
            folder / "out",
            "--no-verify",
            "--max-shard-size",
            SHARD,
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for is_warm in [False, *[True] * rounds]:
        for name, command in commands.items():
            elapsed, peak = measure(*command)
            seconds[name] += [elapsed] if is_warm else []
            (folder / "copy").unlink(missing_ok=True)
            shutil.rmtree(folder / "out", ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    started = time.perf_counter()
    hash_file(source)
    print(f"{time.perf_counter() - started:6.2f} s  SHA-256 of the same bytes, once; a conversion computes it twice")
    largest = max(tensor.nbytes for tensor in read_safetensors(source).values())
    for name, value in medians.items():
        print(f"{value:6.2f} s  {name}")
    for name in ("cp", "cp and sync"):
        print(f"{medians[name] / medians['sailvit convert']:6.2f}x  speed of sailvit convert, {name} = 1")
    print(
        f"{(peak - idle_bytes()) / (largest + SHARD):6.2f}x  peak memory above idle, largest tensor plus one shard = 1"
    )


def inspect_sparse(folder: Path) -> None:
    """Time the inspection of a float32 3B encoder and a language model in sparse shards (headers only)."""
    shape = published_shape("3b")
    tower = [NewTensor(piece.name, "F32", piece.shape, iter) for piece in tensor_specs(LAYOUTS["sailvit"], shape)]
    rest = [NewTensor(f"language_model.layers.{layer}.weight", "F32", (4096, 12288), iter) for layer in range(26)]
    tensors = [NewTensor(f"vision_model.{tensor.name}", "F32", tensor.shape, iter) for tensor in tower] + rest
    total = write_sparse(folder / "sparse", tensors)
    (folder / "sparse" / "config.json").write_text(json.dumps({"vision_config": apple_config(shape)}))
    seconds = statistics.median(measure(*SAILVIT, "inspect", folder / "sparse")[0] for _ in range(5))
    print(f"{seconds:6.2f} s  sailvit inspect of {total / 1e9:.1f} GB in 8 sparse shards")
    print(f"{statistics.median(measure(*SAILVIT, '--help')[0] for _ in range(5)):6.2f} s  sailvit --help")


def write_sparse(folder: Path, tensors: list[NewTensor], count: int = 8) -> int:
    """Write `count` shards whose tensors are holes in sparse files, and their index; return their size in bytes."""
    folder.mkdir()
    weight_map, total = {}, 0
    for number in range(count):
        shard, file = tensors[number::count], f"model-{number:05}.safetensors"
        header = safetensors_header(shard)
        (folder / file).write_bytes(header)
        size = len(header) + sum(tensor.nbytes for tensor in shard)
        os.truncate(folder / file, size)
        weight_map |= {tensor.name: file for tensor in shard}
        total += size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def main() -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        inspect_sparse(Path(folder))
        compare_with_cp(Path(folder), rounds=5)


if __name__ == "__main__":
    main()
