# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""VLMEvalKit: its config, its command, and what it leaves behind."""

import json
import shutil
from pathlib import Path
from typing import Any

from .drawn_questions import draw_questions, write_tsv
from .harness import DEFAULT_JUDGE, RULES, Outcome, SuiteRun
from .kept_answers import read_lines
from .sets import DRAWN


MODEL = "sail_vl"  # the model's name in file names
ANSWERS = ("outputs/**/*.tsv", "outputs/**/*.pkl")  # of all questions of a data set, of some
SCRIPT = Path(__file__).with_name("run_vlmevalkit.py")


def make_config(run: SuiteRun) -> dict[str, Any]:
    """
    Return the content of VLMEvalKit's `--config`.

    The class must be one of VLMEvalKit's own; its SailVL calls `chat` of the model folder. The tiles of a data set are
    set by that class (sets.py has the same table), so they are no part of the config.
    """
    options = {} if run.max_new_tokens is None else {"max_new_tokens": run.max_new_tokens}
    model = {"class": "SailVL", "model_path": str(run.model), "use_msac": run.msac, **options}
    data = {d.vlmevalkit: {"class": d.vlmevalkit_class, "dataset": d.vlmevalkit} for d in run.data_sets}
    return {"model": {MODEL: model}, "data": data}


def write_inputs(run: SuiteRun, folder: Path) -> None:
    """Write config.json, and the drawn questions if the suite has them."""
    (folder / "config.json").write_text(json.dumps(make_config(run), indent=1) + "\n")
    if run.suite == DRAWN:
        (folder / "LMUData").mkdir(exist_ok=True)
        (name,) = (data_set.vlmevalkit for data_set in run.data_sets)
        write_tsv(draw_questions(run.questions, run.seed), folder / "LMUData" / f"{name}.tsv")


def make_command(run: SuiteRun, folder: Path, rescore: bool = False) -> list[str]:
    """Return the command; to score again, the model is a name that VLMEvalKit does not load."""
    source = ["--config", str(folder / "config.json")]
    if rescore:
        source = ["--model", MODEL, "--data", *(data_set.vlmevalkit for data_set in run.data_sets)]
    judge = (
        [] if run.judge == DEFAULT_JUDGE and not _by_rules(run) else ["--judge", RULES if _by_rules(run) else run.judge]
    )
    limit = [] if run.limit is None else ["--limit", str(run.limit)]
    mode = ["--mode", "infer"] if run.predict_only else []
    paths = [*run.launcher(), str(SCRIPT), str(folder / "records")]
    return [*paths, *source, "--work-dir", str(folder / "outputs"), *judge, *limit, *mode]


def make_environment(run: SuiteRun, folder: Path) -> dict[str, str]:
    """Return environment variables: TSV, because xlsx cuts an answer at 32,767 characters."""
    return {"PRED_FORMAT": "tsv"} | ({"LMUData": str(folder / "LMUData")} if run.suite == DRAWN else {})


def remove_scores(folder: Path) -> None:
    """Remove all but the predictions, the prompts and the inputs."""
    outputs = folder / "outputs" / MODEL
    names = {f"{MODEL}_{name}.tsv" for name in json.loads((folder / "config.json").read_text())["data"]}
    for path in outputs.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()
    shutil.rmtree(folder / "records" / "questions", ignore_errors=True)


def collect(run: SuiteRun, folder: Path) -> dict[str, Outcome]:
    """Return what VLMEvalKit wrote about each data set."""
    report_file = folder / "records" / "report.json"
    report = json.loads(report_file.read_text()) if report_file.exists() else {}
    return {d.name: _outcome(run, folder / "records", d.vlmevalkit, report.get(d.vlmevalkit)) for d in run.data_sets}


def _outcome(run: SuiteRun, records: Path, name: str, row: dict[str, Any] | None) -> Outcome:
    if row is None:
        return Outcome(error="VLMEvalKit did not reach it")
    file = records / "questions" / f"{name}.jsonl"
    questions = [json.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []
    prompts = [line for file in sorted((records / "prompts").glob(f"{name}-*.jsonl")) for line in read_lines(file)]
    judge = {"model": row.get("judge"), "failed": row.get("judge_failed"), "total": row.get("judge_total")}
    scores = {key: value for key, value in (row.get("metrics") or {}).items() if isinstance(value, (int, float))}
    error = row.get("eval_error") or (None if scores or run.predict_only else row.get("skip_reason") or "no scores")
    error = error if questions else error or "no predictions"
    prompt = {key: prompts[0][key] for key in ("question", "tiles", "options")} if prompts else None
    return Outcome(scores, questions, prompt, judge, error)


def _by_rules(run: SuiteRun) -> bool:
    return run.judge == RULES or run.suite == DRAWN
