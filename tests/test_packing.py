"""Packing inside the optimizer step: plans, the order of samples, resuming, the loss of a step, data loaders."""

import math
import multiprocessing
import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from toy_corpus import MemoryCorpus, make_corpus, make_model, make_processor, make_samples
from transformers import InternVLVisionConfig, SiglipVisionConfig

from sailvit import SAILViTConfig, SAILVLConfig, SAILVLForConditionalGeneration, SAILVLProcessor
from sailvit.train.formats import BadSample
from sailvit.train.order import EpochOrder, permutation
from sailvit.train.packing import PackedBatches, plan_step, tile_cost


RANKS = [1, 2, 3, 8]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> SAILVLProcessor:
    return make_processor(tmp_path_factory.mktemp("tokenizers") / "toy")


@pytest.fixture(scope="module")
def corpus(processor, tmp_path_factory: pytest.TempPathFactory) -> MemoryCorpus:
    return make_corpus(make_samples(22), processor, tmp_path_factory.mktemp("cache"))


def lengths_only(processor, folder: Path, count: int, seed: int = 0) -> MemoryCorpus:
    """Return a corpus to plan with, not to read: 10% text, else 1 to 9 tiles; log-normal answers."""
    rng = np.random.default_rng(seed)
    tiles = np.where(rng.random(count) < 0.1, 0, rng.integers(1, 10, count))
    tokens = 40 + 256 * tiles + rng.lognormal(math.log(120), 1, count).clip(1, 4000).astype(int)
    return MemoryCorpus([None] * count, processor, folder, tokens, tiles)


def flatten(plan: list[list[list[int]]]) -> list[int]:
    return [sample for rank in plan for pack in rank for sample in pack]


# Plans


SIZES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 6)), max_size=60)


@settings(deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(100, 300), st.none() | st.integers(6, 20), st.floats(0, 50))
def test_a_plan_has_every_sample_once_within_the_limits(sizes, ranks, max_tokens, max_tiles, cost):
    tokens, tiles = [size[0] for size in sizes], [size[1] for size in sizes]
    plan = plan_step(tokens, tiles, ranks, max_tokens, max_tiles, cost)
    assert sorted(flatten(plan)) == list(range(len(sizes)))
    assert len(plan) == ranks and len({len(packs) for packs in plan}) == 1
    for pack in (pack for packs in plan for pack in packs):
        assert sum(tokens[sample] for sample in pack) <= max_tokens
        assert max_tiles is None or sum(tiles[sample] for sample in pack) <= max_tiles
    assert plan == plan_step(np.array(tokens, np.int32), np.array(tiles, np.int32), ranks, max_tokens, max_tiles, cost)


@settings(deadline=None)
@given(SIZES, st.integers(1, 9), st.floats(0, 50))
def test_packs_of_a_micro_step_are_neighbours_in_the_order_of_cost(sizes, ranks, cost):
    tokens, tiles = [size[0] for size in sizes], [size[1] for size in sizes]
    plan = plan_step(tokens, tiles, ranks, 100, None, cost)
    loads = [[sum(tokens[s] + cost * tiles[s] for s in packs[step]) for packs in plan] for step in range(len(plan[0]))]
    for costlier, cheaper in pairwise(loads):
        assert min(costlier) >= max(cheaper) - 1e-9


@pytest.mark.parametrize(
    ("tokens", "tiles", "ranks", "max_tiles", "packs_per_rank"),
    [
        ([50, 50, 50, 50], [0] * 4, 1, None, 2),  # by the sum of tokens
        ([60, 60, 60], [0] * 3, 1, None, 3),  # no two in one pack
        ([10] * 4, [2] * 4, 1, 4, 2),  # by the sum of tiles
        ([10] * 4, [3] * 4, 1, 4, 4),
        ([40, 40, 40, 40, 40], [0] * 5, 2, None, 2),  # 200 tokens would fit into 2 packs, but 5 x 40 need 3
        ([], [], 3, None, 1),
    ],
)
def test_a_rank_has_the_fewest_packs_that_work(tokens, tiles, ranks, max_tiles, packs_per_rank):
    plan = plan_step(tokens, tiles, ranks, 100, max_tiles, 1.0)
    assert [len(packs) for packs in plan] == [packs_per_rank] * ranks


def test_packs_are_balanced_by_the_cost_of_tokens_and_tiles():
    """Equal tokens, unequal tiles: without the cost of a tile, two samples with tiles would share a pack."""
    plan = plan_step([10, 10, 10, 10], [4, 0, 4, 0], 2, 20, None, 100.0)
    assert sorted(sorted(packs[0]) for packs in plan) in ([[0, 1], [2, 3]], [[0, 3], [1, 2]])


@pytest.mark.parametrize(("tokens", "tiles"), [([101, 5], [0, 0]), ([5, 5], [0, 8])])
def test_a_sample_larger_than_a_pack_is_an_error(tokens, tiles):
    with pytest.raises(ValueError, match=r"expected at most 100 tokens and 7 tiles, got"):
        plan_step(tokens, tiles, 2, 100, 7, 1.0)


def simulate(tokens: np.ndarray, tiles: np.ndarray, cost: float, plan: list[list[list[int]]]) -> float:
    """Return the time of a step whose micro-steps last as long as their slowest rank, divided by the ideal time."""
    costs = tokens + cost * tiles
    slowest = [max(costs[packs[step]].sum() for packs in plan) for step in range(len(plan[0]))]
    return sum(slowest) / (costs.sum() / len(plan))


@pytest.mark.parametrize(("ranks", "limit"), [(8, 1.02), (64, 1.06)])
def test_a_step_of_512_samples_is_balanced(processor, tmp_path, ranks, limit):
    corpus = lengths_only(processor, tmp_path, 512 * 10)
    for start in range(0, len(corpus), 512):
        tokens, tiles = corpus.tokens[start : start + 512], corpus.tiles[start : start + 512]
        assert simulate(tokens, tiles, 256, plan_step(tokens, tiles, ranks, 8192, 32, 256)) <= limit


# Cost


