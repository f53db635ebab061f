"""A saved folder, loaded by the Auto classes with remote code, in clean processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PHOTOGRAPH, ROOT, TINY, randomize
from fork_server import run_forked
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from sailvit import (
    SAILViTBackbone,
    SAILViTConfig,
    SAILViTForImageClassification,
    SAILViTImageProcessor,
    SAILViTModel,
)


def run_isolated(script: str, *arguments: object, home: Path, fork: bool = True) -> str:
    """
    Run a script where the package is not imported, warnings are errors, and the caches are new. Without `fork` in a new
    interpreter, which shows the warnings of imports too.
    """
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [*map(str, arguments)]
    if fork:
        done = run_forked(script, *words, folder=home, env=environment, strict=True)
    else:
        strict = ["-W", "error", "-W", "ignore::ResourceWarning"]  # as in fork_server.py
        command = [sys.executable, *strict, "-c", script, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home, timeout=300)
    assert done.returncode == 0, done.stderr
    # Progress bars, transformers < 5.4 on its own CLIPImageProcessor, and torch on torchao are not of our making.
    theirs = (
        "Loading weights",
        "Loading checkpoint shards",
        "The image processor of type `CLIP",
        "slow image processor",
        "torch/utils/_pytree.py",
    )
    noise = [line for line in done.stderr.splitlines() if line.strip() and not any(text in line for text in theirs)]
    assert noise == [], "a plain load is silent"
    return done.stdout


CARD = """
import sys, torch, torchvision.transforms as T
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
assert not any(name.split(".")[0] == "sailvit" for name in sys.modules)
path, photo, out = sys.argv[1:]
transform = T.Compose([
    T.Resize((56, 56), interpolation=T.InterpolationMode.BICUBIC),
    T.ToTensor(),
    T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
])
pixel_values = transform(Image.open(photo).convert("RGB"))[None]
model = AutoModel.from_pretrained(path, dtype=torch.float32, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
batch = processor(Image.open(photo), return_tensors="pt")
assert type(model).__module__.startswith("transformers_modules")
assert type(processor).__module__.startswith("transformers_modules")
with torch.no_grad():
    plain = model(pixel_values=pixel_values).last_hidden_state
    torch.save([plain, model.get_image_features(batch["pixel_values"])], out)
"""


def test_card_usage_with_remote_code_is_silent_and_gives_the_packages_tokens(folder, tmp_path):
    run_isolated(CARD, folder, PHOTOGRAPH, tmp_path / "tokens.pt", home=tmp_path, fork=False)
    plain, features = torch.load(tmp_path / "tokens.pt")
    model = SAILViTModel.from_pretrained(folder).eval()
    processor = SAILViTImageProcessor.from_pretrained(folder)
    image = Image.open(PHOTOGRAPH)
    one_tile = processor(image, do_tile=False, resize_backend="pil")["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(one_tile).last_hidden_state, plain)
        assert torch.equal(model.get_image_features(processor(image)["pixel_values"]), features)


def test_loading_with_the_package_is_silent_too(folder, tmp_path):
    script = """
import sys, sailvit
from transformers import AutoConfig, AutoImageProcessor, AutoModel
path = sys.argv[1]
print(*(type(auto.from_pretrained(path)).__name__ for auto in (AutoConfig, AutoImageProcessor, AutoModel)))
"""
    assert run_isolated(script, folder, home=tmp_path) == "SAILViTConfig SAILViTImageProcessor SAILViTModel\n"


def test_the_repositorys_own_files_are_a_hub_folder(tmp_path):
    """Root config, preprocessor config and code, copied flat beside weights, load as they are."""
    hub = tmp_path / "hub"
    hub.mkdir()
    for name in ("configuration_sailvit.py", "modeling_sailvit.py", "image_processing_sailvit.py"):
        shutil.copy(ROOT / name, hub)
    shutil.copy(ROOT / "preprocessor_config.json", hub)
    config = json.loads((ROOT / "config.json").read_text()) | TINY
    (hub / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "weights"
    randomize(SAILViTModel(SAILViTConfig(**TINY))).bfloat16().save_pretrained(weights)
    shutil.copy(weights / "model.safetensors", hub)
    script = """
import sys, torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel
path = sys.argv[1]
config = AutoConfig.from_pretrained(path, trust_remote_code=True)
model = AutoModel.from_pretrained(path, trust_remote_code=True, dtype="auto")
size = {"height": 56, "width": 56}
processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True, size=size, max_tiles=2)
batch = processor(torch.zeros(300, 600, 3, dtype=torch.uint8), return_tensors="pt")
print(config.model_type, model.dtype, tuple(model.get_image_features(batch["pixel_values"]).shape))
"""
    assert run_isolated(script, hub, home=tmp_path).split("\n")[0] == "sailvit torch.bfloat16 (3, 4, 256)"


@pytest.mark.parametrize(
    ("cls", "auto"),
    [
        (SAILViTModel, AutoModel),
        (SAILViTForImageClassification, AutoModelForImageClassification),
        (SAILViTBackbone, None),
    ],
)
@pytest.mark.parametrize("pos_embed_type", ["absolute", "sincos"])
def test_saved_equals_loaded_bit_for_bit(cls, auto, pos_embed_type, tmp_path):
    model = randomize(cls(SAILViTConfig(**TINY, pos_embed_type=pos_embed_type, num_labels=7, out_indices=[1, 3])))
    model.save_pretrained(tmp_path)
    for load in filter(None, [cls, auto]):
        loaded, report = load.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(loaded) is cls and not loaded.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.config.out_indices == [1, 3] and loaded.config.num_labels == 7


def test_auto_classes_know_the_package_without_remote_code(folder):
    assert type(AutoConfig.from_pretrained(folder)) is SAILViTConfig
    assert type(AutoModel.from_pretrained(folder)) is SAILViTModel
    assert type(AutoImageProcessor.from_pretrained(folder)) is SAILViTImageProcessor
    assert type(AutoModel.from_config(SAILViTConfig(**TINY))) is SAILViTModel
    assert type(AutoBackbone.from_config(SAILViTConfig(**TINY))) is SAILViTBackbone


def test_checkpoint_carries_the_released_names_and_format(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert metadata["format"] == "pt"
    blocks = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.fc3", "norm_1", "norm_2")
    expected = {f"trunk.blocks.{block}.{part}.weight" for block in range(3) for part in blocks}
    expected |= {"preprocessor.pos_embed", "trunk.post_trunk_norm.weight", "preprocessor.patchifier.norm.weight"}
    assert names == expected | {"preprocessor.patchifier.proj.weight", "preprocessor.patchifier.proj.bias"}


def test_tower_weights_load_into_the_classifier_and_back(folder, tmp_path):
    tower = load_file(folder / "model.safetensors")
    classifier, report = SAILViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"classifier"}
    classifier.save_pretrained(tmp_path)
    back = SAILViTModel.from_pretrained(tmp_path)
    for name, tensor in tower.items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_a_missing_weight_is_an_error(folder, tmp_path):
    from safetensors.torch import save_file

    from sailvit.encode.load import load_tower

    shutil.copytree(folder, tmp_path / "holed")
    weights = load_file(folder / "model.safetensors")
    del weights["trunk.blocks.1.mlp.fc3.weight"]
    save_file(weights, tmp_path / "holed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys in the checkpoint: trunk\.blocks\.1\.mlp\.fc3\.weight"):
        load_tower(str(tmp_path / "holed"))
    config = json.loads((folder / "config.json").read_text())
    for name, change in [("mismatched", {"intermediate_size": 128}), ("unexpected", {"num_hidden_layers": 2})]:
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=rf"{name} keys in the checkpoint: .*trunk\.blocks"):
            load_tower(str(tmp_path / name))


def test_a_classifiers_tower_encodes(tmp_path, pixels):
    from sailvit.encode.load import load_tower

    classifier = randomize(SAILViTForImageClassification(SAILViTConfig(**TINY)))
    classifier.save_pretrained(tmp_path)
    expected = classifier.eval().vision_model.get_image_features(pixels)
    assert torch.equal(load_tower(str(tmp_path)).get_image_features(pixels), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "auto"])
def test_loads_in_the_dtype_asked_for(folder, dtype):
    model = AutoModel.from_pretrained(folder, dtype=dtype)
    assert model.dtype == (torch.float32 if dtype == "auto" else dtype)


def test_device_map_auto_and_offload_give_the_same_tokens(folder, pixels, tmp_path):
    pytest.importorskip("accelerate")
    expected = AutoModel.from_pretrained(folder).get_image_features(pixels)
    model = AutoModel.from_pretrained(folder, device_map="auto")
    torch.testing.assert_close(model.get_image_features(pixels.to(model.device)).cpu(), expected)
    spread = {"preprocessor": "cpu", "trunk.blocks.0": "cpu", "trunk.blocks.1": "disk", "trunk.blocks.2": "cpu"}
    spread["trunk.post_trunk_norm"] = "cpu"
    model = AutoModel.from_pretrained(folder, device_map=spread, offload_folder=tmp_path)
    torch.testing.assert_close(model.get_image_features(pixels), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_chosen_at_loading(folder, implementation, pixels, monkeypatch):
    model = AutoModel.from_pretrained(folder, attn_implementation=implementation)
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    counted = lambda *arguments, **options: calls.append(1) or sdpa(*arguments, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    model(pixels)
    assert len(calls) == (3 if implementation == "sdpa" else 0)


def test_pipeline_extracts_features(folder):
    from transformers import pipeline

    extractor = pipeline("image-feature-extraction", model=str(folder), device="cpu")
    image = Image.open(PHOTOGRAPH)
    features = torch.tensor(extractor(image))
    processor, model = SAILViTImageProcessor.from_pretrained(folder), SAILViTModel.from_pretrained(folder)
    with torch.no_grad():
        expected = model(processor(image)["pixel_values"]).last_hidden_state
    torch.testing.assert_close(features, expected)
    assert torch.tensor(extractor(str(PHOTOGRAPH), pool=True)).shape == (7, 64)


def test_pipeline_classifies_the_whole_image(tmp_path):
    from transformers import pipeline

    config = SAILViTConfig(**TINY, id2label={0: "cat", 1: "raccoon", 2: "dog"}, label2id={"cat": 0})
    model = randomize(SAILViTForImageClassification(config)).eval()
    model.save_pretrained(tmp_path)
    processor = SAILViTImageProcessor(size=56)
    processor.save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    image = Image.open(PHOTOGRAPH)
    answers = classify(image)
    with torch.no_grad():
        expected = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    assert {answer["label"] for answer in answers} == {"cat", "raccoon", "dog"}
    assert answers[0]["score"] == pytest.approx(expected.max().item(), abs=1e-5)
    both = classify([image, image.rotate(90)], batch_size=2)
    assert len(both) == 2 and both[0][0]["score"] == pytest.approx(answers[0]["score"], abs=1e-5)


def test_trainer_trains_and_its_checkpoint_loads(tmp_path, pixels):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = randomize(SAILViTForImageClassification(SAILViTConfig(**TINY, num_labels=2)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [{"pixel_values": pixel_values, "labels": index} for index, pixel_values in enumerate(pixels)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, use_cpu=True, report_to=[], per_device_train_batch_size=2,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data).train()
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == len(before)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(loaded(pixels).logits, model.eval()(pixels).logits)
    assert (tmp_path / "checkpoint-2" / "modeling_sailvit.py").exists()
