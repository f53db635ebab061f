"""Small sets of labelled pictures as files, and small random vision encoders of several libraries."""

from pathlib import Path

import timm
from PIL import Image
from sklearn.datasets import load_digits
from transformers import BitImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_digits(folder: Path, train: int = 120, test: int = 60) -> Path:
    """Write scikit-learn's digits as PNG files of 8 x 8 pixels: train/CLASS/ and test/CLASS/."""
    digits = load_digits()
    for index in range(train + test):
        split, label = "train" if index < train else "test", digits.target[index]
        file = folder / split / str(label) / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 255 / 16).astype("uint8")).save(file)
    return folder


def write_dinov2(folder: Path) -> Path:
    Dinov2Model(Dinov2Config(**SMALL, image_size=28, patch_size=14)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    text = {**SMALL, "vocab_size": 64, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 8})
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_timm(folder: Path) -> Path:
    model = timm.create_model("test_vit", pretrained=False, num_classes=0)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder
