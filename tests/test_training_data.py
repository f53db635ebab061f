"""From files to the tensors of a training step: a corpus in packed batches."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_corpus import chat, processor, tokenizer, write_corpus, write_lines  # noqa: F401, fixtures
from torch.utils.data import DataLoader

from sailvit.train import Corpus, PackedBatches
from sailvit.train.collate import collate, encode_sample, read_pack
from sailvit.train.formats import FormatOptions, Sample
from sailvit.train.lengths import SampleReader


@pytest.fixture
def corpus(tmp_path, processor) -> Corpus:  # noqa: F811
    for number, size in enumerate([(112, 56), (56, 224), (300, 300)]):
        Image.new("RGB", size, (number * 80, 90, 200)).save(tmp_path / f"{number}.jpg")
    captions = [chat("<image>\nWhat?", "a" * (number % 9 + 1), image=f"{number % 3}.jpg") for number in range(12)]
    write_lines(tmp_path / "captions.jsonl", captions)
    turns = [{"from": role, "value": f"{role} {number}"} for number in range(20) for role in ("human", "gpt")]
    write_lines(tmp_path / "text.jsonl", [{"conversations": turns}] * 3)
    sources = [{"path": "captions.jsonl", "max_tiles": 2}, {"path": "text.jsonl"}]
    return Corpus.from_yaml(write_corpus(tmp_path, *sources), processor, tmp_path / "cache")


@pytest.mark.parametrize("workers", [0, 2])
def test_lengths_options_and_truncation_agree_with_the_tensors(corpus, workers):
    batches = PackedBatches(corpus, 6, max_tokens_per_pack=400, too_long="truncate")
    assert batches.corpus.too_long == {"dropped": 0, "truncated": 3}
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    packs = [pack for step in loader for pack in step]
    assert [pack.skipped for pack in packs if pack.skipped] == []
    samples = [index for pack in packs for index in pack.samples]
    assert sorted(samples) == list(range(15))
    for pack in packs:
        assert pack.inputs["input_ids"].shape[1] == sum(pack.lengths) <= 400
        tiles = pack.inputs["pixel_values"].shape[0] if "pixel_values" in pack.inputs else 0
        assert tiles == batches.corpus.tiles[pack.samples].sum()
        assert pack.num_labels == batches.corpus.answers[pack.samples].sum()
    assert set(corpus.tiles[:12].tolist()) == {1, 3}  # two tiles and a thumbnail at most, by the option of the source


@given(
    sizes=st.lists(st.tuples(st.integers(20, 200), st.integers(20, 200)), max_size=2),
    texts=st.lists(st.tuples(st.text(max_size=9), st.text("abc", min_size=1, max_size=9)), min_size=1, max_size=4),
    system=st.sampled_from(["", "Be brief."]),
    share_prompt=st.booleans(),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lengths_of_independent_turns_are_those_of_their_tensors(processor, sizes, texts, system, share_prompt):  # noqa: F811
    formats = FormatOptions(independent_turns=True, share_prompt=share_prompt)
    reader = SampleReader(processor, "", formats, {})
    turns = [{"user": question, "assistant": answer} for question, answer in texts]
    record = {"images": [Image.new("RGB", size) for size in sizes], "texts": turns}
    assume("<" not in "".join(question for question, _ in texts))
    sample = reader.read(record)
    (counts,), pack = reader.count([sample]), collate([encode_sample(sample, processor)])
    assert counts[:3] == (sum(pack.lengths), pack.num_labels, len(pack.inputs.get("pixel_values", ())))
    alone = [reader.count([Sample(messages)])[0] for messages in sample.conversations]
    first, *others = [count.tokens for count in alone]
    prefix = counts.prefix if share_prompt else 0
    assert pack.lengths == [first, *(tokens - prefix for tokens in others)] and pack.conversations == [len(texts)]
    assert sum(segment.prefix for segment in pack.segments) == (prefix if others else 0)
    assert {count.tiles for count in alone} == {counts.tiles}


@pytest.mark.parametrize("share_prompt", [False, True])
def test_independent_turns_about_videos_and_equal_pictures_have_the_tiles_that_are_counted(
    processor,  # noqa: F811
    tmp_path,
    share_prompt,
):
    Image.new("RGB", (112, 56)).save(path := tmp_path / "wide.png")
    frames = [Image.new("RGB", (56, 56), (shade, 0, 0)) for shade in (0, 90, 180)]
    reader = SampleReader(processor, "", FormatOptions(tmp_path, independent_turns=True, share_prompt=share_prompt), {})
    turns = [{"user": question, "assistant": "A."} for question in ("What?", "Why?")]
    for media, tiles in (({"videos": [frames]}, 3), ({"images": [path.name] * 2}, 6)):
        sample = reader.read({"texts": turns, **media})
        (counts,), encoded = reader.count([sample]), encode_sample(sample, processor)
        assert counts.tiles == len(encoded.tiles) == tiles and counts.tokens == len(encoded.input_ids)
        pack, alone = collate([encoded]), encode_sample(Sample(sample.conversations[1]), processor)
        shown = pack.inputs["pixel_values"][pack.inputs.get("tile_indices", torch.arange(tiles))]
        assert torch.equal(shown[-tiles:], alone.tiles)


def test_the_cache_notices_independent_turns(tmp_path, processor):  # noqa: F811
    Image.new("RGB", (112, 56)).save(tmp_path / "wide.png")
    turns = [{"from": role, "value": f"{role} {number}"} for number in range(4) for role in ("human", "gpt")]
    write_lines(tmp_path / "a.jsonl", [{"image": "wide.png", "conversations": turns}] * 2)
    source, corpora = {"path": "a.jsonl"}, []
    for options in ({}, {"independent_turns": True}, {}):
        path = write_corpus(tmp_path, source | options)
        corpora.append(Corpus.from_yaml(path, processor, tmp_path / "cache"))
    dialogue, independent, again = corpora
    assert len(independent) == 2 and independent.tiles.tolist() == dialogue.tiles.tolist() == [3, 3]
    assert (independent.tokens > 2 * dialogue.tokens).all() and (independent.answers == dialogue.answers).all()
    assert again.fingerprint == dialogue.fingerprint != independent.fingerprint
    pack = read_pack(independent.fit(int(independent.tokens[0]) - 1, None, "truncate"), [0, 1])
    assert pack.skipped == [] and pack.conversations == [3, 3] and len(pack.inputs["pixel_values"]) == 6


@pytest.mark.parametrize("kind, counts", [(None, {"caption+ocr": 1, "ocr": 1}), ("text", {"text": 2})])
def test_kinds_of_turns_are_those_of_the_corpus(tmp_path, processor, kind, counts):  # noqa: F811
    texts = [{"user": "What?", "assistant": "A.", "kind": each} for each in ("ocr", "caption")]
    write_lines(tmp_path / "a.jsonl", [{"texts": texts}, {"texts": texts[:1]}])
    source = {"path": "a.jsonl", "independent_turns": True} | ({"kind": kind} if kind else {})
    corpus = Corpus.from_yaml(write_corpus(tmp_path, source), processor, tmp_path / "cache")
    assert corpus.count_kinds() == counts and corpus.kind_names == (
        ("text",) if kind else ("caption", "caption+ocr", "ocr")
    )
    assert read_pack(corpus, [0, 1]).kinds == ([None] * 3 if kind else ["ocr", "caption", None])


def test_an_image_that_breaks_later_is_skipped_and_named(corpus, tmp_path):
    whole = (tmp_path / "2.jpg").read_bytes()
    (tmp_path / "2.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "1.jpg").unlink()
    packs = [pack for step in DataLoader(PackedBatches(corpus, 6), batch_size=None) for pack in step]
    skipped = [corpus.skip(index, reason) for pack in packs for index, reason in pack.skipped]
    assert sorted(entry.location["line"] for entry in skipped) == [2, 3, 5, 6, 8, 9, 11, 12]
    assert all("1.jpg" in entry.reason or "2.jpg" in entry.reason for entry in skipped)
    assert sum(len(pack.samples) for pack in packs) == 7


def test_a_changed_image_is_noticed_when_it_is_read(corpus, tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "0.jpg")
    packs = [pack for step in DataLoader(PackedBatches(corpus, 15), batch_size=None) for pack in step]
    reasons = [reason for pack in packs for _, reason in pack.skipped]
    assert len(reasons) == 4 and all("a file changed since" in reason for reason in reasons)
    assert torch.equal(packs[0].inputs["position_ids"][0, :3], torch.arange(3))
