# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Conversations without pictures, in the vocabulary of the questions: for a small language model and its tokenizer.

Pictures are described in words and asked about: a language model that is frozen in the first stages has to know how it
would answer if it saw. There is counting, arithmetic, comparing, spelling, too.
"""

from collections.abc import Iterator
from itertools import islice
from random import Random

from .pictures import choose, is_held_out, make_sum
from .questions import TASKS, Question, fine_caption, join
from .vocabulary import LETTERS, SEEN, SEEN_COLOURS, SHAPES, WORDS, category_of


MOST_TURNS = 8
# Of the pictures that are described: what a question asks for has to be found among words before it can be seen.
SHARES = {"short_caption": 1, "caption": 2, "ocr": 1, "open_qa": 2, "short_qa": 6, "math": 1}


def make_conversation(random: Random, held_out: bool = False) -> list[Question]:
    """
    Return the turns of a conversation.

    Args:
        random: The source of randomness.
        held_out: Use scenes and sums that training never shows, else those that validation never shows.
    """
    about = (_about_picture, _arithmetic)
    (make,) = random.choices((*about, _counting, _spelling, _sorting), (16, 1, 1, 1, 1))
    if make in about:
        questions = make(random, held_out)
    else:
        questions = (question for question in make(random) if is_held_out(question.user) == held_out)
    return [*islice(questions, MOST_TURNS)]


def _about(text: str, questions: Iterator[Question]) -> Iterator[Question]:
    """Yield questions, the first one after a text that answers them."""
    for index, question in enumerate(questions):
        user = question.user if index else f"There is a picture of {text}. {question.user}"
        yield Question(user, question.assistant, question.category)


def _about_picture(random: Random, held_out: bool) -> Iterator[Question]:
    """Yield what is asked about pictures, about one that is described in words."""
    while True:
        (name,) = random.choices([*SHARES], [*SHARES.values()])
        picture, questions = TASKS[name].make(random, SEEN, held_out, MOST_TURNS)
        text = fine_caption(picture)
        if is_held_out(text) == held_out:  # two layouts of one object have the same words
            return _about(text, iter(questions))


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
        name = random.choice(("digit", "shape"))
        count = sum(category_of(thing) == name for thing in things)
        yield Question(f"How many {name}s are in {join(things)}?", str(count), "count")
        colours = random.sample(SEEN_COLOURS, random.randint(2, 4))
        yield Question(f"What is the first colour of {join(colours)}?", colours[0], "colour")
