"""benchmarks/gpu.py: its JSON, what it does without a GPU and after an error; at toy size its figures."""

import json

import gpu
import pytest
import torch


def test_without_a_gpu_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "gpu.json").exists()


def test_a_part_that_fails_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"

    def check_written(bench):
        return {"parts before": [*json.loads(out.read_text())["parts"]]}

    parts = {"first": lambda bench: {"x": 1}, "broken": lambda bench: 1 / 0, "last": check_written}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main(["--out", str(out), "--toy"]) == 0
    report = json.loads(out.read_text())
    assert report["parts"]["first"]["x"] == 1
    assert report["parts"]["broken"]["error"] == "ZeroDivisionError: division by zero"
    assert report["parts"]["last"]["parts before"] == ["first", "broken"]
    assert report["torch"] == torch.__version__ and {"card", "transformers", "date", "command"} <= {*report}


def test_no_part_begins_after_the_time(tmp_path):
    assert gpu.main(["--out", str(tmp_path / "gpu.json"), "--toy", "--minutes", "0"]) == 0
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {*parts} == {*gpu.PARTS} and all(part == {"skipped": "0 minutes were over"} for part in parts.values())


@pytest.mark.nightly
def test_all_parts_run_at_toy_size(tmp_path):
    names = [name for name in gpu.PARTS if "flash" not in name and name not in ("memory", "encoder compiled")]
    assert gpu.main([*names, "--out", str(tmp_path / "gpu.json"), "--toy", "--minutes", "60"]) == 0
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert not [part for part in parts.values() if {"error", "skipped"} & {*part}]
    for stage in ("stage2", "stage3"):
        packed = parts[f"train {stage}, sdpa"]
        assert 0 < packed["MFU"] < packed["HFU"]
        assert parts[f"padded {stage}"]["packed / padded, samples/s"] > 0
