"""
The suites through the real harnesses, each in a Python of its own.

SAILVIT_VLMEVALKIT_PYTHON and SAILVIT_LMMS_EVAL_PYTHON are the paths of those; docs/evaluating.md has the commands that
install them. The tests of a harness without its variable are skipped.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from conftest import ROOT
from PIL import Image
from toy_suite import write_suite_model

from sailvit.evaluate.suites.harness import INSTALL, SuiteRun
from sailvit.evaluate.suites.run import read_questions, rescore, run_suite
from sailvit.evaluate.suites.sets import DRAWN, HARNESSES, SUITES
from sailvit.examples.miniature.answers import Answerer
from sailvit.examples.miniature.draw import draw_picture
from sailvit.examples.miniature.pictures import make_scene
from sailvit.examples.miniature.questions import Question, ask_what
from sailvit.examples.miniature.shipped import MULTIMODAL


pytestmark = [pytest.mark.nightly, pytest.mark.xdist_group("harnesses")]
VARIABLES = {"vlmevalkit": "SAILVIT_VLMEVALKIT_PYTHON", "lmms-eval": "SAILVIT_LMMS_EVAL_PYTHON"}
VLMEVALKIT_TABLE = """
import json, sys, vlmeval.dataset
from vlmeval.vlm import SailVL
wrapper, found = object.__new__(SailVL), {}
for name, class_name in json.load(sys.stdin):
    wrapper.set_max_num(name)
    known = getattr(vlmeval.dataset, class_name).supported_datasets()
    found[name] = [wrapper.max_num, wrapper.total_max_num, name in known]
print(json.dumps(found))
"""
# Scores invented answers by each kind of data set's own code, and reads the scores of the questions.
VLMEVALKIT_SCORES = """
import json, sys
from pathlib import Path
script, folder, rows = json.load(sys.stdin)
sys.path.append(script)
import pandas, vlmeval.dataset
from run_vlmevalkit import question_scores
found = {}
for name, class_name, key, lines in rows:
    file = Path(folder) / f"model_{name}.tsv"
    pandas.DataFrame(lines).to_csv(file, sep="\\t", index=False)
    data_set = object.__new__(getattr(vlmeval.dataset, class_name))
    data_set.dataset_name = name
    result = data_set.evaluate(str(file), model="exact_matching")
    found[name] = [question_scores(name, file, "exact_matching"), float(result[key] if key else result["Overall"][0])]
