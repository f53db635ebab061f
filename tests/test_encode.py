"""`sailvit encode` and `sailvit demo --size`, and the streaming of images."""

import fcntl
import gc
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHOTOGRAPH
from fork_server import run_forked
from PIL import Image
from processes import SAILVIT
from random_tower import make_random_tower
from safetensors import safe_open
from safetensors.torch import load_file

import sailvit_cli
from sailvit import SAILViTImageProcessor, SAILViTModel
from sailvit.encode.images import find_images
from sailvit.encode.stream import encode_images


def encode(*arguments: object) -> int:
    return sailvit_cli.main(["encode", *map(str, arguments)])


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Four photos of different shapes in two folders, and a file that is not an image."""
    photograph = Image.open(PHOTOGRAPH)
    (tmp_path / "album" / "sub").mkdir(parents=True)
    for index, size in enumerate([(300, 200), (100, 100), (90, 300), (640, 480)]):
        photograph.resize(size).save(tmp_path / "album" / ("sub" if index % 2 else ".") / f"{index}.png")
    (tmp_path / "album" / "notes.txt").write_text("not an image")
    return tmp_path / "album"


def expected_tokens(folder: Path, image: str | Path, **options) -> torch.Tensor:
    processor = SAILViTImageProcessor.from_pretrained(folder, **options)
    with torch.no_grad():
        return SAILViTModel.from_pretrained(folder).get_image_features(processor(image)["pixel_values"])


def test_encodes_a_photograph_to_safetensors(folder, tmp_path, capsys):
    assert encode(PHOTOGRAPH, "--model", folder, "--out", tmp_path) == 0
    saved = load_file(tmp_path / "raccoon.jpg.safetensors")
    torch.testing.assert_close(saved["tokens"], expected_tokens(folder, PHOTOGRAPH))
    assert saved["tile_grid"].tolist() == [3, 2]
    with safe_open(tmp_path / "raccoon.jpg.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "image": str(PHOTOGRAPH)}
    output = capsys.readouterr()
    assert "(7, 4, 256)" in output.out and "1 encoded, 0 broken" in output.out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encodes_to_npy(folder, tmp_path, dtype):
    assert encode(PHOTOGRAPH, "--model", folder, "--out", tmp_path, "--format", "npy", "--dtype", dtype) == 0
    tokens = np.load(tmp_path / "raccoon.jpg.npy")
    assert tokens.dtype == np.float32
    expected = expected_tokens(folder, PHOTOGRAPH).numpy()
    assert np.linalg.norm(tokens - expected) / np.linalg.norm(expected) < (1e-5 if dtype == "float32" else 0.03)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--no-tile"], {"do_tile": False}),
        (["--max-tiles", "3"], {"max_tiles": 3}),
        (
            ["--image-option", "min_tiles=4", "--image-option", "use_thumbnail=False"],
            {"min_tiles": 4, "use_thumbnail": False},
        ),
        (["--image-option", "resize_backend=pil", "--max-tiles", "2"], {"resize_backend": "pil", "max_tiles": 2}),
        (["--image-option", "image_mean=[0.5, 0.5, 0.5]"], {"image_mean": [0.5, 0.5, 0.5]}),
    ],
)
def test_tiling_options_reach_the_processor(folder, tmp_path, flags, options):
    assert encode(PHOTOGRAPH, "--model", folder, "--out", tmp_path, *flags) == 0
    expected = expected_tokens(folder, PHOTOGRAPH, **options)
    torch.testing.assert_close(load_file(tmp_path / "raccoon.jpg.safetensors")["tokens"], expected)


@pytest.mark.parametrize(
    ("scale", "before", "option"),
    [(1 / 255, [], "do_rescale=False"), (1, ["resize_backend=pil"], "resize_backend=torchvision")],
)
def test_the_option_named_in_an_error_exists(folder, tmp_path, capsys, scale, before, option):
    gray = np.array(Image.open(PHOTOGRAPH).resize((64, 48)).convert("L"), np.float32)
    Image.fromarray(gray * np.float32(scale)).save(tmp_path / "photo.tif")
    arguments = (tmp_path / "photo.tif", "--model", folder, "--out", tmp_path / "out")
    assert encode(*arguments, *(word for option in before for word in ("--image-option", option))) == 2
    error = capsys.readouterr().err
    assert "photo.tif" in error and f"give --image-option {option}" in error
    assert encode(*arguments, "--image-option", option) == 0
    expected = expected_tokens(folder, tmp_path / "photo.tif", **({"do_rescale": False} if not before else {}))
    torch.testing.assert_close(load_file(tmp_path / "out" / "photo.tif.safetensors")["tokens"], expected)


def test_a_file_url_is_encoded_under_the_name_of_the_file(folder, album, tmp_path):
    assert encode((album / "0.png").as_uri(), "--model", folder, "--out", tmp_path / "out") == 0
    tokens = load_file(tmp_path / "out" / "0.png.safetensors")["tokens"]
    torch.testing.assert_close(tokens, expected_tokens(folder, album / "0.png"))


def test_exif_rotation_reaches_the_processor(folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(PHOTOGRAPH).resize((600, 100)).save(tmp_path / "turned.png", exif=exif)
    arguments = (tmp_path / "turned.png", "--model", folder, "--out", tmp_path, "--exif-transpose")
    assert encode(*arguments) == 0
    assert load_file(tmp_path / "turned.png.safetensors")["tile_grid"].tolist() == [1, 6]


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_of_any_size_give_the_same_tokens(folder, album, batch_size, workers):
    model, processor = SAILViTModel.from_pretrained(folder), SAILViTImageProcessor.from_pretrained(folder)
    seen = []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    sources = list(find_images([str(album)]))
    encoded = list(encode_images(sources, model, processor, batch_size, workers))
    assert [image.source for image in encoded] == sources and len(sources) == 4
    assert set(seen[:-1]) <= {batch_size} and seen[-1] <= batch_size
    for image in encoded:
        torch.testing.assert_close(image.tokens, expected_tokens(folder, image.source))


def test_broken_images_are_reported_skipped_and_counted(folder, album, tmp_path, capsys):
    (album / "1broken.png").write_bytes((album / "0.png").read_bytes()[:500])
    (album / "sub" / "empty.jpg").touch()
    assert encode(album, "--model", folder, "--out", tmp_path / "out", "--batch-size", 2) == 2
    output = capsys.readouterr()
    assert "4 encoded, 2 broken, 0 not tried" in output.out
    assert "1broken.png" in output.err and "empty.jpg" in output.err
    written = sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert written == [f"{name}.safetensors" for name in ("0.png", "2.png", "sub/1.png", "sub/3.png")]


def test_strict_stops_at_the_first_broken_image(folder, album, tmp_path, capsys):
    (album / "0broken.png").touch()
    assert encode(album, "--model", folder, "--out", tmp_path / "out", "--strict", "--batch-size", 1) == 2
    assert "1 encoded, 1 broken, 3 not tried" in capsys.readouterr().out
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 1


def test_existing_outputs_raise_are_skipped_or_overwritten(folder, album, tmp_path, capsys):
    out = tmp_path / "out"
    assert encode(album / "0.png", "--model", folder, "--out", out) == 0
    target = out / "0.png.safetensors"
    before = target.stat().st_mtime_ns
    assert encode(album / "0.png", "--model", folder, "--out", out) == 2
    assert "exists: give --overwrite, --resume" in capsys.readouterr().err
    assert encode(album / "0.png", album / "2.png", "--model", folder, "--out", out, "--resume") == 0
    assert "1 encoded, 0 broken, 0 not tried, 1 encoded already" in capsys.readouterr().out
    assert target.stat().st_mtime_ns == before and (out / "2.png.safetensors").exists()
    assert encode(album / "0.png", "--model", folder, "--out", out, "--overwrite") == 0
    assert target.stat().st_mtime_ns != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jpg"], "'absent.jpg': no such image"),
        (["iVBORw0KGgo" + 100_000 * "A"], "no such image: expected a file, a folder or a URL"),
        (["data:image/png;base64," + 100_000 * "A"], "no such image: expected a file, a folder or a URL"),
        (["{album}/0.png", "--image-option", "max_tile=3"], "did you mean max_tiles?"),
        (["{album}/0.png", "--image-option", "do_rescal=False"], "has no option 'do_rescal'; did you mean do_rescale?"),
        (["{album}/0.png", "--image-option", "device=cpu"], "expected one of do_exif_transpose, do_normalize"),
        (["{album}/0.png", "--image-option", "max_tiles=3", "--max-tiles", "4"], "max_tiles is given twice"),
        (["{album}/0.png", "--image-option", "do_rescale=no"], "do_rescale must be True or False, got 'no'"),
        (
            ["{album}/0.png", "--image-option", "size=57"],
            "expected tiles of 56 x 56 pixels (image_size in config.json), got 57 x 57",
        ),
        (["{album}/0.png", "{album}/copy/0.png"], "would both be written as 0.png"),
        ([""], "no such image"),
        (["{album}/bare"], "no image in this folder"),
        (["{album}/0.png", "--out", "{album}/2.png"], "2.png is a file"),
        (["{album}/0.png", "--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["http://127.0.0.1:9/"], "under the name ''"),
        (["{album}/0.png", "--max-tiles", "5000"], "max_tiles <= 1024"),
        (["{album}/" + "long" * 60 + ".png"], "rename it"),
    ],
)
def test_invalid_input_is_one_line_and_exit_code_2(folder, album, tmp_path, capsys, arguments, message):
    (album / "copy").mkdir()
    (album / "bare").mkdir()
    if "copy" in str(arguments):
        (album / "copy" / "0.png").write_bytes((album / "0.png").read_bytes())
    if "long" in str(arguments):
        (album / ("long" * 60 + ".png")).write_bytes((album / "0.png").read_bytes())
    filled = [argument.format(album=album) for argument in arguments]
    before = (album / "0.png").read_bytes()
    assert encode("--model", folder, "--out", tmp_path / "out", *filled) == 2
    assert (album / "0.png").read_bytes() == before
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and len(error) < 600
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["do_rescal=False", "max_tiles=0", "size=57"])
def test_invalid_image_options_raise_before_the_model_is_loaded(folder, tmp_path, monkeypatch, option):
    monkeypatch.setattr(SAILViTModel, "from_pretrained", lambda *arguments, **options: pytest.fail("loaded"))
    assert encode(PHOTOGRAPH, "--model", folder, "--out", tmp_path, "--image-option", option) == 2


@pytest.mark.parametrize("name", ["nowhere", "./towr", "../towr", "/absent/towr", "a/b/c", "", "long" * 200])
@pytest.mark.parametrize("verb", ["encode", "demo", "convert", "inspect"])
def test_an_invalid_model_name_raises_without_network(tmp_path, capsys, monkeypatch, verb, name):
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: pytest.fail("went online"))
    monkeypatch.chdir(tmp_path)
    arguments = {"encode": [str(PHOTOGRAPH), "--model", name], "demo": ["--model", name], "convert": [name, "out"]}
    assert sailvit_cli.main([verb, *arguments.get(verb, [name])]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and not output.out
    assert "no such file or folder, and no name on the Hub (OWNER/NAME)" in output.err


@pytest.mark.parametrize("workers", [0, 1])
def test_image_warnings_are_one_line_and_do_not_change_the_exit_code(folder, tmp_path, workers):
    dark = (np.random.default_rng(0).random((60, 60)) * 4095).astype(np.uint16)
    Image.fromarray(dark).save(tmp_path / "dark.png")
    arguments = ("encode", "dark.png", "--model", folder, "--workers", workers)
    script = "import sys, sailvit_cli; sys.exit(sailvit_cli.main(sys.argv[1:]))"
    done = run_forked(script, *map(str, arguments), folder=tmp_path)
    assert done.returncode == 0 and "1 encoded, 0 broken" in done.stdout
    assert re.fullmatch(r"warning: dark\.png: no 16-bit sample exceeds \d+: .*\n", done.stderr)


def test_a_path_that_is_not_a_sailvit_raises(folder, tmp_path, capsys):
    assert encode(PHOTOGRAPH, "--model", folder / "model.safetensors", "--out", tmp_path / "out") == 2
    assert "expected a SAILViT folder, got a file" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "truncated")
    weights = (tmp_path / "truncated" / "model.safetensors").read_bytes()
    (tmp_path / "truncated" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert encode(PHOTOGRAPH, "--model", tmp_path / "truncated", "--out", tmp_path / "out") == 2
    assert "truncated: the weights are truncated or corrupt" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert encode(PHOTOGRAPH, "--model", tmp_path / "other", "--out", tmp_path / "out") == 2
    assert "expected model_type 'sailvit', got 'vit'" in capsys.readouterr().err


def bytes_of_live_tiles(side: int) -> int:
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim == 4 and t.shape[-1] == side]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_is_limited_to_a_micro_batch_and_its_images(folder, tmp_path):
    """Images of 65 tiles are encoded four tiles at a time; tiles of finished images are released."""
    model = SAILViTModel.from_pretrained(folder)
    processor = SAILViTImageProcessor.from_pretrained(folder, max_tiles=64, min_tiles=64)
    sources = []
    for index in range(6):
        Image.open(PHOTOGRAPH).resize((64, 64)).save(tmp_path / f"{index}.png")
        sources.append(str(tmp_path / f"{index}.png"))
    alive, peak = [], 0
    model.register_forward_pre_hook(lambda module, arguments: alive.append(len(arguments[0])))
    storage = 65 * 3 * 56 * 56 * 4
    for image in encode_images(sources, model, processor, batch_size=4):
        assert image.tokens.shape == (65, 4, 256)
        peak = max(peak, bytes_of_live_tiles(56))
    assert max(alive) == 4 and peak <= 2.2 * storage


def run_command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [*SAILVIT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=500)


@pytest.mark.slow
def test_ctrl_c_prints_one_line_and_leaves_no_partial_file(folder, tmp_path):
    for index in range(400):
        shutil.copy(PHOTOGRAPH, tmp_path / f"{index}.jpg")
    command = [*SAILVIT, "encode", str(tmp_path), "--model", str(folder)]
    running = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out"), "--workers", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    )
    while not list((tmp_path / "out").glob("*.safetensors")):
        time.sleep(0.1)
        assert running.poll() is None
    os.killpg(running.pid, signal.SIGINT)
    error = running.communicate(timeout=60)[1]
    assert running.returncode == 130 and error.endswith("sailvit encode: interrupted\n") and "Traceback" not in error
    assert not list((tmp_path / "out").glob("*.part"))


def test_a_terminal_gets_a_progress_bar(folder, album, tmp_path, monkeypatch):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with os.fdopen(follower, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        code = encode(album, "--model", folder, "--out", tmp_path)
    shown = b""
    with suppress(OSError):  # Linux, at the end
        while chunk := os.read(leader, 100_000):
            shown += chunk
    os.close(leader)
    assert code == 0 and b"4/4" in shown and b"image/s" in shown


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_demo_runs_at_published_size(tmp_path, dtype):
    done = run_command("demo", "--size", "base", "--dtype", dtype, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    check_demo(done.stdout, tmp_path / "sailvit-demo", dtype)


def check_demo(printed: str, folder: Path, dtype: str) -> None:
    for expected in (
        "RANDOM weights",
        f"in {dtype}: as requested",
        "(5, 3, 448, 448) -> tokens (5, 256, 3072)",
        "figure.png",
    ):
        assert expected in printed
    steps = re.findall(r"^\d\. .*?^   [\d.]+ s$", printed, flags=re.MULTILINE | re.DOTALL)
    assert len(steps) == 5 and re.search(r"^Done in \d+ s\.$", printed, flags=re.MULTILINE)
    with Image.open(folder / "figure.png") as figure:
        assert figure.size == (2064, 768)
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    assert tokens.dtype == getattr(torch, dtype)


def test_random_models_are_reproducible(tmp_path):
    options = {"num_hidden_layers": 1, "image_size": 28}
    first, second = (make_random_tower(tmp_path / name, "base", **options) for name in ("a", "b"))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
