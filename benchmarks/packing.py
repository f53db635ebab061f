"""
Benchmark of packing inside the optimizer step.

Loss and gradients of a packed step against one sample a row. Balance of a step of 512 samples against first-fit packing
per rank and one sample per micro-step; time of planning. 10 million rows: memory of a node and seconds to the first
plan, in fresh processes. Useful tokens per second of a training step at toy size against padded batches. Pictures with
seven independent questions, with a shared prompt and without, against a sample per question. Tiles as uint8 through a
DataLoader against float32. Lengths, see lengths.py.

    python benchmarks/packing.py                          # everything
    python benchmarks/packing.py balance rows             # some of it
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lengths
import numpy as np
import torch
from timing import medians, print_ratios
from torch.utils.data import DataLoader, Dataset

from sailvit import SAILViTConfig, SAILViTImageProcessor, SAILVLConfig, SAILVLForConditionalGeneration
from sailvit.encode.demo import PHOTOGRAPH
from sailvit.train.attention import PER_SAMPLE, attention_arguments
from sailvit.train.collate import EncodedSample, Pack, collate, normalize_tiles
from sailvit.train.loss import answer_weights, pack_loss
from sailvit.train.packing import PackedBatches, plan_step, tile_cost


Plan = list[list[list[int]]]  # [rank][pack] -> samples

SAMPLES, MAX_TOKENS = 512, 8192
QWEN = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def long_tailed_mix(rng: np.random.Generator, count: int, tile_tokens: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and tiles of samples: 10% text only, else 1 to 9 tiles; log-normal answers."""
    scale = tile_tokens / 256
    tiles = np.where(rng.random(count) < 0.1, 0, rng.integers(1, 10, count))
    text = (40 + rng.lognormal(math.log(120), 1, count).clip(1, 4000)) * scale
    return (tile_tokens * tiles + text).astype(np.int32) + 2, tiles.astype(np.int32)


# Balance


def first_fit(tokens: np.ndarray, ranks: int) -> Plan:
    """Pack the samples of every rank by themselves, each into the first pack with room."""
    plan = []
    for rank in range(ranks):
        packs, room = [], []
        for sample in range(rank, len(tokens), ranks):
            index = next((i for i, free in enumerate(room) if free >= tokens[sample]), len(packs))
            if index == len(packs):
                packs.append([])
                room.append(MAX_TOKENS)
            packs[index].append(sample)
            room[index] -= tokens[sample]
        plan.append(packs)
    most = max(map(len, plan))
    return [packs + [[]] * (most - len(packs)) for packs in plan]


def one_by_one(count: int, ranks: int) -> Plan:
    return [[[sample] for sample in range(rank, count, ranks)] for rank in range(ranks)]


def relative_time(plan: Plan, costs: np.ndarray) -> float:
    """Return the time of a step whose micro-steps last as long as their slowest rank / time if no rank waited."""
    loads = np.array([[costs[pack].sum() for pack in packs] for packs in plan])
    return loads.max(0).sum() / (costs.sum() / len(plan))


def balance(steps: int = 60) -> None:
    cost = tile_cost(SAILVLConfig(SAILViTConfig.from_size("large"), QWEN))
    print(f"\ncost of a tile, Large with a language model of 1.5B: {cost:.0f} tokens, {cost / 256:.2f} times its own")
    for ranks in (8, 64):
        times, seconds, sizes = {"packed": [], "first-fit per rank": [], "one sample a micro-step": []}, [], []
        for step in range(steps):
            tokens, tiles = long_tailed_mix(np.random.default_rng(step), SAMPLES)
            started = time.perf_counter()
            plan = plan_step(tokens, tiles, ranks, MAX_TOKENS, None, cost)
            seconds.append(time.perf_counter() - started)
            sizes.append(len(plan[0]))
            plans = (plan, first_fit(tokens, ranks), one_by_one(SAMPLES, ranks))
            for name, candidate in zip(times, plans, strict=True):
                times[name].append(relative_time(candidate, tokens + cost * tiles))
        print(f"{ranks} ranks, {SAMPLES} samples, {MAX_TOKENS} tokens a pack: time of a step / ideal, {steps} steps")
        for name, values in times.items():
            print(f"{statistics.mean(values):6.3f}  (worst {max(values):.3f})  {name}")
        milliseconds = f"{statistics.median(seconds) * 1e3:.1f} ms (worst {max(seconds) * 1e3:.1f})"
        print(f"planning: {milliseconds} a step; {min(sizes)} to {max(sizes)} packs per rank")


