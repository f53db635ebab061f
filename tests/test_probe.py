"""`sailvit probe`: encoders of any library, features cached by content, results and what is wrong with the input."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import timm
import torch
from conftest import TINY, make_checkpoint, randomize
from doc_pages import write_model
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from toy_images import SMALL, write_clip, write_digits, write_dinov2, write_timm
from transformers import AutoModel, BertConfig, BertModel, CLIPImageProcessor, ViTConfig, ViTForImageClassification

import sailvit_cli
from sailvit import SAILViTConfig, SAILViTModel
from sailvit.convert.export.card import write_model_card
from sailvit.evaluate import encoders as encoders_module
from sailvit.evaluate.datasets import decode, load_images, match_classes
from sailvit.evaluate.encoders import LAST, load_encoder
from sailvit.evaluate.models import check_model
from sailvit.evaluate.probe import features as features_module
from sailvit.evaluate.probe.features import compute_features, extract_features, read_features
from sailvit.evaluate.probe.files import draw_results
from sailvit.evaluate.probe.heads import HeadOptions
from sailvit.evaluate.probe.run import ProbeOptions, run_probe


QUICK = HeadOptions(epochs=2, learning_rates=(1e-3, 1e-2), weight_decays=(0.0,), strengths=(0.1, 1.0), iterations=20)
RESULT = {"model", "test", "head", "accuracy", "low", "high", "n"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    return write_dinov2(tmp_path_factory.mktemp("models") / "dinov2")


@pytest.fixture
def images(digits, tmp_path) -> Path:
    """A copy of the test pictures, to change."""
    return Path(shutil.copytree(digits / "test", tmp_path / "pictures"))


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The sizes of the batches that encoders run on."""
    sizes, encode = [], encoders_module.Encoder.encode

    def record(self, pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(encoders_module.Encoder, "encode", record)
    return sizes


def extract(encoder, images, cache: Path, **options) -> features_module.Features:
    extract_features(encoder, images, cache, **options)
    return read_features(encoder, images, cache)


# The command


def test_one_command_runs_encoders_of_any_library(digits, dinov2, folder, tmp_path, capsys):
    apple = make_checkpoint(tmp_path / "apple")
    CLIPImageProcessor(size={"height": 56, "width": 56}, do_center_crop=False).save_pretrained(apple)
    sail_vl = write_model(tmp_path / "sail-vl", tmp_path / "parts")
    encoders = [folder, apple, sail_vl, dinov2, write_clip(tmp_path / "clip"), write_timm(tmp_path / "timm")]
    words = ["--data", digits / "train", "--test", digits / "test", "--head", "mlp", "linear", "knn", "--epochs", 2]
    words += ["--learning-rates", "1e-3", "--weight-decays", 0, "--strengths", "0.1"]
    words += ["--out", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--device", "cpu"]
    assert sailvit_cli.main(["probe", *map(str, [*encoders, *words])]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "results.json", "results.md", "results.png", "evaluation.json"
    }  # fmt: skip
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(found["results"]) == 6 * 3 and all({*one} == RESULT for one in found["results"])
    assert all(one["n"] == 60 and one["low"] <= one["accuracy"] <= one["high"] for one in found["results"])
    assert len(found["comparisons"]) == 15 * 3 and found["skipped"] == []
    prefixes = [one["prefix_tokens"] for one in found["settings"]["encoders"].values()]
    assert prefixes == [0, 0, 0, 1, 1, 1]
    table = (tmp_path / "out" / "results.md").read_text()
    assert "10 epochs" not in table and "2 epochs of AdamW" in table and f"| {folder} | " in table
    assert "without 1 class and register tokens" in capsys.readouterr().out


def test_the_model_card_takes_the_results(digits, folder, images, tmp_path):
    shutil.rmtree(images / "9")
    options = ProbeOptions(("linear", "knn"), device="cpu", uses_cache=False, head=QUICK)
    run_probe([str(folder)], str(digits / "train"), [str(digits / "test"), str(images)], tmp_path / "out", options)
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    shutil.copy(tmp_path / "out" / "evaluation.json", model)
    write_model_card(model, "owner/model", "v1")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    results = ModelCard.load(model / "README.md").data.eval_results
    shown = {(one.dataset_name, one.dataset_config, one.metric_name.split()[2], one.metric_value) for one in results}
    names = {"test": ("test", None), "pictures (9 classes)": ("pictures", "9 classes")}
    names["pictures (10 classes)"] = ("pictures", "10 classes")
    heads = {"linear": "logistic", "knn": "nearest"}
    assert shown == {(*names[one["test"]], heads[one["head"]], round(100 * one["accuracy"], 2)) for one in found}


def test_test_sets_have_the_fewest_last_parts_of_their_paths_that_differ(digits, dinov2, tmp_path):
    paths = [shutil.copytree(digits / "test", tmp_path / name / "test") for name in ("seen", "unseen")]
    options = ProbeOptions(("knn",), device="cpu", uses_cache=False, head=QUICK)
    found = run_probe([str(dinov2)], str(digits / "train"), [*map(str, paths)], None, options)
    assert [one["test"] for one in found.results] == ["seen/test", "unseen/test"]


def test_layers_are_probed_one_by_one(digits, dinov2, tmp_path):
    options = ProbeOptions(("knn", "mlp"), (1, LAST), device="cpu", cache_dir=tmp_path / "cache", head=QUICK)
    found = run_probe([str(dinov2)], str(digits / "train"), [str(digits / "test")], tmp_path / "out", options).to_json()
    assert [(one["head"], one["layer"]) for one in found["layers"]] == [
        ("knn", 1), ("knn", LAST), ("mlp", 1), ("mlp", LAST)
    ]  # fmt: skip
    for result in found["results"]:
        heads = [one for one in found["heads"] if one["head"] == result["head"]]
        best = max(heads, key=lambda one: one["split_accuracy"])
        layer = next(one for one in found["layers"] if (one["head"], one["layer"]) == (best["head"], best["layer"]))
        assert layer == {**result, "layer": best["layer"]}
    alone = ProbeOptions(("knn", "mlp"), (1,), device="cpu", cache_dir=tmp_path / "cache", head=QUICK)
    single = run_probe([str(dinov2)], str(digits / "train"), [str(digits / "test")], None, alone).to_json()
    assert [one["accuracy"] for one in single["results"]] == [
        one["accuracy"] for one in found["layers"] if one["layer"] == 1
    ]


@pytest.mark.nightly
def test_several_processes_find_what_one_finds(digits, dinov2, tmp_path):
    words = ["probe", dinov2, "--data", digits / "train", "--test", digits / "test", "--device", "cpu"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "sailvit_cli"]
    for name, command in {"one": [sys.executable, "-m", "sailvit_cli"], "two": launcher}.items():
        out = ["--out", tmp_path / name, "--cache-dir", tmp_path / f"cache-{name}"]
        subprocess.run([*map(str, [*command, *words, *out])], check=True, timeout=500)
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("one", "two"))
    assert one == two


# Features


def test_features_are_means_of_transformers_tokens(digits, dinov2):
    encoder = load_encoder(str(dinov2), (1, -1, LAST), device="cpu")
    images = load_images(str(digits / "test"), training=False)
    found = compute_features(encoder, images)
    model = AutoModel.from_pretrained(dinov2)
    pixels = torch.stack([encoder.preprocessing(Image.open(path).convert("RGB")) for path in images.groups[0].images])
    with torch.inference_mode():
        output = model(pixels, output_hidden_states=True)
        first = output.hidden_states[1][:, 1:].mean(1)
        last = output.last_hidden_state[:, 1:].mean(1)
        assert torch.allclose(model.layernorm(output.hidden_states[2])[:, 1:].mean(1), last, atol=1e-5)
    assert torch.allclose(found.layer(0), first, atol=1e-5) and torch.allclose(found.layer(2), last, atol=1e-5)
    assert not torch.allclose(found.layer(1), last, atol=1e-2)
    kept = compute_features(load_encoder(str(dinov2), keeps_prefix=True, device="cpu"), images)
    assert torch.allclose(kept.layer(0), output.last_hidden_state.mean(1), atol=1e-5)


def test_features_are_means_of_timms_tokens(digits, tmp_path):
    path = str(write_timm(tmp_path / "timm"))
    encoder = load_encoder(path, (2, LAST), device="cpu")
    assert encoder.preprocessing.settings["input_size"] == [3, 160, 160]
    model = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
    pixels = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        tokens, blocks = model.forward_intermediates(pixels, indices=[1], output_fmt="NLC")
        expected = torch.stack([blocks[0].mean(1), tokens[:, 1:].mean(1)], 1)
        assert torch.allclose(encoder.encode(pixels), expected, atol=1e-5)


def test_a_hierarchical_encoder_has_its_output_alone(tmp_path):
    model = timm.create_model("test_convnext", pretrained=False, num_classes=0)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    encoder, pixels = load_encoder(str(tmp_path), device="cpu"), torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        expected = encoder.model.forward_features(pixels).mean((2, 3))
    assert torch.allclose(encoder.encode(pixels)[:, 0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="no plain transformer: --layers can only be last"):
        load_encoder(str(tmp_path), (1,), device="cpu")


def test_cached_features_equal_uncached_ones_and_open_no_image_again(digits, dinov2, tmp_path, monkeypatch):
    encoder, images = load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False)
    cached = extract(encoder, images, tmp_path)
    assert torch.equal(compute_features(encoder, images).layer(0), cached.layer(0))
    monkeypatch.setattr(Image, "open", None)
    again = extract(load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), False), tmp_path)
    assert torch.equal(again.layer(0), cached.layer(0))


