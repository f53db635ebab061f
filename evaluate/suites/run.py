# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Runs a suite with a harness, and keeps everything in one folder, the bundle:

    bundle.json            command, versions, weights' hash, settings, and per data set prompt, tiles, judge, scores
    questions/NAME.jsonl   index, prediction, answer and score of every question
    harness/               inputs, predictions and outputs of the harness itself
    harness.log            what it printed

The harness works in `.OUT.work` next to the bundle. If it ends too early, that folder stays, and the same command goes
on with it; OUT appears when all is done.
"""

import datetime
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download

from ...convert.storage.files import hash_file, read_json
from ..pages import check_writable, write_files
from ..versions import package_commit
from . import lmms_eval_harness, vlmevalkit
from .harness import (
    HarnessError,
    Outcome,
    SuiteRun,
    check_judge,
    last_error,
    read_environment,
    run_process,
)
from .sets import SUITES, VLMEVALKIT


BUNDLE, LOG, SETTINGS = "bundle.json", "harness.log", "settings.json"
MODEL_TYPES = ("sailvl", "internvl_chat")  # of this package, of SAIL-VL's releases
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
GOES_ON, UNCHANGED = "the same command goes on with the kept answers", "the bundle is unchanged"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OnOutput = Callable[[bytes], None]


def local_folder(model: str) -> Path:
    """
    Return the folder of a model, downloaded if it is a name on the Hub.

    Raises:
        ValueError: The folder has no config.json or no weights, or is no SAIL-VL.
        OSError: The Hub has no such model, or cannot be reached.
    """
    folder = Path(model) if Path(model).exists() else Path(snapshot_download(model))
    if not (folder / "config.json").exists() or not _weight_files(folder):
        raise ValueError(f"{model} is no model: expected a folder with config.json and weights")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"{model}: expected a SAIL-VL (model_type {' or '.join(MODEL_TYPES)}), got {model_type!r}")
    return folder.resolve()


def run_suite(run: SuiteRun, out: Path, on_line: Callable[[str], None], on_output: OnOutput) -> dict[str, Any]:
    """
    Run a suite and write the bundle `out`; return the content of bundle.json.

    Args:
        on_line: Called with lines about the run.
        on_output: Called with the output of the harness as it comes.

    Raises:
        ValueError: The harness or the judge's key is missing, `out` exists, or another run was begun there.
        HarnessError: The harness ended too early; its work is kept for the next call.
        OSError: The disk is full; the same.
    """
    run, left_out = _checked(run, out)
    for name, reason in left_out.items():
        on_line(f"{name} is left out: {reason}")
    environment = read_environment(run.python, run.harness)
    on_line(f"hashing the weights of {run.model}")
    settings = {**describe(run), "weights": hash_weights(run.model), "versions": environment}
    with explained_disk(out, GOES_ON), _working_folder(out) as work:
        _check_settings(work, settings)
        harness = _module(run)
        (work / "harness").mkdir(exist_ok=True)
        harness.write_inputs(run, work / "harness")
        started = _now()
        outcomes, command = _run_harness(run, work, on_output, rescore=False)
        record = {**settings, "left_out": left_out, "commit": package_commit(), **command}
        record |= {"started": started, "finished": _now()}
        content = _write_bundle(work, record, run, outcomes)
        work.rename(out)
    return content


def _checked(run: SuiteRun, out: Path) -> tuple[SuiteRun, dict[str, str]]:
    """Return the run without the data sets that the harness lacks, and these with the reason."""
    if out.exists():
        raise ValueError(
            f"{out} exists: expected a new folder; give another --out, or score it again with --rescore {out}"
        )
    check_writable(out, "--out")
    if run.harness == VLMEVALKIT and run.batch_size != 1:
        raise ValueError(f"VLMEvalKit asks one question at a time: expected --batch-size 1, got {run.batch_size}")
    left_out = {d.name: f"{run.harness} has no such task" for d in run.data_sets if d.harness_name(run.harness) is None}
    run = replace(run, data_sets=tuple(d for d in run.data_sets if d.name not in left_out))
    if not run.data_sets:
        raise ValueError(f"{run.harness} has none of the data sets: give another --harness, or more with --only")
    check_judge(run)
    return run, left_out


def rescore(
    bundle: Path, python: Path | None, judge: str | None, on_line: Callable[[str], None], on_output: OnOutput
) -> dict[str, Any]:
    """
    Score the kept predictions of a bundle again, without the model, and replace its scores.

    Args:
        python: The harness' Python; None: the one that the bundle records.
        judge: As in SuiteRun; None: as before.

    Raises:
        ValueError: The folder is no bundle, or the judge's key is missing.
        HarnessError: The harness ended too early; the bundle is unchanged.
        OSError: The disk is full; the same.
    """
    before, bundle = read_bundle(bundle), bundle.resolve()
    python = python or Path(before["python"])
    run = replace(restore(before, python), judge=judge or before["judge"], predict_only=False)
    check_judge(run)
    environment = read_environment(python, run.harness)
    with explained_disk(bundle, UNCHANGED), _copy(bundle) as work:
        _module(run).remove_scores(work / "harness")
        _module(run).write_inputs(run, work / "harness")
        on_line(f"scoring the predictions of {bundle}")
        outcomes, command = _run_harness(run, work, on_output, rescore=True)
        earlier = {key: before[key] for key in ("judge", "finished", "versions", "command")}
        earlier["scores"] = {name: entry["scores"] for name, entry in before["data_sets"].items()}
        record = {
            **before,
            "judge": run.judge,
            "predict_only": False,
            "rescored_with": {**command, "versions": environment},
        }
        record |= {"finished": _now(), "earlier": [*before.get("earlier", []), earlier]}
        prompts = {name: entry["prompt"] for name, entry in before["data_sets"].items()}
        for name, outcome in outcomes.items():
            outcome.prompt = prompts[name]
        content = _write_bundle(work, record, run, outcomes)
        _replace(bundle, work)
    return content


def read_bundle(folder: Path) -> dict[str, Any]:
    """
    Return the content of bundle.json.

    Raises:
        ValueError: The folder has none.
    """
    try:
        return json.loads((folder / BUNDLE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no bundle: expected a folder that `sailvit suite --out` wrote") from error


def read_questions(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the questions of a data set of a bundle."""
    text = (folder / "questions" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def describe(run: SuiteRun) -> dict[str, Any]:
    """Return the settings of a run for JSON."""
    fields = asdict(run)
    fields["data_sets"] = [data_set.name for data_set in run.data_sets]
    return {**fields, "model": str(run.model), "python": str(run.python)}


def restore(content: Mapping[str, Any], python: Path) -> SuiteRun:
    """Return the run of a bundle, for another Python."""
    names = content["data_sets"]
    known = SuiteRun.__dataclass_fields__.keys()
    fields = {key: content[key] for key in known if key in content}
    data_sets = tuple(data_set for data_set in SUITES[content["suite"]] if data_set.name in names)
    return SuiteRun(**{**fields, "data_sets": data_sets, "model": Path(content["model"]), "python": python})


def hash_weights(folder: Path) -> dict[str, Any]:
    """Return the sha256 of every weight file, and one of all of them."""
    files = {path.name: hash_file(path) for path in _weight_files(folder)}
    whole = hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in files.items()).encode()).hexdigest()
    return {"sha256": whole, "files": files}


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))