# Rows


class LengthsOnly:
    """A corpus of memory-mapped lengths in a folder, to plan with."""

    def __init__(self, folder: Path):
        self.tokens, self.tiles = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "tiles"))
        self.processor = SimpleNamespace(image_seq_length=256)
        self.cache_dir, self.fingerprint = folder / "cache", "rows"

    def __len__(self) -> int:
        return len(self.tokens)

    def fit(self, max_tokens: int, max_tiles: int | None, too_long: str) -> "LengthsOnly":
        return self


def plan_once(folder: Path, rank: int, step: int) -> None:
    """Run in a process of its own: plan one step and print the seconds that took, without imports."""
    started = time.perf_counter()
    batches = PackedBatches(LengthsOnly(folder), SAMPLES, ranks=2, rank=rank, epochs=2)
    batches.plan(min(step, len(batches) - 1))
    print(json.dumps(time.perf_counter() - started), flush=True)
    sys.stdin.readline()  # stay in memory until the other process is done


def proportional_megabytes(process: int) -> float:
    """Return the memory of a process, with its share of what it shares; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0) * 1024 / 1e6


def run_node(folder: Path, step: int) -> tuple[float, float, float]:
    """Plan a step in two fresh processes; return peak MB together, seconds from start and seconds without imports."""
    command = [sys.executable, __file__, "--plan-once", folder, "--step", step, "--rank"]
    started, peak = time.perf_counter(), 0.0
    processes = [
        subprocess.Popen([str(part) for part in [*command, rank]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        os.set_blocking(process.stdout.fileno(), False)
    outputs = [b""] * 2
    while not all(outputs):
        peak = max(peak, sum(proportional_megabytes(process.pid) for process in processes))
        outputs = [output or process.stdout.read() or b"" for output, process in zip(outputs, processes, strict=True)]
        if any(process.poll() for process in processes):
            raise RuntimeError(f"{command} failed")
        time.sleep(0.01)
    elapsed = time.perf_counter() - started
    for process in processes:
        process.communicate(b"\n")
    return peak, elapsed, max(map(float, outputs))


def rows() -> None:
    print("\ntwo processes of a node, fresh, with an empty cache; PSS of both together")
    imports = None  # memory that a small corpus needs, too
    for count, steps in ((10_000, [0]), (10_000_000, [0, 35_000])):
        for step in steps:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                for name, lengths in zip(
                    ("tokens", "tiles"), long_tailed_mix(np.random.default_rng(0), count), strict=True
                ):
                    np.save(folder / f"{name}.npy", lengths)
                peak, elapsed, planning = run_node(folder, step)
                _, resumed, replanning = run_node(folder, step)
            imports = peak if imports is None else imports
            print(f"{count:,} rows, step {step:,}: {peak:.0f} MB, {peak - imports:.0f} more than for the small corpus")
            for name, seconds in {"empty cache": (elapsed, planning), "later": (resumed, replanning)}.items():
                print(f"    first plan after {seconds[0]:4.1f} s, without imports {seconds[1]:5.2f} s  {name}")


# Useful tokens per second


IMAGE_TOKEN = 1000

# Vision encoders whose share of the cost of a toy is that of SAILViT-Large with a language model of this size.
TOY_VISION = {
    "1.5B": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 3},
    "7B": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 1},
}
TOY_TEXT = {
    **QWEN, "vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4,
    "num_attention_heads": 6,
}  # fmt: skip


def toy_model(like: str = "1.5B") -> SAILVLForConditionalGeneration:
    """Return a model whose encoder, language model and LM head cost about as much, in proportion, as real ones."""
    vision = SAILViTConfig(**TOY_VISION[like], image_size=112)
    return SAILVLForConditionalGeneration(SAILVLConfig(vision, dict(TOY_TEXT), image_token_id=IMAGE_TOKEN)).train()


def random_samples(config: SAILVLConfig, count: int, uint8_tiles: bool = False) -> list[EncodedSample]:
    """Return samples of a long-tailed mix for a model: random tokens, of which the text is supervised, random tiles."""
    size, tile_tokens = config.vision_config.image_size, config.image_seq_length
    tokens, tiles = long_tailed_mix(np.random.default_rng(0), count, tile_tokens)
    generator, samples = torch.Generator().manual_seed(0), []
    for length, num_tiles in zip(tokens.tolist(), tiles.tolist(), strict=True):
        visual = num_tiles * tile_tokens
        ids = torch.randint(0, config.image_token_id, (length,), generator=generator)
        ids[:visual] = config.image_token_id
        shape = (num_tiles, 3, size, size)
        if uint8_tiles:
            pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        else:
            pixels = torch.randn(shape, generator=generator)
        labels = ids.masked_fill(torch.arange(length) < visual + 2, -100)
        samples.append(EncodedSample(ids, labels, pixels if num_tiles else None))
    return samples


def padded(samples: list[EncodedSample], rows: int) -> list[dict[str, Any]]:
    """Return batches of `rows` samples in their order, padded to the longest, with an attention mask."""
    batches = []
    for start in range(0, len(samples), rows):
        batch = samples[start : start + rows]
        pad = torch.nn.utils.rnn.pad_sequence
        inputs = {
            "input_ids": pad([s.input_ids for s in batch], batch_first=True),
            "labels": pad([s.labels for s in batch], batch_first=True, padding_value=-100),
            "attention_mask": pad([torch.ones_like(s.input_ids) for s in batch], batch_first=True),
            "use_cache": False,
        }
        if tiles := [s.tiles for s in batch if s.tiles is not None]:
            inputs["pixel_values"] = torch.cat(tiles)
        batches.append(inputs)
    return batches


def packed(samples: list[EncodedSample], config: SAILVLConfig, max_tokens: int | None = None) -> list[Pack]:
    """Return the packs of a step; by default of MAX_TOKENS, scaled to the visual tokens of a tile."""
    max_tokens = max_tokens or MAX_TOKENS * config.image_seq_length // 256
    tokens, tiles = ([len(t) if t is not None else 0 for t in column] for column in
                     ([s.input_ids for s in samples], [s.tiles for s in samples]))  # fmt: skip
    (packs,) = plan_step(tokens, tiles, 1, max_tokens, None, tile_cost(config))
    return [collate([samples[index] for index in pack], pack) for pack in packs]


COMPONENTS = {"vision": "vision_model", "connector": "mlp1", "language": "language_model"}


def loss_of_rows(model: SAILVLForConditionalGeneration, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """Return the share of rows in the loss of a step, as an unmodified Trainer computes it."""
    inputs = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
    return model(**inputs, num_items_in_batch=labels).loss


def loss_of_pack(model: SAILVLForConditionalGeneration, pack: Pack, labels: torch.Tensor) -> torch.Tensor:
    """Return the share of a pack in the loss of a step, as `SAILVLTrainer` computes it."""
    inputs = pack.to(model.device).inputs | attention_arguments(model, pack.segments)
    loss, _ = pack_loss(model, inputs, answer_weights(pack, "token").to(model.device), keeps_logits=True)
    return loss / labels


def gradients(model: SAILVLForConditionalGeneration, losses: Iterable[torch.Tensor]) -> tuple[float, Any]:
    """Return the loss of a step and the gradient of every component."""
    model.zero_grad()
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    parts = {name: getattr(model, attribute) for name, attribute in COMPONENTS.items()}
    flat = {name: torch.cat([p.grad.flatten() for p in part.parameters()]).double() for name, part in parts.items()}
    return total, flat


def count_labels(samples: list[EncodedSample]) -> torch.Tensor:
    return torch.tensor(sum(int((sample.labels != -100).sum()) for sample in samples))


def agreement(device: torch.device | str = "cpu", precision: str = "float32") -> dict[str, dict[str, float]]:
    """Return, for each attention, the relative difference of a packed step to one sample a row: loss and gradients."""
    model = toy_model().to(device)
    samples = random_samples(model.config, 32)
    labels, packs = count_labels(samples).to(device), packed(samples, model.config)
    figures = {}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        separate, expected = gradients(model, (loss_of_rows(model, collate([s]).inputs, labels) for s in samples))
        for attention in ("sdpa", PER_SAMPLE):
            model.language_model.set_attn_implementation(attention)
            loss, found = gradients(model, (loss_of_pack(model, pack, labels) for pack in packs))
            figures[attention] = _differences(loss, found, separate, expected)
            print(f"\na packed step with {attention}, against one sample a row:")
            for name, value in figures[attention].items():
                print(f"{value:8.1e}  {name}")
    return figures


def _differences(loss: float, found: Any, separate: float, expected: Any) -> dict[str, float]:
    cosine = torch.nn.functional.cosine_similarity
    gradients = {f"gradient of {name}, 1 - cosine": 1 - cosine(found[name], expected[name], dim=0) for name in found}
    return {"loss, relative": abs(loss - separate) / separate, **{name: float(v) for name, v in gradients.items()}}


def throughput(rounds: int = 5) -> None:
    for like in TOY_VISION:
        compare_steps(like, rounds)


def compare_steps(like: str, rounds: int) -> None:
    """Compare steps as `SAILVLTrainer` and an unmodified Trainer do them: the first has no logits without a label."""
    model = toy_model(like)
    samples = random_samples(model.config, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    labels, cost = count_labels(samples), tile_cost(model.config)

    def train(attention: str, loss: Callable[..., torch.Tensor], batches: list[Any]) -> None:
        model.language_model.set_attn_implementation(attention)
        optimizer.zero_grad()
        for batch in batches:
            loss(model, batch, labels).backward()
        optimizer.step()

    packs = packed(samples, model.config)
    steps = {"packed": (PER_SAMPLE, loss_of_pack, packs), "packed, sdpa with a mask": ("sdpa", loss_of_pack, packs)}
    steps |= {f"padded, {size} rows": ("sdpa", loss_of_rows, padded(samples, size)) for size in (4, 8, 16)}
    seconds = medians({name: lambda step=step: train(*step) for name, step in steps.items()}, rounds)
    useful = sum(len(sample.input_ids) for sample in samples)
    ratio = cost / model.config.image_seq_length
    print(f"\nas with a language model of {like}: a tile costs {ratio:.2f} times as much as its tokens")
    print(f"a training step of {len(samples)} samples, {useful} useful tokens, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        rows = [getattr(batch, "inputs", batch)["input_ids"] for batch in steps[name][2]]
        positions = sum(ids.numel() for ids in rows)
        print(f"{useful / value:8.0f} useful tokens/s  {useful / positions:4.0%} of positions useful  {name}")
    others = {name: value / seconds["packed"] for name, value in seconds.items() if name != "packed"}
    print_ratios("useful tokens per second, packed / other", others)


# Independent turns

QUESTIONS = 7  # about a picture: a caption and six short ones
# A world of 32-pixel pictures.
MINIATURE_VISION = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 4,
    "image_size": 32,
}  # fmt: skip
MINIATURE_TEXT = {
    **QWEN, "vocab_size": 1024, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def miniature() -> SAILVLForConditionalGeneration:
    config = SAILVLConfig(SAILViTConfig(**MINIATURE_VISION), dict(MINIATURE_TEXT), image_token_id=IMAGE_TOKEN)
    return SAILVLForConditionalGeneration(config).train()


def pictures(config: SAILVLConfig, count: int, tiles: int, text: int) -> dict[str, list[EncodedSample]]:
    """Return pictures with questions of `text` tokens each, as one sample a picture and as one a question."""
    size, visual, answer = config.vision_config.image_size, tiles * config.image_seq_length, max(1, text // 8)
    shared, repeated, separate = [], [], []
    for _ in range(count):
        ids = torch.randint(0, config.image_token_id, (QUESTIONS, visual + text))
        ids[:, :visual] = config.image_token_id
        labels = ids.masked_fill(torch.arange(visual + text) < visual + text - answer, -100)
        pixels, indices = torch.randn(tiles, 3, size, size), torch.arange(tiles).repeat(QUESTIONS)
        splits = (visual + text,) * QUESTIONS
        repeated.append(EncodedSample(ids.flatten(), labels.flatten(), pixels, indices, splits))
        once, own = (torch.cat([rows[0], rows[1:, visual:].flatten()]) for rows in (ids, labels))
        shared.append(EncodedSample(once, own, pixels, None, (visual + text, *[text] * (QUESTIONS - 1)), visual))
        separate += [EncodedSample(*row, pixels) for row in zip(ids, labels, strict=True)]
    return {"a sample a picture": shared, "the same, prompt repeated": repeated, "a sample a question": separate}


def questions(rounds: int = 5) -> None:
    compare_questions("the miniature, 1 tile", miniature(), 32, 1, 24, rounds, MAX_TOKENS)
    for tiles in (1, 3):
        scale = toy_model().config.image_seq_length / 256
        compare_questions(f"as with 1.5B, {tiles} tile(s)", toy_model(), 8, tiles, round(48 * scale), rounds)


def compare_questions(
    name: str,
    model: SAILVLForConditionalGeneration,
    count: int,
    tiles: int,
    text: int,
    rounds: int,
    max_tokens: int | None = None,
) -> None:
    """Compare steps of `SAILVLTrainer` on the same questions, with a sample for each picture or for each question."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.language_model.set_attn_implementation(PER_SAMPLE)
    kinds = pictures(model.config, count, tiles, text)
    labels = count_labels(kinds["a sample a picture"])

    def train(packs: list[Pack]) -> None:
        optimizer.zero_grad()
        for pack in packs:
            loss_of_pack(model, pack, labels).backward()
        optimizer.step()

    packs = {kind: packed(samples, model.config, max_tokens) for kind, samples in kinds.items()}
    seconds = medians({kind: lambda own=own: train(own) for kind, own in packs.items()}, rounds)
    ratio = tile_cost(model.config) / model.config.image_seq_length
    print(f"\n{name}: a tile costs {ratio:.2f} times as much as its tokens; {QUESTIONS} questions a picture")
    for kind, value in seconds.items():
        print(f"{count / value:8.1f} pictures/s, {QUESTIONS * count / value:8.1f} questions/s  {kind}")
    print_ratios(
        "speed, a sample a question = 1", {kind: seconds["a sample a question"] / own for kind, own in seconds.items()}
    )


