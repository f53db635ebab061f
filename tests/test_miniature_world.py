"""The world of drawn pictures: answers compared with pixels, splits with each other, files with their readers."""

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random

import datasets
import numpy as np
import pytest
from conftest import ROOT
from doc_pages import block_with
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_sailvl import load_tokenizer

from sailvit import SAILViTImageProcessor, SAILVLProcessor
from sailvit.evaluate.datasets import load_images, match_classes
from sailvit.examples.miniature import LOOKS, PROBE_SETS, TASKS, WorldPlan, draw_picture, read_examples, write_world
from sailvit.examples.miniature.answers import CATEGORIES as ASKED
from sailvit.examples.miniature.conversations import make_conversation
from sailvit.examples.miniature.draw import encode_png, find_cell
from sailvit.examples.miniature.glyphs import FONTS, draw_glyph, load_glyphs, parse_glyphs
from sailvit.examples.miniature.pictures import Scene, is_held_out, make_chart, make_lines, make_scene, make_sum
from sailvit.examples.miniature.questions import ask_chart, ask_open_chart, ask_short, ask_sum, fine_caption
from sailvit.examples.miniature.vocabulary import (
    CATEGORIES,
    COLOURS,
    DIGITS,
    GRIDS,
    LETTERS,
    SEEN,
    SEEN_COLOURS,
    SEEN_FONTS,
    SHAPES,
    UNSEEN_COLOURS,
    UNSEEN_FONTS,
    UNSEEN_LETTERS,
    WORDS,
    Look,
)
from sailvit.train import Corpus


README = ROOT / "examples" / "miniature" / "README.md"
KINDS = {"caption", "ocr", "open_qa", "short_qa", "math", "text"}  # of the paper
PLAIN = Look(clutter=(0, 0), noise=0.0)
LEGIBLE = 64  # pixels of a tile, so that every glyph is clear
seeds = st.integers(0, 10**9)
drawn = settings(max_examples=20, deadline=None)
datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The world that the README writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("world"))
        exec(block_with(README, "write_world"), {})
        return Path("world").absolute()


PLAN = WorldPlan(corpora={"few": {"caption": 2, "ocr": 2, "text": 2}}, language=(2, 1), tests=1, probe=(1, 1))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("small") / "world", PLAN)


def parquet_files(world: Path) -> dict[str, Path]:
    return {path.relative_to(world).as_posix(): path for path in sorted(world.rglob("*.parquet"))}


def pairs(world: Path, is_test: bool) -> list[tuple[str, str]]:
    """Questions and answers about all pictures of the training corpora, or of the tests."""
    files = [path for name, path in parquet_files(world).items() if name.startswith("test/") is is_test]
    return [(q.user, q.assistant) for path in files for row in read_examples(path) for q in row.questions]


