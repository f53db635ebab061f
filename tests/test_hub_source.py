"""Converting models on the Hub: the real client, against a Hub on this machine."""

import json
from dataclasses import replace

import pytest
from conftest import TINY_SHAPE, make_checkpoint
from fake_hub import COMMIT, put, sailvit, serve, serve_writable


@pytest.fixture
def hub(tmp_path):
    make_checkpoint(tmp_path / "hub" / "apple" / "aimv2-tiny")
    sharded = make_checkpoint(tmp_path / "hub" / "ovis" / "ovis2-tiny", "ovis2", max_shard_size="100KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["llm.lm_head.weight"] = "llm.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    (sharded / "llm.safetensors").write_bytes(b"large")
    with serve(tmp_path / "hub") as server:
        yield server


def test_a_model_on_the_hub_is_converted_at_its_commit_and_then_offline(hub, tmp_path):
    endpoint, _ = hub
    done = sailvit(
        tmp_path, "convert", "apple/aimv2-tiny", "out", "--no-verify", "--revision", "main", endpoint=endpoint
    )
    assert done.returncode == 0, done.stderr
    source = json.loads((tmp_path / "out" / "provenance.json").read_text())["source"]
    assert (source["name"], source["revision"]) == ("apple/aimv2-tiny", COMMIT)
    assert "base_model: apple/aimv2-tiny" in (tmp_path / "out" / "README.md").read_text()
    again = sailvit(tmp_path, "convert", "apple/aimv2-tiny", "again", "--no-verify")
    assert again.returncode == 0, again.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "again" / "provenance.json").read_text())["source"]["revision"] == COMMIT


def test_only_the_shards_that_hold_the_tower_are_downloaded(hub, tmp_path):
    endpoint, asked = hub
    done = sailvit(tmp_path, "convert", "ovis/ovis2-tiny", "out", "--no-verify", endpoint=endpoint)
    assert done.returncode == 0, done.stderr
    assert any("model-00001" in request for request in asked) and not any(
        "llm.safetensors" in request for request in asked
    )


def test_inspect_reads_headers_by_ranges_and_downloads_no_weights(tmp_path):
    folder = make_checkpoint(tmp_path / "model", shape=replace(TINY_SHAPE, hidden_size=512), max_shard_size="5MB")
    with serve_writable() as hub:
        commit = put(hub, "apple/aimv2-large", folder)
        done = sailvit(tmp_path, "inspect", "apple/aimv2-large", "--json", endpoint=hub.address)
        assert done.returncode == 0, done.stdout + done.stderr
        report, here = json.loads(done.stdout), json.loads(sailvit(tmp_path, "inspect", folder, "--json").stdout)
        different = {key for key in report if report[key] != here[key]}
        assert report["revision"] == commit and different == {"source", "revision"}
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 2 and all(path.stat().st_size > 2 << 20 for path in shards[:-1])
        assert all(0 < hub.served[path.name] < 1 << 19 for path in shards)

        content = hub.repositories["apple/aimv2-large"].commits[commit].files
        content[shards[0].name] = content[shards[0].name][:-5]
        cut = sailvit(tmp_path, "inspect", "apple/aimv2-large", endpoint=hub.address)
        assert cut.returncode == 2 and f"{shards[0].name}: cut short" in cut.stdout, cut.stdout + cut.stderr


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("apple/nothing", [], "no such model on the Hub"),
        ("gated/aimv2", [], "access is granted on request"),
        ("apple/aimv2-tiny", ["--revision", "v9"], "no revision 'v9'"),
    ],
)
def test_an_error_of_the_hub_is_one_line(hub, tmp_path, name, options, message):
    endpoint, _ = hub
    for verb in (["convert", name, "out"], ["inspect", name]):
        done = sailvit(tmp_path, *verb, *options, endpoint=endpoint)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"sailvit {verb[0]}: {name}: ") and not (tmp_path / "out").exists()


def test_an_unreachable_hub_is_one_line(tmp_path):
    for endpoint in (None, "http://127.0.0.1:9"):
        done = sailvit(tmp_path, "convert", "apple/aimv2-tiny", "out", endpoint=endpoint)
        assert done.returncode == 2 and "the Hub " in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_revision_of_a_folder_is_refused(tmp_path):
    make_checkpoint(tmp_path / "here", shape=TINY_SHAPE)
    done = sailvit(tmp_path, "inspect", "here", "--revision", "main")
    assert done.returncode == 2 and "--revision is for names on the Hub" in done.stderr
