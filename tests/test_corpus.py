"""Corpora: files of every kind, lengths and their cache, mixing, bad and long samples."""

import gzip
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toy_sailvl import load_tokenizer

from sailvit import SAILViTImageProcessor, SAILVLProcessor
from sailvit.train import Corpus, TooManyBadSamplesError
from sailvit.train import corpus as corpus_module
from sailvit.train import lengths as lengths_module
from sailvit.train.mix import draw, scale_kinds


datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tmp_path_factory.mktemp("tokenizers") / "toy")


@pytest.fixture(scope="module")
def processor(tokenizer) -> SAILVLProcessor:
    return SAILVLProcessor(SAILViTImageProcessor(size=56, max_tiles=4), tokenizer, image_seq_length=4)


def chat(question: str = "What?", answer: str = "The total is 42.", **fields) -> dict:
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **fields,
    }


def write_lines(path: Path, records: list) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_corpus(folder: Path, *sources: dict, **fields) -> Path:
    """Write a corpus.yaml; a source without a name is named after its path."""
    named = [{"name": Path(source["path"]).stem, **source} for source in sources]
    (folder / "corpus.yaml").write_text(yaml.safe_dump({"sources": named, **fields}))
    return folder / "corpus.yaml"


@pytest.fixture
def load(tmp_path, processor):
    """Load the corpus of some sources in tmp_path."""

    def load(*sources: dict, processor: SAILVLProcessor = processor, num_proc: int | None = None, **fields) -> Corpus:
        path = write_corpus(tmp_path, *sources, **fields)
        return Corpus.from_yaml(path, processor, tmp_path / "cache", num_proc=num_proc)

    return load


def questions(corpus: Corpus) -> list[str]:
    return [sample.messages[0]["content"][-1]["text"] for sample in corpus]


# Files


def write_parquet(path: Path, records: list[dict]) -> Path:
    datasets.Dataset.from_list(records).to_parquet(str(path))
    return path


FILES = {
    "lines.jsonl": write_lines,
    "lines.jsonl.gz": lambda path, records: path.write_bytes(
        gzip.compress("\n".join(map(json.dumps, records)).encode())
    ),
    "array.json": lambda path, records: path.write_text(json.dumps(records)),
    "table.parquet": write_parquet,
    "saved": lambda path, records: datasets.Dataset.from_list(records).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_read(name, load, tmp_path, processor):
    records = [chat(f"question {number}", "a" * number) for number in range(1, 8)]
    FILES[name](tmp_path / name, records)
    corpus = load({"path": name})
    assert questions(corpus) == [f"question {number}" for number in range(1, 8)]
    counts = processor.count_tokens([sample.messages for sample in corpus])
    columns = (corpus.tokens, corpus.answers, corpus.tiles)
    assert [count[:3] for count in counts] == list(zip(*(column.tolist() for column in columns), strict=True))


def test_images_in_parquet_are_read_without_being_decoded(load, tmp_path, monkeypatch):
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": [{"user": datasets.Value("string"), "assistant": datasets.Value("string")}],
        }
    )
    image = Image.new("RGB", (112, 56))
    rows = [{"images": [image], "texts": [{"user": f"{number}", "assistant": "a"}]} for number in range(3)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "vision.parquet"))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    corpus = load({"path": "vision.parquet"})
    assert corpus.tiles.tolist() == [3, 3, 3]
    assert corpus[0].messages[0]["content"][0]["image"].size == (112, 56)


def test_a_pattern_matches_several_files(load, tmp_path):
    for number in range(3):
        write_lines(tmp_path / f"part{number}.jsonl", [chat(f"part {number}")])
    corpus = load({"path": "part*.jsonl", "name": "parts"})
    assert questions(corpus) == ["part 0", "part 1", "part 2"]
    assert corpus.locate(2) == ("parts", 1)


