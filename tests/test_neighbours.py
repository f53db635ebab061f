"""transformers' Trainer and TRL's SFTTrainer train a SAIL-VL: the examples of docs/training.md, as written."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from doc_pages import TRAINING, block_with, write_model, write_training_data
from packaging.version import Version
from transformers import AutoTokenizer


# The trainers warn about each other's options, and about pinned memory on a machine without a GPU.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
# On a CPU in float32; a toy model learns little at the learning rate of a real one.
AT_TOY_SIZE = {"learning_rate=1e-5": "learning_rate=1e-3, use_cpu=True, bf16=False, save_strategy='no'"}
PARTS = {"vision_model", "mlp1", "language_model"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A current directory with the files of the page and a toy SAIL-VL."""
    write_model(tmp_path / "new-vl", tmp_path)
    write_training_data(tmp_path, monkeypatch)


def make_trainer(word: str, **replaced: str):
    """Run the example that contains a word up to its `trainer.train()`, at toy size, and return the trainer."""
    code = block_with(TRAINING, word).removesuffix("trainer.train()\n")
    for old, new in {**AT_TOY_SIZE, **replaced}.items():
        code = code.replace(old, new)
    torch.manual_seed(0)  # the order of the samples
    exec(code, scope := {})
    return scope["trainer"]


def labelled_texts(batch: dict[str, torch.Tensor]) -> list[str]:
    """Return the text of the labels of every row; they are the tokens at their positions."""
    has_label = batch["labels"] != -100
    assert torch.equal(batch["labels"][has_label], batch["input_ids"][has_label])
    tokenizer = AutoTokenizer.from_pretrained("new-vl")
    return [tokenizer.decode(row[kept]) for row, kept in zip(batch["labels"], has_label, strict=True)]


def loss_of(trainer, batch: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return trainer.model.eval()(**batch).loss.item()


def check_training(trainer, batch: dict[str, torch.Tensor]) -> None:
    """Train, and check that every component changes and the loss of a batch goes down."""
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    loss = loss_of(trainer, batch)
    trainer.train()
    assert loss_of(trainer, batch) < 0.95 * loss
    changed = {name.split(".")[0] for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == PARTS


def answers_of(messages: list[dict]) -> str:
    """Return what the labels of a sample are to be: each answer and its end of turn."""
    parts = [message["content"] for message in messages if message["role"] == "assistant"]
    return "".join("".join(part["text"] for part in content) + "<|im_end|>" for content in parts)


def test_trainer_trains_on_a_corpus():
    trainer = make_trainer(" Trainer,")
    corpus = list(trainer.train_dataset)
    batch = trainer.data_collator(corpus)
    assert labelled_texts(batch) == [answers_of(sample.messages) for sample in corpus]
    assert (batch["labels"] != -100).sum() == trainer.train_dataset.answers.sum()
    check_training(trainer, batch)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="TRL's assistant_only_loss needs 5.18")
def test_sft_trainer_trains_on_messages():
    pytest.importorskip("trl")  # needs Python 3.11
    trainer = make_trainer("SFTTrainer(")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    assert labelled_texts(batch) == ["A raccoon.<|im_end|>", "7<|im_end|>"]
    check_training(trainer, batch)


def test_sft_trainer_trains_on_prompts_and_completions():
    pytest.importorskip("trl")
    rows = [json.loads(line) for line in Path("sft.jsonl").read_text().splitlines()]
    rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:], "images": row["images"]} for row in rows]
    Path("sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = make_trainer("SFTTrainer(", **{"assistant_only_loss=True": "assistant_only_loss=False"})
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    assert labelled_texts(batch) == ["A raccoon.<|im_end|>", "7<|im_end|>"]
    check_training(trainer, batch)


@pytest.mark.parametrize(
    "options, message",
    [
        ("max_length=512, packing=True", "Packing is not supported for vision datasets"),
        ("max_length=150", "truncation would cut through an image"),
    ],
)
def test_sft_trainer_refuses_to_cut_or_pack_images(options, message):
    pytest.importorskip("trl")
    replaced = {"max_length=None": options, "assistant_only_loss=True": "assistant_only_loss=False"}
    with pytest.raises(ValueError, match=message):
        make_trainer("SFTTrainer(", **replaced).train()
