"""Folders whose code an earlier version of the package wrote: that this is told, and how their code is renewed."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import ROOT, TINY, make_checkpoint, randomize
from toy_sailvl import write_release

import sailvit_cli
from sailvit import SAILViTConfig, SAILViTForImageClassification
from sailvit.chat_sailvl import CHAT_TEMPLATE
from sailvit.convert import CheckpointError, convert_checkpoint, inspect_checkpoint, refresh_code
from sailvit.convert import refresh as refreshing
from sailvit.convert.export.code_files import OLD_TEMPLATES, is_old_template, package_version
from sailvit.convert.inspect import table
from sailvit.convert.storage.errors import VerificationError
from sailvit.hub import check_before_publish, write_model_card


MARK = "configuration_sailvit.py"
MAIN = {"tower": "modeling_sailvit.py", "vl": "modeling_sailvl.py"}
FIRST_TEMPLATE = (ROOT / "tests" / "data" / "chat_template_1.jinja").read_text(encoding="utf-8")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def record_as_written(folder: Path) -> None:
    """provenance.json with the hashes of what is there, as the package of then wrote it."""
    record = read(folder / "provenance.json")
    for name in record["files"]:
        record["files"][name] = {"sha256": sha256((folder / name).read_bytes()).hexdigest()}
    (folder / "provenance.json").write_text(json.dumps(record, indent=1) + "\n")


def age(folder: Path, kind: str) -> None:
    """What the first version of the package wrote: code without a mark, its prompt, a tokenizer as it was released."""
    lines = (folder / MARK).read_text().splitlines(keepends=True)
    (folder / MARK).write_text("".join(line for line in lines if not line.startswith("CODE_VERSION")))
    (folder / MAIN[kind]).write_text((folder / MAIN[kind]).read_text() + "# as it was\n")
    if kind == "vl":
        (folder / "chat_template.jinja").write_text(FIRST_TEMPLATE, encoding="utf-8")
        settings = read(folder / "tokenizer_config.json")
        for key in ("padding_side", "image_token", "extra_special_tokens"):
            del settings[key]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    record_as_written(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tower and a SAIL-VL, of today; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(folder / "apple")
    write_release(folder / "release")
    convert_checkpoint(folder / "apple", folder / "tower", verify=False)
    convert_checkpoint(folder / "release", folder / "vl", verify=False)
    return folder


@pytest.fixture(params=["tower", "vl"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def old(made, tmp_path, kind) -> Path:
    shutil.copytree(made / kind, tmp_path / kind)
    age(tmp_path / kind, kind)
    return tmp_path / kind


@pytest.fixture
def old_vl(made, tmp_path) -> Path:
    shutil.copytree(made / "vl", tmp_path / "old-vl")
    age(tmp_path / "old-vl", "vl")
    return tmp_path / "old-vl"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file it is, and when it was written, of every file of weights."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


def refresh(folder: Path, **options):
    return refresh_code(folder, **{"verify": False, **options})


# It is told


def test_code_that_is_known_to_break_is_reported_and_not_published(old_vl, made, capsys, monkeypatch):
    monkeypatch.setattr("sailvit.hub.checks._load_problems", lambda *arguments: [])
    assert sailvit_cli.main(["inspect", str(old_vl)]) == 2
    said = capsys.readouterr().out
    assert f"version 1, the installed package's is {package_version()}" in said
    assert (
        "version 1 cannot write anything on transformers >= 5.24" in said
        and "update it with `sailvit convert FOLDER --refresh-code`" in said
    )
    write_model_card(old_vl, "owner/vl", "v1")
    assert any(
        "cannot write anything" in problem.message for problem in check_before_publish(old_vl) if problem.kind == "code"
    )
    assert sailvit_cli.main(["inspect", str(made / "vl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["code"]["version"] == package_version()


def test_old_code_that_works_is_reported_but_no_problem(made, tmp_path, capsys):
    shutil.copytree(made / "tower", tmp_path / "tower")
    age(tmp_path / "tower", "tower")
    assert sailvit_cli.main(["inspect", str(tmp_path / "tower"), "--deep"]) == 0
    assert f"version 1, the installed package's is {package_version()}" in capsys.readouterr().out


def test_edited_code_of_this_version_is_reported(made, tmp_path):
    shutil.copytree(made / "vl", tmp_path / "vl")
    (tmp_path / "vl" / "processing_sailvl.py").write_text("# mine\n")
    report = inspect_checkpoint(tmp_path / "vl")
    code = report.code
    assert (code.version, code.lacks, code.other) == (package_version(), [], ["processing_sailvl.py"])
    assert "edited: processing_sailvl.py" in table(report) and "--refresh-code --overwrite" in table(report)


def test_a_release_has_code_of_the_same_names_that_is_not_ours(made, tmp_path):
    shutil.copytree(made / "release", tmp_path / "release")
    for name in ("configuration_sailvl.py", "configuration_sailvit.py", "modeling_sailvl.py"):
        (tmp_path / "release" / name).write_text("")
    assert inspect_checkpoint(tmp_path / "release").code is None


def test_the_package_marks_its_version():
    assert package_version() >= 2 and f"CODE_VERSION = {package_version()}\n" in (ROOT / MARK).read_text()


# It is renewed


def test_code_is_renewed_and_weights_are_not_touched(old, made, kind):
    before, weights = contents(old), stamps(old)
    done = refresh(old)
    assert (done.before, done.after) == (1, package_version())
    assert stamps(old) == weights and not [*old.glob(".*")]
    after = contents(old)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    settings = {"tokenizer_config.json"} if kind == "vl" else set()
    settings |= {"chat_template.jinja"} if kind == "vl" and CHAT_TEMPLATE != FIRST_TEMPLATE else set()
    assert changed == {MARK, MAIN[kind], "provenance.json"} | settings == {*done.files}
    new = contents(made / kind)
    assert all(after[name] == new[name] for name in after if name not in ("README.md", "provenance.json"))
    record = read(old / "provenance.json")
    assert record["refreshed"]["code"] == {"from": 1, "to": package_version()}
    assert record["source"] == read(made / kind / "provenance.json")["source"]
    assert inspect_checkpoint(old, deep=True).ok
    assert refresh(old).files == [] and contents(old) == after


def test_a_folder_that_would_not_load_is_left_as_it_was(old, kind, monkeypatch):
    def refuse(*arguments):
        raise VerificationError("the folder does not load in a clean process: of no matter what")

    before = contents(old)
    monkeypatch.setattr(refreshing, "run_in_clean_process" if kind == "tower" else "verify_sailvl", refuse)
    with pytest.raises(VerificationError):
        refresh(old, verify=True)
    assert contents(old) == before


@pytest.mark.slow
def test_it_is_loaded_with_the_new_code_before_that_is_put_there(old, kind, monkeypatch, capsys):
    before = contents(old)
    broken = old.parent / "broken-package"
    broken.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, broken / path.name)
    (broken / MAIN[kind]).write_text("import nothing_that_exists\n")
    monkeypatch.setattr(refreshing, "PACKAGE", broken)
    with pytest.raises(VerificationError, match="does not load"):
        refresh(old, verify=True)
    assert contents(old) == before
    monkeypatch.undo()
    assert sailvit_cli.main(["convert", str(old), "--refresh-code"]) == 0
    said = capsys.readouterr().out
    assert "with the new code it loads in a clean process" in said and f"updated: {MAIN[kind]}" in said
    assert f"code of version {package_version()}, before 1" in said


@pytest.mark.slow
def test_a_classifier_is_renewed_too(tmp_path):
    randomize(SAILViTForImageClassification(SAILViTConfig(**TINY, num_labels=3))).save_pretrained(tmp_path / "own")
    shutil.copy(ROOT / "preprocessor_config.json", tmp_path / "own")
    settings = read(tmp_path / "own" / "preprocessor_config.json")
    (tmp_path / "own" / "preprocessor_config.json").write_text(
        json.dumps(settings | {"size": {"height": 56, "width": 56}})
    )
    (tmp_path / "own" / "image_processing_sailvit.py").write_text("# old\n")
    with pytest.raises(CheckpointError, match=r"image_processing_sailvit\.py: it is in no provenance.*--overwrite"):
        refresh(tmp_path / "own")
    done = refresh(tmp_path / "own", overwrite=True, verify=True)
    assert done.files == ["image_processing_sailvit.py"] and not (tmp_path / "own" / "provenance.json").exists()


def test_edited_code_is_replaced_only_on_request(old, kind):
    (old / MAIN[kind]).write_text((old / MAIN[kind]).read_text() + "# mine\n")
    before = contents(old)
    with pytest.raises(CheckpointError, match=rf"{MAIN[kind]}: it differs from provenance\.json.*--overwrite"):
        refresh(old)
    assert contents(old) == before
    refresh(old, overwrite=True)
    assert (old / MAIN[kind]).read_bytes() == (ROOT / MAIN[kind]).read_bytes()
    assert inspect_checkpoint(old, deep=True).ok


def test_settings_that_were_edited_stay(old_vl):
    settings = {**read(old_vl / "tokenizer_config.json"), "model_max_length": 77}
    (old_vl / "tokenizer_config.json").write_text(json.dumps(settings))
    (old_vl / "chat_template.jinja").write_text("{{ 'mine' }}")
    config = read(old_vl / "config.json")
    del config["auto_map"]["AutoProcessor"]
    (old_vl / "config.json").write_text(json.dumps({**config, "vision_batch_size": 3}))
    done = refresh(old_vl)
    assert read(old_vl / "tokenizer_config.json") == settings
    assert any("tokenizer_config.json differs from provenance.json" in note for note in done.notes)
    assert (old_vl / "chat_template.jinja").read_text() == "{{ 'mine' }}"
    config = read(old_vl / "config.json")
    assert (
        config["vision_batch_size"] == 3 and config["auto_map"]["AutoProcessor"] == "processing_sailvl.SAILVLProcessor"
    )
    edited = {"tokenizer_config.json", "chat_template.jinja", "config.json"}
    assert {problem.location for problem in inspect_checkpoint(old_vl, deep=True).problems} == edited


def test_a_prompt_of_an_earlier_version_is_known_and_not_kept(old_vl, tmp_path):
    assert is_old_template(FIRST_TEMPLATE) and len(OLD_TEMPLATES) == 1
    convert_checkpoint(old_vl, tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE


@pytest.mark.parametrize("at", range(4))
def test_what_fails_leaves_all_files_as_they_were(old_vl, monkeypatch, at):
    before, replace, calls = contents(old_vl), Path.replace, []

    def fail(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == at + 1:
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        refresh(old_vl)
    assert contents(old_vl) == before


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_kill_interrupted_is_finished_by_the_next_call(old, made, count, kind):
    for name in (MAIN[kind], MARK)[:count]:
        shutil.copy(ROOT / name, old / name)
    (old / f".{MAIN[kind]}.part").write_text("half of")
    assert any(problem.kind == "stray" for problem in inspect_checkpoint(old).problems)
    refresh(old)
    assert contents(old).keys() == contents(made / kind).keys()
    assert inspect_checkpoint(old, deep=True).ok


def test_newer_code_is_kept(old_vl):
    text = (ROOT / MARK).read_text().replace(f"CODE_VERSION = {package_version()}", "CODE_VERSION = 99")
    (old_vl / MARK).write_text(text)
    record_as_written(old_vl)
    before = contents(old_vl)
    for overwrite in (False, True):
        with pytest.raises(
            CheckpointError, match=f"expected code of version {package_version()} at most, got version 99"
        ):
            refresh(old_vl, overwrite=overwrite)
    assert contents(old_vl) == before


def test_what_has_no_code_of_this_package_is_refused(made, tmp_path):
    convert_checkpoint(made / "apple", tmp_path / "native", to_layout="transformers", verify=False)
    cases = {
        made / "release": "names no code of this package",
        tmp_path / "native": "names no code of this package",
        tmp_path / "nowhere": "expected a folder with a config.json.*hf download",
        made / "vl" / "model-00001-of-00002.safetensors": "expected a folder with a config.json",
    }
    for folder, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            refresh(folder)


def test_a_cache_of_the_hub_is_left_alone(old, tmp_path):
    snapshot = tmp_path / "models--owner--toy" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in old.iterdir():
        (snapshot / path.name).symlink_to(path)
    before = contents(old)
    with pytest.raises(CheckpointError, match=r"is a symbolic link, as in a cache of the Hub"):
        refresh(snapshot, overwrite=True)
    assert contents(old) == before and all(path.is_symlink() for path in snapshot.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--refresh-code"], "in place: leave out OUT"),
        (["--refresh-code", "--part", "vision"], "leave out --part"),
        (["--refresh-code", "--dtype", "float16"], "leave out --dtype"),
        (["--refresh-code", "--link"], "leave out --link"),
        ([], "expected an output folder OUT after it"),
    ],
)
def test_options_that_do_not_go_together_are_refused(made, capsys, arguments, message):
    assert sailvit_cli.main(["convert", str(made / "vl"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
