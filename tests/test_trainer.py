"""Training with Trainer on packed batches, in one process: steps, logs, resuming, errors."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toy_corpus import MemoryCorpus, make_corpus, make_model, make_processor, make_samples
from toy_recipe import ToyRecipe
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from sailvit import SAILVLProcessor
from sailvit.train.attention import PER_SAMPLE
from sailvit.train.components import parameter_groups, set_trainable
from sailvit.train.formats import BadSample
from sailvit.train.packing import PackedBatches
from sailvit.train.trainer import SAILVLTrainer, TrainingError


# transformers 4 rotates checkpoints by time, and accelerate calls an old name of torch's autocast
pytestmark = [
    pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning"),
]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> SAILVLProcessor:
    return make_processor(tmp_path_factory.mktemp("tokenizers") / "toy")


@pytest.fixture(scope="module")
def corpus(processor, tmp_path_factory: pytest.TempPathFactory) -> MemoryCorpus:
    return make_corpus(make_samples(12), processor, tmp_path_factory.mktemp("cache"))


def make_batches(corpus: MemoryCorpus, **options) -> PackedBatches:
    return PackedBatches(corpus, **{"samples_per_step": 5, "max_tokens_per_pack": 600, "epochs": 2, **options})


def make_trainer(corpus: MemoryCorpus, output: Path, recipe: ToyRecipe | None = None, **options) -> SAILVLTrainer:
    recipe = recipe or ToyRecipe()
    model = make_model(corpus.processor)
    set_trainable(model, recipe)
    return SAILVLTrainer(model, recipe, make_batches(corpus, **options), output)


def read_log(output: Path, name: str = "log.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def weights_of(trainer: SAILVLTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def train_by_hand(corpus: MemoryCorpus, recipe: ToyRecipe) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train without Trainer and without packs: one sample at a time, with all logits."""
    model, batches = make_model(corpus.processor), make_batches(corpus, packing=False)
    model.always_run_vision = True
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), betas=(0.9, 0.95))
    warmup = math.ceil(recipe.warmup_ratio * len(batches))
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, len(batches), min_lr_rate=0.1)
    losses = []
    for packs in (batches[step] for step in range(len(batches))):
        losses.append(0.0)
        for pack in packs:
            logits = model(**{key: value for key, value in pack.inputs.items() if key != "labels"}).logits
            loss = F.cross_entropy(logits[0, :-1], pack.inputs["labels"][0, 1:], reduction="sum")
            loss = loss / sum(each.num_labels for each in packs)
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses, model.state_dict()


@pytest.mark.parametrize("options", [{}, {"packing": False}, {"uint8_tiles": True}])
def test_a_run_equals_a_loop_over_single_samples(corpus, tmp_path, options):
    trainer = make_trainer(corpus, tmp_path, **options)
    trainer.train()
    losses, weights = train_by_hand(corpus, trainer.recipe)
    log = read_log(tmp_path)
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
    for name, tensor in weights_of(trainer).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chosen, expected", [(None, PER_SAMPLE), ("sdpa", "sdpa")])
def test_a_cpu_attends_per_sample_unless_the_recipe_says_otherwise(corpus, tmp_path, chosen, expected):
    trainer = make_trainer(corpus, tmp_path, ToyRecipe(attn_implementation=chosen, max_steps=1))
    trainer.train()
    assert trainer.model.language_model.config._attn_implementation == expected
    assert trainer.model.vision_model.config._attn_implementation == "sdpa"
    trainer.save_model()
    assert PER_SAMPLE not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_the_loss_of_a_step_does_not_depend_on_packs(corpus, tmp_path, reduction):
    logs = []
    for index, options in enumerate([{}, {"packing": False}]):
        trainer = make_trainer(corpus, tmp_path / str(index), ToyRecipe(loss_reduction=reduction), **options)
        trainer.train()
        logs.append(read_log(trainer.output))
    for packed, single in zip(*logs, strict=True):
        assert packed["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert packed["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)


def test_every_step_is_logged(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path)
    trainer.train()
    log, batches = read_log(tmp_path), trainer.batches
    for step, entry in enumerate(log):
        packs, samples = batches[step], batches.samples(step)
        assert entry["step"] == step + 1 and entry["samples"] == len(samples) and entry["skipped"] == 0
        assert entry["tokens"] == batches.corpus.tokens[samples].sum()
        assert entry["tiles"] == batches.corpus.tiles[samples].sum()
        assert entry["answer_tokens"] == sum(pack.num_labels for pack in packs)
        assert entry["seconds"] >= entry["wait_seconds"] > 0 and entry["grad_norm"] > 0
    assert log[-1]["epoch"] == 2 and len(log) == len(batches) == 5
    reported = [entry for entry in trainer.state.log_history if "loss" in entry]
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [entry[key] for entry in reported] == pytest.approx([entry[key] for entry in log], rel=1e-4)