print(json.dumps(found))
"""
LMMS_EVAL_TABLE = """
import json, sys
from lmms_eval.models import get_model, list_available_models
from lmms_eval.tasks import TaskManager
names = json.load(sys.stdin)
known = TaskManager("ERROR").match_tasks(names)
print(json.dumps([sorted(known), "sail_vl" in list_available_models(), get_model("sail_vl").__name__]))
"""


def find_python(harness: str) -> Path:
    if path := os.environ.get(VARIABLES[harness]):
        return Path(path)
    pytest.skip(f"{VARIABLES[harness]} is not set: expected the Python of a venv with {INSTALL[harness]}")


def ask(python: Path, script: str, question: object, variables: dict[str, str] | None = None) -> object:
    environment = {**os.environ, **(variables or {})}
    text = json.dumps(question)
    run = subprocess.run([python, "-c", script], input=text, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    return write_suite_model(folder / "sail-vl", folder, seed=1)


def make_run(harness: str, model: Path, **options) -> SuiteRun:
    return SuiteRun(DRAWN, SUITES[DRAWN], harness, model, find_python(harness), **{"questions": 6, **options})


def predictions(bundle: Path) -> list[str]:
    return [question["prediction"] for question in read_questions(bundle, "SAILViTDrawn")]


def run_quietly(run: SuiteRun, out: Path) -> dict:
    return run_suite(run, out, lambda line: None, lambda chunk: None)


def test_vlmevalkit_has_the_data_sets_and_the_tiles_of_the_table():
    data_sets = SUITES["opensource"]
    found = ask(find_python("vlmevalkit"), VLMEVALKIT_TABLE, [[d.vlmevalkit, d.vlmevalkit_class] for d in data_sets])
    assert found == {d.vlmevalkit: [d.tiles, 64, True] for d in data_sets}


def test_scores_of_questions_add_up_to_those_of_vlmevalkit(tmp_path):
    """For each kind of data set that VLMEvalKit scores by rules of its own, in percent."""

    def lines(*answered: tuple[str, str], **others: object) -> list[dict]:
        return [
            {"index": 7 + i, "question": "?", "answer": answer, "prediction": given, **others}
            for i, (answer, given) in enumerate(answered)
        ]

    rows = [
        ["ChartQA_TEST", "ImageVQADataset", None, lines(("10", "10.4"), ("3", "4"), ("red", "red"))],
        ["DocVQA_VAL", "ImageVQADataset", None, lines(("['harbour']", "harbor"), ("['a']", "zzz"))],
        ["TextVQA_VAL", "ImageVQADataset", None, lines((str(["stop"] * 10), "stop"), (str(["go"] * 10), "halt"))],
        ["OCRBench", "OCRBench", "Final Score", lines(("['x']", "an x"), ("['q']", "y"), category="Doc-oriented VQA")],
        ["POPE", "ImageYORNDataset", None, lines(("Yes", "Yes, it is."), ("No", "Yes"), category="random")],
    ]
    python, folder = find_python("vlmevalkit"), str(ROOT / "evaluate" / "suites")
    found = ask(python, VLMEVALKIT_SCORES, [folder, str(tmp_path), rows], {"PRED_FORMAT": "tsv"})
    values = {name: [*scores.values()] for name, (scores, _) in found.items()}
    assert {name: [*scores] for name, (scores, _) in found.items()} == {
        row[0]: [str(line["index"]) for line in row[3]] for row in rows
    }
    assert values["ChartQA_TEST"] == [1, 0, 1] and values["OCRBench"] == [1, 0] and values["POPE"] == [1, 0]
    assert values["TextVQA_VAL"] == [1, 0] and values["DocVQA_VAL"] == [pytest.approx(1 - 1 / 7), 0]
    assert found["OCRBench"][1] == 1
    for name in ("ChartQA_TEST", "DocVQA_VAL", "TextVQA_VAL"):
        assert 100 * sum(values[name]) / len(values[name]) == pytest.approx(found[name][1], abs=0.01)


def test_lmms_eval_has_the_tasks_and_lists_the_plugin():
    names = sorted(d.lmms_eval for d in SUITES["opensource"] if d.lmms_eval)
    assert ask(find_python("lmms-eval"), LMMS_EVAL_TABLE, names) == [names, True, "SAILVLForLMMsEval"]


def test_lmms_eval_scores_the_trained_miniature_as_its_card(tmp_path):
    questions = write_miniature_task(tmp_path / "task", count=60)
    arguments = f"pretrained={MULTIMODAL},msac=False,dtype=float32"
    options = ["--tasks", "miniature", "--include_path", tmp_path / "task", "--output_path", tmp_path / "out"]
    command = [find_python("lmms-eval"), "-m", "lmms_eval", "--model", "sail_vl", "--model_args", arguments, *options]
    done = subprocess.run([*command, "--batch_size", "8"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (json.loads(path.read_text())["results"] for path in (tmp_path / "out").rglob("*_results.json"))
    answers = Answerer(MULTIMODAL).answer([one.user for one, _ in questions], [picture for _, picture in questions])
    right = [answer == one.assistant for answer, (one, _) in zip(answers, questions, strict=True)]
    assert results["miniature"]["exact_match,none"] == pytest.approx(sum(right) / len(right)) and sum(right) > 50


MINIATURE_TASK = """\
task: miniature
dataset_path: imagefolder
dataset_kwargs: {data_dir: %s}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {max_new_tokens: 16, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write_miniature_task(folder: Path, count: int) -> list[tuple[Question, Image.Image]]:
    """Write questions about new pictures, as a task of lmms-eval."""
    random, images = Random("none of the test pictures"), folder / "images" / "test"
    images.mkdir(parents=True)
    questions, lines = [], []
    for number in range(count):
        scene = make_scene(random, count=4)
        picture, question = Image.fromarray(draw_picture(scene, 32, random)), next(ask_what(scene, random))
        picture.save(images / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "question": question.user, "answer": question.assistant})
        questions.append((question, picture))
    (images / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "miniature.yaml").write_text(MINIATURE_TASK % json.dumps(str(folder / "images")))
    return questions


