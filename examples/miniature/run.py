# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The miniature from nothing to a report, through the package's own functions; a second call goes on where one stopped.

    world/             pictures, questions, texts
    untrained/         a vision encoder, a language model
    runs/aim           the vision encoder, pretrained on pixels
    runs/language      the language model, pretrained on text
    runs/stage1 ...    gradual feature refinement
    sailvit-miniature  the refined vision encoder
    probe/             what the encoder learned, by probes
    answers.json       what the multimodal model answers to questions about pictures that it never saw
    report.html        all of it
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...convert.compose import compose_model
from ...convert.conversion import convert_checkpoint
from ...evaluate.probe import ProbeOptions, run_probe
from ...evaluate.report import build_report, write_report
from ...train import load_recipe
from ...train.run import run
from .answers import write_answers
from .models import random_encoder, random_language
from .setting import Setting
from .world import PROBE_SETS, read_texts, write_world


RECIPES = Path(__file__).parent / "recipes"
STAGES = ("stage1", "stage2", "stage3")
HEADS = ("linear", "mlp", "knn")
ENCODER = "sailvit-miniature"
Log = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """
    A part of the miniature.

    Attributes:
        title: For the log.
        make: Does it, or goes on with it; returns an exit code.
        output: What it writes, completely or not at all; None if `make` knows what is left to do.
    """

    title: str
    make: Callable[[], object]
    output: Path | None = None


def run_miniature(folder: Path, setting: Setting, log: Log = print, command: str = "") -> int:
    """
    Make a miniature in a folder, or go on with it.

    Args:
        folder: Everything is written there.
        setting: How large it is.
        log: Called with each message.
        command: For the footer of the report.

    Returns:
        0, or the exit code of a training that was stopped: the same call goes on.

    Raises:
        ValueError: The folder holds another miniature.
        OSError: A file cannot be written.
    """
    steps = [*_list_steps(folder, setting, log, command)]
    for number, step in enumerate(steps, 1):
        title = f"{number}/{len(steps)} {step.title}"
        if step.output and step.output.exists():
            log(f"{title}: done")
            continue
        log(title)
        started = time.monotonic()
        code = step.make()
        if isinstance(code, int) and code:
            return code
        log(f"{title}: {time.monotonic() - started:.0f} s")
    return 0


def _list_steps(folder: Path, setting: Setting, log: Log, command: str) -> Iterator[Step]:
    world, untrained, runs, refined = (folder / name for name in ("world", "untrained", "runs", ENCODER))

    def train(recipe: str, model: Path, corpus: str) -> Step:
        values = {"model": model, "data": world / f"{corpus}.yaml", "output": runs / recipe, "seed": setting.world.seed}
        overrides = [*(f"{key}={value}" for key, value in values.items()), *setting.recipe]
        return Step(f"train {recipe}", lambda: run(load_recipe(str(RECIPES / f"{recipe}.yaml"), overrides), log))

    yield Step("world", lambda: write_world(world, setting.world))
    yield Step("untrained models", lambda: _write_untrained(untrained, world, setting), untrained)
    yield train("aim", untrained / "encoder", "pretrain")
    yield _compose(folder / "text-vl", untrained / "encoder", untrained / "language", setting)
    yield train("language", folder / "text-vl", "language")
    yield _convert(runs / "language", folder / "language", "language")
    yield _compose(folder / "new-vl", runs / "aim", folder / "language", setting)
    for stage, model in zip(STAGES, (folder / "new-vl", *(runs / stage for stage in STAGES)), strict=False):
        yield train(stage, model, stage)
    yield _convert(runs / STAGES[-1], refined, "vision")
    for name in PROBE_SETS:
        yield _probe(folder, name, (runs / "aim", refined), log)
    answers, tests = folder / "answers.json", world / "test" / "seen"
    yield Step("answers", lambda: write_answers(answers, runs / STAGES[-1], tests, setting.questions), answers)
    yield _report(folder, log, command)


def _write_untrained(folder: Path, world: Path, setting: Setting) -> None:
    """Write an untrained encoder and an untrained language model, whose tokenizer is trained on the world's texts."""
    part, seed = folder.with_name(f"{folder.name}.part"), setting.world.seed
    shutil.rmtree(part, ignore_errors=True)
    random_encoder(part / "encoder", seed, setting.max_tiles, **setting.encoder)
    random_language(part / "language", read_texts(world), setting.vocabulary, seed, **setting.language)
    part.rename(folder)


def _compose(out: Path, vision: Path, language: Path, setting: Setting) -> Step:
    options = {"seed": setting.world.seed, "max_tiles": setting.max_tiles}
    return Step(f"compose {out.name}", lambda: compose_model(vision, language, out, **options), out)


def _convert(source: Path, out: Path, part: str) -> Step:
    return Step(f"convert {source.name} --part {part}", lambda: convert_checkpoint(source, out, part=part), out)


def _probe(folder: Path, name: str, encoders: Sequence[Path], log: Log) -> Step:
    """Return the step that probes encoders on a set of the world; one without a training set uses that of objects."""
    sets, out = folder / "world" / "probe", folder / "probe" / name
    train = name if "train" in PROBE_SETS[name].splits else "objects"
    options = ProbeOptions(heads=HEADS, cache_dir=folder / "cache", device="cpu", dtype="float32")

    def probe() -> None:
        tests = [str(sets / name / "test")]
        run_probe([*map(str, encoders)], str(sets / train / "train"), tests, out, options, log=log)

    return Step(f"probe {name}", probe, out)


def _report(folder: Path, log: Log, command: str) -> Step:
    """Return the step that writes the report on the stages."""
    out, runs = folder / "report.html", [folder / "runs" / stage for stage in STAGES]
    images = folder / "world" / "probe" / "scenes" / "test"

    def report() -> None:
        write_report(
            build_report(runs, str(folder / "new-vl"), images=images, device="cpu", log=log), out, False, command
        )

    return Step("report", report, out)
