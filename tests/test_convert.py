"""`sailvit convert` as a user meets it: from every layout to every runtime, and what it says when it cannot."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PHOTOGRAPH, TINY, TINY_SHAPE, make_checkpoint, published_config, random_pixels, relative_difference
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

import sailvit_cli
from sailvit import SAILViTModel
from sailvit.convert import LAYOUTS, CheckpointError, convert_checkpoint, convert_tensors, inspect_checkpoint
from sailvit.convert.export.code_files import CODE_FILES
from sailvit.convert.export.runtimes import transformers_config
from sailvit.convert.models.aimv2_names import AIMv2Dimensions
from sailvit.convert.storage.errors import VerificationError
from sailvit.convert.synthetic import published_shape, write_synthetic
from sailvit.convert.verify.outputs import TOLERANCE


RUNTIMES = ("sailvit", "transformers", "timm")


@pytest.fixture
def apple(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "apple")


def run(*arguments: object, code: int = 0) -> None:
    assert sailvit_cli.main(["convert", *map(str, arguments)]) == code


def convert(source: Path, out: Path, **options):
    return convert_checkpoint(source, out, **{"verify": False, **options})


def tokens_of(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """By the runtime the folder is for, loaded strictly."""
    config = json.loads((folder / "config.json").read_text())
    if "architecture" in config:
        import timm

        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features(pixels)
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return model.eval()(pixels.to(model.dtype)).last_hidden_state


# What is written


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", RUNTIMES)
def test_every_layout_gives_every_runtime_the_same_tokens(tmp_path, source, target):
    folder = make_checkpoint(tmp_path / "source", source)
    convert(folder, tmp_path / "out", to_layout=target)
    tower = SAILViTModel._from_config(sailvit_config())
    tower.load_state_dict(convert_tensors(load_file(folder / "model.safetensors"), "sailvit"), strict=True)
    pixels = random_pixels(2, 3, 56, 56)
    with torch.no_grad():
        expected = tower.eval()(pixels).last_hidden_state
        assert relative_difference(tokens_of(tmp_path / "out", pixels), expected) < 2e-6


def sailvit_config(**overrides):
    from sailvit import SAILViTConfig

    return SAILViTConfig(**{**TINY, **overrides})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_chain_through_all_layouts_changes_no_bit(tmp_path, dtype):
    first = make_checkpoint(tmp_path / "0", dtype=dtype)
    folder = first
    for number, layout in enumerate([*LAYOUTS, "timm", "transformers", "ovis2", "sailvit"], 1):
        convert(folder, tmp_path / str(number), to_layout=layout, max_shard_size="100KB" if number % 2 else "5GB")
        folder = tmp_path / str(number)
    before, after = (load_file(path / "model.safetensors") for path in (first, folder))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


@pytest.mark.parametrize("target", ["sailvit", "transformers"])
def test_native_checkpoints_keep_their_computed_positions(tmp_path, target):
    folder = make_checkpoint(tmp_path / "native", shape=replace(TINY_SHAPE, grid_size=None))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_size": 56}))
    done = convert(folder, tmp_path / "out", to_layout=target, verify=True)
    assert done.verification["relative_difference"] < TOLERANCE
    assert any("native" in note for note in done.notes)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.get("is_native") or written.get("pos_embed_type") == "sincos"
    assert not any(
        "pos_embed" in name or "position" in name for name in load_file(tmp_path / "out" / "model.safetensors")
    )


def test_native_positions_are_written_out_for_timm(tmp_path):
    pytest.importorskip("timm")
    folder = make_checkpoint(tmp_path / "native", shape=replace(TINY_SHAPE, grid_size=None))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_size": 70}))
    convert(folder, tmp_path / "timm", to_layout="timm")
    convert(folder, tmp_path / "ours")
    pixels = random_pixels(1, 3, 70, 70)
    assert relative_difference(tokens_of(tmp_path / "timm", pixels), tokens_of(tmp_path / "ours", pixels)) < 2e-6


@pytest.mark.parametrize("target", RUNTIMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_image_size_is_what_timm_makes_of_it(tmp_path, apple, target, dtype):
    pytest.importorskip("timm")
    from timm.layers import resample_abs_pos_embed

    done = convert(apple, tmp_path / "out", to_layout=target, image_size=98, dtype=dtype)
    positions = load_file(apple / "model.safetensors")["preprocessor.pos_embed"]
    expected = resample_abs_pos_embed(positions, [7, 7], num_prefix_tokens=0)
    written = convert_tensors(load_file(tmp_path / "out" / "model.safetensors"), "sailvit")["preprocessor.pos_embed"]
    torch.testing.assert_close(written, expected.to(written.dtype))
    recorded = json.loads((tmp_path / "out" / "provenance.json").read_text())["positions"]
    assert recorded == {"from": [4, 4], "to": [7, 7], "method": "bicubic, antialiased, in float32"} == done.positions
    assert tokens_of(tmp_path / "out", random_pixels(1, 3, 98, 98)).shape == (1, 49, 64)


@pytest.mark.parametrize(
    ("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_a_cast_rounds_as_torch_does(tmp_path, before, after):
    folder = make_checkpoint(tmp_path / "source", "transformers", dtype=before)
    convert(folder, tmp_path / "out", dtype=after)
    expected = convert_tensors(load_file(folder / "model.safetensors"), "sailvit")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor.to(getattr(torch, after)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == after


def test_the_folder_loads_offline_and_silently_with_remote_code(tmp_path, apple):
    from test_hub_folder import CARD, run_isolated

    convert(apple, tmp_path / "out", max_shard_size="100KB")
    run_isolated(CARD, tmp_path / "out", PHOTOGRAPH, tmp_path / "tokens.pt", home=tmp_path)
    assert torch.load(tmp_path / "tokens.pt")[0].shape == (1, 16, 64)


def test_an_exported_folder_needs_no_code_of_ours(tmp_path, apple):
    from test_hub_folder import run_isolated

    convert(apple, tmp_path / "out", to_layout="transformers")
    script = """
