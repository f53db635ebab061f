"""The arms of the miniature's experiment: what each trains on, where each begins, resuming, the summary over seeds."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import bootstrap, ttest_1samp
from toy_sailvl import load_tokenizer

import sailvit_cli
from sailvit import SAILViTImageProcessor
from sailvit.evaluate.probe.files import RESULTS
from sailvit.examples.miniature import PROBE_SETS, WorldPlan, write_world
from sailvit.examples.miniature import run as steps
from sailvit.examples.miniature.answers import CATEGORIES
from sailvit.examples.miniature.arms import (
    ARMS,
    KINDS,
    MIXES,
    choose_arms,
    count_kinds,
    run_names,
    write_corpus,
)
from sailvit.examples.miniature.charts import draw_charts
from sailvit.examples.miniature.results import HEADS, read_results
from sailvit.examples.miniature.run import RECIPES, Planner, run_arms
from sailvit.examples.miniature.setting import SIZES, Setting
from sailvit.examples.miniature.summary import (
    bootstrap_pictures,
    mean_interval,
    summarize,
)
from sailvit.examples.miniature.tables import to_markdown
from sailvit.processing_sailvl import SAILVLProcessor
from sailvit.train import load_recipe
from sailvit.train.corpus import Corpus
from sailvit.train.trainer import TrainingError
from sailvit_cli.miniature import ARMS as ARM_CHOICES
from sailvit_cli.miniature import SIZES as SIZE_CHOICES


PAGE = ROOT / "docs" / "miniature"
PLAN = Setting().world
STAGES = {name: PLAN.corpora[name] for name in ("stage1", "stage2", "stage3")}
SMALL = replace(replace(PLAN, corpora=STAGES).scaled(0.004), language=(1, 1), tests=1, probe=(1, 1))
STOPPED = 75


def quiet(line: str) -> None:
    """Log nothing."""


# The table


def count_pictures(arm: str, plan: WorldPlan) -> int:
    """How many pictures an arm sends through the encoder after pretraining."""
    counts = [count_kinds(corpus, plan) for _, corpus in ARMS[arm].chain]
    return sum(sum(one.values()) - one.get("text", 0) for one in counts)


def test_arms_that_are_compared_have_equal_numbers_of_pictures():
    pictures = {arm: count_pictures(arm, PLAN) for arm in ARMS}
    equal = [arm for arm, one in ARMS.items() if one.transfers and one.chain] + ["frozen_language", "step_by_step"]
    # A corpus that is repeated is rounded source by source.
    assert {pictures[arm] - (4_000 + 32_000 + 38_000) for arm in equal} == {0, 1}
    assert pictures["base"] == pictures["untrained"] == 0
    before = count_pictures("refined", PLAN) - 38_000
    assert [pictures[f"data_1_{part}"] - before for part in (2, 4, 8)] == [19_000, 9_500, 4_750]
    for kind in KINDS:
        counts = count_kinds(f"stage3_half_{kind}", PLAN)
        assert (counts[kind], sum(counts.values())) == (5_000, 10_000) and {*counts} == {*KINDS}


def test_arms_that_begin_alike_share_their_runs():
    assert run_names("refined") == ["refined/stage1", "refined/stage2", "refined/stage3"]
    assert run_names("frozen_language") == ["refined/stage1", "refined/stage2", "frozen_language/stage3"]
    assert run_names("refined_untrained") == [f"refined_untrained/stage{number}" for number in (1, 2, 3)]
    assert run_names("stages_1_3") == ["refined/stage1", "stages_1_3/stages_2_3"]
    chains = {}  # no two chains have a run in common that are not the same up to there
    for arm, one in ARMS.items():
        for end, name in enumerate(run_names(arm), 1):
            assert chains.setdefault(name, (one.pretrained, one.chain[:end])) == (one.pretrained, one.chain[:end])


def test_some_arms_have_one_seed():
    assert choose_arms([*ARMS], 0) == (*ARMS,)
    assert choose_arms(["half_math", "all_at_once", "refined"], 1) == ("refined", "all_at_once")
    with pytest.raises(ValueError, match=r"--arms: expected some of untrained, base, .*, got 'x'"):
        run_arms(Path("unused"), Setting(), ["x"], [0])
    with pytest.raises(ValueError, match=r"--seeds: expected 0 among them, the only seed of half_math"):
        run_arms(Path("unused"), Setting(), ["base", "half_math"], [1, 2])


@pytest.mark.parametrize("recipe, trained", [("transfer1", ["connector"]), ("transfer2", ["connector", "language"])])
def test_a_transfer_leaves_the_encoder_as_it_is(recipe, trained):
    assert load_recipe(str(RECIPES / f"{recipe}.yaml")).trainable == trained


def test_the_sizes_of_the_command_are_those_of_the_settings():
    assert (*SIZES,) == SIZE_CHOICES == (*(setting.name for setting in SIZES.values()),)
    assert (*ARMS,) == ARM_CHOICES
    for setting in SIZES.values():
        widths = [one["hidden_size"] for one in setting.other_languages.values()]
        assert len({*widths, setting.language.get("hidden_size", 96)}) == 3


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("arms") / "world", SMALL)


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> SAILVLProcessor:
    tokenizer = load_tokenizer(tmp_path_factory.mktemp("tokenizers") / "toy")
    return SAILVLProcessor(SAILViTImageProcessor(size=32, max_tiles=4), tokenizer, image_seq_length=4)


@pytest.mark.parametrize("name", MIXES)
def test_a_corpus_has_the_samples_that_the_table_counts(name, world, processor):
    out = world.with_name("corpora") / f"{name}.yaml"
    write_corpus(name, world, out, SMALL)
    corpus = Corpus.from_yaml(out, processor, world.with_name("cache"))
    assert corpus.count_kinds() == count_kinds(name, SMALL) and not corpus.skipped


# The steps, with trainings that only note what they were called with


class Trainings:
    """Stands in for what takes time; writes the records that the next steps read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.composed: dict[Path, tuple[Path, Path]] = {}  # out -> vision, language
        self.converted: dict[Path, Path] = {}  # out -> run
        self.runs: dict[Path, SimpleNamespace] = {}  # output -> recipe
        self.stop_before: Path | None = None
        names = ("write_world", "random_encoder", "random_language", "read_texts", "build_report")
        for name in names:
            monkeypatch.setattr(steps, name, lambda *args, **options: None)
        monkeypatch.setattr(
            steps, "_folder_step", lambda title, out, write: steps.Step(title, lambda: out.mkdir(parents=True), out)
        )
        for name in ("run", "compose_model", "convert_checkpoint", "run_probe", "write_answers", "write_corpus"):
            monkeypatch.setattr(steps, name, getattr(self, name))
        monkeypatch.setattr(steps, "write_report", lambda content, out, *rest: out.touch())
        monkeypatch.setattr(steps, "draw_tokens", self.draw_tokens)

    def folder_step(self, title, out, write) -> steps.Step:
        return steps.Step(title, lambda: out.mkdir(parents=True), out)

    def run(self, recipe, log) -> int:
        output, data = Path(recipe.output), Path(recipe.data).stem
        if output in self.runs:
            return 0  # finished
        if output == self.stop_before:
            return STOPPED
        self.runs[output] = recipe
        counts = count_kinds(data, PLAN)
        if recipe.objective == "next_patch":
            counts.pop("text", None)
        total = sum(counts.values())
        stage = dict.fromkeys(("recipe", "data", "precision", "loss", "hours", "torch", "transformers"))
        stage |= {"kinds": [f"{kind} {count}" for kind, count in counts.items()]}
        stage |= {"samples_seen": total, "data_samples": total, "tiles_seen": total}
        output.mkdir(parents=True)
        (output / "training.json").write_text(json.dumps({"training": {"stages": [stage]}}))
        return 0

    def compose_model(self, vision, language, out, **options) -> None:
        assert vision.exists() and language.exists() and out not in self.composed
        self.composed[out] = vision, language
        out.mkdir(parents=True)

    def convert_checkpoint(self, source, out, part, **options) -> None:
        assert source in self.runs and out not in self.converted
        self.converted[out] = source
        out.mkdir(parents=True)

    def write_corpus(self, name, world, out, plan) -> None:
        out.parent.mkdir(exist_ok=True)
        out.touch()

    def run_probe(self, encoders, train, tests, out, options) -> SimpleNamespace:
        names = tests if len(tests) > 1 else ["test"]
        entries = [
            {"test": name, "head": head, "accuracy": accuracy, "low": 0, "high": 1, "n": 9}
            for name in names
            for head, accuracy in (("linear", 0.5), ("mlp", 0.25), ("knn", 0.125))
        ]
        out.mkdir(parents=True)
        (out / RESULTS).write_text(json.dumps({"results": entries}))
        return SimpleNamespace(to_json=lambda: {"results": entries})

    def draw_tokens(self, encoders, picture) -> Image.Image:
        assert picture.size == (64, 64) and all(encoder.exists() for encoder in encoders.values())
        return picture

    def write_answers(self, out, model, tests, most) -> str:
        assert model in self.runs and not out.exists()
        entry = {"accuracy": 0.5, "accuracy_with_another_picture": 0.25, "right": "01 1 0"}
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(dict.fromkeys(CATEGORIES, entry)))
        return ""


