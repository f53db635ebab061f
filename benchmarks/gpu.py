"""
All figures of a machine with one GPU, in one command and within 9 minutes, as one JSON.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --out gpu.json rate "train stage3, sdpa"    # some of the parts
    python benchmarks/gpu.py --out toy.json --toy                        # toy shapes, also on a CPU: tests this script

The file is written after every part. A part that fails has its error in it, and the others go on; a part that would
begin after the time is over is left out. Needs timm besides the package with its extra [train].

    rate        FLOP/s of a large matrix product, which HFU and MFU are stated of
    agreement   loss and gradients of a packed step against one sample a row
    generate    tokens per second of SAIL-VL with a language model of Qwen2.5-0.5B's shape
    encoder     images per second of Large against transformers' Aimv2VisionModel and timm; at the end compiled
    memory      estimates / torch.cuda.max_memory_allocated
    train       stages 2 and 3 with this package's recipes and trainer on samples of 1 to 9 tiles, packed, checkpointed;
                "padded": the same model and samples in transformers' Trainer, with padded batches
    tiles       uint8 tiles through a DataLoader to the GPU against float32
"""

import argparse
import gc
import json
import platform
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import memory_estimate
import multimodal
import numpy as np
import packing
import torch
import tower
import transformers
from timing import synchronize
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from sailvit import SAILViTConfig, SAILViTImageProcessor, SAILViTModel, SAILVLConfig, SAILVLForConditionalGeneration
from sailvit.devices import choose_device
from sailvit.train.collate import EncodedSample, Pack, collate
from sailvit.train.components import checkpointed_components, set_trainable
from sailvit.train.estimate import GIB, TrainingSettings, trained_meta_model
from sailvit.train.flops import Flops, sample_flops
from sailvit.train.memory import PackShape, memory_of_engines
from sailvit.train.packing import PackedBatches, tile_cost
from sailvit.train.recipe import Recipe, load_recipe
from sailvit.train.trainer import SAILVLTrainer, training_arguments


WARM_UP_STEPS = 2  # of training, not measured


@dataclass(frozen=True)
class Scale:
    """Shapes of the models, and how much is run."""

    vision: dict[str, Any]
    text: dict[str, Any]
    precision: str
    product: int
    tiles: tuple[int, ...]
    compiled_tiles: int
    rounds: int
    prompts: tuple[int, ...]
    new_tokens: int
    samples_per_step: int
    steps: int
    max_tokens_per_pack: int
    padded_rows: tuple[int, ...]
    image_token_id: int | None = None

    def config(self) -> SAILVLConfig:
        return SAILVLConfig(SAILViTConfig(**self.vision), dict(self.text), image_token_id=self.image_token_id)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)


FULL = Scale(
    vision={},  # Large
    text={**multimodal.QWEN, "num_hidden_layers": 24},
    precision="bfloat16",
    product=8192,
    tiles=(1, 16, 64),
    compiled_tiles=16,
    rounds=7,
    prompts=(1, 8),
    new_tokens=64,
    samples_per_step=64,
    steps=4,
    max_tokens_per_pack=8192,
    padded_rows=(8, 4, 2, 1),
)
TOY = Scale(
    vision=packing.TOY_VISION["7B"] | {"image_size": 112},
    text={**packing.TOY_TEXT, "num_hidden_layers": 2},
    precision="float32",
    product=256,
    tiles=(1,),
    compiled_tiles=1,
    rounds=1,
    prompts=(1,),
    new_tokens=2,
    samples_per_step=4,
    steps=2,
    max_tokens_per_pack=512,
    padded_rows=(2,),
    image_token_id=packing.IMAGE_TOKEN,
)


@dataclass
class Bench:
    """What the parts share: the scale, the device, and the figures of the parts before."""

    scale: Scale
    device: torch.device = field(default_factory=choose_device)
    figures: dict[str, Any] = field(default_factory=dict)


# Matrix rate, agreement, encoder, generate, memory


def rate(bench: Bench) -> dict[str, float]:
    """FLOP/s of a square product; also of the largest product of an encoder block."""
    size, dtype, device = bench.scale.product, bench.scale.dtype, str(bench.device)
    return {
        "FLOP/s": tower.product_rate(device, dtype, size, size, size, repeats=10),
        "FLOP/s of a block's product": tower.product_rate(device, dtype, repeats=10),
    }


