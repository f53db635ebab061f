"""Benchmark suites: their data sets, what a harness is given, the bundle, and comparisons, without a harness."""

import ast
import base64
import csv
import errno
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sailvit_cli
from sailvit.evaluate.statistics import mcnemar, paired_bootstrap, wilson_interval
from sailvit.evaluate.suites import lmms_eval_harness, run_vlmevalkit, vlmevalkit
from sailvit.evaluate.suites import run as run_module
from sailvit.evaluate.suites.compare import compare_bundles
from sailvit.evaluate.suites.drawn_questions import LETTERS, draw_questions, write_task, write_tsv
from sailvit.evaluate.suites.harness import HarnessError, SuiteRun
from sailvit.evaluate.suites.kept_answers import KeptAnswers, read_lines
from sailvit.evaluate.suites.run import read_bundle, read_questions, rescore, run_suite
from sailvit.evaluate.suites.sets import DRAWN, HARNESSES, SUITES, choose_data_sets, tiles_of_task
from sailvit_cli import suite as verb


# arXiv 2507.01643, section on MLLM benchmarks.
OPENCOMPASS = ["AI2D", "HallusionBench", "MMBench", "MMMU", "MMVet", "OCRBench", "MMStar", "MathVista_MINI"]
OTHERS = ["ChartQA", "DocVQA", "InfoVQA", "TextVQA", "LLaVABench", "MME", "OCRVQA", "POPE", "RealWorldQA"]
OPENSOURCE = [*OPENCOMPASS, *OTHERS, "SEEDBench", "ScienceQA"]
Z_95 = 1.959963984540054  # 97.5th percentile of the normal distribution
RECORDED = ROOT / "tests" / "data" / "harness"  # what the harnesses wrote about six drawn questions
STAND_IN = """\
#!{python} -IS
# Stands in for the Python of a harness: answers the question for its versions, then leaves recorded files.
import json, os, shutil, sys
from pathlib import Path
if sys.argv[1] == "-c":
    packages = dict(item.split("=") for item in os.environ["INSTALLED"].split())
    print(json.dumps({{"python": "3", "packages": packages, "lmms_eval_models": os.environ["MODELS"].split()}}))
    raise SystemExit
print("asking 1 of 6\\rasking 2 of 6", flush=True)
work = next(Path(word) for word in sys.argv if word.endswith(("harness/outputs", "harness/results"))).parent
for folder in os.environ["LEAVES"].split():
    shutil.copytree(Path(os.environ["RECORDED"]) / folder, work / folder, dirs_exist_ok=True)
if "records" not in os.environ["LEAVES"] and "results" not in os.environ["LEAVES"]:
    print("torch.OutOfMemoryError: CUDA out of memory", flush=True)
    os.kill(os.getpid(), int(os.environ["SIGNAL"])) if os.environ.get("SIGNAL") else sys.exit(1)
"""
LEFT = {"vlmevalkit": ("outputs", "outputs records"), "lmms-eval": ("answers", "answers results")}


def silent(_: object) -> None:
    """Takes lines and output of the harness."""


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "sail-vl"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "sailvl"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def python(tmp_path, monkeypatch) -> Path:
    """A stand-in for the Python of a harness."""
    file = tmp_path / "python"
    file.write_text(STAND_IN.format(python=sys.executable))
    file.chmod(0o755)
    monkeypatch.setenv("INSTALLED", "ms-vlmeval=0.0.20 lmms-eval=0.7.3 torch=2.14.1")
    monkeypatch.setenv("MODELS", "sail_vl")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return file


@pytest.fixture(params=HARNESSES)
def run(request, model, python, monkeypatch) -> SuiteRun:
    """A run of six drawn questions with each harness, which leaves all that it should."""
    monkeypatch.setenv("RECORDED", str(RECORDED / request.param))
    monkeypatch.setenv("LEAVES", LEFT[request.param][1])
    return SuiteRun(DRAWN, SUITES[DRAWN], request.param, model, python, questions=6)


