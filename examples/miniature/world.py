# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Writes the world: training corpora, test questions and probe sets, in the formats that `sailvit` reads.

    plan.json                                 what the folder holds
    CORPUS.yaml, CORPUS/TASK.parquet          for `sailvit train`: pretrain, stage1 to stage3, transfer1, transfer2
    language.yaml, language/train.jsonl       conversations without pictures; and validation.jsonl
    test/LOOK/TASK.parquet                    questions about pictures that training never shows
    probe/SET/{train,test}/CLASS/00000.png    for `sailvit probe`

The parquet files have FineVision's columns, `images` and `texts`, and `categories`, what each question asks for. A
picture has questions of one kind, so that shares of kinds are shares of pictures; short questions follow a caption.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from random import Random

from ...convert.storage.files import read_json, replace_text
from .conversations import make_conversation
from .draw import draw_picture, encode_png
from .pictures import Scene, choose, make_scene
from .questions import TASKS, Question, Task
from .vocabulary import LETTERS, LOOKS, OBJECTS, UNSEEN_LETTERS, Look


PLAN = "plan.json"
TEXT = "text"  # the task without pictures
GROUP = 1000  # rows of a row group
# Shares of the pictures of a corpus; captions and text come first in the paper, all kinds in its stage 3. Letters of 5
# pixels are hard to read: with more of them the rest is learned later
COARSE = {"short_caption": 0.9, "ocr": 0.1}
FINE = {"caption": 0.9, "ocr": 0.1}
ALL = {"caption": 0.05, "ocr": 0.05, "open_qa": 0.2, "short_qa": 0.6, "math": 0.05, TEXT: 0.05}


