"""SAIL-VL through `sailvit convert`, `compose` and `inspect`: whole, in parts, and put together anew."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PHOTOGRAPH, TINY, TINY_SHAPE, make_checkpoint, random_pixels, randomize, relative_difference
from PIL import Image
from safetensors.torch import load_file, save_file
from toy_sailvl import (
    IMAGE_TOKENS,
    LANGUAGE,
    LANGUAGES,
    ReferenceModel,
    released_config,
    released_tensors,
    write_release,
    write_tokenizer,
)
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

import sailvit_cli
from sailvit import SAILViTModel, SAILVLConfig, SAILVLForConditionalGeneration
from sailvit.convert import CheckpointError, compose_model, convert_checkpoint, inspect_checkpoint
from sailvit.convert.export.code_files import CODE_FILES


IMAGE = 309  # <IMG_CONTEXT> in the toy tokenizer
INDEX = "model.safetensors.index.json"
PICTURE = Image.linear_gradient("L").resize((120, 60)).convert("RGB")


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release, what is made of it, and a tower of another kind; not to be changed."""
    folder = tmp_path_factory.mktemp("toys")
    write_release(folder / "release")
    for name, options in {"all": {}, "vision": {"part": "vision"}, "language": {"part": "language"}}.items():
        convert(folder / "release", folder / name, **options)
    return folder


@pytest.fixture
def release(tmp_path) -> Path:
    """A release that a test may change."""
    return write_release(tmp_path / "release")


def convert(source: Path, out: Path, **options):
    return convert_checkpoint(source, out, **{"verify": False, **options})


def compose(vision: Path, language: Path, out: Path, **options):
    return compose_model(vision, language, out, **{"verify": False, **options})


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def change(path: Path, **fields) -> None:
    """Fields of a JSON file; None takes one out."""
    content = {**read(path), **fields}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def change_tensors(folder: Path, change) -> None:
    """All of a sharded release, as one file."""
    tensors = change(tensors_of(folder))
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def inputs_of(folder: Path, picture: Image.Image = PICTURE) -> dict:
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What is the total?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=prompt, images=picture, return_tensors="pt")


def load(folder: Path, auto=AutoModelForImageTextToText):
    model, report = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    return model.eval()


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    return load(folder)(**inputs_of(folder)).logits


# All of it

HUB_LOADER_SCRIPT = """
import sys, torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers import AutoTokenizer
path, photo, out = sys.argv[1:]
trust = {"trust_remote_code": True}
config, processor = AutoConfig.from_pretrained(path, **trust), AutoProcessor.from_pretrained(path, **trust)
tokenizer = AutoTokenizer.from_pretrained(path, **trust)
model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, **trust).eval()
assert type(AutoModel.from_pretrained(path, **trust)).__name__ == type(model).__name__
assert type(AutoImageProcessor.from_pretrained(path, **trust)) is type(processor.image_processor)
assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == config.image_token_id == 309
content = [{"type": "image", "image": photo}, {"type": "text", "text": "What is the total?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits
written = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
assert written.shape[1] == inputs["input_ids"].shape[1] + 3
assert not any(name.split(".")[0] == "sailvit" for name in sys.modules)
torch.save([inputs["input_ids"], inputs["pixel_values"], logits], out)
"""


SLOW = pytest.mark.slow
CASES = [("qwen2", False), pytest.param("qwen3", True, marks=SLOW), pytest.param("llama", False, marks=SLOW)]


@pytest.mark.parametrize(("language", "tied"), CASES)
def test_a_converted_release_loads_with_remote_code(tmp_path, language, tied):
    from test_hub_folder import run_isolated

    source = write_release(tmp_path / "source", language, tied)
    done = convert(source, tmp_path / "out", verify=True)
    figures = done.verification
    assert figures["placeholders"] == figures["tiles"] * 4 == 13 * 4
    for file in source.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "out" / INDEX).read_bytes() == (source / INDEX).read_bytes()
    run_isolated(HUB_LOADER_SCRIPT, tmp_path / "out", PHOTOGRAPH, tmp_path / "logits.pt", home=tmp_path)
    ids, pixels, logits = torch.load(tmp_path / "logits.pt")
    config = released_config(language, tied)
    assert (
        relative_difference(logits, ReferenceModel(config, released_tensors(config), IMAGE).logits(ids, pixels)) < 1e-4
    )
    assert inspect_checkpoint(tmp_path / "out", deep=True).ok


def test_files_next_to_the_weights_are_the_releases(toys):
    out, source = toys / "all", toys / "release"
    pictures, config = read(out / "preprocessor_config.json"), read(out / "config.json")
    assert (pictures["max_tiles"], pictures["min_tiles"], pictures["use_thumbnail"]) == (12, 1, True)
    assert pictures["size"] == {"height": 56, "width": 56}
    assert config["image_token_id"] == IMAGE and config["dtype"] == "float32" and "/mnt" not in json.dumps(config)
    assert config["architectures"] == ["SAILVLForConditionalGeneration"]
    assert config["auto_map"]["AutoProcessor"] == "processing_sailvl.SAILVLProcessor"
    assert read(out / "generation_config.json") == {"eos_token_id": 306, "pad_token_id": 304}
    for file in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    assert read(out / "tokenizer_config.json") == {**read(source / "tokenizer_config.json"), **MARKS}
    card, record = (out / "README.md").read_text(), read(out / "provenance.json")
    assert "pipeline_tag: image-text-to-text" in card and "AutoModelForImageTextToText" in card
    assert record["tensors"] == {} and record["files"].keys() >= {*(path.name for path in out.glob("*.safetensors"))}
    assert record["source"]["files"].keys() >= {"config.json", INDEX, "tokenizer.json"}