@pytest.fixture
def trainings(monkeypatch) -> Trainings:
    return Trainings(monkeypatch)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> tuple[Trainings, Planner]:
    """All arms with seed 0."""
    out = tmp_path_factory.mktemp("experiment")
    planner = Planner(out / "seed-0", Setting())
    with pytest.MonkeyPatch.context() as patch:
        trainings = Trainings(patch)
        assert run_arms(out, Setting(), [], [0], quiet) == 0
    return trainings, planner


def test_every_chain_begins_where_it_should(experiment):
    trainings, planner = experiment
    new, aim = planner.folder / "composed" / "new", planner.runs / "aim"
    language = planner.folder / "languages" / "language"
    without = new.with_name("new-untrained")
    assert (trainings.composed[new], trainings.composed[without]) == ((aim, language), (planner.untrained, language))
    assert planner.encoder("untrained") == planner.untrained != planner.encoder("base") == aim
    for arm, one in ARMS.items():
        runs = planner.arm_runs(arm)
        first = {"more_aim": aim, "refined_untrained": without}.get(arm, new)
        for model, out in pairwise([first, *runs]):
            assert trainings.runs[out].model == str(model)
        assert [trainings.runs[out].name for out in runs] == [*one.recipes]
        assert trainings.converted.get(planner.encoder(arm), aim) == (runs[-1] if runs else aim)
        for language in Setting().other_languages if one.transfers else ():
            first, second = planner.transfer_runs(arm, language)
            composed = planner.folder / "composed" / f"{arm}-{language}"
            assert trainings.composed[composed] == (planner.encoder(arm), planner.folder / "languages" / language)
            assert [trainings.runs[run].model for run in (first, second)] == [str(composed), str(first)]
            assert [trainings.runs[run].name for run in (first, second)] == ["transfer1", "transfer2"]