def hash_files(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Glyphs


@pytest.mark.parametrize("font", FONTS)
@pytest.mark.parametrize("height, most", [(9, 0.95), (64, 0.92)])
def test_every_two_glyphs_of_a_font_differ(font, height, most):
    size = 2 * height
    masks = {}
    for name in load_glyphs():
        mask = draw_glyph(name, font, height)
        masks[name] = np.pad(mask / 255, ((0, size - mask.shape[0]), (0, size - mask.shape[1])))
    for one, two in combinations(masks, 2):
        union = np.maximum(masks[one], masks[two]).sum()
        assert np.minimum(masks[one], masks[two]).sum() < most * union, (one, two)


def test_a_glyph_is_drawn_natively_at_every_size():
    large = draw_glyph("3", "plain", 180)
    small = draw_glyph("3", "plain", 12)
    reduced = np.asarray(Image.fromarray(large).resize(small.shape[::-1], Image.Resampling.BOX), np.float64)
    assert np.corrcoef(reduced.ravel(), small.ravel())[0, 1] > 0.9
    assert ((large > 0) & (large < 255)).mean() < 0.05  # edges are sharp, not enlarged


@pytest.mark.parametrize("text", ["A", "A a7-f1", "A a7", "A a7-c1\nA a1-a7", "A fill"])
def test_a_wrong_line_of_glyphs_is_an_error(text):
    with pytest.raises(ValueError, match=r"line \d: glyph A"):
        parse_glyphs(text)


# Pixels


def coloured(pixels: np.ndarray) -> np.ndarray:
    """Where a picture without noise is no ground, which is dark."""
    return pixels.max(-1) > 130


def nearest_colour(pixels: np.ndarray) -> str:
    """The name of the colour of an object: that of its brightest pixels."""
    bright = pixels[pixels.max(-1) >= pixels.max() - 8].astype(np.float64).mean(0)
    return min(COLOURS, key=lambda name: np.abs(bright - COLOURS[name]).sum())


def nearest_thing(pixels: np.ndarray, look: Look) -> str:
    """The name of an object: that of the glyph whose coverage is nearest, of those of its height and width."""
    brightness = pixels.max(-1).astype(np.float64)
    brightness = np.clip((brightness - brightness.min()) / (brightness.max() - brightness.min()), 0, 1)
    rows, columns = np.flatnonzero((brightness > 0.4).any(1)), np.flatnonzero((brightness > 0.4).any(0))
    crop = brightness[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return min(look.things, key=lambda thing: min(_difference(crop, thing, font) for font in look.fonts))


def _difference(crop: np.ndarray, thing: str, font: str) -> float:
    mask = draw_glyph(thing, font, 64)
    rows, columns = np.flatnonzero((mask > 100).any(1)), np.flatnonzero((mask > 100).any(0))
    mask = Image.fromarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    ratio = (mask.width / mask.height) / (crop.shape[1] / crop.shape[0])
    resized = np.asarray(mask.resize(crop.shape[::-1], Image.Resampling.BOX), np.float64) / 255
    return float(((resized - crop) ** 2).mean() + 0.1 * np.log(ratio) ** 2)


def see_scene(scene: Scene, pixels: np.ndarray, look: Look) -> dict[str, tuple[str, str]]:
    """Cell -> (colour, thing) of the objects, from the pixels; the description only gives the grid."""
    columns, rows = GRIDS[scene.tiles]
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    seen = {}
    for index, cell in enumerate(scene.cells):
        top, left = index // columns * height, index % columns * width
        part = pixels[top : top + height, left : left + width]
        if coloured(part).any():
            seen[cell] = nearest_colour(part), nearest_thing(part, look)
    return seen


def answer(question: str, seen: dict[str, tuple[str, str]]) -> str:
    """Answer a short question about a scene of several objects from what is seen."""
    things = [thing for _, thing in seen.values()]
    if match := re.fullmatch(r"What is (top|middle|bottom)(.*)\?", question):
        return seen.get("".join(match.groups()), ("", "nothing"))[1]
    if match := re.fullmatch(r"What is (\w+)\?", question):
        return next(thing for colour, thing in seen.values() if colour == match[1])
    if match := re.fullmatch(r"What colour is the object (.*)\?", question):
        return seen[match[1]][0]
    if match := re.fullmatch(r"What colour is the (\w+)\?", question):
        return next(colour for colour, thing in seen.values() if thing == match[1])
    if match := re.fullmatch(r"Is there a (\w+) (\w+)\?", question):
        return "yes" if match.groups() in seen.values() else "no"
    match = re.fullmatch(r"How many (.*?)s? are there\?", question)
    if match[1] in CATEGORIES:
        return str(sum(thing in CATEGORIES[match[1]] for thing in things))
    colour = match[1].removesuffix(" object")
    return str(len(things) if colour == "object" else sum(one == colour for one, _ in seen.values()))


@drawn
@given(seeds, st.sampled_from([*GRIDS]))
def test_short_answers_are_what_the_pixels_show(seed, tiles):
    random = Random(seed)
    scene = make_scene(random, PLAIN, random.randint(2, 4), tiles)
    seen = see_scene(scene, draw_picture(scene, LEGIBLE, random, PLAIN), PLAIN)
    caption, *questions = ask_short(scene, random)
    assert caption.category == "caption" and caption.assistant == fine_caption(scene)
    assert {question.category for question in questions} == {"what", "colour", "count", "exists"}
    assert [(q.user, q.assistant) for q in questions] == [(q.user, answer(q.user, seen)) for q in questions]


@drawn
@given(seeds, st.sampled_from(["seen", "large_letters", "unseen_letters", "unseen_font_colour"]))
def test_the_only_object_of_a_picture_is_what_is_asked_for(seed, name):
    look = LOOKS[name]
    plain = Look(look.things, look.colours, look.fonts, 1, look.single, (0, 0), 0.0)
    scene = make_scene(Random(seed), plain)
    pixels = draw_picture(scene, LEGIBLE, Random(seed), plain)
    answers = {question.category: question.assistant for question in ask_short(scene, Random(seed))}
    assert answers["what"] == nearest_thing(pixels, plain)
    assert answers["colour"] == nearest_colour(pixels)
    assert answers["count"] == "1"


@drawn
@given(seeds)
def test_bars_are_as_high_as_the_answers(seed):
    chart = make_chart(Random(seed))
    pixels = draw_picture(chart, LEGIBLE, Random(seed), PLAIN)[:-5]  # without the axis
    heights = {}
    for column in range(pixels.shape[1]):
        if coloured(pixels[:, column]).any():
            colour = nearest_colour(pixels[:, column])
            heights[colour] = int(coloured(pixels[:, column]).sum())
    order = sorted(heights, key=heights.get)
    asked = {q.user: q.assistant for q in (*ask_chart(chart, Random(seed)), *ask_open_chart(chart, Random(seed)))}
    assert asked["How many bars are there?"] == str(len(heights))
    assert asked["What colour is the highest bar?"] == order[-1]
    assert asked["Which bar is the lowest?"] == f"The {order[0]} bar is the lowest."
    unit = heights[order[-1]] / max(dict(chart.bars).values())
    for question, value in asked.items():
        if match := re.fullmatch(r"How high is the (\w+) bar\?", question):
            assert abs(heights[match[1]] - int(value) * unit) < unit / 2


@drawn
@given(seeds)
def test_sums_are_right(seed):
    picture = make_sum(Random(seed))
    asked = {question.user: question.assistant for question in ask_sum(picture, Random(seed))}
    left, sign, right, result = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", asked["Read and solve it."]).groups()
    assert int(result) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
    added, more = next((int(re.search(r"\d+", user)[0]), text) for user, text in asked.items() if "Add" in user)
    assert int(more) == int(result) + added


@drawn
@given(seeds, st.sampled_from([make_lines, make_sum]), st.sampled_from([32, 48]))
def test_text_is_inside_of_its_picture(seed, make, size):
    picture = make(Random(seed))
    pixels = draw_picture(picture, size, Random(seed), PLAIN).astype(np.int64)
    assert pixels.shape == (picture.tiles[1] * size, picture.tiles[0] * size, 3)
    ground = np.median(pixels, (0, 1))
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert np.abs(pixels - ground).max() > 60 >= np.abs(edges - ground).max()


@drawn
@given(seeds)
def test_objects_are_in_their_cells_at_every_size(seed):
    scene = make_scene(Random(seed), PLAIN)
    for size in (32, 100):
        pixels = draw_picture(scene, size, Random(seed), PLAIN)
        for item in scene.items:
            left, top, right, bottom = find_cell(scene, item, size)
            assert coloured(pixels[top:bottom, left:right]).any()
            pixels[top:bottom, left:right] = 0
        assert not coloured(pixels).any()


@drawn
@given(st.integers(1, 40), st.integers(1, 40), seeds)
def test_pillow_reads_the_png_files(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(encode_png(pixels)))) == pixels).all()