MARKS = {
    "padding_side": "left",
    "image_token": "<IMG_CONTEXT>",
    "extra_special_tokens": {"image_token": "<IMG_CONTEXT>"},
}
TEXTS = ["What is the total?", "<img><IMG_CONTEXT><IMG_CONTEXT></img>\nDescribe.<|im_end|> <quad> image"]


def as_written_by_transformers_5(folder: Path, side: str | None) -> None:
    """tokenizer_config.json in the words of transformers >= 5; `side` may be told."""
    content = read(folder / "tokenizer_config.json")
    content["extra_special_tokens"] = content.pop("additional_special_tokens")
    content |= {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True}
    content |= {"padding_side": side} if side else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("new", [False, True], ids=["as released", "as transformers 5 writes it"])
def test_tokenizers_pad_left_and_name_the_placeholder(release, tmp_path, side, new):
    plain = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "plain"))
    if new:
        as_written_by_transformers_5(release, side)
        plain = PreTrainedTokenizerFast(tokenizer_file=str(release / "tokenizer.json"))
    elif side:
        change(release / "tokenizer_config.json", padding_side=side)
    language = write_language(tmp_path / "lm")
    for file in TOKENIZER:
        (language / file).write_bytes((release / file).read_bytes())
    done = convert(release, tmp_path / "all")
    assert any("pads right" in note for note in done.notes) == (side == "right")
    convert(release, tmp_path / "language", part="language")
    compose(release, language, tmp_path / "composed")
    for name in ("all", "language", "composed"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.padding_side == "left" and tokenizer.get_vocab() == plain.get_vocab(), name
        for text in TEXTS:
            ids = tokenizer(text).input_ids
            assert ids == plain(text).input_ids, name
            assert tokenizer.decode(ids, skip_special_tokens=True) == plain.decode(ids, skip_special_tokens=True)
        padded = tokenizer(TEXTS, padding=True).input_ids
        assert padded[0][0] == tokenizer.pad_token_id and padded[0][-1] == plain(TEXTS[0]).input_ids[-1]
        if name != "language":
            assert (tokenizer.image_token, tokenizer.image_token_id) == ("<IMG_CONTEXT>", IMAGE)
            processor = AutoProcessor.from_pretrained(tmp_path / name)
            assert processor.tokenizer.image_token_id == processor.image_token_id == IMAGE
            tokenizer.save_pretrained(tmp_path / "saved" / name)
            again = AutoTokenizer.from_pretrained(tmp_path / "saved" / name)
            assert (again.padding_side, again.image_token_id) == ("left", IMAGE)


def test_a_tokenizer_without_settings_is_marked_too(release, tmp_path):
    (release / "tokenizer_config.json").unlink()
    convert(release, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.padding_side, tokenizer.image_token_id) == ("left", IMAGE)


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def write_in_place(folder: Path) -> None:
    """Saves over files of weights as safetensors before 0.8 did: into the file that is there."""
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.truncate(0)
            opened.write(b"another model")


def put_in_cache(release: Path, cache: Path) -> Path:
    """A release as it lies in a cache of the Hub, its files links to blobs."""
    snapshot, blobs = cache / "models--douyin--toy" / "snapshots" / "0123", cache / "models--douyin--toy" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in release.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    return snapshot


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_saved_into_the_folder_leaves_its_source_as_it_is(release, tmp_path, cached):
    source = put_in_cache(release, tmp_path / "hub") if cached else release
    before, told = weights_of(source), []
    done = convert(source, tmp_path / "out", on_progress=lambda count, total: told.append((count, total)))
    assert weights_of(tmp_path / "out") == before and not any(f.is_symlink() for f in (tmp_path / "out").iterdir())
    placed = read(tmp_path / "out" / "provenance.json")["placed"]
    assert placed.keys() == before.keys() and {*placed.values()} <= {"copied", "reflinked"}
    assert any("unchanged weight files: 2 copied" in note or "2 reflinked" in note for note in done.notes)
    if "copied" in placed.values():
        size = sum(map(len, before.values()))
        assert told[-1] == (size, size) and done.copied == size
    write_in_place(tmp_path / "out")
    assert weights_of(source) == before


def test_hard_links_are_made_on_request_and_reported(toys, tmp_path, capsys):
    command = ["convert", str(toys / "release"), str(tmp_path / "out"), "--link", "--no-verify"]
    assert sailvit_cli.main(command) == 0
    if "reflinked" not in (said := capsys.readouterr().out):
        assert "2 hard links: whatever writes into them in place changes the source too" in said
        for file in (toys / "release").glob("*.safetensors"):
            assert (tmp_path / "out" / file.name).stat().st_ino == file.stat().st_ino
        assert {*read(tmp_path / "out" / "provenance.json")["placed"].values()} == {"hard-linked"}
        assert sailvit_cli.main(["inspect", str(tmp_path / "out")]) == 0
        assert "hard links" in capsys.readouterr().out


def test_a_cache_of_the_hub_is_never_linked_to(release, tmp_path):
    snapshot = put_in_cache(release, tmp_path / "hub")
    before = weights_of(snapshot)
    done = convert(snapshot, tmp_path / "out", link=True)
    if not any("reflinked" in note for note in done.notes):
        assert any("copied" in note and "a cache of the Hub is never linked to" in note for note in done.notes)
    write_in_place(tmp_path / "out")
    assert weights_of(snapshot) == before


def test_where_no_link_can_be_the_files_are_copied(toys, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("fcntl.ioctl", refuse)
    done = convert(toys / "release", tmp_path / "out", link=True)
    assert weights_of(tmp_path / "out") == weights_of(toys / "release")
    assert {*read(tmp_path / "out" / "provenance.json")["placed"].values()} == {"copied"}
    assert any("no link can be made there" in note for note in done.notes)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no reflinks are made")
@pytest.mark.parametrize("link", [False, True])
def test_reflinks_come_first(toys, tmp_path, monkeypatch, link):
    """A file system that has them is acted."""

    def clone(target: int, request: int, source: int) -> int:
        assert request == 0x40049409  # FICLONE of linux/fs.h
        return os.sendfile(target, source, 0, os.fstat(source).st_size)

    monkeypatch.setattr("fcntl.ioctl", clone)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))  # they take no room
    done = convert(toys / "release", tmp_path / "out", link=link)
    assert weights_of(tmp_path / "out") == weights_of(toys / "release")
    assert {*read(tmp_path / "out" / "provenance.json")["placed"].values()} == {"reflinked"}
    assert any("2 reflinked: they take no space" in note for note in done.notes) and done.copied == 0


