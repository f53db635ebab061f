"""
Benchmark of computing lengths: samples per second against `tokenizer(prompt)` called once per rendered sample.

A tokenizer of 8,000 entries, trained on the documentation; conversations of one to three turns from the same text;
with and without a photograph, of which only the header is read. In one process and in two.

    python benchmarks/lengths.py
"""

import json
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
from PIL import Image
from timing import print_ratios
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sailvit import SAILViTImageProcessor, SAILVLProcessor
from sailvit.train import Corpus


ROOT = Path(__file__).parents[1]
SAMPLES = 4000
ROUNDS = 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])


def make_samples(words: list[str], generator: random.Random) -> list[list[str]]:
    """Return SAMPLES lists of question, answer, question, answer, ..."""

    def text(mean: float) -> str:
        length = max(1, round(generator.lognormvariate(0, 1) * mean))
        start = generator.randrange(len(words))
        return " ".join(words[start : start + length])

    return [[part for _ in range(generator.randint(1, 3)) for part in (text(15), text(80))] for _ in range(SAMPLES)]


def render(processor: SAILVLProcessor, turns: list[str]) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)]
    return processor.apply_chat_template(messages)


def write_corpus(folder: Path, samples: list[list[str]], with_image: bool) -> Path:
    records = []
    for turns in samples:
        values = [f"<image>\n{turns[0]}", *turns[1:]] if with_image else turns
        conversation = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
        records.append({"conversations": conversation, **({"image": "photo.jpg"} if with_image else {})})
    name = "images" if with_image else "text"
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / f"{name}.yaml").write_text(json.dumps({"sources": [{"name": name, "path": f"{name}.jsonl"}]}))
    return folder / f"{name}.yaml"


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    datasets.disable_progress_bars()
    texts = [path.read_text() for path in sorted(ROOT.glob("docs/*.md"))]
    words = re.sub("<[^>]*>", "", " ".join(texts)).split()
    tokenizer = train_tokenizer(texts)
    processor = SAILVLProcessor(SAILViTImageProcessor(), tokenizer)
    samples = make_samples(words, random.Random(0))
    prompts = [render(processor, turns) for turns in samples]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.open(ROOT / "examples" / "raccoon.jpg").save(folder / "photo.jpg")
        corpora = {kind: write_corpus(folder, samples, kind == "images") for kind in ("text", "images")}
        times: dict[str, list[float]] = {}
        for round_number in range(ROUNDS):
            times.setdefault("tokenizer(prompt)", []).append(seconds(lambda: [tokenizer(prompt) for prompt in prompts]))
            for kind, path in corpora.items():
                for processes in (1, 2):
                    cache = folder / f"cache-{round_number}-{kind}-{processes}"
                    took = seconds(
                        lambda path=path, cache=cache, n=processes: Corpus.from_yaml(path, processor, cache, n)
                    )
                    times.setdefault(f"{kind}, {processes} processes", []).append(took)
    best = {name: min(values) for name, values in times.items()}
    for name, value in best.items():
        print(f"{SAMPLES / value:8.0f} samples/s  {name}")
    alone = best.pop("tokenizer(prompt)")
    print_ratios("rate, tokenizer(prompt) = 1", {name: alone / value for name, value in best.items()})


if __name__ == "__main__":
    main()