@pytest.mark.parametrize(("most", "entries"), [(1024, 1), (8, 3)])
def test_many_small_files_share_a_cache_entry_and_keep_their_line_numbers(load, tmp_path, monkeypatch, most, entries):
    monkeypatch.setattr("sailvit.train.rows.MOST_FILES", most)
    for number in range(20):
        write_lines(tmp_path / f"part-{number:02}.jsonl", [chat(f"{number}.{line}") for line in range(3)])
    with (tmp_path / "part-12.jsonl").open("a") as file:
        file.write("{broken")
    corpus = load({"name": "parts", "path": "part-*.jsonl"}, max_bad_fraction=1)
    assert questions(corpus) == [f"{number}.{line}" for number in range(20) for line in range(3)]
    assert [(Path(bad.path).name, bad.location) for bad in corpus.skipped] == [("part-12.jsonl", {"line": 4})]
    assert corpus.locate(40) == ("parts", 2) and corpus.skip(40, "").path.endswith("part-13.jsonl")
    assert len([*(tmp_path / "cache" / "rows").glob("*.arrow")]) == entries
    write_lines(tmp_path / "part-00.jsonl", [chat("new")])
    assert questions(load({"name": "parts", "path": "part-*.jsonl"}, max_bad_fraction=1))[:2] == ["new", "1.0"]