def agreement(bench: Bench) -> dict[str, Any]:
    return {precision: packing.agreement(bench.device, precision) for precision in ("float32", "bfloat16")}


@torch.no_grad()
def encoder(bench: Bench, compile: bool = False) -> dict[str, Any]:
    """Images per second by tiles of a batch and model, and ratios to ours."""
    scale, figures = bench.scale, {}
    model = SAILViTModel(SAILViTConfig(**scale.vision)).to(bench.device, scale.dtype).eval()
    options = argparse.Namespace(device=bench.device, size="large", rounds=scale.rounds)
    for tiles in (scale.compiled_tiles,) if compile else scale.tiles:
        seconds = tower.compare(options, model, tiles, compile)
        images = {name: tiles / value for name, value in seconds.items()}
        modes = {name.split(" ", 1)[1] for name in images}
        ratios = {
            f"ours / {other}, {mode}": images[f"ours {mode}"] / images[f"{other} {mode}"]
            for mode in sorted(modes)
            for other in ("native", "timm")
        }
        figures[f"{tiles} tiles"] = {"images/s": images, "ratios": ratios}
    return figures


@torch.no_grad()
def generate(bench: Bench) -> dict[str, Any]:
    scale = bench.scale
    model = SAILVLForConditionalGeneration(scale.config()).to(bench.device, scale.dtype).eval()
    options = argparse.Namespace(rounds=scale.rounds, tokens=scale.new_tokens)
    return {f"{batch} prompts": multimodal.compare(options, model, batch) for batch in scale.prompts}


def memory(bench: Bench) -> dict[str, float]:
    if bench.device.type != "cuda":
        raise RuntimeError("memory of a GPU: no GPU; benchmarks/memory_estimate.py measures a CPU")
    return memory_estimate.compare_on_gpu()


# Training


class RandomCorpus(Dataset):
    """Encoded samples in memory, with what `PackedBatches` and the trainer ask a corpus for."""

    def __init__(self, samples: list[EncodedSample], config: SAILVLConfig, cache_dir: Path):
        size = config.vision_config.image_size
        image_processor = SAILViTImageProcessor(size={"height": size, "width": size})
        self.samples, self.cache_dir, self.fingerprint = samples, cache_dir, "random"
        self.processor = SimpleNamespace(image_seq_length=config.image_seq_length, image_processor=image_processor)
        self.tokens = np.array([len(sample.input_ids) for sample in samples])
        self.tiles = np.array([0 if sample.tiles is None else len(sample.tiles) for sample in samples])
        self.answers = np.array([int((sample.labels != -100).sum()) for sample in samples])
        self.kind_names, self.kinds = ("random",), np.zeros(len(samples), int)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EncodedSample:
        return self.samples[index]

    def fit(self, max_tokens: int, max_tiles: int | None, too_long: str) -> "RandomCorpus":
        return self

    def locate(self, index: int) -> tuple[str, int]:
        return "random", index


class RandomBatches(PackedBatches):
    """Packs of samples that are encoded already."""

    def __getitem__(self, step: int) -> list[Pack]:
        rank, flash = self.plan(step)[self.rank], self.flash_attention
        return [collate([self.corpus[i] for i in pack], pack, flash_attention=flash) for pack in rank]


class StepClock(TrainerCallback):
    """The time after every optimizer step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of all steps after the first ones."""
        return self.times[-1] - self.times[WARM_UP_STEPS - 1]


def make_recipe(bench: Bench, stage: str, attention: str) -> Recipe:
    scale, steps = bench.scale, WARM_UP_STEPS + bench.scale.steps
    shared_memory = Path("/dev/shm")
    workers = 2 if shared_memory.exists() and shutil.disk_usage(shared_memory).free > 4 * GIB else 0
    settings = {
        "samples_per_step": scale.samples_per_step, "max_steps": steps, "epochs": steps, "precision": scale.precision,
        "max_tokens_per_pack": scale.max_tokens_per_pack, "attn_implementation": attention, "workers": workers,
        "report_to": "[]", "engine": "single",
    }  # fmt: skip
    return load_recipe(stage, [f"{name}={value}" for name, value in settings.items()])