@pytest.mark.parametrize("harness", HARNESSES)
def test_scores_are_those_of_the_answers_and_come_back_without_the_model(harness, model, tmp_path):
    run = make_run(harness, model, max_new_tokens=1)
    content = run_quietly(run, tmp_path / "out")
    questions = read_questions(tmp_path / "out", "SAILViTDrawn")
    right = [question["prediction"] == question["answer"] for question in questions]
    assert [question["score"] for question in questions] == right and 0 < sum(right) < 6
    scores = content["data_sets"]["SAILViTDrawn"]["scores"]
    assert sum(right) / 6 in scores.values()
    model.rename(model.with_name("away"))
    try:
        after = rescore(tmp_path / "out", run.python, None, lambda line: None, lambda chunk: None)
    finally:
        model.with_name("away").rename(model)
    assert after["data_sets"]["SAILViTDrawn"]["scores"] == scores
    assert read_questions(tmp_path / "out", "SAILViTDrawn") == questions


def test_both_harnesses_ask_the_same_with_the_same_tiles(model, tmp_path):
    prompts = {}
    for harness in HARNESSES:
        content = run_quietly(make_run(harness, model, max_new_tokens=1, questions=3), tmp_path / harness)
        prompts[harness] = content["data_sets"]["SAILViTDrawn"]["prompt"]
    question, (tiles,) = prompts["vlmevalkit"]["question"], prompts["vlmevalkit"]["tiles"]
    asked = question.replace("<image>", f"<img><IMG_CONTEXT> x {256 * tiles}</img>")
    assert f"<|im_start|>user\n{asked}<|im_end|>" in prompts["lmms-eval"]["question"]


def test_answers_do_not_depend_on_the_batch_size(model, tmp_path):
    for size in (1, 3):
        run = make_run("lmms-eval", model, questions=7, max_new_tokens=4, batch_size=size)
        run_quietly(run, tmp_path / f"batch-{size}")
    assert predictions(tmp_path / "batch-1") == predictions(tmp_path / "batch-3")
    assert len({*predictions(tmp_path / "batch-1")}) > 1


# What has a line for every question that was asked, and how many of these may be asked again: VLMEvalKit writes its
# answers ten at a time.
ASKED = {"lmms-eval": ("answers/answers-0.jsonl", 0), "vlmevalkit": ("records/prompts/SAILViTDrawn-0.jsonl", 9)}


@pytest.mark.parametrize("harness", HARNESSES)
def test_an_interrupted_run_asks_only_what_is_left(harness, model, tmp_path):
    out, python = tmp_path / "out", find_python(harness)
    options = ["--model", model, "--harness", harness, "--python", python, "--out", out, "--max-new-tokens", "1"]
    command = [sys.executable, "-m", "sailvit_cli", "suite", "drawn", "--questions", "20", *map(str, options)]
    name, repeated = ASKED[harness]
    asked = tmp_path / ".out.work" / "harness" / name
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
    while not (asked.exists() and asked.read_bytes().count(b"\n") >= 12) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0 and not out.exists()
    before = asked.read_bytes()
    assert 12 <= before.count(b"\n") < 20
    assert subprocess.run(command, stderr=subprocess.DEVNULL, cwd=ROOT).returncode == 0
    after = (out / "harness" / name).read_bytes()
    assert after.startswith(before) and 20 <= after.count(b"\n") <= 20 + repeated
    assert len(predictions(out)) == 20