def test_a_meta_json_is_the_sources_that_it_lists(load, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (400, 100)).save(tmp_path / "pictures" / "wide.png")
    write_lines(tmp_path / "ocr.jsonl", [chat("<image>\nread", image="wide.png")] * 10)
    write_lines(tmp_path / "text.jsonl", [chat(f"{number}") for number in range(10)])
    meta = {
        "ocr": {"root": "pictures", "annotation": "ocr.jsonl", "repeat_time": 2, "max_dynamic_patch": 1, "length": 10},
        "text": {"annotation": "text.jsonl", "repeat_time": 0.5, "data_augment": False},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    corpus = load({"path": "meta.json", "name": "meta"})
    assert [corpus.locate(index)[0] for index in range(25)] == ["meta/ocr"] * 20 + ["meta/text"] * 5
    assert corpus.tiles.tolist() == [1] * 20 + [0] * 5
    assert questions(corpus)[20:] != [str(number) for number in range(5)]  # a random half, not the first lines


def test_a_data_set_with_splits_on_disk_needs_one(load, tmp_path):
    splits = {name: datasets.Dataset.from_list([chat(name)]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert questions(load({"path": "saved", "split": "test"})) == ["test"]
    with pytest.raises(ValueError, match="source saved: expected a split of train, test, got None"):
        load({"path": "saved"})


# Lengths


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """The number of samples of every call that counts tokens."""
    calls, count = [], lengths_module.SampleReader.count
    monkeypatch.setattr(
        lengths_module.SampleReader,
        "count",
        lambda self, samples: calls.append(len(samples)) or count(self, samples),
    )
    return calls


def test_lengths_are_computed_once(load, tmp_path, counted):
    write_lines(tmp_path / "a.jsonl", [chat()] * 3)
    write_lines(tmp_path / "b.jsonl", [chat()] * 4)
    sources = [{"path": "a.jsonl"}, {"path": "b.jsonl"}]
    load(*sources)
    assert counted == [3, 4]
    load(*sources)
    load({"path": "a.jsonl", "fraction": 0.7, "kind": "text"}, {"path": "b.jsonl", "repeat": 3}, seed=1)
    assert counted == [3, 4]


def test_a_changed_file_is_noticed_even_with_its_old_size_and_time(load, tmp_path, counted, monkeypatch):
    monkeypatch.setattr("sailvit.train.cache.SETTLED_SECONDS", -1)  # hashes of new files are kept, too
    write_lines(tmp_path / "a.jsonl", [chat("first")])
    write_lines(tmp_path / "b.jsonl", [chat("other")])
    os.utime(tmp_path / "a.jsonl", (1, 1))
    load({"path": "*.jsonl"})
    write_lines(tmp_path / "a.jsonl", [chat("fifth")])
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert len([*(tmp_path / "cache" / "hashes").glob("*.json")]) == 2
    assert questions(load({"path": "*.jsonl"})) == ["fifth", "other"]
    assert counted == [1, 1, 1]


@pytest.mark.parametrize("change", ["tokenizer", "template", "tiling", "source"])
def test_a_change_of_what_lengths_depend_on_is_noticed(change, load, tmp_path, processor, counted):
    other = {
        "tokenizer": lambda: {"tokenizer": _with_token(processor.tokenizer, "total")},
        "template": lambda: {"chat_template": processor.chat_template.replace("Image-", "Picture-")},
        "tiling": lambda: {"image_processor": SAILViTImageProcessor(size=56, max_tiles=3)},
        "source": dict,
    }[change]()
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer, "image_seq_length": 4}
    write_lines(tmp_path / "a.jsonl", [chat()])
    load({"path": "a.jsonl"})
    changed = SAILVLProcessor(**parts | other)
    load({"path": "a.jsonl", **({"max_tiles": 2} if change == "source" else {})}, processor=changed)
    assert counted == [1, 1]


def _with_token(tokenizer, token: str):
    changed = pickle.loads(pickle.dumps(tokenizer))
    changed.add_tokens(token)
    return changed


@contextmanager
def counting_maps() -> Iterator[list[int]]:
    """Note the processes of every Dataset.map."""
    processes, run = [], datasets.Dataset.map

    def note(self, *arguments, **options):
        processes.append(options["num_proc"])
        return run(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.Dataset, "map", note)
        yield processes


def test_processes_count_like_one(load, tmp_path, processor):
    write_lines(tmp_path / "a.jsonl", [chat("why " * (number % 50)) for number in range(1, 1300)])
    one = load({"path": "a.jsonl"})
    shutil.rmtree(tmp_path / "cache")
    with counting_maps() as processes:
        two = load({"path": "a.jsonl"}, num_proc=2)
    assert processes == [2]
    assert np.array_equal(one.tokens, two.tokens) and one.fingerprint == two.fingerprint


def _load_in_process(path: Path, processor: SAILVLProcessor, cache: Path, results) -> None:
    corpus = Corpus.from_yaml(path, processor, cache)
    results.put((len(corpus), corpus.fingerprint))


def test_two_processes_can_build_one_cache(tmp_path, processor):
    write_lines(tmp_path / "a.jsonl", [chat("why " * (number % 50)) for number in range(1, 400)])
    path = write_corpus(tmp_path, {"path": "a.jsonl"})
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    arguments = (path, processor, tmp_path / "cache", results)
    workers = [context.Process(target=_load_in_process, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = {results.get(), results.get()}
    for worker in workers:
        worker.join()
    assert {length for length, _ in found} == {399} and len(found) == 1


def test_a_pickle_of_a_corpus_does_not_contain_its_samples(load, tmp_path):
    write_lines(tmp_path / "a.jsonl", [chat("a" * 1000)] * 2000)
    corpus = load({"path": "a.jsonl"})
    content = pickle.dumps(corpus)
    assert len(content) < 100_000 + len(pickle.dumps(corpus.processor))
    assert pickle.loads(content)[1999] == corpus[1999]


def test_a_changed_meta_json_is_noticed(load, tmp_path):
    write_numbers(tmp_path, "a", 10)
    for repeat, length in ((1, 10), (3, 30), (0.5, 5)):
        (tmp_path / "meta.json").write_text(json.dumps({"a": {"annotation": "a.jsonl", "repeat_time": repeat}}))
        assert len(load({"path": "meta.json"})) == length


def test_images_that_arrive_later_are_used_after_a_recheck(load, tmp_path):
    write_lines(tmp_path / "a.jsonl", [chat("<image>\nWhat?", image="a.png", kind="ocr"), chat()])
    before = load({"path": "a.jsonl"}, max_bad_fraction=0.5)
    Image.new("RGB", (112, 56)).save(tmp_path / "a.png")
    assert len(load({"path": "a.jsonl"}, max_bad_fraction=0.5)) == 1
    after = load({"path": "a.jsonl"})  # too many are bad, so they are looked at again
    assert after.tiles.tolist() == [3, 0] and after.skipped == () and after.count_kinds() == {"ocr": 1, "unknown": 1}
    assert before.fingerprint != after.fingerprint


def test_relative_folders_of_two_projects_are_two_folders(tmp_path, processor, monkeypatch):
    tiles = []
    for project, size in (("one", (56, 56)), ("two", (112, 56))):
        (tmp_path / project / "images").mkdir(parents=True)
        Image.new("RGB", size).save(tmp_path / project / "images" / "a.png")
        write_lines(tmp_path / project / "a.jsonl", [chat("<image>\nWhat?", image="a.png")])
        write_corpus(tmp_path / project, {"path": "a.jsonl", "image_root": "images"})
        monkeypatch.chdir(tmp_path / project)
        tiles += Corpus.from_yaml("corpus.yaml", processor, tmp_path / "cache").tiles.tolist()
    assert tiles == [1, 3]


def test_an_absolute_annotation_leaves_the_image_root_with_the_meta_json(load, tmp_path):
    (tmp_path / "sub" / "images").mkdir(parents=True)
    Image.new("RGB", (56, 56)).save(tmp_path / "sub" / "images" / "a.png")
    file = write_lines(tmp_path / "a.jsonl", [chat("<image>\nWhat?", image="a.png")])
    (tmp_path / "sub" / "meta.json").write_text(json.dumps({"a": {"annotation": str(file), "root": "images"}}))
    assert load({"path": "sub/meta.json"}).tiles.tolist() == [1]


def test_the_tokenizer_is_hashed_once_and_few_files_are_open_at_a_time(load, tmp_path, monkeypatch):
    for number in range(90):
        write_lines(tmp_path / f"part{number:02}.jsonl", [chat(f"{number}")])
    calls, run = [], corpus_module.hash_processor
    monkeypatch.setattr(corpus_module, "hash_processor", lambda processor: calls.append(1) or run(processor))
    before = len([*Path("/proc/self/fd").iterdir()]) if sys.platform == "linux" else 0
    corpus = load({"path": "part*.jsonl"})
    assert questions(corpus) == [str(number) for number in range(90)]
    assert calls == [1]
    if sys.platform == "linux":
        assert len([*Path("/proc/self/fd").iterdir()]) - before < 80


def test_what_a_killed_process_left_is_removed(load, tmp_path):
    write_lines(tmp_path / "a.jsonl", [chat()])
    folder = load({"path": "a.jsonl"}).arrays.folder
    rest = folder.with_name(f".{folder.name}.0badcafe")
    rest.mkdir()
    (rest / "tokens.npy").touch()
    load({"path": "a.jsonl"})
    assert folder.exists() and not rest.exists()


# Mixing


def write_numbers(folder: Path, name: str, count: int, **fields) -> dict:
    write_lines(folder / f"{name}.jsonl", [chat(f"{name} {number}", **fields) for number in range(count)])
    return {"path": f"{name}.jsonl"}


def test_a_fraction_is_a_random_part_that_the_seed_decides(load, tmp_path):
    source = write_numbers(tmp_path, "a", 100) | {"fraction": 0.25}
    first, again, other = (questions(load(source, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len({*first}) == 25 and first != [f"a {number}" for number in range(25)]


def test_repeat_takes_every_sample_equally_often(load, tmp_path):
    corpus = load(write_numbers(tmp_path, "a", 10) | {"repeat": 2.5})
    texts = questions(corpus)
    assert len(texts) == 25 and {texts.count(text) for text in texts} == {2, 3}


def test_a_kind_is_raised_to_its_share_and_the_others_keep_their_ratio(load, tmp_path):
    sources = [
        write_numbers(tmp_path, "ocr", 10) | {"kind": "ocr"},
        write_numbers(tmp_path, "caption", 60) | {"kind": "caption"},
        write_numbers(tmp_path, "math", 30, channel="math"),
    ]
    assert load(*sources).count_kinds() == {"caption": 60, "math": 30, "ocr": 10}
    assert load(*sources, kinds={"ocr": 0.5}).count_kinds() == {"caption": 33, "math": 17, "ocr": 50}
    assert load(*sources, kinds={"ocr": 0.1}, total=50).count_kinds() == {"caption": 30, "math": 15, "ocr": 5}


def test_the_kind_of_a_source_overrides_that_of_a_record(load, tmp_path):
    source = write_numbers(tmp_path, "a", 2, kind="math")
    assert load(source).count_kinds() == {"math": 2}
    assert load(source | {"kind": "text"}).count_kinds() == {"text": 2}
    assert load(write_numbers(tmp_path, "b", 2)).count_kinds() == {"unknown": 2}


@given(st.integers(1, 50), st.integers(0, 200), st.integers(0, 5))
def test_draw_takes_entries_equally_often(length, count, seed):
    entries = np.arange(length) * 7
    drawn = draw(entries, count, [seed])
    times = np.unique(drawn, return_counts=True)[1] if count else np.zeros(1, int)
    assert len(drawn) == count and {*drawn.tolist()} <= {*entries.tolist()}
    assert times.max() - (times.min() if len(times) == length else 0) <= 1


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10_000), min_size=2),
    st.floats(0.01, 0.99),
    st.none() | st.integers(1, 100_000),
)
def test_scaled_kinds_add_up_to_the_total(counts, share, total):
    scaled = scale_kinds(counts, {min(counts): share}, total)
    total = total or sum(counts.values())
    assert sum(scaled.values()) == total
    assert abs(scaled[min(counts)] - share * total) <= 1
    backwards = dict(reversed(counts.items()))
    assert scale_kinds(backwards, {min(counts): share}, total) == scaled


# Bad samples


def test_a_bad_line_is_one_bad_sample_with_its_number(load, tmp_path):
    lines = [json.dumps(chat()), "{broken", "", "[1]", json.dumps(chat(answer=" ")), json.dumps(chat())]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"conversations": "\xff"}')
    corpus = load({"path": "a.jsonl"}, max_bad_fraction=1)
    assert len(corpus) == 2
    assert [entry.location for entry in corpus.skipped] == [{"line": line} for line in (2, 4, 5, 7)]
    assert [entry.to_dict()["source"] for entry in corpus.skipped] == ["a"] * 4
    assert "not JSON" in corpus.skipped[0].reason
    corpus.write_skipped(tmp_path / "skipped.jsonl")
    written = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert written == [entry.to_dict() for entry in corpus.skipped]


def test_too_many_bad_samples_are_an_error_with_the_first_reasons(load, tmp_path):
    write_lines(tmp_path / "a.jsonl", [chat()] * 88 + ["{"] * 12)
    with pytest.raises(
        TooManyBadSamplesError, match=r"12 of 100 samples are bad, more than max_bad_fraction 0\.1"
    ) as error:
        load({"path": "a.jsonl"}, max_bad_fraction=0.1)
    assert str(error.value).count("not JSON") == 10
    assert len(load({"path": "a.jsonl"}, max_bad_fraction=0.12)) == 88


@pytest.mark.filterwarnings("error")
def test_an_image_that_is_a_bomb_or_broken_is_a_bad_sample(load, tmp_path):
    (tmp_path / "bomb.png").write_bytes(_png_header(40_000, 40_000))
    (tmp_path / "large.png").write_bytes(_png_header(10_000, 10_000))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "empty.png").touch()
    names = ("bomb.png", "large.png", "broken.png", "empty.png", "missing.png")
    write_lines(tmp_path / "a.jsonl", [chat("<image>\nWhat?", image=name) for name in names] + [chat()])
    corpus = load({"path": "a.jsonl"}, max_bad_fraction=1)
    assert len(corpus) == 1 and len(corpus.skipped) == 5
    assert all(name in entry.reason for name, entry in zip(names, corpus.skipped, strict=True))


def _png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + checksum + b"\0\0\0\0IEND\xaeB`\x82"


def test_a_link_out_of_the_image_root_needs_allow_outside(load, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (56, 56)).save(tmp_path / "secret.png")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    write_lines(tmp_path / "a.jsonl", [chat("<image>\nWhat?", image=name) for name in ("link.png", "../secret.png")])
    source = {"path": "a.jsonl", "image_root": "images"}
    with pytest.raises(TooManyBadSamplesError, match="allow_outside"):
        load(source)
    assert len(load(source | {"allow_outside": True})) == 2


PLAYLISTS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n../secret.mp4\n#EXT-X-ENDLIST\n",
    "list.txt": "ffconcat version 1.0\nfile ../secret.mp4\n",
    "list.mpd": '<?xml version="1.0"?><MPD><BaseURL>../secret.mp4</BaseURL></MPD>',
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_may_lead_out_of_the_image_root_and_is_refused(name, load, tmp_path):
    (tmp_path / name).write_text(PLAYLISTS[name])
    write_lines(tmp_path / "a.jsonl", [chat("<video>\nWhat?", video=name), chat()])
    (entry,) = load({"path": "a.jsonl"}, max_bad_fraction=1).skipped
    assert "is a list of other files" in entry.reason


def test_a_file_that_breaks_a_decoder_is_one_bad_sample(load, tmp_path):
    (tmp_path / "bomb.mp4").write_bytes(_png_header(40_000, 40_000))
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    pixel_format = struct.pack("<II4sIIIII", 32, 4, b"ZZZZ", 0, 0, 0, 0, 0)
    dds = struct.pack("<4sIIIIIII44x", b"DDS ", 124, 0x1007, 4, 4, 0, 0, 0) + pixel_format
    (tmp_path / "texture.png").write_bytes(dds + bytes(200))
    records = [chat("<video>\nWhat?", video=name) for name in ("bomb.mp4", "noise.mp4")]
    records += [chat("<image>\nWhat?", image="texture.png"), chat("a", kind="\ud800"), chat()]
    write_lines(tmp_path / "a.jsonl", records)
    corpus = load({"path": "a.jsonl"}, max_bad_fraction=1)
    assert len(corpus) == 1
    assert [entry.location["line"] for entry in corpus.skipped] == [1, 2, 3, 4]


def test_an_image_that_cannot_be_fetched_is_a_bad_sample(load, tmp_path):
    url = "http://127.0.0.1:9/image.png"
    write_lines(tmp_path / "a.jsonl", [chat("<image>\nWhat?", image=url), chat()])
    (entry,) = load({"path": "a.jsonl"}, max_bad_fraction=1).skipped
    assert url in entry.reason and "refused" in entry.reason


def test_videos_without_pyav_are_one_error_not_bad_samples(load, tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    write_lines(tmp_path / "a.jsonl", [chat("<video>\nWhat?", video="clip.mp4"), chat()])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        load({"path": "a.jsonl"}, max_bad_fraction=1)


@pytest.mark.parametrize("damage", ["gzip", "deep", "lines", "saved"])
def test_a_damaged_file_is_named(damage, load, tmp_path):
    whole = gzip.compress("\n".join([json.dumps(chat(f"{number}")) for number in range(500)]).encode())
    (tmp_path / "gzip.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "lines.json").write_text("\n".join([json.dumps(chat())] * 2))
    datasets.Dataset.from_list([chat()]).select([]).save_to_disk(str(tmp_path / "saved"))
    path, message = {
        "gzip": ("gzip.jsonl.gz", "truncated or corrupt"),
        "deep": ("deep.json", "not JSON"),
        "lines": ("lines.json", r"name a file with one record per line \.jsonl"),
        "saved": ("saved", "contains no records"),
    }[damage]
    with pytest.raises(ValueError, match=message) as error:
        load({"path": path})
    assert str(tmp_path / path) in str(error.value)


# Long samples


@pytest.fixture
def long_corpus(load, tmp_path) -> Corpus:
    """Samples of one turn, of three turns and of one long turn."""
    turns = [{"from": role, "value": f"{role} {'x' * 40}"} for role in ("human", "gpt")]
    records = [{"conversations": turns}, {"conversations": turns * 3}, chat("y" * 1000)]
    write_lines(tmp_path / "a.jsonl", records)
    return load({"path": "a.jsonl"})


def test_long_samples_are_dropped_or_truncated_by_turns(long_corpus, processor, counted):
    limit = int(long_corpus.tokens[0]) + 5
    dropped = long_corpus.fit(limit, too_long="drop")
    assert len(dropped) == 1 and dropped.too_long == {"dropped": 2, "truncated": 0}
    truncated = long_corpus.fit(limit, too_long="truncate")
    assert truncated.too_long == {"dropped": 1, "truncated": 1}
    assert [len(sample.messages) for sample in truncated] == [2, 2]
    counts = processor.count_tokens([sample.messages for sample in truncated])
    assert [count.tokens for count in counts] == truncated.tokens.tolist()
    counted.clear()
    assert long_corpus.fit(limit, too_long="truncate").too_long == truncated.too_long and counted == []
    assert long_corpus.fit(10_000) is long_corpus


def test_long_samples_can_be_an_error(long_corpus):
    with pytest.raises(ValueError, match=r"2 of 3 samples do not fit into a pack of 300 tokens: the first is a 2"):
        long_corpus.fit(300, too_long="fail")
    with pytest.raises(ValueError, match="3 of 3 samples"):
        long_corpus.fit(10)
    with pytest.raises(ValueError, match="too_long: expected one of drop, truncate, fail, got 'cut'"):
        long_corpus.fit(300, too_long="cut")


# Bad input


A = "sources: [{name: a, path: a.jsonl}]\n"
WRONG = [
    (
        "sources: [{name: a, path: a.jsonl, fractoin: 0.5}]",
        r"sources\.0\.fractoin: unknown field; did you mean fraction",
    ),
    ("source: []", "source: unknown field; did you mean sources"),
    ("sources: []", "sources: .*at least 1"),
    ("sources: [{name: a}]", r"sources\.0\.path: Field required"),
    ("sources: [{name: a, path: a.jsonl, fraction: 1.5}]", r"sources\.0\.fraction: .*equal to 1, got 1.5"),
    ("sources: [{name: a, path: a.jsonl, fraction: .nan}]", r"sources\.0\.fraction: .*finite"),
    ("sources: [{name: a, path: a.jsonl, repeat: 0}]", r"sources\.0\.repeat: .*greater than 0, got 0"),
    ("sources: [{name: a, path: a.jsonl}, {name: a, path: b.jsonl}]", "the source name 'a' is given twice"),
    ("sources: [{name: m, path: good.json}, {name: m/x, path: a.jsonl}]", "the source name 'm/x' is given twice"),
    ("sources: [{name: a, path: a.jsonl, split: train}]", r"a\.jsonl is a file: split is for folders"),
    (A + "kinds: {unknown: 1}\ntotal: 1000000000", "total: expected at most 1000 times the 1 samples"),
    ("sources: [{name: a, path: a.jsonl, max_tiles: 100000}]", r"sources\.0\.max_tiles: .*equal to 1024"),
    ("sources: [{name: a, path: a.jsonl, subset: x}]", "subset needs split"),
    ("sources: [{name: a, path: a.jsonl, min_rating: {beauty: 3}}]", "source a: min_rating: .*'beauty'"),
    ("sources: [{name: a, path: none.jsonl}]", r"none\.jsonl matches no file"),
    ("sources: [{name: a, path: corpus.yaml}]", r"expected a \.json"),
    ("sources: [{name: a, path: .}]", "is no folder of save_to_disk"),
    ("sources: [{name: a, path: empty.jsonl}]", "contains no records"),
    ("sources: [{name: a, path: bad.parquet}]", "not a valid parquet file"),
    ("sources: [{name: a, path: other.parquet}]", "expected a column messages or .*, got question"),
    ("sources: [{name: a, path: broken.json}]", r"broken\.json: not JSON"),
    ("sources: [{name: a, path: number.json}]", "expected a list of records"),
    ("sources: [{name: a, path: meta.json}]", r"meta\.json: x: expected an object with annotation"),
    (A + "kinds: {ocr: 0.5}", "no source has samples of kind 'ocr'; the kinds are unknown"),
    (A + "kinds: {unknown: 0.5}", r"the shares add up to 0\.5: expected 1, no other kind is left"),
    (A + "kinds: {a: 1.5}", r"kinds\.a: .*equal to 1, got 1\.5"),
    (A + "kinds: {a: 0.6, b: 0.6}", r"shares of kinds add up to 1\.2"),
    (A + "total: 5", "total needs kinds"),
    (A + A, "the key 'sources' is given twice"),
    ("[1]", "expected a mapping with sources, got list"),
    ("a: [", "no valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_corpus_file_is_one_clear_error(text, message, tmp_path, processor):
    write_lines(tmp_path / "a.jsonl", [chat()])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.parquet").write_text("no parquet")
    write_parquet(tmp_path / "other.parquet", [{"question": "why"}])
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "meta.json").write_text('{"x": {"root": "."}}')
    (tmp_path / "good.json").write_text('{"x": {"annotation": "a.jsonl"}}')
    (tmp_path / "corpus.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Corpus.from_yaml(tmp_path / "corpus.yaml", processor, tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_a_data_set_on_the_hub_without_network_is_one_clear_error(load, monkeypatch):
    def offline(*arguments, **options):
        raise ConnectionError("no network:\n the Hub cannot be reached")

    monkeypatch.setattr("sailvit.train.rows.load_dataset", offline)
    with pytest.raises(ValueError, match="source a: owner/name, split train: no network: the Hub cannot be reached"):
        load({"path": "owner/name", "split": "train", "name": "a"})


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path, processor):
    write_lines(tmp_path / "a.jsonl", [chat()])
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(OSError, match=r"cache.*: the cache cannot be written: Not a directory: choose another"):
        Corpus.from_yaml(write_corpus(tmp_path, {"path": "a.jsonl"}), processor, tmp_path / "cache")


def test_a_full_disk_leaves_nothing_half_written(load, tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", [chat()])

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    for module, name, left in ((pa.ipc, "new_stream", []), (np, "save", ["rows"])):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(
                OSError, match=rf"^{tmp_path}/cache: the cache .* No space left on device: choose another"
            ):
                load({"path": "a.jsonl"})
        files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.suffix != ".lock"]
        assert [file.parent.name for file in files] == left
    assert len(load({"path": "a.jsonl"})) == 1
