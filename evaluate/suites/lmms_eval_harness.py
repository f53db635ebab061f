# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""lmms-eval: its command, and what it leaves behind. The model is in lmms_eval_model.py."""

import json
import numbers
import os
import shutil
from pathlib import Path
from typing import Any

from .drawn_questions import draw_questions, write_task
from .harness import DEFAULT_JUDGE, RULES, Outcome, SuiteRun
from .kept_answers import read_lines
from .sets import DRAWN


ANSWERS = ("answers/*.jsonl",)
MODEL = "sail_vl"
# Fields of a sample that are no metrics.
FIELDS = {"doc_id", "doc_hash", "doc", "target", "arguments", "input", "resps", "filtered_resps", "token_counts"}


def write_inputs(run: SuiteRun, folder: Path) -> None:
    """Write the task of the drawn questions if the suite has them."""
    if run.suite == DRAWN:
        (name,) = (data_set.lmms_eval for data_set in run.data_sets)
        shutil.rmtree(folder / "task", ignore_errors=True)
        write_task(draw_questions(run.questions, run.seed), folder / "task", name)


def make_command(run: SuiteRun, folder: Path, rescore: bool = False) -> list[str]:
    """
    Return the command.

    Raises:
        ValueError: A path has a comma, which separates lmms-eval's model arguments.
    """
    arguments = {"pretrained": run.model, "msac": run.msac, "answers": folder / "answers"}
    if rescore:
        arguments["only_kept"] = True
    for path in (run.model, folder):
        if "," in str(path):
            raise ValueError(f"{path} has a comma, which separates lmms-eval's arguments: rename the folder")
    command = [*run.launcher(), "-m", "lmms_eval", "--model", MODEL]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    command += ["--tasks", ",".join(data_set.lmms_eval for data_set in run.data_sets)]
    command += ["--batch_size", str(run.batch_size), "--output_path", str(folder / "results"), "--log_samples"]
    command += [] if run.limit is None else ["--limit", str(run.limit)]
    command += [] if run.max_new_tokens is None else ["--gen_kwargs", f"max_new_tokens={run.max_new_tokens}"]
    command += ["--predict_only"] if run.predict_only else []
    return command + (["--include_path", str(folder / "task")] if run.suite == DRAWN else [])


def make_environment(run: SuiteRun, folder: Path) -> dict[str, str]:
    """Return environment variables: the judge's name, if `run` or the environment names one."""
    name = os.environ.get("MODEL_VERSION") if run.judge == DEFAULT_JUDGE else run.judge
    return {"MODEL_VERSION": name} if name and name != RULES else {}


def remove_scores(folder: Path) -> None:
    """Remove all but the kept answers and the inputs."""
    shutil.rmtree(folder / "results", ignore_errors=True)


def collect(run: SuiteRun, folder: Path) -> dict[str, Outcome]:
    """Return what lmms-eval wrote about each data set; the newest files count."""
    files = sorted((folder / "results").rglob("*_results.json"))
    results = json.loads(files[-1].read_text())["results"] if files else {}
    kept = {_key(line): line for file in sorted((folder / "answers").glob("*.jsonl")) for line in read_lines(file)}
    outcomes = {}
    for data_set in run.data_sets:
        samples = sorted((folder / "results").rglob(f"*_samples_{data_set.lmms_eval}.jsonl"))
        lines = [json.loads(line) for line in samples[-1].read_bytes().splitlines()] if samples else []
        outcomes[data_set.name] = _outcome(run, data_set.lmms_eval, results.get(data_set.lmms_eval), lines, kept)
    return outcomes


def _outcome(run: SuiteRun, task: str, result: dict[str, Any] | None, samples: list[dict], kept: dict) -> Outcome:
    if not samples:
        return Outcome(error="lmms-eval did not finish it")
    questions = []
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        line = kept.get((task, sample["doc_id"]), {})
        fields = {"index": str(sample["doc_id"]), "question": sample.get("input"), "answer": sample.get("target")}
        fields |= {"prediction": line.get("answer"), "score": None if run.predict_only else sample_score(sample)}
        questions.append({**fields, "prompt": line.get("prompt"), "tiling": line.get("tiling")})
    scores = {key: value for key, value in (result or {}).items() if isinstance(value, (int, float))}
    first = kept.get((task, samples[0]["doc_id"]), {})
    prompt = {"question": first.get("prompt"), "tiling": first.get("tiling"), "options": first.get("options")}
    data_set = next(d for d in run.data_sets if d.lmms_eval == task)
    judge = None if data_set.lmms_eval_judge == "none" else data_set.fixed_judge or run.judge
    error = None if scores or run.predict_only else "no scores"
    return Outcome(scores, questions, prompt, {"model": judge, "failed": None, "total": None}, error)


def sample_score(sample: dict[str, Any]) -> float | None:
    """
    Return the score of a question; None if lmms-eval has none.

    It is the first metric that is a number or has one: "score"; "true_false" (MathVista); the second of "scores", whose
    first is the reference's (LLaVABench; -1 if the judge failed).
    """
    for key, value in sample.items():
        if key in FIELDS:
            continue
        if isinstance(value, dict):
            value = value.get("score", value.get("true_false", value.get("scores")))
            value = value[1] if isinstance(value, list) and len(value) == 2 and min(value) >= 0 else value
        if isinstance(value, numbers.Real):
            return float(value)
    return None


def _key(line: dict[str, Any]) -> tuple[str, int]:
    return line["task"], line["doc_id"]