def test_another_head_opens_no_image(digits, dinov2, tmp_path, monkeypatch):
    def probe(head: str):
        options = ProbeOptions((head,), device="cpu", cache_dir=tmp_path, head=QUICK)
        return run_probe([str(dinov2)], str(digits / "train"), [str(digits / "test")], None, options)

    probe("knn")
    monkeypatch.setattr(features_module, "decode", None)
    assert probe("linear").results[0]["n"] == 60


def test_settled_images_are_not_even_read_again(digits, dinov2, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "SETTLED_SECONDS", -1)
    encoder, images = load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False)
    before = extract(encoder, images, tmp_path).layer(0)
    monkeypatch.setattr(Path, "read_bytes", None)
    assert torch.equal(extract(encoder, images, tmp_path).layer(0), before)


def test_a_change_of_weights_image_or_preprocessing_is_noticed(dinov2, images, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(features_module, "SETTLED_SECONDS", -1)  # time stamps alone have to show a changed image
    model, cache = Path(shutil.copytree(dinov2, tmp_path / "model")), tmp_path / "cache"

    def is_computed(**options) -> bool:
        encoded.clear()
        extract(load_encoder(str(model), device="cpu", **options), load_images(str(images), training=False), cache)
        return sum(encoded) > 0

    assert is_computed() and not is_computed()
    changed = AutoModel.from_pretrained(model)
    changed.encoder.layer[1].mlp.fc2.bias.data[0] += 0.5
    changed.save_pretrained(model)
    assert is_computed() and not is_computed()
    picture = next(images.rglob("*.png"))
    stat = picture.stat()
    content = Image.open(picture).copy()
    content.putpixel((0, 0), 200)
    content.save(picture)
    os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert is_computed() and not is_computed()
    file = model / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.4, 0.4, 0.4]}))
    assert is_computed() and not is_computed()
    assert is_computed(layers=(1,)) and is_computed(dtype="bfloat16")


