"""README and docs/: what they show runs, what they link to and name exists, and their numbers are the code's."""

import argparse
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
import typer
from conftest import ROOT, make_checkpoint
from doc_pages import TRAINING, code_blocks, outputs, write_large_tiles, write_model, write_training_data
from packaging.version import Version

import sailvit_cli
from sailvit import SAILViTConfig, SAILViTModel, SAILVLForConditionalGeneration
from sailvit.evaluate.probe.results import PAPER_ACCURACIES
from sailvit.examples.miniature.demo import TILES, make_picture
from sailvit.serve.server import OLDEST
from sailvit.train.corpus_file import CorpusFile, Source, read_corpus_file
from sailvit.train.recipe import load_recipe


if Version(transformers.__version__) < Version(OLDEST):
    Serve = None
else:
    from transformers.cli.serve import Serve

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
EXAMPLES = [page for page in (ROOT / "examples").rglob("README.md") if "node_modules" not in page.parts]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", *EXAMPLES, ROOT / "benchmarks" / "RESULTS.md"]
SERVING, ONNX = (ROOT / "docs" / name for name in ("serving.md", "onnx.md"))
ELSEWHERE = (SERVING, ONNX)  # test_serve.py and test_onnx.py run their Python
MOST_LINES = 150
LARGEST_PICTURE = 60_000  # bytes
SLOW_CALLS = {"convert_checkpoint": pytest.mark.slow, "make_plan(": pytest.mark.nightly}
TILE = 56  # pixels of the tiny encoder; the pages have 448
SCORES = {name.replace("-Large", " large").replace("-Huge", " huge"): row for name, row in PAPER_ACCURACIES.items()}


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def page_marks(page: Path) -> list[pytest.MarkDecorator]:
    return [mark for call, mark in SLOW_CALLS.items() if call in page.read_text()]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def command_parser() -> argparse.ArgumentParser:
    return sailvit_cli.build_parser()


def verb_options() -> dict[str, set[str]]:
    """Verb -> its options."""
    verbs = next(a for a in command_parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = {verb: {*parser._option_string_actions} for verb, parser in verbs.choices.items()}
    return {**options, "serve": options["serve"] | transformers_serve_options()}


def transformers_serve_options() -> set[str]:
    """The options of `transformers serve`, to which `sailvit serve` passes on what it does not know."""
    if Serve is None:
        return set()
    command = typer.Typer()
    command.command()(Serve)
    return {option for parameter in typer.main.get_command(command).params for option in parameter.opts}


def shell_commands(page: Path) -> list[list[str]]:
    """The words of every command in the bash blocks of a page."""
    lines = [line for text in code_blocks(page, "bash") for line in text.splitlines() if line]
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [command for command in words if command]


@pytest.fixture
def workplace(tmp_path, folder, monkeypatch) -> Path:
    """A current directory with everything that the pages name, at toy size."""
    make_checkpoint(tmp_path / "sailvit-demo" / "aimv2-large-random")
    make_picture(TILES)[0].save(tmp_path / "sailvit-demo" / "tiles.png")
    (tmp_path / "sailvit-demo" / "sailvit").symlink_to(folder)
    (tmp_path / "new-vl").symlink_to(write_model(tmp_path / "sail-vl", tmp_path))
    write_training_data(tmp_path, monkeypatch)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


def run_blocks(page: Path) -> dict:
    """Run the Python of a page from top to bottom, in one namespace; test_neighbours.py runs other trainers."""
    scope: dict = {}
    for block in code_blocks(page, "python"):
        if "Trainer(" in block:
            continue
        exec(compile(block.replace("448, 448", f"{TILE}, {TILE}"), page_name(page), "exec"), scope)
    return scope


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on the workers of a DataLoader
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page_name(page), marks=page_marks(page))
        for page in PAGES if code_blocks(page, "python") and page not in ELSEWHERE
    ],
)  # fmt: skip
def test_python_runs_as_written(page, workplace, capsys):
    scope = run_blocks(page)
    printed = capsys.readouterr().out
    check = {
        "README.md": check_quickstart,
        "docs/usage.md": check_usage,
        "docs/image-processing.md": check_image_processing,
        "docs/quantization.md": check_quantization,
        "docs/sail-vl.md": check_sailvl,
        "docs/converting.md": check_converting,
        "docs/training.md": check_training,
        "docs/evaluating.md": check_evaluating,
        "docs/scale.md": check_scale,
    }.pop(page_name(page))
    check(scope, printed)


