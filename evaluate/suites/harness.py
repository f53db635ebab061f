# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""A benchmark harness in a Python of its own: what is installed there, and a process that may die."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .sets import LMMS_EVAL, VLMEVALKIT, DataSet


RULES, DEFAULT_JUDGE = "exact_matching", "default"
KEY = "OPENAI_API_KEY"
PACKAGES = {VLMEVALKIT: "ms-vlmeval", LMMS_EVAL: "lmms-eval"}  # distributions
INSTALL = {VLMEVALKIT: "ms-vlmeval==0.0.20", LMMS_EVAL: 'lmms-eval==0.7.3 "filelock<4" sailvit'}
CHUNK = 1 << 16  # bytes of output read at once
LAST_LINE = 200  # characters
EXCEPTION = re.compile(r"[\w.]*(Error|Exception)\b:?")
ENVIRONMENT = """
import contextlib, importlib.metadata as m, json, platform
found = {}
for name in ("ms-vlmeval", "lmms-eval", "sailvit", "torch", "torchvision", "transformers", "accelerate",
             "datasets", "numpy", "pillow"):
    with contextlib.suppress(m.PackageNotFoundError):
        found[name] = m.version(name)
models = sorted(e.name for e in m.entry_points(group="lmms_eval.models"))
print(json.dumps({"python": platform.python_version(), "packages": found, "lmms_eval_models": models}))
"""


class HarnessError(ValueError):
    """A harness that is missing or ended too early; the message is one line with the fix."""


@dataclass(frozen=True)
class SuiteRun:
    """
    The settings of a run of a suite.

    Attributes:
        suite: Name of the suite.
        data_sets: Those that are run.
        harness: "vlmevalkit" or "lmms-eval".
        model: Folder of the model.
        python: The harness' Python.
        batch_size: Questions answered together (lmms-eval; VLMEvalKit asks one at a time).
        processes: Accelerators to use, one process each.
        msac: Add a second tiling of each single image.
        max_new_tokens: Most tokens of an answer; None: as in the harness.
        judge: "default": the judges that the harness chooses; "exact_matching": rules only; else the name of a model.
        limit: Questions of each data set; None: all.
        predict_only: Do not score.
        questions, seed: Of the drawn suite.
    """

    suite: str
    data_sets: tuple[DataSet, ...]
    harness: str
    model: Path
    python: Path = Path(sys.executable)
    batch_size: int = 1
    processes: int = 1
    msac: bool = True
    max_new_tokens: int | None = None
    judge: str = DEFAULT_JUDGE
    limit: int | None = None
    predict_only: bool = False
    questions: int = 60
    seed: int = 0

    def launcher(self) -> list[str]:
        """Return the harness' Python, with torchrun for several processes."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        return [str(self.python), *(torchrun if self.processes > 1 else [])]


@dataclass
class Outcome:
    """
    What a harness wrote about a data set.

    Attributes:
        scores: Metric -> value, as in the harness.
        questions: One entry per question: index, prediction, answer, and score; None if the harness gives none.
        prompt: What the model was asked first.
        judge: The model that scored, and how many answers it failed to score, of how many; None: not known.
        error: Why there are no scores.
    """

    scores: dict[str, float] = field(default_factory=dict)
    questions: list[dict[str, Any]] = field(default_factory=list)
    prompt: Any = None
    judge: dict[str, Any] = field(default_factory=lambda: {"model": None, "failed": None, "total": None})
    error: str | None = None


def read_environment(python: Path, harness: str) -> dict[str, Any]:
    """
    Return the versions in a Python: {"python", "packages", "lmms_eval_models"}.

    Raises:
        HarnessError: The Python cannot be run, or the harness or its plugin is not installed there.
    """
    try:
        run = subprocess.run([python, "-c", ENVIRONMENT], capture_output=True, text=True, timeout=300)
        found = json.loads(run.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise HarnessError(f"{python} cannot be run: expected the Python of {harness}; give --python PATH") from error
    if PACKAGES[harness] not in found["packages"]:
        raise HarnessError(
            f"{harness} is not installed in {python}: `python3 -m venv {harness}-venv && {harness}-venv/bin/pip "
            f"install {INSTALL[harness]}`, then give --python {harness}-venv/bin/python"
        )
    if harness == LMMS_EVAL and "sail_vl" not in found["lmms_eval_models"]:
        raise HarnessError(
            f"lmms-eval in {python} does not list sail_vl, the plugin of this package: `{python} -m pip install "
            "sailvit`"
        )
    return found


def check_judge(run: SuiteRun) -> None:
    """
    Check that the judge can be asked.

    Raises:
        ValueError: A data set needs a judge that is excluded or has no key.
    """
    needs = {
        kind: [d for d in run.data_sets if d.harness_judge(run.harness) == kind] for kind in ("optional", "required")
    }
    names = " ".join(data_set.name for data_set in needs["required"])
    if run.predict_only or not (names or needs["optional"]):
        return
    fix = f"; score without them: --judge {RULES} --leave-out {names}" if names else f", or give --judge {RULES}"
    if run.judge == RULES and names:
        raise ValueError(f"{names} cannot be scored by rules: give --leave-out {names}, or another --judge and {KEY}")
    if run.judge != RULES and not os.environ.get(KEY):
        asked = names or " ".join(data_set.name for data_set in needs["optional"])
        raise ValueError(
            f"the judge of {asked} has no key: expected {KEY} in the environment{fix}; or give --predict-only and "
            "score later with --rescore"
        )


def run_process(
    command: Sequence[str], environment: Mapping[str, str], log: Path, on_output: Callable[[bytes], None]
) -> int:
    """
    Run a command, pass its output on as it comes, and append it to a log; return the exit code.

    The process is ended when this function is left by an exception.
    """
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            while chunk := process.stdout.read1(CHUNK):
                file.write(chunk)
                on_output(chunk)
            return process.wait()
        finally:
            process.stdout.close()
            if process.poll() is None:
                process.terminate()
                process.wait()


def last_error(log: Path, start: int = 0) -> str:
    """
    Return the last line of a log that names a Python exception, else its last line with text.

    Args:
        start: Bytes at the beginning that are not looked at: those of earlier attempts.
    """
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.rsplit("\r", 1)[-1].strip() for line in text.split("\n")]  # a progress bar overwrites its line
    lines = [line for line in lines if line]
    errors = [line for line in lines if EXCEPTION.match(line)]
    return next(reversed(errors or lines), "it printed nothing")[:LAST_LINE]
