"""Publishing a folder: the real client, against a Hub on this machine with injected faults."""

import json
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import PHOTOGRAPH, make_checkpoint
from fake_hub import OWNER, TOKEN, Commit, Fault, serve_writable
from huggingface_hub import HfApi, constants

import sailvit_cli
from sailvit import SAILViTImageProcessor, SAILViTModel
from sailvit.convert import convert_checkpoint
from sailvit.convert.export.card import MARK
from sailvit.convert.storage.errors import VerificationError
from sailvit.hub import PublishError, PushError, push_folder
from sailvit.hub.push import Target, publish


REPO = f"{OWNER}/tower"
LARGE = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FOREVER = 1000
# The client says this of its own uploads.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """Undo HF_HUB_OFFLINE, which the client reads when it is imported; let it not wait between its tries."""
    reset = getattr(huggingface_hub, "configure_http_backend", lambda: None)  # sessions of huggingface_hub < 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    reset()
    yield
    monkeypatch.undo()
    reset()


@pytest.fixture
def hub(monkeypatch):
    with serve_writable() as hub:
        # What the client makes addresses with, where it does not ask its HfApi.
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for module in (constants, huggingface_hub.file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files like a model's; nothing loads them."""
    folder = tmp_path / "tower"
    folder.mkdir()
    noise = random.Random(0)
    for file in LARGE:
        (folder / file).write_bytes(noise.randbytes(300_000))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}\n')
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_toy.Toy"}}))
    (folder / "modeling_toy.py").write_text("class Toy:\n    pass\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Toy\n")
    return folder


def push(hub, folder: Path, repo: str = REPO, token: str | bool = TOKEN, log=lambda line: None, **options):
    return publish(Target(HfApi(endpoint=hub.address, token=token), repo, **options), folder, log)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(hub, revision: str = "main", repo: str = REPO) -> dict[str, bytes]:
    """Return the files on the Hub, without its own."""
    repository = hub.repositories[repo]
    files = repository.commits[repository.find(revision)].files
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def commits(hub) -> int:
    """Return how many commits follow the first one, which a new repository has."""
    return len(hub.repositories[REPO].commits) - 1 if REPO in hub.repositories else 0


def test_a_folder_is_published_in_one_commit(hub, folder):
    done = push(hub, folder, revision_note="from stage 3")
    assert published(hub) == content(folder) and commits(hub) == 1
    repository = hub.repositories[REPO]
    assert repository.refs["main"] == done.commit and done.url == f"{hub.address}/{REPO}"
    commit = repository.commits[done.commit]
    assert (commit.title, commit.body) == ("Upload by sailvit", "from stage 3")
    assert sorted(commit.large) == sorted(LARGE) and sorted(done.uploaded) == sorted(content(folder))


def test_a_second_push_of_the_same_folder_uploads_nothing(hub, folder):
    first = push(hub, folder)
    hub.asked.clear()
    second = push(hub, folder)
    assert second.commit == first.commit and second.uploaded == [] and commits(hub) == 1
    assert not hub.asked_for("PUT|/preupload/|/commit/")


def test_only_what_changed_is_uploaded(hub, folder):
    push(hub, folder)
    hub.asked.clear()
    (folder / LARGE[1]).write_bytes(b"other")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Other\n")
    assert sorted(push(hub, folder).uploaded) == ["README.md", LARGE[1]]
    assert hub.asked_for("PUT") == 1 and published(hub) == content(folder) and commits(hub) == 2


def test_files_that_a_model_no_longer_has_are_deleted_and_other_files_stay(hub, folder):
    push(hub, folder)
    repository = hub.repositories[REPO]
    before = repository.commits[repository.refs["main"]]
    repository.add("main", Commit({**before.files, "notes/a.json": b"{}", "handler.py": b"p"}, large=before.large))
    (folder / LARGE[1]).unlink()
    assert push(hub, folder).deleted == [LARGE[1]]
    assert published(hub) == {**content(folder), "notes/a.json": b"{}", "handler.py": b"p"}


def test_files_that_are_no_part_of_a_model_are_not_uploaded(hub, folder):
    before = content(folder)
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / ".env").write_text("HF_TOKEN=x")
    push(hub, folder)
    assert published(hub) == before


