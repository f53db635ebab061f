# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a run reports of its steps: the figures of log.jsonl and of `report_to`, and the progress.

Utilisation is work / (seconds * peak of all devices). The work is that of `flops.py` for the samples of the step: what
their tokens, tiles and answers need. Empty packs and zero tiles, which only keep the ranks together, do not count.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .cache import new_file
from .estimate import CARDS, card_of
from .flops import SampleFlops


try:
    import resource
except ImportError:  # Windows
    resource = None

LOG, SKIPPED = "log.jsonl", "skipped.jsonl"
GB = 1e9
INTERVAL = 10.0  # seconds between plain lines of progress
LINE, LEFT = "step {n_fmt}/{total_fmt}{postfix}", ", {remaining} left"


# Figures of steps


@dataclass
class StepTotals:
    """
    What one step did, or several, over all ranks.

    Attributes:
        counts: Name -> number of samples, tokens, squared_tokens, answer_tokens, tiles, skipped.
        answers_by_kind: (kinds,), answer tokens.
        losses_by_kind: (kinds,), sums of their cross entropies, whatever `loss_reduction` is.
        fill, balance: Sums over the steps, as in `PackedBatches.statistics`.
        seconds: From the end of the step before to the end of this one.
        wait_seconds: Of the rank that waited longest for its data.
        memory: The peak so far in bytes, of the rank where it is highest.
    """

    counts: dict[str, int]
    answers_by_kind: np.ndarray
    losses_by_kind: np.ndarray = field(default_factory=lambda: np.zeros(0))
    fill: float = 0.0
    balance: float = 0.0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    memory: float = math.nan
    steps: int = 1

    def __add__(self, later: "StepTotals") -> "StepTotals":
        return StepTotals(
            {name: count + later.counts[name] for name, count in self.counts.items()},
            self.answers_by_kind + later.answers_by_kind,
            self.losses_by_kind + later.losses_by_kind,
            self.fill + later.fill,
            self.balance + later.balance,
            self.seconds + later.seconds,
            self.wait_seconds + later.wait_seconds,
            later.memory,
            self.steps + later.steps,
        )


def step_figures(
    totals: StepTotals, kind_names: Sequence[str], flops: SampleFlops, peak: float | None
) -> dict[str, Any]:
    """
    Return the figures of steps that are ratios of their totals.

    Args:
        kind_names: The kinds of the corpus, in the order of their numbers.
        flops: Of the model and what is trained of it.
        peak: FLOPs per second of all devices together, for mfu and hfu; None if unknown.

    Returns:
        loss_by_kind: {kind: mean over its answer tokens}, of the kinds that the steps have; samples_per_second,
        tokens_per_second, tiles_per_second; mfu, hfu, None without a peak; fill, balance; wait_fraction; memory_gb,
        None where the system does not report it.
    """
    counts, seconds = totals.counts, totals.seconds
    parts = zip(kind_names, totals.losses_by_kind, totals.answers_by_kind, strict=True)
    figures: dict[str, Any] = {"loss_by_kind": {name: float(loss / count) for name, loss, count in parts if count}}
    figures |= {f"{name}_per_second": counts[name] / seconds for name in ("samples", "tokens", "tiles")}
    work = flops.of(counts["tokens"], counts["tiles"], counts["answer_tokens"], counts["squared_tokens"])
    for name, done in (("mfu", work.model), ("hfu", work.hardware)):
        figures[name] = None if peak is None else done / (peak * seconds)
    figures |= {"fill": totals.fill / totals.steps, "balance": totals.balance / totals.steps}
    figures["wait_fraction"] = totals.wait_seconds / seconds
    figures["memory_gb"] = None if math.isnan(totals.memory) else totals.memory / GB
    return figures


def flatten_figures(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return figures as scalars for `report_to`: those of kinds as "loss_by_kind/ocr", None left out."""
    by_kind = {f"loss_by_kind/{name}": loss for name, loss in figures["loss_by_kind"].items()}
    return by_kind | {name: value for name, value in figures.items() if isinstance(value, float)}


# Devices


def device_peak(peak_tflops: float | None, device: torch.device, uses_bfloat16: bool) -> float | None:
    """
    Return the most FLOPs per second of a device: as given, else from the data sheets of CARDS, which are of bfloat16.

    None for a CPU, a card that is not among them, and float32.
    """
    if peak_tflops is not None:
        return 1e12 * peak_tflops
    card = card_of(torch.cuda.get_device_name(device)) if device.type == "cuda" and uses_bfloat16 else None
    return None if card is None else CARDS[card].bfloat16_flops


def peak_bytes(device: torch.device) -> float:
    """Return the peak so far of what torch allocated on a GPU, or of the process' resident memory; NaN if unknown."""
    if device.type != "cpu":
        measure = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return math.nan if measure is None else float(measure(device))
    if sys.platform == "linux":  # getrusage there includes the peak of the process that started this one
        status = Path("/proc/self/status").read_text().splitlines()
        return next((1024.0 * int(line.split()[1]) for line in status if line.startswith("VmHWM")), math.nan)
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


# Progress


class Progress:
    """
    A bar on a terminal, elsewhere a line at least every INTERVAL seconds: step, loss, samples per second, time left.

    Args:
        total: Steps of the run.
        done: Those before a resume.
    """

    def __init__(self, total: int, done: int, is_terminal: bool):
        self.total, self.first = total, 0
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) if is_terminal else None
        self.started, self.shown = 0.0, -math.inf

    def update(self, step: int, loss: float, samples_per_second: float) -> None:
        """Show a step that is done."""
        text, now = f"loss {loss:.4f}, {samples_per_second:.1f} samples/s", time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        if not self.first:  # the time left follows from the steps after it: the first one starts workers and compiles
            self.first, self.started = step, now
        if now - self.shown >= INTERVAL or step == self.total:
            self.shown = now
            elapsed, line = now - self.started, LINE + LEFT * (step > self.first)
            options = {"initial": self.first, "postfix": text, "bar_format": line}
            tqdm.write(tqdm.format_meter(step, self.total, elapsed, **options), file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# Files


def append_lines(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Append entries to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def read_lines(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Return the entries of a JSONL file up to a step; [] if it does not exist. A torn last line is left out."""
    content = path.read_bytes() if path.exists() else b""
    entries = map(json.loads, content.split(b"\n")[:-1])
    return [entry for entry in entries if entry["step"] <= last_step]


def keep_until(path: Path, step: int) -> None:
    """Remove the lines of later steps, which a run that goes on from a checkpoint repeats, and a torn last line."""
    kept = read_lines(path, step)
    with new_file(path) as temporary:
        temporary.touch()
        append_lines(temporary, kept)