def test_results_record_the_pictures_of_the_table(experiment):
    folder = experiment[1].folder
    for arm, one in ARMS.items():
        result = json.loads((folder / "results" / f"{arm}.json").read_text())
        assert result["pictures"] == count_pictures(arm, PLAN) and {*result["probes"]} == {*PROBE_SETS}
        assert bool(result["runs"]["pretraining"]) == one.pretrained
        assert {*result["transfer"]} == ({*Setting().other_languages} if one.transfers else set())


def test_a_stopped_experiment_goes_on_and_repeats_nothing(trainings, tmp_path):
    trainings.stop_before = tmp_path / "seed-1" / "transfer" / "base-narrow" / "connector"
    arguments = tmp_path, Setting(), ["refined", "base"], [1], quiet
    assert run_arms(*arguments) == STOPPED
    done = len(trainings.runs)
    assert not (tmp_path / "summary.json").exists()
    trainings.stop_before = None
    assert run_arms(*arguments) == 0
    assert len(trainings.runs) == done + 9  # a language model, four transfers of two runs each
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [*summary["arms"]] == ["base", "refined"] and summary["arms"]["refined"]["seeds"] == [1]


@pytest.mark.parametrize("other", [Setting().scaled(0.03), SIZES["48px"], replace(Setting(), questions=5)])
def test_a_folder_of_another_setting_is_refused(other, trainings, tmp_path):
    assert run_arms(tmp_path, Setting(), ["base"], [1], quiet) == 0
    done = len(trainings.runs)
    with pytest.raises(ValueError, match=r"was made with 32px, 1\.0 of the pictures, seed 0, which is not .*: other "):
        run_arms(tmp_path, other, ["base"], [2], quiet)
    with pytest.raises(ValueError, match=r"seed-1: was made with 32px, 1\.0 of the pictures, seed 1, .*give another"):
        steps.run_miniature(tmp_path / "seed-1", Setting(), quiet)
    (tmp_path / "seed-1" / "setting.json").unlink()
    (tmp_path / "seed-1" / "world").mkdir()
    with pytest.raises(ValueError, match=r"expected a new folder, or one with setting\.json"):
        run_arms(tmp_path, Setting(), ["base"], [1], quiet)
    assert len(trainings.runs) == done


