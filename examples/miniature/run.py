# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
A miniature from nothing to a report, through the package's own functions; a second call goes on where one stopped.

    setting.json       how large it is, and its seed
    world/, corpora/   pictures, questions, texts; corpora made of them for the arms
    untrained/         a vision encoder, language models
    languages/         language models that are pretrained
    composed/          multimodal models before their training
    runs/aim           the vision encoder, pretrained on pixels
    runs/language      the language model, pretrained on text; so are others, for transfer
    arms/ARM/CORPUS    the stages of an arm, refined/stage1 to refined/stage3 for gradual feature refinement
    sailvit-miniature  the refined vision encoder; those of other arms are in encoders/
    transfer/          a frozen encoder with another language model: the connector, then connector and language model
    probe/, answers/   what the encoders learned, by probes; what the multimodal models answer
    cache/             features of probes
    results/ARM.json   both, and the pictures that it took
    report.html        the stages of refinement
    tokens.png         a picture, and its tokens in the encoders of the arms

With --arms there is such a folder for every seed, and a summary of all of them next to these.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ...convert.compose import compose_model
from ...convert.conversion import convert_checkpoint
from ...evaluate.probe import ProbeOptions, run_probe
from ...evaluate.report import build_report, write_report
from ...train import load_recipe
from ...train.checkpoints import is_finished
from ...train.run import run
from .answers import write_answers
from .arms import ARMS, MIXES, PLAIN, REFINED, check_arms, choose_arms, count_kinds, run_names, write_corpus
from .charts import draw_tokens
from .demo import TILES, make_picture
from .models import random_encoder, random_language
from .results import HEADS, PROBES, TRANSFER, describe_probe, write_result
from .setting import LANGUAGE, Setting, check_setting
from .summary import write_summary
from .world import read_texts, write_world


RECIPES = Path(__file__).parent / "recipes"
INTERVAL = 10.0  # seconds between lines about the same step
ENCODER = "sailvit-miniature"
PICTURED = ("base", "more_aim", REFINED)  # the arms of tokens.png
Log = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """
    A part of a miniature.

    Attributes:
        title: For the log; no two steps have the same.
        make: Does it, or goes on with it; returns an exit code.
        output: What it writes, completely or not at all; None if `make` knows what is left to do.
        samples: Those that are left to train on.
    """

    title: str
    make: Callable[[], object]
    output: Path | None = None
    samples: int = 0


def run_arms(
    folder: Path, setting: Setting, arms: Sequence[str], seeds: Sequence[int], log: Log = print, command: str = ""
) -> int:
    """
    Make a miniature with arms for each seed, in FOLDER/seed-N, and a summary; or go on with it.

    Args:
        folder: Everything is written there.
        setting: How large it is.
        arms: Names of ARMS; none for all. Some have one seed alone.
        seeds: Of world, weights and order.
        log: Called with each message.
        command: For the footer of the reports.

    Returns:
        As `run_miniature`.

    Raises:
        ValueError: There is no such arm or it has none of the seeds, or a folder holds a miniature of another setting
            or without arms.
        TrainingError: A training cannot go on.
        OSError: A file cannot be written.
    """
    check_arms(arms, seeds)
    if (folder / "world").exists():
        raise ValueError(f"{folder}: holds one miniature: give another folder for --arms")
    check_setting(folder, setting.with_seed(0))
    for seed in seeds:
        one, chosen = setting.with_seed(seed), choose_arms(arms or [*ARMS], seed)
        log(f"seed {seed}: {', '.join(chosen) or 'none of these arms'}")
        if not chosen:
            continue
        if code := run_miniature(folder / f"seed-{seed}", one, log, command, chosen, transfers=True):
            return code
        write_summary(folder)
    return 0


def run_miniature(
    folder: Path, setting: Setting, log: Log = print, command: str = "", arms: Sequence[str] = PLAIN,
    transfers: bool = False,
) -> int:  # fmt: skip
    """
    Make a miniature in a folder, or go on with it.

    Args:
        folder: Everything is written there.
        setting: How large it is.
        log: Called with each message.
        command: For the footer of the report.
        arms: Names of ARMS.
        transfers: Try the encoders of the arms with other language models, too.

    Returns:
        0, or the exit code of a training that was stopped: the same call goes on.

    Raises:
        ValueError: The folder holds a miniature of another setting, or those of arms.
        TrainingError: A training cannot go on.
        OSError: A file cannot be written.
    """
    if any(folder.glob("seed-*/world")):
        raise ValueError(f"{folder}: holds those of --arms: give --arms, too, or another folder")
    check_setting(folder, setting)
    steps = Planner(folder, setting, log, command).plan(arms, transfers)
    clock = Clock(sum(step.samples for step in steps))
    for number, step in enumerate(steps, 1):
        title = f"{number}/{len(steps)} {step.title}"
        if step.output and step.output.exists():
            log(f"{title}: done before")
            continue
        log(f"{title} ({clock.describe()})")
        code = step.make()
        if isinstance(code, int) and code:
            return code
        clock.add(step.samples)
    log(f"{folder}: finished after {_minutes(clock.elapsed)}")
    return 0


