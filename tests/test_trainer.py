"""Training with Trainer on packed batches, in one process: steps, logs, resuming, errors."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_corpus import (
    MemoryCorpus,
    make_corpus,
    make_independent,
    make_model,
    make_processor,
    make_sample,
    make_samples,
    split_turns,
)
from toy_recipe import ToyRecipe
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from sailvit import SAILVLProcessor
from sailvit.train.attention import PER_SAMPLE
from sailvit.train.collate import Pack
from sailvit.train.components import parameter_groups, set_trainable
from sailvit.train.flops import meta_model, sample_flops
from sailvit.train.formats import BadSample
from sailvit.train.log import Progress, append_lines, device_peak, keep_until, read_lines
from sailvit.train.packing import PackedBatches
from sailvit.train.trainer import SAILVLTrainer, TrainingError


# transformers 4 rotates checkpoints by time, and accelerate calls an old name of torch's autocast
pytestmark = [
    pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning"),
]


# What differs between two runs of the same steps.
MEASURED = {"seconds", "wait_seconds", "wait_fraction", "memory_gb"}
MEASURED |= {f"{name}_per_second" for name in ("samples", "tokens", "tiles")}
# What else Trainer reports, most of it at the end.
OF_TRAINER = {
    "epoch",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
    "train_loss",
}


LM_HEAD = "language_model.lm_head.weight"


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
    trainer = make_trainer(corpus, tmp_path, ToyRecipe(attn_implementation=chosen, max_steps=1, save_steps=1))
    model, seen = trainer.model, set()
    model.register_forward_hook(lambda *_: seen.add(model.language_model.config._attn_implementation))
    trainer.train()
    assert seen == {expected}
    assert {part.config._attn_implementation for part in (model.vision_model, model.language_model)} == {"sdpa"}
    assert PER_SAMPLE not in (tmp_path / "checkpoint-1" / "config.json").read_text()


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


def test_a_step_of_independent_turns_equals_one_of_separate_samples(processor, tmp_path):
    rng, recipe = np.random.default_rng(0), ToyRecipe(loss_reduction="square", max_steps=1)
    samples = [make_independent(rng, kind="ocr"), make_sample(rng, 1, kind="caption"), make_independent(rng, 1, 2)]
    samples[0] = replace(samples[0], turn_kinds=("ocr", "short_qa", "caption"))
    separate = [one for own in samples for one in split_turns(own)]
    separate[1:3] = [replace(one, kind=kind) for one, kind in zip(separate[1:3], ("short_qa", "caption"), strict=True)]
    entries = []
    for index, (each, packing) in enumerate([(separate, True), (samples, True), (samples, False)]):
        corpus = make_corpus(each, processor, tmp_path / f"{index}")
        options = {"samples_per_step": len(each), "max_tokens_per_pack": 2048, "packing": packing}
        make_trainer(corpus, tmp_path / f"{index}" / "run", recipe, **options).train()
        entries += read_log(tmp_path / f"{index}" / "run")
    expected, *shared = entries
    assert expected["loss_by_kind"].keys() == {"ocr", "short_qa", "caption", "unknown"} and expected["samples"] == 6
    for entry in shared:
        for name in ("loss", "grad_norm", "loss_by_kind"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-5), name
        assert [entry[name] - expected[name] for name in ("tokens", "answer_tokens")] == [0, 0]
        assert entry["samples"] == 3 and entry["tiles"] < expected["tiles"] / 1.5


def test_every_step_is_logged(corpus, tmp_path):
    trainer, resident = make_trainer(corpus, tmp_path), psutil.Process().memory_info().rss
    trainer.train()
    log, batches = read_log(tmp_path), trainer.batches
    for step, entry in enumerate(log):
        packs, samples = batches[step], batches.samples(step)
        assert entry["step"] == step + 1 and entry["samples"] == len(samples) and entry["skipped"] == 0
        assert entry["tokens"] == batches.corpus.tokens[samples].sum()
        assert entry["tiles"] == batches.corpus.tiles[samples].sum()
        assert entry["answer_tokens"] == sum(pack.num_labels for pack in packs)
        assert entry["seconds"] >= entry["wait_seconds"] > 0 and entry["grad_norm"] > 0
        assert entry["wait_fraction"] == entry["wait_seconds"] / entry["seconds"]
        for name in ("samples", "tokens", "tiles"):
            assert entry[f"{name}_per_second"] == pytest.approx(entry[name] / entry["seconds"])
        assert entry["fill"] == pytest.approx(entry["tokens"] / (len(packs) * 600)) and entry["balance"] == 1
        assert entry["mfu"] is None and entry["hfu"] is None  # a CPU, whose peak is unknown
    assert log[-1]["epoch"] == 2 and len(log) == len(batches) == 5
    peaks = [entry["memory_gb"] for entry in log]
    assert (
        resident / 1e9 <= peaks[0] * 1.001
        and peaks == sorted(peaks)
        and peaks[-1] < psutil.virtual_memory().total / 1e9
    )
    reported = [entry for entry in trainer.state.log_history if "loss" in entry]
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [entry[key] for entry in reported] == pytest.approx([entry[key] for entry in log], rel=1e-4)
    assert {*reported[0]} == {"loss", "grad_norm", "learning_rate", "epoch", "step"}  # what each checkpoint repeats


def test_the_loss_by_kind_is_the_mean_over_its_answer_tokens(corpus, tmp_path):
    """Whatever the reduction of the loss is. The learning rate keeps the weights as they are."""
    recipe = ToyRecipe(learning_rate=1e-30, loss_reduction="square")
    make_trainer(corpus, tmp_path, recipe, samples_per_step=3).train()
    model, batches = make_model(corpus.processor), make_batches(corpus, packing=False, samples_per_step=3)
    found = set()
    for step, entry in enumerate(read_log(tmp_path)):
        losses = {}
        for pack in batches[step]:
            with torch.no_grad():
                logits = model(**{key: value for key, value in pack.inputs.items() if key != "labels"}).logits
            each = F.cross_entropy(logits[0, :-1], pack.inputs["labels"][0, 1:], reduction="none")
            losses.setdefault(corpus[pack.samples[0]].kind, []).append(each[pack.inputs["labels"][0, 1:] != -100])
        expected = {kind: torch.cat(parts).mean().item() for kind, parts in losses.items()}
        assert entry["loss_by_kind"] == pytest.approx(expected, rel=1e-5)
        found.add(frozenset(expected))
    assert len(found) > 1  # some steps lack a kind


def test_utilisation_is_that_of_the_samples_of_a_step(corpus, tmp_path):
    recipe = ToyRecipe(trainable=["vision", "connector"], gradient_checkpointing=True, peak_tflops=2.5, max_steps=2)
    make_trainer(corpus, tmp_path, recipe).train()
    batches, model = make_batches(corpus), meta_model(make_model(corpus.processor).config, recipe.trainable)
    flops = sample_flops(model, ("vision", "language"))
    for step, entry in enumerate(read_log(tmp_path)):
        work = flops.of(0, 0, entry["answer_tokens"])
        for index in batches.samples(step):
            work += flops.of(int(corpus.tokens[index]), int(corpus.tiles[index]), 0)
        assert entry["mfu"] == pytest.approx(work.model / entry["seconds"] / 2.5e12)
        assert entry["hfu"] == pytest.approx(work.hardware / entry["seconds"] / 2.5e12) and entry["hfu"] > entry["mfu"]


def test_the_peak_of_a_device_is_that_of_its_data_sheet(monkeypatch):
    device = torch.device("cuda", 0)
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "AMD Instinct MI300X": 1307e12,
        "NVIDIA H100 PCIe": None,
        "NVIDIA GH200 480GB": None,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert device_peak(None, device, True) == peak
        assert device_peak(None, device, False) is None and device_peak(70.0, device, False) == 70e12
    assert device_peak(None, torch.device("cpu"), True) is None


def test_tensorboard_gets_the_figures_of_the_log(corpus, tmp_path):
    """Of two steps each: means over tokens, samples and time, not of the figures of the steps."""
    recipe = ToyRecipe(report_to=["tensorboard"], logging_steps=2, max_steps=4, peak_tflops=1)
    make_trainer(corpus, tmp_path, recipe).train()
    log = read_log(tmp_path)
    (folder,) = {path.parent for path in tmp_path.glob("runs/**/events*")}
    events = EventAccumulator(str(folder)).Reload()
    tags = {*events.Tags()["scalars"]}
    pairs = [(log[index], log[index + 1]) for index in (0, 2)]

    def check(name: str, expected: list[float]) -> None:
        scalars = events.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [2, 4]
        assert [scalar.value for scalar in scalars] == pytest.approx(expected, rel=1e-4)
        tags.remove(f"train/{name}")

    for name in ("loss", "fill", "balance"):
        check(name, [(first[name] + second[name]) / 2 for first, second in pairs])
    for name in ("samples", "tokens", "tiles"):
        check(f"{name}_per_second", [(a[name] + b[name]) / (a["seconds"] + b["seconds"]) for a, b in pairs])
    for name in ("mfu", "hfu", "wait_fraction"):
        check(name, [sum(e[name] * e["seconds"] for e in pair) / sum(e["seconds"] for e in pair) for pair in pairs])
    for name in ("memory_gb", "grad_norm", "learning_rate"):
        check(name, [second[name] for _, second in pairs])
    for kind in ("ocr", "short_qa"):
        values = [scalar.value for scalar in events.Scalars(f"train/loss_by_kind/{kind}")]
        for value, pair in zip(values, pairs, strict=True):
            of_steps = [entry["loss_by_kind"][kind] for entry in pair if kind in entry["loss_by_kind"]]
            assert min(of_steps) - 1e-4 <= value <= max(of_steps) + 1e-4
        tags.remove(f"train/loss_by_kind/{kind}")
    assert tags <= {f"train/{name}" for name in OF_TRAINER}


def test_progress_is_lines_where_there_is_no_terminal(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sailvit.train.log.INTERVAL", 0)
    make_trainer(corpus, tmp_path).train()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 5
    for number, (line, entry) in enumerate(zip(lines, read_log(tmp_path), strict=True), 1):
        rate = f"{entry['samples_per_second']:.1f}"
        left = "" if number == 1 else r", \d\d:\d\d left"
        assert re.fullmatch(rf"step {number}/5, loss {entry['loss']:.4f}, {rate} samples/s{left}", line), line


def test_lines_of_progress_keep_their_distance(capsys, monkeypatch):
    """The first and the last step have a line, and what 10 seconds passed before; the first is no part of the pace."""
    seconds = iter([100, 104, 109, 111, 112, 130])
    monkeypatch.setattr("sailvit.train.log.time.monotonic", lambda: next(seconds))
    progress = Progress(8, 2, is_terminal=False)
    for step in (3, 4, 5, 6, 7, 8):
        progress.update(step, 1.5, 20)
    assert capsys.readouterr().err.splitlines() == [
        "step 3/8, loss 1.5000, 20.0 samples/s",
        "step 6/8, loss 1.5000, 20.0 samples/s, 00:07 left",  # 3 steps in 11 seconds
        "step 8/8, loss 1.5000, 20.0 samples/s, 00:00 left",
    ]


def test_progress_on_a_terminal_is_a_bar_with_the_time_left(capsys):
    progress = Progress(9, 0, is_terminal=True)
    for step in (1, 2, 3):
        progress.bar.last_print_t -= 1  # tqdm draws at most ten times a second
        progress.update(step, 0.25, 20)
    progress.close()
    shown = capsys.readouterr().err
    assert re.search(r"3/9 \[\d\d:\d\d<\d\d:\d\d, .*loss 0.2500, 20.0 samples/s", shown), shown


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
    untimed = [[{k: v for k, v in entry.items() if k not in MEASURED} for entry in lines] for lines in (first, log)]
    assert untimed[0] == untimed[1]
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_resumed_run_with_tied_embeddings_misses_nothing(corpus, tmp_path, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda line, *args: warnings.append(line))
    for resumed in (None, str(tmp_path / "checkpoint-1")):
        recipe = ToyRecipe(max_steps=2, save_steps=1)
        model = make_model(corpus.processor, {"tie_word_embeddings": True})
        set_trainable(model, recipe)
        trainer = SAILVLTrainer(model, recipe, make_batches(corpus), tmp_path)
        trainer.train(resume_from_checkpoint=resumed)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert not warnings and LM_HEAD not in load_file(tmp_path / "checkpoint-1" / "model.safetensors")


@pytest.mark.parametrize("end", [1, 30, 31, 32, 60])
def test_lines_of_a_killed_run_are_kept_until_the_checkpoint(tmp_path, end):
    """The last line is torn, also behind a brace or in a character; U+2028 and U+0085 end no line."""
    path, entries = tmp_path / "log.jsonl", [{"step": step, "by_kind": {"é\u2028\x85": 1.5}} for step in (1, 2, 3)]
    append_lines(path, entries)
    whole = path.read_bytes()
    torn = whole[: len(whole) // 3]
    path.write_bytes(whole + torn[: min(end, len(torn) - 1)])
    assert read_lines(path, 9) == entries
    keep_until(path, 2)
    assert path.read_bytes() == whole[: 2 * len(torn)] and [*tmp_path.iterdir()] == [path]


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


def test_only_the_samples_of_packs_whose_loss_is_not_finite_are_named(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(corpus, tmp_path, packing=False)
    first, *_, last = trainer.batches.samples(0).tolist()
    compute = trainer._compute_pack_loss

    def compute_pack_loss(model: torch.nn.Module, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(loss * (math.nan if {first, last} & {*pack.samples} else 1) for loss in compute(model, pack))

    monkeypatch.setattr(trainer, "_compute_pack_loss", compute_pack_loss)
    one, other = sorted((first, last))
    with pytest.raises(TrainingError, match=rf"step 1, samples memory {one}, memory {other}: the loss"):
        trainer.train()


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
    with pytest.raises(
        TrainingError, match=r"2 samples could not be read, more than max_bad_fraction 0\.1 of 12: restore"
    ):
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