def count_flops(model, run) -> float:
    # the kernels of sdpa for CPUs are not counted, its composition of matrix products is
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run(model)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "vision",
    [
        SAILViTConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=56),
        SiglipVisionConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=56,
            patch_size=14, vision_use_head=False,
        ),
        InternVLVisionConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=[112, 112],
            patch_size=[14, 14],
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
@pytest.mark.parametrize("text", ["qwen2", "qwen3", "gpt2"])
def test_the_cost_of_a_tile_is_that_of_the_flops_that_torch_counts(vision, text):
    fields = {"model_type": text, "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    config = SAILVLConfig(vision, fields, image_token_id=300)
    model = SAILVLForConditionalGeneration(config).eval()
    height, width = config.grid_size[0] * 14, config.grid_size[1] * 14
    tile = count_flops(model, lambda model: model.get_image_features(torch.zeros(1, 3, height, width)))
    # one token attends to itself only: 4 * width of the heads per layer, which the formula leaves out
    attention = 4 * 2 * 4 * model.config.text_config.to_dict().get("head_dim", 16)
    token = count_flops(model.get_decoder(), lambda decoder: decoder(torch.zeros(1, 1, dtype=torch.long))) - attention
    # the class token of InternViT is one of 65; transformers < 5 computes angles of positions by a matrix product
    tolerance = 0.03 if vision.model_type == "internvl_vision" else 1e-3
    assert tile_cost(config) == pytest.approx(tile / token, rel=tolerance)


def test_of_experts_only_those_that_a_token_visits_cost():
    text = {"model_type": "qwen3_moe", "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96,
            "moe_intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "num_experts": 8}  # fmt: skip
    vision = SAILViTConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, image_size=56
    )
    two, four = (
        1 / tile_cost(SAILVLConfig(vision, {**text, "num_experts_per_tok": n}, image_token_id=300)) for n in (2, 4)
    )
    attention, router, expert = 64 * 64 * 2 + 64 * 32 * 2, 64 * 8, 3 * 64 * 48
    assert four / two == pytest.approx((attention + router + 4 * expert) / (attention + router + 2 * expert), rel=0.01)


# Order


def test_a_permutation_depends_on_seed_and_epoch_only():
    orders = [permutation(1000, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert np.array_equal(orders[0], orders[3])
    assert not any(np.array_equal(orders[0], order) for order in orders[1:3])
    assert orders[0].dtype == np.int32
    # As written by the first version: a run that is resumed with a later one goes on with the same samples.
    assert permutation(8, 7, 2).tolist() == [6, 4, 0, 5, 7, 1, 3, 2]


@given(st.integers(1, 300), st.integers(0, 5))
@settings(deadline=None)
def test_a_permutation_has_every_index_once(length, seed):
    assert sorted(permutation(length, seed, 0).tolist()) == list(range(length))


def test_a_permutation_is_not_biased():
    """Each of 16 values is at each position about equally often: chi-squared within 5 standard deviations."""
    orders = np.array([permutation(16, seed, 0) for seed in range(3000)])
    counts = np.array([[(orders[:, position] == value).sum() for value in range(16)] for position in range(16)])
    expected = len(orders) / 16
    statistic, degrees = ((counts - expected) ** 2 / expected).sum(), 15 * 15
    assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize(("length", "start", "stop"), [(10, 0, 10), (10, 8, 13), (10, 7, 34), (10, 29, 30), (3, 4, 4)])
def test_epochs_are_one_stream(tmp_path, length, start, stop):
    order = EpochOrder(length, 3, tmp_path, "corpus")
    stream = np.concatenate([permutation(length, 3, epoch) for epoch in range(4)])
    assert order.samples(start, stop).tolist() == stream[start:stop].tolist()


def test_the_order_is_written_once_mapped_and_removed_two_epochs_later(tmp_path, monkeypatch):
    order = EpochOrder(10, 0, tmp_path, "corpus")
    order.samples(0, 10)
    (path,) = tmp_path.glob("*.npy")
    written = path.stat().st_mtime_ns
    other = EpochOrder(10, 0, tmp_path, "corpus")
    other.samples(0, 10)
    assert path.stat().st_mtime_ns == written
    assert all(isinstance(opened, np.memmap) for opened in other._open.values())
    order.samples(0, 40)
    assert sorted(int(path.stem.rpartition("-")[2]) for path in tmp_path.glob("*.npy")) == [2, 3]
    assert other.samples(0, 10).tolist() == permutation(10, 0, 0).tolist()  # still mapped
    assert not [*tmp_path.glob("*.part")] and not [*tmp_path.glob(".*.part")]
    assert pickle.loads(pickle.dumps(order))._open == {}


def test_corpora_and_seeds_have_files_of_their_own(tmp_path):
    for length, seed, fingerprint in [(10, 0, "a"), (10, 1, "a"), (10, 0, "b"), (11, 0, "a")]:
        EpochOrder(length, seed, tmp_path, fingerprint).samples(0, 5)
    assert len([*tmp_path.glob("*.npy")]) == 4


def test_a_damaged_file_is_written_again(tmp_path):
    EpochOrder(10, 0, tmp_path, "corpus").samples(0, 10)
    (path,) = tmp_path.glob("*.npy")
    for content in (b"", path.read_bytes()[:-4], b"\0" * 200):
        path.write_bytes(content)
        assert EpochOrder(10, 0, tmp_path, "corpus").samples(0, 10).tolist() == permutation(10, 0, 0).tolist()


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot store the order of epoch 0: .*choose another cache folder"):
        EpochOrder(10, 0, tmp_path / "file", "corpus").samples(0, 5)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="No space left on device: expected"):
        EpochOrder(10, 0, tmp_path, "corpus").samples(0, 5)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["file"]


def read_order(folder: str, queue: multiprocessing.Queue) -> None:
    queue.put(EpochOrder(200_000, 0, folder, "corpus").samples(0, 1000).tolist())


def test_processes_that_start_together_share_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=read_order, args=(str(tmp_path), queue)) for _ in range(4)]
    for process in processes:
        process.start()
    orders = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(order == permutation(200_000, 0, 0)[:1000].tolist() for order in orders)
    assert len([*tmp_path.glob("*.npy")]) == 1


# Batches