def _module(run: SuiteRun) -> ModuleType:
    return vlmevalkit if run.harness == VLMEVALKIT else lmms_eval_harness


@contextmanager
def _working_folder(out: Path) -> Iterator[Path]:
    """A folder next to the output, for one process at a time."""
    out = out.parent.resolve() / out.name
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{out}: another process is writing it") from None
    work = out.with_name(f".{out.name}.work")
    try:
        work.mkdir(exist_ok=True)
        yield work
    finally:
        if work.exists() and not (work / LOG).exists():  # the harness was not started
            shutil.rmtree(work)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def _copy(bundle: Path) -> Iterator[Path]:
    """A copy of a bundle next to it, which is removed in the end unless it was renamed."""
    work = bundle.with_name(f".{bundle.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    try:
        yield Path(shutil.copytree(bundle, work))
    except shutil.Error as error:  # a list of files, for example where the disk is full
        raise OSError(f"{bundle} cannot be copied to {work}: {error.args[0][0][2]}: {UNCHANGED}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def explained_disk(out: Path, state: str) -> Iterator[None]:
    """Name the output, the fix and the state of things where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(f"{out}: cannot be written: {os.strerror(error.errno)}: free space; {state}") from error


def _check_settings(work: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new run, or compare them with those of the run that is continued, if that has answers."""
    file, text = work / SETTINGS, json.dumps(settings, indent=1, sort_keys=True)
    if file.exists() and file.read_text() != text and not _has_answers(work):
        shutil.rmtree(work)
        work.mkdir()
    if not file.exists():
        write_files({file: text.encode()})
    elif file.read_text() != text:
        before = json.loads(file.read_text())
        names = [key for key in settings if before.get(key) != json.loads(text)[key]]
        raise ValueError(
            f"{work} belongs to a run with another {', '.join(names)}: give the same settings to go on with it, or "
            "remove it to begin again"
        )


def _has_answers(work: Path) -> bool:
    patterns = (*vlmevalkit.ANSWERS, *lmms_eval_harness.ANSWERS)
    return any(file.stat().st_size for pattern in patterns for file in (work / "harness").glob(pattern))


def _run_harness(
    run: SuiteRun, work: Path, on_output: OnOutput, rescore: bool
) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Run the harness to its end; return what it wrote, and the command with its environment variables."""
    harness, folder = _module(run), work.resolve() / "harness"
    command = harness.make_command(run, folder, rescore=rescore)
    variables = harness.make_environment(run, folder)
    log = work / LOG
    start = log.stat().st_size if log.exists() else 0
    code = run_process(command, variables, log, on_output)
    outcomes = harness.collect(run, folder)
    failed = {name: outcome.error for name, outcome in outcomes.items() if outcome.error}
    if code or failed:
        end = f"with exit code {code}" if code > 0 else f"by signal {-code}" if code else "without an error"
        name, reason = next(iter(failed.items()), ("its end", None))
        reason = reason if reason and len(failed) < len(outcomes) else last_error(log, start)
        fix = UNCHANGED if rescore else GOES_ON
        raise HarnessError(f"{run.harness} ended {end} at {name}: {reason}; see {log}; {fix}")
    return outcomes, {"command": command, "environment": variables}


def _write_bundle(work: Path, record: dict[str, Any], run: SuiteRun, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Write questions/ and bundle.json into the working folder, and return the content of bundle.json."""
    shutil.rmtree(work / "questions", ignore_errors=True)
    (work / "questions").mkdir()
    entries = {}
    for data_set in run.data_sets:
        outcome = outcomes[data_set.name]
        lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in outcome.questions]
        (work / "questions" / f"{data_set.name}.jsonl").write_text("".join(lines), encoding="utf-8")
        entry = {"harness_name": data_set.harness_name(run.harness), "tiles": data_set.tiles, "n": len(lines)}
        entries[data_set.name] = {**entry, "prompt": outcome.prompt, "judge": outcome.judge, "scores": outcome.scores}
    content = {**record, "data_sets": entries}
    (work / BUNDLE).write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    return content


def _replace(bundle: Path, work: Path) -> None:
    old = bundle.with_name(f".{bundle.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    bundle.rename(old)
    try:
        work.rename(bundle)
    except OSError:
        old.rename(bundle)
        raise
    shutil.rmtree(old)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
