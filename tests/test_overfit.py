"""A toy SAIL-VL that learns 64 images by heart, by the commands of docs/training.md."""

import json
from pathlib import Path

import pytest
import torch
from doc_pages import write_model
from PIL import Image, ImageDraw, ImageFont

import sailvit_cli
from sailvit import SAILVLForConditionalGeneration
from sailvit.train import load_processor


QUESTION = "What is the total?"
COUNT = 64
OPTIONS = [
    "data=corpus.yaml", "learning_rate=2e-3", "samples_per_step=16", "max_tokens_per_pack=700", "epochs=70",
    "workers=0", "report_to=[]", "precision=float32", "gradient_checkpointing=false",
]  # fmt: skip
# A random language model does not read: the third stage, which trains it, is the long one.
STAGES = {
    "stage1": ["model=new-vl", "output=runs/s1", "max_steps=5"],
    "stage2": ["model=runs/s1", "output=runs/s2", "max_steps=5"],
    "stage3": ["model=runs/s2", "output=runs/s3"],
}


def write_numbers(folder: Path) -> None:
    """Write images of the numbers from 0 on and a corpus that asks the same question about each."""
    font, lines = ImageFont.load_default(36), []
    for number in range(COUNT):
        image = Image.new("RGB", (56, 56), "white")
        ImageDraw.Draw(image).text((28, 28), f"{number:02}", "black", font, anchor="mm")
        image.save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": f"{number}"}]
        lines.append(json.dumps({"image": f"{number}.png", "conversations": turns}))
    (folder / "numbers.jsonl").write_text("\n".join(lines))
    (folder / "corpus.yaml").write_text("sources: [{name: numbers, path: numbers.jsonl, kind: ocr}]")


@torch.no_grad()
def answers(folder: Path, images: list[Image.Image]) -> list[str]:
    """Return the answers of a trained model, generated greedily."""
    processor, _ = load_processor(folder)
    model = SAILVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    batch = processor.image_processor(images, return_tensors="pt")
    return model.batch_chat(
        processor.tokenizer,
        batch["pixel_values"],
        [f"<image>\n{QUESTION}"] * len(images),
        {"max_new_tokens": 4, "do_sample": False},
        num_patches_list=batch["num_tiles"].tolist(),
    )


@pytest.mark.nightly
def test_a_toy_model_learns_64_images_by_heart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "new-vl", tmp_path)
    write_numbers(tmp_path)
    for stage, overrides in STAGES.items():
        assert sailvit_cli.main(["train", stage, *overrides, *OPTIONS]) == 0
    images = [Image.open(f"{number}.png") for number in range(COUNT)]
    generated = answers(Path("runs/s3"), images)
    right = sum(answer == str(number) for number, answer in enumerate(generated))
    assert right > 0.95 * COUNT, generated
