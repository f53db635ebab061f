# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""A world of drawn pictures with questions: training corpora, tests and probe sets from a seed, without downloads."""

from .draw import draw_picture, encode_png
from .pictures import make_chart, make_lines, make_scene, make_sum
from .questions import TASKS, Question
from .vocabulary import LOOKS
from .world import PROBE_SETS, Example, WorldPlan, read_examples, read_texts, write_world


__all__ = [
    "LOOKS",
    "PROBE_SETS",
    "TASKS",
    "Example",
    "Question",
    "WorldPlan",
    "draw_picture",
    "encode_png",
    "make_chart",
    "make_lines",
    "make_scene",
    "make_sum",
    "read_examples",
    "read_texts",
    "write_world",
]
