# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo: draw pictures that training never showed, look at the tokens of one, ask a model about the other."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from PIL import Image

from .draw import draw_picture
from .pictures import Scene, choose, make_scene
from .questions import Question, ask_colour, ask_count, ask_what, fine_caption
from .shipped import ENCODER, MULTIMODAL, TRAINED


SEED = 0
SIZE = 32  # pixels of a tile
TILES = (2, 2)  # columns and rows of the picture that is encoded; that of the questions has one tile
OBJECTS = {TILES: 6, (1, 1): 4}
PALETTE = 128  # colours of the figure, which make its file small
FILES = ("tiles.png", "questions.png", "figure.png")
GENERATION = {"max_new_tokens": 16, "do_sample": False}


def run_demo(out: Path, log: Callable[[str], None], dtype: str = "auto") -> Path:
    """
    Run the models that come with the package on two pictures; return the path of the figure.

    Args:
        out: Folder for the pictures and the figure.
        log: Called with each progress message.
        dtype: To compute in; "auto" for that of the weights, float32.

    Raises:
        ValueError: It is a file, or the folder holds other files than those of a demo, which are replaced.
        OSError: A file cannot be written.
    """
    started = time.perf_counter()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a folder, got a file: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    if others := {path.name for path in out.iterdir()} - {*FILES}:
        raise ValueError(f"{out} holds {min(others)}, which is not of this demo: give another --out")
    demo = _Demo(out, dtype)
    for number, (title, run) in enumerate(demo.steps(), 1):
        log(f"{number}. {title}")
        before = time.perf_counter()
        for line in run():
            log(f"   {line}")
        log(f"   {time.perf_counter() - before:.1f} s")
    log(f"Done in {time.perf_counter() - started:.0f} s.")
    return demo.figure


def make_picture(tiles: tuple[int, int], size: int = SIZE) -> tuple[Image.Image, Scene, list[Question]]:
    """Return a picture of some tiles, of `size` pixels each; what it shows; three questions: what, colour, count."""
    random = Random(SEED)
    scene = choose(lambda: make_scene(random, count=OBJECTS[tiles], tiles=tiles), held_out=True)
    picture = Image.fromarray(draw_picture(scene, size, random))
    return picture, scene, [next(ask(scene, random)) for ask in (ask_what, ask_colour, ask_count)]


class _Demo:
    """The steps of the demo; each yields lines for the log, and the next ones use what it made."""

    def __init__(self, out: Path, dtype: str):
        self.out, self.dtype, self.figure = out, dtype, out / FILES[-1]
        self.picture, self.scene, _ = make_picture(TILES)
        self.small, self.small_scene, self.questions = make_picture((1, 1))
        self.answers: list[str] = []

    def steps(self) -> Iterator[tuple[str, Callable[[], Iterator[str]]]]:
        """Yield titles and functions."""
        yield "Two pictures that training never showed", self.write_pictures
        yield "The trained miniature, loaded with AutoModel and remote code", self.load
        yield "The vision encoder, and the first picture", self.encode
        yield "The multimodal model, and the second picture", self.ask
        yield (
            "Figure: a picture, its tiles, the principal components of its tokens; the other one, the answers",
            self.draw,
        )

    def write_pictures(self) -> Iterator[str]:
        first, second, _ = FILES
        pictures = ((first, self.picture, self.scene), (second, self.small, self.small_scene))
        for name, picture, scene in pictures:
            picture.save(self.out / name)
            yield f"{self.out / name}: {picture.width} x {picture.height} pixels, {fine_caption(scene)}"

    def load(self) -> Iterator[str]:
        """Load both models; torch and transformers are imported here, so that the demo starts at once."""
        import torch
        from transformers import AutoModel, AutoProcessor
        from transformers.utils.logging import disable_progress_bar

        from ...devices import choose_dtype, dtype_name

        disable_progress_bar()
        dtype, reason = choose_dtype(torch.float32, "cpu", self.dtype)
        options = {"trust_remote_code": True, "dtype": dtype}
        self.encoder, self.multimodal = (
            AutoModel.from_pretrained(folder, **options).eval() for folder in (ENCODER, MULTIMODAL)
        )
        self.processor = AutoProcessor.from_pretrained(MULTIMODAL, trust_remote_code=True)
        for folder, model in ((ENCODER, self.encoder), (MULTIMODAL, self.multimodal)):
            yield f"{folder.name}: {type(model).__name__}, {model.num_parameters():,} parameters"
        yield f"from {TRAINED}"
        yield f"in {dtype_name(dtype)}: {reason}"

    def encode(self) -> Iterator[str]:
        """Encode the tiles of the picture."""
        import torch

        batch = self.processor.image_processor(self.picture, return_tensors="pt")
        self.pixel_values, self.grid = batch["pixel_values"], tuple(batch["tile_grids"][0].tolist())
        with torch.inference_mode():
            self.tokens = self.encoder.get_image_features(self.pixel_values)
        tiles = f"{self.grid[0]} x {self.grid[1]} tiles and a thumbnail"
        yield f"{tiles}, {tuple(self.pixel_values.shape)} -> tokens {tuple(self.tokens.shape)}"

    def ask(self) -> Iterator[str]:
        """Ask about the small picture; an answer is right if it is the expected one, word for word."""
        pixel_values = self.processor.image_processor(self.small, return_tensors="pt")["pixel_values"]
        for question in self.questions:
            answer = self.multimodal.chat(self.processor.tokenizer, pixel_values, question.user, GENERATION)
            self.answers.append(answer)
            verdict = "right" if answer == question.assistant else f"wrong, expected {question.assistant}"
            yield f"{question.user}  {answer}  ({verdict})"

    def draw(self) -> Iterator[str]:
        from .figure import draw_figure

        answers = [*zip(self.questions, self.answers, strict=True)]
        figure = draw_figure(self.picture, self.tokens, self.grid, self.small, answers)
        figure.quantize(PALETTE, dither=Image.Dither.NONE).save(self.figure, optimize=True)
        yield str(self.figure)
