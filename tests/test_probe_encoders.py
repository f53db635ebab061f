"""Vision encoders of transformers' multimodal models in `sailvit probe`: their tokens are those of the whole model."""

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from conftest import randomize
from PIL import Image
from toy_images import SMALL
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

import sailvit_cli
from sailvit.evaluate.encoders import load_encoder


VISION = {**SMALL, "image_size": 28, "patch_size": 14}
TEXT = {**SMALL, "num_key_value_heads": 2, "vocab_size": 80, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIDES = {"height": 28, "width": 28}
Made = tuple[torch.nn.Module, torch.nn.Module, object]  # the model, its vision encoder, the image processor


def clip_processor() -> tf.CLIPImageProcessor:
    return tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SIDES)


def llava() -> Made:
    text = tf.LlamaConfig(**TEXT)
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**VISION), text_config=text, image_token_index=79)
    )
    return model, model.model.vision_tower, clip_processor()


def internvl() -> Made:
    vision = tf.InternVLVisionConfig(**{**VISION, "image_size": [28, 28], "patch_size": [14, 14]})
    config = tf.InternVLConfig(vision_config=vision, text_config=tf.Qwen2Config(**TEXT), image_token_id=79)
    model = tf.InternVLForConditionalGeneration(config)
    return model, model.model.vision_tower, tf.GotOcr2ImageProcessor(size=SIDES, crop_to_patches=True)


def smolvlm() -> Made:
    text = tf.LlamaConfig(**TEXT)
    config = tf.SmolVLMConfig(vision_config=VISION, text_config=text, image_token_id=79, scale_factor=2)
    model = tf.SmolVLMForConditionalGeneration(config)
    return model, model.model.vision_model, tf.SmolVLMImageProcessor(**idefics_sizes())


def idefics3() -> Made:
    vision, text = Idefics3VisionConfig(**VISION), tf.LlamaConfig(**TEXT)
    model = tf.Idefics3ForConditionalGeneration(
        tf.Idefics3Config(vision_config=vision, text_config=text, image_token_id=79, scale_factor=2)
    )
    return model, model.model.vision_model, tf.Idefics3ImageProcessor(**idefics_sizes())


def idefics_sizes() -> dict[str, dict[str, int]]:
    return {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}


def paligemma() -> Made:
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    text = {**TEXT, "model_type": "gemma", "head_dim": 16}
    config = tf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=79, projection_dim=32)
    model = tf.PaliGemmaForConditionalGeneration(config)
    return model, model.model.vision_tower, tf.SiglipImageProcessor(size=SIDES)


def clip() -> Made:
    text = {**SMALL, "vocab_size": 80, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = tf.CLIPModel(tf.CLIPConfig(vision_config=VISION, text_config=text))
    return model, model.vision_model, clip_processor()


def siglip() -> Made:
    text = {**SMALL, "vocab_size": 80}
    model = tf.SiglipModel(tf.SiglipConfig(vision_config=VISION, text_config=text))
    return model, model.vision_model, tf.SiglipImageProcessor(size=SIDES)


def siglip_alone() -> Made:
    model = tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION))
    return model, model, tf.SiglipImageProcessor(size=SIDES)


def aimv2() -> Made:
    model = tf.Aimv2Model(tf.Aimv2Config(vision_config=VISION, text_config={**SMALL, "vocab_size": 80}))
    return model, model.vision_model, clip_processor()


@torch.no_grad()
def run_layers(vision: torch.nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the tokens after the first layer, and the last ones; not every release returns all hidden states."""
    first = next(module for module in vision.modules() if isinstance(module, torch.nn.ModuleList))[0]
    outputs = []
    with first.register_forward_hook(lambda _, __, output: outputs.append(output)):
        last = vision(pixel_values=pixels).last_hidden_state
    return [outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0], last]


@pytest.mark.parametrize("make", [llava, internvl, smolvlm, idefics3, paligemma, clip, siglip, siglip_alone, aimv2])
def test_the_encoder_of_a_multimodal_model_is_probed(make: Callable[[], Made], tmp_path):
    model, vision, processor = make()
    randomize(vision)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), (1, "last"), device="cpu")
    assert encoder.prefix_tokens == (1 if make in (llava, internvl, clip) else 0) and encoder.pixel_shape == (3, 28, 28)
    pixels = encoder.preprocessing(Image.radial_gradient("L").convert("RGB"))[None]
    expected = run_layers(vision, pixels)
    means = torch.stack([tokens[:, encoder.prefix_tokens :].mean(1) for tokens in expected], 1)
    torch.testing.assert_close(encoder.encode(pixels), means, atol=1e-5, rtol=1e-4)


def llava_next() -> Made:
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**TEXT), image_token_index=79
    )
    grids = {"size": {"shortest_edge": 28}, "crop_size": SIDES, "image_grid_pinpoints": [[28, 56]]}
    model = tf.LlavaNextForConditionalGeneration(config)
    return model, model.model.vision_tower, tf.LlavaNextImageProcessor(**grids)


def qwen2_5_vl() -> Made:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    model = tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(vision_config=vision, text_config=text))
    return model, model.model.visual, tf.Qwen2VLImageProcessor()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (llava_next, "expected one tile, (1, 3, H, W): give --preprocessing NAME of an encoder that makes one"),
        (qwen2_5_vl, "expected the tensors of one vision encoder (vision_model.*, ...), got none"),
    ],
)
def test_a_model_whose_encoder_cannot_be_probed_is_one_line(make, message, tmp_path, capsys):
    model, _, processor = make()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for split, shade in (("train", 0), ("test", 255)):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (28, 28), (shade, 0, 0)).save(tmp_path / split / name / "picture.png")
    words = [tmp_path / "model", "--data", tmp_path / "train", "--test", tmp_path / "test", "--out", tmp_path / "out"]
    capsys.readouterr()
    assert sailvit_cli.main(["probe", *map(str, words), "--no-cache", "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not (tmp_path / "out").exists()