@pytest.mark.parametrize("how", [503, "cut", "lose"])
@pytest.mark.parametrize("times", [1, FOREVER])
def test_whatever_request_fails_the_next_call_finishes_with_one_commit(hub, folder, how, times):
    push(hub, folder, tag="v1")  # once a day, huggingface_hub >= 2 has a request of its own before the first
    hub.repositories.clear(), hub.objects.clear(), hub.asked.clear()
    push(hub, folder, tag="v1")
    requests = len(hub.asked)
    assert requests > 10
    for index in range(requests):
        hub.repositories.clear(), hub.objects.clear()
        hub.faults = [Fault("", "", times=index), Fault("", how, times=times)]
        try:
            push(hub, folder, tag="v1")
        except PushError as error:
            assert "run the same command again" in str(error), index
        else:
            assert times == 1
        assert commits(hub) == 0 or published(hub) == content(folder), "half of it is never there"
        hub.faults = []
        done = push(hub, folder, tag="v1")
        assert published(hub) == content(folder) and commits(hub) == 1, index
        assert hub.repositories[REPO].tags == {"v1": done.commit}


@pytest.mark.parametrize("seed", range(8))
def test_an_upload_cut_at_any_byte_is_finished_by_the_next_call(hub, folder, seed):
    chance = random.Random(seed)
    where = chance.choice(["PUT", "/commit/", "/preupload/", "objects/batch", "/verify"])
    hub.faults = [Fault(where, "cut", times=FOREVER, at=chance.randrange(300_000))]
    with pytest.raises(PushError, match="run the same command again"):
        push(hub, folder)
    assert published(hub) == {}
    hub.faults = []
    hub.asked.clear()
    arrived = len(hub.objects)
    push(hub, folder)
    assert published(hub) == content(folder) and commits(hub) == 1
    assert hub.asked_for("PUT") == len(LARGE) - arrived, "what has arrived is not sent twice"


def test_one_broken_connection_of_an_upload_is_retried(hub, folder):
    hub.faults = [Fault("PUT", "cut", at=1000), Fault("PUT", 503)]
    push(hub, folder)
    assert published(hub) == content(folder) and commits(hub) == 1


def test_a_commit_whose_answer_was_lost_is_found_by_its_content(hub, folder):
    said: list[str] = []
    hub.faults = [Fault("/commit/", "lose")]
    done = push(hub, folder, log=said.append)
    assert commits(hub) == 1 and published(hub, done.commit) == content(folder)
    assert any("found by its content" in line for line in said)


