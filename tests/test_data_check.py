"""`sailvit data check`: its report, exit codes, and samples as the model sees them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_hub import put, serve_writable
from PIL import Image
from test_corpus import chat, write_corpus, write_lines, write_numbers
from toy_sailvl import TILE, write_release

from sailvit.convert import convert_checkpoint
from sailvit_cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data-check")
    convert_checkpoint(write_release(folder / "release", smallest=True), folder / "vl", verify=False)
    return folder / "vl"


@pytest.fixture
def check(tmp_path, model, capsys, monkeypatch):
    """Run the command in tmp_path; return its exit code and what it prints."""
    monkeypatch.chdir(tmp_path)

    def check(*arguments: str, corpus: str = "corpus.yaml") -> tuple[int, str, str]:
        options = ["--model", str(model), "--cache-dir", "cache", *arguments]
        code = main(["data", "check", corpus, *options])
        return code, *capsys.readouterr()

    return check


def write_mix(folder: Path, *bad: str) -> Path:
    (folder / "images").mkdir()
    Image.new("RGB", (112, 56)).save(folder / "images" / "wide.png")
    captions = [chat("<image>\nWhat?", "The total is 42.", image="wide.png")] * 4
    write_lines(folder / "captions.jsonl", [*captions, *bad])
    sources = [{"path": "captions.jsonl", "image_root": "images", "kind": "caption"}]
    return write_corpus(folder, *sources, write_numbers(folder, "text", 6) | {"kind": "text"})


def test_the_json_report_counts_what_the_model_will_see(check, tmp_path):
    write_mix(tmp_path, "{broken")
    code, output, _ = check("--json", "--skipped", "skipped.jsonl")
    report = json.loads(output)
    assert code == 2
    assert report["samples"] == 10 and report["kinds"] == {"caption": 4, "text": 6} and report["tiles"] == 4 * 3
    assert [(entry["source"], entry["line"]) for entry in report["skipped"]] == [("captions", 5)]
    assert report["skipped"] == [json.loads(line) for line in Path("skipped.jsonl").read_text().splitlines()]
    assert report["tokens"].keys() == {"total", "answers", "longest"} and "steps" not in report
    assert report["tokens"]["total"] > report["tokens"]["answers"] > report["samples"]


def test_packing_is_reported_for_a_batch_size(check, tmp_path):
    write_mix(tmp_path)
    options = ("--samples-per-step", "4", "--max-tokens-per-pack", "450", "--ranks", "2")
    code, output, _ = check("--json", *options)
    report = json.loads(output)
    assert code == 0 and report["steps"] == 3 and report["skipped"] == []
    assert report["packs_per_rank"].keys() == {"min", "mean", "max"}
    assert 0 < report["fill"] <= 1 <= report["balance"]
    code, output, _ = check(*options)
    assert code == 0 and "steps     3" in output and "balance   a step takes 1." in output


def test_long_samples_are_reported(check, tmp_path):
    write_mix(tmp_path)
    longest = json.loads(check("--json")[1])["tokens"]["longest"]
    limits = ("--samples-per-step", "4", "--max-tokens-per-pack", str(longest - 1))
    code, output, _ = check("--json", *limits)
    assert code == 0 and json.loads(output)["too_long"] == {"dropped": 4, "truncated": 0}
    code, _, error = check(*limits, "--too-long", "fail")
    assert code == 2 and f"4 of 10 samples do not fit into a pack of {longest - 1} tokens" in error


def test_bad_samples_are_listed_and_exit_with_2(check, tmp_path):
    write_mix(tmp_path, *["{broken"] * 12)
    code, output, _ = check()
    assert code == 2
    assert output.count("not JSON") == 10 and "and 2 more: --skipped FILE writes all of them" in output


def test_a_mix_of_bad_samples_only_is_reported_too(check, tmp_path):
    write_lines(tmp_path / "a.jsonl", [chat("<image>\nWhat?", image="missing.png")] * 3)
    write_corpus(tmp_path, {"path": "a.jsonl"})
    code, output, _ = check("--json", "--skipped", "skipped.jsonl", "--samples-per-step", "2", "--show", "1")
    report = json.loads(output)
    assert code == 2 and report["samples"] == 0 and len(report["skipped"]) == 3
    assert len(Path("skipped.jsonl").read_text().splitlines()) == 3
    assert check()[0] == 2


def test_existing_files_are_kept_without_overwrite(check, tmp_path):
    write_mix(tmp_path)
    before = (tmp_path / "corpus.yaml").read_text()
    code, _, error = check("--skipped", "corpus.yaml")
    assert code == 2 and error == "sailvit data: corpus.yaml exists: give another name, or --overwrite\n"
    assert (tmp_path / "corpus.yaml").read_text() == before
    assert check("--show", "9", "--figures", "drawn")[0] == 0
    assert check("--show", "9", "--figures", "drawn")[0] == 2
    assert check("--show", "9", "--figures", "drawn", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--too-long", "fail"], "--too-long needs --samples-per-step"),
        (["--ranks", "2"], "--ranks needs --samples-per-step"),
        (["--figures", "drawn"], "--figures needs --show"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments, message, check, tmp_path):
    write_mix(tmp_path)
    code, _, error = check(*arguments)
    assert code == 2 and error == f"sailvit data: {message}\n"


def test_a_shown_sample_that_cannot_be_decoded_is_named(check, tmp_path):
    write_mix(tmp_path)
    whole = (tmp_path / "images" / "wide.png").read_bytes()
    (tmp_path / "images" / "wide.png").write_bytes(whole[:60])
    code, output, _ = check("--show", "10", "--figures", "drawn")
    shown = output.split("\n--- ")[1:]
    assert code == 2 and len(shown) == 10
    assert sum("cannot be read: " in text and "wide.png" in text for text in shown) == 4


def test_shown_text_cannot_control_the_terminal(check, tmp_path):
    write_lines(tmp_path / "a.jsonl", [chat("\x1b[31mred\x00", "caf\u00e9")])
    write_corpus(tmp_path, {"path": "a.jsonl"})
    code, output, _ = check("--show", "1")
    assert code == 0 and "\\x1b[31mred\\x00" in output and "\x1b" not in output


@pytest.mark.parametrize("name", ["nope", "./nope", "vl/config.json"])
def test_a_model_that_is_no_folder_is_one_line(name, check, tmp_path):
    write_mix(tmp_path)
    (tmp_path / "vl").mkdir()
    (tmp_path / "vl" / "config.json").write_text("{}")
    code, _, error = check("--model", name)
    assert code == 2 and name in error and error.count("\n") == 1


def test_shown_samples_mark_trained_tokens_and_draw_tiles(check, tmp_path):
    write_mix(tmp_path)
    code, output, _ = check("--show", "10", "--figures", "drawn")
    shown = output.split("\n--- ")[1:]
    assert code == 0 and len(shown) == 10
    with_image = [text for text in shown if text.startswith("captions")]
    assert len(with_image) == 4
    visual = f"<img><IMG_CONTEXT> x {3 * TILE.count('<IMG_CONTEXT>')} </img>\nWhat?<|im_end|>"
    assert all(f"{visual}<|im_start|>assistant\n⟦The total is 42.<|im_end|>⟧" in text for text in with_image)
    drawn = [*Path("drawn").iterdir()]
    assert len(drawn) == 4
    for file in drawn:
        with Image.open(file) as sheet:
            assert sheet.size == (3 * (56 + 4) + 4, 56 + 2 * 4)


def test_independent_turns_are_shown_one_after_the_other(check, tmp_path):
    Image.new("RGB", (112, 56)).save(tmp_path / "wide.png")
    texts = [{"user": f"{kind}?", "assistant": f"It is {kind}.", "kind": kind} for kind in ("ocr", "caption")]
    write_lines(tmp_path / "a.jsonl", [{"images": ["wide.png"], "texts": texts}])
    write_corpus(tmp_path, {"path": "a.jsonl", "independent_turns": True})
    report = json.loads(check("--json")[1])
    assert report["samples"] == 1 and report["kinds"] == {"caption+ocr": 1} and report["tiles"] == 3
    shown = check("--show", "1")[1].split("\n--- ")[1]
    assert f"{report['tokens']['total']} tokens, 3 tiles, 2 independent turns" in shown
    visual = f"<img><IMG_CONTEXT> x {3 * TILE.count('<IMG_CONTEXT>')} </img>"
    for part, kind in zip(shown.split("⟧\n\n[the same up to the last image]"), ("ocr", "caption"), strict=True):
        assert f"\n{kind}?<|im_end|><|im_start|>assistant\n⟦It is {kind}.<|im_end|>" in part
        assert (visual in part) == (kind == "ocr")  # the turns share it


def test_the_middle_of_a_long_sample_is_not_shown(check, tmp_path):
    write_lines(tmp_path / "a.jsonl", [chat("first", "x" * 9000 + " last")])
    write_corpus(tmp_path, {"path": "a.jsonl"})
    code, output, _ = check("--show", "1")
    shown = output.split("\n--- ")[1]
    assert code == 0 and "first" in shown and "last<|im_end|>" in shown and len(shown) < 4400
    assert re.search(r"\n\[\.\.\. 5,\d\d\d characters are not shown \.\.\.\]\n", shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples-per-step", "0"], "expected a positive integer, got '0'"),
        (["--ranks", "x"], "expected a positive integer, got 'x'"),
        (["--too-long", "cut"], "invalid choice: 'cut'"),
        (["--cache-dir", ""], "expected a folder, got an empty string"),
    ],
)
def test_wrong_options_are_usage_errors(arguments, message, check, capsys):
    with pytest.raises(SystemExit) as stop:
        check(*arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_model_without_language_model_is_refused(check, tmp_path, model):
    write_mix(tmp_path)
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text('{"model_type": "sailvit"}')
    code, _, error = check("--model", "tower")
    assert code == 2 and "expected a SAIL-VL, got model_type 'sailvit'" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "field", "value"), [("config.json", "vocab_size", 300), ("processor_config.json", "image_seq_length", 5)]
)
def test_a_processor_of_another_model_is_refused(file, field, value, check, tmp_path, model):
    write_mix(tmp_path)
    (tmp_path / "other").mkdir()
    for source in model.iterdir():
        (tmp_path / "other" / source.name).write_bytes(source.read_bytes())
    config = json.loads((model / file).read_text())
    (config["text_config"] if field == "vocab_size" else config)[field] = value
    (tmp_path / "other" / file).write_text(json.dumps(config))
    code, _, error = check("--model", "other")
    assert code == 2 and error.count("\n") == 1
    assert f"{field} is {value} in the processor" in error or f"the model embeds {value}" in error


def test_a_missing_corpus_is_one_line(check):
    code, _, error = check(corpus="nothing.yaml")
    assert code == 2 and "nothing.yaml" in error and error.count("\n") == 1


def run_with_hub(folder: Path, model: Path, address: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own: the client reads the address of the Hub when it is imported."""
    environment = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    write_corpus(folder, {"name": "chats", "path": "owner/chats", "split": "train"})
    command = [sys.executable, "-m", "sailvit_cli", "data", "check", "corpus.yaml", "--model", str(model), "--json"]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.slow
