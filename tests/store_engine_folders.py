"""
Make the checkpoints in tests/data/engines anew: one folder for each training engine, written by the engine itself from
the smallest SAIL-VL, with the sha256 of the weights that were in memory when it saved.

    python tests/store_engine_folders.py            # all of them, about a minute each
    python tests/store_engine_folders.py zero3 dcp
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open


HERE = Path(__file__).parent
STORED = HERE / "data" / "engines"
PROCESSES = {
    "zero1": 2, "zero2": 2, "zero3": 2, "fsdp": 2, "fsdp-full": 2, "dcp": 2, "trainer": 1, "peft": 1, "zero2-peft": 2,
}  # fmt: skip
# What no conversion reads: code, states of optimizers and random numbers that are files of their own.
LEFT_OUT = shutil.ignore_patterns(
    "*.py", "README.md", "optimizer*", "scheduler.pt", "rng_state*", "training_args.bin", "tokenizer*"
)


def run_engine(engine: str, processes: int, base: Path, out: Path) -> Path:
    """Train two steps in an engine; return the folder with `checkpoint-2/` (and `dcp/`) and truth.safetensors."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, str(HERE / "run_engine.py"), engine, str(base), str(out)]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and (out / "done.json").exists(), done.stderr[-3000:]
    return out


def checkpoint_of(engine: str, out: Path) -> Path:
    """The folder with the weights in what an engine wrote."""
    return out / ("dcp" if engine == "dcp" else "checkpoint-2")


def store(engine: str, base: Path, target: Path) -> None:
    """Make one folder: checkpoint/ as the engine wrote it, and truth.json: name -> dtype, shape, sha256."""
    with tempfile.TemporaryDirectory() as scratch:
        out = run_engine(engine, PROCESSES[engine], base, Path(scratch) / engine)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(checkpoint_of(engine, out), target / "checkpoint", ignore=LEFT_OUT)
        without_local_path(target / "checkpoint" / "adapter_config.json")
        with safe_open(out / "truth.safetensors", "pt") as file:
            truth = {name: describe(file.get_tensor(name)) for name in sorted(file.keys())}
    (target / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")


def without_local_path(adapter_config: Path) -> None:
    """peft records where the base model was; keep its name alone."""
    if adapter_config.exists():
        config = json.loads(adapter_config.read_text())
        config["base_model_name_or_path"] = Path(config["base_model_name_or_path"]).name
        adapter_config.write_text(json.dumps(config, indent=2) + "\n")


def describe(tensor) -> list:
    """[dtype, shape, sha256 of its bytes] of a tensor."""
    import torch

    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return [str(tensor.dtype).removeprefix("torch."), [*tensor.shape], hashlib.sha256(data).hexdigest()]


def write_base(folder: Path) -> Path:
    """The smallest SAIL-VL, with tied embeddings; it needs no tokenizer here."""
    from toy_sailvl import write_release

    with tempfile.TemporaryDirectory() as scratch:
        release = write_release(Path(scratch) / "base", tied=True, shards=1, smallest=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(release, folder, ignore=shutil.ignore_patterns("*token*", "vocab.json", "merges.txt"))
    return folder


if __name__ == "__main__":
    base = STORED / "base" if sys.argv[1:] else write_base(STORED / "base")
    for engine in sys.argv[1:] or PROCESSES:
        store(engine, base, STORED / engine)
        print(engine, sum(path.stat().st_size for path in (STORED / engine).rglob("*")) // 1000, "KB")