# Tiles through a DataLoader


class Photos(Dataset):
    """Packs of three photos each, as one step."""

    def __init__(self, uint8_tiles: bool, packs: int):
        self.processor, self.packs, self.uint8_tiles = SAILViTImageProcessor(), packs, uint8_tiles
        self.options = {"do_rescale": False, "do_normalize": False} if uint8_tiles else {}

    def __len__(self) -> int:
        return self.packs

    def __getitem__(self, index: int) -> Pack:
        tiles = self.processor([str(PHOTOGRAPH)] * 3, **self.options)["pixel_values"]
        tiles = tiles.to(torch.uint8) if self.uint8_tiles else tiles
        ids = torch.zeros(len(tiles) * 256, dtype=torch.long)
        return collate([EncodedSample(ids, ids, tiles)])


def tiles(rounds: int = 7, packs: int = 8) -> dict[str, float]:
    """Return the seconds of a pack of float32 and of uint8 tiles, from a worker to the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    datasets = {"float32": Photos(False, packs), "uint8": Photos(True, packs)}
    sizes = {name: dataset[0].inputs["pixel_values"].nbytes for name, dataset in datasets.items()}
    processor = SAILViTImageProcessor()

    def consume(dataset: Photos) -> None:
        for pack in DataLoader(dataset, batch_size=None, num_workers=1, pin_memory=device == "cuda"):
            pixels = pack.to(device, non_blocking=True).inputs["pixel_values"]
            if dataset.uint8_tiles:
                normalize_tiles(pixels, processor)

    seconds = medians({name: lambda dataset=dataset: consume(dataset) for name, dataset in datasets.items()}, rounds)
    print(f"\ntiles from one worker to {device}, normalised")
    for name, value in seconds.items():
        print(f"{value / packs * 1e3:7.0f} ms and {sizes[name] / 1e6:5.1f} MB a pack  {name}")
    print_ratios("speed, float32 = 1", {"uint8": seconds["float32"] / seconds["uint8"]})
    return {name: value / packs for name, value in seconds.items()}


PARTS = {
    "agreement": agreement, "balance": balance, "rows": rows, "throughput": throughput, "questions": questions,
    "tiles": tiles, "lengths": lengths.main,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)} (all)")
    parser.add_argument("--plan-once", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: expected {', '.join(PARTS)}")
    if options.plan_once:
        plan_once(options.plan_once, options.rank, options.step)
        return
    torch.manual_seed(0)
    for name in options.parts or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
