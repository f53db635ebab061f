"""Killed processes and full disks: features go on from the cache, and outputs are complete or not there."""

import errno
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_images import write_digits, write_dinov2

import sailvit_cli
from sailvit.evaluate import pages
from sailvit.evaluate.datasets import load_images
from sailvit.evaluate.encoders import load_encoder
from sailvit.evaluate.probe import features as features_module
from sailvit.evaluate.probe.features import compute_features, extract_features, read_features
from sailvit.evaluate.report.page import write_report
from sailvit.evaluate.show import write_outputs


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    return write_dinov2(tmp_path_factory.mktemp("models") / "dinov2")


# Killed processes


def die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_then_die(tensors: object, file: Path, metadata: object) -> None:
    Path(file).write_bytes(b"half")
    die()


def after(count: int, function: Callable, then: Callable) -> Callable:
    """Return a function that is called so many times before another one takes its place."""
    calls = iter(range(count))
    return lambda *args, **kwargs: (then if next(calls, None) is None else function)(*args, **kwargs)


def die_after(function: Callable) -> Callable:
    def call(*args: object, **kwargs: object) -> None:
        function(*args, **kwargs)
        die()

    return call


# Where the child kills itself: module or class, function, and what takes its place.
MOMENTS = (
    (features_module, "decode", lambda found: die),
    (features_module, "save_file", lambda found: after(2, found, half_then_die)),
    (os, "fsync", lambda found: after(3, found, die)),  # the chunk is written, but may not be on the disk
    (Path, "replace", lambda found: after(8, found, die)),  # it has no name yet
    (Path, "replace", lambda found: after(8, found, die_after(found))),
    (features_module, "decode", lambda found: after(6, found, die)),  # some images of a chunk are read
)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_extraction_goes_on_from_the_cache(digits, dinov2, tmp_path, monkeypatch):
    """A process is killed at several moments, one after the other on one cache; the features are those of one run."""
    monkeypatch.setattr(features_module, "CHUNK", 4)
    monkeypatch.setattr(features_module, "SETTLED_SECONDS", -1)
    encoder, images = load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False)
    whole = compute_features(encoder, images)

    def extract_until(owner: object, name: str, wrap: Callable) -> None:
        torch.set_num_threads(1)  # threads of the parent do not exist after a fork
        setattr(owner, name, wrap(getattr(owner, name)))
        extract_features(encoder, images, tmp_path)

    left = []
    for owner, name, wrap in MOMENTS:
        child = multiprocessing.get_context("fork").Process(target=extract_until, args=(owner, name, wrap))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        left.append(len([*tmp_path.rglob("*.safetensors")]))
    assert left == sorted(left) and left[0] == 0 and left[-1] < 15 and len({*left}) >= 5
    extract_features(encoder, images, tmp_path)
    found = read_features(encoder, images, tmp_path)
    assert torch.equal(found.layer(0), whole.layer(0)) and found.content == whole.content
    assert len([*tmp_path.rglob("*.safetensors")]) == 15


def test_what_killed_processes_left_half_written_is_removed_later(digits, dinov2, tmp_path):
    encoder, images = load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False)
    extract_features(encoder, images, tmp_path)
    (chunk,) = tmp_path.rglob("*.safetensors")
    (tmp_path / "images" / "ab").mkdir(parents=True, exist_ok=True)
    rest = [chunk.with_name(".a.part"), tmp_path / "images" / "ab" / ".b.part"]
    for file in rest:
        file.write_bytes(b"half")
    extract_features(encoder, images, tmp_path)
    assert all(file.exists() for file in rest)  # another process may be writing them
    for file in rest:
        os.utime(file, (0, 0))
    extract_features(encoder, images, tmp_path)
    assert not any(file.exists() for file in rest) and chunk.exists()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_reader_is_one_line(digits, dinov2, tmp_path, monkeypatch):
    encoder, images = load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False)
    monkeypatch.setattr(features_module, "decode", die)
    with pytest.raises(OSError, match=r"a process that reads images ended: DataLoader worker .*: give fewer --workers"):
        extract_features(encoder, images, tmp_path, workers=1)


# Full disks


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let this process write no file larger than so many bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_probe_on_a_full_disk_writes_nothing_and_is_one_line(digits, dinov2, tmp_path, capsys):
    words = ["probe", dinov2, "--data", digits / "train", "--test", digits / "test", "--head", "knn", "--device", "cpu"]
    words = [str(word) for word in (*words, "--out", tmp_path / "new" / "out", "--no-cache")]
    capsys.readouterr()
    with largest_file(10_000):  # results.png is larger
        assert sailvit_cli.main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "out: File too large: free space; nothing was left there" in error[0]
    assert not [*tmp_path.iterdir()]


@pytest.fixture
def full_after(monkeypatch) -> Callable[[int], None]:
    """Let the disk be full after so many files of an output."""

    def full_disk(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda files: monkeypatch.setattr(pages, "_write", after(files, pages._write, full_disk))


def test_a_report_on_a_full_disk_leaves_both_files_as_they_were(tmp_path, monkeypatch, full_after):
    for name in ("page", "as_markdown"):
        monkeypatch.setitem(write_report.__globals__, name, lambda report, command: "content")
    out = tmp_path / "r.html"
    out.write_text("of yesterday")
    full_after(1)
    with pytest.raises(OSError, match=r"r.md: cannot be written: No space left on device: free space, or name another"):
        write_report(None, out, overwrite=True)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("r.html", "of yesterday")]


@pytest.mark.parametrize("files", [0, 1, 2])
def test_a_shown_image_on_a_full_disk_leaves_nothing(files, tmp_path, full_after):
    pngs = {name: Image.new("RGB", (8, 8)) for name in ("picture", "components")}
    full_after(files)
    with pytest.raises(OSError, match="cannot be written: No space left on device: free space, or name another"):
        write_outputs("<html>", tmp_path / "photo.html", pngs, tmp_path / "drawn")
    assert not [*tmp_path.iterdir()]


def test_a_memo_on_a_full_disk_leaves_no_part(digits, dinov2, tmp_path, monkeypatch):
    encoder, images = load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False)

    def fill(path: Path, text: str) -> None:
        path.write_bytes(text[:3].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(OSError, match="the cache cannot be written: No space left on device: give another --cache-dir"):
        extract_features(encoder, images, tmp_path)
    assert not [*tmp_path.rglob("*.part")]


def test_the_disk_has_to_hold_the_features_of_all_processes(digits, dinov2, tmp_path, monkeypatch):
    encoder, images = load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False)
    monkeypatch.setattr(features_module, "CHUNK", 16)
    usage = features_module.shutil._ntuple_diskusage(10**9, 0, 60 * 32 * 4 - 1)
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="features of 60 images"):
        extract_features(encoder, images, tmp_path, rank=0, ranks=4)