def test_copies_without_room_are_refused_before_they_are_begun(toys, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError("no such request")

    monkeypatch.setattr("fcntl.ioctl", refuse)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"MB are to be written, 0\.0 MB are free"):
        convert(toys / "release", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_where_nothing_could_be_one_are_refused(toys, tmp_path):
    for options in ({"dtype": "bfloat16"}, {"part": "language"}, {"max_shard_size": "1GB"}):
        with pytest.raises(CheckpointError, match="--link: all weight files are rewritten"):
            convert(toys / "release", tmp_path / "out", link=True, **options)
    with pytest.raises(CheckpointError, match="--link: all weight files"):
        convert(toys / "vision", tmp_path / "out", link=True)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"max_shard_size": "400KB"}, {"max_shard_size": "5GB"}])
def test_weights_are_written_anew_where_they_are_to_be_other(toys, tmp_path, options):
    convert(toys / "release", tmp_path / "out", **options)
    before, after = tensors_of(toys / "release"), tensors_of(tmp_path / "out")
    dtype = getattr(torch, options.get("dtype", "float32"))
    assert equal(after, {name: tensor.to(dtype) for name, tensor in before.items()})
    assert read(tmp_path / "out" / "config.json")["dtype"] == options.get("dtype", "float32")
    assert read(tmp_path / "out" / "provenance.json")["tensors"].keys() == before.keys()
    assert len([*(tmp_path / "out").glob("*.safetensors")]) == (3 if options.get("max_shard_size") == "400KB" else 1)
    assert load(tmp_path / "out").dtype == dtype


def test_the_dtype_that_the_source_has_moves_nothing(toys, tmp_path):
    convert(toys / "release", tmp_path / "out", dtype="float32")
    assert read(tmp_path / "out" / "provenance.json")["placed"].keys() == weights_of(toys / "release").keys()


@pytest.mark.parametrize("source", ["pytorch_model.bin", "wrapped", "without format"])
def test_other_containers_are_written_anew(release, tmp_path, source):
    before = tensors_of(release)
    if source == "pytorch_model.bin":
        change_tensors(release, lambda all: all)
        (release / "model.safetensors").unlink()
        torch.save(before, release / source)
    elif source == "wrapped":
        change_tensors(release, lambda all: {f"module.{name}": tensor for name, tensor in all.items()})
    else:
        change_tensors(release, lambda all: all)
        save_file(before, release / "model.safetensors", {"written by": "somebody"})
    convert(release, tmp_path / "out")
    assert equal(tensors_of(tmp_path / "out"), before)
    assert "placed" not in read(tmp_path / "out" / "provenance.json")
    load(tmp_path / "out")


def test_a_tied_head_that_is_stored_is_taken_if_it_is_the_same(tmp_path):
    source = write_release(tmp_path / "source", tied=True)
    head, table = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    change_tensors(source, lambda all: {**all, head: all[table].clone()})
    convert(source, tmp_path / "out")
    load(tmp_path / "out")
    change_tensors_of_one(source, lambda all: {**all, head: all[table] + 1})
    with pytest.raises(CheckpointError, match=f"{head}: differs from {table}.*tie_word_embeddings"):
        convert(source, tmp_path / "again")


def change_tensors_of_one(folder: Path, change) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def test_a_folder_of_ours_is_converted_again(toys, tmp_path):
    shutil.copytree(toys / "all", tmp_path / "mine")
    (tmp_path / "mine" / "chat_template.jinja").write_text("{{ 'mine' }}")
    change(tmp_path / "mine" / "preprocessor_config.json", max_tiles=6)
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    convert(tmp_path / "mine", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'mine' }}"
    assert read(tmp_path / "out" / "preprocessor_config.json")["max_tiles"] == 6
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    assert read(tmp_path / "out" / "provenance.json")["source"]["source"]["name"] == "release"
    assert read(tmp_path / "out" / "config.json") == read(toys / "all" / "config.json")