class Clock:
    """Estimates the time left from the samples that are trained, as most of the time is training."""

    def __init__(self, samples: int):
        self.started, self.samples, self.done = time.monotonic(), samples, 0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def add(self, samples: int) -> None:
        """Note that a step has ended."""
        self.done += samples

    def describe(self) -> str:
        if not 0 < self.done < self.samples:
            return _minutes(self.elapsed)
        left = self.elapsed / self.done * (self.samples - self.done)
        return f"{_minutes(self.elapsed)}, about {_minutes(left)} left"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"


class Planner:
    """Makes the steps of a miniature."""

    def __init__(self, folder: Path, setting: Setting, log: Log = print, command: str = ""):
        self.folder, self.setting, self.log, self.command = folder, setting, log, command
        self.world, self.runs = folder / "world", folder / "runs"
        self.untrained = folder / "untrained" / "encoder"

    def plan(self, arms: Sequence[str], transfers: bool = False) -> list[Step]:
        """Return the steps of arms, each once, in order."""
        transferred = [name for name in arms if transfers and ARMS[name].transfers]
        steps = [*self._prepare(any(ARMS[name].pretrained for name in arms))]
        for name in arms:
            steps += self._train_arm(name)
        for language in self.setting.other_languages if transferred else ():
            steps += self._train_language(language)
            for name in transferred:
                steps += self._transfer(name, language)
        steps += [self._result(name) for name in arms]
        steps += [self._report()] if REFINED in arms else []
        pictured = [name for name in PICTURED if name in transferred]
        steps += [self._tokens(pictured)] if pictured else []
        return [*{step.title: step for step in steps}.values()]

    # Where things are

    def encoder(self, arm: str) -> Path:
        """Return the folder of the vision encoder of an arm."""
        if not ARMS[arm].chain:
            return self.runs / "aim" if ARMS[arm].pretrained else self.untrained
        return self.folder / ENCODER if arm == REFINED else self.folder / "encoders" / arm

    def start(self, arm: str) -> Path:
        """Return the folder of the model that the first stage of an arm begins with."""
        if not ARMS[arm].has_language:
            return self.runs / "aim"
        return self.folder / "composed" / ("new" if ARMS[arm].pretrained else "new-untrained")

    def arm_runs(self, arm: str) -> list[Path]:
        """Return the folders of the stages of an arm."""
        return [self.folder / "arms" / name for name in run_names(arm)]

    def transfer_runs(self, arm: str, language: str) -> list[Path]:
        return [self.folder / "transfer" / f"{arm}-{language}" / name for name in TRANSFER]

    def corpus(self, name: str) -> Path:
        return self.folder / "corpora" / f"{name}.yaml" if name in MIXES else self.world / f"{name}.yaml"

    # Steps

    def _prepare(self, pretrain: bool) -> Iterator[Step]:
        yield Step("world", lambda: write_world(self.world, self.setting.world, _log_now_and_then(self.log)))
        options = self.setting.encoder
        yield _folder_step(
            "untrained encoder",
            self.untrained,
            lambda part: random_encoder(part, self.setting.world.seed, self.setting.max_tiles, **options),
        )
        if pretrain:
            yield self._train("aim", self.untrained, "pretrain", self.runs / "aim")
        yield from self._train_language(LANGUAGE)
        if pretrain:
            yield self._compose("new", self.runs / "aim", LANGUAGE)

    def _train_language(self, name: str) -> Iterator[Step]:
        """Yield the steps to a language model that is pretrained on text, composed with an encoder that it ignores."""
        setting, untrained = self.setting, self.folder / "untrained" / name
        seed = setting.world.seed + [LANGUAGE, *setting.other_languages].index(name)
        config = setting.language if name == LANGUAGE else setting.other_languages[name]
        yield _folder_step(
            f"untrained {name}",
            untrained,
            lambda part: random_language(part, read_texts(self.world), setting.vocabulary, seed, **config),
        )
        composed = self.folder / "composed" / f"text-{name}"
        yield self._compose_from(composed, self.untrained, untrained)
        yield self._train("language", composed, "language", self.runs / name)
        yield self._convert(self.runs / name, self.folder / "languages" / name, "language")

    def _train_arm(self, name: str) -> Iterator[Step]:
        arm, runs = ARMS[name], self.arm_runs(name)
        for _, corpus in arm.chain:
            if corpus in MIXES:
                yield self._write_corpus(corpus)
        if arm.chain and not arm.pretrained:
            yield self._compose("new-untrained", self.untrained, LANGUAGE)
        for (recipe, corpus), (model, out) in zip(arm.chain, pairwise([self.start(name), *runs]), strict=True):
            yield self._train(recipe, model, corpus, out)
        if arm.chain:
            yield self._convert(runs[-1], self.encoder(name), "vision")
        for train in PROBES:
            yield self._probe(name, train)
        if arm.has_language:
            yield self._answers(runs[-1], self.folder / "answers" / f"{name}.json", self.setting.questions)

    def _transfer(self, arm: str, language: str) -> Iterator[Step]:
        composed = f"{arm}-{language}"
        yield self._compose(composed, self.encoder(arm), language)
        runs = self.transfer_runs(arm, language)
        models = [self.folder / "composed" / composed, *runs]
        for name, corpus, (model, out) in zip(TRANSFER, ("transfer1", "transfer2"), pairwise(models), strict=True):
            yield self._train(corpus, model, corpus, out)
            answers = self.folder / "answers" / f"{composed}-{name}.json"
            yield self._answers(out, answers, self.setting.transfer_questions)

    def _train(self, recipe: str, model: Path, corpus: str, out: Path) -> Step:
        values = {"model": model, "data": self.corpus(corpus), "output": out, "seed": self.setting.world.seed}
        overrides = [*(f"{key}={value}" for key, value in values.items()), *self.setting.recipe]
        title = f"train {out.relative_to(self.folder)}"
        samples = 0 if is_finished(out) else sum(count_kinds(corpus, self.setting.world).values())
        path = str(RECIPES / f"{recipe}.yaml")
        return Step(title, lambda: run(load_recipe(path, overrides), self.log), samples=samples)

    def _write_corpus(self, name: str) -> Step:
        out = self.corpus(name)
        return Step(f"corpus {name}", lambda: write_corpus(name, self.world, out, self.setting.world), out)

    def _compose(self, name: str, vision: Path, language: str) -> Step:
        return self._compose_from(self.folder / "composed" / name, vision, self.folder / "languages" / language)

    def _compose_from(self, out: Path, vision: Path, language: Path) -> Step:
        options = {"seed": self.setting.world.seed, "max_tiles": self.setting.max_tiles, "verify": False}
        return Step(f"compose {out.name}", lambda: compose_model(vision, language, out, **options), out)

    def _convert(self, source: Path, out: Path, part: str) -> Step:
        title = f"convert {source.relative_to(self.folder)} --part {part}"
        return Step(title, lambda: convert_checkpoint(source, out, part=part, verify=part == "vision"), out)

    def _probe(self, arm: str, train: str) -> Step:
        """Return the step that probes an encoder on the test sets whose heads have the same training set."""
        sets, out = self.world / "probe", self.folder / "probe" / arm / train
        tests = [str(sets / name / "test") for name in PROBES[train]]
        options = ProbeOptions(heads=tuple(HEADS), cache_dir=self.folder / "cache", dtype="float32")

        def probe() -> None:
            results = run_probe([str(self.encoder(arm))], str(sets / train / "train"), tests, out, options)
            self.log(describe_probe(results.to_json(), train))

        return Step(f"probe {arm} {train}", probe, out)

    def _answers(self, model: Path, out: Path, questions: int) -> Step:
        tests = self.world / "test" / "seen"
        title = f"answers of {model.relative_to(self.folder)}"
        return Step(title, lambda: self.log(write_answers(out, model, tests, questions)), out)

    def _result(self, arm: str) -> Step:
        pairs = [(language, self.transfer_runs(arm, language)) for language in self.setting.other_languages]
        pretraining = [self.runs / "aim"] if ARMS[arm].pretrained else []
        runs = {"pretraining": pretraining, "stages": self.arm_runs(arm)}
        out = self.folder / "results" / f"{arm}.json"
        return Step(f"result {arm}", lambda: write_result(out, arm, self.setting, runs, self.folder, dict(pairs)))

    def _report(self) -> Step:
        """Return the step that writes the report on the stages of refinement."""
        out, base = self.folder / "report.html", str(self.folder / "composed" / "new")
        images = self.world / "probe" / "scenes" / "test"

        def report() -> None:
            content = build_report(self.arm_runs(REFINED), base, images=images, log=lambda line: None)
            write_report(content, out, False, self.command)

        return Step("report", report, out)

    def _tokens(self, arms: Sequence[str]) -> Step:
        """Return the step that draws the tokens of a picture that no encoder was trained on."""
        (picture, _, _), out = make_picture(TILES, self.setting.world.size), self.folder / "tokens.png"
        encoders = {name: self.encoder(name) for name in arms}
        return Step("tokens", lambda: draw_tokens(encoders, picture).save(out, optimize=True))


def _folder_step(title: str, out: Path, write: Callable[[Path], object]) -> Step:
    """Return the step that writes a folder, completely or not at all."""

    def make() -> None:
        part = out.with_name(f"{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        write(part)
        part.rename(out)

    return Step(title, make, out)


def _log_now_and_then(log: Log) -> Callable[[int, int], None]:
    """Return what logs samples that are written, every INTERVAL seconds."""
    last = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last > INTERVAL:
            last = now
            log(f"{done:,} of {total:,} samples")

    return on_progress