def test_suites_are_those_of_the_paper():
    assert [data_set.name for data_set in SUITES["opencompass"]] == OPENCOMPASS
    assert [data_set.name for data_set in SUITES["opensource"]] == OPENSOURCE
    assert (len(OPENCOMPASS), len(OPENSOURCE)) == (8, 19)
    assert {data_set.tiles for data_set in SUITES["opensource"]} == {10, 12, 18, 24}


def test_names_in_a_harness_are_distinct():
    for harness in HARNESSES:
        names = [data_set.harness_name(harness) for data_set in SUITES["opensource"]]
        assert len({*names}) == len(names) == 19
    assert tiles_of_task("docvqa_val") == 18 and tiles_of_task("another") is None


def test_data_sets_are_chosen_in_the_order_of_the_suite():
    chosen = choose_data_sets("opensource", ["POPE", "AI2D", "MME"], ["MME"])
    assert [data_set.name for data_set in chosen] == ["AI2D", "POPE"]


def test_the_plugin_of_lmms_eval_is_an_entry_point():
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    name, _, target = settings["options.entry_points"]["lmms_eval.models"].strip().partition(" = ")
    module, _, attribute = target.partition(":")
    path = ROOT / f"{module.removeprefix('sailvit.').replace('.', '/')}.py"
    tree = ast.parse(path.read_text())
    assert attribute in {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
    (path_of_class,) = (node.value for node in ast.walk(tree) if getattr(node, "arg", "") == "chat_class_path")
    module, _, class_name = path_of_class.value.rpartition(".")
    text = (ROOT / f"{module.removeprefix('sailvit.').replace('.', '/')}.py").read_text()
    assert class_name in {node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    assert name == lmms_eval_harness.MODEL


def test_vlmevalkit_is_given_class_model_and_data_sets(tmp_path, model):
    run = SuiteRun("opencompass", choose_data_sets("opencompass", ["AI2D", "MMMU"]), "vlmevalkit", model)
    vlmevalkit.write_inputs(replace(run, msac=False, max_new_tokens=16), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "model": {"sail_vl": {"class": "SailVL", "model_path": str(model), "use_msac": False, "max_new_tokens": 16}},
        "data": {
            "AI2D_TEST": {"class": "ImageMCQDataset", "dataset": "AI2D_TEST"},
            "MMMU_DEV_VAL": {"class": "MMMUDataset", "dataset": "MMMU_DEV_VAL"},
        },
    }
    assert vlmevalkit.make_environment(run, tmp_path) == {"PRED_FORMAT": "tsv"}
    assert "--judge" not in vlmevalkit.make_command(run, tmp_path)
    rules = vlmevalkit.make_command(replace(run, judge="exact_matching", limit=5), tmp_path)
    assert rules[-4:] == ["--judge", "exact_matching", "--limit", "5"]
    again = vlmevalkit.make_command(run, tmp_path, rescore=True)
    assert again[3:7] == ["--model", "sail_vl", "--data", "AI2D_TEST"] and str(model) not in again


def test_lmms_eval_is_given_tasks_batch_size_and_kept_answers(tmp_path, model):
    run = SuiteRun("opencompass", choose_data_sets("opencompass", ["AI2D", "MMMU"]), "lmms-eval", model, batch_size=8)
    command = lmms_eval_harness.make_command(run, tmp_path)
    options = dict(zip(command[3::2], command[4::2], strict=False))
    assert options["--tasks"] == "ai2d,mmmu_val" and options["--batch_size"] == "8"
    assert options["--model_args"] == f"pretrained={model},msac=True,answers={tmp_path / 'answers'}"
    assert lmms_eval_harness.make_environment(replace(run, judge="gpt-4o"), tmp_path) == {"MODEL_VERSION": "gpt-4o"}
    several = lmms_eval_harness.make_command(replace(run, processes=4), tmp_path)
    assert several[1:7] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m"]
    with pytest.raises(ValueError, match="has a comma"):
        lmms_eval_harness.make_command(replace(run, model=Path("a,b")), tmp_path)


@pytest.mark.parametrize(
    ("sample", "score"),
    [
        ({"doc_id": 3, "exact_match": 1.0}, 1.0),
        ({"doc_id": 3, "relaxed_overall": False, "submission": {}}, 0.0),
        ({"doc_id": 3, "pope_accuracy": {"question_id": 7, "score": 1.0}}, 1.0),
        ({"doc_id": 3, "llm_as_judge_eval": {"question_id": 7, "true_false": True}}, 1.0),
        ({"doc_id": 3, "gpt_eval_llava_all": {"question": "?", "scores": [8, 6]}}, 6.0),
        ({"doc_id": 3, "gpt_eval_llava_all": {"question": "?", "scores": [-1, -1]}}, None),
        ({"doc_id": 3, "token_counts": 4, "mmmu_acc": {"id": 7, "parsed_pred": "A"}}, None),
    ],
)
def test_score_of_a_sample_of_lmms_eval(sample, score):
    assert lmms_eval_harness.sample_score(sample) == score


def test_drawn_questions_have_one_right_answer_and_depend_on_the_seed_only():
    questions = draw_questions(30, seed=1)
    for question in questions:
        assert len({*question.options}) == 4 and question.answer in LETTERS
    key = [(question.question, question.options, question.answer, question.image.tobytes()) for question in questions]
    assert key == [(q.question, q.options, q.answer, q.image.tobytes()) for q in draw_questions(30, seed=1)]
    assert key[:10] == [(q.question, q.options, q.answer, q.image.tobytes()) for q in draw_questions(10, seed=1)]
    assert key != [(q.question, q.options, q.answer, q.image.tobytes()) for q in draw_questions(30, seed=2)]
    assert {question.category for question in questions} == {"shapes", "text", "charts"}
    assert {question.answer for question in questions} == {*LETTERS}


def test_both_harnesses_get_the_same_questions_and_pictures(tmp_path):
    questions = draw_questions(6)
    write_tsv(questions, tmp_path / "set.tsv")
    write_task(questions, tmp_path / "task", "some_task")
    with (tmp_path / "set.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    lines = [json.loads(line) for line in (tmp_path / "task/images/test/metadata.jsonl").read_text().splitlines()]
    for row, line, question in zip(rows, lines, questions, strict=True):
        assert all(row[key] == str(line[key]) for key in ("index", "question", *LETTERS, "answer", "category"))
        picture = Image.open(io.BytesIO(base64.b64decode(row["image"])))
        other = Image.open(tmp_path / "task/images/test" / line["file_name"])
        assert picture.tobytes() == other.tobytes() == question.image.tobytes()


def test_a_bundle_has_what_a_score_depends_on(run, tmp_path):
    output = []
    content = run_suite(run, tmp_path / "out", silent, output.append)
    assert b"".join(output).startswith(b"asking 1 of 6\rasking 2 of 6")
    assert read_bundle(tmp_path / "out") == content
    assert content["weights"]["files"] == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert content["versions"]["packages"]["torch"] == "2.14.1"
    assert content["command"][0] == str(run.python) and content["batch_size"] == 1 and content["msac"]
    entry = content["data_sets"]["SAILViTDrawn"]
    assert entry["n"] == 6 and entry["tiles"] == 10
    assert "Answer with the option's letter" in entry["prompt"]["question"]
    questions = read_questions(tmp_path / "out", "SAILViTDrawn")
    assert [question["answer"] for question in questions] == [question.answer for question in draw_questions(6)]
    for question in questions:
        assert question["score"] == (question["prediction"] == question["answer"])
    accuracy = sum(question["score"] for question in questions) / 6
    assert any(score == pytest.approx(accuracy) for score in entry["scores"].values()) and 0 < accuracy < 1
    assert {path.name for path in tmp_path.iterdir()} == {"out", "python", "sail-vl"}


@pytest.mark.parametrize(("signal", "end"), [("", "with exit code 1"), ("9", "by signal 9")])
def test_a_harness_that_dies_leaves_no_bundle_and_goes_on_later(run, tmp_path, monkeypatch, signal, end):
    monkeypatch.setenv("LEAVES", LEFT[run.harness][0])
    monkeypatch.setenv("SIGNAL", signal)
    with pytest.raises(HarnessError, match=f"{run.harness} ended {end} .*CUDA out of memory.*goes on") as error:
        run_suite(run, tmp_path / "out", silent, silent)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    work = tmp_path / ".out.work"
    kept = {file: file.read_bytes() for file in (work / "harness").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"another max_new_tokens: give the same settings"):
        run_suite(replace(run, max_new_tokens=5), tmp_path / "out", silent, silent)
    assert kept and all(file.read_bytes() == content for file, content in kept.items())
    monkeypatch.setenv("LEAVES", LEFT[run.harness][1])
    run_suite(run, tmp_path / "out", silent, silent)
    assert len(read_questions(tmp_path / "out", "SAILViTDrawn")) == 6 and not work.exists()


def test_a_start_without_answers_does_not_block_the_corrected_command(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LEAVES", "")
    with pytest.raises(HarnessError, match="CUDA out of memory"):
        run_suite(run, tmp_path / "out", silent, silent)
    assert (tmp_path / ".out.work" / "harness.log").exists()
    monkeypatch.setenv("LEAVES", LEFT[run.harness][1])
    assert run_suite(replace(run, max_new_tokens=5), tmp_path / "out", silent, silent)["max_new_tokens"] == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_names_what_goes_on(model, python, tmp_path, monkeypatch, capsys, error):
    def interrupt(*words: object) -> None:
        raise error

    monkeypatch.setattr(run_module, "run_process", interrupt)
    words = ["--model", model, "--harness", "vlmevalkit", "--python", python, "--out", tmp_path / "out"]
    with suppress(SystemExit):
        sailvit_cli.main(["suite", "drawn", *map(str, words)])
    assert "interrupted: the same command goes on with the kept answers" in capsys.readouterr().err


def request(number: int) -> SimpleNamespace:
    return SimpleNamespace(args=("question?", None, {}, number, "ai2d", "test"), idx=0)


def test_an_answer_that_a_killed_process_cut_is_asked_again_and_harms_no_other(tmp_path):
    kept = KeptAnswers(tmp_path, 0)
    kept.add([request(0), request(1)], ["A", "B"], ["", ""], {})
    file = tmp_path / "answers-0.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    again = KeptAnswers(tmp_path, 0)
    assert (again.find(request(0)), again.find(request(1))) == ("A", None)
    again.add([request(1)], ["C"], [""], {})
    assert [KeptAnswers(tmp_path, 0).find(request(number)) for number in range(2)] == ["A", "C"]
    assert [line["answer"] for line in read_lines(file)] == ["A", "C"]


def test_other_weights_do_not_go_on(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LEAVES", LEFT[run.harness][0])
    with pytest.raises(HarnessError):
        run_suite(run, tmp_path / "out", silent, silent)
    (run.model / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match="another weights"):
        run_suite(run, tmp_path / "out", silent, silent)


def test_rescoring_keeps_predictions_and_earlier_scores(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    before = run_suite(run, out, silent, silent)
    questions = read_questions(out, "SAILViTDrawn")
    monkeypatch.setenv("LEAVES", LEFT[run.harness][0])
    with pytest.raises(HarnessError, match="the bundle is unchanged"):
        rescore(out, run.python, None, silent, silent)
    assert read_bundle(out) == before
    monkeypatch.setenv("LEAVES", LEFT[run.harness][1])
    after = rescore(out, None, "exact_matching", silent, silent)
    assert after["rescored_with"]["command"][0] == str(run.python)
    assert after["judge"] == "exact_matching" and after["data_sets"] == before["data_sets"]
    assert after["earlier"][0]["scores"] == {"SAILViTDrawn": before["data_sets"]["SAILViTDrawn"]["scores"]}
    assert read_questions(out, "SAILViTDrawn") == questions
    assert {path.name for path in tmp_path.iterdir()} == {"out", "python", "sail-vl"}


def write_bundle(folder: Path, scores: dict[str, float | None], **settings) -> Path:
    (folder / "questions").mkdir(parents=True)
    (folder / "bundle.json").write_text(json.dumps({"harness": "vlmevalkit", "data_sets": {"AI2D": {}}, **settings}))
    lines = [json.dumps({"index": index, "score": score}) for index, score in scores.items()]
    (folder / "questions" / "AI2D.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_bundles_are_compared_question_by_question(tmp_path):
    a = write_bundle(tmp_path / "a", {f"q{i}": float(i < 50) for i in range(100)}, batch_size=1)
    b = write_bundle(tmp_path / "b", {f"q{i}": float(5 <= i < 70) for i in reversed(range(100))}, batch_size=2)
    result = compare_bundles(a, b)
    row = result["data_sets"]["AI2D"]
    assert (row["n"], row["a"], row["b"], row["a_only"], row["b_only"]) == (100, 0.5, 0.65, 5, 20)
    assert row["p"] == mcnemar(5, 20) and row["low"] < row["difference"] < row["high"]
    assert result["different"] == {"batch_size": [1, 2]}


def test_graded_scores_are_compared_by_bootstrap_alone(tmp_path):
    a = write_bundle(tmp_path / "a", {"1": 0.5, "2": 0.25})
    row = compare_bundles(a, write_bundle(tmp_path / "b", {"1": 1.0, "2": 0.75}))["data_sets"]["AI2D"]
    assert row["p"] is None and (row["difference"], row["low"], row["high"]) == (0.5, 0.5, 0.5)


def test_data_sets_without_scores_of_questions_are_named(tmp_path):
    a, b = write_bundle(tmp_path / "a", {"1": 1.0}), write_bundle(tmp_path / "b", {"1": None})
    assert compare_bundles(a, b)["skipped"] == {"AI2D": "no question that both bundles have a score for"}


def test_a_data_set_that_one_bundle_lacks_is_named(tmp_path):
    a, b = write_bundle(tmp_path / "a", {"1": 1.0}), write_bundle(tmp_path / "b", {"1": 1.0})
    (b / "bundle.json").write_text(json.dumps({"harness": "vlmevalkit", "data_sets": {"AI2D": {}, "MMMU": {}}}))
    assert compare_bundles(a, b)["skipped"] == {"MMMU": f"in {b} only"}


def test_a_question_that_one_judge_failed_on_is_left_out_of_both(tmp_path, capsys):
    a = write_bundle(tmp_path / "a", {"1": 1.0, "2": 0.0, "3": 1.0})
    b = write_bundle(tmp_path / "b", {"1": None, "2": 1.0, "3": 1.0})
    row = compare_bundles(a, b)["data_sets"]["AI2D"]
    assert (row["n"], row["left_out"], row["a"], row["b"], row["b_only"]) == (2, 1, 0.5, 1.0, 1)
    assert sailvit_cli.main(["suite", "--compare", str(a), str(b)]) == 0
    assert "1 without a score left out" in capsys.readouterr().out


def test_questions_of_another_seed_are_not_compared(run, tmp_path):
    for seed in (0, 1):
        bundle = run_suite(run, tmp_path / f"out{seed}", silent, silent)
        bundle["seed"] = seed
        (tmp_path / f"out{seed}" / "bundle.json").write_text(json.dumps(bundle))
    assert compare_bundles(tmp_path / "out0", tmp_path / "out1")["different"] == {"seed": [0, 1]}
    file = tmp_path / "out1" / "questions" / "SAILViTDrawn.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**line, "answer": "Z"}) + "\n" for line in lines))
    with pytest.raises(
        ValueError, match=r"SAILViTDrawn: answer 0 of .* differ: expected bundles of the same questions"
    ):
        compare_bundles(tmp_path / "out0", tmp_path / "out1")


def test_other_versions_of_two_bundles_are_named(tmp_path):
    bundles = [
        write_bundle(tmp_path / torch, {"1": 1.0}, versions={"packages": {"torch": torch, "numpy": "2"}})
        for torch in ("2.13", "2.14")
    ]
    assert compare_bundles(*bundles)["different"] == {"torch": ["2.13", "2.14"]}


# Judges


@pytest.mark.parametrize(
    ("judge", "note"),
    [
        ({"model": None, "failed": None, "total": None}, ""),
        ({"model": "exact_matching", "failed": 0, "total": 9}, ""),
        ({"model": "gpt-4o", "failed": 0, "total": 9}, ""),
        ({"model": "gpt-4o", "failed": 4, "total": 9}, "; judge gpt-4o failed to score 4 of 9"),
        (
            {"model": "gpt-4o", "failed": None, "total": None},
            "; judge gpt-4o: the harness does not report its failures",
        ),
    ],
)
def test_scores_are_printed_with_the_failures_of_the_judge(judge, note, capsys):
    entry = {"n": 9, "scores": {"all": 0.5}, "judge": judge}
    verb._print_scores({"data_sets": {"MMVet": entry}}, SimpleNamespace(json=False))
    printed = capsys.readouterr().out.strip()
    assert printed.startswith(f"MMVet (9 questions): all 0.5{note}") and bool(note) is ("judge" in printed)


def test_the_judge_of_a_bundle_is_the_one_that_lmms_eval_asks(tmp_path, model, monkeypatch):
    monkeypatch.delenv("MODEL_VERSION", raising=False)
    run = SuiteRun("opencompass", choose_data_sets("opencompass", ["HallusionBench", "MMVet", "MMStar"]), "lmms-eval",
                   model, judge="gpt-4o-mini")  # fmt: skip
    (tmp_path / "results").mkdir()
    for data_set in run.data_sets:
        line = json.dumps({"doc_id": 0, "score": 1.0})
        (tmp_path / "results" / f"1_samples_{data_set.lmms_eval}.jsonl").write_text(line + "\n")
    found = lmms_eval_harness.collect(run, tmp_path)
    judges = {name: outcome.judge["model"] for name, outcome in found.items()}
    assert judges == {"HallusionBench": "gpt-4", "MMVet": "gpt-4o-mini", "MMStar": None}
    assert lmms_eval_harness.make_environment(run, tmp_path) == {"MODEL_VERSION": "gpt-4o-mini"}
    monkeypatch.setenv("MODEL_VERSION", "gpt-4.1")
    assert lmms_eval_harness.make_environment(replace(run, judge="default"), tmp_path) == {"MODEL_VERSION": "gpt-4.1"}
    assert lmms_eval_harness.make_environment(replace(run, judge="exact_matching"), tmp_path) == {}


def test_a_question_that_vlmevalkits_judge_failed_on_has_no_score(tmp_path, monkeypatch):
    load = lambda file: pandas.read_csv(file, sep="\t")  # noqa: E731
    monkeypatch.setitem(sys.modules, "vlmeval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vlmeval.smp", SimpleNamespace(load=load))
    (tmp_path / "m_MMVet_gpt-4o.tsv").write_text("index\tscore\n1\t0.5\n2\t\n")
    assert run_vlmevalkit.question_scores("MMVet", tmp_path / "m_MMVet.tsv", "gpt-4o") == {"1": 0.5}


# Full disks


def fill_disk(monkeypatch, name: str) -> None:
    """Let the disk be full when a file of this name is written."""
    write = Path.write_text

    def fill(path: Path, text: str, **options: object) -> int:
        if path.name != name:
            return write(path, text, **options)
        write(path, text[:9], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fill)


def test_a_bundle_on_a_full_disk_is_written_by_the_next_call(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fill_disk(patch, "bundle.json")
        with pytest.raises(OSError, match="out: cannot be written: No space left on device: free space; the same comm"):
            run_suite(run, tmp_path / "out", silent, silent)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.work" / "harness").is_dir()
    run_suite(run, tmp_path / "out", silent, silent)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "python", "sail-vl"}


def test_rescoring_on_a_full_disk_leaves_the_bundle_as_it_was(run, tmp_path, monkeypatch):
    before = run_suite(run, tmp_path / "out", silent, silent)

    def copytree(source: Path, target: Path) -> Path:
        target.mkdir()
        raise shutil.Error([(str(source), str(target), f"[Errno 28] {os.strerror(errno.ENOSPC)}")])

    for name in ("copy", "bundle.json"):
        with monkeypatch.context() as patch:
            if name == "copy":
                patch.setattr(shutil, "copytree", copytree)
            else:
                fill_disk(patch, name)
            with pytest.raises(OSError, match=r"No space left on device.*the bundle is unchanged"):
                rescore(tmp_path / "out", run.python, None, silent, silent)
        assert read_bundle(tmp_path / "out") == before
        assert {path.name for path in tmp_path.iterdir()} == {"out", "python", "sail-vl"}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_ends_where_the_score_test_rejects(right_of):
    right, n = right_of
    low, high = wilson_interval(right, n)
    assert 0 <= low <= right / n + 1e-12 and right / n - 1e-12 <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(right / n - end) == pytest.approx(Z_95 * math.sqrt(end * (1 - end) / n), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_two_sided_binomial_test(a, b):
    n = a + b
    tail = sum(math.comb(n, k) for k in range(min(a, b) + 1)) / 2**n
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(min(1.0, 2 * tail))


def test_bootstrap_interval_is_that_of_the_normal_distribution_for_many_questions():
    differences = [1.0] * 300 + [0.0] * 600 + [-1.0] * 100
    error = math.sqrt((0.4 - 0.2**2) / 1000)
    assert paired_bootstrap(differences) == pytest.approx((0.2 - Z_95 * error, 0.2 + Z_95 * error), abs=0.003)


def test_the_command_knows_the_harnesses():
    assert verb.HARNESSES == HARNESSES


BAD = {
    "opncompass": "did you mean opencompass?",
    "opencompass --only MMMU MMBenc --model M --harness vlmevalkit --out o": "did you mean MMBench?",
    "opencompass --only AI2D --leave-out AI2D": "no data set of opencompass is left",
    "opencompass": "expected --model, --harness, --out",
    "opencompass --model M --harness vlmevalkit --out o": "MMVet MathVista_MINI has no key: expected OPENAI_API_KEY",
    "opencompass --only AI2D --model M --harness vlmevalkit --out o": "or give --judge exact_matching",
    "opencompass --judge exact_matching --model M --harness vlmevalkit --out o": "give --leave-out MMVet Math",
    "drawn --batch-size 4 --model M --harness vlmevalkit --out o": "expected --batch-size 1, got 4",
    "drawn --model M --harness vlmevalkit --out o --python nowhere": "nowhere cannot be run",
    "drawn --model M/.. --harness vlmevalkit --out o": "expected a folder with config.json and weights",
    "drawn --model E --harness vlmevalkit --out o": "E: expected a SAIL-VL (model_type sailvl or internvl_chat), got",
    "drawn --model M --harness vlmevalkit --out /proc/o": "--out /proc/o: cannot be created in /proc: No such file",
    "drawn --model M --harness vlmevalkit --out M": "M exists: expected a new folder",
    "opensource --only OCRVQA --model M --harness lmms-eval --out o": "lmms-eval has none of the data sets",
    "--rescore M": "M is no bundle",
    "--compare M M": "M is no bundle",
    "drawn --list": "expected one of NAME, --list",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(words, model, python, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "M").symlink_to(model)
    shutil.copytree(model, tmp_path / "E")
    (tmp_path / "E" / "config.json").write_text('{"model_type": "dinov2"}')
    before = {*tmp_path.iterdir()}
    options = words.split()
    options += [] if "--python" in options else ["--python", str(python)]
    assert sailvit_cli.main(["suite", *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sailvit suite:")]
    assert BAD[words] in line
    assert {*tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("harness", "variables", "message"),
    [
        ("vlmevalkit", {"INSTALLED": "torch=2"}, "pip install ms-vlmeval==0.0.20"),
        ("lmms-eval", {"INSTALLED": "ms-vlmeval=1"}, 'pip install lmms-eval==0.7.3 "filelock<4" sailvit'),
        ("lmms-eval", {"MODELS": "other"}, "does not list sail_vl"),
    ],
)
def test_a_harness_that_is_missing_is_named_with_the_command(
    harness, variables, message, model, python, tmp_path, monkeypatch, capsys
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = ["--model", str(model), "--harness", harness, "--python", str(python), "--out", str(tmp_path / "out")]
    assert sailvit_cli.main(["suite", "drawn", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.work").exists()


def test_the_list_needs_no_torch():
    code = "import sys, sailvit_cli; sailvit_cli.main(['suite', '--list']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_list_and_comparison_are_printed(tmp_path, capsys):
    a = write_bundle(tmp_path / "a", {"1": 0.0, "2": 1.0})
    assert sailvit_cli.main(["suite", "--list"]) == 0
    assert sailvit_cli.main(["suite", "--compare", str(a), str(a)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in OPENSOURCE)
    assert "AI2D                  2   0.5000   0.5000  +0.0000" in printed
