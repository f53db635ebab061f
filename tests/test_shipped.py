"""The trained miniature that comes with the package, and `sailvit demo`, which runs it."""

import json
import os
import re
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import ROOT
from einops import rearrange
from fork_server import run_forked
from PIL import Image
from safetensors.torch import load_file

import sailvit_cli
from sailvit.convert.export.code_files import CODE_FILES
from sailvit.examples.miniature.answers import CATEGORIES, Answerer
from sailvit.examples.miniature.charts import draw_tokens
from sailvit.examples.miniature.demo import OBJECTS, SIZE, TILES, make_picture
from sailvit.examples.miniature.draw import draw_picture
from sailvit.examples.miniature.figure import GAP, LINE, ZOOM, draw_figure
from sailvit.examples.miniature.pictures import choose, is_held_out, make_scene
from sailvit.examples.miniature.questions import TASKS, ask_what
from sailvit.examples.miniature.shipped import ENCODER, MULTIMODAL, TRAINED, write_folders
from sailvit.examples.miniature.vocabulary import LOOKS, SEEN
from sailvit.hub import check_before_publish


MOST_BYTES = 8_000_000
PATCH = 4
each_folder = pytest.mark.parametrize("folder", [ENCODER, MULTIMODAL], ids=lambda folder: folder.name)
# The command in a process that has not imported the package, so that the Auto classes take the code of the folders.
COMMAND = """
import socket, sys, sailvit_cli, transformers

def refuse(*arguments):
    raise OSError("went online")

socket.socket.connect = refuse
code = sailvit_cli.main(sys.argv[1:])
remote = {name.split(".")[-1] for name in sys.modules if name.startswith("transformers_modules.")}
print("remote code:", *sorted(remote))
print("package's code:", *sorted(name for name in sys.modules if name.startswith("sailvit.modeling")))
print("training:", *sorted(name for name in sys.modules if name.startswith("sailvit.train")))
sys.exit(code)
"""


@each_folder
def test_code_of_the_folders_is_the_packages(folder):
    code = CODE_FILES[json.loads((folder / "config.json").read_text())["model_type"]]
    assert {path.name for path in folder.glob("*.py")} == {*code}
    old = [name for name in code if (folder / name).read_bytes() != (ROOT / name).read_bytes()]
    assert not old, f"{old} differ: run `sailvit convert {folder.relative_to(ROOT)} --refresh-code`"


