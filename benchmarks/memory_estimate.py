"""
Benchmark of memory estimates: peak resident memory of a training step / the estimate, for three shapes.

Every measurement is a process that trains on two packs and steps, twice, with AdamW; what it used before it built the
model does not count. malloc returns what is freed (MALLOC_MMAP_THRESHOLD_), so that resident memory is that of tensors.

The same under FSDP2 on two ranks (gloo, Linux), where the weights before they are sharded do not count.

    python benchmarks/memory_estimate.py
    python benchmarks/memory_estimate.py --fsdp2
"""

import argparse
import os
import resource
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
    "weights": {"text": WIDE_LANGUAGE, "trainable": EVERYTHING, "pack": [256, 3, 40], "checkpointed": ["language"]},
    "logits": {
        "text": {**SMALL_LANGUAGE, "vocab_size": 65536, "tie_word_embeddings": True},
        "trainable": ["vision", "connector"],
        "pack": [1024, 4, 700],
        "checkpointed": ["vision", "language"],
    },
}
PRECISIONS = ("float32", "bfloat16")
FSDP_RANKS = 2


def make_config(shape: dict[str, Any]) -> SAILVLConfig:
    return SAILVLConfig(vision_config=SMALL_VISION, text_config=shape["text"], image_token_id=3)


def estimated_bytes(name: str, precision: str, engine: str = "single") -> float:
    shape = SHAPES[name]
    model = meta_model(make_config(shape), shape["trainable"])
    pack, checkpointed = PackShape(*shape["pack"]), shape.get("checkpointed", ())
    ranks = 1 if engine == "single" else FSDP_RANKS
    return memory_of_engines(model, [engine], ranks, pack, precision, checkpointed)[engine].total


def measured_bytes(name: str, precision: str, engine: str = "single") -> float:
    """Return the peak memory of a process that trains, above what it used before it built the model."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(FSDP_RANKS)]
    command = [sys.executable, *([] if engine == "single" else launcher), __file__, "--measure", name, precision]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return float(output.splitlines()[-1])


def train(name: str, precision: str) -> int:
    """Train two steps of two packs; return the bytes of the peak above the start."""
    warm_up()
    before = peak_resident_bytes()
    model = build(name)
    step_twice(model, name, precision)
    return peak_resident_bytes() - before


def train_sharded(name: str, precision: str) -> int:
    """As `train`, on one of several ranks under FSDP2; weights are sharded when the measurement starts."""
    warm_up()
    dist.init_process_group("gloo")
    model = build(name)
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


def build(name: str) -> SAILVLForConditionalGeneration:
    shape = SHAPES[name]
    model = SAILVLForConditionalGeneration(make_config(shape)).train()
    for component, module in COMPONENTS.items():
        getattr(model, module).requires_grad_(component in shape["trainable"])
    enable_checkpointing(model, shape.get("checkpointed", ()))
    return model


def step_twice(model: SAILVLForConditionalGeneration, name: str, precision: str) -> None:
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], foreach=False)
    for _ in range(2):
        for _ in range(2):
            train_on_pack(model, PackShape(*SHAPES[name]["pack"]), precision)
        optimizer.step()
        optimizer.zero_grad()


def warm_up() -> None:
    """Run the libraries once, which allocate buffers of their own."""
    layer = torch.nn.Linear(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.ones(64, 64)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()


def train_on_pack(model: SAILVLForConditionalGeneration, pack: PackShape, precision: str) -> None:
    """Run a pack of samples with one tile each, the rest of the tokens in the last one."""
    visual = model.config.image_seq_length
    ids = torch.full((1, pack.tokens), 7)
    positions = torch.arange(pack.tokens)[None]
    for tile in range(pack.tiles):
        start = tile * (visual + 4)
        ids[0, start : start + visual] = model.config.image_token_id
        positions[0, start:] = torch.arange(pack.tokens - start)
    size = model.config.vision_config.image_size
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        kept = torch.arange(pack.tokens - pack.answers, pack.tokens)
        output = model(
            ids,
            torch.randn(pack.tiles, 3, size, size),
            position_ids=positions,
            logits_to_keep=kept,
            use_cache=False,
        )
        loss = torch.nn.functional.cross_entropy(output.logits[0].float(), ids[0, kept], reduction="sum")
    del output
    (loss / pack.answers).backward()


def peak_resident_bytes() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp2", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("SHAPE", "PRECISION"), help="in a process of its own")
    arguments = parser.parse_args()
    if arguments.measure:
        peak = (train_sharded if "RANK" in os.environ else train)(*arguments.measure)
        if os.environ.get("RANK", "0") == "0":
            print(peak)
        return
    engine = "fsdp2" if arguments.fsdp2 else "single"
    for name in SHAPES:
        for precision in PRECISIONS:
            measured, estimated = (function(name, precision, engine) for function in (measured_bytes, estimated_bytes))
            print(f"{name:12} {precision:9} measured {measured / 1e6:6.0f} MB = {measured / estimated:.3f} x estimate")


if __name__ == "__main__":
    main()