def test_a_seed_without_arms_is_not_begun(trainings, tmp_path):
    lines: list[str] = []
    assert run_arms(tmp_path, Setting(), ["half_math"], [0, 1], lines.append) == 0
    assert "seed 1: none of these arms" in lines and not (tmp_path / "seed-1").exists()


def test_a_failed_training_is_one_line(trainings, tmp_path, monkeypatch, capsys):
    def fail(recipe, log):
        raise TrainingError("step 3: the loss is nan")

    monkeypatch.setattr(steps, "run", fail)
    assert sailvit_cli.main(["miniature", str(tmp_path / "out"), "--quick"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "sailvit miniature: step 3: the loss is nan"


def test_a_result_has_no_transfers_until_all_have_answered(trainings, tmp_path):
    folder = tmp_path / "seed-0"
    trainings.stop_before = folder / "transfer" / "base-wide" / "language"
    assert run_arms(tmp_path, Setting(), ["base"], [0], quiet) == STOPPED
    trainings.stop_before = None
    assert steps.run_miniature(folder, Setting(), quiet, "", ["base"]) == 0
    assert json.loads((folder / "results" / "base.json").read_text())["transfer"] == {}


def test_nothing_is_pretrained_for_arms_without_pretraining(trainings, tmp_path):
    assert run_arms(tmp_path, Setting(), ["untrained", "refined_untrained"], [1], quiet) == 0
    assert {run.name for run in trainings.runs if run.parent.name == "runs"} == {"language", "narrow", "wide"}


def test_a_folder_holds_one_miniature_or_those_of_arms(trainings, tmp_path):
    for made, name in ((tmp_path / "one", "world"), (tmp_path / "arms", "seed-1/world")):
        (made / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="one: holds one miniature: give another folder for --arms"):
        run_arms(tmp_path / "one", Setting(), ["base"], [0], quiet)
    with pytest.raises(ValueError, match="arms: holds those of --arms: give --arms, too, or another folder"):
        steps.run_miniature(tmp_path / "arms", Setting(), quiet)


def test_a_miniature_without_arms_is_refined_alone(trainings, tmp_path):
    lines: list[str] = []
    assert steps.run_miniature(tmp_path, Setting(), lines.append) == 0
    assert {run.relative_to(tmp_path).as_posix() for run in trainings.runs} == {
        "runs/aim", "runs/language", "arms/refined/stage1", "arms/refined/stage2", "arms/refined/stage3",
    }  # fmt: skip
    assert trainings.converted[tmp_path / "sailvit-miniature"] == tmp_path / "arms" / "refined" / "stage3"
    assert (tmp_path / "report.html").exists()
    assert lines[0] == "1/24 world (0 min)" and "22/24 result base (0 min)" in lines


# The summary


def result_of(arm: str, seed: int, accuracy: float, right: str = "11 0 1") -> dict:
    answer = {"accuracy": accuracy, "accuracy_with_another_picture": 0.1, "right": right}
    answers = dict.fromkeys(CATEGORIES, answer)
    transfer = {name: dict.fromkeys(("connector", "language"), answers) for name in ("narrow", "wide")}
    probes = dict.fromkeys(("objects", "scenes"), dict.fromkeys(HEADS, answer))
    own = answers if ARMS[arm].has_language else {}
    return {"arm": arm, "seed": seed, "setting": "32px", "pictures": 10, "tiles_seen": 12, "probes": probes,
            "answers": own, "transfer": transfer}  # fmt: skip


def write_results(folder: Path, values: dict[str, list[float]]) -> None:
    for arm, accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            path = folder / f"seed-{seed}" / "results" / f"{arm}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result_of(arm, seed, accuracy, "11 0 1" if arm == "refined" else "01 0 0")))


REFINED, BASE = [0.95, 0.9, 0.97], [0.3, 0.35, 0.31]


@pytest.fixture
def results(tmp_path) -> None:
    write_results(tmp_path, {"refined": REFINED, "base": BASE, "half_math": [0.9]})


@pytest.fixture
def summary(results, tmp_path) -> dict:
    assert sailvit_cli.main(["miniature", str(tmp_path), "--summary"]) == 0
    return json.loads((tmp_path / "summary.json").read_text())


def test_intervals_are_those_of_the_t_test(summary):
    gains = [a - b for a, b in zip(REFINED, BASE, strict=True)]
    for values, found in (
        (REFINED, summary["arms"]["refined"]["figures"]["answers/what"]),
        (gains, summary["differences"]["base"]["figures"]["probes/objects/knn"]),
        (gains, summary["differences"]["base"]["figures"]["transfer/mean/connector/count"]),
    ):
        expected = ttest_1samp(values, 0).confidence_interval()
        assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
        assert found["values"] == pytest.approx(values)
    assert mean_interval([0.5]) == {"mean": 0.5, "low": None, "high": None}


def test_an_arm_is_compared_on_the_seeds_that_it_has(summary):
    assert summary["differences"]["half_math"]["seeds"] == [0]
    assert summary["differences"]["half_math"]["figures"]["answers/what"]["mean"] == pytest.approx(0.05)
    assert {*summary["differences"]} == {"base", "half_math"}


def test_goals_are_reached_or_not(summary):
    met = {(goal["figure"], goal["of"]): goal["met"] for goal in summary["goals"]}
    assert met["probes/objects/mlp", "refined - base"] and met["transfer/mean/language/what", "refined - base"]
    assert met["answers/what", "refined"] and not met["answers/colour", "refined"]
    assert not any(name.startswith("probes/scenes") for name, _ in met)


def test_the_tables_have_the_figures_of_the_json(summary, tmp_path):
    text = (tmp_path / "summary.md").read_text()
    figure = summary["arms"]["refined"]["figures"]["probes/objects/linear"]
    assert f"{100 * figure['mean']:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]" in text
    assert "| base | pretraining alone | 0, 1, 2 | 10 | 12 |" in text
    columns = [{line.count("|") for line in part.splitlines()} for part in text.split("\n\n") if part.startswith("|")]
    assert len(columns) == 18 and all(len(counts) == 1 for counts in columns)


def test_arms_of_one_seed_are_next_to_the_refined_one_with_that_seed(summary, tmp_path):
    over_seeds, alone = (tmp_path / "summary.md").read_text().split("## Seed 0 alone")
    assert [line for line in over_seeds.splitlines() if line.startswith("| half_math")] == [
        "| half_math | 1/4 of stage 3, half of it math | 0 | 10 | 12 |"
    ]
    assert "| half_math" not in alone.split("## Goals")[1] and {*summary["single"]} == {"refined", "half_math"}
    rows = [line.split(" | ")[:2] for line in alone.splitlines()]
    assert rows.count(["| refined", "95.0"]) == rows.count(["| half_math", "90.0"]) == 5  # four heads, answers
    for path in (tmp_path / "seed-0" / "results").glob("[rb]*.json"):
        path.unlink()
    for path in tmp_path.glob("seed-[12]/results/*.json"):
        path.unlink()
    assert sailvit_cli.main(["miniature", str(tmp_path), "--summary"]) == 0
    text = (tmp_path / "summary.md").read_text()
    assert re.findall("^## .*", text, re.MULTILINE) == ["## Arms", "## Seed 0 alone"]
    assert text.count("\n| half_math | 90.0 |") == 5


def test_charts_show_the_arms_that_have_intervals(summary, tmp_path):
    for name, panels in (("probes.png", 3), ("transfer.png", 2)):
        with Image.open(tmp_path / name) as chart:
            assert chart.width >= 240 * panels
    single = {"arms": {"refined": {**summary["arms"]["refined"], "seeds": [0]}}}
    assert draw_charts(single, tmp_path / "none") == []


def test_the_legend_of_many_arms_is_inside_of_the_chart(summary, tmp_path):
    draw_charts({"arms": {f"{name} of several seeds": summary["arms"]["refined"] for name in "abcdefghi"}}, tmp_path)
    for name in ("probes.png", "transfer.png"):
        with Image.open(tmp_path / name) as chart:
            assert (np.asarray(chart.convert("L"))[:, [0, -1]] == 255).all()


def change_result(folder: Path, arm: str, /, **values: object) -> None:
    path = folder / "seed-1" / "results" / f"{arm}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_seed_without_transfer_leaves_transfer_out(summary, tmp_path, capsys):
    change_result(tmp_path, "refined", transfer={})
    capsys.readouterr()
    assert sailvit_cli.main(["miniature", str(tmp_path), "--summary"]) == 0
    names = ("probes.png", "transfer.png", "summary.json", "summary.md")
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    found = json.loads((tmp_path / "summary.json").read_text())
    assert not any(name.startswith("transfer") for name in found["arms"]["refined"]["figures"])
    assert "probes/objects/knn" in found["differences"]["base"]["figures"]


def test_a_chart_without_figures_is_removed(results, tmp_path):
    (tmp_path / "transfer.png").touch()
    for path in tmp_path.glob("seed-*/results/*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "transfer": {}}))
    assert sailvit_cli.main(["miniature", str(tmp_path), "--summary"]) == 0
    assert (tmp_path / "probes.png").exists() and not (tmp_path / "transfer.png").exists()


def test_charts_of_one_seed_are_removed(summary, tmp_path):
    for seed in (1, 2):
        (tmp_path / f"seed-{seed}").rename(tmp_path.with_name(f"{tmp_path.name}-{seed}"))
    assert sailvit_cli.main(["miniature", str(tmp_path), "--summary"]) == 0
    assert not (tmp_path / "probes.png").exists() and not (tmp_path / "transfer.png").exists()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"setting": "48px"}, "seed-0/results/base.json) and 48px ("),
        ({"arm": "typo"}, "expected one of the arms untrained, base,"),
        ({"seed": 0}, "expected one result of base with seed 0, got another one in "),
        ({"arm": "half_math"}, "base.json: expected seed 0, the only one of half_math, got 1"),
        ({"seed": -1}, "base.json: expected a seed from 0, got -1"),
        ({"seed": "one"}, "base.json: expected a result with seed: remove it"),
        ({"probes": None}, "base.json: expected a result with probes: remove it"),
    ],
)
def test_results_that_do_not_belong_together_are_one_line(results, tmp_path, capsys, values, message):
    change_result(tmp_path, "base", **values)
    assert sailvit_cli.main(["miniature", str(tmp_path), "--summary"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "summary.json").exists()


def change_entry(result: dict, path: str, value: object) -> dict:
    """A result with an entry set to a value, or without it for None."""
    *parents, last = path.split("/")
    changed = json.loads(json.dumps(result))  # entries of `result_of` are shared
    entry = changed
    for name in parents:
        entry = entry[name]
    entry.pop(last) if value is None else entry.update({last: value})
    return changed


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("answers/count", None, "answers/count"),
        ("answers/count/right", None, "probes, answers and transfer"),
        ("answers/count/right", "12", "answers/count: right"),
        ("answers/count/accuracy_with_another_picture", 2, "answers/count: accuracy_with_another_picture"),
        ("probes/objects", 3, "probes, answers and transfer"),
        ("probes/objects/knn/accuracy", None, "probes, answers and transfer"),
        ("probes/objects/knn/accuracy", "a", "probes, answers and transfer"),
        ("probes/objects/knn/accuracy", float("nan"), "probes/objects/knn: accuracy"),
        ("transfer/wide/connector", None, "transfer/wide/connector/colour"),
        ("transfer/wide/language/what", None, "transfer/wide/language/what"),
    ],
)
def test_what_is_wrong_in_a_result_is_named(results, tmp_path, capsys, path, value, message):
    file = tmp_path / "seed-1" / "results" / "refined.json"
    file.write_text(json.dumps(change_entry(result_of("refined", 1, 0.9), path, value)))
    assert sailvit_cli.main(["miniature", str(tmp_path), "--summary"]) == 2
    assert f"{file}: expected a result with {message}" in capsys.readouterr().err


