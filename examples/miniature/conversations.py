# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Conversations without pictures, in the vocabulary of the questions: for a small language model and its tokenizer.

Scenes are described in words and asked about; there is counting, arithmetic, comparing, spelling.
"""

from collections.abc import Iterator
from itertools import islice
from random import Random

from .pictures import choose, is_held_out, make_chart, make_scene, make_sum
from .questions import (
    Question,
    ask_chart,
    ask_open,
    ask_open_chart,
    ask_short,
    fine_caption,
    interleave,
    join,
)
from .vocabulary import CATEGORIES, LETTERS, SEEN, SEEN_COLOURS, SHAPES, WORDS, category_of


MOST_TURNS = 4


def make_conversation(random: Random, held_out: bool = False) -> list[Question]:
    """
    Return the turns of a conversation.

    Args:
        random: The source of randomness.
        held_out: Use scenes and sums that training never shows, else those that validation never shows.
    """
    about = (_about_scene, _about_chart, _arithmetic)
    (make,) = random.choices((*about, _counting, _spelling, _sorting), (8, 2, 3, 1, 1, 1))
    if make in about:
        questions = make(random, held_out)
    else:
        questions = (question for question in make(random) if is_held_out(question.user) == held_out)
    return [*islice(questions, random.randint(1, MOST_TURNS))]


def _about(text: str, questions: Iterator[Question]) -> Iterator[Question]:
    """Yield questions, the first one after a text that answers them."""
    for index, question in enumerate(questions):
        user = question.user if index else f"There is a picture of {text}. {question.user}"
        yield Question(user, question.assistant, question.category)


def _about_scene(random: Random, held_out: bool) -> Iterator[Question]:
    scene = choose(lambda: make_scene(random, SEEN, random.randint(2, 4)), held_out)
    return _about(fine_caption(scene), interleave(random, ask_short(scene, random), ask_open(scene, random)))


def _about_chart(random: Random, held_out: bool) -> Iterator[Question]:
    chart = choose(lambda: make_chart(random), held_out)
    return _about(fine_caption(chart), interleave(random, ask_chart(chart, random), ask_open_chart(chart, random)))


def _arithmetic(random: Random, held_out: bool) -> Iterator[Question]:
    while True:
        written = choose(lambda: make_sum(random), held_out)
        user = random.choice(
            (f"{written.text}?", f"Solve {written.text}", f"What is {written.left}{written.sign}{written.right}?")
        )
        yield Question(user, str(written.result), "sum")


def _counting(random: Random) -> Iterator[Question]:
    while True:
        first = random.randint(0, 20)
        last = first + random.randint(2, 6)
        numbers = [str(number) for number in range(first, last + 1)]
        yield Question(f"Count from {first} to {last}.", ", ".join(numbers), "count")
        one, two = random.sample(range(30), 2)
        yield Question(f"Which number is larger, {one} or {two}?", str(max(one, two)), "sum")
        things = [random.choice((*LETTERS, *SHAPES))] * random.randint(1, 6)
        yield Question(f"How many times is {things[0]} in {' '.join(things)}?", str(len(things)), "count")


def _spelling(random: Random) -> Iterator[Question]:
    while True:
        word, line = random.choice(WORDS), f"{random.choice(WORDS)} {random.randint(0, 999)}"
        yield Question(f"Spell {word}.", " ".join(word), "read")
        yield Question(f"How many letters does {word} have?", str(len(word)), "count")
        yield Question(f"What is the first letter of {word}?", word[0], "read")
        yield Question(f"What is the last letter of {word}?", word[-1], "read")
        yield Question(f"Repeat {line}.", line, "read")


def _sorting(random: Random) -> Iterator[Question]:
    while True:
        things = random.sample(SEEN.things, random.randint(1, 5))
        name = random.choice([*CATEGORIES])
        count = sum(category_of(thing) == name for thing in things)
        yield Question(f"How many {name}s are in {join(things)}?", str(count), "count")
        colours = random.sample(SEEN_COLOURS, random.randint(2, 4))
        yield Question(f"What is the first colour of {join(colours)}?", colours[0], "colour")