def make_model(bench: Bench, recipe: Recipe) -> SAILVLForConditionalGeneration:
    config = bench.scale.config()
    config._attn_implementation = recipe.attn_implementation
    with bench.device:
        model = SAILVLForConditionalGeneration(config).float()
    set_trainable(model, recipe)
    return model


def train(bench: Bench, stage: str, attention: str) -> dict[str, Any]:
    """HFU and MFU of the measured matrix rate, samples per second and memory of packed training."""
    recipe = make_recipe(bench, stage, attention)
    model, clock = make_model(bench, recipe), StepClock()
    with tempfile.TemporaryDirectory() as folder:
        samples = packing.random_samples(model.config, recipe.samples_per_step, uint8_tiles=True)
        corpus = RandomCorpus(samples, model.config, Path(folder))
        options = {"epochs": recipe.epochs, "uint8_tiles": True, "flash_attention": "flash" in attention}
        limits = (recipe.samples_per_step, recipe.max_tokens_per_pack)
        batches = RandomBatches(corpus, *limits, tile_cost=tile_cost(model.config), **options)
        arguments = training_arguments(recipe, Path(folder), len(batches), model, save_strategy="no")
        trainer = SAILVLTrainer(model, recipe, batches, folder, arguments, callbacks=[clock])
        trainer.train()
        rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    seconds = clock.seconds / bench.scale.steps
    flops = flops_of_step(model, recipe, corpus)
    estimate = estimated_memory(bench, recipe, batches)
    return {
        "seconds of a step": seconds,
        "samples/s": recipe.samples_per_step / seconds,
        "tokens/s": int(corpus.tokens.sum()) / seconds,
        "packs": len(batches.plan(0)[0]),
        "share of time waited for data": sum(row["wait_seconds"] for row in rows[WARM_UP_STEPS:]) / clock.seconds,
        **utilisation(bench, flops, seconds),
        **allocated(bench, estimate),
    }


def flops_of_step(model: SAILVLForConditionalGeneration, recipe: Recipe, corpus: RandomCorpus) -> Flops:
    sums = (int(lengths.sum()) for lengths in (corpus.tokens, corpus.tiles, corpus.answers))
    of_sample = sample_flops(model, checkpointed_components(recipe))
    return of_sample.of(*sums, squared_tokens=float((corpus.tokens.astype(float) ** 2).sum()))


def utilisation(bench: Bench, flops: Flops, seconds: float) -> dict[str, float]:
    """Return FLOP/s, and HFU and MFU if the matrix rate was measured."""
    figures = {"model FLOP/s": flops.model / seconds, "hardware FLOP/s": flops.hardware / seconds}
    if measured := bench.figures.get("rate", {}).get("FLOP/s"):
        figures |= {"MFU": flops.model / seconds / measured, "HFU": flops.hardware / seconds / measured}
    return figures


def estimated_memory(bench: Bench, recipe: Recipe, batches: RandomBatches) -> float:
    """Return the estimate for a pack with the most tokens, tiles and answers of all packs."""
    corpus, (packs,) = batches.corpus, batches.plan(0)
    lengths = (corpus.tokens, corpus.tiles, corpus.answers)
    shape = PackShape(*(max(int(of_sample[pack].sum()) for pack in packs) for of_sample in lengths))
    is_masked = "flash" not in recipe.attn_implementation
    model = trained_meta_model(bench.scale.config(), TrainingSettings.of(recipe))
    components = checkpointed_components(recipe)
    return memory_of_engines(model, ["single"], 1, shape, recipe.precision, components, is_masked)["single"].total


def allocated(bench: Bench, estimate: float) -> dict[str, float]:
    if bench.device.type != "cuda":
        return {"estimated GiB": estimate / GIB}
    peak = torch.cuda.max_memory_allocated()
    return {"peak GiB": peak / GIB, "estimated GiB": estimate / GIB, "estimate / peak": estimate / peak}


class PaddedBatches(Dataset):
    """Batches of the samples of a step, padded, for as many steps as asked."""

    def __init__(self, batches: list[dict[str, Any]], steps: int):
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return len(self.batches) * self.steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches[index % len(self.batches)]


def train_padded(bench: Bench, stage: str) -> dict[str, Any]:
    """Samples per second of transformers' Trainer with padded batches, of as many rows as fit."""
    for rows in bench.scale.padded_rows:
        try:
            return _train_padded(bench, stage, rows)
        except torch.OutOfMemoryError:
            print(f"padded batches of {rows} rows: out of memory", flush=True)
        free(bench)
    raise RuntimeError("padded batches: out of memory with a single row")


