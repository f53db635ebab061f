"""
The probe: accuracy of heads on the frozen features of vision encoders (SAILViT paper, visual recognition).

Every encoder extracts features of the training and test images once; heads are trained and chosen on the training
set; pairs of encoders are compared on the same test images.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from psutil import virtual_memory

from ...convert.storage.output_folder import check_free, new_folder
from ...devices import choose_device, choose_dtype, dtype_name
from ..datasets import LabelledImages, check_apart, load_images, match_classes
from ..encoders import LAST, Encoder, load_encoder, stored_dtype
from ..models import check_model
from ..pages import check_writable
from ..statistics import compare_paired, wilson_interval
from ..versions import library_versions, package_commit
from .features import CHUNK, Features, compute_features, default_cache, extract_features, read_features
from .files import RESULTS, write_report
from .heads import KINDS, FittedHead, HeadOptions, describe_options, fit_heads, limit_neighbours


Log = Callable[[str], None]
MEMORY_SHARE = 0.4  # of the free memory, for the features of the training set


@dataclass(frozen=True)
class ProbeOptions:
    """What `run_probe` does; the defaults stand in the caption of its tables."""

    heads: tuple[str, ...] = ("mlp",)
    layers: tuple[int | str, ...] = (LAST,)
    preprocessing: str | None = None  # None for each encoder's own
    keeps_prefix: bool = False  # whether class and register tokens are averaged, too
    device: str | None = None
    dtype: str = "auto"
    batch_size: int = 64
    workers: int = 0
    cache_dir: Path | None = None  # None for default_cache()
    uses_cache: bool = True
    head: HeadOptions = field(default_factory=HeadOptions)


@dataclass(frozen=True)
class TestSet:
    """A test set with labels in the numbers of the training set's classes."""

    name: str  # in results
    images: LabelledImages
    labels: torch.Tensor  # (N,)
    subset: torch.Tensor | None  # numbers of its classes, if they are fewer than the training set's

    def variants(self, classes: int) -> dict[str, torch.Tensor | None]:
        """Return names in results -> the classes to choose among, None for all; one alone is no choice."""
        if self.subset is None:
            return {self.name: None}
        own = {f"{self.name} ({len(self.subset)} classes)": self.subset} if len(self.subset) > 1 else {}
        return {**own, f"{self.name} ({classes} classes)": None}


