"""Reading, validating and writing weight files, compared with safetensors and torch."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_SHAPE, make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from sailvit.convert.models.aimv2_config import find_aimv2
from sailvit.convert.models.aimv2_names import LAYOUTS
from sailvit.convert.models.name_tables import tensor_specs
from sailvit.convert.storage.checkpoint import FileCheckpoint
from sailvit.convert.storage.errors import CheckpointError
from sailvit.convert.storage.files import read_index
from sailvit.convert.storage.output_folder import new_folder
from sailvit.convert.storage.safetensors_io import LONGEST_HEADER, read_safetensors, write_weights
from sailvit.convert.storage.sources import find_source
from sailvit.convert.storage.tensors import TORCH_DTYPES, NewTensor, is_finite, to_bytes
from sailvit.convert.storage.torch_pickle import read_pickle


def bytes_of(stored) -> bytes:
    return b"".join(chunk.tobytes() for chunk in stored.chunks())


def assert_reads(path: Path, read, tensors: dict[str, torch.Tensor]) -> None:
    found = read(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == TORCH_DTYPES[str(tensor.dtype)[6:]] and found[name].shape == tuple(tensor.shape)
        assert bytes_of(found[name]) == to_bytes(tensor).tobytes()


def assorted_tensors() -> dict[str, torch.Tensor]:
    random = torch.randn(5, 7, 3)
    tensors = {
        f"floats.{name}": random.to(getattr(torch, name)) for name in ("float64", "float32", "float16", "bfloat16")
    }
    tensors |= {
        f"whole.{name}": (random * 9).abs().to(getattr(torch, name)) for name in ("int64", "int8", "uint8", "bool")
    }
    return {**tensors, "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "large": torch.randn(700_001)}


# Reading


def test_safetensors_reads_equal_the_library(tmp_path):
    tensors = assorted_tensors()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert_reads(tmp_path / "a.safetensors", read_safetensors, tensors)


def test_pickle_reads_equal_torch_load(tmp_path):
    tensors = assorted_tensors()
    base = torch.randn(4, 6)
    tensors |= {"transposed": base.t(), "part": base[1:3, ::2], "shared": base, "parameter": torch.nn.Parameter(base)}
    torch.save(tensors, tmp_path / "a.pt")
    assert_reads(tmp_path / "a.pt", read_pickle, tensors)


@pytest.mark.parametrize("trust", [False, True])
def test_a_file_of_torch_before_1_6_is_refused_by_name(tmp_path, trust):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"a\.pt: .*torch before 1\.6: load and save it with torch>=1\.6"):
        read_pickle(tmp_path / "a.pt", trust)


def test_a_training_checkpoint_is_flattened(tmp_path):
    state = {
        "epoch": 3,
        "model": {"a": torch.ones(2)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "groups": []},
    }
    torch.save(state, tmp_path / "a.pt")
    assert set(read_pickle(tmp_path / "a.pt")) == {"model.a", "optimizer.state.0.exp_avg"}


@pytest.mark.parametrize(("start", "stop"), [(0, None), (3, 5), (1, 699_999), (262_144, 262_145), (9, 9)])
def test_a_slice_of_a_tensor_is_read(tmp_path, start, stop):
    tensor = torch.randn(700_000)
    save_file({"before": torch.ones(3), "t": tensor}, tmp_path / "a.safetensors")
    torch.save({"t": tensor}, tmp_path / "a.bin")
    for stored in (read_safetensors(tmp_path / "a.safetensors")["t"], read_pickle(tmp_path / "a.bin")["t"]):
        part = b"".join(chunk.tobytes() for chunk in stored.chunks(start, stop))
        assert part == tensor[start:stop].numpy().tobytes()


class Code:
    def __reduce__(self):
        return os.system, ("touch opened",)


def test_a_pickle_with_code_raises_unless_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "code": Code()}, "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: opening it could run code.*--trust-pickle"):
        read_pickle(Path("a.pt"))
    assert not Path("opened").exists()
    assert set(read_pickle(Path("a.pt"), trust=True)) == {"a"}  # skipped, not run
    assert not Path("opened").exists()


def test_names_and_values_of_a_pickle_are_read_without_torch(tmp_path):
    torch.save({"model": {"a": torch.arange(4.0), "b": torch.ones(2, 3).t()}}, tmp_path / "a.bin")
    script = f"""
