# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""What pictures may contain: things, colours, fonts, cells, words; and which of it each split draws."""

from dataclasses import dataclass, replace
from typing import Literal


DIGITS = tuple("0123456789")
LETTERS = tuple("ACEHLNRT")
UNSEEN_LETTERS = tuple("BDFGJMSUWY")  # in no picture of the training splits
SHAPES = ("circle", "square", "triangle", "heart")
CATEGORIES = {"digit": DIGITS, "letter": LETTERS + UNSEEN_LETTERS, "shape": SHAPES}
OBJECTS = DIGITS + SHAPES  # of scenes; letters are in lines of text only

COLOURS = {
    "red": (226, 48, 40),
    "green": (52, 180, 62),
    "blue": (72, 116, 250),
    "yellow": (238, 216, 52),
    "purple": (184, 74, 222),
    "white": (240, 240, 240),
    "orange": (242, 134, 28),
    "cyan": (62, 208, 222),
    "pink": (250, 140, 186),
}
SEEN_COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
UNSEEN_COLOURS = ("orange", "cyan", "pink")
SEEN_FONTS = ("plain", "bold", "italic")
UNSEEN_FONTS = ("serif", "angular")

# (columns, rows) of a scene -> names of its cells, row by row
CELLS = {
    (2, 2): ("top left", "top right", "bottom left", "bottom right"),
    (3, 2): ("top left", "top middle", "top right", "bottom left", "bottom middle", "bottom right"),
    (2, 3): ("top left", "top right", "middle left", "middle right", "bottom left", "bottom right"),
    (3, 3): (
        *("top left", "top middle", "top right"),
        *("middle left", "middle", "middle right"),
        *("bottom left", "bottom middle", "bottom right"),
    ),
}
# (columns, rows) of tiles -> the same of cells
GRIDS = {(1, 1): (2, 2), (2, 1): (3, 2), (1, 2): (2, 3), (2, 2): (3, 3)}

OF_SEEN_LETTERS = """
ACT ALE ALERT ALTER ANT ARC ART CANAL CANE CAR CART CAT CELL CENT CHAR CHART CHARTER CHAT CLEAN CLEAR CRANE CRATE EAR
EARN EARTH EAT EATER ENTER ETHER HALE HALL HARE HAT HATE HEAL HEAR HEART HEAT HEN HERE LACE LANCE LANE LATCH LATE
LATER LATTER LEACH LEAN LEARN LETTER NATAL NEAR NEAT NEATER NET RACE RANCH RAT RATE REACH REACT REAL RELATE RENT TALE
TALL TEACH TEAL TEAR TEN TENT TRANCE TREAT TREE
"""
WORDS = tuple(OF_SEEN_LETTERS.split())


@dataclass(frozen=True)
class Look:
    """
    What a split draws, and how.

    Attributes:
        things: What scenes are made of.
        colours, fonts: Keys of COLOURS and of FONTS.
        most_objects: Objects of a scene.
        single: Heights of the object of a one-object picture, from and to, in 32nds of a tile.
        clutter: Fewest and most pieces of clutter of a tile.
        noise: Standard deviation of the noise of a pixel, of 255.
    """

    things: tuple[str, ...] = OBJECTS
    colours: tuple[str, ...] = SEEN_COLOURS
    fonts: tuple[str, ...] = SEEN_FONTS
    most_objects: int = 6
    single: tuple[int, int] = (12, 13)
    clutter: tuple[int, int] = (0, 2)
    noise: float = 8.0


SEEN = Look()
LOOKS = {
    "seen": SEEN,
    "unseen_letters": replace(SEEN, things=UNSEEN_LETTERS),
    "unseen_font_colour": replace(SEEN, colours=UNSEEN_COLOURS, fonts=UNSEEN_FONTS),
    "large_letters": replace(SEEN, things=LETTERS, most_objects=1, single=(24, 28)),
    "clutter": replace(SEEN, clutter=(6, 10), noise=16.0),
}


def category_of(thing: str) -> Literal["digit", "letter", "shape"]:
    """Return whether a thing is a digit, a letter or a shape."""
    return next(name for name, things in CATEGORIES.items() if thing in things)