@dataclass
class ProbeResults:
    """What a probe found; `to_json` is results.json."""

    settings: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)  # one for each encoder, test and head
    layers: list[dict[str, Any]] = field(default_factory=list)  # the same for each layer, where there are several
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    heads: list[dict[str, Any]] = field(default_factory=list)  # what was chosen, among what, and curves
    skipped: list[dict[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_probe(
    encoders: Sequence[str],
    train: str,
    tests: Sequence[str],
    out: Path | None = None,
    options: ProbeOptions = ProbeOptions(),
    overwrite: bool = False,
    log: Log = lambda line: None,
    progress: Callable[[str, int], Any] | None = None,
) -> ProbeResults | None:
    """
    Probe encoders, and write results.json, results.md, results.png and evaluation.json to a new folder.

    Under a launcher such as torchrun all processes extract features; the first one trains the heads.

    Args:
        encoders: Names as `load_encoder` takes them.
        train: The training set, as `load_images` takes it.
        tests: The test sets.
        out: The folder to write; None for none.
        options: All else.
        overwrite: Replace a folder that an earlier probe wrote.
        log: Called with each message.
        progress: Called with a title and the number of images; returns a context manager whose value is called with the
            images done and their number.

    Returns:
        The results; None in all processes but the first.

    Raises:
        ValueError: An input cannot be used; the message names it. Nothing is written.
        OSError: A disk is full, or cannot be written.
    """
    rank, ranks, wait = _processes(options)
    log = log if rank == 0 else lambda line: None
    _check_options(encoders, tests, options)
    if out is not None:
        check_free(out, overwrite, RESULTS)
        check_writable(out, "--out")
    if options.uses_cache:
        check_writable((options.cache_dir or default_cache()) / "file", "--cache-dir")
    for name in dict.fromkeys([*encoders, *([options.preprocessing] if options.preprocessing else [])]):
        check_model(name)  # before hours of work on the others
    train_set, test_sets = _load_data(train, tests, log)
    options = replace(
        options, dtype=_common_dtype(encoders, options, log), head=_possible_heads(options, len(train_set), log)
    )
    probe = _Probe(train_set, test_sets, options, log, progress or _no_progress, (rank, ranks, wait))
    for name in encoders:
        probe.add(name)
    if rank:
        return None
    results = probe.finish(list(encoders))
    if out is not None:
        with new_folder(out, overwrite, RESULTS) as folder:
            write_report(folder, results.to_json(), {test.name: test.images.name for test in test_sets})
    return results


def _processes(options: ProbeOptions) -> tuple[int, int, Callable[[], None]]:
    """Return the number of this process, how many there are, and what waits for all of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, lambda: None
    if not options.uses_cache:
        raise ValueError("several processes need the cache: leave --no-cache out")
    from accelerate import PartialState

    state = PartialState(cpu=options.device == "cpu", timeout=timedelta(days=2))
    return state.process_index, state.num_processes, state.wait_for_everyone


def _check_options(encoders: Sequence[str], tests: Sequence[str], options: ProbeOptions) -> None:
    for what, names in (("encoder", encoders), ("--test", tests), ("--head", options.heads)):
        twice = next((name for name in names if list(names).count(name) > 1), None)
        if not names or twice:
            raise ValueError(f"expected {what} {'once: ' + twice if twice else 'at least once'}")
    unknown = [kind for kind in options.heads if kind not in KINDS]
    if unknown:
        raise ValueError(f"--head: expected {', '.join(KINDS)}, got {unknown[0]!r}")
    if not 1 <= options.batch_size <= CHUNK:
        raise ValueError(f"--batch-size: expected 1 to {CHUNK}, got {options.batch_size}")


def _common_dtype(encoders: Sequence[str], options: ProbeOptions, log: Log) -> str:
    """
    Return the dtype that all encoders compute in: where "auto" chooses several, float32, so that rounding is no
    difference between encoders. All of them are loaded once, so a broken one is found before the work on the others.
    """
    if options.dtype != "auto" or len(encoders) == 1:
        return options.dtype
    device = choose_device(options.device)
    dtypes = {name: dtype_name(choose_dtype(stored_dtype(name), device)[0]) for name in encoders}
    if len({*dtypes.values()}) == 1:
        return "auto"
    chosen = ", ".join(f"{dtype} of {name}" for name, dtype in dtypes.items())
    log(f"all encoders compute in float32, since the dtypes of their weights differ ({chosen}); --dtype overrides it")
    return "float32"


def _possible_heads(options: ProbeOptions, images: int, log: Log) -> HeadOptions:
    """Return the options of the heads, without more neighbours than there are training images."""
    if not {*options.heads} & {"knn", "whitened_knn"}:
        return options.head
    head = limit_neighbours(options.head, images)
    if left_out := [str(count) for count in options.head.neighbours if count not in head.neighbours]:
        log(f"--neighbours: {', '.join(left_out)} left out, more than the training images without the split")
    return head


def _load_data(train: str, tests: Sequence[str], log: Log) -> tuple[LabelledImages, list[TestSet]]:
    train_set, found = load_images(train, training=True), []
    names = _short_names(tests)
    for test in tests:
        images = load_images(test, training=False)
        check_apart(train_set, images)
        labels, present = match_classes(train_set, images)
        subset = torch.tensor(present) if len(present) < len(train_set.classes) else None
        if len(present) == 1:
            log(f"{test}: one class, so accuracy is over all {len(train_set.classes)} classes only")
        found.append(TestSet(names[test], images, torch.tensor(labels), subset))
    return train_set, found


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Return the last parts of each path, as few as make all of them differ; the whole where none do."""
    parts = {name: Path(name).parts for name in names}
    lengths = range(1, max(map(len, parts.values()), default=1) + 1)
    candidates = [{name: "/".join(own[-length:]) or name for name, own in parts.items()} for length in lengths]
    short = next((one for one in candidates if len({*one.values()}) == len(one)), candidates[0])
    return {name: last if list(short.values()).count(last) == 1 else name for name, last in short.items()}


def _check_classes(train: LabelledImages, features: Features) -> None:
    """Raise ValueError if no image of a training class can be read: heads would never choose it."""
    readable = torch.bincount(torch.tensor(train.labels)[features.readable], minlength=len(train.classes))
    lost = [name for name, count in zip(train.classes, readable.tolist(), strict=True) if not count]
    if lost:
        what = f"no image of {len(lost)} of {len(train.classes)} classes can be read, such as those of {lost[0]!r}"
        raise ValueError(f"{train.name}: {what}: replace the images, or remove the class from training and test sets")


class _NoProgress:
    def __enter__(self) -> Callable[[int, int], None]:
        return lambda done, total: None

    def __exit__(self, *error: object) -> None:
        return None


def _no_progress(title: str, total: int) -> _NoProgress:
    return _NoProgress()


class _Probe:
    """Results of one encoder after the other on the same data."""

    def __init__(
        self, train: LabelledImages, tests: list[TestSet], options: ProbeOptions, log: Log,
        progress: Callable[[str, int], Any], processes: tuple[int, int, Callable[[], None]],
    ):  # fmt: skip
        self.train, self.tests, self.options, self.log, self.progress = train, tests, options, log, progress
        self.rank, self.ranks, self.wait = processes
        self.cache = options.cache_dir or default_cache()
        self.results = ProbeResults({})
        self.encoders: dict[str, dict[str, Any]] = {}  # as they describe themselves
        self.data: dict[str, dict[str, Any]] = {}
        self.skipped: dict[tuple[str, str], str] = {}
        # (test, head) -> encoder -> whether each image is right, with -1 for unreadable ones
        self.outcomes: dict[tuple[str, str], dict[str, torch.Tensor]] = {}

    def add(self, name: str) -> None:
        """Extract the features of an encoder, train heads on them, and test these."""
        options = self.options
        encoder = load_encoder(
            name, options.layers, options.preprocessing, options.keeps_prefix, options.device, options.dtype, self.log
        )
        self.encoders[name] = encoder.describe()
        images = [self.train, *(test.images for test in self.tests)]
        features = [self._features(encoder, one) for one in images]
        if self.rank == 0:
            _check_classes(self.train, features[0])
        encoder.model.to("meta")  # its memory is free for the heads
        if self.rank == 0:
            for kind in options.heads:
                self._add_head(encoder, kind, features[0], features[1:])

    def _features(self, encoder: Encoder, images: LabelledImages) -> Features | None:
        options = self.options
        if not options.uses_cache:
            features = compute_features(encoder, images, options.batch_size, options.workers)
        else:
            with self.progress(f"{encoder.name}: {images.name}", len(images)) as on_progress:
                extract_features(
                    encoder, images, self.cache, options.batch_size, options.workers, on_progress, self.rank, self.ranks
                )
            self.wait()
            if self.rank:
                return None
            features = read_features(encoder, images, self.cache)
        self._note_data(images, features)
        return features

    def _note_data(self, images: LabelledImages, features: Features) -> None:
        readable = int(features.readable.sum())
        self.data[images.name] = {
            "images": readable, "classes": len(images.classes), "content_sha256": features.content
        }  # fmt: skip
        for one in features.skipped:
            self.skipped.setdefault((one.data, one.image), one.reason)
        if features.skipped:
            first = features.skipped[0]
            self.log(f"{images.name}: {len(features.skipped)} skipped, such as {first.image}: {first.reason}")
        if not readable:
            raise ValueError(f"{images.name}: none of its {len(images)} images can be read")

    def _add_head(self, encoder: Encoder, kind: str, train: Features, tests: list[Features]) -> None:
        labels = torch.tensor(self.train.labels)[train.readable]
        heads = list(self._fit(encoder, kind, train, labels))
        best = max(heads, key=lambda head: head.split_accuracy)
        for head in heads:
            self._note_head(encoder, head, head is best)
            for test, features in zip(self.tests, tests, strict=True):
                self._test(encoder, head, test, features, head is best, len(heads) > 1)

    def _fit(self, encoder: Encoder, kind: str, train: Features, labels: torch.Tensor) -> Iterator[FittedHead]:
        """Yield the head of each layer, from as many layers at a time as memory holds."""
        nbytes, count = len(labels) * encoder.width * 4, len(encoder.layers)
        at_once = max(1, min(count, int(MEMORY_SHARE * virtual_memory().available / nbytes)))
        for start in range(0, count, at_once):
            positions = range(start, min(start + at_once, count))
            values = [train.layer(position) for position in positions]
            features = torch.stack(values) if len(values) > 1 else values[0][None]
            device = choose_device(self.options.device)
            if device.type == "cuda" and features.nbytes < MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
                features = features.to(device)
            for head in fit_heads(kind, features, labels, len(self.train.classes), self.options.head):
                head.layer += start
                yield head

    def _note_head(self, encoder: Encoder, head: FittedHead, is_best: bool) -> None:
        entry = {"model": encoder.name, "head": head.kind, "layer": encoder.layers[head.layer], "is_best": is_best}
        found = {name: getattr(head, name) for name in ("chosen", "split_accuracy", "candidates", "curves")}
        self.results.heads.append({**entry, **found})
        chosen = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in head.chosen.items())
        layer = f", layer {encoder.layers[head.layer]}" if len(encoder.layers) > 1 else ""
        self.log(f"{encoder.name}: {head.kind}{layer}: {chosen}; {head.split_accuracy:.2%} on the split")

    def _test(
        self, encoder: Encoder, head: FittedHead, test: TestSet, features: Features, is_best: bool, by_layer: bool
    ) -> None:
        values, labels = features.layer(head.layer), test.labels[features.readable]
        for name, allowed in test.variants(len(self.train.classes)).items():
            right = head.predict(values, allowed) == labels
            correct, n = int(right.sum()), len(right)
            low, high = wilson_interval(correct, n)
            entry = {"model": encoder.name, "test": name, "head": head.kind, "accuracy": correct / n}
            entry |= {"low": low, "high": high, "n": n}
            if by_layer:
                self.results.layers.append({**entry, "layer": encoder.layers[head.layer]})
            if is_best:
                self.results.results.append(entry)
                outcome = torch.full((len(test.labels),), -1, dtype=torch.int8)
                outcome[features.readable] = right.to(torch.int8)
                self.outcomes.setdefault((name, head.kind), {})[encoder.name] = outcome
                self.log(f"{encoder.name}: {head.kind}: {name}: {correct / n:.2%} [{low:.2%}, {high:.2%}], n = {n:,}")

    def finish(self, encoders: list[str]) -> ProbeResults:
        """Compare all pairs of encoders, and add the settings."""
        for (test, kind), outcomes in self.outcomes.items():
            for first, second in combinations(encoders, 2):
                both = (outcomes[first] >= 0) & (outcomes[second] >= 0)
                if not both.any():
                    continue
                right = [(outcomes[name][both] == 1).numpy() for name in (first, second)]
                compared = asdict(compare_paired(*right, seed=self.options.head.seed))
                entry = {"test": test, "head": kind, "first": first, "second": second}
                self.results.comparisons.append({**entry, **compared})
        self.results.skipped = [
            {"data": data, "image": image, "reason": reason} for (data, image), reason in self.skipped.items()
        ]
        self.results.settings = self._settings(encoders)
        return self.results

    def _settings(self, encoders: list[str]) -> dict[str, Any]:
        options = self.options
        return {
            "command": shlex.join(sys.argv),
            "encoders": self.encoders,
            "train": self.train.name,
            "data": self.data,
            "tokens": _describe_tokens(options),
            "computed_in": self.encoders[encoders[0]]["dtype"],
            "preprocessing": options.preprocessing or "own",
            "heads": describe_options(options.head, options.heads),
            "intervals": "95%: Wilson for accuracies, paired bootstrap for differences; exact McNemar tests",
            "batch_size": options.batch_size,
            "processes": self.ranks,
            "versions": {"sailvit": version("sailvit"), **library_versions()},
            "commit": package_commit(),
        }


def _describe_tokens(options: ProbeOptions) -> str:
    which = "all tokens, class and register tokens too" if options.keeps_prefix else "patch tokens"
    layers = "the encoder's output (last block, after the final norm where the encoder applies one to all tokens)"
    if options.layers != (LAST,):
        layers = (
            f"layers {', '.join(map(str, options.layers))} (a number: output of that block, without the final norm)"
        )
    return f"mean over {which} of {layers}"