def check_quickstart(scope: dict, printed: str) -> None:
    assert f"{tuple(scope['tokens'].shape)}, for a connector" in README.read_text()
    assert printed.count("tensor") == 2 and scope["batch"]["tile_grids"].tolist() == [[2, 2]]


def check_usage(scope: dict, printed: str) -> None:
    assert scope["tokens"].shape == (7, 4, 256)
    assert scope["output"].last_hidden_state.shape == (1, 16, 64) and scope["output"].pooler_output.shape == (1, 64)
    assert [tuple(features.shape) for features in scope["feature_maps"]] == [(1, 64, 4, 4)] * 2
    image = scope["images"][0]
    turned, upright = (torch.tensor(features) for features in scope["extractor"]([image.rotate(90), image]))
    one_tile = scope["processor"](image, do_tile=False)["pixel_values"]
    torch.testing.assert_close(upright, scope["model"](one_tile).last_hidden_state.float(), rtol=0.1, atol=0.1)
    assert turned.shape == upright.shape == (1, 16, 64) and not torch.equal(turned, upright)


def check_image_processing(scope: dict, printed: str) -> None:
    assert scope["batch"]["tile_grids"].tolist() == [[3, 2]] and scope["batch"]["num_tiles"].tolist() == [7]
    assert scope["choose_tile_grid"](width=1024, height=768) == (3, 2)
    assert scope["processor"].get_number_of_image_patches(height=768, width=1024) == 7


def check_sailvl(scope: dict, printed: str) -> None:
    assert scope["tiles"].shape == (7, 3, TILE, TILE) and len(scope["history"]) == 1
    assert scope["history"][0][1] == printed.strip()


def check_quantization(scope: dict, printed: str) -> None:
    assert scope["again"].quantization_method == "bitsandbytes"
    assert scope["again"].language_model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert scope["again"].vision_model.dtype == torch.bfloat16


def check_converting(scope: dict, printed: str) -> None:
    assert "sailvit-large" in {path.name for path in Path.cwd().iterdir()}
    assert "encoder.layers.0.attention.q_proj.weight" in scope["native"]


def check_training(scope: dict, printed: str) -> None:
    corpus, batches, losses = scope["corpus"], scope["batches"], scope["losses"]
    assert len(corpus) == batches.samples_per_step and len(losses) == len(batches) == 8
    assert losses == sorted(losses, reverse=True) and scope["skipped"] == []
    assert printed.count("answer tokens") == 8 and f", {corpus.answers.sum()} answer tokens" in printed
    before = SAILVLForConditionalGeneration.from_pretrained("new-vl").state_dict()
    after = SAILVLForConditionalGeneration.from_pretrained("stage-1").state_dict()
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"mlp1"}


def check_evaluating(scope: dict, printed: str) -> None:
    assert [line.split(":")[0] for line in printed.splitlines() if " of 100" in line] == ["mlp", "linear", "knn"]
    assert all(result["accuracy"] > 0.2 for result in scope["found"].results) and Path("probe", "results.md").exists()


def check_scale(scope: dict, printed: str) -> None:
    """The page's figures are what its blocks print; another release of torch or transformers may need other memory."""
    shown = "".join(code_blocks(ROOT / "docs" / "scale.md", "text"))
    number = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e\+\d+)?")
    assert number.sub("#", printed) == number.sub("#", shown)
    values = ([float(text.replace(",", "")) for text in number.findall(text)] for text in (printed, shown))
    for computed, written in zip(*values, strict=True):
        assert computed == pytest.approx(written, rel=0.1, abs=0.2)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_are_parsed(page):
    for command in shell_commands(page):
        if Path(command[0]).name == "sailvit":
            try:
                sailvit_cli.parse(command[1:])
            except SystemExit:
                pytest.fail(f"{page_name(page)}: {shlex.join(command)}")


@pytest.mark.parametrize("number", [0, 1])
def test_data_check_prints_what_the_page_shows(number, tmp_path, monkeypatch, capsys):
    write_large_tiles(tmp_path / "new-vl", tmp_path)
    write_training_data(tmp_path, monkeypatch)
    capsys.readouterr()
    command, expected = outputs(TRAINING)[number]
    code = sailvit_cli.main(shlex.split(command)[1:])
    assert capsys.readouterr().out == expected
    assert code == (2 if "skipped" in expected else 0)


