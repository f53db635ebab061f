"""`sailvit convert --to-layout onnx`: the folder, its files in onnxruntime, and what reads or refuses such folders."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from conftest import PHOTOGRAPH, ROOT, TINY, TINY_SHAPE, make_checkpoint, randomize, relative_difference
from doc_pages import code_blocks
from fake_hub import sailvit, serve
from fork_server import run_forked
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from processes import SAILVIT, measure
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_evaluate_disk import largest_file
from toy_sailvl import write_release

import sailvit_cli
from sailvit import (
    SAILViTBackbone,
    SAILViTConfig,
    SAILViTForImageClassification,
    SAILViTImageProcessor,
    SAILViTModel,
    SAILVLForConditionalGeneration,
)
from sailvit.convert.export.card import write_model_card
from sailvit.convert.export.model_types import auto_class_of
from sailvit.convert.storage.errors import VerificationError
from sailvit.convert.synthetic import published_shape, write_synthetic
from sailvit.encode.load import load_encoder as load_any_encoder
from sailvit.encode.onnx_model import OnnxEncoder, load_onnx
from sailvit.examples.miniature.draw import draw_scenes
from sailvit.examples.miniature.shipped import ENCODER, MULTIMODAL
from sailvit.examples.miniature.world import WorldPlan, write_world
from sailvit.exporters import folder as onnx_folder
from sailvit.exporters import graph, weights
from sailvit.exporters.checks import BOUNDS, WORD, compare, is_within
from sailvit.exporters.folder import convert_to_onnx
from sailvit.exporters.source import load_encoder
from sailvit.exporters.verify import Reference, verify_files
from sailvit.hub import check_before_publish


SIZE, GRID, WIDTH = 32, 8, 64  # of the miniature: pixels, patches of a side, width
FILES = {"float32": "model.onnx", "int8": "model_quantized.onnx"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The shipped miniature's encoder and connector, by the command, on the default pictures."""
    out = tmp_path_factory.mktemp("onnx") / "miniature-onnx"
    words = [
        MULTIMODAL,
        out,
        "--part",
        "vision",
        "--with-connector",
        "--to-layout",
        "onnx",
        "--dtype",
        "float32,int8",
    ]
    assert convert(*words) == 0
    return out


@pytest.fixture
def without_export(exported, monkeypatch) -> None:
    """Take the exported float32 file instead of exporting: for what happens around it."""
    monkeypatch.setattr(graph, "write_graph", copy_of(exported / "onnx" / "model.onnx"))


def copy_of(file: Path):
    """What writes a file with its weights in another one, as the exporter does, whatever the encoder."""
    return lambda encoder, path: onnx_ir.save(onnx_ir.load(file), path, external_data=f"{path.name}_data")


def convert(*words: object) -> int:
    return sailvit_cli.main(["convert", *map(str, words)])


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def tiles_of(count: int, seed: int = 0) -> torch.Tensor:
    processor = SAILViTImageProcessor.from_pretrained(ENCODER)
    return processor(draw_scenes(SIZE, count, seed), do_tile=False)["pixel_values"]


def test_the_command_exports_in_a_process_of_its_own(tmp_path):
    """Without the package imported before, and without a terminal to ask about remote code."""
    script = "import sys, sailvit_cli; sys.exit(sailvit_cli.main(sys.argv[1:]))"
    words = ["convert", str(ENCODER), "out", "--to-layout", "onnx", "--no-verify"]
    done = run_forked(script, *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out" / "onnx").iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", FILES.values())
