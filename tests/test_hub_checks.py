"""The checks before publishing: what passes, and what is reported."""

import getpass
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PHOTOGRAPH, TINY, make_checkpoint, randomize
from safetensors.torch import load_file, save_file
from toy_sailvl import write_release

from sailvit import SAILViTConfig, SAILViTForImageClassification, SAILViTImageProcessor, SAILViTModel
from sailvit.convert import CheckpointError, convert_checkpoint
from sailvit.convert.export.card import card_problems
from sailvit.hub import check_before_publish, write_model_card
from sailvit.hub.files import code_files, file_problems, published_files


SECRET = "hf_" + "a1B2" * 8


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A vision encoder as `sailvit convert` writes it, verified, with a card."""
    folder = tmp_path_factory.mktemp("checks") / "tower"
    convert_checkpoint(make_checkpoint(folder.with_name("apple")), folder)
    write_model_card(folder, "owner/tower", "v1")
    return folder


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checks") / "vl"
    convert_checkpoint(write_release(folder.with_name("release")), folder)
    write_model_card(str(folder), "owner/vl", "v1")
    return folder


@pytest.fixture
def unloaded(monkeypatch):
    """For checks that do not load the folder."""
    monkeypatch.setattr("sailvit.hub.checks._load_problems", lambda *arguments: [])


@pytest.fixture
def tower(converted, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(converted, tmp_path / "tower"))


def kinds(problems) -> set[str]:
    return {problem.kind for problem in problems}


def encoded(file: str, text: str, encoding: str):
    return lambda folder: (folder / file).write_text(text, encoding=encoding)


def write(file: str, text: str):
    def change(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)

    return change


def append(file: str, text: str):
    return lambda folder: (folder / file).write_text((folder / file).read_text() + text)


def field(file: str, **fields):
    return lambda folder: (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **fields}))


def metadata(**entries):
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **entries})

    return change


@pytest.mark.parametrize("which", ["converted", "multimodal"])
def test_the_files_of_a_conversion_have_no_problems(request, which):
    folder = request.getfixturevalue(which)
    assert file_problems(folder, "owner") == []
    assert {*published_files(folder)} == {path.name for path in folder.iterdir()}


def test_code_files_are_those_of_auto_map_and_their_imports(multimodal):
    assert code_files(multimodal) == {path.name for path in multimodal.glob("*.py")}
    assert len(code_files(multimodal)) == 8


@pytest.mark.parametrize(
    ("change", "kind", "where", "message"),
    [
        (write("optimizer.pt", "x"), "stray", "optimizer.pt", "remove it"),
        (write("training_args.bin", "x"), "stray", "training_args.bin", "remove it"),
        (write("__pycache__/a.pyc", "x"), "stray", "__pycache__/a.pyc", "remove it"),
        (write("notes.txt", "x"), "stray", "notes.txt", "remove it"),
        (write(".env", "x"), "stray", ".env", "remove it"),
        (write("extra.py", "x"), "stray", "extra.py", "remove it"),
        (lambda folder: (folder / "modeling_sailvit.py").unlink(), "code", "modeling_sailvit.py", "missing"),
        (append("modeling_sailvit.py", "\nfrom .helper import x\n"), "code", "helper.py", "missing"),
        (lambda folder: (folder / "photo.png").symlink_to("gone"), "file", "photo.png", "a broken link"),
        (lambda folder: (folder / "NOTICE").symlink_to(PHOTOGRAPH), "file", "NOTICE", "a link to a file elsewhere"),
        (write("generation_config.json", "{"), "file", "generation_config.json", "JSON"),
        (field("config.json", _name_or_path="/mnt/bn/x/ckpt"), "path", "config.json", "/mnt/bn"),
        (field("config.json", out="/opt2/x/y"), "path", "config.json", "/opt2/x/y"),
        (field("provenance.json", options={"out": "/home/me/out"}), "path", "provenance.json", "/home/me"),
        (append("README.md", "see /cpfs01/shared/me/run"), "path", "README.md", "/cpfs01/shared"),
        (append("README.md", "see s3://bucket/run"), "path", "README.md", "s3://bucket"),
        (write("LICENSE-2.0", f"token {SECRET}"), "secret", "LICENSE-2.0", "a token of the Hub"),
        (write("photo.png", f"token {SECRET}"), "secret", "photo.png", "a token of the Hub"),
        (encoded("NOTICE.txt", f"token {SECRET}", "utf-16"), "secret", "NOTICE.txt", "a token of the Hub"),
        (append("README.md", "see C:\\Users\\me\\x"), "path", "README.md", "C:\\Users"),
        (append("README.md", "see file:///x/y"), "path", "README.md", "file:///x"),
        (metadata(source="/data/me/ckpt"), "path", "model.safetensors", "/data/me"),
        (append("README.md", f"token {SECRET}"), "secret", "README.md", "a token of the Hub in line"),
        (field("config.json", key="sk-" + "a" * 30), "secret", "config.json", "an API key"),
        (field("config.json", key="AKIA" + "A" * 16), "secret", "config.json", "an access key of AWS"),
        (field("config.json", url="https://me:word@host/x"), "secret", "config.json", "a password in an address"),
        (append("modeling_sailvit.py", "# ghp_" + "a" * 36), "secret", "modeling_sailvit.py", "a token of GitHub"),
        (append("README.md", "-----BEGIN RSA PRIVATE KEY-----"), "secret", "README.md", "a private key"),
        (metadata(key=SECRET), "secret", "model.safetensors", "a token of the Hub"),
        (append("README.md", "made by jdoe42."), "user", "README.md", "names jdoe42"),
        (append("README.md", "key word-of-this-machine"), "secret", "README.md", "the token that this machine has"),
    ],
)
def test_secrets_local_paths_and_strays_are_reported(tower, monkeypatch, change, kind, where, message):
    monkeypatch.setattr(getpass, "getuser", lambda: "jdoe42")
    monkeypatch.setenv("HF_TOKEN", "word-of-this-machine")
    change(tower)
    found = [problem for problem in file_problems(tower, "owner") if problem.location == where]
    assert [problem.kind for problem in found] == [kind] and message in found[0].message, found
    assert "a1B2" not in str(found[0])


def test_links_lead_to_the_blobs_of_a_hub_cache_but_not_below(tower, tmp_path):
    blobs, folder = tmp_path / "model" / "blobs", tmp_path / "model" / "snapshots" / "abc"
    (blobs / "inner").mkdir(parents=True)
    folder.mkdir(parents=True)
    for file, name in {"one": "NOTICE", "inner/two": "LICENSE"}.items():
        (blobs / file).write_text("text")
        (folder / name).symlink_to(blobs / file)
    links = [problem.location for problem in file_problems(folder) if "a link to a file elsewhere" in problem.message]
    assert links == ["LICENSE"]


def test_urls_and_placeholders_are_no_local_paths(tower, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "owner")
    text = "https://host/data/x, a/home/b, n/a, and/or, owner/tower, 1/2, `/v1`, ~/data, #!/usr/bin/env python\n"
    text += '/path/to/your/model, </a/b/c>, ("http://", "file://"), "s3://"'
    append("README.md", text)(tower)
    assert file_problems(tower, "owner") == []


def test_tokens_of_a_vocabulary_are_no_local_paths(multimodal, tmp_path):
    folder = Path(shutil.copytree(multimodal, tmp_path / "vl"))
    (folder / "merges.txt").write_text((folder / "merges.txt").read_text() + "/home/x /tmp/y\n")
    assert file_problems(folder, "owner") == []


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="give a folder that"):
            check_before_publish(folder)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["converted", "multimodal"])
def test_a_conversion_passes_and_is_left_as_it_was(request, which):
    folder, lines = request.getfixturevalue(which), []
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert check_before_publish(folder, f"owner/{folder.name}", log=lines.append) == []
    assert len(lines) == 1 and "match those of this package within 0e+00" in lines[0]
    after = {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert after == before and not [*folder.parent.glob(".*")]


@pytest.mark.slow
@pytest.mark.parametrize("cls", [SAILViTModel, SAILViTForImageClassification])
def test_a_folder_of_save_pretrained_passes_with_a_card(cls, tmp_path):
    folder = tmp_path / "saved.v1"
    randomize(cls(SAILViTConfig(**TINY))).save_pretrained(folder)
    SAILViTImageProcessor(size=56).save_pretrained(folder)
    assert [problem.location for problem in card_problems(folder)] == ["README.md"]
    write_model_card(folder, "owner/saved", "v1")
    assert check_before_publish(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_folders_of_other_layouts_pass_without_remote_code(converted, tmp_path, layout):
    convert_checkpoint(converted, tmp_path / "out", to_layout=layout)
    write_model_card(tmp_path / "out", "owner/out", "v1")
    assert check_before_publish(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (append("modeling_sailvit.py", "\nimport sailvit\n"), "imports the package sailvit"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (field("config.json", num_hidden_layers=2), "not loaded strictly"),
    ],
)
def test_a_folder_that_does_not_load_in_a_clean_process_is_reported(tower, change, message):
    (tower / "provenance.json").unlink()
    change(tower)
    found = [problem for problem in check_before_publish(tower) if problem.kind == "load"]
    assert len(found) == 1 and message in found[0].message and str(tower.parent) not in found[0].message, found


@pytest.mark.slow
def test_code_that_gives_other_tokens_is_reported(tower):
    (tower / "provenance.json").unlink()
    append(
        "modeling_sailvit.py",
        "\n\nplain = SAILViTModel.forward\n\n\ndef forward(self, *arguments, **options):\n"
        "    output = plain(self, *arguments, **options)\n"
        "    output.last_hidden_state = output.last_hidden_state * 1.01\n"
        "    return output\n\n\nSAILViTModel.forward = forward\n",
    )(tower)
    found = [problem for problem in check_before_publish(tower) if problem.kind == "tokens"]
    assert len(found) == 1 and "tokens differ from those of this package by 1.0e-02" in found[0].message


def test_weights_that_differ_from_the_verified_ones_are_reported(tower, unloaded):
    tensors = load_file(tower / "model.safetensors")
    name = min(tensors)
    tensors[name] = torch.full_like(tensors[name], 0.5)
    save_file(tensors, tower / "model.safetensors", metadata={"format": "pt"})
    assert kinds(check_before_publish(tower)) == {"sha256"}


def test_a_conversion_that_was_not_verified_is_reported(tower, unloaded):
    field("provenance.json", verification=None)(tower)
    assert [problem.location for problem in check_before_publish(tower)] == ["provenance.json"]