def test_a_lost_answer_and_then_no_connection_is_corrected_by_the_next_call(hub, folder):
    push(hub, folder)
    before = next(index for index, request in enumerate(hub.asked) if "/commit/" in request)
    hub.repositories.clear(), hub.objects.clear()
    hub.faults = [Fault("", "", times=before), Fault("/commit/", "lose"), Fault("", "cut", times=FOREVER)]
    with pytest.raises(PushError, match="run the same command again"):
        push(hub, folder)
    assert commits(hub) == 1
    hub.faults = []
    assert push(hub, folder).uploaded == [] and commits(hub) == 1


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub, folder):
    push(hub, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Better\n")
    hub.faults = [Fault("/commit/", "lose")]
    first = push(hub, folder, create_pr=True)
    second = push(hub, folder, create_pr=True)
    refs = hub.repositories[REPO].refs
    assert [ref for ref in refs if ref.startswith("refs/pr/")] == ["refs/pr/1"]
    assert second.uploaded == [] and first.uploaded == ["README.md"]
    assert first.url == second.url == f"{hub.address}/{REPO}/discussions/1" and first.commit == refs["refs/pr/1"]
    assert published(hub, "refs/pr/1") == content(folder) != published(hub)


@pytest.mark.slow
def test_a_killed_push_is_finished_by_the_next(hub, folder, tmp_path):
    hub.faults = [Fault(f"PUT /lfs/{'.' * 64}", "", times=1), Fault("PUT", "hang")]
    script = "import sys; from pathlib import Path; from huggingface_hub import HfApi; from sailvit.hub.push import *"
    script += "; publish(Target(HfApi(), sys.argv[2]), Path(sys.argv[1]))"
    settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    running = subprocess.Popen(
        [sys.executable, "-c", script, folder, REPO], env={**os.environ, **settings, "HF_HUB_DISABLE_XET": "1"}
    )
    try:
        assert hub.reached.wait(60)
    finally:
        running.kill()
        running.wait()
    assert published(hub) == {} and commits(hub) == 0
    push(hub, folder)
    assert published(hub) == content(folder) and commits(hub) == 1


@pytest.mark.parametrize("at", [0, 12_345, 299_999])
def test_a_byte_flipped_in_transit_is_an_error_and_corrected_by_the_next_call(hub, folder, at):
    hub.faults = [Fault("PUT", "flip", at=at)]
    with pytest.raises(VerificationError, match=r"model-0000\d-of-00002.safetensors differs from the local file"):
        push(hub, folder, tag="v1")
    assert published(hub) != content(folder) and hub.repositories[REPO].tags == {}
    done = push(hub, folder, tag="v1")
    assert published(hub) == content(folder) and hub.repositories[REPO].tags == {"v1": done.commit}


def test_a_file_that_changes_during_the_push_is_an_error(hub, folder, monkeypatch):
    create = HfApi.create_commit

    def late(self, repo, operations, **options):
        (folder / "config.json").write_text("{}")
        return create(self, repo, operations, **options)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(VerificationError, match=r"config\.json differs from the local file"):
        push(hub, folder)


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, folder, monkeypatch):
    create = HfApi.create_commit

    def late(self, repo, operations, **options):
        hub.repositories[REPO].add("main", Commit({"README.md": b"theirs"}))
        return create(self, repo, operations, **options)

    with monkeypatch.context() as patched:
        patched.setattr(HfApi, "create_commit", late)
        with pytest.raises(PushError, match="it was changed meanwhile: run the same command again"):
            push(hub, folder)
    assert published(hub) == {"README.md": b"theirs"}
    push(hub, folder)
    assert published(hub) == content(folder)


@pytest.mark.parametrize(
    ("request_", "status", "code", "message"),
    [
        ("whoami", 401, "", "the Hub does not accept the token: `hf auth login`"),
        ("whoami", 403, "", "the token may not write there"),
        ("/commit/", 401, "", "the Hub does not accept the token"),
        ("/commit/", 403, "", "the token may not write there: take one with write access"),
        ("/preupload/", 403, "", "the token may not write there"),
        ("/commit/", 409, "", "another change is being made there: run the same command again"),
        ("/commit/", 412, "", "it was changed meanwhile: run the same command again"),
        ("PUT", 413, "", "smaller --max-shard-size"),
        ("/commit/", 429, "", "too many requests: wait"),
        ("/commit/", 500, "", "the Hub has a fault (500): wait"),
        ("PUT", 503, "", "the Hub has a fault (503): wait"),
        ("/commit/", 400, "", "the Hub refuses it (400): no"),
        ("GET /api/models", 404, "RepoNotFound", "no such repository, or one that the token may not see"),
        ("/tree/main|/revision/main", 404, "RevisionNotFound", "there is no branch 'main'"),
    ],
)
def test_an_error_of_the_hub_is_one_line_and_the_second_try_succeeds(hub, folder, request_, status, code, message):
    hub.faults = [Fault(request_, status, times=FOREVER, message="no", code=code)]
    with pytest.raises(PushError) as raised:
        push(hub, folder)
    line = str(raised.value)
    assert line.startswith(f"{REPO}: ") and message in line and "\n" not in line
    assert commits(hub) == 0
    hub.faults = []
    push(hub, folder)
    assert published(hub) == content(folder) and commits(hub) == 1