@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(1, 200),
    samples_per_step=st.integers(1, 70),
    epochs=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 3),
    packing=st.booleans(),
)
def test_every_sample_is_seen_once_an_epoch_on_any_number_of_ranks(
    processor, tmp_path_factory, length, samples_per_step, epochs, seed, packing
):
    corpus = lengths_only(processor, tmp_path_factory.mktemp("order"), length)
    options = {"seed": seed, "epochs": epochs, "packing": packing}
    steps_by_ranks = []
    for ranks in RANKS:
        batches = PackedBatches(corpus, samples_per_step, ranks=ranks, **options)
        plans = [batches.plan(step) for step in range(len(batches))]
        assert all(len({len(packs) for packs in plan}) == 1 for plan in plans)
        steps_by_ranks.append([sorted(flatten(plan)) for plan in plans])
    assert all(steps == steps_by_ranks[0] for steps in steps_by_ranks)
    steps = steps_by_ranks[0]
    assert all(len(step) == samples_per_step for step in steps[:-1])
    assert Counter(sample for step in steps for sample in step) == dict.fromkeys(range(length), epochs)


def test_a_fraction_of_an_epoch_ends_in_a_short_step(processor, tmp_path):
    batches = PackedBatches(lengths_only(processor, tmp_path, 100), 32, epochs=1.5)
    assert [len(batches.samples(step)) for step in range(len(batches))] == [32, 32, 32, 32, 22]
    with pytest.raises(IndexError, match="expected 0 to 4"):
        batches.plan(5)
    with pytest.raises(IndexError):
        batches[-1]


def test_a_resumed_run_has_the_packs_of_an_uninterrupted_one(processor, tmp_path):
    def make(folder: str) -> PackedBatches:
        corpus = lengths_only(processor, tmp_path / folder, 100)
        return PackedBatches(corpus, 32, ranks=3, epochs=4, max_tokens_per_pack=5000)

    whole = [make("first").plan(step) for step in range(len(make("first")))]
    for step in (12, 5, 0):
        assert make("first").plan(step) == whole[step]
        assert make(f"resumed at {step}").plan(step) == whole[step]


def test_a_late_step_is_planned_without_the_epochs_before(processor, tmp_path, monkeypatch):
    created = []
    monkeypatch.setattr("sailvit.train.order.permutation", lambda *args: created.append(args) or permutation(*args))
    batches = PackedBatches(lengths_only(processor, tmp_path, 100), 50, epochs=10**7)
    batches.plan(10**7)
    assert created == [(100, 0, 5 * 10**6)]


def test_samples_that_do_not_fit_are_dropped(processor, tmp_path):
    corpus = lengths_only(processor, tmp_path, 200)
    batches = PackedBatches(corpus, 50, max_tokens_per_pack=1500, max_tiles_per_pack=4)
    kept = (corpus.tokens <= 1500) & (corpus.tiles <= 4)
    assert 0 < batches.num_samples == kept.sum() < 200


def test_statistics_are_those_of_the_plans(processor, tmp_path):
    corpus = lengths_only(processor, tmp_path, 512 * 6)
    batches = PackedBatches(corpus, 512, ranks=8, tile_cost=256)
    statistics = batches.statistics()
    plans = [batches.plan(step) for step in range(6)]
    packs = [len(plan[0]) for plan in plans]
    assert statistics["steps"] == 6
    assert statistics["packs_per_rank"] == {"min": min(packs), "mean": sum(packs) / 6, "max": max(packs)}
    assert statistics["fill"] == pytest.approx(corpus.tokens.sum() / (8 * sum(packs) * 8192))
    assert 0.8 < statistics["fill"] <= 1
    assert 1 <= statistics["balance"] <= 1.02
    one = batches.statistics([3])
    tokens, tiles = corpus.tokens, corpus.tiles
    chosen = batches.samples(3)
    assert one["balance"] == pytest.approx(
        simulate(tokens, tiles, 256, plans[3]) * (tokens + 256 * tiles).sum() / (tokens + 256 * tiles)[chosen].sum()
    )


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_of_a_step_is_the_same_however_it_is_divided(corpus, processor, packing):
    model = make_model(processor).eval()
    model.always_run_vision = True
    num_labels, losses = set(), []
    longest = int(corpus.tokens.max())
    for ranks in RANKS:
        for max_tokens in (longest, 2 * longest, 8192) if packing else (8192,):
            packs = []
            for rank in range(ranks):
                options = {"max_tokens_per_pack": max_tokens, "packing": packing}
                packs += PackedBatches(corpus, 12, ranks=ranks, rank=rank, **options)[0]
            answers = sum(pack.num_labels for pack in packs)
            num_labels.add(answers)
            with torch.no_grad():
                losses.append(
                    sum(model(**pack.inputs, num_items_in_batch=torch.tensor(answers)).loss.item() for pack in packs)
                )
    assert len(num_labels) == 1
    assert max(losses) - min(losses) <= 1e-6 * min(losses)