def test_files_have_the_names_and_shapes_of_onnx_community(exported, name):
    assert {path.name for path in (exported / "onnx").iterdir()} == {*FILES.values()}
    tokens = GRID**2
    shapes = {
        "pixel_values": ["tiles", 3, SIZE, SIZE],
        "last_hidden_state": ["tiles", tokens, WIDTH],
        "image_features": ["tiles", tokens // 4, 4 * WIDTH],
        "image_embeds": ["tiles", tokens // 4, 96],
    }
    loaded = session(exported / "onnx" / name)
    ends = [*loaded.get_inputs(), *loaded.get_outputs()]
    assert {end.name: end.shape for end in ends} == shapes
    assert {end.type for end in ends} == {"tensor(float)"}
    model = onnx.load(exported / "onnx" / name)
    onnx.checker.check_model(model)
    assert next(entry.version for entry in model.opset_import if entry.domain == "") == graph.OPSET


def test_any_number_of_tiles_gives_the_tokens_of_torch(exported):
    model, loaded = SAILViTModel.from_pretrained(ENCODER).eval(), session(exported / "onnx" / "model.onnx")
    tiles = tiles_of(64)
    for count in (1, 2, 9, 64):
        with torch.inference_mode():
            expected = model(tiles[:count]).last_hidden_state, model.get_image_features(tiles[:count])
        names = ["last_hidden_state", "image_features"]
        ours = loaded.run(names, {"pixel_values": tiles[:count].numpy()})
        for array, tensor in zip(ours, expected, strict=True):
            assert relative_difference(torch.from_numpy(array), tensor) < 1e-5


def test_the_connector_gives_what_the_language_model_reads(exported):
    tiles = tiles_of(3)
    with torch.inference_mode():
        expected = SAILVLForConditionalGeneration.from_pretrained(MULTIMODAL).eval().get_image_features(tiles)
    (ours,) = session(exported / "onnx" / "model.onnx").run(["image_embeds"], {"pixel_values": tiles.numpy()})
    assert relative_difference(torch.from_numpy(ours).reshape(expected.shape), expected) < 1e-5


def test_only_products_with_weights_are_int8_with_a_scale_for_each_output(exported):
    model = onnx.load(exported / "onnx" / "model_quantized.onnx")
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == 4 * 5 + 2  # qkv, proj and three of the MLP in four blocks; two of the connector
    for node in products:
        matrix = weights[node.input[1]]
        assert matrix.dtype == np.int8 and np.abs(matrix.astype(int)).max() <= 64  # 7 bits
        scale = weights[node.input[1].replace("_quantized", "_scale")]
        assert scale.shape == matrix.shape[1:]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 1 and kinds.count("MatMul") == 4 * 2


def test_figures_are_printed_and_recorded_with_their_bounds(exported, capsys, tmp_path, without_export):
    files = json.loads((exported / "provenance.json").read_text())["verification"]["files"]
    assert files.keys() == {f"onnx/{name}" for name in FILES.values()}
    assert 0 < files["onnx/model.onnx"]["relative_difference"] <= files["onnx/model.onnx"]["bound"] == 1e-5
    assert 1 > files["onnx/model_quantized.onnx"]["cosine"] >= files["onnx/model_quantized.onnx"]["bound"] == 0.98
    picture = tmp_path / "picture.png"
    draw_scenes(SIZE, 1)[0].save(picture)
    words = [ENCODER, tmp_path / "out", "--to-layout", "onnx", "--dtype", "int8", "--calibration", picture]
    assert convert(*words) == 0
    printed = capsys.readouterr().out
    cosine = json.loads((tmp_path / "out" / "provenance.json").read_text())["verification"]["files"]
    cosine = cosine["onnx/model_quantized.onnx"]["cosine"]
    assert f"onnx/model_quantized.onnx: smallest cosine of a token {cosine:.4f} to torch's" in printed
    assert [path.name for path in (tmp_path / "out" / "onnx").iterdir()] == ["model_quantized.onnx"]


def test_the_connector_and_the_dtypes_are_recorded(exported):
    record = json.loads((exported / "provenance.json").read_text())
    assert record["options"]["dtype"] == record["dtype"] == ["float32", "int8"]
    assert record["source"]["dropped"]["others"] == {"language_model": 38}
    with safe_open(MULTIMODAL / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(("vision_model.", "mlp1."))]  # noqa: SIM118
        read = sum(file.get_tensor(name).nbytes for name in names)
    assert record["source"]["files"]["model.safetensors"]["taken"] == read


def test_files_of_the_connector_alone_are_recorded(tmp_path, without_export):
    source = write_release(tmp_path / "source", shards=8)
    convert_to_onnx(source, tmp_path / "out", part="vision", with_connector=True, verify=False)
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    read = {file for name, file in index.items() if not name.startswith("language_model.")}
    assert {name for name in record["source"]["files"] if name.endswith(".safetensors")} == read


def test_files_name_nothing_of_this_machine(exported):
    for path in (exported / "onnx").iterdir():
        content = path.read_bytes()
        assert b"stack_trace" not in content and str(Path.home()).encode() + b"/" not in content
        assert b"site-packages" not in content and b".py" not in content


@pytest.fixture
def reference() -> Reference:
    """What torch computes of the encoder alone."""
    encoder = load_encoder(ENCODER)
    return Reference.compute(encoder, ENCODER, lambda size: draw_scenes(size, 2))


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-4), ("int8", 0.3)])
def test_a_file_that_computes_something_else_is_found(exported, reference, dtype, noise):
    """The outputs of torch are moved by so much, in units of their spread."""
    generator = torch.Generator().manual_seed(0)
    for outputs in reference.of(dtype).values():
        tokens = outputs["last_hidden_state"]
        outputs["last_hidden_state"] = tokens + noise * tokens.std() * torch.randn(tokens.shape, generator=generator)
    with pytest.raises(VerificationError, match=f"onnx/{FILES[dtype]}: .* to torch's, expected at"):
        verify_files(exported, reference)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_nan_is_found_in_any_output(dtype):
    tokens = torch.ones(1, 4, 3)
    reference = {"one tile": {"last_hidden_state": tokens, "image_features": tokens, "image_embeds": tokens}}
    for name in reference["one tile"]:
        figure = compare(dtype, {"one tile": {**reference["one tile"], name: tokens * torch.nan}}, reference)
        assert np.isnan(figure[WORD[dtype]]) and not is_within(dtype, figure)


