"""
The tower out of a large model, 16 GB in sparse files, as training engines and in shards as transformers leaves it: peak
memory of `sailvit convert --part vision --no-verify` above that of an idle interpreter, against 1.5 of the largest
tensor and one shard of 200 MB; the seconds; and the bytes that are read, against those of the tower.

    python benchmarks/trained.py
"""

import json
import pickle
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from conversion import write_sparse
from processes import SAILVIT, idle_bytes, measure
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.serialization import skip_data

from sailvit.convert.models.aimv2_names import LAYOUTS
from sailvit.convert.models.name_tables import tensor_specs
from sailvit.convert.storage.tensors import NewTensor
from sailvit.convert.synthetic import apple_config, published_shape


SHARD = 200_000_000
RANKS = 4
SHAPE = published_shape("large")
READ = """
import sys
from pathlib import Path
import torch, transformers
from sailvit.convert import convert_checkpoint
def count(): return int(Path("/proc/self/io").read_text().split()[1])
before = count()
convert_checkpoint(sys.argv[1], sys.argv[2], part="vision", dtype="float32", verify=False)
print(count() - before)
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """Large, and 1.04 billion parameters after it: with the moments of the optimizer 16 GB."""
    tower = {f"vision_model.{piece.name}": piece.shape for piece in tensor_specs(LAYOUTS["sailvit"], SHAPE)}
    layers = {f"language_model.model.layers.{n}.mlp.up_proj.weight": (8960, 1536) for n in range(54)}
    return tower | layers | {"language_model.model.embed_tokens.weight": (151_936, 1536), "mlp1.1.weight": (1536, 4096)}


def write_shards(root: Path) -> Path:
    """A larger language model, since there are no moments."""
    more = {f"language_model.model.layers.{n}.mlp.down_proj.weight": (1536, 8960) for n in range(200)}
    write_sparse(root, [NewTensor(name, "F32", shape, iter) for name, shape in (shapes() | more).items()])
    return root


def write_zero(root: Path) -> Path:
    """ZeRO-3: every parameter in one share a rank, in float32, with two moments."""
    folder = root / "global_step1"
    folder.mkdir(parents=True)
    (root / "latest").write_text(folder.name)
    each = sum(-(-prod(shape) // RANKS) for shape in shapes().values())
    common = {"param_shapes": [OrderedDict((name, torch.Size(shape)) for name, shape in shapes().items())]}
    for rank in range(RANKS):
        model = {"module": {}, **common, "dp_world_size": RANKS, "global_steps": 1}
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        moments = {0: {"exp_avg": torch.empty(each), "exp_avg_sq": torch.empty(each)}}
        state = {"zero_stage": 3, "partition_count": RANKS, "optimizer_state_dict": {"state": moments}}
        with skip_data():
            file = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save({"optimizer_state_dict": {**state, "fp32_flat_groups": [torch.empty(each)]}}, file)
    return root


def write_boxes(root: Path) -> Path:
    """FSDP: every parameter and its moments in one box a rank, rows of it."""
    folder = root / "pytorch_model_fsdp_0"
    folder.mkdir(parents=True)
    described, planned, storage = {}, {}, {}
    for rank in range(RANKS):
        with (folder / f"__{rank}_0.distcp").open("wb") as file, tempfile.TemporaryDirectory() as scratch:
            for name, way, shape in entries():
                share = -(-shape[0] // RANKS)
                rows = max(min(share, shape[0] - rank * share), 0)
                offsets = torch.Size([min(rank * share, shape[0]), *[0] * (len(shape) - 1)])
                box = dcp.ChunkStorageMetadata(offsets, torch.Size([rows, *shape[1:]]))
                length = append_sparse(file, torch.empty(box.sizes), Path(scratch) / "box")
                storage[dcp.MetadataIndex(name, offsets)] = _StorageInfo(file.name.split("/")[-1], *length)
                known = described.setdefault(
                    name, dcp.TensorStorageMetadata(dcp.TensorProperties(torch.float32), torch.Size(shape), [])
                )
                known.chunks.append(box)
                planned[name] = way
    (folder / ".metadata").write_bytes(pickle.dumps(dcp.Metadata(described, planned, storage)))
    return root


def entries() -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Name, place among nested states and shape of every parameter and of its moments."""
    for name, shape in shapes().items():
        yield f"model.{name}", ("model", name), shape
        for moment in ("exp_avg", "exp_avg_sq"):
            yield f"optimizer.{name}.{moment}", ("optimizer", name, moment), shape


def append_sparse(file, tensor: torch.Tensor, scratch: Path) -> tuple[int, int]:
    """Where it begins and its bytes; what torch.save would write of the numbers is a hole."""
    with skip_data():
        torch.save(tensor, scratch)
    start, size = file.tell(), scratch.stat().st_size
    with scratch.open("rb") as saved:
        head = saved.read(min(size, 1 << 16))
        file.write(head)
        saved.seek(max(size - (1 << 16), len(head)))
        tail = saved.read()
    file.seek(start + size - len(tail))
    file.write(tail)
    scratch.unlink()
    return start, size


def report(root: Path, title: str) -> None:
    (root / "config.json").write_text(json.dumps({"vision_config": apple_config(SHAPE)}))
    size = sum(file.stat().st_size for file in root.rglob("*"))
    tower = {name: 4 * prod(shape) for name, shape in shapes().items() if name.startswith("vision_model.")}
    limit = 1.5 * max(tower.values()) + SHARD
    floor = idle_bytes()
    for dtype in ("float32", "bfloat16"):
        out = root.parent / f"{root.name}-{dtype}"
        command = [*SAILVIT, "convert", root, out, "--part", "vision", "--no-verify", "--dtype", dtype]
        seconds, peak = measure(*command, "--max-shard-size", SHARD)
        print(
            f"{title}, {size / 1e9:.1f} GB, to {dtype}: {seconds:.1f} s, {(peak - floor) / limit:.2f} of the limit "
            f"({(peak - floor) / 1e6:.0f} MB more than {floor / 1e6:.0f})"
        )
    if Path("/proc/self/io").exists():
        script = "import importlib.util as u, sys; sys.modules['sailvit'] = u.module_from_spec(u.find_spec('sailvit'))"
        command = [sys.executable, "-c", script + READ, root, root.parent / f"{root.name}-read"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"{title}: {int(done.stdout) / sum(tower.values()):.3f}x the bytes of the tower are read")


def main() -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        report(write_shards(Path(folder) / "shards"), "shards")
        report(write_zero(Path(folder) / "zero"), f"ZeRO-3 of {RANKS} ranks")
        report(write_boxes(Path(folder) / "boxes"), f"FSDP of {RANKS} ranks")


if __name__ == "__main__":
    main()
