# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Captions, questions and answers about a description, right by construction, in a small vocabulary."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from random import Random
from typing import NamedTuple

from .pictures import Chart, Item, Lines, Picture, Scene, Sum, choose, make_chart, make_lines, make_scene, make_sum
from .vocabulary import SEEN, UNSEEN_COLOURS, UNSEEN_LETTERS, Look, category_of


Ask = Callable[[Picture, Random], Iterator["Question"]]
UNSEEN = {*UNSEEN_LETTERS, *UNSEEN_COLOURS}


@dataclass(frozen=True)
class Question:
    """
    A question and its answer.

    Attributes:
        user, assistant: The texts.
        category: What is asked for: what, colour, count, where, exists, caption, read, chart, sum.
    """

    user: str
    assistant: str
    category: str


DESCRIBE = ("Describe the picture.", "Write a caption.", "What does the picture show?")
DETAILS = ("Describe the picture in detail.", "What is where?")
EMPTY = 0.2  # share of the scenes with an empty cell that are asked about it
READ = ("Read the text.", "What is written?")


def join(parts: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def describe_item(item: Item) -> str:
    """Return "top left a red 3"."""
    return f"{item.cell} a {item.name}".strip()


def plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def in_random_order(ask: Ask) -> Ask:
    """Make a function yield its questions in random order, so that each may be among the first few, which are taken."""

    @wraps(ask)
    def shuffled(picture: Picture, random: Random) -> Iterator[Question]:
        questions = [*ask(picture, random)]
        return iter(random.sample(questions, len(questions)))

    return shuffled


# Captions


def coarse_caption(picture: Picture) -> str:
    """Return what is in a picture, without places and values (stage 1)."""
    if isinstance(picture, Scene):
        return join([f"a {item.name}" for item in picture.items])
    if isinstance(picture, Chart):
        return f"a chart of {join([colour for colour, _ in picture.bars])} bars"
    return f"a sum: {picture.text}" if isinstance(picture, Sum) else f"{len(picture.lines)} {_lines(picture)} of text"


def fine_caption(picture: Picture) -> str:
    """Return what is where in a picture (stages 2 and 3), each place before its object, which is then easier to see."""
    if isinstance(picture, Scene):
        count = len(picture.items)
        return f"{count} {plural('object', count)}: {join([describe_item(item) for item in picture.items])}"
    if isinstance(picture, Chart):
        return f"a chart of {len(picture.bars)} bars: {join([f'{colour} {value}' for colour, value in picture.bars])}"
    return coarse_caption(picture) + (f": {' '.join(picture.lines)}" if isinstance(picture, Lines) else "")


def _lines(picture: Lines) -> str:
    return plural("line", len(picture.lines))


# Scenes: short questions


@in_random_order
def ask_what(scene: Scene, random: Random) -> Iterator[Question]:
    """Yield what is in each cell."""
    if len(scene.items) == 1:
        yield Question("What is it?", scene.items[0].thing, "what")
        return
    empty = [cell for cell in scene.cells if not scene.at(cell)]
    if empty and random.random() < EMPTY:
        yield Question(f"What is {random.choice(empty)}?", "nothing", "what")
    for item in scene.items:
        yield Question(f"What is {item.cell}?", item.thing, "what")


@in_random_order
def ask_colour(scene: Scene, random: Random) -> Iterator[Question]:
    if len(scene.items) == 1:
        yield Question("What colour is it?", scene.items[0].colour, "colour")
        return
    for item in scene.items:
        yield Question(f"What colour is the object {item.cell}?", item.colour, "colour")


@in_random_order
def ask_count(scene: Scene, random: Random) -> Iterator[Question]:
    yield Question("How many objects are there?", str(len(scene.items)), "count")
    if len(scene.items) == 1:
        return
    colour = random.choice(scene.items).colour
    yield Question(f"How many {colour} objects are there?", str(scene.count(colour=colour)), "count")
    name = random.choice(("digit", "shape"))
    yield Question(f"How many {name}s are there?", str(count_category(scene, name)), "count")


def count_category(scene: Scene, category: str) -> int:
    """Return the number of digits, of letters or of shapes."""
    return sum(category_of(item.thing) == category for item in scene.items)


def ask_exists(scene: Scene, random: Random) -> Iterator[Question]:
    """Yield one question, whose answer is yes or, as often, no."""
    item = random.choice(scene.items)
    if random.random() < 0.5:
        yield Question(f"Is there a {item.name}?", "yes", "exists")
    else:
        things = [thing for thing in SEEN.things if not scene.count(thing=thing, colour=item.colour)]
        yield Question(f"Is there a {item.colour} {random.choice(things)}?", "no", "exists")


# Open questions: answers that are sentences


@in_random_order
def ask_open(scene: Scene, random: Random) -> Iterator[Question]:
    if len(scene.items) == 1:
        item = scene.items[0]
        yield Question("What do you see?", f"I see a {item.name}.", "what")
        yield Question("Which colour does the object have?", f"The {item.thing} is {item.colour}.", "colour")
        return
    for item in random.sample(scene.items, len(scene.items)):
        if scene.count(thing=item.thing, colour=item.colour) == 1:
            yield Question(f"Where is the {item.name}?", f"The {item.name} is {item.cell}.", "where")
        yield Question(f"What do you see {item.cell}?", f"There is a {item.name} {item.cell}.", "what")
    colour = random.choice(scene.items).colour
    same = [item.thing for item in scene.items if item.colour == colour]
    if len({*same}) == len(same):
        verb = "is" if len(same) == 1 else "are"
        yield Question(f"Which objects are {colour}?", f"The {join(same)} {verb} {colour}.", "what")
    yield from _compare_colours(scene, random)


def _compare_colours(scene: Scene, random: Random) -> Iterator[Question]:
    colours = sorted({item.colour for item in scene.items})
    if len(colours) < 2:
        return
    first, second = random.sample(colours, 2)
    counts = scene.count(colour=first), scene.count(colour=second)
    answer = f"There are as many {first} as {second} objects."
    if counts[0] != counts[1]:
        answer = f"There are more {first if counts[0] > counts[1] else second} objects."
    yield Question(f"Are there more {first} or more {second} objects?", answer, "count")


@in_random_order
def ask_open_chart(chart: Chart, random: Random) -> Iterator[Question]:
    lowest, *_, highest = sorted(chart.bars, key=lambda bar: bar[1])
    yield Question("Which bar is the highest?", f"The {highest[0]} bar is the highest.", "chart")
    yield Question("Which bar is the lowest?", f"The {lowest[0]} bar is the lowest.", "chart")
    (first, one), (second, two) = random.sample(chart.bars, 2)
    answer = f"The {first if one > two else second} bar is higher."
    yield Question(f"Is the {first} or the {second} bar higher?", answer, "chart")


@in_random_order
def ask_chart(chart: Chart, random: Random) -> Iterator[Question]:
    lowest, *_, highest = sorted(chart.bars, key=lambda bar: bar[1])
    yield Question("How many bars are there?", str(len(chart.bars)), "chart")
    yield Question("What colour is the highest bar?", highest[0], "chart")
    yield Question("What colour is the lowest bar?", lowest[0], "chart")
    for colour, value in random.sample(chart.bars, 2):
        yield Question(f"How high is the {colour} bar?", str(value), "chart")


# Text and sums


@in_random_order
def ask_text(picture: Lines | Sum, random: Random) -> Iterator[Question]:
    """Yield the whole text, then parts of it."""
    yield Question(random.choice(READ), "\n".join(picture.lines), "read")
    if isinstance(picture, Lines) and len(picture.lines) > 1:
        yield Question("Read the first line.", picture.lines[0], "read")
        yield Question("Read the last line.", picture.lines[-1], "read")
        yield Question("How many lines are there?", str(len(picture.lines)), "read")
    characters = "".join(picture.lines)
    yield Question("What is the first character?", characters[0], "read")
    yield Question("What is the last character?", characters[-1], "read")


@in_random_order
def ask_sum(picture: Sum, random: Random) -> Iterator[Question]:
    yield Question(random.choice(("What is the result?", "Solve it.")), str(picture.result), "sum")
    yield Question("Read and solve it.", f"{picture.text}{picture.result}", "sum")
    added = random.randint(1, 9)
    yield Question(f"Add {added} to the result.", str(picture.result + added), "sum")


@in_random_order
def ask_scene_math(scene: Scene, random: Random) -> Iterator[Question]:
    digits = [int(item.thing) for item in scene.items if item.thing.isdecimal()]
    count, more = len(scene.items), random.randint(1, 9)
    yield Question("What is the sum of the digits?", str(sum(digits)), "sum")
    yield Question(f"Add {more} to the number of objects.", str(count + more), "sum")
    if len(digits) > 1:
        yield Question("What is the largest digit?", str(max(digits)), "sum")


# Kinds


def interleave(random: Random, *groups: Iterator[Question]) -> Iterator[Question]:
    """Yield questions of several groups in turn, starting with a random one."""
    waiting = random.sample(groups, len(groups))
    while waiting:
        for group in [*waiting]:
            question = next(group, None)
            if question is None:
                waiting.remove(group)
            else:
                yield question


def ask_short(scene: Scene, random: Random) -> Iterator[Question]:
    """Yield a caption, then short questions about a scene, the categories in turn, things twice as often as others."""
    yield from ask_fine_caption(scene, random)
    what, colour, count = ask_what(scene, random), ask_colour(scene, random), ask_count(scene, random)
    yield from interleave(random, what, what, colour, count, count, ask_exists(scene, random))


def ask_coarse_caption(picture: Picture, random: Random) -> Iterator[Question]:
    yield Question(random.choice(DESCRIBE), coarse_caption(picture), "caption")


def ask_fine_caption(picture: Picture, random: Random) -> Iterator[Question]:
    yield Question(random.choice(DETAILS), fine_caption(picture), "caption")


class Subject(NamedTuple):
    """What is drawn, what is asked about it, and its share of the pictures of a task."""

    share: float
    make: Callable[[Random, Look], Picture]
    ask: Ask


@dataclass(frozen=True)
class Task:
    """Pictures with questions of one kind; `kind` is one of the paper's."""

    kind: str
    subjects: tuple[Subject, ...]

    def make(self, random: Random, look: Look, held_out: bool, most: int) -> tuple[Picture, list[Question]]:
        """
        Return a picture and up to `most` different questions about it that name nothing unseen.

        Args:
            random: The source of randomness.
            look: What is drawn.
            held_out: Draw what training never shows, else what validation and tests never show.
            most: Questions.
        """
        while True:
            (subject,) = random.choices(self.subjects, [subject.share for subject in self.subjects])
            picture = choose(partial(subject.make, random, look), held_out)
            questions: dict[str, Question] = {}
            for question in filter(names_seen, subject.ask(picture, random)):
                questions.setdefault(question.user, question)
                if len(questions) == most:
                    break
            if questions:
                return picture, [*questions.values()]


def names_seen(question: Question) -> bool:
    """Return whether a question and its answer name only letters and colours that training names."""
    return not UNSEEN & {*re.findall(r"\w+", f"{question.user} {question.assistant}")}


def _caption_subjects(ask: Ask) -> tuple[Subject, ...]:
    return Subject(0.9, make_scene, ask), Subject(0.05, make_chart, ask), Subject(0.05, make_lines, ask)


TASKS = {
    "short_caption": Task("caption", _caption_subjects(ask_coarse_caption)),
    "caption": Task("caption", _caption_subjects(ask_fine_caption)),
    "ocr": Task("ocr", (Subject(0.8, make_lines, ask_text), Subject(0.2, make_sum, ask_text))),
    "open_qa": Task("open_qa", (Subject(0.8, make_scene, ask_open), Subject(0.2, make_chart, ask_open_chart))),
    "short_qa": Task("short_qa", (Subject(0.85, make_scene, ask_short), Subject(0.15, make_chart, ask_chart))),
    "math": Task("math", (Subject(0.7, make_sum, ask_sum), Subject(0.3, make_scene, ask_scene_math))),
    "scenes": Task("short_qa", (Subject(1, make_scene, ask_short),)),
}
