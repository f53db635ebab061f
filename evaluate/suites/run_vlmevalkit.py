# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Runs VLMEvalKit in its own Python, which need not have this package: `python run_vlmevalkit.py RECORDS OPTIONS...`.

RECORDS is a folder. It gets prompts/DATA_SET-RANK.jsonl (what the model was asked), questions/DATA_SET.jsonl (index,
answer, prediction and score of every question, by VLMEvalKit's own rules) and report.json (its summary).
"""

import ast
import contextlib
import functools
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    import pandas

RANK = os.environ.get("RANK", "0")


def main() -> None:
    sys.path.remove(str(Path(__file__).parent))  # its modules would hide others of the same names
    records = Path(sys.argv.pop(1))
    if not torch.cuda.is_available():
        use_cpu()
    from vlmeval import run
    from vlmeval.vlm import SailVL

    record_prompts(SailVL, records / "prompts")
    run.main()
    if RANK == "0":
        write_report(records, Path(option("--work-dir")))


def option(name: str) -> str:
    """Return the value of an option of the command."""
    return sys.argv[sys.argv.index(name) + 1]


def use_cpu() -> None:
    """Let a wrapper that calls .cuda() and synchronizes run on a machine without an NVIDIA GPU."""
    for owner in (torch.nn.Module, torch.Tensor):
        owner.cuda = lambda self, *args, **kwargs: self
    torch.cuda.empty_cache = torch.cuda.synchronize = lambda *args: None


def record_prompts(wrapper: type, folder: Path) -> None:
    """Write the question, the tiles of each image and the options of every call of the model."""
    load, ask = wrapper.__init__, wrapper.generate_inner

    @functools.wraps(load)
    def load_recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        chat = self.model.chat

        def chat_recorded(*args: Any, **kwargs: Any) -> str:
            answer = chat(*args, **kwargs)
            folder.mkdir(parents=True, exist_ok=True)
            call = {"tiles": kwargs["num_patches_list"], "question": kwargs["question"], "answer": answer}
            line = json.dumps({**call, "options": kwargs["generation_config"]}, ensure_ascii=False)
            with open(folder / f"{self.asked_data_set}-{RANK}.jsonl", "a", encoding="utf-8") as file:  # noqa: PTH123
                file.write(line + "\n")
            return answer

        self.model.chat = chat_recorded

    @functools.wraps(ask)
    def ask_recorded(self: Any, message: "list[dict[str, Any]]", dataset: "str | None" = None) -> str:
        self.asked_data_set = dataset
        return ask(self, message, dataset)

    wrapper.__init__, wrapper.generate_inner = load_recorded, ask_recorded


def write_report(records: Path, work: Path) -> None:
    """Write report.json, and the questions of every data set that has predictions."""
    from vlmeval.smp import collect_run_benchmark_report, load

    run_dir = next(path.parent for path in work.glob("*/status.json"))
    status = load(str(run_dir / "status.json"))
    rows = {row["benchmark"]: row for row in collect_run_benchmark_report(run_dir)}
    (records / "questions").mkdir(parents=True, exist_ok=True)
    for name, found in status["datasets"].items():
        rows.setdefault(name, {}).update(metrics=found.get("metrics"), judge=found.get("judge_model"))
        predictions = run_dir / f"{run_dir.name}_{name}.tsv"
        if predictions.exists():
            write_questions(records / "questions" / f"{name}.jsonl", name, predictions, found.get("judge_model"))
    (records / "report.json").write_text(json.dumps(rows, indent=1, default=str))


def write_questions(out: Path, name: str, predictions: Path, judge: "str | None") -> None:
    """Write index, question, answer, prediction and score of every prediction; None for a question without a score."""
    from vlmeval.smp import load

    table = load(str(predictions))
    scores = question_scores(name, predictions, judge)
    with out.open("w", encoding="utf-8") as file:
        for row in table.to_dict("records"):
            index = str(row["index"])
            line = {"index": index, "question": row.get("question"), "answer": row.get("answer")}
            line |= {"prediction": str(row["prediction"]), "score": scores.get(index)}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def question_scores(name: str, predictions: Path, judge: "str | None") -> "dict[str, float]":
    """Return index -> score from the file that VLMEvalKit wrote when it scored a data set; {} if it wrote none."""
    from vlmeval.smp import load

    stem, folder = predictions.stem, predictions.parent
    patterns = (f"{stem}_*_result.tsv", f"{stem}_auxmatch.tsv", f"{stem}_results.tsv", f"{stem}_{judge}.tsv")
    files = [file for pattern in patterns for file in folder.glob(pattern)]
    if not files:
        return score_one_by_one(predictions) if name == "OCRBench" else {}
    table = load(str(max(files, key=lambda file: file.stat().st_mtime)))
    scores = zip(map(str, table["index"]), score_column(name, table), strict=True)
    return {index: score for index, score in scores if not math.isnan(score)}  # NaN: the judge failed


def score_column(name: str, table: "pandas.DataFrame") -> "list[float]":
    """Return the scores of a table, by the harness' own rules where it stores none."""
    for column in ("hit", "score"):
        if column in table:
            return [float(value) for value in table[column]]
    if "eval_match" in table:
        from vlmeval.dataset.utils.vqa_eval import hit_calculate

        matches = [{"match": parse_numbers(text)} for text in table["eval_match"]]
        return [float(value) for value in hit_calculate(matches, name)]
    from vlmeval.dataset.utils.mathvista import post_check

    return [float(bool(post_check(row))) for row in table.to_dict("records")]


def parse_numbers(text: Any) -> "list[float]":
    """Parse a list of numbers and booleans that pandas wrote as text, with numpy's names of types or without."""
    plain = re.sub(r"np\.\w+\((.*?)\)|\bnp\.(True|False)_", lambda found: found[1] or found[2], str(text))
    return [float(value) for value in ast.literal_eval(plain)]


def score_one_by_one(predictions: Path) -> "dict[str, float]":
    """Score each question of OCRBench alone: VLMEvalKit writes only the sums."""
    from vlmeval.dataset import OCRBench
    from vlmeval.smp import dump, load

    scores = {}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:  # noqa: PTH123
        for position, row in load(str(predictions)).iterrows():
            file = f"{folder}/{position}.tsv"
            dump(row.to_frame().T, file)
            with contextlib.redirect_stderr(null):
                scores[str(row["index"])] = float(OCRBench.evaluate(file)["Final Score"])
    return scores


if __name__ == "__main__":
    main()