import sys
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
processor, model = AutoImageProcessor.from_pretrained(sys.argv[1]), AutoModel.from_pretrained(sys.argv[1])
pixels = processor(Image.open(sys.argv[2]), return_tensors="pt")
print(type(model).__name__, tuple(model(**pixels).last_hidden_state.shape))
assert "sailvit" not in sys.modules
"""
    assert run_isolated(script, tmp_path / "out", PHOTOGRAPH, home=tmp_path) == "Aimv2VisionModel (1, 16, 64)\n"
    assert not list((tmp_path / "out").glob("*.py"))


def test_image_normalisation_is_taken_from_the_source(tmp_path, apple):
    pytest.importorskip("timm")
    import timm

    clip = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    assert any("assumed" in note for note in convert(apple, tmp_path / "assumed").notes)
    (apple / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", **clip}))
    for target in RUNTIMES:
        assert not any("assumed" in note for note in convert(apple, tmp_path / target, to_layout=target).notes)
    image = Image.open(PHOTOGRAPH).resize((56, 56))
    ours = AutoImageProcessor.from_pretrained(tmp_path / "sailvit")(image, do_tile=False)["pixel_values"]
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "transformers")(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    torch.testing.assert_close(transform(image)[None], ours, rtol=0, atol=1e-5)
    convert(tmp_path / "timm", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())["image_mean"] == clip["image_mean"]


def test_a_sailvit_keeps_the_settings_of_its_processor(tmp_path, apple):
    convert(apple, tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "preprocessor_config.json").read_text())
    (tmp_path / "a" / "preprocessor_config.json").write_text(json.dumps({**settings, "max_tiles": 12}))
    convert(tmp_path / "a", tmp_path / "b", image_size=84)
    written = json.loads((tmp_path / "b" / "preprocessor_config.json").read_text())
    assert written == {**settings, "max_tiles": 12, "size": {"height": 84, "width": 84}}


def test_provenance_tells_where_every_byte_came_from(tmp_path, apple):
    (apple / "README.md").write_text("---\nlicense: other\nlicense_name: apple-amlr\n---\n# AIMv2\n")
    convert(apple, tmp_path / "out", dtype="float16", max_shard_size="100KB")
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["source"]["name"] == "apple" and record["options"]["dtype"] == "float16"
    for name, entry in record["source"]["files"].items():
        assert entry["sha256"] == hashlib.sha256((apple / name).read_bytes()).hexdigest()
    assert set(record["source"]["files"]) == {"model.safetensors", "config.json", "README.md"}
    for path in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert record["tensors"][name]["sha256"] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert "license_name: apple-amlr" in (tmp_path / "out" / "README.md").read_text()
    convert(tmp_path / "out", tmp_path / "again", to_layout="timm")
    assert json.loads((tmp_path / "again" / "provenance.json").read_text())["source"]["source"]["name"] == "apple"


def test_a_large_file_that_is_mostly_unread_is_recorded_without_a_hash(tmp_path):
    source = make_checkpoint(tmp_path / "ovis", "ovis2")
    tensors = load_file(source / "model.safetensors")
    taken = sum(tensor.nbytes for tensor in tensors.values())
    save_file({**tensors, "llm.weight": torch.zeros(1_000_000)}, source / "model.safetensors")
    convert_checkpoint(source, tmp_path / "out", verify=False)
    files = json.loads((tmp_path / "out" / "provenance.json").read_text())["source"]["files"]
    assert files["model.safetensors"] == {"bytes": (source / "model.safetensors").stat().st_size, "taken": taken}
    assert "sha256" in files["config.json"]


def test_the_card_of_a_folder_runs(tmp_path, apple, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for target in RUNTIMES:
        if target == "timm":
            pytest.importorskip("timm")
        convert(apple, Path(target), to_layout=target)
        code = (tmp_path / target / "README.md").read_text().split("```python\n")[1].split("```")[0]
        scope: dict = {}
        exec(code.replace("image.jpg", str(PHOTOGRAPH)), scope)
        assert sum(parameter.numel() for parameter in scope["model"].parameters()) == 143_680


def test_the_record_of_a_training_run_is_checked_and_copied(tmp_path, apple):
    stages = [{"stage": 1, "recipe": "alignment", "learning_rate": 2e-4}, {"stage": 2, "kinds": ["ocr", "caption"]}]
    (apple / "training.json").write_text(json.dumps({"training": {"stages": stages, "tokens_seen": 9}}))
    convert(apple, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["training"] == {"stages": stages, "tokens_seen": 9} and "training.json" in record["source"]["files"]
    (apple / "training.json").write_text(json.dumps({"training": {"stages": [{"stage": {"number": 1}}]}}))
    with pytest.raises(CheckpointError, match=r"training\.json: training\.stages\[0\]\.stage: expected a number or a"):
        convert(apple, tmp_path / "other")


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_training_checkpoints_of_torch_are_converted(tmp_path, apple, suffix):
    tensors = load_file(apple / "model.safetensors")
    wrapped = {f"module.vision_model.{name}": tensor for name, tensor in tensors.items()}
    source = tmp_path / f"stage.{suffix}"
    torch.save(
        {"model": wrapped | {"module.mlp1.0.weight": torch.ones(4)}, "optimizer": {"lr": 1.0}, "epoch": 1}, source
    )
    shutil.copy(apple / "config.json", tmp_path)
    done = convert(source, tmp_path / "out")
    assert done.match.prefix == "model.vision_model." and done.match.wrappers == ["module"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


# Verification


@pytest.mark.parametrize(
    ("source", "target", "reference"),
    [
        ("sailvit", "sailvit", "timm"),
        ("transformers", "timm", "Aimv2VisionModel"),
        ("timm", "transformers", "timm"),
        ("ovis2-transformers", "sailvit", "Ovis2VisionModel"),
    ],
)
def test_verification_asks_the_sources_own_code(tmp_path, source, target, reference):
    pytest.importorskip("timm")
    folder = make_checkpoint(tmp_path / "source", source)
    figures = convert(
        folder, tmp_path / "out", to_layout=target, image_size=84, dtype="bfloat16", verify=True
    ).verification
    assert figures["reference"].startswith(reference) and 0 <= figures["relative_difference"] < 1e-5
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["verification"] == figures


@pytest.mark.slow
@pytest.mark.parametrize(("target", "reference"), [("sailvit", "Aimv2VisionModel"), ("transformers", "SAILViTModel")])
def test_verification_without_timm_asks_code_that_is_not_the_folders(tmp_path, apple, monkeypatch, target, reference):
    from sailvit.convert.models import aimv2_reference

    monkeypatch.setattr(aimv2_reference, "find_spec", lambda name: None)
    figures = convert(apple, tmp_path / "out", to_layout=target, image_size=84, verify=True).verification
    assert figures["reference"].startswith(reference) and figures["relative_difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        {
            "trunk.blocks.{}.mlp.fc1": "encoder.layers.{}.ffn.up_proj",
            "trunk.blocks.{}.mlp.fc3": "encoder.layers.{}.ffn.gate_proj",
        },
        {"trunk.blocks.{}.attn.qkv": tuple(f"encoder.layers.{{}}.attention.{part}_proj" for part in "vkq")},
        {
            "trunk.blocks.{}.norm_1": "encoder.layers.{}.rms_norm2",
            "trunk.blocks.{}.norm_2": "encoder.layers.{}.rms_norm1",
        },
    ],
    ids=["gate and up", "q and v", "norms"],
)
def test_a_table_with_two_names_exchanged_is_caught(tmp_path, apple, monkeypatch, capsys, wrong):
    layout = LAYOUTS["transformers"]
    monkeypatch.setitem(LAYOUTS, "transformers", replace(layout, modules={**layout.modules, **wrong}))
    run(apple, tmp_path / "out", "--to-layout", "transformers", code=1)
    error = capsys.readouterr().err
    assert "the folder's tokens differ from those of" in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple"]


@pytest.mark.slow
def test_a_folder_that_does_not_load_is_caught(tmp_path, apple, monkeypatch):
    monkeypatch.setitem(CODE_FILES, "sailvit", CODE_FILES["sailvit"][-1:])
    with pytest.raises(VerificationError, match="does not load in a clean process"):
        convert(apple, tmp_path / "out", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple"]


@pytest.mark.nightly
@pytest.mark.parametrize(("size", "blocks"), [("base", 12), ("large", 24), ("huge", 2), ("1b", 2), ("3b", 2)])
@pytest.mark.parametrize("target", RUNTIMES)
def test_published_shapes_are_loaded_strictly_and_give_equal_tokens(tmp_path, size, blocks, target):
    source = write_synthetic(
        tmp_path / "source", published_shape(size, blocks=blocks), "transformers", dtype="bfloat16"
    )
    config = published_config("transformers", published_shape(size, blocks=blocks))
    config["num_attention_heads"] = config["hidden_size"] // 128
    (source / "config.json").write_text(json.dumps(config))
    done = convert(source, tmp_path / "out", to_layout=target, verify=True)
    assert done.verification["relative_difference"] < 1e-5
    assert inspect_checkpoint(tmp_path / "out").ok


# What is refused: one line that names the file or tensor and the mend, exit code 2, and no OUT


def rewrite(folder: Path, change, layout: str = "sailvit") -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_config(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def tensors(change):
    return lambda folder: rewrite(folder, change)


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 300_000)


def spoil(name: str, value: float):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return lambda folder: rewrite(folder, change)


QKV = "trunk.blocks.1.attn.qkv.weight"
BAD = {
    "truncated": (cut, [], r"model\.safetensors: cut short.*copy or download it again"),
    "header flipped": (lambda folder: flip(folder, 20), [], r"model\.safetensors: "),
    "NaN": (spoil(QKV, float("nan")), [], rf"{QKV} holds NaN or infinity"),
    "infinite": (spoil("preprocessor.pos_embed", float("inf")), [], "preprocessor.pos_embed holds NaN"),
    "beyond half": (spoil(QKV, 1e6), ["--dtype", "float16"], rf"{QKV} has values beyond F16: try --dtype bfloat16"),
    "missing": (tensors(lambda all: {name: t for name, t in all.items() if name != QKV}), [], rf"{QKV}: missing"),
    "empty": (tensors(lambda all: all.update({QKV: torch.empty(0)})), [], rf"{QKV}: empty.*ZeRO-3"),
    "misshapen": (tensors(lambda all: all.update({QKV: torch.ones(64, 192)})), [], r"qkv\.weight: .* got \[64, 192\]"),
    "too much": (tensors(lambda all: all.update({"cls_token": torch.ones(1)})), [], r"cls_token: has no mapping"),
    "mixed": (tensors(lambda all: all.update({QKV: all[QKV].half()})), [], r"qkv\.weight: expected F32 .*, got F16"),
    "whole numbers": (tensors(lambda all: all.update({QKV: all[QKV].to(torch.int8)})), ["--dtype", "float32"], "I8"),
    "doubles": (tensors(lambda all: {name: t.double() for name, t in all.items()}), [], "F64: choose with --dtype"),
    "another": (tensors(lambda all: {"model.embed_tokens.weight": torch.ones(2, 2)}), [], "no AIMv2 encoder"),
    "config width": (with_config(hidden_size=128), [], r"hidden_size: expected 64 as in the tensors, got 128"),
    "config depth": (with_config(num_hidden_layers=24), [], r"num_hidden_layers: expected 3 as in the tensors, got 24"),
    "config size": (with_config(image_size=448), [], r"image_size: expected 56 as in the tensors, got 448"),
    "config heads": (with_config(num_attention_heads=3), [], r"num_attention_heads: expected .* got 3.*config\.json"),
    "config kind": (with_config(pos_embed_type="sincos"), [], r"pos_embed_type: expected 'absolute'.* got 'sincos'"),
    "no config": (lambda folder: (folder / "config.json").unlink(), [], r"num_attention_heads: expected .* got None"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), [], r"config\.json: not JSON"),
    "size no multiple": (lambda folder: None, ["--image-size", "450"], "--image-size: expected a multiple.* got 450"),
    "not that layout": (lambda folder: None, ["--from-layout", "timm"], "no AIMv2 encoder.*timm's aimv2"),
    "two towers": (
        tensors(lambda all: {f"{side}.{name}": t.clone() for side in "ab" for name, t in all.items()}), [], "--prefix"
    ),
    "odd epsilon": (with_config(rms_norm_eps=1e-6), ["--to-layout", "timm"], "timm has rms_norm_eps 1e-5"),
    "shard size": (lambda folder: None, ["--max-shard-size", "many"], "many: expected a size such as 200MB"),
}  # fmt: skip


def flip(folder: Path, at: int) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[at] ^= 0x10
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_no_folder(tmp_path, apple, capsys, kind):
    spoil_it, options, message = BAD[kind]
    spoil_it(apple)
    run(apple, tmp_path / "out", "--no-verify", *options, code=2)
    error = capsys.readouterr().err
    assert error.startswith("sailvit convert: ") and error.count("\n") == 1
    import re

    assert re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple"]


NONSENSE = [
    {"num_attention_heads": None},
    {"num_attention_heads": "2"},
    {"rms_norm_eps": "x"},
    {"rms_norm_eps": -1},
    {"hidden_act": ["x"]},
    {"hidden_act": "abc"},
    {"image_size": [56, 70]},
    {"num_hidden_layers": 0},
]


@pytest.mark.parametrize("change", NONSENSE)
def test_invalid_configuration_values_are_refused(tmp_path, apple, capsys, change):
    """At no width that is published are heads, or anything else, guessed."""
    with_config(**change)(apple)
    run(apple, tmp_path / "out", "--no-verify", code=2)
    assert next(iter(change)) in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_heads_of_published_widths_are_known(tmp_path):
    source = write_synthetic(tmp_path / "base", published_shape("base"), dtype="bfloat16")
    (source / "config.json").unlink()
    assert convert(source, tmp_path / "out").fields["num_attention_heads"] == 6
    rewrite(source, lambda all: {name: t for name, t in all.items() if "blocks.11." not in name})
    with pytest.raises(CheckpointError, match="expected 12 blocks as in AIMv2 base, got 11"):
        convert(source, tmp_path / "again")


def timm_folder(folder: Path, **arguments) -> torch.nn.Module:
    """Saved by timm itself."""
    timm = pytest.importorskip("timm")
    arguments = {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 56, "mlp_ratio": 1.5, **arguments}
    model = timm.create_model("aimv2_large_patch14_224", num_classes=0, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    timm.models.save_for_hf(model.eval(), folder, model_args=arguments)
    return model


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_what_timm_saves_is_converted_with_its_activation(tmp_path, activation):
    model = timm_folder(tmp_path / "timm", act_layer=activation)
    convert(tmp_path / "timm", tmp_path / "out", verify=True)
    pixels = random_pixels(1, 3, 56, 56)
    with torch.no_grad():
        assert relative_difference(tokens_of(tmp_path / "out", pixels), model.forward_features(pixels)) < 2e-6


def test_arguments_of_timm_that_nothing_here_knows_are_refused(tmp_path):
    timm_folder(tmp_path / "timm")
    with_config(model_args={"embed_dim": 64, "rope_temperature": 100})(tmp_path / "timm")
    with pytest.raises(CheckpointError, match="model_args: rope_temperature not supported"):
        convert(tmp_path / "timm", tmp_path / "out")


def test_unexpected_biases_are_reported(tmp_path):
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    fields = transformers_config({**TINY, "use_bias": False, "pos_embed_type": "absolute"}) | {"qkv_bias": True}
    Aimv2VisionModel(Aimv2VisionConfig(**fields)).save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match="expected biases in attention and mlp or in neither"):
        convert(tmp_path / "source", tmp_path / "out")


def test_a_smaller_tower_is_not_passed_over(tmp_path, apple):
    small, large = (load_file(apple / "model.safetensors") for _ in range(2))
    small = {name: t for name, t in small.items() if not name.startswith(("trunk.blocks.1.", "trunk.blocks.2."))}
    both = {f"student.{name}": t for name, t in small.items()} | {f"teacher.{name}": t for name, t in large.items()}
    torch.save(both, tmp_path / "both.pt")
    with pytest.raises(CheckpointError, match="more than one AIMv2 encoder"):
        convert(tmp_path / "both.pt", tmp_path / "out")


def test_an_index_that_keeps_a_tensor_back_is_refused(tmp_path):
    source = make_checkpoint(tmp_path / "source", max_shard_size="100KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if "blocks.2." not in name}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with_config(num_hidden_layers=2)(source)
    with pytest.raises(CheckpointError, match=r"blocks\.2\..*but not in "):
        convert(source, tmp_path / "out")


def test_a_flipped_bit_of_a_pickle_is_found_by_its_checksum(tmp_path, apple):
    torch.save(load_file(apple / "model.safetensors"), apple / "stage.pt")
    content = bytearray((apple / "stage.pt").read_bytes())
    content[len(content) // 2] ^= 0x55
    (apple / "stage.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"stage\.pt: .* is corrupt"):
        convert(apple / "stage.pt", tmp_path / "out")
    assert [problem.kind for problem in inspect_checkpoint(apple / "stage.pt", deep=True).problems] == ["values"]


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", b"<html>404</html>"]
)
def test_a_download_that_failed_is_not_advised_to_be_trusted(tmp_path, capsys, content):
    (tmp_path / "model.bin").write_bytes(content)
    run(tmp_path / "model.bin", tmp_path / "out", code=2)
    assert "trust" not in (error := capsys.readouterr().err) and "download it again" in error


def test_a_block_with_an_absurd_number_is_refused_at_once(tmp_path, apple):
    rewrite(apple, lambda all: {**all, "trunk.blocks.99999999.norm_1.weight": torch.ones(64)})
    with pytest.raises(CheckpointError, match="expected a block index below 1000"):
        convert(apple, tmp_path / "out")


def test_pictures_scaled_otherwise_come_out_the_same_everywhere(tmp_path, apple):
    timm = pytest.importorskip("timm")
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "rescale_factor": 1 / 127.5}
    (apple / "processor_config.json").write_text(json.dumps({"image_processor": {**said, "do_center_crop": True}}))
    image, pixels = Image.open(PHOTOGRAPH).resize((56, 56)), []
    for target in RUNTIMES:
        notes = convert(apple, tmp_path / target, to_layout=target).notes
        assert any("crops" in note for note in notes) and not any("assumed" in note for note in notes)
    for target in RUNTIMES[:2]:
        options = {"do_tile": False} if target == "sailvit" else {}
        processor = AutoImageProcessor.from_pretrained(tmp_path / target, **options)
        pixels.append(processor(image, return_tensors="pt")["pixel_values"])
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    pixels.append(timm.data.create_transform(**timm.data.resolve_model_data_config(model))(image)[None])
    for other in pixels[1:]:
        torch.testing.assert_close(other, pixels[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "said",
    [
        {"image_std": [1, 1, 1]},
        {"image_mean": "x", "image_std": [1]},
        {"image_mean": [0], "image_std": [0]},
        {"rescale_factor": "x"},
    ],
)
def test_pictures_that_cannot_be_normalised_so_are_refused(tmp_path, apple, said):
    (apple / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"(image_(mean|std)|rescale_factor): expected a .*, got"):
        convert(apple, tmp_path / "out")


def test_a_grid_that_the_pixel_shuffle_does_not_divide_is_reported(tmp_path, apple):
    assert any("pixel shuffle" in note for note in convert(apple, tmp_path / "out", image_size=42).notes)


WRONG = [
    {"dtype": "fp32"},
    {"image_size": 0},
    {"image_size": "56"},
    {"max_shard_size": ""},
    {"max_shard_size": -1},
    {"to_layout": ""},
    {"from_layout": "foo"},
]


@pytest.mark.parametrize("options", WRONG)
def test_wrong_arguments_are_named(tmp_path, apple, options):
    with pytest.raises(CheckpointError):
        convert(apple, tmp_path / "a" / "b", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple"]


@pytest.mark.slow
def test_a_termination_leaves_nothing(tmp_path, apple):
    script = "import sys, sailvit_cli; sys.exit(sailvit_cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "convert", apple, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(1)  # it is being verified
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple"]


def test_a_missing_shard_is_named(tmp_path, capsys):
    source = make_checkpoint(tmp_path / "source", max_shard_size="100KB")
    (source / "model-00002-of-00006.safetensors").unlink()
    run(source, tmp_path / "out", code=2)
    assert "model-00002-of-00006.safetensors: the file is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_of_data_is_found_by_the_record_of_the_source(tmp_path, apple, capsys):
    convert(apple, tmp_path / "a")
    flip(tmp_path / "a", 300_000)
    run(tmp_path / "a", tmp_path / "out", code=2)
    assert "is not what provenance.json recorded" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_pickle_that_wants_code_is_refused(tmp_path, apple, capsys):
    from argparse import Namespace

    torch.save({"model": load_file(apple / "model.safetensors"), "args": Namespace(lr=1)}, tmp_path / "stage.pt")
    shutil.copy(apple / "config.json", tmp_path)
    run(tmp_path / "stage.pt", tmp_path / "out", code=2)
    assert "Namespace" in (error := capsys.readouterr().err) and "--trust-pickle" in error
    run(tmp_path / "stage.pt", tmp_path / "out", "--trust-pickle", "--no-verify")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_out_is_not_the_source_and_not_replaced_unasked(tmp_path, apple, capsys):
    before = (apple / "model.safetensors").read_bytes()
    run(apple, apple, "--overwrite", code=2)
    run(apple, tmp_path, "--overwrite", code=2)
    for overwrite in ([], ["--overwrite"]):
        run(apple, apple / "sub" / "out", *overwrite, code=2)
        assert "is inside the source" in capsys.readouterr().err and not (apple / "sub").exists()
    run(apple / "model.safetensors", tmp_path / "out", "--no-verify")
    run(apple, tmp_path / "out", code=2)
    assert "give --overwrite" in capsys.readouterr().err
    run(apple, tmp_path / "out", "--overwrite", "--no-verify", "--dtype", "float16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert (apple / "model.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_out_may_be_beside_a_file_that_is_the_source(tmp_path, apple):
    run(apple / "model.safetensors", apple / "out", "--no-verify")
    assert (apple / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("source", ["nowhere", "../nowhere", "no/where/at/all", "", "nobody/nothing"])
def test_a_source_that_is_not_there_is_named(tmp_path, capsys, source):
    run(source, tmp_path / "out", code=2)
    error = capsys.readouterr().err
    assert error.startswith(f"sailvit convert: {source or 'an empty name'}: no such f") and error.count("\n") == 1


def test_a_folder_without_weights_or_with_several_is_refused(tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    run(folder, tmp_path / "out", code=2)
    assert "no weights" in capsys.readouterr().err
    for name in ("a.pt", "b.pt"):
        (folder / name).write_bytes(b"")
    run(folder, tmp_path / "out", code=2)
    assert "several (a.pt, b.pt): name the file" in capsys.readouterr().err


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, apple):
    """The limit on the size of a file stands in for a full disk: the same kind of error, at the same place."""
    script = "import sys, sailvit_cli; sys.exit(sailvit_cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "convert", str(apple), str(tmp_path / "out"), "--no-verify"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "out" in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple"]


def test_a_full_disk_is_reported_before_writing(tmp_path, apple, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    run(apple, tmp_path / "out", code=2)
    assert "are free" in capsys.readouterr().err and sorted(path.name for path in tmp_path.iterdir()) == ["apple"]


@pytest.mark.slow
def test_a_kill_at_any_point_leaves_the_old_folder_or_none(tmp_path):
    shape = AIMv2Dimensions(256, 512, 24, 3, 14, 32)
    source = make_checkpoint(tmp_path / "source", shape=shape)
    convert(source, tmp_path / "old", dtype="bfloat16")
    script = "import sys, sailvit_cli; sys.exit(sailvit_cli.main(sys.argv[1:]))"
    arguments = ["--no-verify", "--max-shard-size", "20MB", "--overwrite"]
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", script, "convert", source, tmp_path / "timed", *arguments], check=True)
    whole = time.monotonic() - started
    shutil.rmtree(tmp_path / "timed")
    before = (tmp_path / "old" / "provenance.json").read_bytes()
    for target in ("new", "old"):
        for step in range(6):
            process = subprocess.Popen([sys.executable, "-c", script, "convert", source, tmp_path / target, *arguments])
            try:
                process.wait(timeout=whole * (step + 0.5) / 6)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            if (tmp_path / target).exists():
                old = (tmp_path / target / "provenance.json").read_bytes() == before
                assert old or inspect_checkpoint(tmp_path / target, deep=True).ok
    convert(source, tmp_path / "new", overwrite=True)
    convert(source, tmp_path / "old", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old", "source"]


@pytest.mark.nightly
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_memory_is_bounded_by_a_shard_not_by_the_checkpoint(tmp_path, suffix):
    from processes import SAILVIT, idle_bytes, measure

    source = write_synthetic(tmp_path / "source", published_shape("huge", blocks=6)) / "model.safetensors"
    largest, total = 3 * 1536 * 1536 * 4, source.stat().st_size
    if suffix == "bin":
        torch.save(load_file(source), source.with_suffix(".bin"))
        source.unlink()
        source = source.with_suffix(".bin")
    shard = 100_000_000
    _, peak = measure(*SAILVIT, "convert", source, tmp_path / "out", "--no-verify", "--max-shard-size", shard)
    # torch maps a pickle into memory: what was read of it counts, though the system may take it back
    idle = idle_bytes() if suffix == "safetensors" else measure(sys.executable, "-c", "import torch")[1] + total
    assert peak - idle < 1.5 * (largest + shard) and total > 4 * (largest + shard)


def test_an_interrupt_leaves_nothing(tmp_path, apple, monkeypatch):
    from sailvit.convert.models import aimv2

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(aimv2, "write_conversion_card", interrupted)
    run(apple, tmp_path / "out", code=130)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple"]


def test_unknown_layouts_are_an_error(tmp_path, apple):
    with pytest.raises(CheckpointError, match=r"layout: expected one of sailvit.*got 'jax'"):
        convert(apple, tmp_path / "out", to_layout="jax")
