# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Multiple-choice questions about drawn pictures, with one right answer each: shapes, rendered text, bar charts.

A trial of a harness without downloads. The same seed gives the same questions.
"""

import base64
import csv
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


LETTERS = "ABCD"
SIZE = (448, 336)  # pixels
COLORS = {"red": "#d62728", "green": "#2ca02c", "blue": "#1f77b4", "orange": "#ff7f0e", "purple": "#7f3fbf"}
SHAPES = ("circle", "square", "triangle", "hexagon", "pentagon")
WORDS = ("harbour", "lantern", "meadow", "orchard", "pebble", "saddle", "thimble", "walnut")
INSTRUCTION = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """A question, its four options, the letter of the right one, and the picture."""

    index: int
    category: str
    question: str
    options: tuple[str, ...]
    answer: str
    image: Image.Image


def draw_questions(n: int, seed: int = 0) -> list[Question]:
    """Return n questions, the three kinds in turn."""
    kinds: tuple[tuple[str, Callable[[random.Random], tuple]], ...] = (
        ("shapes", _ask_about_shape),
        ("text", _ask_about_text),
        ("charts", _ask_about_chart),
    )
    questions = []
    for index in range(n):
        category, ask = kinds[index % len(kinds)]
        generator = random.Random(f"{seed}/{index}")
        image, text, right, wrong = ask(generator)
        options = [right, *generator.sample([option for option in wrong if option != right], len(LETTERS) - 1)]
        generator.shuffle(options)
        answer = LETTERS[options.index(right)]
        questions.append(Question(index, category, text, tuple(options), answer, image))
    return questions


def write_tsv(questions: Sequence[Question], path: Path) -> None:
    """Write the questions as VLMEvalKit reads them: index, question, A to D, answer, category, image in base64."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", *LETTERS, "answer", "category", "image"])
        for question in questions:
            image = base64.b64encode(_png(question.image)).decode()
            fields = [question.question, *question.options, question.answer, question.category, image]
            writer.writerow([question.index, *fields])


def write_task(questions: Sequence[Question], folder: Path, task: str) -> None:
    """Write the questions as a task of lmms-eval: FOLDER/TASK.yaml, which reads FOLDER/images/."""
    images = folder / "images" / "test"
    images.mkdir(parents=True)
    lines = []
    for question in questions:
        name = f"{question.index:05}.png"
        (images / name).write_bytes(_png(question.image))
        fields = {"index": question.index, "question": question.question, "answer": question.answer}
        options = dict(zip(LETTERS, question.options, strict=True))
        lines.append(json.dumps({"file_name": name, **fields, **options, "category": question.category}))
    (images / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    choices = "".join("\\n%s. {{%s}}" % (letter, letter) for letter in LETTERS)  # noqa: UP031
    (folder / f"{task}.yaml").write_text(
        TASK.format(
            task=task, folder=json.dumps(str(folder / "images")), prompt=f"{{{{question}}}}{choices}\\n{INSTRUCTION}"
        ),
        encoding="utf-8",
    )


TASK = """\
task: {task}
dataset_path: imagefolder
dataset_kwargs:
  data_dir: {folder}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: "{prompt}"
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
  do_sample: false
filter_list:
  - name: letter
    filter:
      - function: regex
        regex_pattern: "([A-D])"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", SIZE, "white")
    return image, ImageDraw.Draw(image)


def _ask_about_shape(generator: random.Random) -> tuple:
    image, draw = _canvas()
    shape, color = generator.choice(SHAPES), generator.choice([*COLORS])
    radius = generator.randint(60, 110)
    center = (generator.randint(radius, SIZE[0] - radius), generator.randint(radius, SIZE[1] - radius))
    sides = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}.get(shape)
    if sides:
        draw.regular_polygon((*center, radius), sides, fill=COLORS[color])
    else:
        draw.circle(center, radius, fill=COLORS[color])
    if generator.random() < 0.5:
        return image, "What is the colour of the shape?", color, [*COLORS]
    return image, "Which shape is drawn?", shape, [*SHAPES]


def _ask_about_text(generator: random.Random) -> tuple:
    image, draw = _canvas()
    word = generator.choice(WORDS)
    font = ImageFont.load_default(size=generator.randint(36, 72))
    draw.text((SIZE[0] / 2, SIZE[1] / 2), word, fill="black", font=font, anchor="mm")
    return image, "Which word is written?", word, [*WORDS]


def _ask_about_chart(generator: random.Random) -> tuple:
    image, draw = _canvas()
    names = generator.sample(WORDS, len(LETTERS))
    heights = generator.sample(range(40, 241, 40), len(LETTERS))
    font, width = ImageFont.load_default(size=18), SIZE[0] // len(LETTERS)
    base = SIZE[1] - 40
    for place, (name, height) in enumerate(zip(names, heights, strict=True)):
        left = place * width + width // 5
        draw.rectangle((left, base - height, left + width * 3 // 5, base), fill=COLORS["blue"])
        draw.text((place * width + width // 2, base + 18), name, fill="black", font=font, anchor="mm")
    which, pick = generator.choice([("highest", max), ("lowest", min)])
    right = names[heights.index(pick(heights))]
    return image, f"Which bar is the {which}?", right, names