def test_an_interrupted_extraction_goes_on(digits, dinov2, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(features_module, "CHUNK", 16)
    encoder, images = load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False)
    whole = compute_features(encoder, images).layer(0)

    def interrupt(done: int, total: int) -> None:
        if done >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(encoder, images, tmp_path, on_progress=interrupt)
    encoded.clear()
    calls = []
    found = extract(encoder, images, tmp_path, on_progress=lambda *call: calls.append(call))
    assert sum(encoded) == 28 and calls == [(16, 60), (32, 60), (48, 60), (60, 60)]
    assert torch.equal(found.layer(0), whole)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on the workers of a DataLoader
def test_loader_processes_change_nothing(digits, dinov2):
    encoder, images = load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False)
    alone, loaded = (compute_features(encoder, images, 8, workers) for workers in (0, 1))
    assert torch.equal(alone.layer(0), loaded.layer(0)) and alone.content == loaded.content


def test_a_corrupt_image_is_named_and_moves_no_other_result(dinov2, images, tmp_path):
    encoder = load_encoder(str(dinov2), device="cpu")
    before = extract(encoder, load_images(str(images), training=False), tmp_path / "cache").layer(0)
    bad = sorted(images.rglob("*.png"))[7]
    bad.write_bytes(bad.read_bytes()[:60])
    found = extract(encoder, load_images(str(images), training=False), tmp_path / "cache")
    assert [(one.image, one.data) for one in found.skipped] == [(str(bad), str(images))]
    assert "truncated" in found.skipped[0].reason
    assert torch.equal(found.layer(0), torch.cat([before[:7], before[8:]]))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP", "JPEG", "BMP", "none"])
