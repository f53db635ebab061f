"""Detection: every kind of checkpoint is recognised by its tensor names and config.json."""

from types import SimpleNamespace

import pytest

from sailvit.convert import LAYOUTS
from sailvit.convert.detect import (
    AIMV2,
    CONNECTOR,
    INTERNLM2,
    INTERNVIT,
    LANGUAGE,
    LORA,
    SAILVL,
    VISION,
    detect,
    detect_components,
)
from sailvit.convert.models.name_tables import tensor_specs
from sailvit.convert.synthetic import published_shape


AIMV2_NAMES = {
    key: [layout.prefix + spec.name for spec in tensor_specs(layout, published_shape("base", blocks=1))]
    for key, layout in LAYOUTS.items()
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "image_size": 4,
    "patch_size": 2,
}
QWEN_CONFIG = {"architectures": ["Qwen2ForCausalLM"]}
QWEN = ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"]
VIT, WQKV = "encoder.layers.0.ls1", "model.layers.0.attention.wqkv.weight"
RELEASE = [*(f"vision_model.{name}" for name in AIMV2_NAMES["sailvit"]), "mlp1.0.weight", *QWEN]


def checkpoint(names: list[str], config: dict | None = None, adapter: dict | None = None) -> SimpleNamespace:
    documents = {"config.json": config or {}, "adapter_config.json": adapter or {}}
    return SimpleNamespace(weight_map=dict.fromkeys(names, "model.safetensors"), document=documents.__getitem__)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_aimv2_is_recognised_in_every_layout(layout):
    assert detect(checkpoint(AIMV2_NAMES[layout])) is AIMV2


@pytest.mark.parametrize(
    ("names", "config", "expected"),
    [
        (RELEASE, {}, SAILVL),
        (QWEN, {"model_type": "internvl_chat"}, SAILVL),
        (["mlp1.0.weight", "mlp1.1.weight"], {}, CONNECTOR),
        (["vision_model." + VIT], {}, INTERNVIT),
        ([WQKV], {}, INTERNLM2),
        ([WQKV, *(f"vit.{name}.weight" for name in "abc")], QWEN_CONFIG, INTERNLM2),  # to be refused by name
        ([name for name in AIMV2_NAMES["sailvit"] if "patchifier.proj" not in name], {}, AIMV2),
        (
            ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"],
            QWEN_CONFIG,
            LANGUAGE,
        ),
        (["embeddings.weight"], SIGLIP, VISION),
        (["a.base_layer.weight", "a.lora_A.default.weight"], {}, LORA),
        (["fc.weight"], {}, None),
        ([], {}, None),
    ],
)
def test_other_checkpoints_are_recognised(names, config, expected):
    assert detect(checkpoint(names, config)) is expected


def test_an_adapter_is_recognised_by_its_configuration():
    names = ["base_model.model.model.norm.weight"]
    assert detect(checkpoint(names, QWEN_CONFIG, {"peft_type": "IA3"})) is LORA


@pytest.mark.parametrize(
    ("vision", "language", "config", "expected"),
    [
        (AIMV2_NAMES["sailvit"], QWEN, {}, [AIMV2, CONNECTOR, LANGUAGE]),
        ([VIT], [f"language_model.{WQKV}"], {}, [INTERNVIT, CONNECTOR, INTERNLM2]),
        (["embeddings.weight"], QWEN, {"vision_config": SIGLIP}, [VISION, CONNECTOR, LANGUAGE]),
        (["unknown.weight"], QWEN, {}, [AIMV2, CONNECTOR, LANGUAGE]),  # whose problems are then reported
    ],
)
def test_the_components_of_a_multimodal_model_are_recognised(vision, language, config, expected):
    names = [*(f"vision_model.{name}" for name in vision), "mlp1.0.weight", *language]
    assert detect_components(checkpoint(names, config)) == expected
