"""
Benchmark of memory estimates: the estimate / the peak memory of training, for three shapes, with and without gradient
checkpointing, logits at supervised positions.

The estimate counts weights, gradients, both moments of AdamW, activations and logits (sailvit.train.memory). It does
not count what libraries allocate for themselves, and what an allocator keeps or cannot use.

Every measurement trains on two packs and steps, twice. On a CPU it is a fresh process in float32; what it used before
it built the model does not count. malloc returns what is freed (MALLOC_MMAP_THRESHOLD_), so that resident memory is
that of tensors. On a GPU, if there is one, it is torch.cuda.max_memory_allocated, in float32 and bfloat16.

With --fsdp2 the same under FSDP2 on two ranks (gloo, Linux), where the weights before they are sharded do not count.

    python benchmarks/memory_estimate.py
    python benchmarks/memory_estimate.py --fsdp2
"""

import argparse
import gc
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sailvit import SAILVLConfig, SAILVLForConditionalGeneration
from sailvit.train.components import enable_checkpointing
from sailvit.train.flops import COMPONENTS, blocks_of, meta_model
from sailvit.train.log import peak_bytes
from sailvit.train.memory import PackShape, memory_of_engines


SMALL_VISION = {
    "model_type": "sailvit", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
    "num_attention_heads": 4, "image_size": 224,
}  # fmt: skip
SMALL_LANGUAGE = {
    "model_type": "qwen2", "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip
WIDE_LANGUAGE = {**SMALL_LANGUAGE, "vocab_size": 32768, "hidden_size": 768, "intermediate_size": 3072}
EVERYTHING = list(COMPONENTS)
# Activations, weights and optimizer, logits take most of the memory, in this order.
SHAPES: dict[str, dict[str, Any]] = {
    "activations": {"text": SMALL_LANGUAGE, "trainable": ["connector"], "pack": [2048, 16, 200]},
    "weights": {"text": WIDE_LANGUAGE, "trainable": EVERYTHING, "pack": [256, 3, 40]},
    "logits": {
        "text": {**SMALL_LANGUAGE, "vocab_size": 65536, "tie_word_embeddings": True},
        "trainable": ["vision", "connector"],
        "pack": [1024, 4, 700],
    },
}
PRECISIONS = ("float32", "bfloat16")
CHECKPOINTED: dict[str, tuple[str, ...]] = {"none": (), "both": ("vision", "language")}
CPU = torch.device("cpu")
FSDP_RANKS = 2


def make_config(shape: dict[str, Any]) -> SAILVLConfig:
    return SAILVLConfig(vision_config=SMALL_VISION, text_config=shape["text"], image_token_id=3)


def estimated_bytes(name: str, precision: str, checkpointed: str = "none", engine: str = "single") -> float:
    """Return the estimate; `checkpointed` is a key of CHECKPOINTED."""
    shape = SHAPES[name]
    model = meta_model(make_config(shape), shape["trainable"])
    ranks = 1 if engine == "single" else FSDP_RANKS
    pack, components = PackShape(*shape["pack"]), CHECKPOINTED[checkpointed]
    return memory_of_engines(model, [engine], ranks, pack, precision, components)[engine].total


def measured_bytes(name: str, precision: str, checkpointed: str = "none", engine: str = "single") -> float:
    """Return the peak memory of a process that trains, above what it used before it built the model."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(FSDP_RANKS)]
    script = [__file__, "--measure", name, precision, checkpointed]
    command = [sys.executable, *([] if engine == "single" else launcher), *script]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return float(output.splitlines()[-1])


def measured_bytes_of_gpu(name: str, precision: str, checkpointed: str = "none") -> float:
    """Return the peak of tensors on the GPU while it trains, above what was there before."""
    warm_up("cuda")
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step_twice(build(name, checkpointed).to("cuda"), name, precision)
    return torch.cuda.max_memory_allocated() - before


def train(name: str, precision: str, checkpointed: str) -> float:
    """Train two steps of two packs; return the bytes of the peak above the start."""
    warm_up()
    before = peak_bytes(CPU)
    model = build(name, checkpointed)
    step_twice(model, name, precision)
    return peak_bytes(CPU) - before


def train_sharded(name: str, precision: str, checkpointed: str) -> int:
    """As `train`, on one of several ranks under FSDP2; weights are sharded when the measurement starts."""
    warm_up()
    dist.init_process_group("gloo")
    model = build(name, checkpointed)
    policy = MixedPrecisionPolicy(*[torch.bfloat16] * 3) if precision == "bfloat16" else MixedPrecisionPolicy()
    vision, text = model.config.vision_config, model.config.text_config
    for block in [*blocks_of(model.vision_model, vision), *blocks_of(model.get_decoder(), text)]:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    before = resident - sum(parameter.to_local().nbytes for parameter in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak below
    step_twice(model, name, "float32")
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    dist.barrier()
    dist.destroy_process_group()
    return 1024 * int(peak.split()[1]) - before


def build(name: str, checkpointed: str) -> SAILVLForConditionalGeneration:
    shape = SHAPES[name]
    model = SAILVLForConditionalGeneration(make_config(shape)).train()
    for component, module in COMPONENTS.items():
        getattr(model, module).requires_grad_(component in shape["trainable"])
    enable_checkpointing(model, CHECKPOINTED[checkpointed])
    return model


def step_twice(model: SAILVLForConditionalGeneration, name: str, precision: str) -> None:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    is_fused = model.device.type == "cuda"  # as in training
    optimizer = torch.optim.AdamW(trained, fused=is_fused, foreach=False)
    for _ in range(2):
        for _ in range(2):
            train_on_pack(model, PackShape(*SHAPES[name]["pack"]), precision)
        optimizer.step()
        optimizer.zero_grad()


def warm_up(device: str = "cpu") -> None:
    """Run the libraries once, which allocate buffers of their own."""
    layer = torch.nn.Linear(64, 64, device=device)
    with torch.autocast(device, torch.bfloat16):
        layer(torch.ones(64, 64, device=device)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()


def train_on_pack(model: SAILVLForConditionalGeneration, pack: PackShape, precision: str) -> None:
    """Run a pack of samples with one tile each, the rest of the tokens in the last one."""
    visual, device = model.config.image_seq_length, model.device
    ids = torch.full((1, pack.tokens), 7, device=device)
    positions = torch.arange(pack.tokens, device=device)[None]
    for tile in range(pack.tiles):
        start = tile * (visual + 4)
        ids[0, start : start + visual] = model.config.image_token_id
        positions[0, start:] = torch.arange(pack.tokens - start, device=device)
    size = model.config.vision_config.image_size
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        kept = torch.arange(pack.tokens - pack.answers, pack.tokens, device=device)
        output = model(
            ids,
            torch.randn(pack.tiles, 3, size, size, device=device),
            position_ids=positions,
            logits_to_keep=kept,
            use_cache=False,
        )
        loss = torch.nn.functional.cross_entropy(output.logits[0].float(), ids[0, kept], reduction="sum")
    del output
    (loss / pack.answers).backward()


def compare_on_gpu() -> dict[str, float]:
    """Print and return the estimates / what the GPU allocates."""
    figures = {}
    for name, precision, checkpointed in itertools.product(SHAPES, PRECISIONS, CHECKPOINTED):
        key = f"{name}, {precision}, checkpointed: {checkpointed}"
        measured = measured_bytes_of_gpu(name, precision, checkpointed)
        figures[key] = print_estimate(f"GPU, {key}", estimated_bytes(name, precision, checkpointed), measured)
    return figures


def print_estimate(title: str, estimated: float, measured: float) -> float:
    """Print the estimate and the measurement; return estimate / measured."""
    ratio = estimated / measured
    print(f"{title:60} measured {measured / 1e6:6.0f} MB, estimate / measured {ratio:.3f}", flush=True)
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp2", action="store_true")
    parser.add_argument("--measure", nargs=3, metavar=("SHAPE", "PRECISION", "CHECKPOINTED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        peak = (train_sharded if "RANK" in os.environ else train)(*arguments.measure)
        if os.environ.get("RANK", "0") == "0":
            print(peak)
        return
    engine = "fsdp2" if arguments.fsdp2 else "single"
    for name, checkpointed in itertools.product(SHAPES, CHECKPOINTED):
        case = (name, "float32", checkpointed, engine)
        title = f"CPU, {engine}, {name}, float32, checkpointed: {checkpointed}"
        print_estimate(title, estimated_bytes(*case), measured_bytes(*case))
    if torch.cuda.is_available() and not arguments.fsdp2:
        compare_on_gpu()


if __name__ == "__main__":
    main()