def split_counts(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Return `total` divided by shares that add up to 1; the last one takes what rounding leaves."""
    counts = {name: round(total * share) for name, share in shares.items()}
    counts[[*shares][-1]] += total - sum(counts.values())
    return counts


@dataclass(frozen=True)
class WorldPlan:
    """
    What a world holds. The same plan gives the same bytes in one environment.

    Attributes:
        size: Pixels of a tile.
        seed: Seed of everything.
        corpora: Corpus -> task (a key of TASKS, or "text") -> samples.
        language: Conversations without pictures of `language/train.jsonl` and `validation.jsonl`.
        questions: Most questions of a picture.
        tests: Pictures of every task of `test/seen`, and of scenes of every other look.
        probe: Pictures of a class for training and testing probes.
    """

    size: int = 32
    seed: int = 0
    corpora: Mapping[str, Mapping[str, int]] = field(
        default_factory=lambda: {
            "pretrain": split_counts(20_000, COARSE),
            "stage1": split_counts(4_000, COARSE),
            "stage2": split_counts(32_000, FINE),
            "stage3": split_counts(40_000, ALL),
            "transfer1": split_counts(6_000, COARSE),
            "transfer2": split_counts(6_000, ALL),
        }
    )
    language: tuple[int, int] = (40_000, 1_000)
    questions: int = 7
    tests: int = 4_000
    probe: tuple[int, int] = (100, 50)

    def scaled(self, factor: float) -> "WorldPlan":
        """Return the plan with all counts of samples multiplied by a positive number, none below 1."""

        if factor <= 0:
            raise ValueError(f"factor: expected a positive number, got {factor}")

        def scale(count: int) -> int:
            return max(1, round(count * factor))

        return replace(
            self,
            corpora={name: {task: scale(n) for task, n in tasks.items()} for name, tasks in self.corpora.items()},
            language=tuple(map(scale, self.language)),
            tests=scale(self.tests),
            probe=tuple(map(scale, self.probe)),
        )


@dataclass(frozen=True)
class Output:
    """A file or folder of the world, the samples in it, and what writes it to a path, yielding after every sample."""

    path: str
    samples: int
    write: Callable[[Path], Iterator[None]]


def write_world(
    folder: str | Path,
    plan: WorldPlan | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """
    Write a world, and return its folder. What is complete is not written again.

    Args:
        folder: The folder, new or begun with the same plan.
        plan: Default: `WorldPlan()`.
        on_progress: Called with the samples that are written, and all of them.

    Raises:
        ValueError: The folder holds a world of another plan, or other files.
        OSError: A file cannot be written.
    """
    folder, plan = Path(folder), plan or WorldPlan()
    _check_folder(folder, plan)
    outputs = [*list_outputs(plan)]
    done, total = 0, sum(output.samples for output in outputs)
    for output in outputs:
        path, part = folder / output.path, folder / f"{output.path}.part"
        if path.exists():
            done += output.samples
            on_progress(done, total)
            continue
        _remove(part)
        part.parent.mkdir(parents=True, exist_ok=True)
        for done, _ in enumerate(output.write(part), done + 1):  # noqa: B020
            on_progress(done, total)
        part.rename(path)
    return folder


def list_outputs(plan: WorldPlan) -> Iterator[Output]:
    """Yield the files and folders of a plan."""
    for corpus, tasks in plan.corpora.items():
        for task, count in tasks.items():
            yield _corpus_file(plan, corpus, task, count)
        yield _text_file(f"{corpus}.yaml", _corpus_yaml(corpus, tasks))
    for split, count in zip(("train", "validation"), plan.language, strict=True):
        yield _conversations(plan, f"language/{split}.jsonl", count, split == "validation")
    yield _text_file("language.yaml", _source_lines([("text", "language/train.jsonl", TEXT)]))
    for look in LOOKS:
        tasks = [task for task in ALL if task != TEXT] if look == "seen" else []
        for task in [*tasks, "scenes"]:
            path = f"test/{look}/{task}.parquet"
            yield _pictures(plan, path, TASKS[task], plan.tests, LOOKS[look], held_out=True)
    yield from _probe_sets(plan)


def _check_folder(folder: Path, plan: WorldPlan) -> None:
    """Write plan.json, or compare it with the plan."""
    content = json.dumps(asdict(plan), indent=2) + "\n"
    path = folder / PLAN
    if path.is_file():
        old, new = read_json(path), json.loads(content)
        if changed := [key for key in new if old.get(key) != new[key]]:
            raise ValueError(
                f"{folder}: holds a world with {changed[0]} {old.get(changed[0])}, expected {new[changed[0]]}: remove "
                "the folder, or give another one"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder, or one with {PLAN}: give another one")
    replace_text(path, content)


def _remove(path: Path) -> None:
    """Remove what a killed process left."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _random(plan: WorldPlan, *names: object) -> Random:
    """Return a source of randomness that depends on the seed and the sample alone, not on the order of writing."""
    return Random("/".join(map(str, (plan.seed, *names))))


# Corpora


def _corpus_file(plan: WorldPlan, corpus: str, task: str, count: int) -> Output:
    if task == TEXT:
        return _conversations(plan, f"{corpus}/text.jsonl", count, held_out=False)
    return _pictures(plan, f"{corpus}/{task}.parquet", TASKS[task], count, LOOKS["seen"], held_out=False)


def _pictures(plan: WorldPlan, path: str, task: Task, count: int, look: Look, held_out: bool) -> Output:
    def samples() -> Iterator[tuple[bytes, list[Question]]]:
        for index in range(count):
            random = _random(plan, path, index)
            picture, questions = task.make(random, look, held_out, plan.questions)
            yield encode_png(draw_picture(picture, plan.size, random, look)), questions

    return Output(path, count, lambda part: _write_parquet(part, samples()))


def _write_parquet(path: Path, samples: Iterator[tuple[bytes, list[Question]]]) -> Iterator[None]:
    """Write pictures and questions in FineVision's layout."""
    import pyarrow as pa
    import pyarrow.parquet

    texts = pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string()}))
    images = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    schema = pa.schema({"images": images, "texts": texts, "categories": pa.list_(pa.string())})
    with pa.parquet.ParquetWriter(path, schema) as writer:
        while group := [*islice(samples, GROUP)]:
            rows = []
            for png, questions in group:
                pairs = [{"user": question.user, "assistant": question.assistant} for question in questions]
                categories = [question.category for question in questions]
                rows.append({"images": [{"bytes": png, "path": None}], "texts": pairs, "categories": categories})
                yield
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _conversations(plan: WorldPlan, path: str, count: int, held_out: bool) -> Output:
    def write(part: Path) -> Iterator[None]:
        with part.open("w", encoding="utf-8") as file:
            for index in range(count):
                messages = []
                for turn in make_conversation(_random(plan, path, index), held_out):
                    messages += [{"role": "user", "content": turn.user}]
                    messages += [{"role": "assistant", "content": turn.assistant}]
                file.write(json.dumps({"messages": messages}) + "\n")
                yield

    return Output(path, count, write)


def _corpus_yaml(corpus: str, tasks: Iterable[str]) -> str:
    files = {task: f"{corpus}/{task}.{'jsonl' if task == TEXT else 'parquet'}" for task in tasks}
    return _source_lines([(task, path, TEXT if task == TEXT else TASKS[task].kind) for task, path in files.items()])


