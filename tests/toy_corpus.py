"""A corpus in memory, and toy samples with text, images and videos of various sizes."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from conftest import randomize
from PIL import Image
from toy_sailvl import LANGUAGE, load_tokenizer

from sailvit import SAILViTConfig, SAILViTImageProcessor, SAILVLConfig, SAILVLForConditionalGeneration, SAILVLProcessor
from sailvit.train.collate import encode_sample
from sailvit.train.corpus import Skipped
from sailvit.train.formats import BadSample, Sample


WORDS = ["What is the total?", "Describe the image.", "Answer with one word.", "The total is 42."]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
}


class MemoryCorpus:
    """
    A sequence of samples with their lengths, with the interface of `sailvit.train.corpus.Corpus`.

    A sample may be a BadSample, which is raised when it is read.
    """

    max_bad_fraction = 1.0

    def __init__(self, samples, processor, cache_dir: Path, tokens, tiles):
        self._samples, self.processor, self.cache_dir = samples, processor, Path(cache_dir)
        self.tokens, self.tiles = np.asarray(tokens, np.int32), np.asarray(tiles, np.int32)
        kinds = [getattr(sample, "kind", None) or "unknown" for sample in samples]
        named = {name for sample in samples for name in getattr(sample, "turn_kinds", ())}
        self.kind_names = tuple(sorted({*kinds} | named))
        self.kinds = np.array([self.kind_names.index(kind) for kind in kinds], np.int32)
        self.fingerprint = hashlib.sha256(self.tokens.tobytes() + self.tiles.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Sample:
        if isinstance(sample := self._samples[index], BadSample):
            raise sample
        return sample

    def locate(self, index: int) -> tuple[str, int]:
        return "memory", int(index)

    def skip(self, index: int, reason: str) -> Skipped:
        return Skipped("memory", "memory.jsonl", {"line": index + 1}, reason)

    def fit(self, max_tokens: int, max_tiles: int | None, too_long: str) -> "MemoryCorpus":
        if too_long == "truncate":
            raise NotImplementedError
        fits = (self.tokens <= max_tokens) & (max_tiles is None or self.tiles <= max_tiles)
        if too_long == "fail" and not fits.all():
            raise ValueError("a sample does not fit into a pack")
        kept = np.flatnonzero(fits)
        samples = [self._samples[index] for index in kept]
        fitted = MemoryCorpus(samples, self.processor, self.cache_dir, self.tokens[kept], self.tiles[kept])
        fitted.max_bad_fraction = self.max_bad_fraction
        return fitted


def make_processor(folder: Path) -> SAILVLProcessor:
    tokenizer = load_tokenizer(folder)
    return SAILVLProcessor(SAILViTImageProcessor(size=56, max_tiles=4), tokenizer, image_seq_length=4)


def make_model(processor: SAILVLProcessor, text: dict | None = None, vision: dict | None = None):
    """Return a toy SAIL-VL with random weights that fits the toy processor, in training mode."""
    text = {"model_type": "qwen2", **LANGUAGE, "vocab_size": len(processor.tokenizer), **(text or {})}
    vision = SAILViTConfig(**{**VISION, **(vision or {})})
    config = SAILVLConfig(vision, text, image_token_id=processor.image_token_id)
    return randomize(SAILVLForConditionalGeneration(config)).train()


def make_image(rng: np.random.Generator) -> Image.Image:
    height, width = rng.integers(20, 200, 2)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_sample(
    rng: np.random.Generator, images: int = 0, frames: int = 0, turns: int = 1, kind: str | None = None
) -> Sample:
    """Return a conversation of random questions and answers, with images and a video in the first question."""
    messages = []
    for turn in range(turns):
        content = [{"type": "image", "image": make_image(rng)} for _ in range(images if turn == 0 else 0)]
        if frames and turn == 0:
            content.append({"type": "video", "video": [make_image(rng) for _ in range(frames)]})
        content.append({"type": "text", "text": " ".join(rng.choice(WORDS, rng.integers(1, 3)))})
        answer = " ".join(rng.choice(WORDS, rng.integers(1, 6)))
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Sample(messages, kind)


def make_independent(rng: np.random.Generator, images: int = 2, turns: int = 3, kind: str | None = None) -> Sample:
    """Return a sample of independent turns about the same images."""
    return replace(make_sample(rng, images, turns=turns, kind=kind), independent_turns=True)


def split_turns(sample: Sample) -> list[Sample]:
    """Return a sample for each of its conversations."""
    return [Sample(messages, sample.kind, sample.options) for messages in sample.conversations]


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    """Return samples with 0 to 2 images each, some with a video, some with two turns; of two kinds."""
    rng = np.random.default_rng(seed)
    kinds = ("short_qa", "ocr", "ocr", "ocr", "ocr")
    return [make_sample(rng, i % 3, 2 * (i % 4 == 3), 1 + i % 2, kinds[i % len(kinds)]) for i in range(count)]


def make_corpus(samples: list[Sample], processor: SAILVLProcessor, cache_dir: Path) -> MemoryCorpus:
    """Return a corpus with the lengths of the samples."""
    encoded = [encode_sample(sample, processor) for sample in samples]
    tiles = [0 if sample.tiles is None else len(sample.tiles) for sample in encoded]
    return MemoryCorpus(samples, processor, cache_dir, [len(sample.input_ids) for sample in encoded], tiles)


def component_gradients(model: SAILVLForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Return the gradient of each component as one vector."""
    parts = {"vision": model.vision_model, "connector": model.mlp1, "language": model.language_model}
    return {
        name: torch.cat([parameter.grad.flatten() for parameter in part.parameters()]).clone()
        for name, part in parts.items()
    }