# Splits


@drawn
@given(seeds, st.sampled_from([*TASKS]))
def test_training_shows_nothing_unseen_and_no_split_the_descriptions_of_another(seed, task):
    for held_out in (False, True):
        picture, questions = TASKS[task].make(Random(seed), LOOKS["seen"], held_out, 6)
        assert is_held_out(picture.key) is held_out
        assert len({question.user for question in questions}) == len(questions) <= 6
        names = {*re.findall(r"\w+", " ".join(f"{question.user} {question.assistant}" for question in questions))}
        assert not names & {*UNSEEN_COLOURS, *UNSEEN_LETTERS}
        if isinstance(picture, Scene):
            assert not {item.thing for item in picture.items} & {*UNSEEN_LETTERS}
            assert {item.colour for item in picture.items} <= {*SEEN_COLOURS}
            assert not {item.font for item in picture.items} & {*UNSEEN_FONTS}


def test_texts_of_training_have_no_unseen_letter_and_no_unseen_font():
    assert {*"".join(WORDS)} <= {*LETTERS} and not {*LETTERS} & {*UNSEEN_LETTERS}
    for make in (make_lines, make_sum):
        assert {make(Random(seed)).font for seed in range(100)} == {*SEEN_FONTS}


@pytest.mark.nightly
def test_commonest_answers_are_seldom_right_but_for_counts():
    """Prints the figures of docs/miniature.md: how often a question's commonest answer in training is right."""
    random, answers = Random(0), [defaultdict(Counter), defaultdict(Counter)]
    for held_out, number in ((False, 20_000), (True, 4000)):
        for _ in range(number):
            for question in TASKS["scenes"].make(random, SEEN, held_out, 7)[1]:
                answers[held_out][question.category, question.user][question.assistant] += 1
    right, asked = Counter(), Counter()
    for (category, text), found in answers[True].items():
        (commonest, _), *_ = answers[False][category, text].most_common(1)
        right[category] += found[commonest]
        asked[category] += found.total()
    for category in ASKED:
        print(f"{category}: {right[category] / asked[category]:.1%} of {asked[category]} questions")
    assert right["what"] / asked["what"] < 0.1 < 0.3 < right["count"] / asked["count"] < 0.5


def test_no_picture_is_in_the_world_twice(world):
    files = [row.png for path in parquet_files(world).values() for row in read_examples(path)]
    files += [path.read_bytes() for path in world.rglob("*.png")]
    assert len(files) > 500
    assert len({*files}) == len(files)