def test_without_packing_a_pack_is_a_sample(corpus):
    plan = PackedBatches(corpus, 12, ranks=5, packing=False).plan(0)
    assert sorted(len(pack) for packs in plan for pack in packs) == [0] * 3 + [1] * 12
    assert [len(packs) for packs in plan] == [3] * 5


def test_bad_samples_change_no_other_pack(corpus, processor):
    samples = [BadSample("broken") if index == 4 else sample for index, sample in enumerate(corpus._samples)]
    broken = MemoryCorpus(samples, processor, corpus.cache_dir, corpus.tokens, corpus.tiles)
    options = {"ranks": 2, "max_tokens_per_pack": 300}
    for rank in range(2):
        expected, got = (PackedBatches(source, 22, rank=rank, **options)[0] for source in (corpus, broken))
        assert len(expected) == len(got)
        for pack, other in zip(expected, got, strict=True):
            assert other.samples == [index for index in pack.samples if index != 4]
            assert other.skipped == [(4, "broken")] * (4 in pack.samples)


def identity(packs: list) -> list:
    return [(pack.samples, pack.inputs["input_ids"].tolist()) for pack in packs]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are cores
@pytest.mark.parametrize(
    ("workers", "context"),
    [(0, None), (1, "fork"), (3, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)],
)
def test_workers_change_nothing(corpus, workers, context):
    batches = PackedBatches(corpus, 6, ranks=2, rank=1, epochs=2, max_tokens_per_pack=400)
    loader = DataLoader(
        batches, batch_size=None, sampler=range(2, len(batches)), num_workers=workers, multiprocessing_context=context
    )
    assert [identity(packs) for packs in loader] == [identity(batches[step]) for step in range(2, len(batches))]


def test_tiles_travel_as_uint8_on_request(corpus):
    plain = PackedBatches(corpus, 6)[0][0].inputs["pixel_values"]
    small = PackedBatches(corpus, 6, uint8_tiles=True)[0][0].inputs["pixel_values"]
    assert (plain.dtype, small.dtype) == (torch.float32, torch.uint8) and plain.shape == small.shape


def test_packs_have_the_arguments_of_flash_attention_on_request(corpus):
    (pack,) = PackedBatches(corpus, 6, flash_attention=True)[0]
    assert pack.inputs["cu_seq_lens_q"].diff().tolist() == pack.lengths
    assert "cu_seq_lens_q" not in PackedBatches(corpus, 6)[0][0].inputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples_per_step": 0}, "samples_per_step: expected an integer of at least 1, got 0"),
        ({"samples_per_step": 2.5}, "samples_per_step: expected an integer of at least 1, got 2.5"),
        ({"max_tokens_per_pack": -1}, "max_tokens_per_pack: expected"),
        ({"max_tiles_per_pack": 0}, "max_tiles_per_pack: expected"),
        ({"ranks": True}, "ranks: expected an integer of at least 1, got True"),
        ({"ranks": 2, "rank": 2}, "rank: expected 0 to 1, got 2"),
        ({"seed": -1}, "seed: expected"),
        ({"epochs": 0}, "epochs: expected a number above 0, got 0"),
        ({"epochs": float("inf")}, "epochs: expected"),
        ({"tile_cost": -1.0}, "tile_cost: expected a number of at least 0, got -1.0"),
        ({"too_long": "cut"}, "too_long: expected one of drop, truncate, fail, got 'cut'"),
        ({"max_tokens_per_pack": 3}, "expected at least one sample of at most 3 tokens"),
    ],
)
def test_an_argument_out_of_range_is_named(corpus, arguments, message):
    with pytest.raises(ValueError, match=message):
        PackedBatches(corpus, **{"samples_per_step": 4, **arguments})
