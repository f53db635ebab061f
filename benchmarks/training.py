"""
Benchmark of `sailvit train`'s trainer in one process.

overhead: a step of the trainer, with its reports to log.jsonl and TensorBoard, against a bare loop of forward,
backward, clipping and optimizer on the same tensors. The two take turns step by step.
waiting: the share of time that the trainer waits for one worker, which decodes a 448-pixel JPEG per sample.
head: logits at supervised positions against all, a vocabulary of 151,936: peak memory and time of a step.

torch has one thread: two wait for each other where another process needs the core of one.

    python benchmarks/training.py                         # everything
    python benchmarks/training.py overhead head           # some of it
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from lengths import ROOT, train_tokenizer
from PIL import Image
from processes import measure
from timing import medians, print_ratios

from sailvit import SAILViTConfig, SAILViTImageProcessor, SAILVLConfig, SAILVLForConditionalGeneration, SAILVLProcessor
from sailvit.encode.demo import PHOTOGRAPH
from sailvit.train import Corpus, Pack, PackedBatches, Recipe, load_recipe, normalize_tiles
from sailvit.train.collate import EncodedSample, collate
from sailvit.train.components import set_trainable
from sailvit.train.loss import answer_weights, pack_loss
from sailvit.train.trainer import SAILVLTrainer


TILE, PHOTOS = 448, 64  # pixels; JPEGs
STEPS, WARM_UP = 24, 4
SIZES = ((4, 320), (16, 320), (16, 1280))  # samples of a step, tokens of a pack
BASELINE = "no step"
HEADS = {"all positions": False, "supervised positions": True}  # contender -> whether it chooses positions
VOCABULARY, PACK_TOKENS, ANSWERS = 151_936, 1024, 128
QWEN = {
    "model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def toy_model(vocabulary: int, image_token: int, tile: int = TILE) -> SAILVLForConditionalGeneration:
    vision = SAILViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, image_size=tile
    )
    config = SAILVLConfig(vision, {**QWEN, "vocab_size": vocabulary}, image_token_id=image_token)
    return SAILVLForConditionalGeneration(config).train()


def write_corpus(folder: Path) -> Path:
    """Write PHOTOS photographs of 448 x 448 pixels, and a question and an answer about each."""
    generator = random.Random(0)
    photograph = Image.open(PHOTOGRAPH).convert("RGB").resize((2 * TILE, 2 * TILE))
    records = []
    for number in range(PHOTOS):
        left, top = generator.randrange(TILE), generator.randrange(TILE)
        photograph.crop((left, top, left + TILE, top + TILE)).save(folder / f"{number}.jpg", quality=90)
        turns = [("human", "<image>\nWhat is in the photograph?"), ("gpt", "A raccoon looks at you. " * 4)]
        conversation = [{"from": role, "value": text} for role, text in turns]
        records.append({"image": f"{number}.jpg", "conversations": conversation})
    (folder / "photos.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "corpus.yaml").write_text(json.dumps({"sources": [{"name": "photos", "path": "photos.jsonl"}]}))
    return folder / "corpus.yaml"


class Setting:
    """A corpus of photographs of one tile each, and a toy model, in a temporary folder."""

    def __init__(self, folder: Path, tile: int = TILE):
        datasets.disable_progress_bars()
        tokenizer = train_tokenizer([path.read_text() for path in sorted(ROOT.glob("docs/*.md"))])
        image_processor, visual_tokens = SAILViTImageProcessor(size=tile, max_tiles=1), (tile // 28) ** 2
        processor = SAILVLProcessor(image_processor, tokenizer, visual_tokens)
        self.folder, self.corpus = folder, Corpus.from_yaml(write_corpus(folder), processor, folder / "cache")
        self.model = toy_model(len(tokenizer), processor.image_token_id, tile)

    def recipe(self, **values: Any) -> Recipe:
        values = {"precision": "float32", "gradient_checkpointing": "false", "max_steps": STEPS, **values}
        recipe = load_recipe("stage3", [f"{name}={value}" for name, value in values.items()])
        set_trainable(self.model, recipe)
        return recipe

    def train(self, name: str, recipe: Recipe, batches: PackedBatches) -> list[dict[str, Any]]:
        """Train, and return the steps of log.jsonl after WARM_UP."""
        output = self.folder / name
        SAILVLTrainer(self.model, recipe, batches, output).train()
        return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()][WARM_UP:]


# Overhead


class Interleaved(PackedBatches):
    """The packs of step 0 in every step; before each, a step of a bare loop on the same tensors."""

    def __init__(self, model: SAILVLForConditionalGeneration, *args: Any, **options: Any):
        super().__init__(*args, uint8_tiles=True, **options)
        self.packs = super().__getitem__(0)
        self.model, self.optimizer = model, torch.optim.AdamW(model.parameters(), lr=1e-5)
        self.ready = [(self._inputs(pack), answer_weights(pack, "token").float()) for pack in self.packs]
        self.seconds: dict[str, list[float]] = {"bare loop": [], "trainer": []}
        self.left: float | None = None

    def _inputs(self, pack: Pack) -> dict[str, Any]:
        pixels = normalize_tiles(pack.inputs["pixel_values"], self.corpus.processor.image_processor)
        return {**pack.inputs, "pixel_values": pixels, "segments": pack.segments}  # as the trainer on a CPU

    def bare_step(self) -> None:
        answers = sum(len(weights) for _, weights in self.ready)
        for inputs, weights in self.ready:
            (pack_loss(self.model, inputs, weights, True)[0] / answers).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __getitem__(self, step: int) -> list[Pack]:
        entered = time.perf_counter()
        if self.left is not None:
            self.seconds["trainer"].append(entered - self.left)
        self.bare_step()
        self.left = time.perf_counter()
        self.seconds["bare loop"].append(self.left - entered)
        return self.packs


def overhead(folder: Path) -> None:
    setting, ratios = Setting(folder, tile=224), {}
    for samples, tokens in SIZES:
        recipe = setting.recipe(samples_per_step=samples, max_tokens_per_pack=tokens, epochs=STEPS, workers=0)
        batches = Interleaved(setting.model, setting.corpus, samples, tokens, epochs=STEPS)
        setting.train(f"overhead-{samples}-{tokens}", recipe, batches)
        seconds = {name: statistics.median(values[WARM_UP:]) for name, values in batches.seconds.items()}
        packs = len(batches.packs)
        name = f"{packs} packs of {seconds['bare loop'] / packs * 1e3:.0f} ms"
        ratios[name] = seconds["trainer"] / seconds["bare loop"]
    print_ratios("time of a step of the trainer, bare loop = 1", ratios)


# Waiting


def waiting(folder: Path, samples: int = 8) -> None:
    """The worker decodes on another core than the model."""
    setting = Setting(folder)
    options = {"max_tokens_per_pack": 1024, "epochs": STEPS}
    batches = PackedBatches(setting.corpus, samples, **options, uint8_tiles=True)
    decoding = medians({"decode": lambda: batches[0]}, 5)["decode"]
    log = setting.train("waiting", setting.recipe(samples_per_step=samples, **options, workers=1), batches)
    seconds = sum(entry["seconds"] for entry in log)
    print(f"\none worker decodes {samples / decoding:.0f} JPEGs of {TILE} pixels a second when nothing else runs")
    print(f"the model consumes {sum(entry['samples'] for entry in log) / seconds:.0f} a second")
    print(f"{sum(entry['wait_seconds'] for entry in log) / seconds:6.1%}  of the time the trainer waits")


# Head


def head_pack() -> Pack:
    """Return a pack of text whose last ANSWERS tokens are an answer."""
    ids = torch.randint(1000, (PACK_TOKENS,), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(PACK_TOKENS) < PACK_TOKENS - ANSWERS, -100)
    return collate([EncodedSample(ids, labels)], [0])


def head_step(model: SAILVLForConditionalGeneration, pack: Pack, keeps_logits: bool) -> None:
    loss, _ = pack_loss(model, pack.inputs, answer_weights(pack, "token").float(), keeps_logits)
    loss.backward()
    model.zero_grad()


def measure_head(contender: str) -> None:
    """Run in a process of its own: the model and the gradients, then a step unless only these are measured."""
    model = toy_model(VOCABULARY, VOCABULARY - 1)
    head_step(model, collate([EncodedSample(torch.arange(8), torch.arange(8))], [0]), True)
    if contender != BASELINE:
        head_step(model, head_pack(), HEADS[contender])


def head(folder: Path, rounds: int = 3) -> None:
    model, pack = toy_model(VOCABULARY, VOCABULARY - 1), head_pack()
    seconds = medians(
        {name: lambda keeps=keeps: head_step(model, pack, keeps) for name, keeps in HEADS.items()}, rounds
    )
    command = ["env", "MALLOC_MMAP_THRESHOLD_=65536", sys.executable, __file__, "--measure-head"]  # frees at once
    baseline = measure(*command, BASELINE)[1]
    peaks = {name: measure(*command, name)[1] - baseline for name in HEADS}
    print(f"\na pack of {PACK_TOKENS} tokens, {ANSWERS} of them answers; {VOCABULARY:,} entries of the vocabulary")
    for name, peak in peaks.items():
        print(f"{seconds[name] * 1e3:7.0f} ms and {peak / 1e6:6.0f} MB of a step  {name}")
    first, second = HEADS
    ratios = {"time": seconds[first] / seconds[second], "peak memory": peaks[first] / peaks[second]}
    print_ratios("head at all positions, at supervised positions = 1", ratios)


PARTS = {"overhead": overhead, "waiting": waiting, "head": head}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)} (all)")
    parser.add_argument("--measure-head", choices=(*HEADS, BASELINE), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: expected {', '.join(PARTS)}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if options.measure_head is not None:
        measure_head(options.measure_head)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts or PARTS:
            (Path(folder) / name).mkdir()
            PARTS[name](Path(folder) / name)


if __name__ == "__main__":
    main()