def test_generation_and_image_settings_of_the_source_are_kept(release, tmp_path):
    (release / "generation_config.json").write_text('{"eos_token_id": [306, 304], "temperature": 0.5}')
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "size": 56, "crop_size": 56}
    (release / "preprocessor_config.json").write_text(json.dumps(said))
    done = convert(release, tmp_path / "out")
    assert not any("assumed" in note for note in done.notes)
    assert read(tmp_path / "out" / "generation_config.json") == {"eos_token_id": [306, 304], "temperature": 0.5}
    written = read(tmp_path / "out" / "preprocessor_config.json")
    assert (written["image_mean"], written["max_tiles"], written["size"]["width"]) == ([0.1, 0.2, 0.3], 12, 56)


# Parts


def test_all_is_the_default_for_a_release_and_the_tower_for_a_tower(toys, tmp_path):
    assert read(toys / "all" / "config.json")["model_type"] == "sailvl"
    convert(toys / "vision", tmp_path / "out")
    assert read(tmp_path / "out" / "config.json")["model_type"] == "sailvit"


@pytest.mark.parametrize(("factor", "name"), [(1, "downsample_ratio"), (4, "pixel_shuffle_factor")])
def test_the_tower_taken_out_has_the_pixel_shuffle_factor_of_the_whole(tmp_path, factor, name):
    source = write_release(tmp_path / "source", factor=factor)
    if name == "pixel_shuffle_factor":
        change(source / "config.json", downsample_ratio=None, pixel_shuffle_factor=factor)
    convert(source, tmp_path / "out", part="vision")
    assert read(tmp_path / "out" / "config.json")["pixel_shuffle_factor"] == factor
    features = load(tmp_path / "out", AutoModel).get_image_features(random_pixels(1, 3, 56, 56))
    assert features.shape == (1, TINY_SHAPE.grid_size**2 // factor**2, factor**2 * TINY["hidden_size"])


@pytest.mark.parametrize("source", ["release", "all"])
def test_the_tower_taken_out_gives_its_tokens(toys, tmp_path, source):
    convert(toys / source, tmp_path / "out", part="vision")
    pixels = random_pixels(2, 3, 56, 56)
    whole, alone = load(toys / "all"), load(tmp_path / "out", AutoModel)
    assert isinstance(alone, SAILViTModel)
    with torch.no_grad():
        expected = whole.vision_model(pixels).last_hidden_state
        assert torch.equal(alone(pixels).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("language", "tied"), [pytest.param("qwen2", True, marks=SLOW), ("qwen3", False), ("llama", False)]
)
def test_the_language_model_taken_out_loads_alone(tmp_path, language, tied):
    source = write_release(tmp_path / "source", language, tied)
    done = convert(source, tmp_path / "out", part="language", verify=language == "qwen2")
    model = load(tmp_path / "out", AutoModelForCausalLM)
    assert type(model).__name__ == LANGUAGES[language]["architectures"][0] and model.dtype == torch.float32
    assert model.config.tie_word_embeddings == tied and (done.verification is None) == (language != "qwen2")
    before = {name: tensor for name, tensor in tensors_of(source).items() if name.startswith("language_model.")}
    assert equal(tensors_of(tmp_path / "out"), {name.removeprefix("language_model."): t for name, t in before.items()})
    ids = torch.arange(10)[None]
    config = released_config(language, tied)
    with torch.no_grad():
        expected = ReferenceModel(config, released_tensors(config), IMAGE).logits(ids)
        assert relative_difference(model(ids).logits, expected) < 1e-6
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<IMG_CONTEXT>") == IMAGE
    assert read(tmp_path / "out" / "generation_config.json")["eos_token_id"] == 306


def test_the_connector_taken_out_is_its_tensors(toys, tmp_path):
    done = convert(toys / "release", tmp_path / "out", part="connector", dtype="float16", verify=True)
    before = {name: t.half() for name, t in tensors_of(toys / "release").items() if name.startswith("mlp1.")}
    assert equal(tensors_of(tmp_path / "out"), before) and done.verification is None and len(before) == 6
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from 256 numbers" in card and "nothing loads it alone" in card
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "model.safetensors", "provenance.json"]


VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14,
}  # fmt: skip
TOWERS = {
    "internvl_vision": InternVLVisionConfig(**VISION, image_size=[56, 56]),
    "siglip_vision_model": SiglipVisionConfig(**VISION, image_size=56),
}


def write_language(folder: Path, language: str = "qwen2", image_tokens: bool = False, **fields) -> Path:
    """A toy causal language model and its tokenizer, of 307 tokens or, with those of images, 316."""
    shape = {**LANGUAGE, **{key: value for key, value in LANGUAGES[language].items() if key == "head_dim"}}
    config = CONFIG_MAPPING[language](**{**shape, "tie_word_embeddings": False, **fields})
    randomize(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    return write_tokenizer(folder, image_tokens)


def write_tower(folder: Path, tower: str = "internvl_vision") -> Path:
    randomize(AutoModel.from_config(TOWERS[tower])).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_of_transformers_is_taken_out_as_its_own(tmp_path, tower):
    compose(write_tower(tmp_path / "tower", tower), write_language(tmp_path / "language"), tmp_path / "all")
    done = convert(tmp_path / "all", tmp_path / "out", part="vision", verify=True)
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "tower")) and done.verification
    assert load(tmp_path / "out", AutoModel).config.model_type == tower
    assert inspect_checkpoint(tmp_path / "out").ok and inspect_checkpoint(tmp_path / "all").ok
    with pytest.raises(CheckpointError, match="--to-layout: expected AIMv2, got vision encoder that is no AIMv2"):
        convert(tmp_path / "all", tmp_path / "again", part="vision", to_layout="timm")


