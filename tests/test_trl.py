"""SAIL-VL trained by TRL's SFTTrainer, as it comes."""

import numpy as np
import pytest
import torch
from conftest import relative_difference
from PIL import Image
from toy_sailvl import write_release
from transformers import AutoModelForImageTextToText, AutoProcessor

from sailvit.convert import convert_checkpoint


# trl and its dependencies warn of each other, and need Python 3.11
pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]
ANSWER = "The total is 42."
PARTS = {"vision_model", "mlp1", "language_model"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("trl")
    convert_checkpoint(write_release(path / "release"), path / "toy", verify=False)
    return path / "toy"


def conversations(kind: str):
    """Eight samples in one of TRL's formats; "mixed" has 0, 1 and 2 images."""
    datasets = pytest.importorskip("datasets")
    pixels, rows = np.random.default_rng(0), []
    for index in range(8):
        count = index % 3 if kind == "mixed" else 1
        images = [Image.fromarray(pixels.integers(0, 255, (60, 80, 3), dtype=np.uint8)) for _ in range(count)]
        question = [{"type": "image"}] * count + [{"type": "text", "text": "What is the total?"}]
        turns = [{"role": "user", "content": question}]
        reply = [{"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
        row = {"prompt": turns, "completion": reply} if kind == "completion" else {"messages": turns + reply}
        rows.append({**row, "images": images})
    return datasets.Dataset.from_list(rows)


def make_trainer(folder, kind: str, tmp_path, peft_config=None):
    trl = pytest.importorskip("trl")
    options = trl.SFTConfig(
        output_dir=str(tmp_path), max_length=None, per_device_train_batch_size=2, max_steps=3, use_cpu=True, bf16=False,
        report_to=[], logging_steps=1, learning_rate=1e-3, save_strategy="no", disable_tqdm=True,
        assistant_only_loss=kind == "assistant",
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    data = conversations(kind)
    return trl.SFTTrainer(
        model=model, args=options, train_dataset=data, processing_class=processor, peft_config=peft_config
    )


@pytest.mark.parametrize("kind", ["messages", "completion", "mixed", "assistant"])
def test_sft_trainer_trains_every_part_of_the_model(folder, kind, tmp_path):
    trainer = make_trainer(folder, kind, tmp_path)
    model, before = trainer.model, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    batch = next(iter(trainer.get_train_dataloader()))
    if kind in ("completion", "assistant"):  # in the others TRL's collator makes visual tokens targets
        with torch.no_grad():
            assert relative_difference(model(**batch, fused_lm_head=True).loss, model(**batch).loss) < 1e-5
        targets = batch["input_ids"][0][batch["labels"][0] != -100]
        assert trainer.processing_class.tokenizer.decode(targets) == ANSWER + "<|im_end|>"
    trainer.train()
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == PARTS
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_sft_trainer_trains_an_adapter(folder, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=".*language_model.*q_proj", r=2, task_type="CAUSAL_LM")
    trainer = make_trainer(folder, "messages", tmp_path, adapter)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    assert changed and all("lora_" in name for name in changed)
    trainer.model.save_pretrained(tmp_path / "adapter")
    convert_checkpoint(tmp_path / "adapter", tmp_path / "merged", base=folder, verify=False)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").num_parameters()