def _source_lines(sources: list[tuple[str, str, str]]) -> str:
    """
    Return a corpus.yaml of sources: name, path, kind.

    Every question about a picture is a conversation of its own; those of a picture share one pass of the encoder.
    """
    lines = ["sources:"]
    for name, path, kind in sources:
        more = "" if kind == TEXT else ", independent_turns: true"
        lines.append(f"  - {{name: {name}, path: {path}, kind: {kind}{more}}}")
    return "\n".join(lines) + "\n"


def _text_file(path: str, content: str) -> Output:
    def write(part: Path) -> Iterator[None]:
        part.write_text(content, "utf-8")
        yield from ()

    return Output(path, 0, write)


# Probe sets


@dataclass(frozen=True)
class ProbeSet:
    """
    Class folders of pictures: things of a look, one in each picture; or scenes.

    Attributes:
        things: The classes.
        look: What else is drawn.
        splits: The folders that are written; a set without train is tested on the classes of `objects`.
        objects: Objects in a picture.
    """

    things: tuple[str, ...]
    look: Look
    splits: tuple[str, ...] = ("train", "test")
    objects: int = 1


PROBE_SETS = {
    "objects": ProbeSet(OBJECTS, LOOKS["seen"]),
    "unseen_letters": ProbeSet(UNSEEN_LETTERS, LOOKS["unseen_letters"]),
    "unseen_font_colour": ProbeSet(OBJECTS, LOOKS["unseen_font_colour"], ("test",)),
    "large_letters": ProbeSet(LETTERS, LOOKS["large_letters"]),
    "clutter": ProbeSet(OBJECTS, LOOKS["clutter"], ("test",)),
    "scenes": ProbeSet(OBJECTS, LOOKS["seen"], objects=4),
}


def _probe_sets(plan: WorldPlan) -> Iterator[Output]:
    for name, probe_set in PROBE_SETS.items():
        for split, count in zip(("train", "test"), plan.probe, strict=True):
            if split in probe_set.splits:
                yield _probe_folder(plan, f"probe/{name}/{split}", probe_set, count, split == "test")


def _probe_folder(plan: WorldPlan, path: str, probe_set: ProbeSet, count: int, held_out: bool) -> Output:
    def write(part: Path) -> Iterator[None]:
        for thing in probe_set.things:
            (part / thing).mkdir(parents=True)
            for index in range(count):
                random = _random(plan, path, thing, index)
                scene = choose(lambda: _probe_scene(random, probe_set, thing), held_out)  # noqa: B023
                png = encode_png(draw_picture(scene, plan.size, random, probe_set.look))
                (part / thing / f"{index:05}.png").write_bytes(png)
                yield

    return Output(path, count * len(probe_set.things), write)


def _probe_scene(random: Random, probe_set: ProbeSet, thing: str) -> Scene:
    """Return a scene of one tile whose first object, which is top left in one of four, is of the class."""
    scene = make_scene(random, probe_set.look, probe_set.objects, (1, 1))
    first, *others = scene.items
    return Scene((replace(first, thing=thing), *others))


# Reading


@dataclass(frozen=True)
class Example:
    """A row of a parquet file of a world: the bytes of a PNG, and the questions about it."""

    png: bytes
    questions: tuple[Question, ...]


def read_examples(path: str | Path) -> Iterator[Example]:
    """Yield the rows of a parquet file of a world; raises OSError if it cannot be read."""
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(GROUP):
        for row in batch.to_pylist():
            pairs = zip(row["texts"], row["categories"], strict=True)
            questions = tuple(Question(text["user"], text["assistant"], category) for text, category in pairs)
            yield Example(row["images"][0]["bytes"], questions)


def read_texts(folder: str | Path) -> Iterator[str]:
    """Yield every question and answer of the training corpora of a world, for a tokenizer."""
    import pyarrow.parquet

    folder = Path(folder)
    corpora = json.loads((folder / PLAN).read_text("utf-8"))["corpora"]
    for path in sorted(path for corpus in corpora for path in (folder / corpus).glob("*.parquet")):
        for texts in pyarrow.parquet.read_table(path, columns=["texts"])["texts"].to_pylist():
            yield from (text[role] for text in texts for role in ("user", "assistant"))
    for line in (folder / "language" / "train.jsonl").read_text("utf-8").splitlines():
        yield from (message["content"] for message in json.loads(line)["messages"])
