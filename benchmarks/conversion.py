"""
`sailvit convert --no-verify` of AIMv2-Huge-shaped float32 weights (2.7 GB) into shards of 200 MB, each run a process:
its speed against `cp` of the same bytes, interleaved, and its peak memory above that of an idle interpreter, against
the largest tensor and one shard. Then how long `sailvit inspect` takes for 16 GB in sparse shards, and `--help`.

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
    contenders = {
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
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for counted in [False, *[True] * rounds]:
        for name, command in contenders.items():
            took, peak = measure(*command)
            seconds[name] += [took] if counted else []
            (folder / "copy").unlink(missing_ok=True)
            shutil.rmtree(folder / "out", ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    started = time.perf_counter()
    hash_file(source)
    print(f"{time.perf_counter() - started:6.2f} s  SHA-256 of the same bytes, once; a conversion takes it twice")
    largest = max(tensor.nbytes for tensor in read_safetensors(source).values())
    for name, value in medians.items():
        print(f"{value:6.2f} s  {name}")
    for name in ("cp", "cp and sync"):
        print(f"{medians[name] / medians['sailvit convert']:6.2f}x  speed of sailvit convert, {name} = 1")
    print(
        f"{(peak - idle_bytes()) / (largest + SHARD):6.2f}x  peak memory above idle, largest tensor and one shard = 1"
    )


def inspect_sparse(folder: Path) -> None:
    """Float32 3B and the rest of a large model, in shards that hold headers and nothing else."""
    shape = published_shape("3b")
    tower = [NewTensor(piece.name, "F32", piece.shape, iter) for piece in tensor_specs(LAYOUTS["sailvit"], shape)]
    rest = [NewTensor(f"language_model.layers.{layer}.weight", "F32", (4096, 12288), iter) for layer in range(26)]
    tensors = [NewTensor(f"vision_model.{tensor.name}", "F32", tensor.shape, iter) for tensor in tower] + rest
    total = write_sparse(folder / "sparse", tensors)
    (folder / "sparse" / "config.json").write_text(json.dumps({"vision_config": apple_config(shape)}))
    took = statistics.median(measure(*SAILVIT, "inspect", folder / "sparse")[0] for _ in range(5))
    print(f"{took:6.2f} s  sailvit inspect of {total / 1e9:.1f} GB in 8 sparse shards")
    print(f"{statistics.median(measure(*SAILVIT, '--help')[0] for _ in range(5)):6.2f} s  sailvit --help")


def write_sparse(folder: Path, tensors: list[NewTensor], count: int = 8) -> int:
    """Writes so many shards, each tensor a hole in one of them, and their index; returns their bytes."""
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