def test_what_is_wrong_with_an_image_is_in_words(kind):
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 90).save(buffer, "PNG" if kind == "none" else kind)
    whole = buffer.getvalue() if kind != "none" else b"no picture"
    for broken in (whole[: len(whole) // 2], b"", whole[:12], b"II*\0" + bytes(8) + whole):
        with pytest.raises(ValueError, match=r"\w+") as caught:
            decode(broken)
        assert "object at" not in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_that_is_too_large_is_skipped_like_a_broken_one(images, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="exceeds limit"):
        decode(next(images.rglob("*.png")).read_bytes())


def test_an_image_that_cannot_be_read_now_is_read_again(dinov2, images, tmp_path, monkeypatch):
    """As on a network disk that fails for a moment: time stamps do not change."""
    monkeypatch.setattr(features_module, "SETTLED_SECONDS", -1)
    encoder, bad = load_encoder(str(dinov2), device="cpu"), sorted(images.rglob("*.png"))[7]
    with monkeypatch.context() as patch:
        read = Path.read_bytes

        def fail(path: Path) -> bytes:
            if path == bad:
                raise OSError(5, "Input/output error")
            return read(path)

        patch.setattr(Path, "read_bytes", fail)
        found = extract(encoder, load_images(str(images), training=False), tmp_path / "cache")
    assert [one.image for one in found.skipped] == [str(bad)] and "Input/output" in found.skipped[0].reason
    again = extract(encoder, load_images(str(images), training=False), tmp_path / "cache")
    assert again.skipped == [] and len(again.layer(0)) == 60


def test_results_leave_corrupt_images_out_of_all_encoders(dinov2, folder, digits, images, tmp_path):
    bad = sorted(images.rglob("*.png"))[7]
    bad.write_text("no picture")
    words = [
        "--data",
        digits / "train",
        "--test",
        images,
        "--head",
        "knn",
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    assert sailvit_cli.main(["probe", *map(str, [dinov2, folder, *words, "--cache-dir", tmp_path / "cache"])]) == 2
    text = (tmp_path / "out" / "results.json").read_text()
    found = json.loads(text)
    assert [one["n"] for one in (*found["results"], *found["comparisons"])] == [59, 59, 59]
    assert [(one["image"], one["data"]) for one in found["skipped"]] == [(str(bad), str(images))]
    assert " at 0x" not in text


def test_a_training_class_without_a_readable_image_is_refused(dinov2, digits, images, tmp_path):
    for file in (images / "7").iterdir():
        file.write_text("no picture")
    options = ProbeOptions(("knn",), device="cpu", uses_cache=False, head=QUICK)
    with pytest.raises(ValueError, match="pictures: no image of 1 of 10 classes can be read, such as those of '7'"):
        run_probe([str(dinov2)], str(images), [str(digits / "test")], None, options)


def test_more_neighbours_than_images_are_left_out_of_grid_and_caption(dinov2, digits, tmp_path):
    options = ProbeOptions(("knn",), device="cpu", uses_cache=False, head=HeadOptions(neighbours=(5, 108, 109)))
    words, lines = ([str(dinov2)], str(digits / "train"), [str(digits / "test")]), []
    run_probe(*words, tmp_path / "out", options, log=lines.append)
    assert "--neighbours: 109 left out, more than the training images without the split" in lines
    assert "votes at temperature 0.07, k of 5, 108." in (tmp_path / "out" / "results.md").read_text()


def test_a_test_set_of_one_class_has_no_accuracy_among_its_classes(dinov2, digits, images):
    for label in "012345678":
        shutil.rmtree(images / label)
    options, lines = ProbeOptions(("knn",), device="cpu", uses_cache=False, head=QUICK), []
    found = run_probe([str(dinov2)], str(digits / "train"), [str(images)], None, options, log=lines.append)
    assert [one["test"] for one in found.results] == ["pictures (10 classes)"]
    assert f"{images}: one class, so accuracy is over all 10 classes only" in lines


def test_the_table_names_the_chosen_layer(dinov2, digits, tmp_path):
    options = ProbeOptions(("knn",), (1, LAST), device="cpu", uses_cache=False, head=QUICK)
    found = run_probe([str(dinov2)], str(digits / "train"), [str(digits / "test")], tmp_path / "out", options)
    (best,) = [one["layer"] for one in found.heads if one["is_best"]]
    assert f"| {dinov2}, layer {best} | " in (tmp_path / "out" / "results.md").read_text()


def test_the_legend_of_the_plot_hides_no_point(monkeypatch, tmp_path):
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    entry = {"head": "knn", "accuracy": 0.5, "low": 0.4, "high": 0.6}
    results = [{**entry, "model": model, "test": test} for model in ("a", "b") for test in ("val", "r")]
    layers = [{**one, "layer": layer} for one in results for layer in (1, LAST)]
    draw_results({"results": results, "layers": layers}, tmp_path / "plot.png")
    (figure,) = drawn
    assert all(axis.get_legend() is None for axis in figure.axes)
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b", "by layer: val", "by layer: r"]


@pytest.mark.parametrize("option", ["--out", "--cache-dir"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(dinov2, digits, tmp_path, encoded, capsys, option):
    (tmp_path / "file").write_text("")
    places = {"--out": tmp_path / "out", "--cache-dir": tmp_path / "cache"}
    for place, cause in ((tmp_path / "file" / "a", "it is a file"), ("/proc/none/a", "No such file")):
        options = [word for pair in (places | {option: place}).items() for word in pair]
        message = wrong(capsys, dinov2, "--data", digits / "train", "--test", digits / "test", *options)
        assert f"{option} {place}" in message and f": {cause}" in message and not encoded


def test_the_cause_is_named_if_the_cache_cannot_be_created(digits, dinov2, tmp_path):
    (tmp_path / "file").write_text("")
    encoder, images = load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False)
    with pytest.raises(OSError, match="the cache cannot be written: Not a directory: give another --cache-dir"):
        extract(encoder, images, tmp_path / "file" / "cache")


def test_what_is_wrong_with_an_image_processor_is_one_sentence(dinov2, tmp_path):
    model = Path(shutil.copytree(dinov2, tmp_path / "model"))
    file, fix = model / "preprocessor_config.json", "give --preprocessing NAME of an encoder that has one"
    for text, what in {
        None: "no preprocessor_config.json",
        "{": f"preprocessor_config.json cannot be used: It looks like the config file at '{file}' is not a valid JSON "
        "file.",
        '{"image_processor_type": "None"}': f"preprocessor_config.json cannot be used: Unrecognized image processor in "
        f"{model}",
    }.items():
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(ValueError, match=f"^{re.escape(f'{model}: {what}: {fix}')}$"):
            load_encoder(str(model), device="cpu")


def test_class_token_without_one_is_a_line(folder):
    lines: list[str] = []
    load_encoder(str(folder), keeps_prefix=True, device="cpu", log=lines.append)
    assert f"{folder}: no class or register tokens to average: --class-token changes nothing" in lines


def test_a_model_of_timm_without_network_is_told_from_one_that_it_lacks(monkeypatch):
    """With one request, where timm would retry for a minute."""
    requests: list[str] = []

    def fail(api, name: str, revision: str | None) -> None:
        requests.append(name)
        raise ConnectionError("Network is unreachable")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(ValueError, match=r"^timm:test_vit2: timm has it, but its weights cannot be .*is unreachable"):
        check_model("timm:test_vit2")
    assert requests == ["timm/test_vit2.r160_in1k"]
    with pytest.raises(ValueError, match=r"^timm:test_vit\.none: timm has no such weights"):
        check_model("timm:test_vit.none")
    with pytest.raises(ValueError, match=r"^timm:vit_tiny_patch16_18: timm has no such model"):
        check_model("timm:vit_tiny_patch16_18")


# Data sets


def write_parquet(folder: Path, images: Path, shards: int = 3) -> list[Path]:
    """Write pictures in class folders as shards of a data set, named as on the Hub."""
    paths = sorted(images.rglob("*.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*"0123456789"])})
    table = datasets.Dataset.from_dict(
        {"image": [str(path) for path in paths], "label": [path.parent.name for path in paths]}, features
    )
    folder.mkdir()
    files = [folder / f"test-{index:05d}-of-{shards:05d}.parquet" for index in range(shards)]
    for index, file in enumerate(files):
        table.shard(shards, index).to_parquet(file)
    return files


@pytest.fixture
def no_cache_of_datasets(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def test_a_data_set_gives_what_its_folder_gives(digits, dinov2, tmp_path, no_cache_of_datasets):
    encoder, folder = load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False)
    expected = compute_features(encoder, folder)
    write_parquet(tmp_path / "parquet", digits / "test")
    datasets.concatenate_datasets(
        [datasets.Dataset.from_parquet(str(file)) for file in sorted((tmp_path / "parquet").iterdir())]
    ).save_to_disk(tmp_path / "saved")
    datasets.load_from_disk(tmp_path / "saved").to_parquet(tmp_path / "saved.parquet")
    (tmp_path / "plain").mkdir()
    pyarrow.parquet.write_table(  # as other programs write it: without the schema of datasets
        pyarrow.parquet.read_table(tmp_path / "saved.parquet").replace_schema_metadata(),
        tmp_path / "plain" / "a.parquet",
    )
    datasets.DatasetDict(
        test=datasets.load_from_disk(tmp_path / "saved"),
        train=datasets.load_from_disk(tmp_path / "saved").select([0, 9]),
    ).save_to_disk(tmp_path / "splits")
    for name in ("parquet", "saved", "plain", "saved.parquet", "splits", "splits:test"):
        found = load_images(str(tmp_path / name), training=False)
        assert (found.classes, found.labels) == (folder.classes, folder.labels)
        assert torch.allclose(compute_features(encoder, found).layer(0), expected.layer(0), atol=1e-6)

    assert len(load_images(f"{tmp_path}/splits:train", training=False)) == 2
    for name, message in {
        "splits:dev": "expected a split dev, got test, train: give NAME:SPLIT",
        "saved:train": "no split 'train': this data set is one, without splits",
        "saved.parquet:train": "expected a folder, a parquet file without a split",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_images(str(tmp_path / name), training=False)
    with pytest.raises(ValueError, match=f"class folders have no splits: .* such as {digits}/test$"):
        load_images(f"{digits}:test", training=False)


def test_a_corrupt_parquet_file_is_named_and_moves_no_other_result(digits, dinov2, tmp_path, no_cache_of_datasets):
    encoder = load_encoder(str(dinov2), device="cpu")
    files = write_parquet(tmp_path / "parquet", digits / "test")
    whole = compute_features(encoder, load_images(f"{tmp_path}/parquet:test", training=False)).layer(0)
    files[1].write_bytes(files[1].read_bytes()[:-100])
    images = load_images(f"{tmp_path}/parquet", training=False)
    found = compute_features(encoder, images)
    assert [one.image for one in found.skipped] == [str(files[1])] and "parquet" in found.skipped[0].reason
    assert torch.equal(found.layer(0), torch.cat([whole[:20], whole[40:]]))


def test_a_row_without_an_image_is_named(digits, dinov2, no_cache_of_datasets, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    path = str(next((digits / "test").rglob("*.png")))
    rows = datasets.Dataset.from_dict({"image": [path, None, path], "label": [0, 1, 1]}, features)
    rows.to_parquet(tmp_path / "test.parquet")
    encoder, images = load_encoder(str(dinov2), device="cpu"), load_images(str(tmp_path), training=False)
    found = compute_features(encoder, images)
    assert [(one.image, one.reason) for one in found.skipped] == [("row 1", "no image in this row")]


def pictures(folder: Path, *classes: str) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name / "a.png")
    return folder


def matched(tmp_path: Path, train: tuple[str, ...], test: tuple[str, ...]) -> tuple[list[int], list[int]]:
    names = [pictures(tmp_path / "train", *train), pictures(tmp_path / "test", *test)]
    return match_classes(*(load_images(str(name), training=False) for name in names))


def test_a_test_set_may_have_some_of_the_classes(tmp_path):
    assert matched(tmp_path, ("n1", "n2", "n3"), ("n1", "n3")) == ([0, 2], [0, 2])


def test_numbered_folders_are_positions_in_the_sorted_classes(tmp_path):
    assert matched(tmp_path, ("n1", "n5", "n7"), ("2", "0")) == ([0, 2], [0, 2])


def test_numbered_folders_of_both_sets_are_names(tmp_path):
    assert matched(tmp_path, ("1", "5"), ("5",)) == ([1], [1])


def labelled(tmp_path: Path, names: list[str], labels: list[int]) -> Path:
    """Write a data set with names of classes, as the Hub's ImageNet has them, in their own order."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    picture = Image.new("RGB", (8, 8))
    rows = datasets.Dataset.from_dict({"image": [picture] * len(labels), "label": labels}, features)
    rows.to_parquet(tmp_path / "train.parquet")
    return tmp_path


def test_numbered_folders_are_labels_of_a_data_set(tmp_path, no_cache_of_datasets):
    """Names of a data set are not sorted, and classes without images keep their numbers."""
    (tmp_path / "set").mkdir()
    train = load_images(str(labelled(tmp_path / "set", ["tench", "shark", "hen", "crane"], [3, 0, 2])), training=True)
    test = load_images(str(pictures(tmp_path / "v2", "0", "2", "3")), training=False)
    assert train.classes == ["tench", "hen", "crane"] and match_classes(train, test)[0] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"1 of 1 classes are not in .* such as '1'"):
        match_classes(train, load_images(str(pictures(tmp_path / "other", "1")), training=False))


def test_all_encoders_compute_in_one_dtype(digits, dinov2, tmp_path):
    double = Path(shutil.copytree(dinov2, tmp_path / "double"))
    AutoModel.from_pretrained(dinov2).double().save_pretrained(double)

    def dtypes(*names: Path, **settings) -> tuple[str, set[str]]:
        options = ProbeOptions(("knn",), device="cpu", uses_cache=False, head=QUICK, **settings)
        words = [*map(str, names)], str(digits / "train"), [str(digits / "test")]
        found = run_probe(*words, tmp_path / "out", options, overwrite=True, log=lines.append).settings
        assert f"; computed in {found['computed_in']}." in (tmp_path / "out" / "results.md").read_text()
        return found["computed_in"], {one["dtype"] for one in found["encoders"].values()}

    lines: list[str] = []
    assert dtypes(double) == ("float64", {"float64"}) and dtypes(dinov2) == ("float32", {"float32"})
    assert not any("all encoders compute" in line for line in lines)
    assert dtypes(dinov2, double) == ("float32", {"float32"})
    assert any(f"all encoders compute in float32, since the dtypes of their weights differ (float32 of {dinov2}, "
               f"float64 of {double})" in line for line in lines)  # fmt: skip
    assert dtypes(dinov2, double, dtype="float64") == ("float64", {"float64"})


def test_a_broken_encoder_is_found_before_the_work_on_others(digits, dinov2, tmp_path, encoded):
    broken = Path(shutil.copytree(dinov2, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    options = ProbeOptions(("knn",), device="cpu", cache_dir=tmp_path / "cache", head=QUICK)
    with pytest.raises(ValueError, match=r"broken: .*truncated or corrupt"):
        run_probe([str(dinov2), str(broken)], str(digits / "train"), [str(digits / "test")], None, options)
    assert encoded == [] and not (tmp_path / "cache").exists()


def test_accuracy_is_over_the_classes_of_the_test_set_and_over_all(digits, dinov2, images, tmp_path):
    for label in "56789":
        shutil.rmtree(images / label)
    options = ProbeOptions(("linear",), device="cpu", cache_dir=tmp_path / "cache", head=QUICK)
    found = run_probe([str(dinov2)], str(digits / "train"), [str(images)], tmp_path / "out", options).results
    assert [one["test"] for one in found] == ["pictures (5 classes)", "pictures (10 classes)"]
    assert found[0]["accuracy"] > found[1]["accuracy"] and found[0]["n"] == found[1]["n"]


# Bad input


def wrong(capsys, *words: object) -> str:
    """Run the command, and return its one line of error."""
    capsys.readouterr()
    assert sailvit_cli.main(["probe", *map(str, words)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("sailvit probe: ")
    return message


def test_bad_input_is_one_line_and_nothing_is_written(digits, dinov2, folder, tmp_path, capsys):
    data = ("--data", digits / "train", "--test", digits / "test")
    rest = ("--out", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--device", "cpu")
    (tmp_path / "empty").mkdir()
    text = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    text.save_pretrained(tmp_path / "bert")
    one, other = pictures(tmp_path / "one", "a"), pictures(tmp_path / "other", "a", "b")
    incomplete = pictures(tmp_path / "incomplete", "a", "c")
    (incomplete / "b").mkdir()
    broken = randomize(SAILViTModel(SAILViTConfig(**TINY)))
    broken.trunk.post_trunk_norm.weight.data[3] = float("nan")
    nan = Path(shutil.copytree(folder, tmp_path / "nan"))
    broken.save_pretrained(nan)
    for words, message in {
        (dinov2, "--data", tmp_path / "empty", *data[2:]): "empty: no images: expected a folder for each class",
        (dinov2, "--data", tmp_path / "gone", *data[2:]): "gone: no such folder",
        (dinov2, "--data", incomplete, *data[2:]): "incomplete: 1 of 3 class folders have no images, such as b",
        (dinov2, *data[:3], f"{digits}/../{digits.name}/train"): ".png is in the training set ",
        (dinov2, *data, "--head", "knn", "--neighbours", "109"): "--neighbours: expected a number up to 108",
        (dinov2, *data, "--learning-rates", "1e30"): "mlp: the training loss is NaN or infinite: give smaller --learn",
        (dinov2, "--data", one, "--test", other): "one: expected at least two classes, got 'a' alone",
        (dinov2, "--data", other, *data[2:]): "test: 8 of 10 classes are not in ",
        (tmp_path / "bert", *data): "bert: expected an image encoder, got a BertModel",
        (tmp_path / "gone", *data): "gone: no such file or folder",
        (tmp_path / "empty", *data): "empty: no config.json",
        ("timm:no_such_model", *data): "timm:no_such_model: timm has no such model",
        (dinov2, *data, "--layers", "3"): "expected --layers from 1 to 2, or last, got 3",
        (dinov2, *data, "--layers", "2", "-1"): "--layers names a block twice",
        (folder, *data, "--preprocessing", write_timm(tmp_path / "timm")): "cannot encode an image with the prepro",
        (dinov2, tmp_path / "gone", *data, "--head", "knn"): "gone: no such file or folder",
        (dinov2, dinov2, *data): "expected encoder once",
        (dinov2, *data, "--batch-size", "512"): "--batch-size: expected 1 to 256, got 512",
        (nan, *data): ".png are NaN or infinite: check the weights",
    }.items():  # fmt: skip
        assert message in wrong(capsys, *words, *rest)
        assert not (tmp_path / "out").exists()


def test_a_wrong_name_is_found_without_torch():
    words = ["probe", "gone", "--data", "train", "--test", "test", "--out", "out"]
    code = f"import sys, sailvit_cli; assert sailvit_cli.main({words}) == 2 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == "sailvit probe: gone: no such file or folder, and no name on the Hub (OWNER/NAME)\n"


def test_weights_that_are_missing_are_named(dinov2, tmp_path):
    path = Path(shutil.copytree(dinov2, tmp_path / "model"))
    weights = load_file(path / "model.safetensors")
    del weights["encoder.layer.1.mlp.fc2.bias"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing keys in the weights, such as encoder.layer.1.mlp.fc2.bias"):
        load_encoder(str(path), device="cpu")


def test_a_head_that_a_checkpoint_lacks_does_not_change_the_hash(dinov2, tmp_path):
    """transformers fills the pooler of a classifier's checkpoint with random values."""
    config = ViTConfig(**SMALL, image_size=28, patch_size=14)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    shutil.copy(dinov2 / "preprocessor_config.json", tmp_path)
    first, second = (load_encoder(str(tmp_path), device="cpu") for _ in range(2))
    assert not torch.equal(first.model.pooler.dense.weight, second.model.pooler.dense.weight)
    assert first.describe() == second.describe()


def test_a_cache_of_another_version_is_refused(digits, dinov2, tmp_path):
    (tmp_path / "format.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="a cache of another version of this package: remove it, or give --cache-dir"):
        extract(load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False), tmp_path)


def test_a_damaged_file_of_the_cache_is_named(digits, dinov2, tmp_path):
    encoder, images = load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False)
    extract(encoder, images, tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{file}: damaged: remove it, and it is extracted again"):
        read_features(encoder, images, tmp_path)


def test_features_that_do_not_fit_on_the_disk_are_refused_before(digits, dinov2, tmp_path, encoded, monkeypatch):
    encoder, images = load_encoder(str(dinov2), (1, 2), device="cpu"), load_images(str(digits / "test"), training=False)
    needed = 60 * 2 * 32 * 4
    for free in (needed - 1, needed):
        usage = shutil._ntuple_diskusage(10**9, 0, free)
        monkeypatch.setattr(features_module.shutil, "disk_usage", lambda path, usage=usage: usage)
        if free < needed:
            with pytest.raises(OSError, match=r"features of 60 images and 2 layers need 0\.00 GB.*give fewer --layers"):
                extract(encoder, images, tmp_path)
            assert not encoded
    extract(encoder, images, tmp_path)


def test_a_disk_that_fills_leaves_whole_chunks_only(digits, dinov2, tmp_path, monkeypatch):
    encoder, images = load_encoder(str(dinov2), device="cpu"), load_images(str(digits / "test"), training=False)

    def fill(tensors, file, metadata) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features_module, "save_file", fill)
    with pytest.raises(OSError, match="No space left on device: free space, or give --cache-dir"):
        extract(encoder, images, tmp_path)
    assert not [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.part")]


def test_an_existing_folder_is_replaced_only_if_a_probe_wrote_it(digits, dinov2, tmp_path):
    options = ProbeOptions(("knn",), device="cpu", cache_dir=tmp_path / "cache", head=QUICK)
    words = ([str(dinov2)], str(digits / "train"), [str(digits / "test")], tmp_path / "out", options)
    run_probe(*words)
    with pytest.raises(ValueError, match="exists: give --overwrite"):
        run_probe(*words)
    run_probe(*words, overwrite=True)
    (tmp_path / "out" / "results.json").unlink()
    with pytest.raises(ValueError, match=r"contains no results\.json, so sailvit did not write it"):
        run_probe(*words, overwrite=True)