def test_means_are_over_the_same_language_models(results, tmp_path, capsys):
    changed = change_entry(result_of("refined", 1, 0.9), "transfer/wide", None)
    change_result(tmp_path, "refined", **changed)
    assert sailvit_cli.main(["miniature", str(tmp_path), "--summary"]) == 2
    error = capsys.readouterr().err
    assert "one set of language models for transfer, got narrow, wide (" in error and "and narrow (" in error


@pytest.mark.parametrize("content", [b"", b'{"arm": "ba', b"[]", b"\xff"])
def test_a_broken_result_is_named(results, tmp_path, capsys, content):
    path = tmp_path / "seed-1" / "results" / "base.json"
    path.write_bytes(content)
    assert sailvit_cli.main(["miniature", str(tmp_path), "--summary"]) == 2
    assert f"{path}: not " in capsys.readouterr().err


def test_answers_to_other_questions_are_named(results, tmp_path, capsys):
    answers = result_of("refined", 1, 0.9, "1 1")["answers"]
    change_result(tmp_path, "refined", answers=answers)
    write_results(tmp_path, {"all_at_once": [0.9, 0.9]})
    assert sailvit_cli.main(["miniature", str(tmp_path), "--summary"]) == 2
    assert "refined and all_at_once, seed 1: expected answers to the same questions" in capsys.readouterr().err