def test_recipes_and_corpus_files_of_the_page_are_valid(tmp_path):
    recipe, *corpora = code_blocks(TRAINING, "yaml")
    (tmp_path / "adapters.yaml").write_text(recipe)
    assert load_recipe(str(tmp_path / "adapters.yaml")).lora
    assert len(corpora) == 6
    for block in corpora:
        (tmp_path / "corpus.yaml").write_text(block)
        assert read_corpus_file(tmp_path / "corpus.yaml").sources


def test_every_key_of_a_corpus_file_is_in_a_table():
    section = TRAINING.read_text().split("\n## corpus.yaml\n")[1]
    tables = re.findall(r"\| key \|.*?\n\n", section, flags=re.DOTALL)
    rows = [re.findall(r"^\| (`[^|]+`) \|", table, flags=re.MULTILINE) for table in tables]
    keys = [re.findall(r"`(\w+)`", " ".join(cells)) for cells in rows]
    assert sorted(keys[0]) == sorted(Source.model_fields)
    assert sorted(["sources", *keys[1]]) == sorted(CorpusFile.model_fields)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_verbs_and_options_in_the_text_exist(page):
    if page == SERVING and Serve is None:
        pytest.skip("this transformers has no server for it")
    options = verb_options()
    for code in inline_code(page):
        if match := re.match(r"sailvit (\w+)", code):
            assert match[1] in options, f"{page_name(page)}: `{code}`"
            assert {*re.findall(r"--[a-z-]+", code)} <= options[match[1]], f"{page_name(page)}: `{code}`"
        elif match := re.match(r"--[a-z-]+", code):
            assert match[0] in set().union(*options.values()), f"{page_name(page)}: `{code}`"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_dotted_names_in_the_text_exist(page):
    for name in re.findall(r"\bsailvit(?:\.\w+)+", " ".join(inline_code(page))):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name), name


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_named_in_the_text_exist(page, tracked):
    named = {code for code in inline_code(page) if re.fullmatch(r"[\w./-]+\.(py|md)", code)}
    assert {name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in tracked)} == set()


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.split()


@pytest.mark.parametrize("page", LINKED, ids=page_name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), f"{page_name(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{page_name(page)}: {link}"


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_one_click_from_the_readme():
    text = README.read_text()
    assert [page.name for page in DOCS if f"](docs/{page.name})" not in text] == []


def test_readme_is_short_and_its_image_small():
    assert len(README.read_text().splitlines()) <= MOST_LINES
    pictures = re.findall(r"!\[[^\]]+\]\((.*?)\)", README.read_text())
    assert pictures and all((ROOT / picture).stat().st_size <= LARGEST_PICTURE for picture in pictures)


def test_sizes_are_those_of_the_configurations():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+)M \| (\d+) \| (\d+) \| (\d+) \|", README.read_text(), flags=re.MULTILINE)
    assert len(rows) == 5
    for size, *numbers in rows:
        parameters, *dimensions = (int(number.replace(",", "")) for number in numbers)
        config = SAILViTConfig.from_size(size)
        with torch.device("meta"):
            assert round(SAILViTModel(config).num_parameters() / 1e6) == parameters
        assert dimensions == [config.hidden_size, config.num_hidden_layers, config.num_attention_heads]


def test_scores_are_those_of_the_paper():
    text = README.read_text()
    for size in ("large", "huge"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{size}`"))
        pairs = zip(SCORES[f"AIMv2 {size}"], SCORES[f"SAILViT {size}"], strict=True)
        assert [cell.strip() for cell in row.split("|")[6:10]] == [f"{before} -> {after}" for before, after in pairs]
    for name in ("InternViT-300M", "InternViT-6B"):
        scores = ", ".join(f"{score:.2f}" for score in SCORES[name])
        assert re.search(rf"{name} (has )?{re.escape(scores)}", " ".join(text.split())), name


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"sed -n 's/(.*?)/", script)[1].replace(r"\(", "(").replace(r"\)", ")")
    lines = [line for text in code_blocks(README, "bash") for line in text.splitlines()]
    assert len([line for line in lines if re.search(pattern, line)]) == 1