def test_folders_are_small():
    files = [path for path in TRAINED.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    assert {path.parent for path in files} == {ENCODER, MULTIMODAL}
    assert sum(path.stat().st_size for path in files) < MOST_BYTES


@each_folder
def test_push_accepts_the_folders(folder):
    assert check_before_publish(folder) == []


@each_folder
def test_cards_show_what_was_measured(folder):
    card = (folder / "README.md").read_text()
    for entry in json.loads((folder / "evaluation.json").read_text()):
        assert (
            f"| {entry['dataset_name']} {entry['dataset_config']} | {entry['metric_name']} | {entry['metric_value']} |"
            in card
        )


def test_the_colours_of_its_tokens_tell_objects_from_the_ground():
    picture, _, _ = make_picture(TILES)
    height, width = (length * ZOOM for length in picture.size)
    colours = np.asarray(draw_tokens({"refined": ENCODER}, picture))[-height:, -width:]
    tokens = colours[:: PATCH * ZOOM, :: PATCH * ZOOM].astype(float)
    light = rearrange(np.asarray(picture.convert("L")), "(y p) (x q) -> y x (p q)", p=PATCH, q=PATCH).max(-1)
    distances = np.linalg.norm(tokens - np.median(tokens[light < 64], axis=0), axis=-1)
    assert np.median(distances[light > 150]) > 4 * np.median(distances[light < 64])


def test_most_answers_about_new_pictures_are_right():
    random, asked = Random("none of the test pictures"), []
    for _ in range(60):
        scene, questions = TASKS["scenes"].make(random, SEEN, True, 7)
        picture = Image.fromarray(draw_picture(scene, SIZE, random))
        asked += [(question, picture) for question in questions if question.category in CATEGORIES]
    answers = Answerer(MULTIMODAL).answer(*zip(*((question.user, picture) for question, picture in asked), strict=True))
    right = [answer == question.assistant for answer, (question, _) in zip(answers, asked, strict=True)]
    assert len(right) > 200 and np.mean(right) > 0.9


@pytest.mark.nightly
def test_answers_about_other_looks_and_other_kinds_of_pictures():
    """Prints the figures of docs/miniature.md."""
    random, answerer, accuracy = Random("none of the test pictures"), Answerer(MULTIMODAL), {}
    tests = [(look, "scenes") for look in ("seen", "clutter", "unseen_font_colour")]
    for look, task in [*tests, ("seen", "ocr"), ("seen", "math")]:
        asked = []
        for _ in range(300):
            picture, questions = TASKS[task].make(random, LOOKS[look], True, 7)
            image = Image.fromarray(draw_picture(picture, SIZE, random, LOOKS[look]))
            asked += [(question, image) for question in questions if task != "scenes" or question.category == "what"]
        answers = answerer.answer(*zip(*((question.user, image) for question, image in asked), strict=True))
        right = [answer == question.assistant for answer, (question, _) in zip(answers, asked, strict=True)]
        accuracy[look, task] = np.mean(right)
        print(f"{look}, {task}: {np.mean(right):.1%} of {len(right)} questions")
    assert accuracy["seen", "scenes"] > 0.9 > accuracy["unseen_font_colour", "scenes"] > 0.3
    assert max(accuracy["seen", "ocr"], accuracy["seen", "math"]) < 0.5


@pytest.mark.nightly
def test_objects_in_several_tiles_are_named_less_often():
    """Prints the figures of docs/miniature.md."""
    random, answerer, accuracy = Random("none of the test pictures"), Answerer(MULTIMODAL), {}
    for tiles in ((1, 1), (2, 1), (1, 2), (2, 2)):
        scenes = [choose(partial(make_scene, random, tiles=tiles), True) for _ in range(200)]
        asked = [(scene, question) for scene in scenes for question in ask_what(scene, random)]
        pictures = [Image.fromarray(draw_picture(scene, SIZE, random)) for scene, _ in asked]
        answers = answerer.answer([question.user for _, question in asked], pictures)
        right = [answer == question.assistant for answer, (_, question) in zip(answers, asked, strict=True)]
        accuracy[tiles] = np.mean(right)
        print(f"{tiles[0]} x {tiles[1]} tiles: {accuracy[tiles]:.1%} of {len(right)} questions")
    one, *several = accuracy.values()
    assert one > 0.93 and 0.2 < np.mean(several) < 0.6


def test_both_folders_are_one_model_and_are_written_by_one_command(tmp_path):
    """What is written from the shipped multimodal model has its weights, and the shipped encoder's."""
    write_folders(MULTIMODAL, tmp_path, log=lambda line: None)
    for folder in (ENCODER, MULTIMODAL):
        written, shipped = (load_file(path / "model.safetensors") for path in (tmp_path / folder.name, folder))
        assert written.keys() == shipped.keys()
        assert all(torch.equal(written[name], shipped[name]) for name in shipped)
        assert "\nlicense: apache-2.0\n" in (tmp_path / folder.name / "README.md").read_text()
        assert {path.name for path in folder.iterdir()} >= {path.name for path in (tmp_path / folder.name).iterdir()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """The folder that the demo writes, and what it prints."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "sailvit-demo").mkdir()
    (folder / "sailvit-demo" / "figure.png").touch()  # of a demo before, which is replaced
    modules = str(tmp_path_factory.mktemp("modules"))
    done = run_forked(COMMAND, "demo", folder=folder, env={**os.environ, "HF_MODULES_CACHE": modules})
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "sailvit-demo", done.stdout


def test_demo_runs_the_code_of_the_folders_offline(demo):
    _, printed = demo
    modules = re.search("^remote code: (.*)", printed, flags=re.MULTILINE)[1].split()
    assert {"modeling_sailvit", "modeling_sailvl", "processing_sailvl"} <= {*modules}
    assert re.search("^package's code:$", printed, flags=re.MULTILINE)
    assert re.search("^training:$", printed, flags=re.MULTILINE)  # whose packages a plain installation has not


def test_demo_prints_its_steps_and_their_seconds(demo):
    folder, printed = demo
    steps = re.findall(r"^(\d)\. .*?^   [\d.]+ s$", printed, flags=re.MULTILINE | re.DOTALL)
    assert steps == [*"12345"] and re.search(r"^Done in \d+ s\.$", printed, flags=re.MULTILINE)
    assert "(5, 3, 32, 32) -> tokens (5, 16, 256)" in printed and "in float32" in printed
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "questions.png", "tiles.png"]


def test_demo_shows_held_out_pictures_and_is_answered_rightly(demo):
    folder, printed = demo
    for name, tiles in (("tiles", TILES), ("questions", (1, 1))):
        picture, scene, questions = make_picture(tiles)
        assert is_held_out(scene.key) and scene.count() == OBJECTS[tiles]
        assert np.array_equal(np.asarray(Image.open(folder / f"{name}.png")), np.asarray(picture))
    assert printed.count("(right)") == 3
    assert [question.category for question in questions] == ["what", "colour", "count"]
    for question in questions:
        answer, verdict = re.search(rf"^   {re.escape(question.user)}  (.*)  \((.*)\)$", printed, re.MULTILINE).groups()
        right = answer == question.assistant
        assert verdict == ("right" if right else f"wrong, expected {question.assistant}")


def test_demo_refuses_a_folder_with_other_files(tmp_path, capsys):
    (tmp_path / "figure.png").touch()  # of a demo before
    (tmp_path / "mine.png").touch()
    assert sailvit_cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} holds mine.png, which is not of this demo: give another --out" in capsys.readouterr().err
    assert sailvit_cli.main(["demo", "--out", str(tmp_path / "mine.png")]) == 2
    assert "mine.png: expected a folder, got a file: give another --out" in capsys.readouterr().err


def test_figure_shows_each_patch_in_its_place():
    """One of 16 x 16 patches differs from all others, and so does its square alone."""
    row, column = Random(0).randrange(16), Random(1).randrange(16)
    tile, y, x = row // 8 * 2 + column // 8, row % 8, column % 8
    features = torch.zeros(5, 4, 2, 4, 2, 3)  # tiles, rows of tokens, 2, columns of tokens, 2, width
    features[tile, y // 2, y % 2, x // 2, x % 2] = torch.tensor([3.0, 2.0, 1.0])
    tokens = features.permute(0, 1, 3, 2, 4, 5).reshape(5, 16, 12)
    pictures = [Image.new("RGB", (side, side)) for side in (2 * SIZE, SIZE)]
    figure = draw_figure(pictures[0], tokens, (2, 2), pictures[1], [])
    side = PATCH * ZOOM
    left, top = figure.width - GAP - (16 * side + GAP), GAP + LINE
    centres = [[(place * side + side // 2) + place // 8 * GAP for place in range(16)]] * 2
    colours = np.asarray(figure)[np.ix_(*(np.add(*pair) for pair in zip(centres, (top, left), strict=True)))]
    differs = (colours != colours[(row + 1) % 16, column]).any(-1)
    assert np.argwhere(differs).tolist() == [[row, column]]