def test_a_failed_verification_leaves_nothing(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graph, "write_graph", copy_of(exported / "onnx" / "model_quantized.onnx"))
    assert convert(ENCODER, tmp_path / "out", "--to-layout", "onnx") == 1
    assert re.search(r"model\.onnx: relative difference \d.*expected at most 1e-05", capsys.readouterr().err)
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_leaves_nothing(tmp_path, capsys, without_export):
    for limit in (100_000, 900_000):  # in the weights of the source, in the ONNX file
        with largest_file(limit):
            assert convert(ENCODER, tmp_path / "out", "--to-layout", "onnx", "--no-verify") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "out: File too large: free space" in error.replace("/source", ""), error
        assert [*tmp_path.iterdir()] == []


def save_model(folder: Path, cls: type = SAILViTModel, **config) -> Path:
    randomize(cls(SAILViTConfig(**{**TINY, **config}))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        (
            make_checkpoint,
            "--image-size 100",
            "--image-size: expected a multiple of the patch size, 14 pixels, got 100",
        ),
        (
            make_checkpoint,
            "--image-size 70",
            "the pixel shuffle factor 2 does not divide: expected a multiple of 28 pixels",
        ),
        (make_checkpoint, "--dtype bfloat16", "expected one of float32, float16, int8 for ONNX, got 'bfloat16'"),
        (make_checkpoint, "--link", "--link: not for --to-layout onnx: leave it out"),
        (make_checkpoint, "--with-connector", "--with-connector: expected a SAIL-VL"),
        (
            make_checkpoint,
            "--dtype int8 --calibration gone.png",
            "--calibration gone.png: cannot be opened as an image: no such file",
        ),
        (make_checkpoint, "--calibration x.png", "only int8 is compared on pictures: add int8 to --dtype"),
        (make_checkpoint, "--dtype int8 --calibration x.png --no-verify", "--no-verify compares nothing: leave"),
        (lambda folder: MULTIMODAL, "", "a SAIL-VL, of which ONNX has the vision encoder: add --part vision"),
        (lambda folder: MULTIMODAL, "--part language", "expected vision for ONNX, got language: the language model is"),
        (
            lambda folder: save_model(folder, SAILViTForImageClassification),
            "",
            "expected an encoder for ONNX (SAILViTModel), got SAILViTForImageClassification in config.json",
        ),
        (lambda folder: save_model(folder, SAILViTBackbone), "", "got SAILViTBackbone in config.json"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(tmp_path, capsys, source, words, message):
    before, out = source(tmp_path / "source"), tmp_path / "new" / "out"
    capsys.readouterr()
    assert convert(before, out, "--to-layout", "onnx", *words.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


@pytest.mark.parametrize(
    "words", ["--dtype int8", "--dtype float32,float16", "--with-connector", "--calibration x.png"]
)
def test_options_of_onnx_are_refused_without_it(tmp_path, capsys, words):
    assert convert(ENCODER, tmp_path / "out", *words.split()) == 2
    assert f"{words}: only for --to-layout onnx" in capsys.readouterr().err.replace(
        "calibration:", "calibration x.png:"
    )


def test_a_picture_above_the_limit_of_pillow_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    words = ["--to-layout", "onnx", "--dtype", "int8", "--calibration", PHOTOGRAPH]
    assert convert(ENCODER, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert f"--calibration {PHOTOGRAPH}: cannot be opened as an image" in error and error.count("\n") == 1


def test_pictures_are_read_only_for_int8(tmp_path, monkeypatch, without_export):
    def refuse(size: int) -> list[Image.Image]:
        raise AssertionError("no file is compared on them")

    assert convert_to_onnx(ENCODER, tmp_path / "out", pictures=refuse).keys() == {"onnx/model.onnx"}


def test_a_full_temporary_folder_is_an_error_of_the_disk(exported, reference):
    with largest_file(1000), pytest.raises(OSError, match=r"inputs: .*File too large"):
        verify_files(exported, reference)


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sailvit.exporters.source.find_spec", lambda name: None if name == "onnxscript" else name)
    assert convert(ENCODER, tmp_path / "out", "--to-layout", "onnx") == 2
    assert 'needs onnxscript: pip install "sailvit[onnx]"' in capsys.readouterr().err


def test_an_onnxruntime_that_is_too_old_is_found_before_anything_is_written(tmp_path, capsys, monkeypatch):
    """For an opset of the future every onnxruntime is too old."""
    monkeypatch.setattr(graph, "OPSET", 99)
    assert convert(ENCODER, tmp_path / "out", "--to-layout", "onnx") == 2
    error = capsys.readouterr().err
    assert "opset 99" in error and "is too old for this file: pip install -U onnxruntime" in error
    assert [*tmp_path.iterdir()] == []


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def encode(*words: object) -> int:
    return sailvit_cli.main(["encode", *map(str, words)])


@pytest.mark.parametrize(("dtype", "bound"), [("auto", 1e-5), ("int8", 0.1)])
def test_encode_writes_the_tokens_of_torch(exported, tmp_path, dtype, bound):
    picture = tmp_path / "picture.png"
    draw_scenes(2 * SIZE, 1)[0].resize((3 * SIZE, 2 * SIZE)).save(picture)
    assert encode(picture, "--model", ENCODER, "--out", tmp_path / "torch") == 0
    assert encode(picture, "--model", exported, "--out", tmp_path / "onnx", "--dtype", dtype, "--batch-size", 2) == 0
    ours, expected = (load_file(tmp_path / name / "picture.png.safetensors") for name in ("onnx", "torch"))
    assert torch.equal(ours["tile_grid"], expected["tile_grid"]) and len(ours["tokens"]) > 2
    assert ours["tokens"].dtype == torch.float32
    assert relative_difference(ours["tokens"], expected["tokens"]) < bound


@pytest.mark.slow
def test_encode_takes_an_onnx_repository_by_name_and_downloads_one_file(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "hub" / "user" / "tiny-onnx")
    words = ["encode", PHOTOGRAPH, "--dtype", "int8", "--no-tile", "--model"]
    with serve(tmp_path / "hub") as (endpoint, asked):
        done = sailvit(tmp_path, *words, "user/tiny-onnx", "--out", "by-name", endpoint=endpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert {request.rpartition("/")[2] for request in asked if ".onnx" in request} == {FILES["int8"]}
    assert encode(*words[1:], exported, "--out", tmp_path / "local") == 0
    by_name, local = (load_file(tmp_path / out / "raccoon.jpg.safetensors") for out in ("by-name", "local"))
    assert by_name.keys() == local.keys() and all(torch.equal(by_name[name], local[name]) for name in local)


def test_in_int8_the_tokens_of_a_tile_do_not_depend_on_the_other_tiles(exported):
    encoder, tiles = load_onnx(exported, "cpu", "int8"), tiles_of(3)
    tiles[1] *= 3
    assert torch.equal(encoder.get_image_features(tiles)[2:], encoder.get_image_features(tiles[2:]))


def test_encode_says_which_file_runs_where(exported, tmp_path, capsys):
    words = (PHOTOGRAPH, "--model", exported, "--out", tmp_path, "--no-tile")
    assert encode(*words, "--device", "cpu", "--dtype", "int8") == 0
    assert "runs model_quantized.onnx (int8) in onnxruntime, by its CPUExecutionProvider" in capsys.readouterr().out
    assert encode(*words, "--overwrite", "--device", "coreml") == 2
    assert "expected a device of onnxruntime, cpu, got 'coreml'" in capsys.readouterr().err
    assert encode(*words, "--overwrite", "--dtype", "bfloat16") == 2
    assert "float32 (model.onnx) and int8 (model_quantized.onnx), got dtype bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", None])
def test_weights_for_torch_go_before_onnx_files(copied, weights):
    if weights == "model.safetensors":
        shutil.copy(ENCODER / weights, copied)
    elif weights:
        torch.save(load_file(ENCODER / "model.safetensors"), copied / weights)
    assert isinstance(load_any_encoder(str(copied), "cpu"), SAILViTModel if weights else OnnxEncoder)
    assert auto_class_of(copied) == ("AutoModel" if weights else "onnx")


def test_a_device_that_does_not_start_is_an_error_if_it_was_asked_for(exported, monkeypatch):
    """onnxruntime falls back to the next provider, and prints why."""
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: real(path, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(
        ValueError, match="expected onnxruntime to run on cuda, got its CPUExecutionProvider: "
    ) as error:
        load_onnx(exported, "cuda")
    assert "\n" not in str(error.value)
    assert load_onnx(exported).session.get_providers()[0] == "CPUExecutionProvider"


def test_the_provider_is_the_best_that_is_installed(exported, monkeypatch):
    """Only the CPU's works here."""
    asked, real = [], onnxruntime.InferenceSession

    def record(path: Path, options: object, providers: list[str]) -> onnxruntime.InferenceSession:
        asked.append(providers)
        session = real(path, options, providers=["CPUExecutionProvider"])
        session.get_providers = lambda: providers
        return session

    available = ["OpenVINOExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    for device in (None, "openvino", "cpu"):
        load_onnx(exported, device)
    first = ["CUDAExecutionProvider", "OpenVINOExecutionProvider", "CPUExecutionProvider"]
    assert asked == [[*dict.fromkeys([name, "CPUExecutionProvider"])] for name in first]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: setattr(model.opset_import[0], "version", 99), "is too old for this file: pip install -U onnxr"),
        (lambda model: setattr(model, "ir_version", 99), "is too old for this file: pip install -U onnxruntime"),
        (None, "does not load it: download or convert it again"),
    ],
)
def test_a_file_that_onnxruntime_does_not_load_is_one_line(copied, tmp_path, capsys, damage, message):
    path = copied / "onnx" / "model.onnx"
    if damage:
        model = onnx.load(path)
        damage(model)
        onnx.save(model, path)
    else:
        path.write_bytes(path.read_bytes()[:5000])
    capsys.readouterr()
    assert encode(PHOTOGRAPH, "--model", copied, "--out", tmp_path / "tokens") == 2
    error = capsys.readouterr().err
    assert message in error and "model.onnx" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["train", "aim-pretrain", "model={folder}", "data=gone", "output=out"],
        ["compose", "out", "--vision", "{folder}", "--language", str(MULTIMODAL)],
        ["convert", "{folder}", "out"],
        ["inspect", "{folder}"],
    ],
)
def test_commands_that_need_weights_refuse_an_onnx_folder(exported, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert sailvit_cli.main([word.format(folder=exported) for word in words]) == 2
    error = capsys.readouterr().err
    assert "an ONNX folder, which has no weights for torch" in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {".lock"}  # of a run


def test_the_code_of_the_folder_is_renewed(copied, capsys):
    before = {path.name: path.read_bytes() for path in (copied / "onnx").iterdir()}
    (copied / "image_processing_sailvit.py").write_text("# old\n")
    assert convert(copied, "--refresh-code", "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "with the new code it loads in a clean process" in printed
    assert "updated: image_processing_sailvit.py" in printed
    assert {path.name: path.read_bytes() for path in (copied / "onnx").iterdir()} == before
    assert check_before_publish(copied) == []


def test_push_accepts_the_folder(exported, capsys):
    assert check_before_publish(exported, "owner/miniature-onnx", log=print) == []
    assert capsys.readouterr().out.count("onnxruntime runs onnx/model") == 2


def without_known_files(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").rename(folder / "onnx" / "model_q4.onnx")
    (folder / "onnx" / "model_quantized.onnx").unlink()


def with_empty_folder(folder: Path) -> None:
    """Next to weights for torch."""
    shutil.rmtree(folder / "onnx")
    shutil.copytree(ENCODER, folder, dirs_exist_ok=True)
    (folder / "onnx").mkdir()


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (without_known_files, "load", "expected one of model.onnx, model_fp16.onnx, model_quantized.onnx, got none"),
        (with_empty_folder, "load", "expected one of model.onnx, model_fp16.onnx, model_quantized.onnx, got none"),
        (lambda folder: (folder / "onnx" / "model.onnx").write_bytes(b"x"), "load", "the folder does not load"),
        (
            lambda folder: shutil.copy(folder / "onnx/model_quantized.onnx", folder / "onnx/model.onnx"),
            "sha256",
            "not the f",
        ),
        (lambda folder: shutil.copy(folder / "onnx/model.onnx", folder / "onnx/model_q4.onnx"), "stray", "remove it"),
        (lambda folder: (folder / "image_processing_sailvit.py").unlink(), "code", "missing"),
    ],
)
def test_push_finds_what_is_wrong(copied, damage, kind, message):
    damage(copied)
    found = [problem for problem in check_before_publish(copied) if problem.kind == kind]
    assert found and message in found[0].message


def test_the_card_of_int8_alone_is_of_a_quantized_model(copied):
    record = json.loads((copied / "provenance.json").read_text())
    record["source"] = {"name": "owner/tower", "revision": "a" * 40, "license": "mit"}
    (copied / "provenance.json").write_text(json.dumps({**record, "dtype": ["int8"]}))
    (copied / "onnx" / "model.onnx").unlink()
    write_model_card(copied, "owner/tower-onnx", "v1")
    card = (copied / "README.md").read_text()
    assert "base_model: owner/tower\n" in card and "base_model_relation: quantized\n" in card
    assert "library_name: transformers.js\n" in card
    assert 'InferenceSession(f"{folder}/onnx/model_quantized.onnx")' in card
    assert "A vision encoder in ONNX, int8, sailvit" in card


@pytest.mark.parametrize("published", [False, True])
def test_the_usage_of_the_card_runs_as_written(exported, tmp_path, monkeypatch, published):
    def snapshot_download(repo_id: str, revision: str, allow_patterns: list[str]) -> str:
        assert (repo_id, revision) == ("owner/tower-onnx", "v1")
        for path in filter(Path.is_file, exported.rglob("*")):
            if [*filter_repo_objects([name := str(path.relative_to(exported))], allow_patterns=allow_patterns)]:
                (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.jpg").symlink_to(PHOTOGRAPH)
    copied = Path(shutil.copytree(exported, tmp_path / exported.name))
    if published:
        write_model_card(copied, "owner/tower-onnx", "v1")
    card = copied / "README.md"
    assert "A vision encoder in ONNX, float32 and int8, sailvit" in card.read_text()
    (usage,) = code_blocks(card, "python")
    scope: dict = {}
    if published:
        shutil.rmtree(copied)
    exec(usage, scope)
    assert scope["tokens"].shape[1:] == (GRID**2, WIDTH) and scope["features"].shape[1:] == (16, 4 * WIDTH)


def test_weights_above_the_limit_are_in_a_file_of_their_own(exported, tmp_path):
    full, small = tmp_path / "model.onnx", tmp_path / "model_quantized.onnx"
    onnx_ir.save(onnx_ir.load(exported / "onnx" / "model.onnx"), full, external_data="model.onnx_data")
    weights.quantize(full, small, largest_file=1000)
    weights.join_weights(full, largest_file=1000)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{path.name}{end}" for path in (full, small) for end in ("", "_data")
    }
    tiles = {"pixel_values": tiles_of(2).numpy()}
    for path in (full, small):
        ours, expected = (session(folder / path.name).run(None, tiles) for folder in (tmp_path, exported / "onnx"))
        assert all(np.array_equal(*pair) for pair in zip(ours, expected, strict=True))


def test_config_names_files_with_external_data_to_transformers_js(tmp_path, monkeypatch, without_export):
    process = partial(onnx_folder.process_weights, largest_file=1000)
    monkeypatch.setattr(onnx_folder, "process_weights", process)
    figures = convert_to_onnx(ENCODER, tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out" / "onnx").iterdir())
    assert figures["onnx/model.onnx"]["bytes"] == size
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("transformers.js_config") == {"use_external_data_format": {"model.onnx": True}}
    assert config == json.loads((ENCODER / "config.json").read_text())
    assert check_before_publish(tmp_path / "out") == []


def test_the_page_runs_as_written(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "sailvit-large-onnx").symlink_to(exported)
    (tmp_path / "photo.jpg").symlink_to(PHOTOGRAPH)
    scope: dict = {}
    for block in code_blocks(ROOT / "docs" / "onnx.md", "python"):
        exec(block, scope)
    tiles = len(scope["batch"]["pixel_values"])
    assert scope["tokens"].shape == (tiles, GRID**2, WIDTH) and scope["features"].shape == (tiles, 16, 4 * WIDTH)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the checks of shapes
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit is deprecated, and reads deprecated properties
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torch_jit_traces_the_encoder(tower, pixels):
    traced = torch.jit.trace(graph.ExportedEncoder(tower), pixels)
    with torch.inference_mode():
        expected = tower(pixels[:1]).last_hidden_state
        torch.testing.assert_close(traced(pixels[:1])[0], expected)


def test_torch_export_gives_a_program_for_any_number_of_tiles(tower, pixels, tmp_path):
    torch.export.save(graph.export_program(graph.ExportedEncoder(tower)), tmp_path / "encoder.pt2")
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    with torch.inference_mode():
        for tiles in (pixels[:1], pixels.repeat(3, 1, 1, 1)):
            torch.testing.assert_close(program(tiles)[1], tower.get_image_features(tiles))


@pytest.mark.nightly
def test_float16_weights_keep_float32_inputs_and_outputs(tmp_path):
    assert convert(ENCODER, tmp_path / "out", "--to-layout", "onnx", "--dtype", "float16") == 0
    (path,) = (tmp_path / "out" / "onnx").iterdir()
    assert path.name == "model_fp16.onnx" and path.stat().st_size < 0.6 * (ENCODER / "model.safetensors").stat().st_size
    loaded = session(path)
    assert {end.type for end in [*loaded.get_inputs(), *loaded.get_outputs()]} == {"tensor(float)"}
    (figure,) = json.loads((tmp_path / "out" / "provenance.json").read_text())["verification"]["files"].values()
    assert 1e-5 < figure["relative_difference"] <= figure["bound"] == 2e-3
    assert encode(PHOTOGRAPH, "--model", tmp_path / "out", "--out", tmp_path / "tokens", "--no-tile") == 0
    assert encode(PHOTOGRAPH, "--model", ENCODER, "--out", tmp_path / "torch", "--no-tile") == 0
    ours, expected = (load_file(tmp_path / name / "raccoon.jpg.safetensors") for name in ("tokens", "torch"))
    assert relative_difference(ours["tokens"], expected["tokens"]) < 2e-3
    assert check_before_publish(tmp_path / "out") == []


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["transformers", "timm", "sailvit"])
@pytest.mark.parametrize("positions", ["absolute", "sincos"])
def test_every_layout_is_exported_with_learned_and_computed_positions(tmp_path, layout, positions):
    shape = TINY_SHAPE if positions == "absolute" else replace(TINY_SHAPE, grid_size=None)
    if layout == "timm" and positions == "sincos":
        pytest.skip("timm has no computed positions")
    source = make_checkpoint(tmp_path / "source", layout, shape)
    figures = convert_to_onnx(source, tmp_path / "out", dtypes=["float32"], image_size=84)
    assert figures["onnx/model.onnx"]["relative_difference"] < 1e-5
    assert session(tmp_path / "out" / "onnx" / "model.onnx").get_inputs()[0].shape == ["tiles", 3, 84, 84]


@pytest.mark.nightly
def test_int8_of_a_large_encoder_is_a_quarter_of_float32(tmp_path):
    """A third of the blocks: the rest makes the share smaller, since positions and patches stay in float32."""
    source = write_synthetic(tmp_path / "source", published_shape("large", 8))
    figures = convert_to_onnx(source, tmp_path / "out", dtypes=["float32", "int8"], verify=True)
    assert figures["onnx/model_quantized.onnx"]["bytes"] <= 0.27 * figures["onnx/model.onnx"]["bytes"]


@pytest.mark.nightly
@pytest.mark.parametrize("size", ["large", "huge"])
def test_no_process_of_an_export_has_the_weights_more_than_twice(tmp_path, size):
    """Prints the seconds, too."""
    source = write_synthetic(tmp_path / "source", published_shape(size))
    words = ["convert", source, tmp_path / "out", "--to-layout", "onnx", "--dtype", "float32,int8", "--no-verify"]
    seconds, peak = measure(*SAILVIT, *words)  # of the command, or of the largest process that it starts
    weights = (source / "model.safetensors").stat().st_size
    print(f"{size}: {seconds:.0f} s, {peak / weights:.2f} x the weights")
    assert peak < 2 * weights
    files = {path.name for path in (tmp_path / "out" / "onnx").iterdir()}
    assert files == {*FILES.values()} | ({"model.onnx_data"} if size == "huge" else set())


@pytest.mark.nightly
def test_int8_keeps_the_accuracy_of_the_miniatures_probes(exported, tmp_path):
    """Logistic regressions on averaged tokens, fitted for each file; -s prints them. Single sets are too small."""
    write_world(tmp_path / "world", WorldPlan(corpora={}, language=(0, 0), tests=0))
    accuracies = {
        dtype: probe_accuracies(load_onnx(exported, dtype=dtype), tmp_path / "world/probe") for dtype in FILES
    }
    for name, full in accuracies["float32"].items():
        print(f"{name}: float32 {full:.3f}, int8 {accuracies['int8'][name]:.3f}")
    full, small = (float(np.mean([*values.values()])) for values in accuracies.values())
    print(f"mean: float32 {full:.4f}, int8 {small:.4f}")
    assert len(accuracies["int8"]) == 6 and full > 0.6
    assert small > full - 0.01


def probe_accuracies(encoder: OnnxEncoder, folder: Path) -> dict[str, float]:
    """Probe set -> accuracy; sets without pictures to train on are tested with the head of `objects`."""
    processor = SAILViTImageProcessor.from_pretrained(ENCODER)

    def features(images: Path) -> tuple[np.ndarray, list[str]]:
        paths = sorted(images.glob("*/*.png"))
        tiles = processor([Image.open(path) for path in paths], do_tile=False)["pixel_values"]
        means = [encoder.get_image_features(tile[None]).mean(1) for tile in tiles]  # one tile a call, as int8 scales it
        return torch.cat(means).numpy(), [path.parent.name for path in paths]

    heads = {}
    for train in sorted(folder.glob("*/train")):
        heads[train.parent.name] = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        heads[train.parent.name].fit(*features(train))
    return {
        test.parent.name: heads.get(test.parent.name, heads["objects"]).score(*features(test))
        for test in sorted(folder.glob("*/test"))
    }