def test_a_data_set_on_the_hub_is_read_by_name_and_split(tmp_path, model):
    (tmp_path / "data").mkdir()
    for split, count in (("train", 5), ("test", 1)):
        turns = [{"role": "user", "content": split}, {"role": "assistant", "content": "a"}]
        write_lines(tmp_path / "data" / f"{split}.jsonl", [{"messages": turns}] * count)
    with serve_writable() as hub:
        put(hub, "owner/chats", tmp_path / "data")
        run = run_with_hub(tmp_path, model, hub.address)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["samples"] == 5


@pytest.mark.nightly
def test_a_data_set_on_the_hub_without_network_is_one_line(tmp_path, model):
    run = run_with_hub(tmp_path, model, "http://127.0.0.1:9")
    assert run.returncode == 2 and run.stdout == ""
    assert (
        run.stderr.startswith("sailvit data: source chats: owner/chats, split train: ") and run.stderr.count("\n") == 1
    )


@pytest.mark.nightly
@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupt_is_one_line(workers, tmp_path, model):
    write_numbers(tmp_path, "a", 60_000)
    write_corpus(tmp_path, {"path": "a.jsonl"})
    command = [sys.executable, "-m", "sailvit_cli", "data", "check", "corpus.yaml", "--model", str(model)]
    command += ["--cache-dir", "cache", "--workers", workers]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stderr.readline() == "a: a.jsonl, 60,000 rows\n"
    time.sleep(1)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    _, error = run.communicate(timeout=120)
    assert (run.returncode, error) == (130, "sailvit data: interrupted\n")