def _train_padded(bench: Bench, stage: str, rows: int) -> dict[str, Any]:
    recipe = make_recipe(bench, stage, "sdpa")
    model, clock = make_model(bench, recipe), StepClock()
    samples = packing.random_samples(model.config, recipe.samples_per_step)
    data = PaddedBatches(packing.padded(samples, rows), recipe.max_steps)
    with tempfile.TemporaryDirectory() as folder:
        options = {"save_strategy": "no", "gradient_accumulation_steps": len(data.batches), "dataloader_num_workers": 0}
        arguments = training_arguments(recipe, Path(folder), recipe.max_steps, model, **options)
        arguments.learning_rate = 1e-5  # one for all components; it has no influence on the time
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=lambda items: items[0], callbacks=[clock])
        trainer.train()
    seconds = clock.seconds / bench.scale.steps
    figures = {"seconds of a step": seconds, "samples/s": recipe.samples_per_step / seconds, "rows": rows}
    packed = bench.figures.get(f"train {stage}, sdpa", {}).get("samples/s")
    return figures | ({"packed / padded, samples/s": packed / figures["samples/s"]} if packed else {})


# All parts


def tiles(bench: Bench) -> dict[str, float]:
    return packing.tiles(bench.scale.rounds, 2)


# In the order in which they run: what others are stated of first, what takes longest last.
PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "rate": rate,
    "agreement": agreement,
    "train stage3, sdpa": lambda bench: train(bench, "stage3", "sdpa"),
    "train stage2, sdpa": lambda bench: train(bench, "stage2", "sdpa"),
    "padded stage3": lambda bench: train_padded(bench, "stage3"),
    "padded stage2": lambda bench: train_padded(bench, "stage2"),
    "encoder": encoder,
    "generate": generate,
    "memory": memory,
    "train stage3, flash_attention_2": lambda bench: train(bench, "stage3", "flash_attention_2"),
    "train stage2, flash_attention_2": lambda bench: train(bench, "stage2", "flash_attention_2"),
    "tiles": tiles,
    "encoder compiled": lambda bench: encoder(bench, compile=True),
}


def reason_to_skip(name: str, bench: Bench) -> str | None:
    if "flash" in name and find_spec("flash_attn") is None:
        return "flash_attn is not installed"
    if name == "memory" and bench.device.type != "cuda":
        return "no GPU"
    return None


def run_part(name: str, bench: Bench) -> dict[str, Any]:
    """Return the figures of a part and its seconds; an error is a figure, too."""
    if reason := reason_to_skip(name, bench):
        return {"skipped": reason}
    free(bench)
    started = time.perf_counter()
    try:
        figures = PARTS[name](bench)
    except Exception as error:  # the other parts go on
        traceback.print_exc()
        figures = {"error": f"{type(error).__name__}: {error}"[:2000]}
    synchronize()
    return figures | {"seconds of the part": time.perf_counter() - started}


def free(bench: Bench) -> None:
    """Free the memory of the part before."""
    gc.collect()
    torch._dynamo.reset()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def describe_machine(bench: Bench) -> dict[str, Any]:
    card = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else platform.processor() or "CPU"
    return {
        "card": card,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
    }


def run_all(names: list[str], bench: Bench, out: Path, minutes: float) -> None:
    """Run parts and write their figures to a JSON file after each."""
    deadline, report = time.monotonic() + 60 * minutes, {**describe_machine(bench), "parts": bench.figures}
    for name in names:
        late = {"skipped": f"{minutes:g} minutes were over"}
        bench.figures[name] = run_part(name, bench) if time.monotonic() < deadline else late
        print(f"{name}: {json.dumps(bench.figures[name])}", flush=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)} (all)")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--toy", action="store_true", help="toy shapes, also without a GPU")
    parser.add_argument("--minutes", type=float, default=7.5, help="no part begins after this time (7.5)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"unknown parts {', '.join(unknown)}: expected {', '.join(PARTS)}")
    if not options.toy and not torch.cuda.is_available():
        print("no GPU: expected one that torch can use; --toy runs toy shapes on a CPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    run_all(options.parts or list(PARTS), Bench(TOY if options.toy else FULL), options.out, options.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
