# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a multimodal model answers to questions about pictures that it never saw, and to the same about another picture.

An answer is right if it is the expected one, word for word. With another picture a model can only guess: what it then
gets right is what the question alone gives away.
"""

import io
import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers.generation import GenerationConfig

from ...convert.storage.files import replace_text
from ...devices import choose_device
from ...evaluate.statistics import wilson_interval
from ...modeling_sailvl import SAILVLForConditionalGeneration
from ...processing_sailvl import SAILVLProcessor
from .questions import Question
from .world import read_examples


CATEGORIES = ("what", "colour", "count")
MOST_TOKENS = 16  # of an answer
BATCH = 64


class Asked(NamedTuple):
    """A question, the picture that it is about, another one, and the number of the picture."""

    question: Question
    picture: Image.Image
    other: Image.Image
    number: int


def write_answers(out: Path, model: Path, tests: Path, most: int) -> str:
    """
    Write how many answers are right in each category, with intervals, and with another picture.

    "right" has a word for every picture, such as "10", with a 1 for every right answer about it.

    Args:
        out: The JSON file.
        model: Folder of the SAIL-VL.
        tests: Folder with a world's parquet files of one look.
        most: Questions of a category.

    Returns:
        The accuracies, in a line.
    """
    asked = read_questions(tests, most)
    answerer = Answerer(model)
    result: dict[str, dict[str, Any]] = {}
    for category, questions in asked.items():
        texts, expected = [one.question.user for one in questions], [one.question.assistant for one in questions]
        found = answerer.answer(texts, [one.picture for one in questions])
        guessed = answerer.answer(texts, [one.other for one in questions])
        right, lucky = ([*map(str.__eq__, answers, expected)] for answers in (found, guessed))
        low, high = wilson_interval(sum(right), len(right))
        result[category] = {
            "n": len(right), "accuracy": sum(right) / len(right), "low": low, "high": high,
            "accuracy_with_another_picture": sum(lucky) / len(right),
            "right": _by_picture(right, [one.number for one in questions]),
        }  # fmt: skip
    replace_text(out, json.dumps(result, indent=2) + "\n")
    return ", ".join(f"{category} {entry['accuracy']:.3f}" for category, entry in result.items())


def _by_picture(right: Sequence[bool], numbers: Sequence[int]) -> str:
    words = groupby(zip(right, numbers, strict=True), key=lambda pair: pair[1])
    return " ".join("".join(str(int(one)) for one, _ in word) for _, word in words)


def read_questions(tests: Path, most: int) -> dict[str, list[Asked]]:
    """
    Return up to `most` questions of each category about scenes of a world, with the picture of the next scene as other.

    Raises:
        ValueError: There are no questions of a category.
    """
    found: defaultdict[str, list[Asked]] = defaultdict(list)
    examples = list(read_examples(tests / "scenes.parquet"))
    pictures = [Image.open(io.BytesIO(example.png)) for example in examples]
    for index, example in enumerate(examples):
        for question in example.questions:
            if question.category in CATEGORIES and len(found[question.category]) < most:
                found[question.category].append(Asked(question, pictures[index], pictures[index - 1], index))
    if missing := [category for category in CATEGORIES if not found[category]]:
        raise ValueError(f"{tests}: no questions of category {missing[0]}")
    return found


class Answerer:
    """A SAIL-VL that answers questions, greedily, in float32, on a GPU if there is one."""

    def __init__(self, model: Path):
        self.model = (
            SAILVLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval().to(choose_device())
        )
        self.processor = SAILVLProcessor.from_pretrained(model)
        self.settings = GenerationConfig(
            max_new_tokens=MOST_TOKENS,
            do_sample=False,
            eos_token_id=self.processor.tokenizer.eos_token_id,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )

    def answer(self, questions: Sequence[str], pictures: Sequence[Image.Image]) -> list[str]:
        """Return the answers to questions, each about one picture."""
        pairs = [*zip(questions, pictures, strict=True)]
        batches = (pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH))
        return [answer for batch in batches for answer in self._answer(batch)]

    @torch.inference_mode()
    def _answer(self, batch: Sequence[tuple[str, Image.Image]]) -> list[str]:
        conversations = [_conversation(question, picture) for question, picture in batch]
        inputs = self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            padding=True,
        ).to(self.model.device)  # fmt: skip
        output = self.model.generate(**inputs, generation_config=self.settings)
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]


def _conversation(question: str, picture: Image.Image) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]