def test_pictures_are_drawn_and_not_questions():
    random = np.random.default_rng(0)
    words = ["".join(random.choice(["0", "1"], 2, p=[1 - p, p])) for p in (0.8, 0.4) for _ in range(300)]
    first, second = " ".join(words[:300]), " ".join(words[300:])
    gains = [(a.count("1") - b.count("1")) / 2 for a, b in zip(words[:300], words[300:], strict=True)]
    expected = bootstrap((gains,), np.mean, method="percentile", random_state=1).confidence_interval
    assert bootstrap_pictures(first, second) == pytest.approx((expected.low, expected.high), abs=0.006)
    with pytest.raises(ValueError, match="expected answers to the same questions"):
        bootstrap_pictures("11 0", "1 10")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "0", "1"], "--seeds: expected --arms, too"),
        (["--arms", "base", "--seed", "5"], "--seed: expected --seeds"),
        (["--summary", "--seed", "0"], "--summary: expected OUT alone, got --seed"),
        (["--summary", "--arms"], "--summary: expected OUT alone, got --arms"),
        (["--arms", "nope"], "argument --arms: invalid choice: 'nope'"),
        (["--seed", str(1 << 32)], "expected an integer from 0 to 4294967295"),
    ],
)
def test_options_without_a_meaning_are_an_error(options, message, tmp_path, capsys):
    try:
        code = sailvit_cli.main(["miniature", str(tmp_path), *options])
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and message in capsys.readouterr().err


