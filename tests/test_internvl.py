"""InternViT and InternLM2, published with code of their own, become models that plain transformers loads."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PHOTOGRAPH, random_pixels, relative_difference
from hypothesis import given, settings
from hypothesis import strategies as st
from internvl_reference import internlm2_logits, internvit_tokens
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from sailvit.convert import CheckpointError, convert_checkpoint
from sailvit.convert.models import internlm2, internvit
from sailvit.convert.models.internlm2 import InternLM2Dimensions, is_internlm2, plan_internlm2
from sailvit.convert.models.internlm2_tokenizer import SPECIAL_TOKENS, build_tokenizer, read_sentencepiece
from sailvit.convert.models.internvit import InternViTDimensions, is_internvit
from sailvit.convert.models.name_tables import plan_tensors, qkv_group_slices, tensor_specs
from sailvit.convert.plan import Options
from sailvit.convert.storage.checkpoint import FileCheckpoint
from sailvit.convert.storage.errors import VerificationError
from sailvit.convert.storage.sources import find_source
from sailvit.convert.storage.tensors import CHUNK
from sailvit.convert.verify import outputs


VIT = InternViTDimensions(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_channels=3, patch_size=14, grid_size=4,
    qkv_bias=True, norm_bias=True, qk_norm=False,
)  # fmt: skip
VIT_6B = replace(VIT, qkv_bias=False, norm_bias=False, qk_norm=True)
VIT_CONFIG = {
    "model_type": "intern_vit_6b", "architectures": ["InternVisionModel"],
    "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"}, "torch_dtype": "float32",
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_channels": 3,
    "image_size": 56, "patch_size": 14, "norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True,
    "layer_norm_eps": 1e-6, "hidden_act": "gelu", "attention_dropout": 0.0, "dropout": 0.0, "drop_path_rate": 0.0,
    "initializer_factor": 0.1, "initializer_range": 1e-10,
}  # fmt: skip
VIT_6B_CONFIG = {**VIT_CONFIG, "norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
LM = InternLM2Dimensions(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8, attention_bias=False, tie_word_embeddings=False,
)  # fmt: skip
LM_CONFIG = {
    "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "attn_implementation": "eager",
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}, "torch_dtype": "float32",
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "bias": False, "hidden_act": "silu", "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "initializer_range": 0.02,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False, "pretraining_tp": 1,
}  # fmt: skip
MOVED_BY_NAME = {
    "model.tok_embeddings": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "output.weight": "lm_head.weight",
}


def stored_shapes(dimensions: InternViTDimensions | InternLM2Dimensions) -> dict[str, tuple[int, ...]]:
    module = internvit if isinstance(dimensions, InternViTDimensions) else internlm2
    return {spec.name: spec.shape for spec in tensor_specs(module.ORIGINAL, dimensions)}


def random_weights(shape: InternViTDimensions | InternLM2Dimensions, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor random, so that a mistaken one shows; of a size at which every block counts."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, dimensions in stored_shapes(shape).items():
        noise = torch.randn(dimensions, generator=generator)
        flat = len(dimensions) < 2
        weights[name] = (1 if name.endswith(".weight") else 0) + 0.3 * noise if flat else noise / dimensions[-1] ** 0.5
    return weights


def write(folder: Path, weights: dict[str, torch.Tensor], config: dict, prefix: str = "") -> Path:
    folder.mkdir(parents=True)
    save_file({prefix + name: tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def vit(tmp_path) -> Path:
    return write(tmp_path / "vit", random_weights(VIT), VIT_CONFIG)


@pytest.fixture
def lm(tmp_path) -> Path:
    return write(tmp_path / "lm", random_weights(LM), LM_CONFIG)


def convert(source: Path, out: Path, verify: bool = False, **options):
    return convert_checkpoint(source, out, verify=verify, **options)


def load(folder: Path, auto=AutoModel):
    model, report = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    return model.eval()


# InternViT


@pytest.mark.parametrize(
    ("shape", "config"), [(VIT, VIT_CONFIG), (VIT_6B, VIT_6B_CONFIG)], ids=["LayerNorm", "RMSNorm of qk"]
)
def test_an_internvit_gives_the_tokens_of_its_own_code(tmp_path, shape, config):
    weights, pixels = random_weights(shape), random_pixels(2, 3, 56, 56)
    convert(write(tmp_path / "vit", weights, config), tmp_path / "out")
    model = load(tmp_path / "out")
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state
    assert type(model).__name__ == "InternVLVisionModel" and tokens.shape == (2, 17, 32)
    assert relative_difference(tokens, internvit_tokens(weights, config, pixels)) < 2e-6
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == model.state_dict().keys()
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


def test_every_number_of_an_internvit_is_where_it_belongs(tmp_path, vit):
    before = load_file(vit / "model.safetensors")
    convert(vit, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for end in ("weight", "bias"):
        parts = [written[f"encoder.layer.1.attention.{part}_proj.{end}"] for part in "qkv"]
        assert torch.equal(torch.cat(parts), before[f"encoder.layers.1.attn.qkv.{end}"])
    assert_same_numbers(before, written)


def assert_same_numbers(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    values = [torch.cat([tensor.flatten() for tensor in tensors.values()]).sort()[0] for tensors in (before, after)]
    assert torch.equal(*values)


def test_internvit_images_are_prepared_as_in_its_release(tmp_path, vit):
    clip = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.26, 0.27]}
    assert any("assumed" in note for note in convert(vit, tmp_path / "assumed").notes)
    (vit / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPFeatureExtractor", "do_center_crop": True, "crop_size": 56, **clip})
    )
    assert any("crops" in note for note in convert(vit, tmp_path / "out").notes)
    with Image.open(PHOTOGRAPH) as image:
        pixels = AutoImageProcessor.from_pretrained(tmp_path / "out")(image, return_tensors="pt")["pixel_values"]
        expected = torch.frombuffer(bytearray(image.convert("RGB").resize((56, 56), 3).tobytes()), dtype=torch.uint8)
    expected = (expected.view(56, 56, 3) / 255 - torch.tensor(clip["image_mean"])) / torch.tensor(clip["image_std"])
    assert (pixels[0].permute(1, 2, 0) - expected).abs().max() < 0.05


# InternLM2


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (6, 1), (6, 6), (4, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_an_internlm2_gives_the_logits_of_its_own_code(tmp_path, heads, groups, bias):
    shape = replace(
        LM, num_attention_heads=heads, num_key_value_heads=groups, head_dim=48 // heads, attention_bias=bias
    )
    config = {**LM_CONFIG, "num_attention_heads": heads, "num_key_value_heads": groups, "bias": bias}
    weights = random_weights(shape)
    convert(write(tmp_path / "lm", weights, config), tmp_path / "out")
    model = load(tmp_path / "out", AutoModelForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    for length in (20, 70):  # within the model's own length, and beyond it, where the rotation changes
        ids = torch.randint(96, (length,), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        torch.testing.assert_close(logits, internlm2_logits(weights, config, ids), rtol=0, atol=1e-5)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == model.state_dict().keys()


def test_heads_need_not_fill_the_width(tmp_path):
    weights = random_weights(replace(LM, head_dim=4))
    done = convert(write(tmp_path / "lm", weights, {**LM_CONFIG, "head_dim": 4}), tmp_path / "out", verify=True)
    assert done.verification["loaded"] == "LlamaForCausalLM"
    assert load(tmp_path / "out", AutoModelForCausalLM).model.layers[0].self_attn.o_proj.weight.shape == (48, 24)


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 1}, {"type": "linear", "factor": 4}])
def test_a_rotation_that_is_not_dynamic_is_kept(tmp_path, lm, scaling):
    config = {**LM_CONFIG, "rope_scaling": scaling}
    (lm / "config.json").write_text(json.dumps(config))
    convert(lm, tmp_path / "out")
    ids = torch.arange(70) % 96
    with torch.no_grad():
        logits = load(tmp_path / "out", AutoModelForCausalLM)(ids[None]).logits[0]
    expected = internlm2_logits(load_file(lm / "model.safetensors"), config, ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dimensions", [VIT, VIT_6B, LM, replace(LM, attention_bias=True, num_key_value_heads=6)])
def test_original_names_round_trip(dimensions):
    module = internvit if isinstance(dimensions, InternViTDimensions) else internlm2
    weights = random_weights(dimensions)
    original, converted = (tensor_specs(scheme, dimensions) for scheme in (module.ORIGINAL, module.CONVERTED))
    moved = weights
    for plan in (plan_tensors(original, converted), plan_tensors(converted, original)):
        slices = {
            one.target: [moved[name].reshape(-1)[start:stop] for name, start, stop in one.sources] for one in plan
        }
        moved = {target.name: torch.cat(parts).reshape(target.shape) for target, parts in slices.items()}
    assert moved.keys() == weights.keys() and all(torch.equal(moved[name], one) for name, one in weights.items())


@settings(max_examples=60, deadline=None)
@given(groups=st.integers(1, 5), queries=st.integers(1, 5), head_dim=st.integers(1, 4), columns=st.integers(1, 3))
def test_groups_are_taken_apart_as_einops_takes_them(groups, queries, head_dim, columns):
    from einops import rearrange

    wqkv = torch.arange(groups * (queries + 2) * head_dim * columns)
    apart = rearrange(wqkv, "(h gs d c) -> h gs (d c)", h=groups, gs=queries + 2, c=columns)
    expected = [apart[:, :queries].flatten(), apart[:, -2].flatten(), apart[:, -1].flatten()]
    runs = qkv_group_slices(groups, [rows * head_dim * columns for rows in (queries, 1, 1)])
    for own, part in zip(runs, expected, strict=True):
        assert torch.equal(torch.cat([wqkv[start:stop] for start, stop in own]), part)
    assert sorted(index for own in runs for run in own for index in range(*run)) == wqkv.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_of_an_internlm2_is_where_it_belongs(tmp_path, dtype):
    shape = replace(LM, attention_bias=True)
    before = {name: tensor.to(dtype) for name, tensor in random_weights(shape).items()}
    source = write(tmp_path / "lm", before, {**LM_CONFIG, "bias": True})
    convert(source, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert_same_numbers(before, written)
    for name, tensor in before.items():
        if "wqkv" not in name:
            for old, new in MOVED_BY_NAME.items():
                name = name.replace(old, new)
            assert torch.equal(written[name], tensor) and written[name].dtype == dtype
    rows = before["model.layers.1.attention.wqkv.weight"].view(2, 5, 8, 48)
    assert torch.equal(written["model.layers.1.self_attn.q_proj.weight"], rows[:, :3].reshape(48, 48))
    assert torch.equal(written["model.layers.1.self_attn.k_proj.weight"], rows[:, 3].reshape(16, 48))
    assert torch.equal(written["model.layers.1.self_attn.v_proj.weight"], rows[:, 4].reshape(16, 48))


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_stays_tied(tmp_path, stored):
    weights = random_weights(replace(LM, tie_word_embeddings=True))
    config = {**LM_CONFIG, "tie_word_embeddings": True}
    kept = {**weights, "output.weight": weights["model.tok_embeddings.weight"].clone()} if stored else weights
    convert(write(tmp_path / "lm", kept, config), tmp_path / "out", verify=True)
    model, ids = load(tmp_path / "out", AutoModelForCausalLM), torch.arange(20)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids[None]).logits[0], internlm2_logits(weights, config, ids), rtol=0, atol=1e-5
        )


def test_generation_is_configured_as_in_the_source(tmp_path, lm):
    said = {"eos_token_id": [2, 92], "pad_token_id": 2, "bos_token_id": 1, "max_new_tokens": 8}
    (lm / "generation_config.json").write_text(json.dumps({**said, "transformers_version": "4.33.2"}))
    convert(lm, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == said
    model = load(tmp_path / "out", AutoModelForCausalLM)
    assert model.generation_config.eos_token_id == [2, 92] and model.generation_config.max_new_tokens == 8
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, 2, 2)
    assert written["rms_norm_eps"] == 1e-5 and written["max_position_embeddings"] == 32 and "auto_map" not in written


# Both, in whatever files and under whatever names


def release(folder: Path, wrap=lambda name: name) -> Path:
    """An InternVL of both, with its connector."""
    both = {f"vision_model.{name}": tensor for name, tensor in random_weights(VIT).items()}
    both |= {f"language_model.{name}": tensor for name, tensor in random_weights(LM).items()}
    both["mlp1.0.weight"] = torch.ones(4)
    config = {
        "model_type": "internvl_chat", "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "vision_config": VIT_CONFIG, "llm_config": LM_CONFIG, "force_image_size": 56,
    }  # fmt: skip
    return write(folder, {wrap(name): tensor for name, tensor in both.items()}, config)


WRAPPED = {
    "bare": lambda name: name,
    "DDP": lambda name: f"module.{name}",
    "compiled": lambda name: re.sub(r"^(\w+)\.", r"\1._orig_mod.", name),
    "FSDP": lambda name: re.sub(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module.", name),
    "inside": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_parts_of_a_release_are_those_that_are_published_alone(tmp_path, vit, lm, kind):
    source = release(tmp_path / "release", WRAPPED[kind])
    for part, alone in (("vision", vit), ("language", lm)):
        done = convert(source, tmp_path / part, part=part)
        assert any("mlp1" in note or "model (" in note for note in done.notes) or kind == "inside"
        convert(alone, tmp_path / f"{part}-alone")
        ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in (part, f"{part}-alone"))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
        configs = [(tmp_path / name / "config.json").read_text() for name in (part, f"{part}-alone")]
        assert configs[0] == configs[1]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_and_pickles_are_read_and_only_those_that_are_needed(tmp_path, suffix):
    whole = load_file(release(tmp_path / "release") / "model.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    shards = {part: f"part-{part}.{suffix}" for part in ("vision_model", "mlp1", "language_model")}
    for part, file in shards.items():
        own = {name: tensor for name, tensor in whole.items() if name.startswith(part)}
        save_file(own, folder / file) if suffix == "safetensors" else torch.save(own, folder / file)
    stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    weight_map = {name: shards[name.split(".")[0]] for name in whole}
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(tmp_path / "release" / "config.json", folder)
    (folder / shards["mlp1"]).unlink()
    for part, count in (("vision", len(random_weights(VIT)) + 8), ("language", len(random_weights(LM)) + 4)):
        convert(folder, tmp_path / part, part=part, max_shard_size="20KB")
        files = sorted((tmp_path / part).glob("model-*.safetensors"))
        assert len(files) > 1 and sum(len(load_file(file)) for file in files) == count
        load(tmp_path / part, AutoModel if part == "vision" else AutoModelForCausalLM)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_precision_is_rounded_as_torch_does(tmp_path, vit, dtype):
    convert(vit, tmp_path / "as it is")
    convert(vit, tmp_path / "out", dtype=dtype)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("as it is", "out"))
    assert all(torch.equal(after[name], tensor.to(getattr(torch, dtype))) for name, tensor in before.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_what_is_held_is_a_chunk(tmp_path):
    shape = replace(LM, hidden_size=768, head_dim=128, num_hidden_layers=1, intermediate_size=768)
    source = write(
        tmp_path / "lm",
        random_weights(shape),
        {**LM_CONFIG, "hidden_size": 768, "intermediate_size": 768, "num_hidden_layers": 1},
    )
    job = plan_internlm2(FileCheckpoint(*find_source(str(source))), Options())
    sizes = {tensor.name: [len(chunk) for chunk in tensor.chunks()] for tensor in job.tensors()}
    query = sizes["model.layers.0.self_attn.q_proj.weight"]
    assert max(query) == CHUNK and sum(query) == 768 * 768 * 4


def test_names_are_found_and_others_are_not():
    vit, lm = [*stored_shapes(VIT)], [*stored_shapes(LM)]
    assert is_internvit(vit) and not is_internlm2(vit)
    assert is_internlm2(lm) and not is_internvit(lm)
    assert is_internlm2(f"module.language_model.{name}" for name in lm)
    assert is_internvit(f"vision_model._orig_mod.{name}" for name in vit)
    other_names = ["trunk.blocks.0.attn.qkv.weight", "vision_encoder.layers.0.attn.qkv.weight", "blocks.0.ls1.gamma"]
    other_names += ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.attention.wqkv_a.weight"]
    assert not is_internvit(other_names) and not is_internlm2(other_names)


def test_importing_it_imports_neither_torch_nor_transformers(tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "convert").symlink_to(Path(internvit.__file__).parents[1])
    (tmp_path / "alone" / "__init__.py").touch()  # the package without its models
    script = "import sys, alone.convert.models.internlm2, alone.convert.models.internvit as it\n"
    script += "print(len(it.TRANSFORMERS), {'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "13 set()\n", done.stderr


def test_the_card_runs_and_provenance_tells_the_kind(tmp_path, vit, lm, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, kind in ((vit, "InternViT"), (lm, "InternLM2")):
        (source / "README.md").write_text("---\nlicense: mit\n---\n# It\n")
        convert(source, Path(kind))
        card = (tmp_path / kind / "README.md").read_text()
        assert "license: mit" in card
        scope: dict = {}
        exec(card.split("```python\n")[1].split("```")[0].replace("image.jpg", str(PHOTOGRAPH)), scope)
        total = sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
        assert sum(parameter.numel() for parameter in scope["model"].parameters()) == total
        record = json.loads((tmp_path / kind / "provenance.json").read_text())
        assert record["source"]["layout"] == kind and record["source"]["name"] == source.name


# Verification


@pytest.mark.slow
def test_the_folder_is_loaded_strictly_in_a_clean_process(tmp_path, vit, lm):
    for source, loaded in ((vit, "InternVLVisionModel"), (lm, "LlamaForCausalLM")):
        done = convert(source, tmp_path / loaded, verify=True, dtype="bfloat16")
        assert done.verification == {"reference": "strict load in a clean process", "loaded": loaded}
        assert json.loads((tmp_path / loaded / "provenance.json").read_text())["verification"] == done.verification


def exchanged(table: dict, first: str, second: str) -> dict:
    return {**table, first: table[second], second: table[first]}


def turned(table: dict, name: str, order: tuple[int, int, int]) -> dict:
    return {**table, name: tuple(table[name][place] for place in order)}


WRONG = {
    "gate and up": (internlm2, exchanged, "model.layers.{}.feed_forward.w1", "model.layers.{}.feed_forward.w3"),
    "norms of a block": (internlm2, exchanged, "model.layers.{}.attention_norm", "model.layers.{}.ffn_norm"),
    "key and value": (internlm2, turned, "model.layers.{}.attention.wqkv", (0, 2, 1)),
    "norms of a layer": (internvit, exchanged, "encoder.layers.{}.norm1", "encoder.layers.{}.norm2"),
    "scales": (internvit, exchanged, "encoder.layers.{}.ls1", "encoder.layers.{}.ls2"),
    "query and value": (internvit, turned, "encoder.layers.{}.attn.qkv", (2, 1, 0)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_the_references_detect_a_table_with_two_names_exchanged(tmp_path, vit, lm, monkeypatch, kind):
    module, change, *arguments = WRONG[kind]
    monkeypatch.setattr(
        module, "CONVERTED", replace(module.CONVERTED, modules=change(module.CONVERTED.modules, *arguments))
    )
    source, is_language = (lm, True) if module is internlm2 else (vit, False)
    convert(source, tmp_path / "out")
    weights, ids, pixels = load_file(source / "model.safetensors"), torch.arange(20), random_pixels(1, 3, 56, 56)
    with torch.no_grad():
        if is_language:
            output = load(tmp_path / "out", AutoModelForCausalLM)(ids[None]).logits[0]
            expected = internlm2_logits(weights, LM_CONFIG, ids)
        else:
            output, expected = load(tmp_path / "out")(pixels)[0], internvit_tokens(weights, VIT_CONFIG, pixels)
    assert relative_difference(output, expected) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "canonical", "is_large"),
    [
        (internvit, "embeddings.class_embedding", False),
        (internlm2, "model.norm", False),
        (internlm2, "model.norm", True),
    ],
)
def test_a_table_with_a_wrong_name_does_not_load(tmp_path, vit, lm, monkeypatch, module, canonical, is_large):
    if is_large:  # of large language models, names and shapes are compared without loading values
        script = tmp_path / "load_folder.py"
        script.write_text(outputs.LOADER_SCRIPT.read_text().replace("LARGE = 1 << 30", "LARGE = 0"))
        monkeypatch.setattr(outputs, "LOADER_SCRIPT", script)
    good, source = module.CONVERTED, lm if module is internlm2 else vit
    convert(source, tmp_path / "good", verify=True)
    monkeypatch.setattr(module, "CONVERTED", replace(good, modules={**good.modules, canonical: "wrong"}))
    with pytest.raises(VerificationError, match=r"not loaded strictly.*missing.*unexpected.*wrong"):
        convert(source, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


# What is refused, by the name of the tensor or the field


def with_config(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def with_tensors(change):
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors) or tensors, folder / "model.safetensors")

    return rewrite


def without(*names: str):
    return with_tensors(lambda all: {name: tensor for name, tensor in all.items() if name not in names})


def having(name: str, tensor: torch.Tensor):
    return with_tensors(lambda all: all.update({name: tensor}))


QKV, WQKV = "encoder.layers.1.attn.qkv.weight", "model.layers.1.attention.wqkv.weight"
BAD_VIT = {
    "missing": (without(QKV), {}, rf"{QKV}: missing; expected shape \[96, 32\]"),
    "a bias missing": (without("encoder.layers.0.norm2.bias"), {}, r"layers\.0\.norm2\.bias: missing"),
    "patches missing": (without("embeddings.patch_embedding.weight"), {}, "patch_embedding.weight: missing; without"),
    "class token missing": (without("embeddings.class_embedding"), {}, "class_embedding: missing"),
    "too much": (having("encoder.layers.0.attn.rope", torch.ones(1)), {}, r"attn\.rope: has no mapping in InternViT"),
    "an adapter": (having("encoder.layers.0.mlp.fc1.lora_A.weight", torch.ones(1)), {}, "lora_A.*merge it first"),
    "empty": (having(QKV, torch.empty(0)), {}, rf"{QKV}: empty.*ZeRO-3"),
    "misshapen": (having(QKV, torch.ones(32, 96)), {}, rf"{QKV}: expected shape \[96, 32\], got \[32, 96\]"),
    "no square": (having("embeddings.position_embedding", torch.ones(1, 16, 32)), {}, "a square grid, got 15"),
    "mixed": (having(QKV, torch.ones(96, 32).half()), {}, rf"{QKV}: expected F32 as in most of the InternViT, got F16"),
    "whole numbers": (having(QKV, torch.ones(96, 32, dtype=torch.int8)), {"dtype": "float32"}, rf"{QKV}: .* got I8"),
    "NaN": (having(QKV, torch.full((96, 32), float("nan"))), {}, rf"{QKV} holds NaN"),
    "beyond half": (having(QKV, torch.full((96, 32), 1e6)), {"dtype": "float16"}, rf"{QKV} has values beyond F16"),
    "config width": (with_config(hidden_size=64), {}, r"hidden_size: expected 32 as in the tensors, got 64"),
    "config depth": (with_config(num_hidden_layers=24), {}, r"num_hidden_layers: expected 2 as in the tensors, got 24"),
    "config size": (with_config(image_size=448), {}, r"image_size: expected 56 as in the tensors, got 448"),
    "config patch": (with_config(patch_size=16), {}, r"patch_size: expected 14 as in the tensors, got 16"),
    "config bias": (with_config(qkv_bias=False), {}, r"qkv_bias: expected True as in the tensors, got False"),
    "config norm": (with_config(norm_type="rms_norm"), {}, r"norm_type: expected 'layer_norm'.* got 'rms_norm'"),
    "config qk": (with_config(qk_normalization=True), {}, r"qk_normalization: expected False.* got True"),
    "config heads": (with_config(num_attention_heads=5), {}, r"num_attention_heads: expected .* width 32, got 5"),
    "config eps": (with_config(layer_norm_eps="small"), {}, r"layer_norm_eps: expected .* got 'small'"),
    "config activation": (with_config(hidden_act="swiglu"), {}, r"hidden_act: expected one of .*, got 'swiglu'"),
    "no config": (lambda folder: (folder / "config.json").unlink(), {}, r"num_attention_heads: expected .* got None"),
    "another size": (lambda folder: None, {"image_size": 224}, "--image-size: expected AIMv2, got InternViT"),
    "another layout": (lambda folder: None, {"to_layout": "timm"}, "--to-layout: expected AIMv2, got InternViT"),
    "another prefix": (lambda folder: None, {"prefix": "vision_model"}, "no InternViT under the prefix 'vision"),
    "two": (
        with_tensors(lambda all: {f"{side}.{name}": one.clone() for side in "ab" for name, one in all.items()}), {},
        "more than one InternViT: InternViT under 'a.', InternViT under 'b.'; choose with --prefix",
    ),
}  # fmt: skip
BAD_LM = {
    "missing": (without(WQKV), {}, rf"{WQKV}: missing; expected shape \[80, 48\]"),
    "a norm missing": (without("model.layers.1.ffn_norm.weight"), {}, r"layers\.1\.ffn_norm\.weight: missing"),
    "embeddings missing": (without("model.tok_embeddings.weight"), {}, "tok_embeddings.weight: missing; without it"),
    "head missing": (without("output.weight"), {}, "output.weight: missing"),
    "too much": (having("model.layers.0.attention.wqkv.Plora_A.weight", torch.ones(1)), {}, "Plora_A.*merge it first"),
    "a value head": (having("v_head.weight", torch.ones(1)), {}, "v_head.weight: has no mapping in InternLM2"),
    "empty": (having(WQKV, torch.empty(0)), {}, rf"{WQKV}: empty.*ZeRO-3"),
    "misshapen": (having(WQKV, torch.ones(48, 80)), {}, rf"{WQKV}: expected shape \[80, 48\], got \[48, 80\]"),
    "mixed": (having(WQKV, torch.ones(80, 48).bfloat16()), {}, rf"{WQKV}: expected F32 as .*, got BF16"),
    "infinite": (having(WQKV, torch.full((80, 48), float("inf"))), {}, rf"{WQKV} holds NaN or infinity"),
    "config vocabulary": (with_config(vocab_size=92544), {}, r"vocab_size: expected 96 as in the tensors, got 92544"),
    "config width": (with_config(hidden_size=64), {}, r"hidden_size: expected 48 as in the tensors, got 64"),
    "config mlp": (with_config(intermediate_size=64), {}, r"intermediate_size: expected 80 as in the tensors, got 64"),
    "config depth": (with_config(num_hidden_layers=3), {}, r"num_hidden_layers: expected 2 as in the tensors, got 3"),
    "config groups": (with_config(num_key_value_heads=3), {}, r"num_key_value_heads: expected 96 rows .*got 80"),
    "config heads": (with_config(num_attention_heads=10), {}, r"num_attention_heads: expected .* width 48, got 10"),
    "config bias": (with_config(bias=True), {}, r"bias: expected False as in the tensors, got True"),
    "config tied": (with_config(tie_word_embeddings=True), {}, r"output\.weight: expected the values of model\.tok"),
    "config rotation": (with_config(rope_scaling={"type": "yarn", "factor": 2.0}), {}, "rope_scaling: expected .*yarn"),
    "config base": (with_config(rope_theta="big"), {}, "rope_theta: expected a number above 1, got 'big'"),
    "config huge base": (with_config(rope_theta=10**400), {}, "rope_theta: expected a number above 1, got 1000"),
    "config ids": (with_config(pad_token_id=96), {}, "pad_token_id: expected .* size 96, got 96"),
    "config positions": (with_config(max_position_embeddings=0), {}, "max_position_embeddings: expected .* got 0"),
    "config no map": (with_config(llm_config=[]), {}, r"llm_config in config\.json: expected a JSON object, got \[\]"),
    "no config": (lambda folder: (folder / "config.json").unlink(), {}, r"num_attention_heads: expected .* got None"),
    "another part": (lambda folder: None, {"part": "vision"}, "no AIMv2 encoder: only 1 of 17 names"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_VIT)
def test_a_bad_internvit_is_refused_by_name(tmp_path, vit, kind):
    refused(vit, tmp_path / "out", *BAD_VIT[kind])


@pytest.mark.parametrize("kind", BAD_LM)
def test_a_bad_internlm2_is_refused_by_name(tmp_path, lm, kind):
    refused(lm, tmp_path / "out", *BAD_LM[kind])


def refused(source: Path, out: Path, spoil, options: dict, message: str) -> None:
    spoil(source)
    with pytest.raises(CheckpointError) as caught:
        convert(source, out, **options)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value) and not out.exists()


def test_a_variant_that_transformers_has_not_is_refused(tmp_path):
    source = write(tmp_path / "vit", random_weights(VIT_6B), {**VIT_6B_CONFIG, "layer_norm_eps": 1e-5})
    message = "layer_norm_eps: expected 1e-06, .*qk_normalization, got 1e-05"
    refused(source, tmp_path / "out", lambda folder: None, {}, message)


def test_a_pickle_with_a_flipped_bit_is_refused(tmp_path):
    source = tmp_path / "lm"
    source.mkdir()
    torch.save(random_weights(LM), source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps(LM_CONFIG))
    content = bytearray((source / "pytorch_model.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (source / "pytorch_model.bin").write_bytes(content)
    refused(source, tmp_path / "out", lambda folder: None, {}, "pytorch_model.bin: .* is corrupt")


# The tokenizer

SPECIAL = ["<|plugin|>", "<|im_end|>", "<|im_start|>"]
CODE = Path(internvit.__file__).with_name("name_tables.py")  # text without special tokens
TEXTS = [
    "The quick brown fox", " leading and  double   spaces    ", "line\nbreaks\n\n\tand tabs\r\n",
    "naïve café, 中文和日本語",
    "emoji 🦝 and ∮ E⋅da = Q", "▁ is a space to it", "def f(x):\n    return x  # code\n", "", " ", "\n", "1234567890",
    "ﬁ ½ Å é", "aaaaaaaaaaaaa", "==============",
]  # fmt: skip


@pytest.fixture(scope="session", params=[False, True], ids=["as it is", "dummy prefix"])
def pieces(request, tmp_path_factory) -> Path:
    """A BPE of sentencepiece, trained on the spot, with bytes to fall back to and pieces that stand for themselves."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    lines = [*TEXTS, *CODE.read_text().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=900,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, add_dummy_prefix=request.param, character_coverage=0.98,
        user_defined_symbols=["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]", "[UNUSED_TOKEN_3]"], minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def with_tokenizer(folder: Path, pieces: Path) -> int:
    """Puts it beside the weights as InternLM2.5 does; returns the id of the first special token."""
    import sentencepiece

    first = sentencepiece.SentencePieceProcessor(model_file=str(pieces)).piece_to_id("[UNUSED_TOKEN_1]")
    decoder = {str(first + place): {"content": text, "special": True} for place, text in enumerate(SPECIAL)}
    decoder |= {str(900): {"content": "<img>", "special": True}, "0": {"content": "<unk>", "special": True}}
    settings = {
        "added_tokens_decoder": decoder, "additional_special_tokens": SPECIAL, "add_bos_token": True,
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}",
        "decode_with_prefix_space": False, "sp_model_kwargs": None, "model_max_length": 1000000000000000019884624838656,
    }  # fmt: skip
    shutil.copy(pieces, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return first


def test_the_tokenizer_gives_the_ids_of_sentencepiece(tmp_path, lm, pieces):
    import sentencepiece

    first, truth = with_tokenizer(lm, pieces), sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    convert(lm, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.padding_side == "left"
    for text in [*TEXTS, *CODE.read_text().split("\n\n")]:
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *truth.encode(text)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("▁", " ")
    chat = tokenizer("<|im_start|>user\nWhat?<|im_end|> and<img>")["input_ids"]
    expected = [first + 2, *truth.encode("user\nWhat?"), first + 1, *truth.encode(" and"), 900]
    assert chat == [1, *expected]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<s><|im_start|>Hi"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token_id == 0 and len(tokenizer) == 901
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0<[") | st.sampled_from(" \na▁=")))
def test_any_text_becomes_the_ids_of_sentencepiece(pieces, text):
    import sentencepiece

    truth = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    assert built(pieces).encode(text).ids == [1, *truth.encode(text)]


BUILT: dict = {}


def built(pieces: Path):
    if pieces not in BUILT:
        BUILT[pieces] = build_tokenizer(read_sentencepiece(pieces), {}, SPECIAL_TOKENS)
    return BUILT[pieces]


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path, lm, pieces):
    with_tokenizer(lm, pieces)
    convert(lm, tmp_path / "first")
    content = (tmp_path / "first" / "tokenizer.json").read_bytes()
    (lm / "tokenizer.json").write_bytes(content)
    (lm / "tokenizer.model").unlink()
    (lm / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    done = convert(lm, tmp_path / "out")
    assert any("tokenizer.json" in note for note in done.notes)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        tokenizer("Hi there")["input_ids"] == AutoTokenizer.from_pretrained(tmp_path / "first")("Hi there")["input_ids"]
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"


def test_without_a_tokenizer_that_can_be_converted_none_is_written(tmp_path, lm):
    assert any("no tokenizer is written: neither" in note for note in convert(lm, tmp_path / "none").notes)
    assert not list((tmp_path / "none").glob("tokenizer*"))
    sentencepiece = pytest.importorskip("sentencepiece")
    for options, why in (({"model_type": "unigram"}, "no BPE"), ({"model_type": "bpe"}, "charsmap")):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CODE.read_text().splitlines()), model_prefix=str(lm / "tokenizer"),
            vocab_size=300, minloglevel=2, **options,
        )  # fmt: skip
        assert any(why in note for note in convert(lm, tmp_path / why).notes)
    (lm / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a sentencepiece model"):
        convert(lm, tmp_path / "out")


def test_added_tokens_that_leave_a_gap_are_refused(tmp_path, lm, pieces):
    with_tokenizer(lm, pieces)
    settings_file = lm / "tokenizer_config.json"
    said = json.loads(settings_file.read_text())
    said["added_tokens_decoder"]["950"] = {"content": "<far>"}
    settings_file.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"added_tokens_decoder.*ids leave a gap"):
        convert(lm, tmp_path / "out")