@pytest.mark.parametrize("trainable", [["connector"], ["vision", "connector"], ["language"]])
def test_only_the_trained_components_change(corpus, tmp_path, trainable):
    recipe = ToyRecipe(trainable=trainable)
    trainer = make_trainer(corpus, tmp_path, recipe)
    before = weights_of(trainer)
    trainer.train()
    prefixes = {"vision": "vision_model.", "connector": "mlp1.", "language": "language_model."}
    trained = tuple(prefixes[name] for name in trainable)
    for name, tensor in weights_of(trainer).items():
        assert torch.equal(tensor, before[name]) != name.startswith(trained), name
    state = trainer.optimizer.state_dict()["state"]
    assert len(state) == sum(1 for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("saved_step", [2, 3])
def test_a_resumed_run_is_bit_equal(corpus, tmp_path, saved_step):
    """Step 3 is in the second epoch; the lines of log.jsonl after the checkpoint are written again."""
    recipe = ToyRecipe(save_steps=saved_step, save_total_limit=5)
    whole = make_trainer(corpus, tmp_path, recipe)
    whole.train()
    first = read_log(tmp_path)
    resumed = make_trainer(corpus, tmp_path, recipe)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_step}"))
    log = read_log(tmp_path)
    timings = ("seconds", "wait_seconds")
    untimed = [[{k: v for k, v in entry.items() if k not in timings} for entry in lines] for lines in (first, log)]
    assert untimed[0] == untimed[1]
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_bfloat16_keeps_float32_weights(corpus, tmp_path):
    losses = []
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer(corpus, tmp_path / precision, ToyRecipe(precision=precision))
        trainer.train()
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        losses.append([entry["loss"] for entry in read_log(trainer.output)])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_workers_of_the_loader_change_nothing(corpus, tmp_path):
    for workers in (0, 2):
        make_trainer(corpus, tmp_path / str(workers), ToyRecipe(workers=workers, max_steps=3)).train()
    logs = [read_log(tmp_path / str(workers)) for workers in (0, 2)]
    assert len(logs[0]) == 3 and [e["loss"] for e in logs[0]] == [e["loss"] for e in logs[1]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path, value):
    trainer = make_trainer(corpus, tmp_path)
    with torch.no_grad():
        trainer.model.mlp1[3].bias.fill_(value)
    with pytest.raises(TrainingError, match=r"step 1, samples memory \d+, .*: the loss is nan"):
        trainer.train()
    assert read_log(tmp_path) == []


def test_a_gradient_that_is_not_finite_stops_the_run(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path, ToyRecipe(save_steps=1))
    trainer.model.mlp1[3].bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"step 1, samples memory .*: the norm of the gradients is (nan|inf)"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_skipped_samples_are_listed(processor, tmp_path):
    samples = make_samples(12)
    corpus = make_corpus(samples, processor, tmp_path / "cache")
    samples[4] = BadSample("broken image")
    make_trainer(corpus, tmp_path).train()
    skipped = read_log(tmp_path, "skipped.jsonl")
    assert [entry["line"] for entry in skipped] == [5, 5] and skipped[0]["reason"] == "broken image"
    assert sum(entry["skipped"] for entry in read_log(tmp_path)) == 2
    assert {entry["step"] for entry in skipped} == {e["step"] for e in read_log(tmp_path) if e["skipped"]}


def test_too_many_samples_that_cannot_be_read_stop_the_run(processor, tmp_path):
    samples = make_samples(12)
    corpus = make_corpus(samples, processor, tmp_path / "cache")
    corpus.max_bad_fraction = 0.1
    samples[4] = BadSample("broken image")
    make_trainer(corpus, tmp_path / "one").train()  # once an epoch, and one sample all the same
    samples[5] = BadSample("Input/output error")
    with pytest.raises(TrainingError, match=r"2 samples could not be read, more than max_bad_fraction 0\.1 of 12"):
        make_trainer(corpus, tmp_path / "two").train()


def test_a_step_without_an_answer_token_is_an_error(processor, tmp_path):
    samples = make_samples(4)
    corpus = make_corpus(samples, processor, tmp_path / "cache")
    samples[:] = [BadSample("gone")] * 4
    with pytest.raises(TrainingError, match=r"step 1, samples .*: expected at least one answer token, got none"):
        make_trainer(corpus, tmp_path, max_tokens_per_pack=4096).train()


def test_an_engine_that_does_not_run_is_an_error(corpus, tmp_path):
    with pytest.raises(TrainingError, match=r"engine: expected ddp, but accelerate runs NO on 1 process"):
        make_trainer(corpus, tmp_path, ToyRecipe(engine="ddp"))


def test_batches_of_other_ranks_are_an_error(corpus, tmp_path):
    with pytest.raises(ValueError, match="batches: expected ranks=1, rank=0, got 2, 1"):
        make_trainer(corpus, tmp_path, ranks=2, rank=1)