@pytest.mark.parametrize("start", ["2 objects: ", "3 objects: ", "a chart of 3 bars: "])
def test_captions_of_tests_are_not_in_training(world, start):
    training, tests = (
        {text for _, text in pairs(world, is_test) if text.startswith(start)} for is_test in (False, True)
    )
    assert len(training) > 3
    assert not training & tests


def test_sums_and_texts_of_tests_are_not_in_training(world):
    def read(is_test: bool) -> set[str]:
        return {text for user, text in pairs(world, is_test) if user in ("Read the text.", "What is written?")}

    assert len(read(True)) > 5
    assert not read(True) & read(False)


def test_conversations_of_validation_are_not_in_training():
    first = [{make_conversation(Random(i), held_out)[0].user for i in range(2000)} for held_out in (False, True)]
    assert min(map(len, first)) > 500
    assert not first[0] & first[1]


def test_questions_about_unseen_things_do_not_name_them(world):
    for name in ("unseen_letters", "unseen_font_colour"):
        rows = [*read_examples(world / "test" / name / "scenes.parquet")]
        words = {*re.findall(r"\w+", " ".join(f"{q.user} {q.assistant}" for row in rows for q in row.questions))}
        assert words and not words & {*UNSEEN_LETTERS, *UNSEEN_COLOURS}


# Files


def test_another_seed_gives_other_bytes(small, tmp_path):
    one, two = hash_files(small), hash_files(write_world(tmp_path / "world", replace(PLAN, seed=1)))
    assert {name for name in one if one[name] == two[name]} == {"few.yaml", "language.yaml"}


def test_writing_goes_on_where_it_stopped_with_the_same_bytes(small, tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path / "world", PLAN, stop)
    assert any(".part/" in name for name in hash_files(tmp_path / "world"))
    progress: list[tuple[int, int]] = []
    write_world(tmp_path / "world", PLAN, lambda *counts: progress.append(counts))
    assert hash_files(tmp_path / "world") == hash_files(small)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert progress[-1][0] == progress[-1][1]


def test_a_folder_of_another_plan_is_an_error(small, tmp_path):
    with pytest.raises(ValueError, match="holds a world with size 32, expected 64"):
        write_world(small, replace(PLAN, size=64))
    with pytest.raises(ValueError, match="factor: expected a positive number, got 0"):
        PLAN.scaled(0)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        write_world(tmp_path, PLAN)


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> SAILVLProcessor:
    tokenizer = load_tokenizer(tmp_path_factory.mktemp("tokenizers") / "toy")
    return SAILVLProcessor(SAILViTImageProcessor(size=32, max_tiles=4), tokenizer, image_seq_length=4)


@pytest.mark.parametrize("name, kinds", [("stage1", {"caption", "ocr"}), ("stage3", KINDS), ("language", {"text"})])
def test_a_corpus_loads_with_its_kinds(name, kinds, world, processor, tmp_path):
    corpus = Corpus.from_yaml(world / f"{name}.yaml", processor, tmp_path)
    plan = json.loads((world / "plan.json").read_text())
    assert {*corpus.count_kinds()} == kinds
    assert len(corpus) == (plan["language"][0] if name == "language" else sum(plan["corpora"][name].values()))
    assert not corpus.skipped
    assert (corpus.tiles > 0).sum() == len(corpus) - corpus.count_kinds().get("text", 0)


def test_some_pictures_have_several_tiles(world, processor, tmp_path):
    corpus = Corpus.from_yaml(world / "pretrain.yaml", processor, tmp_path)
    assert 0 < (corpus.tiles > 1).sum() < 0.3 * len(corpus)


@pytest.mark.parametrize("name", PROBE_SETS)
def test_the_classes_of_probe_sets_match(name, world):
    has_train = (world / "probe" / name / "train").is_dir()
    train = load_images(str(world / "probe" / (name if has_train else "objects") / "train"), training=True)
    test = load_images(str(world / "probe" / name / "test"), training=False)
    labels, _ = match_classes(train, test)
    assert [train.classes[label] for label in labels] == [test.classes[label] for label in test.labels]
    assert {*train.classes} == {*test.classes} == {*PROBE_SETS[name].things}


@pytest.mark.parametrize("name", TASKS)
def test_every_form_of_question_is_among_the_few_that_are_taken(name):
    places = "(top|middle|bottom)( left| middle| right)?"
    names = "|".join([*COLOURS, *DIGITS, *LETTERS, *SHAPES, places])

    def forms(most: int) -> set[str]:
        made = (TASKS[name].make(Random(f"{most}/{index}"), LOOKS["seen"], False, most) for index in range(600))
        asked = (question.user for _, questions in made for question in questions)
        return {re.sub(rf"\b({names}|\d+)\b", "_", user) for user in asked}

    assert forms(4) == forms(99)