import importlib.util, pathlib, sys
sys.modules["sailvit"] = importlib.util.module_from_spec(importlib.util.find_spec("sailvit"))
from sailvit.convert.storage.torch_pickle import read_pickle
tensors = read_pickle(pathlib.Path({str(tmp_path / "a.bin")!r}))
assert tensors.keys() == {{"model.a", "model.b"}} and sum(map(len, tensors["model.a"].chunks())) == 16
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_tensor_is_found_behind_a_local_header_of_another_length(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for member in old.infolist():
            content, member.extra = old.read(member), b"\x99\x99\x08\x00" + b"x" * 8
            new.writestr(member, content)
    (stored,) = read_pickle(tmp_path / "b.pt").values()
    assert b"".join(map(bytes, stored.chunks())) == torch.arange(4.0).numpy().tobytes()
    content = (tmp_path / "b.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "b.pt") as archive:
        start = next(info.header_offset for info in archive.infolist() if info.filename.endswith("data/0"))
    (tmp_path / "c.pt").write_bytes(content[:start] + b"XX" + content[start + 2 :])
    with pytest.raises(CheckpointError, match=r"c\.pt: .*data/0 is truncated"):
        read_pickle(tmp_path / "c.pt")


def test_harmless_objects_are_skipped_and_tensors_with_a_conjugate_bit_are_refused(tmp_path):
    harmless = {"counts": Counter("aab"), "bytes": bytearray(b"x"), "number": 1j, "layout": torch.strided}
    torch.save({"a": torch.ones(2), **harmless}, tmp_path / "a.pt")
    assert set(read_pickle(tmp_path / "a.pt")) == {"a"}
    torch.save({"a": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"b\.pt: .*conj.*not supported"):
        read_pickle(tmp_path / "b.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a pickle", pickle.dumps({"a": 1}), b"\x80\x02}q\x00."])
def test_a_file_not_written_by_torch_save_raises(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        read_pickle(tmp_path / "a.bin")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_pickle_raises(tmp_path, share):
    torch.save(assorted_tensors(), tmp_path / "a.bin")
    content = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"a\.bin: not a file of torch\.save"):
        read_pickle(tmp_path / "a.bin")


# The header of safetensors


def write_raw(path: Path, header: object, data: bytes = b"", claimed: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BROKEN = {
    "claims 2 GB": (b"{}", b"", 2 << 30, "cut short"),
    "claims all there is": (b"{}", b"", (1 << 64) - 1, "cut short"),
    "no JSON": (b"{nope}", b"", None, "the header cannot be read"),
    "no text": (b'{"\xff": 1}', b"", None, "the header cannot be read"),
    "half a character": (
        b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b"1234",
        None,
        "cannot be read",
    ),
    "endless digits": (b'{"a": ' + b"9" * 5000 + b"}", b"", None, "the header cannot be read"),
    "deep": (b'{"a":' * 100_000, b"", None, "the header cannot be read"),
    "a list": (b"[]", b"", None, "not a JSON object"),
    "twice": (
        b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}",
        b"1234",
        None,
        "twice",
    ),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234", None, "expected dtype, shape"),
    "no such dtype": ({"a": entry("F33")}, b"1234", None, "'F33' is not known"),
    "negative": ({"a": entry(shape=(-1,))}, b"1234", None, "not a list of whole numbers"),
    "too large for its shape": ({"a": entry(shape=(2,))}, b"1234", None, "do not hold"),
    "overflowing": ({"a": entry(shape=(1 << 62, 1 << 62))}, b"1234", None, "do not hold"),
    "overlapping": ({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456", None, "overlaps"),
    "the same bytes": ({"a": entry(), "b": entry()}, b"1234", None, "overlaps"),
    "a hole": ({"a": entry(offsets=(4, 8))}, b"12345678", None, "leaves a hole"),
    "cut": ({"a": entry()}, b"123", None, "cut short"),
    "too long": ({"a": entry()}, b"12345", None, "longer than its header"),
    "odd metadata": ({"__metadata__": {"a": 1}, "a": entry()}, b"1234", None, "__metadata__"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_headers_raise(tmp_path, kind):
    header, data, claimed, message = BROKEN[kind]
    path = write_raw(tmp_path / "a.safetensors", header, data, claimed)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_header_above_the_size_limit_raises_without_reading_it(tmp_path):
    path = write_raw(tmp_path / "a.safetensors", b"{}", claimed=LONGEST_HEADER + 1)
    os.truncate(path, LONGEST_HEADER + 100)
    with pytest.raises(CheckpointError, match="is the most there can be"):
        read_safetensors(path)


def test_a_file_truncated_anywhere_raises(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            read_safetensors(tmp_path / "cut.safetensors")


def accepted_by_the_library(path: Path) -> bool:
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_slice(name).get_shape()
    except (SafetensorError, OSError):
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_files_that_are_accepted_are_accepted_by_the_library(tmp_path_factory, data):
    """Files with random changes: accepted only if the library accepts them, and no unexpected errors."""
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    save_file({"a": torch.ones(3), "b.c": torch.ones(2, 2, dtype=torch.bfloat16)}, path, metadata={"format": "pt"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if change == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "insert":
            content[at:at] = data.draw(st.binary(max_size=4))
        else:
            del content[at : at + data.draw(st.integers(1, 9))]
    path.write_bytes(content or b"\0")
    try:
        found = read_safetensors(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    assert accepted_by_the_library(path)
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(found)
        assert all(tuple(file.get_slice(name).get_shape()) == found[name].shape for name in found)


names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(names, st.lists(st.integers(0, 3), max_size=3), max_size=5))
def test_files_written_by_the_library_are_read(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("written") / "a.safetensors"
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path)
    assert {name: list(stored.shape) for name, stored in read_safetensors(path).items()} == shapes


# Shards


def test_only_shards_with_vision_tensors_are_opened(tmp_path):
    source = make_checkpoint(tmp_path / "m", "ovis2", max_shard_size="100KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    tower_files = set(index["weight_map"].values())
    index["weight_map"] |= {"llm.model.norm.weight": "llm-1.safetensors", "llm.lm_head.weight": "llm-2.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "llm-1.safetensors").write_bytes(b"garbage")  # the second one is missing
    checkpoint = FileCheckpoint(*find_source(str(source)))
    tower = find_aimv2(checkpoint)
    assert not tower.problems and set(checkpoint.opened) == tower_files and len(tower_files) > 2
    assert tower.match.others == {"llm": 2}


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "a/../../b", "..\\a", "C:a", ""])
def test_an_index_pointing_outside_its_folder_raises(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="is outside its folder"):
        read_index(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": {"a": 1}}', "{", '{"weight_map": []}', "[" * 99999, "\xff"]
)
def test_an_invalid_index_raises(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        read_index(tmp_path / "model.safetensors.index.json")


def test_sharded_pickles_are_read(tmp_path):
    tensors = {piece.name: torch.randn(piece.shape) for piece in tensor_specs(LAYOUTS["timm"], TINY_SHAPE)}
    halves = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    for number, half in enumerate(halves):
        torch.save(half, tmp_path / f"pytorch_model-{number}.bin")
    weight_map = {name: f"pytorch_model-{number}.bin" for number, half in enumerate(halves) for name in half}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = FileCheckpoint(*find_source(str(tmp_path)))
    assert {name: bytes_of(checkpoint[name]) for name in tensors} == {
        name: to_bytes(tensor).tobytes() for name, tensor in tensors.items()
    }


# Numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=60, deadline=None)
@given(bits=st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=9))
def test_is_finite_equals_torch(dtype, bits):
    numbers = torch.from_numpy(np.array(bits, np.uint64).view(np.uint8)).view(dtype)
    assert is_finite(to_bytes(numbers), TORCH_DTYPES[str(dtype)[6:]]) == bool(torch.isfinite(numbers).all())


# Writing


def new_tensors(tensors: dict[str, torch.Tensor]) -> list[NewTensor]:
    return [
        NewTensor(
            name,
            TORCH_DTYPES[str(tensor.dtype)[6:]],
            tuple(tensor.shape),
            lambda tensor=tensor: iter([to_bytes(tensor)]),
        )
        for name, tensor in tensors.items()
    ]


def test_written_files_are_read_by_the_library(tmp_path):
    import hashlib

    tensors, progress = assorted_tensors(), []
    digests = write_weights(tmp_path, new_tensors(tensors), "5GB", progress.append)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
        assert digests[name] == hashlib.sha256(to_bytes(tensor)).hexdigest()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sum(progress) == sum(tensor.nbytes for tensor in tensors.values())


def test_shards_equal_those_of_huggingface_hub(tmp_path):
    from huggingface_hub import save_torch_state_dict

    tensors = {f"blocks.{number}.weight": torch.full((number + 1, 25), float(number)) for number in range(20)}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    save_torch_state_dict(tensors, tmp_path / "theirs", max_shard_size="3KB")
    write_weights(tmp_path / "ours", new_tensors(tensors), "3KB", lambda written: None)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(
        path.name for path in (tmp_path / "theirs").iterdir()
    )
    index = "model.safetensors.index.json"
    ours, theirs = (json.loads((tmp_path / side / index).read_text()) for side in ("ours", "theirs"))
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    for path in (tmp_path / "ours").glob("*.safetensors"):
        assert set(load_file(path)) == {name for name, file in ours["weight_map"].items() if file == path.name}


@pytest.mark.parametrize("size", ["", "5XB", "GB", "-1"])
def test_sizes_are_parsed(tmp_path, size):
    tensors = new_tensors({"a": torch.ones(9)})
    with pytest.raises(CheckpointError, match="--max-shard-size"):
        write_weights(tmp_path, tensors, size, lambda written: None)


def test_a_folder_is_written_atomically(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(ZeroDivisionError), new_folder(out) as part:
        (part / "a").write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_folder(out) as part:
        (part / "a").write_text("whole")
        assert not out.exists()
    assert (out / "a").read_text() == "whole" and [path.name for path in out.parent.iterdir()] == ["out"]


def test_only_a_converted_folder_is_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for overwrite, message in [(False, "give --overwrite"), (True, "remove it yourself")]:
        with pytest.raises(CheckpointError, match=message), new_folder(out, overwrite):
            pass
    (out / "provenance.json").write_text("{}")
    with new_folder(out, overwrite=True) as part:
        (part / "b").write_text("new")
        assert (out / "thesis.tex").exists()
    assert [path.name for path in out.iterdir()] == ["b"] and len(list(tmp_path.iterdir())) == 1


def test_two_writers_of_one_folder_are_serialized(tmp_path):
    with new_folder(tmp_path / "out") as part:
        with pytest.raises(CheckpointError, match="another process is writing"), new_folder(tmp_path / "out"):
            pass
        (part / "a").write_text("first")
    assert (tmp_path / "out" / "a").exists()


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".out.part" / "deep").mkdir(parents=True)
    (tmp_path / ".out.part" / "model.safetensors").write_text("half")
    (tmp_path / ".out.lock").touch()
    with new_folder(tmp_path / "out") as part:
        assert not list(part.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