@pytest.mark.slow
def test_what_lies_on_the_hub_is_converted_and_composed(tmp_path):
    from fake_hub import COMMIT, serve
    from test_hub_source import sailvit

    write_release(tmp_path / "hub" / "douyin" / "toy")
    write_language(tmp_path / "hub" / "qwen" / "toy")
    (tmp_path / "hub" / "qwen" / "toy" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    with serve(tmp_path / "hub") as (endpoint, _):
        done = sailvit(tmp_path, "convert", "douyin/toy", "out", "--no-verify", endpoint=endpoint)
        assert done.returncode == 0, done.stderr
        sources = ("--vision", "douyin/toy", "--language", "qwen/toy")
        done = sailvit(tmp_path, "compose", *sources, "new", "--no-verify", endpoint=endpoint)
        assert done.returncode == 0, done.stderr
    blobs = {blob.stat().st_ino for blob in (tmp_path / "hf").rglob("blobs/*")}
    files = [*(tmp_path / "out").glob("*.safetensors")]
    assert len(files) == 2 and not any(file.stat().st_ino in blobs or file.is_symlink() for file in files)
    assert "base_model: douyin/toy" in (tmp_path / "out" / "README.md").read_text()
    card, record = (tmp_path / "new" / "README.md").read_text(), read(tmp_path / "new" / "provenance.json")
    assert "base_model:\n- douyin/toy\n- qwen/toy" in card and "license:" not in card.split("---")[1]
    assert "qwen/toy is under apache-2.0, as its card says" in card
    assert [record["source"][part]["revision"] for part in ("vision", "language")] == [COMMIT, COMMIT]


# Another tower


def test_a_tower_put_back_changes_no_bit(toys, tmp_path):
    before = logits_of(toys / "all")
    convert(toys / "all", tmp_path / "out", insert_vision=toys / "vision")
    assert torch.equal(logits_of(tmp_path / "out"), before)
    assert equal(tensors_of(tmp_path / "out"), tensors_of(toys / "release"))
    first, second = sorted((toys / "release").glob("*.safetensors"))  # no tower in the first
    record = read(tmp_path / "out" / "provenance.json")
    assert (tmp_path / "out" / first.name).read_bytes() == first.read_bytes()
    assert record["placed"].keys() == {first.name} and second.exists()
    assert record["inserted"]["name"] == "vision" == record["options"]["insert_vision"]
    assert record["inserted"]["files"].keys() >= {"model.safetensors", "config.json"}
    assert inspect_checkpoint(tmp_path / "out", deep=True).ok


@pytest.mark.parametrize("layout", ["sailvit", "timm", "transformers"])
def test_another_tower_gives_its_own_features(toys, tmp_path, layout):
    """Of another depth and resolution, so that configuration, processor and index follow."""
    shape = TINY_SHAPE.__class__(64, 80, 2, 3, 14, 6)
    other = make_checkpoint(tmp_path / "other", layout, shape)
    convert(other, tmp_path / "tower")
    done = convert(toys / "release", tmp_path / "out", insert_vision=other, max_shard_size="5GB", verify=False)
    model, tower = load(tmp_path / "out"), load(tmp_path / "tower", AutoModel)
    assert model.config.image_seq_length == 9 and model.config.force_image_size == 84
    assert read(tmp_path / "out" / "preprocessor_config.json")["size"] == {"height": 84, "width": 84}
    assert read(tmp_path / "out" / "processor_config.json")["image_seq_length"] == 9
    pixels = random_pixels(1, 3, 84, 84)
    with torch.no_grad():
        assert torch.equal(model.vision_model(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    inputs = inputs_of(tmp_path / "out")
    assert (inputs["input_ids"] == IMAGE).sum() == 9 * len(inputs["pixel_values"])
    assert logits_of(tmp_path / "out").isfinite().all() and done.vision.match.scheme.name == layout


def test_an_inserted_encoder_gets_the_models_dtype_and_this_is_reported(tmp_path):
    source = write_release(tmp_path / "source", dtype=torch.bfloat16)
    done = convert(source, tmp_path / "out", insert_vision=make_checkpoint(tmp_path / "tower"))
    assert "inserted: float32 became bfloat16, as the rest of the model is" in done.notes
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert len([*(tmp_path / "out").glob("*.safetensors")]) == 2 and load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((128, 96, 2, 3, 14, 4), r"takes 256 numbers: expected a width of 64 \(2 x 2 tokens\), got 128"),
        ((64, 96, 2, 3, 14, 5), "folds 2 x 2 tokens: expected a grid that 2 divides, got 5 x 5 patches"),
    ],
)
def test_a_tower_that_the_connector_cannot_take_is_refused(toys, tmp_path, shape, message):
    tower = make_checkpoint(tmp_path / "tower", shape=TINY_SHAPE.__class__(*shape))
    with pytest.raises(CheckpointError, match=message):
        convert(toys / "release", tmp_path / "out", insert_vision=tower)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tower"]


def test_the_tower_that_is_inserted_is_not_written_over(toys, tmp_path):
    shutil.copytree(toys / "vision", tmp_path / "tower")
    with pytest.raises(CheckpointError, match="contains the source"):
        convert(toys / "all", tmp_path / "tower", insert_vision=tmp_path / "tower", overwrite=True)


# What cannot be


def without(*names: str):
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def config_with(**fields):
    return lambda folder: change(folder / "config.json", **fields)


def llm_with(**fields):
    return lambda folder: change(folder / "config.json", llm_config={**released_config()["llm_config"], **fields})


def tensors_with(name: str, make):
    def damage(folder: Path) -> None:
        change_tensors(folder, lambda all: {**{key: t for key, t in all.items() if key != name}, **make(all[name])})

    return damage


def without_image_tokens(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (folder / name).unlink()
    write_tokenizer(folder, image_tokens=False)


NORM, MATRIX = "language_model.model.norm.weight", "mlp1.1.weight"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json", "merges.txt")
DAMAGE = {
    "missing shard": (without("model-00002-of-00002.safetensors"), r"model-00002-of-00002\.safetensors.*copy or down"),
    "no configuration": (without("config.json"), r"config\.json is missing: put the model's config.json next"),
    "no language model": (config_with(llm_config=None), "has no section of a language model"),
    "no tokenizer": (without(*TOKENIZER), "no tokenizer .*: give the folder"),
    "no image tokens": (without_image_tokens, "the tokenizer has no <img>: use the one that was published"),
    "small vocabulary": (llm_with(vocab_size=300), r"expected shape \[300, 64\] by config.json, got \[384, 64\]"),
    "unknown language": (llm_with(model_type="gpt-17"), "'gpt-17' is not known .*--part vision"),
    "internlm2": (llm_with(model_type="internlm2"), "'internlm2' is not known .*convert it to Llama's names"),
    "ps_version": (config_with(ps_version="v1"), "ps_version 'v1' is not supported"),
    "select_layer": (
        config_with(select_layer=7),
        "select_layer 7 is out of range: expected -4 to 3 for a vision encoder of 3 blocks",
    ),
    "padded pictures": (config_with(pad2square=True), "pad2square is not supported: images are not padded"),
    "max tiles": (config_with(max_dynamic_patch=0), "max_tiles"),
    "missing tensor": (tensors_with(NORM, lambda t: {}), f"{NORM}: missing; expected shape .64."),
    "too much": (
        tensors_with(NORM, lambda t: {NORM: t, "extra": t}),
        "extra: what config.json describes has no such tensor",
    ),
    "wrong shape": (
        tensors_with(MATRIX, lambda t: {MATRIX: t[:, :8]}),
        r"mlp1.1.weight: expected .* by config.json, got \[64, 8\]",
    ),
    "empty": (tensors_with(NORM, lambda t: {NORM: t[:0]}), f"{NORM}: empty"),
    "adapter": (tensors_with(NORM, lambda t: {NORM: t, "language_model.a.lora_A.weight": t}), "merge it first"),
    "mixed": (tensors_with(NORM, lambda t: {NORM: t.half()}), "F16, F32: choose with --dtype"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_incomplete_release_is_refused_with_the_fix(release, tmp_path, damage):
    inflict, message = DAMAGE[damage]
    inflict(release)
    with pytest.raises(CheckpointError, match=message):
        convert(release, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_an_empty_tensor_of_no_model_is_reported_once(release):
    change_tensors(release, lambda all: {**all, "language_model.extra": torch.zeros(0)})
    problems = [problem for problem in inspect_checkpoint(release).problems if "extra" in problem.location]
    assert [problem.kind for problem in problems] == ["unexpected"]


def test_an_error_of_this_package_is_not_taken_for_a_bad_image_setting(release, tmp_path, monkeypatch):
    monkeypatch.setattr("sailvit.image_processing_sailvit.SAILViTImageProcessor.__init__", lambda *_, **__: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        convert(release, tmp_path / "out")


def test_nan_is_found_where_weights_are_written_anew(release, tmp_path):
    change_tensors(release, lambda all: {**all, NORM: all[NORM] * float("nan")})
    with pytest.raises(CheckpointError, match=f"{NORM} holds NaN"):
        convert(release, tmp_path / "out", dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to-layout", "timm"], "--to-layout: expected AIMv2, got SAIL-VL: add --part vision"),
        (["--image-size", "98"], "--image-size: expected AIMv2, got SAIL-VL: add --part vision"),
        (["--prefix", "vision_model"], "--prefix: expected InternLM2 or InternViT or AIMv2, got SAIL-VL"),
        (
            ["--part", "language", "--from-layout", "timm"],
            "--from-layout: expected AIMv2, got language model: leave it out",
        ),
        (
            ["--part", "vision", "--insert-vision", "X"],
            "--insert-vision writes a whole SAIL-VL: leave out --part vision",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(toys, tmp_path, capsys, arguments, message):
    assert sailvit_cli.main(["convert", str(toys / "release"), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{"part": "all"}, {"part": "connector"}, {"part": "language"}, {"insert_vision": "X"}]
)
def test_a_tower_has_no_other_parts(toys, tmp_path, options):
    with pytest.raises(CheckpointError, match=r"expected a SAIL-VL .*, got AIMv2"):
        convert(toys / "vision", tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_that_does_not_load_is_taken_away(toys, tmp_path, monkeypatch, capsys):
    without_chat = tuple(name for name in CODE_FILES["sailvl"] if name != "chat_sailvl.py")
    monkeypatch.setitem(CODE_FILES, "sailvl", without_chat)
    assert sailvit_cli.main(["convert", str(toys / "release"), str(tmp_path / "out")]) == 1
    assert "does not load in a clean process" in capsys.readouterr().err and not any(tmp_path.iterdir())


# A new model


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_tower_and_a_language_model_become_one_that_answers(toys, tmp_path, language):
    source = write_language(tmp_path / "language", language)
    compose(toys / "vision", source, tmp_path / "out", max_tiles=5)
    model, inputs = load(tmp_path / "out"), inputs_of(tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").text_config.model_type == language
    own = tensors_of(tmp_path / "out")
    for prefix, part in (("vision_model.", toys / "vision"), ("language_model.", source)):
        kept = {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
        assert equal(kept, tensors_of(part))  # nothing is resized: 384 rows, 316 tokens
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKENS) == [*range(307, 316)]
    assert model.config.image_token_id == IMAGE == tokenizer("<IMG_CONTEXT>").input_ids[0]
    assert read(tmp_path / "out" / "generation_config.json") == {"eos_token_id": 306, "pad_token_id": 304}
    assert read(tmp_path / "out" / "preprocessor_config.json")["max_tiles"] == 5
    written = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert written.shape[1] == inputs["input_ids"].shape[1] + 3
    record = read(tmp_path / "out" / "provenance.json")
    assert record["options"] == {"dtype": None, "seed": 0, "max_tiles": 5}
    assert [record["source"][part]["name"] for part in ("vision", "language")] == ["vision", "language"]
    assert inspect_checkpoint(tmp_path / "out", deep=True).ok


@pytest.mark.slow
def test_a_composed_folder_loads_with_remote_code(toys, tmp_path):
    from test_hub_folder import run_isolated

    source = write_language(tmp_path / "language", "llama")
    figures = compose(toys / "vision", source, tmp_path / "out", verify=True, max_tiles=12).verification
    assert figures["placeholders"] == figures["tiles"] * 4 == 52
    run_isolated(HUB_LOADER_SCRIPT, tmp_path / "out", PHOTOGRAPH, tmp_path / "logits.pt", home=tmp_path)


def test_a_seed_gives_the_same_bits_and_another_only_another_connector(toys, tmp_path):
    source = write_language(tmp_path / "language", vocab_size=310)
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        done = compose(toys / "vision", source, tmp_path / name, seed=seed)
    assert "embeddings: 6 new rows, 316 now" in done.notes
    first, again, other = (tensors_of(tmp_path / name) for name in ("first", "again", "other"))
    assert equal(first, again)
    changed = {name for name, tensor in first.items() if not torch.equal(tensor, other[name])}
    rows = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    assert changed == {"mlp1.1.weight", "mlp1.3.weight"} | rows
    old = tensors_of(source)
    for name in rows:
        assert torch.equal(first[name][:310], old[name.removeprefix("language_model.")]) and len(first[name]) == 316
    assert load(tmp_path / "first").config.text_config.vocab_size == 316
    assert logits_of(tmp_path / "first").shape[-1] == 316


def test_a_new_connector_has_the_initializer_range_of_the_language_model(toys, tmp_path):
    compose(toys / "vision", write_language(tmp_path / "language", initializer_range=0.1), tmp_path / "out")
    assert load(tmp_path / "out").config.initializer_range == 0.1
    weight = tensors_of(tmp_path / "out")["mlp1.1.weight"]
    torch.testing.assert_close(weight.float().std().item(), 0.1, rtol=0.1, atol=0)


def test_a_tokenizer_that_has_the_tokens_is_left_as_it_is(toys, tmp_path):
    source = write_language(tmp_path / "language", image_tokens=True, tie_word_embeddings=True)
    compose(toys / "release", source, tmp_path / "out", dtype="bfloat16")
    for file in {*TOKENIZER} - {"tokenizer_config.json"}:
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    assert read(tmp_path / "out" / "tokenizer_config.json") == {**read(source / "tokenizer_config.json"), **MARKS}
    assert read(tmp_path / "out" / "preprocessor_config.json")["max_tiles"] == 12  # as the release says
    model = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16 == model.mlp1[0].weight.dtype == model.vision_model.dtype
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert read(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


@pytest.mark.parametrize("layout", ["timm", "transformers"])
def test_a_tower_in_any_layout_is_composed(toys, tmp_path, layout):
    convert(toys / "vision", tmp_path / "tower", to_layout=layout)
    compose(tmp_path / "tower", toys / "language", tmp_path / "out")
    pictures = read(tmp_path / "out" / "preprocessor_config.json")
    assert pictures["max_tiles"] == 8 and pictures["image_mean"] == pytest.approx([0.485, 0.456, 0.406])
    own = {name: t for name, t in tensors_of(tmp_path / "out").items() if name.startswith("vision_model.")}
    assert equal({name.removeprefix("vision_model."): t for name, t in own.items()}, tensors_of(toys / "vision"))


def refused(toys: Path, tmp_path: Path) -> dict:
    whole = write_language(tmp_path / "language")
    broken, bare = tmp_path / "broken", tmp_path / "bare"
    shutil.copytree(whole, broken)
    change_tensors_of_one(broken, lambda all: {name: t for name, t in all.items() if name != "model.norm.weight"})
    shutil.copytree(whole, bare)
    without(*TOKENIZER)(bare)
    strange = tmp_path / "strange"
    shutil.copytree(whole, strange)
    change(strange / "config.json", model_type="gpt-17")
    odd = make_checkpoint(tmp_path / "odd", shape=TINY_SHAPE.__class__(64, 96, 2, 3, 14, 5))
    tower = toys / "vision"
    return {
        "no tokenizer": ((tower, bare), {}, "no tokenizer"),
        "unknown": ((tower, strange), {}, "got the model type 'gpt-17'"),
        "multimodal": ((tower, toys / "all"), {}, "--part language` first"),
        "a tower": ((tower, tower), {}, "expected a causal language model of the installed transformers, got"),
        "no tower": ((whole, whole), {}, "expected a vision encoder"),
        "not whole": ((tower, broken), {}, "model.norm.weight"),
        "odd grid": ((odd, whole), {}, "does not divide the 5 x 5 patches"),
        "seed": ((tower, whole), {"seed": -1}, "seed: expected an integer from 0 on, got -1"),
        "dtype": ((tower, whole), {"dtype": "int8"}, "dtype: expected one of .*, got 'int8'"),
        "tiles": ((tower, whole), {"max_tiles": 0}, "max_tiles"),
        "nowhere": ((tmp_path / "x", whole), {}, "no such file or folder"),
    }


def test_what_cannot_be_composed_is_refused_with_what_would_do(toys, tmp_path):
    cases = refused(toys, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for sources, options, message in cases.values():
        with pytest.raises(CheckpointError, match=message):
            compose(*sources, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_compose_replaces_nothing_unasked(toys, tmp_path, capsys):
    arguments = [
        "compose",
        "--vision",
        toys / "vision",
        "--language",
        toys / "language",
        tmp_path / "out",
        "--no-verify",
    ]
    arguments = [*map(str, arguments)]
    assert sailvit_cli.main(arguments) == 0 and str(tmp_path / "out") in capsys.readouterr().out
    assert sailvit_cli.main(arguments) == 2 and "give --overwrite" in capsys.readouterr().err
    assert sailvit_cli.main([*arguments, "--overwrite", "--seed", "3"]) == 0
    assert read(tmp_path / "out" / "provenance.json")["options"]["seed"] == 3


# The doctor


def test_components_are_reported(toys, capsys):
    assert sailvit_cli.main(["inspect", str(toys / "all"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layout"] == "sailvit" and report["fields"]["hidden_size"] == TINY["hidden_size"]
    assert report["parts"]["connector"] == {
        "in": 256, "out": 64, "parameters": 256 * 2 + 64 * 256 + 64 + 64 * 64 + 64, "dtypes": {"float32": 6},
    }  # fmt: skip
    language = report["parts"]["language"]
    assert language | {"parameters": 0} == {
        "architecture": "Qwen2ForCausalLM", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 384,
        "tied": False, "parameters": 0, "dtypes": {"float32": 27},
    }  # fmt: skip
    assert sailvit_cli.main(["inspect", str(toys / "all")]) == 0
    said = capsys.readouterr().out
    assert (
        "connector    in 256, out 64" in said and "Qwen2ForCausalLM, hidden size 64, layers 2, vocab size 384" in said
    )


@pytest.mark.parametrize("part", ["language", "connector"])
def test_an_extracted_component_is_valid(toys, tmp_path, part):
    convert(toys / "release", tmp_path / "out", part=part)
    report = inspect_checkpoint(tmp_path / "out", deep=True)
    assert report.ok and report.parts.keys() == {part}


def test_what_is_wrong_in_a_part_is_named(toys, tmp_path):
    shutil.copytree(toys / "all", tmp_path / "bad")
    (tmp_path / "bad" / "provenance.json").unlink()

    def damage(all: dict) -> dict:
        kept = {name: t for name, t in all.items() if name not in ("mlp1.3.bias", NORM)}
        return {**kept, MATRIX: all[MATRIX][:, :8], "language_model.extra": torch.ones(1)}

    change_tensors(tmp_path / "bad", damage)
    problems = {(problem.kind, problem.location) for problem in inspect_checkpoint(tmp_path / "bad").problems}
    assert problems == {
        ("missing", "mlp1.3.bias"), ("missing", NORM), ("shape", MATRIX), ("unexpected", "language_model.extra"),
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=f"{MATRIX}: expected"):
        convert(tmp_path / "bad", tmp_path / "out", part="connector")
    with pytest.raises(CheckpointError, match=r"language_model\.extra"):
        convert(tmp_path / "bad", tmp_path / "out", part="language")


def test_the_released_configuration_is_read_as_the_class_reads_it(toys):
    ours, theirs = (SAILVLConfig.from_pretrained(toys / name) for name in ("all", "release"))
    assert ours.text_config.to_dict() == theirs.text_config.to_dict()
    assert isinstance(load(toys / "all"), SAILVLForConditionalGeneration)