def test_a_file_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert sailvit_cli.main(["miniature", str(tmp_path / "file"), "--quick"]) == 2
    assert "file: expected a folder, got a file" in capsys.readouterr().err


# All of it, tiny


@pytest.mark.nightly
def test_two_arms_are_trained_transferred_and_compared(tmp_path):
    small = replace(Setting().scaled(0.004), questions=20, transfer_questions=10, recipe=("samples_per_step=8",))
    setting = replace(small, other_languages={"narrow": small.other_languages["narrow"]})
    lines: list[str] = []
    arguments = tmp_path, setting, ["more_aim", "refined"], [0], lines.append
    assert run_arms(*arguments) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {*summary["arms"]} == {"more_aim", "refined"}
    pictures = {arm: one["pictures"] for arm, one in summary["arms"].items()}
    assert pictures["more_aim"] == pictures["refined"] == [count_pictures("refined", setting.world)]
    assert "transfer/narrow/language/what" in summary["differences"]["more_aim"]["figures"]
    trained, frozen = (
        load_file(tmp_path / "seed-0" / "transfer" / "refined-narrow" / run / "model.safetensors")
        for run in ("language", "connector")
    )
    vision = [name for name in trained if name.startswith("vision_model.")]
    assert vision and all(torch.equal(trained[name], frozen[name]) for name in vision)
    assert any(not torch.equal(trained[name], frozen[name]) for name in trained if name.startswith("language_model."))
    lines.clear()
    assert run_arms(*arguments) == 0
    assert sum("nothing to do" in line for line in lines) == 11 and not any("step 1/" in line for line in lines)


# The results that come with the package


def test_the_tables_of_the_page_are_those_of_its_results():
    text = (PAGE / "summary.md").read_text()
    assert text == to_markdown(summarize(read_results(PAGE)))
    rows = [line for line in PAGE.with_suffix(".md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 20 and [row for row in rows if row not in text.splitlines()] == []


def test_the_results_reach_what_is_expected_of_refinement():
    goals = json.loads((PAGE / "summary.json").read_text())["goals"]
    assert len(goals) == 2 * 16 + 1 + 3 and [goal for goal in goals if not goal["met"]] == []
