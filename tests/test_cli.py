"""The command `sailvit`: its help, exit codes, progress, and what it imports."""

import errno
import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import PHOTOGRAPH, make_checkpoint
from processes import SAILVIT

import sailvit_cli
from sailvit import devices
from sailvit.convert import LAYOUTS, CheckpointError
from sailvit.convert.plan import DTYPES
from sailvit.convert.storage.errors import VerificationError
from sailvit.evaluate.encoders import LAST
from sailvit.evaluate.probe.heads import KINDS
from sailvit.examples.miniature.shipped import ENCODER, MULTIMODAL
from sailvit_cli.arguments import DTYPES as DTYPE_CHOICES
from sailvit_cli.arguments import LAYOUTS as LAYOUT_CHOICES
from sailvit_cli.probe import HEADS as HEAD_CHOICES
from sailvit_cli.probe import LAST as LAST_LAYER
from sailvit_cli.progress import byte_progress


VERBS = (
    *("convert", "compose", "inspect", "encode", "demo", "show", "data", "train", "probe", "report", "suite"),
    *("serve", "miniature", "push"),
)


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [*SAILVIT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=500)


def test_help_lists_the_verbs_and_imports_nothing_heavy(tmp_path):
    script = (
        "import sys, sailvit_cli\n"
        "try: sailvit_cli.main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'transformers', 'numpy', 'sailvit'} & set(sys.modules)"
    )
    for words in ([], ["convert"]):
        command = [sys.executable, "-c", script, *words, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert words or tuple(re.findall(r"^    (\w+)", done.stdout, re.MULTILINE)) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_is_a_sentence_two_examples_and_groups(verb, capsys):
    with pytest.raises(SystemExit):
        sailvit_cli.main([verb, "--help"])
    usage, sentence, examples, *groups = capsys.readouterr().out.strip().split("\n\n")
    assert usage.startswith(f"usage: sailvit {verb} ")
    assert sentence.endswith(".") and "\n" not in sentence and ". " not in sentence
    title, *commands = examples.splitlines()
    assert title == "examples:" and len(commands) == 2
    for command in commands:
        options = sailvit_cli.parse(shlex.split(command)[1:])
        assert options.verb == verb
    titles = [group.splitlines()[0] for group in groups]
    assert titles[0] == "input:" and ("output:" in titles or verb == "serve")  # which writes nothing
    known = {"output:", "checks:", "compute:", "packing:", "plan:", "heads:", "images of a request:", "other options:"}
    assert {*titles[1:]} <= known


def test_choices_are_those_of_the_package():
    assert tuple(LAYOUTS) == LAYOUT_CHOICES
    assert set(DTYPES) == set(DTYPE_CHOICES)
    assert (HEAD_CHOICES, LAST_LAYER) == (KINDS, LAST)
    assert set(devices.DTYPES) == {"auto", *DTYPE_CHOICES}


def test_options_of_convert_may_come_before_the_checkpoint():
    options = sailvit_cli.parse(["convert", "--dtype", "float32,int8", "SRC", "OUT"])
    assert (options.dtype, options.source, str(options.out)) == (["float32", "int8"], "SRC", "OUT")


def test_wrong_usage_is_exit_code_two(tmp_path):
    for words, message in {
        ("encode",): "sailvit encode: the following arguments are required: IMAGE, --model",
        ("fly",): "sailvit: argument VERB: invalid choice: 'fly'",
        ("convert", "a", "b", "--dtype", "float64"): "sailvit convert: argument --dtype: expected some of float32,",
        ("convert", "a", "b", "--part", "tower"): "sailvit convert: argument --part: invalid choice: 'tower'",
        ("encode", "a", "--batch-size", "0"): "argument --batch-size: expected a positive integer, got '0'",
        ("encode", "a", "--image-option", "max_tiles"): "--image-option: expected NAME=VALUE, got 'max_tiles'",
    }.items():
        done = run(*words, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
        assert done.stderr.endswith("--help`\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("config.json: no\nsuch \x1b[1mfield\udc80"), 2),
        (OSError(errno.ENOSPC, "no space left", "out"), 2),
        (VerificationError("the folder does not load"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_expected_error_is_one_line_and_its_exit_code(monkeypatch, capsys, error, code):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("sailvit.convert.inspect_checkpoint", fail)
    assert sailvit_cli.main(["inspect", "x"]) == code
    message = capsys.readouterr().err
    assert message.startswith("sailvit inspect: ") and message.count("\n") == 1 and message[:-1].isprintable()


def test_an_unexpected_error_has_a_traceback(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("VerificationError")

    monkeypatch.setattr("sailvit.convert.inspect_checkpoint", fail)
    with pytest.raises(RuntimeError):
        sailvit_cli.main(["inspect", "x"])


def test_a_closed_pipe_is_no_traceback(tmp_path):
    make_checkpoint(tmp_path / "apple")
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [*SAILVIT, "inspect", tmp_path / "apple"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_pipe_gets_a_plain_line_every_ten_seconds_where_there_is_much_to_read(monkeypatch, capsys):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with byte_progress() as on_progress:
        on_progress(1, 2 * 10**9)
        now += 11
        on_progress(1_000, 2_000_000)
        assert capsys.readouterr().err == ""
        on_progress(10**9, 2 * 10**9)
        on_progress(10**9 + 1, 2 * 10**9)
    assert capsys.readouterr() == ("", "1.00 of 2.00 GB\n")


def test_a_terminal_gets_a_bar_of_bytes(tmp_path):
    make_checkpoint(tmp_path / "apple")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [*SAILVIT, "convert", "apple", "out", "--no-verify"]
    done = subprocess.run(command, stderr=follower, stdout=subprocess.DEVNULL, cwd=tmp_path, timeout=300)
    os.close(follower)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert done.returncode == 0 and "100%" in shown and "B/s" in shown


def test_a_log_setting_of_the_users_own_stays(monkeypatch):
    monkeypatch.setenv("TORCH_LOGS", "+dynamo")
    with pytest.raises(SystemExit):
        sailvit_cli.main(["encode"])
    assert os.environ["TORCH_LOGS"] == "+dynamo"


def test_what_reads_and_writes_files_imports_no_framework_and_prints_no_warning(tmp_path):
    make_checkpoint(tmp_path / "apple")
    script = (
        "import sys, sailvit_cli; sailvit_cli.main(sys.argv[1:]);"
        "assert not {'torch', 'torchao', 'transformers', 'timm'} & set(sys.modules)"
    )
    for arguments in (
        ["inspect", "apple", "--deep"],
        ["convert", "apple", "out", "--no-verify"],
        ["train", "--list"],
        ["train", "stage1", "--print-config"],
    ):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_commands_that_run_a_model_print_no_warning(tmp_path):
    """torchao, where installed, makes torch warn at every import of transformers; bitsandbytes warns with peft."""
    shutil.copy(PHOTOGRAPH, tmp_path / "photo.jpg")
    for arguments in (
        ["encode", "photo.jpg", "--model", ENCODER, "--workers", "1"],
        ["train", "stage3", f"model={MULTIMODAL}", "--plan"],
    ):
        done = run(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_stdout_is_no_error(tmp_path):
    make_checkpoint(tmp_path / "apple")
    command = f"{shlex.join(SAILVIT)} inspect apple >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_option_names_its_verb(tmp_path):
    done = subprocess.run([*SAILVIT, "convert", "a", "b", "--overwite"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("--overwite; see `sailvit convert --help`\n")


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        sailvit_cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"sailvit {version('sailvit')}\n"