def test_a_token_that_only_reads_may_open_a_pull_request(hub, folder):
    push(hub, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Better\n")
    hub.role = "read"
    with pytest.raises(PushError, match="may not write there"):
        push(hub, folder)
    assert push(hub, folder, create_pr=True).url.endswith("/discussions/1")
    assert published(hub, "refs/pr/1") == content(folder)


def test_a_pull_request_needs_a_repository(hub, folder):
    with pytest.raises(PushError, match="no such repository"):
        push(hub, folder, create_pr=True)
    assert hub.repositories == {}


def test_branch_and_tag_are_where_the_commit_is(hub, folder):
    done = push(hub, folder, branch="stage-3", tag="v1.0")
    repository = hub.repositories[REPO]
    assert repository.refs["stage-3"] == repository.tags["v1.0"] == done.commit
    assert published(hub) == {} and published(hub, "stage-3") == content(folder)


def test_a_tag_on_other_content_is_refused_before_any_upload(hub, folder):
    push(hub, folder, tag="v1")
    (folder / LARGE[0]).write_bytes(b"other")
    hub.asked.clear()
    with pytest.raises(PushError, match="the tag v1 is on other content: choose another --tag"):
        push(hub, folder, tag="v1")
    assert not hub.asked_for("PUT|/commit/")


def test_a_private_push_never_goes_to_a_public_repository(hub, folder):
    push(hub, folder, private=True)
    assert hub.repositories[REPO].private
    hub.repositories[REPO].private = False
    (folder / LARGE[0]).write_bytes(b"secret")
    with pytest.raises(PushError, match="it is public: make it private in its settings"):
        push(hub, folder, private=True)
    assert b"secret" not in published(hub).values()


@pytest.mark.parametrize("options", [{"branch": "b"}, {"tag": "v1"}, {"private": True}])
def test_options_that_exclude_a_pull_request_are_refused(hub, folder, options):
    with pytest.raises(PushError, match="--create-pr goes with neither"):
        push(hub, folder, create_pr=True, **options)


@pytest.mark.parametrize("repo", ["tower", "a/b/c", "a/", "../x", "https://x/a/b"])
def test_an_invalid_repository_name_is_refused(hub, folder, repo):
    with pytest.raises(PushError):
        push(hub, folder, repo)
    assert hub.repositories == {}


@pytest.mark.parametrize("status", [400, 403, 500])
def test_a_token_is_never_printed(hub, folder, status, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    other = "hf_" + "x" * 30
    hub.faults = [Fault("/commit/|PUT", status, times=FOREVER, message=f"bad {TOKEN} and {other}")]
    with pytest.raises(PushError) as raised:
        push(hub, folder)
    assert raised.value.__cause__ is None and raised.value.__suppress_context__
    for text in (str(raised.value), *capfd.readouterr(), *(r.getMessage() for r in caplog.records if "hub." in r.name)):
        assert TOKEN not in text and other not in text


def test_a_missing_login_is_reported(hub, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PushError, match="not logged in: `hf auth login`"):
        push(hub, folder, token=None)


def test_offline_mode_is_reported(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    getattr(huggingface_hub, "configure_http_backend", lambda: None)()
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set: unset it"):
        push(hub, folder)


def test_an_unreachable_hub_is_one_line(folder):
    with pytest.raises(PushError, match="the connection broke"):
        publish(Target(HfApi(endpoint="http://127.0.0.1:9", token=TOKEN), REPO), folder)


def test_an_empty_folder_is_refused(hub, tmp_path):
    with pytest.raises(PushError, match="nothing in it is published"):
        push(hub, tmp_path)


DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[2], revision=sys.argv[1], local_dir="download")
torch.save(output.last_hidden_state, "tokens.pt")
assert not any(name.split(".")[0] == "sailvit" for name in sys.modules)
"""


@pytest.mark.slow
def test_a_conversion_is_published_and_the_usage_of_its_card_runs_elsewhere(hub, tmp_path):
    """With all checks; in a clean process and cache the files are byte-identical, and the tokens bit-identical."""
    folder, said = tmp_path / "tower", []
    convert_checkpoint(make_checkpoint(tmp_path / "apple"), folder)
    api = HfApi(endpoint=hub.address, token=TOKEN)
    done = push_folder(folder, REPO, tag="v1", revision_note="a note", api=api, log=said.append)
    assert "all checks before publishing passed" in said and commits(hub) == 1
    card = (folder / "README.md").read_text()
    script = card.split("```python\n")[1].split("```")[0].replace("image.jpg", str(PHOTOGRAPH))
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    run = [sys.executable, "-c", script + DOWNLOAD, done.commit, REPO]
    loaded = subprocess.run(run, env={**os.environ, **settings}, cwd=tmp_path, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert all((tmp_path / "download" / name).read_bytes() == data for name, data in content(folder).items())
    pixels = SAILViTImageProcessor.from_pretrained(folder)(PHOTOGRAPH, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        tokens = SAILViTModel.from_pretrained(folder).eval()(pixels).last_hidden_state
    assert torch.equal(torch.load(tmp_path / "tokens.pt"), tokens)


def test_a_folder_with_problems_is_not_published(hub, tmp_path, monkeypatch):
    folder = tmp_path / "tower"
    convert_checkpoint(make_checkpoint(tmp_path / "apple"), folder, verify=False)
    monkeypatch.setattr("sailvit.hub.checks._load_problems", lambda *arguments: [])
    with pytest.raises(
        PublishError, match=r"tower: not published: provenance\.json: this conversion was not verified"
    ) as raised:
        push_folder(folder, REPO, api=HfApi(endpoint=hub.address, token=TOKEN))
    assert len(raised.value.problems) == 1 and hub.repositories == {}


def test_the_command_lists_every_problem_and_publishes_nothing(hub, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tower"
    convert_checkpoint(make_checkpoint(tmp_path / "apple"), folder)
    (folder / "notes.txt").write_text("to do")
    (folder / "optimizer.pt").write_bytes(b"")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("sailvit.hub.checks._load_problems", lambda *arguments: [])
    assert sailvit_cli.main(["push", str(folder), REPO]) == 2
    said = capsys.readouterr()
    assert "stray        notes.txt: not a file of a published model" in said.out and "optimizer.pt" in said.out
    assert said.err.startswith(f"sailvit push: {folder}: not published: ") and said.err.count("\n") == 1
    assert hub.repositories == {}
    for name in ("notes.txt", "optimizer.pt"):
        (folder / name).unlink()
    assert sailvit_cli.main(["push", str(folder), REPO, "--branch", "next", "--revision-note", "a note"]) == 0
    assert hub.repositories[REPO].commits[hub.repositories[REPO].refs["next"]].body == "a note"
    assert "deleted: 0; every hash matches the folder's" in capsys.readouterr().out


def test_text_written_on_the_hub_stays_in_the_card(hub, folder, monkeypatch):
    monkeypatch.setattr("sailvit.hub.push.check_before_publish", lambda *arguments, **options: [])
    api = HfApi(endpoint=hub.address, token=TOKEN)
    (folder / "README.md").unlink()
    first = push_folder(folder, REPO, api=api)
    repository = hub.repositories[REPO]
    before = repository.commits[first.commit]
    card = before.files["README.md"] + b"\nWritten on the Hub.\n"
    repository.add("main", Commit({**before.files, "README.md": card}, large=before.large))
    assert push_folder(folder, REPO, api=api).uploaded == []
    (folder / LARGE[0]).write_bytes(b"other")
    assert push_folder(folder, REPO, api=api).uploaded == [LARGE[0]]
    assert published(hub)["README.md"].decode().endswith(f"{MARK}\n\nWritten on the Hub.\n")


def test_a_card_on_the_hub_that_cannot_be_read_is_one_line_and_nothing_is_uploaded(hub, folder, monkeypatch):
    monkeypatch.setattr("sailvit.hub.push.check_before_publish", lambda *arguments, **options: [])
    push(hub, folder)
    hub.faults = [Fault("/resolve/", 503, times=FOREVER)]
    with pytest.raises(PushError, match=r"the Hub has a fault \(503\): wait some minutes"):
        push_folder(folder, REPO, tag="v1", api=HfApi(endpoint=hub.address, token=TOKEN))
    assert commits(hub) == 1


def test_importing_it_imports_neither_torch_nor_transformers():
    script = """
import importlib.util, sys
sys.modules["sailvit"] = importlib.util.module_from_spec(importlib.util.find_spec("sailvit"))
import sailvit.hub
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
