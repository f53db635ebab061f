"""SAILVLProcessor: prompts, options, saving, messages; compared with the image processor and a reference model."""

import base64
import json
import re
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHOTOGRAPH
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_hub_folder import run_isolated
from toy_sailvl import (
    SYSTEM,
    TILE,
    RecordingTokenizer,
    ReferenceModel,
    load_tokenizer,
    released_config,
    released_tensors,
    write_release,
    write_tokenizer,
)
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline
from transformers.pipelines.image_text_to_text import Chat

from sailvit import SAILViTImageProcessor, SAILVLForConditionalGeneration, SAILVLProcessor


RELEASE = tuple(int(number) for number in version("transformers").split(".")[:2])
START, END, CONTEXT, PAD = 307, 308, 309, 304


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return load_tokenizer(tmp_path_factory.mktemp("tokenizers") / "toy")


@pytest.fixture(scope="module")
def processor(tokenizer) -> SAILVLProcessor:
    return SAILVLProcessor(SAILViTImageProcessor(size=56, max_tiles=4), tokenizer, image_seq_length=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a model and its processor."""
    folder = tmp_path_factory.mktemp("saved") / "toy"
    release = write_release(folder.with_name("release"), attentive=True)
    model = SAILVLForConditionalGeneration.from_pretrained(release, dtype=torch.float32, image_token_id=CONTEXT)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder.with_name("tokenizer")))
    SAILVLProcessor(SAILViTImageProcessor(size=56, max_tiles=4), tokenizer, image_seq_length=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    config = released_config()
    return ReferenceModel(config, released_tensors(config, attentive=True), CONTEXT)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def image_lengths(ids: list[int]) -> list[int]:
    """Return the number of placeholders of every image of a prompt; there must be none outside images."""
    shorthand = "".join({START: "<", CONTEXT: "x", END: ">"}.get(token, ".") for token in ids)
    images = re.findall("<(x+)>", shorthand)
    assert re.sub("<x+>", "", shorthand).strip(".") == ""
    return [len(image) for image in images]


def tiles_of(processor: SAILVLProcessor, *images: Image.Image, **options) -> list[torch.Tensor]:
    return [processor.image_processor(image, **options)["pixel_values"] for image in images]


# The prompt


def user(*parts: str) -> dict:
    kinds = {"<image>": {"type": "image"}, "<video>": {"type": "video"}}
    return {"role": "user", "content": [kinds.get(part, {"type": "text", "text": part}) for part in parts]}


RENDERINGS = {
    "a text": ([{"role": "user", "content": "Why?"}], f"{SYSTEM}<|im_start|>user\nWhy?<|im_end|>"),
    "a text in parts": ([user("Why", "?\n")], f"{SYSTEM}<|im_start|>user\nWhy?\n<|im_end|>"),
    "a system of its own": (
        [{"role": "system", "content": "Answer in one word."}, user("Why?")],
        "<|im_start|>system\nAnswer in one word.<|im_end|><|im_start|>user\nWhy?<|im_end|>",
    ),
    "an image": ([user("<image>", "Why?")], f"{SYSTEM}<|im_start|>user\n<IMG_CONTEXT>\nWhy?<|im_end|>"),
    "two images of a message": (
        [user("<image>", "<image>", "Why?")],
        f"{SYSTEM}<|im_start|>user\nImage-1: <IMG_CONTEXT>\nImage-2: <IMG_CONTEXT>\nWhy?<|im_end|>",
    ),
    "a video": ([user("<video>", "Why?")], f"{SYSTEM}<|im_start|>user\n<video>\nWhy?<|im_end|>"),
    "two turns": (
        [user("<image>", "Why?"), {"role": "assistant", "content": "So."}, user("<image>", "And here?")],
        f"{SYSTEM}<|im_start|>user\n<IMG_CONTEXT>\nWhy?<|im_end|><|im_start|>assistant\nSo.<|im_end|>"
        "<|im_start|>user\n<IMG_CONTEXT>\nAnd here?<|im_end|>",
    ),
}


@pytest.mark.parametrize("case", RENDERINGS)
def test_the_template_renders_the_released_prompt(case, processor):
    messages, expected = RENDERINGS[case]
    assert processor.apply_chat_template(messages, tokenize=False) == expected
    expected += "<|im_start|>assistant\n"
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


def test_the_template_raises_for_unknown_part_types(processor):
    with pytest.raises(Exception, match="content of the type audio: image, video or text is wanted"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}], tokenize=False)


def test_chat_and_template_build_the_same_tokens(processor, saved):
    model = SAILVLForConditionalGeneration.from_pretrained(saved).eval()
    images, recorder = [noise(60, 60), noise(130, 60, 1), noise(50, 90, 2)], RecordingTokenizer(processor.tokenizer)
    first, second, third = tiles_of(processor, *images)
    question = "Image-1: <image>\nImage-2: <image>\nWhy?"
    model.chat(
        recorder, torch.cat([first, second, third]), "<image>\nAnd here?", {"max_new_tokens": 1},
        history=[(question, "So.")], num_patches_list=[len(first), len(second), len(third)],
    )  # fmt: skip
    messages = [user("<image>", "<image>", "Why?"), {"role": "assistant", "content": "So."}]
    messages.append(user("<image>", "And here?"))
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert processor(images, prompt)["input_ids"] == processor.tokenizer(recorder.prompts)["input_ids"]


# Images


def test_an_image_expands_to_the_tokens_of_its_tiles(processor):
    for image, tiles in [(noise(56, 56), 1), (noise(112, 56), 3), (noise(300, 290), 5)]:
        batch = processor(image, "Why? <IMG_CONTEXT>\nSo?")
        expected = f"Why? <img>{TILE * tiles}</img>\nSo?"
        assert batch["input_ids"] == [processor.tokenizer(expected)["input_ids"]]
        assert torch.equal(batch["pixel_values"], *tiles_of(processor, image))
        assert len(batch["pixel_values"]) == tiles


NESTINGS = {
    "nested": lambda a, b, c: [[a], [], [b, c]],
    "None for none": lambda a, b, c: [[a], None, [b, c]],
    "flat": lambda a, b, c: [a, b, c],
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_images_are_assigned_to_prompts_in_order(nesting, processor):
    """Three images for three prompts, not one per prompt."""
    images = [noise(56, 56), noise(112, 56, 1), noise(56, 168, 2)]
    prompts = ["<IMG_CONTEXT>\nWhy?", "What is the total?", "Image-1: <IMG_CONTEXT>\nImage-2: <IMG_CONTEXT>\nWhy?"]
    batch = processor(NESTINGS[nesting](*images), prompts)
    tiles = tiles_of(processor, *images)
    first, second, third = (4 * len(own) for own in tiles)
    assert len({first, second, third}) == 3
    assert [image_lengths(ids) for ids in batch["input_ids"]] == [[first], [], [second, third]]
    assert torch.equal(batch["pixel_values"], torch.cat(tiles))


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_placeholders_tiles_and_token_counts_agree(processor, width, height, max_tiles):
    image = np.zeros((height, width, 3), np.uint8)
    options = {"return_mm_token_type_ids": True, "max_tiles": max_tiles, "input_data_format": "channels_last"}
    batch = processor(image, "Why? <IMG_CONTEXT>", **options)
    counted = processor._get_num_multimodal_tokens([(height, width)], max_tiles=max_tiles)
    assert image_lengths(batch["input_ids"][0]) == [4 * len(batch["pixel_values"])]
    assert counted["num_image_patches"] == [len(batch["pixel_values"])]
    assert counted["num_image_tokens"] == [sum(batch["mm_token_type_ids"][0])]


def test_mm_token_type_ids_include_start_and_end_tokens(processor):
    prompts = ["<IMG_CONTEXT>\nWhy?", "What is the total, and what is it in words?"]
    batch = processor(noise(56, 56), prompts, padding=True, return_mm_token_type_ids=True, return_tensors="pt")
    assert batch["mm_token_type_ids"].shape == batch["input_ids"].shape
    assert torch.equal(batch["mm_token_type_ids"].bool(), torch.isin(batch["input_ids"], torch.tensor([307, 308, 309])))
    assert batch["mm_token_type_ids"].sum(1).tolist() == [6, 0]


# Videos


def frames(*seeds: int) -> list[Image.Image]:
    return [noise(80, 40, seed) for seed in seeds]


def test_a_video_of_any_form_expands_to_numbered_frames(processor, tmp_path):
    clip, prompt = frames(1, 2, 3), "<video>\nWhy?"
    expected = f"Frame-1: <img>{TILE}</img>\nFrame-2: <img>{TILE}</img>\nFrame-3: <img>{TILE}</img>\nWhy?"
    tiles = torch.cat(tiles_of(processor, *clip, do_tile=False))
    array = np.stack([np.asarray(frame) for frame in clip])
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for frame, path in zip(clip, paths, strict=True):
        frame.save(path)
    tensor = torch.from_numpy(array)
    for video in (clip, [clip], [[clip]], array, [array], tensor, tensor.permute(0, 3, 1, 2), paths):
        batch = processor(text=prompt, videos=video)
        assert batch["input_ids"] == [processor.tokenizer(expected)["input_ids"]]
        assert torch.equal(batch["pixel_values"], tiles)


@pytest.mark.parametrize("order", ["<IMG_CONTEXT>\n<video>\nWhy?", "<video>\n<IMG_CONTEXT>\nWhy?"])
def test_images_and_videos_keep_the_order_of_the_prompt(order, processor):
    image, clip = noise(112, 56), frames(1, 2)
    batch = processor(image, order, clip)
    image_tiles, *frame_tiles = tiles_of(processor, image), *tiles_of(processor, *clip, do_tile=False)
    parts = [*image_tiles, *frame_tiles] if order.startswith("<IMG") else [*frame_tiles, *image_tiles]
    assert torch.equal(batch["pixel_values"], torch.cat(parts))
    assert image_lengths(batch["input_ids"][0]) == [4 * len(part) for part in parts]


# Tokenizer options


def test_prompts_are_padded_on_the_left(processor):
    prompts = ["Why?", "What is the total?"]
    batch = processor(text=prompts, padding=True, return_tensors="pt")
    short, long = (processor.tokenizer(prompt)["input_ids"] for prompt in prompts)
    missing = len(long) - len(short)
    assert missing and batch["input_ids"].tolist() == [[PAD] * missing + short, long]
    assert batch["attention_mask"].tolist() == [[0] * missing + [1] * len(short), [1] * len(long)]
    batch = processor(text=prompts, text_kwargs={"padding": True, "padding_side": "right"}, return_tensors="pt")
    assert batch["input_ids"].tolist() == [short + [PAD] * missing, long]


def sides(processor: SAILVLProcessor, **options) -> str:
    """Return the side of the padding of a batch."""
    ids = processor(text=["Why?", "What is the total?"], padding=True, **options)["input_ids"][0]
    assert (ids[0] == PAD) != (ids[-1] == PAD)
    return "left" if ids[0] == PAD else "right"


def test_the_padding_side_is_left_unless_specified(tokenizer, processor, tmp_path):
    folder = write_tokenizer(tmp_path / "toy")
    build = partial(SAILVLProcessor, processor.image_processor, image_seq_length=4)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "padding_side" not in config and AutoTokenizer.from_pretrained(folder).padding_side == "right"
    assert sides(build(AutoTokenizer.from_pretrained(folder))) == "left"
    assert sides(build(AutoTokenizer.from_pretrained(folder, padding_side="right"))) == "right"
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "right"}))
    assert sides(build(AutoTokenizer.from_pretrained(folder))) == "right"


def test_a_specified_padding_side_is_used_and_saved(processor, tmp_path):
    own = SAILVLProcessor(
        processor.image_processor, AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "toy")), image_seq_length=4
    )
    own.save_pretrained(tmp_path / "left")
    own.tokenizer.padding_side = "right"
    assert sides(own) == "right" and sides(own, padding_side="left") == "left"
    assert sides(own, text_kwargs={"padding_side": "left"}) == "left"
    own.save_pretrained(tmp_path / "right")
    for side in ("left", "right"):
        loaded = SAILVLProcessor.from_pretrained(tmp_path / side)
        assert sides(loaded) == side == AutoTokenizer.from_pretrained(tmp_path / side).padding_side
        loaded.save_pretrained(tmp_path / "again")
        assert sides(SAILVLProcessor.from_pretrained(tmp_path / "again")) == side


def test_options_of_the_loaded_tokenizer_are_used(processor, tmp_path):
    """As in the processors of transformers."""
    folder = write_tokenizer(tmp_path / "toy")
    own = SAILVLProcessor(
        processor.image_processor, AutoTokenizer.from_pretrained(folder, padding="max_length", max_length=20)
    )
    assert [len(ids) for ids in own(text=["Why?", "So?"])["input_ids"]] == [20, 20]
    assert len(own(text="Why?", padding=False)["input_ids"][0]) < 20
    assert "token_type_ids" not in own(text="Why?")
    assert "token_type_ids" in own(text="Why?", return_token_type_ids=True)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    own = SAILVLProcessor(processor.image_processor, AutoTokenizer.from_pretrained(folder, model_input_names=names))
    assert "token_type_ids" in own(text="Why?")


def test_lists_are_returned_unless_tensors_are_requested(processor):
    plain, tensors = (processor(noise(56, 56), "<IMG_CONTEXT>", return_tensors=kind) for kind in (None, "pt"))
    assert plain.keys() == tensors.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert isinstance(plain["input_ids"][0], list)
    for key in ("input_ids", "attention_mask"):
        assert tensors[key].dtype == torch.int64 and tensors[key].tolist() == plain[key]
    arrays = processor(noise(56, 56), "<IMG_CONTEXT>", return_tensors="np")
    assert isinstance(arrays["input_ids"], np.ndarray) and isinstance(arrays["pixel_values"], np.ndarray)


def test_options_can_be_grouped_by_modality(processor):
    image, prompt = noise(300, 300), "<IMG_CONTEXT>\nWhy?"
    flat = processor(image, prompt, max_tiles=2, use_thumbnail=False, padding="max_length", max_length=40)
    parted = processor(
        image,
        prompt,
        images_kwargs={"max_tiles": 2, "use_thumbnail": False},
        text_kwargs={"padding": "max_length", "max_length": 40},
    )
    assert torch.equal(flat["pixel_values"], parted["pixel_values"]) and len(flat["pixel_values"]) == 1
    assert flat["input_ids"] == parted["input_ids"] and len(flat["input_ids"][0]) == 40


MISSPELT = [
    ({"max_tile": 2}, "no option 'max_tile'; did you mean max_tiles?"),
    ({"images_kwargs": {"max_tile": 2}}, "no option 'max_tile'; did you mean max_tiles?"),
    ({"paddin": True}, "no option 'paddin'; did you mean padding?"),
    ({"text_kwargs": {"paddin": True}}, "no option 'paddin'; did you mean padding?"),
    ({"num_frame": 2}, "no option 'num_frame'; did you mean num_frames?"),
    ({"nonsense": 2}, "nonsense"),
    ({"common_kwargs": {"max_tile": 2}}, "no option 'max_tile'; did you mean max_tiles?"),
    ({"text_kwargs": {"max_tiles": 2}}, "no option 'max_tiles'; it belongs in images_kwargs"),
    ({"images_kwargs": {"padding": True}}, "no option 'padding'; it belongs in text_kwargs"),
    ({"audio_kwargs": {"sampling_rate": 16000}}, "takes no audio"),
    ({"audio": np.zeros(8)}, "takes images and videos, not audio"),
    ({"audios": [np.zeros(8)]}, "takes images and videos, not audios"),
    ({"y" * 9999: 2}, "no option 'yyyy"),
    *[
        ({name: 1}, f"no option '{name}': pass it to generate, or to a pipeline in generate_kwargs={{...}}")
        for name in ("max_new_tokens", "do_sample", "temperature")
    ],
]


@pytest.mark.parametrize(("options", "message"), MISSPELT)
def test_a_misspelt_option_raises_with_the_closest_name(options, message, processor):
    with pytest.raises(TypeError, match=re.escape(message)) as caught:
        processor(noise(56, 56), "<IMG_CONTEXT>", **options)
    assert len(str(caught.value)) < 400
    conversation = [{"role": "user", "content": [{"type": "image", "image": noise(56, 56)}]}]
    if options.keys() - {"audio", "audios"}:
        with pytest.raises(TypeError, match=re.escape(message)):
            processor.apply_chat_template(conversation, tokenize=True, **options)


@pytest.mark.parametrize("nothing", [None, [], [[]], [None], ()])
def test_empty_audio_is_ignored(nothing, processor):
    expected = processor(text="Why?", return_tensors="pt")
    for media in ({"audio": nothing}, {"audios": nothing}, {"images": nothing}, {"videos": nothing}):
        batch = processor(text="Why?", return_tensors="pt", audio_kwargs={}, **media)
        assert batch.keys() == expected.keys() and torch.equal(batch["input_ids"], expected["input_ids"])


TWICE = [
    {"max_tiles": 2, "images_kwargs": {"max_tiles": 2}},
    {"padding": True, "text_kwargs": {"padding": False}},
    {"return_tensors": "pt", "text_kwargs": {"return_tensors": "pt"}},
    {"size": 56, "videos_kwargs": {"size": 56}},
]


@pytest.mark.parametrize("options", TWICE)
def test_an_option_given_twice_raises(options, processor):
    with pytest.raises(ValueError, match=r"given twice, in .*_kwargs and outside of it"):
        processor(text="Why?", **options)
    conversation, (name, *_) = [user("Why?")], options
    with pytest.raises(ValueError, match="given twice"):
        processor.apply_chat_template(conversation, tokenize=True, processor_kwargs=options)
    if name != "return_tensors":
        with pytest.raises(ValueError, match=f"{name}: given twice, in processor_kwargs and outside of it"):
            processor.apply_chat_template(
                conversation, tokenize=True, processor_kwargs={name: 1}, **{name: options[name]}
            )


def test_common_kwargs_apply_to_all_and_can_be_overridden(processor):
    common = {"return_tensors": "np", "max_tiles": 1}
    batch = processor(noise(300, 300), "<IMG_CONTEXT>", common_kwargs=common)
    assert isinstance(batch["pixel_values"], np.ndarray) and isinstance(batch["input_ids"], np.ndarray)
    assert len(batch["pixel_values"]) == 1
    batch = processor(noise(300, 300), "<IMG_CONTEXT>", common_kwargs=common, return_tensors="pt")
    assert isinstance(batch["pixel_values"], torch.Tensor)


def test_pixel_values_can_have_their_own_tensor_type(processor):
    batch = processor(noise(56, 56), "<IMG_CONTEXT>", images_kwargs={"return_tensors": "np"})
    assert isinstance(batch["pixel_values"], np.ndarray) and isinstance(batch["input_ids"], list)


# "<img>", 4 placeholders, "</img>", then 5 tokens of text
@pytest.mark.parametrize(("length", "side"), [(5, "right"), (3, "right"), (9, "left"), (10, "left")])
def test_truncation_through_an_image_raises(length, side, processor, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "truncation_side", side)
    with pytest.raises(ValueError, match=rf"max_length {length}: truncation would cut through an image"):
        processor(noise(56, 56), "<IMG_CONTEXT>What is the total?", truncation=True, max_length=length)


def test_truncation_of_text_works(processor):
    full_ids = processor(noise(56, 56), "<IMG_CONTEXT>What is the total?")["input_ids"][0]
    cut = processor(noise(56, 56), "<IMG_CONTEXT>What is the total?", truncation=True, max_length=8)
    assert cut["input_ids"] == [full_ids[:8]] and image_lengths(full_ids) == [4] and len(full_ids) == 11


PICTURE = noise(56, 56)
MISMATCHES = [
    (
        "<IMG_CONTEXT> <IMG_CONTEXT>",
        PICTURE,
        None,
        "2 <IMG_CONTEXT> in the text, 1 images: the number of <IMG_CONTEXT>",
    ),
    ("Why?", PICTURE, None, "0 <IMG_CONTEXT> in the text, 1 images"),
    ("<IMG_CONTEXT>", None, None, "1 <IMG_CONTEXT> in the text, 0 images"),
    (["<IMG_CONTEXT>", "Why?"], [PICTURE] * 3, None, "1 + 0 <IMG_CONTEXT> in the text, 3 images"),
    ("<video>", None, None, "1 <video> in the text, 0 videos: the number of <video>"),
    (["<IMG_CONTEXT>", "<IMG_CONTEXT>"], [[PICTURE] * 2, []], None, "1 + 1 <IMG_CONTEXT> in the text, 2 + 0 images"),
    (["<IMG_CONTEXT>"] * 500, [PICTURE], None, "500 <IMG_CONTEXT> in the text, 1 images"),
    ("Why?", None, [[PICTURE]], "0 <video> in the text, 1 videos"),
    (None, PICTURE, None, "text must be a prompt or a list of prompts"),
    ("<video>", None, [np.zeros((0, 8, 8, 3), np.uint8)], "the video has no frames"),
]


@pytest.mark.parametrize(("text", "images", "videos", "message"), MISMATCHES)
def test_mismatched_placeholders_and_media_raise(text, images, videos, message, processor):
    with pytest.raises(ValueError, match=re.escape(message)):
        processor(images, text, videos)


@pytest.mark.parametrize("token", ["image_token", "image_start_token", "image_end_token"])
def test_a_tokenizer_without_an_image_token_raises(token, processor, tmp_path):
    with pytest.raises(
        ValueError, match=r"the tokenizer has no '<pic>': use the tokenizer .* or one extended by `sailvit compose`"
    ):
        SAILVLProcessor(processor.image_processor, processor.tokenizer, **{token: "<pic>"})
    bare = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, image_tokens=False))
    with pytest.raises(ValueError, match="the tokenizer has no '<IMG_CONTEXT>'"):
        SAILVLProcessor(processor.image_processor, bare)


# Saved and loaded


def test_saved_equals_loaded(processor, saved, tmp_path):
    """In a model folder, whose config.json names the class of the image processor."""
    template = "{% for message in messages %}{{ message['content'][0]['text'] }}!{% endfor %}"
    options = {"image_seq_length": 9, "image_start_token": "<quad>", "image_end_token": "</quad>"}
    kept = SAILViTImageProcessor(size=56, max_tiles=3, use_thumbnail=False)
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer"))
    SAILVLProcessor(kept, tokenizer, chat_template=template, **options).save_pretrained(tmp_path / "saved")
    shutil.copy(saved / "config.json", tmp_path / "saved")
    loaded = SAILVLProcessor.from_pretrained(tmp_path / "saved")
    assert loaded.chat_template == template and loaded.apply_chat_template([user("Why?")], tokenize=False) == "Why?!"
    assert {name: getattr(loaded, name) for name in options} == options
    assert loaded.image_processor.to_dict() == kept.to_dict()
    released = AutoProcessor.from_pretrained(saved)
    assert type(released) is SAILVLProcessor and released.chat_template == processor.chat_template
    assert released.image_seq_length == 4 and released.image_processor.max_tiles == 4


def test_the_saved_tokenizer_is_unchanged(saved):
    text = f"{SYSTEM}<quad><img>{TILE}</img></quad>\n Why?  42\n<|im_end|>"
    original = AutoTokenizer.from_pretrained(saved.with_name("tokenizer"))
    for other in (AutoTokenizer.from_pretrained(saved), AutoProcessor.from_pretrained(saved).tokenizer):
        assert other(text)["input_ids"] == original(text)["input_ids"] and len(other) == len(original)
        assert other.special_tokens_map == original.special_tokens_map
        assert other.all_special_ids == original.all_special_ids
        assert (other.padding_side, other.model_max_length) == ("left", original.model_max_length)


LOAD_IMAGE_PROCESSORS = """
import json, sys
from transformers import AutoImageProcessor, AutoProcessor
from transformers.utils import logging
logging.set_verbosity_error()  # transformers < 5.4 warns about fast and slow processors
full, images_only = sys.argv[1:]
processor = AutoProcessor.from_pretrained(full, trust_remote_code=True)
parts = [AutoImageProcessor.from_pretrained(folder, trust_remote_code=True) for folder in (full, images_only)]
parts.append(processor.image_processor)
assert not any(name.split(".")[0] == "sailvit" for name in sys.modules)
print(json.dumps([type(processor).__name__, processor.image_seq_length, *(part.to_dict() for part in parts)]))
"""


def test_a_processor_without_a_model_loads_from_its_folder(processor, tmp_path):
    """As in an adapter folder: there is no config.json with the class of the image processor."""
    full, images_only = tmp_path / "full", tmp_path / "images_only"
    processor.save_pretrained(full)
    processor.image_processor.save_pretrained(images_only)
    expected = processor.image_processor.to_dict()
    for options in ({}, {"trust_remote_code": True}):
        for loaded in (
            SAILVLProcessor.from_pretrained(full, **options),
            AutoProcessor.from_pretrained(full, **options),
        ):
            assert loaded.to_dict() == processor.to_dict() and loaded.image_processor.to_dict() == expected
        for folder in (full, images_only):
            assert AutoImageProcessor.from_pretrained(folder, **options).to_dict() == expected
    loaded = json.loads(run_isolated(LOAD_IMAGE_PROCESSORS, full, images_only, home=tmp_path))
    assert loaded == ["SAILVLProcessor", 4, *[json.loads(json.dumps(expected))] * 3]


def test_in_a_model_folder_only_config_json_names_classes(saved, processor):
    named = {"auto_map", "image_processor_type"}
    assert not named & json.loads((saved / "preprocessor_config.json").read_text()).keys()
    assert not named & processor.image_processor.to_dict().keys()


CARD = """
import json, sys
from transformers import AutoModelForImageTextToText, AutoProcessor
path, photo = sys.argv[1:]
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).eval()
for part in (processor, processor.image_processor, model):
    assert type(part).__module__.startswith("transformers_modules")
assert not any(name.split(".")[0] == "sailvit" for name in sys.modules)
messages = [
    {"role": "user", "content": [{"type": "image", "path": photo}, {"type": "text", "text": "What is the total?"}]}
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, do_sample=False, max_new_tokens=6)
new = output[0, inputs["input_ids"].shape[1]:]
print(json.dumps([inputs["input_ids"].tolist(), new.tolist(), processor.decode(new, skip_special_tokens=True)]))
"""


def photograph_question(processor: SAILVLProcessor) -> tuple[str, torch.Tensor]:
    """Return the prompt and the tiles of a question about the photo."""
    tiles = processor.image_processor(Image.open(PHOTOGRAPH))["pixel_values"]
    image = f"<img>{TILE * len(tiles)}</img>"
    prompt = f"{SYSTEM}<|im_start|>user\n{image}\nWhat is the total?<|im_end|><|im_start|>assistant\n"
    return prompt, tiles


def test_card_usage_with_remote_code_is_silent_and_equals_the_reference_model(saved, reference, tmp_path):
    ids, tokens, answer = json.loads(run_isolated(CARD, saved, PHOTOGRAPH, home=tmp_path))
    processor = SAILVLProcessor.from_pretrained(saved)
    prompt, tiles = photograph_question(processor)
    expected = processor.tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert ids == expected.tolist() and tokens == reference.greedy(expected, tiles, 6)
    assert answer == processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_pipeline_equals_the_reference_model(saved, reference):
    """The package is imported, so no remote code is needed."""
    answerer = pipeline("image-text-to-text", model=str(saved), device="cpu")
    prompt, tiles = photograph_question(answerer.processor)
    ids = answerer.tokenizer(prompt, return_tensors="pt")["input_ids"]
    content = [{"type": "image", "image": str(PHOTOGRAPH)}, {"type": "text", "text": "What is the total?"}]
    settings = {"do_sample": False, "max_new_tokens": 6}
    options = {"text": [{"role": "user", "content": content}], "generate_kwargs": settings}
    (written,) = answerer(**options, return_tensors=True)
    expected = reference.greedy(ids, tiles, 6)
    assert written["generated_token_ids"].tolist() == ids[0].tolist() + expected
    (written,) = answerer(**options, return_full_text=False)
    assert written["generated_text"] == answerer.tokenizer.decode(expected, skip_special_tokens=True)


def test_a_batch_of_conversations_equals_single_conversations(saved, reference):
    processor, model = AutoProcessor.from_pretrained(saved), AutoModelForImageTextToText.from_pretrained(saved).eval()
    prompt, tiles = photograph_question(processor)
    content = [{"type": "image", "path": str(PHOTOGRAPH)}, {"type": "text", "text": "What is the total?"}]
    messages = [[{"role": "user", "content": "Why?"}], [{"role": "user", "content": content}]]
    batch = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    output = model.generate(**batch, do_sample=False, max_new_tokens=6, pad_token_id=PAD)
    alone = [(f"{SYSTEM}<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n", None), (prompt, tiles)]
    for row, (text, own) in zip(output, alone, strict=True):
        assert row[-6:].tolist() == reference.greedy(
            processor.tokenizer(text, return_tensors="pt")["input_ids"], own, 6
        )


def test_a_batched_pipeline_equals_single_calls(saved):
    """The files of the tokenizer specify no padding side."""
    image = {"type": "image", "image": str(PHOTOGRAPH)}
    questions = ("Why?", "What is the total?", "Describe the image. Answer with one word.")
    chats = [[{"role": "user", "content": [image, {"type": "text", "text": text}]}] for text in questions]
    answerer = pipeline("image-text-to-text", model=str(saved), device="cpu")
    options = {"generate_kwargs": {"do_sample": False, "max_new_tokens": 6}, "return_full_text": False}
    alone, together = (
        [written[0]["generated_text"] for written in answerer(text=chats, batch_size=size, **options)]
        for size in (1, 3)
    )
    assert together == alone and len(set(alone)) > 1


@pytest.mark.skipif(RELEASE < (5, 23), reason="the pipeline drops the options of a chat")
def test_a_pipeline_passes_processor_options(saved):
    answerer = pipeline("image-text-to-text", model=str(saved), device="cpu")
    video = [noise(60, 60, seed) for seed in range(6)]
    chat = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "Why?"}]}]
    for options in ({"num_frames": 2}, {"processor_kwargs": {"num_frames": 2}}):
        preprocess, *_ = answerer._sanitize_parameters(**options)
        assert len(answerer.preprocess(Chat(chat), **preprocess)["pixel_values"]) == 2


# Messages


def image_forms(path: Path, image: Image.Image) -> dict[str, dict]:
    image.save(path)
    content = base64.b64encode(path.read_bytes()).decode()
    return {
        "an image": {"image": image},
        "an array": {"image": np.asarray(image)},
        "a path": {"path": str(path)},
        "a path as an image": {"image": str(path)},
        "a path as a URL": {"url": str(path)},
        "a file URL": {"url": path.as_uri()},
        "a data URL": {"url": f"data:image/png;base64,{content}"},
        "base64": {"base64": content},
        "base64 as an image": {"image": content},
        "a data URL as base64": {"base64": f"data:image/png;base64,{content}"},
    }


def test_a_message_accepts_an_image_in_every_form(processor, tmp_path):
    (tiles,) = tiles_of(processor, noise(130, 60))
    for name, form in image_forms(tmp_path / "noise.png", noise(130, 60)).items():
        parts = [{"type": "image", **form}, {"type": "text", "text": "Why?"}]
        messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": parts}]
        for conversation, rows in (messages, 1), ([messages, messages], 2):
            batch = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
            assert torch.equal(batch["pixel_values"], torch.cat([tiles] * rows)), name
            assert [image_lengths(ids) for ids in batch["input_ids"].tolist()] == [[4 * len(tiles)]] * rows


TEXT = {"type": "text", "text": "Why?"}
BROKEN = {
    "no image": ({"type": "image"}, "an image part needs one of image, url, path, base64; got none"),
    "None for an image": ({"type": "image", "image": None}, "needs one of image, url, path, base64; got none"),
    "an image under no key of its own": ({"type": "image", "img": "a.png"}, "one of image, url, path, base64; got img"),
    "two images": ({"type": "image", "url": "a", "path": "b"}, "one of image, url, path, base64; got url, path"),
    "an option of an image": ({"type": "image", "image": "a", "max_pixels": 9}, "base64, not max_pixels: pass options"),
    "no video": ({"type": "video"}, "a video part needs one of video, url, path; got none"),
    "a video in base64": ({"type": "video", "base64": "a"}, "a video part needs one of video, url, path; got base64"),
    "an option of a video": ({"type": "video", "video": "a", "fps": 1}, "video, url, path, not fps: pass options"),
    "no URL": ({"type": "image_url"}, 'an image_url part needs "image_url": {"url": ...}'),
    "an empty URL": ({"type": "image_url", "image_url": {}}, 'an image_url part needs "image_url": {"url": ...}'),
    "None for a text": ({"type": "text", "text": None}, "a text part needs a string as text, got NoneType"),
    "no text": ({"type": "text"}, "a text part needs a string as text, got NoneType"),
    "a number for a text": ({"type": "text", "text": 3}, "a text part needs a string as text, got int"),
    "no type": ({"text": "Why?"}, "expected a part with a type, .* got a dict of text"),
    "a plain text": ("Why?", "expected a part with a type, .* got str"),
    "a plain image": (Image.new("RGB", (8, 8)), "expected a part with a type, .* got Image"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_invalid_part_raises_with_its_location(case, processor):
    part, message = BROKEN[case]
    message = message.replace("{", r"\{")
    chat = [{"role": "user", "content": "Why?"}, {"role": "user", "content": [TEXT, part]}]
    with pytest.raises((TypeError, ValueError), match=f"^message 1, part 1: .*{message}") as caught:
        processor.apply_chat_template(chat, tokenize=True)
    assert len(str(caught.value)) < 300
    with pytest.raises((TypeError, ValueError), match=f"^conversation 1, message 1, part 1: .*{message}"):
        processor.apply_chat_template([chat[:1], chat], tokenize=True)


CONVERSATIONS = {
    "an empty one": ([], "the conversation is empty"),
    "an empty one of a batch": ([[]], "conversation 0 is empty"),
    "an empty one beside another": ([[user("Why?")], []], "conversation 1 is empty"),
    "a message": (user("Why?"), "the conversation: expected a list of messages, got dict"),
    "a text": ("Why?", "the conversation: expected a list of messages, got str"),
    "None": (None, "the conversation: expected a list of messages, got NoneType"),
    "a message beside conversations": (
        [[user("Why?")], user("Why?")],
        "conversation 1: expected a list of .* got dict",
    ),
    "texts": (["Why?"], "message 0: expected {'role': 'user', 'content': ...}, got str"),
    "no role": ([{"content": "Why?"}], "message 0: expected {'role': 'user', 'content': ...}, got a dict of content"),
    "no content": ([{"role": "user"}], "message 0: content must be a string or a list of parts, got NoneType"),
    "a number": ([{"role": "user", "content": 3}], "message 0: content must be a string or a list of parts, got int"),
    "one part": (
        [{"role": "user", "content": TEXT}],
        "message 0: content must be a string or a list of parts, got dict",
    ),
}


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_an_invalid_conversation_raises(case, tokenize, processor):
    conversation, message = CONVERSATIONS[case]
    with pytest.raises((TypeError, ValueError), match="^" + message.replace("'", '"').replace("{", r"\{")):
        processor.apply_chat_template(conversation, tokenize=tokenize)


def test_tool_calls_and_merged_parts_are_valid(processor):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    prompt = processor.apply_chat_template([user("Why?"), call])
    assert prompt == processor.apply_chat_template([user("Why?"), {"role": "assistant", "content": ""}])
    merged = {"type": "text", "text": "Why?", "image": None}  # as in rows of a data set
    chats = [[{"role": "user", "content": [merged]}], [user("Why?")]]
    alone = processor.apply_chat_template(chats[1])
    assert processor.apply_chat_template(chats) == [alone] * 2
    assert processor.apply_chat_template([Chat(chat) for chat in chats]) == [alone] * 2


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize(
    ("name", "nearest"), [("add_generation_promt", "add_generation_prompt"), ("tokenise", "tokenize")]
)
def test_a_misspelt_template_variable_raises(name, nearest, tokenize, processor):
    with pytest.raises(TypeError, match=f"no option '{name}'; did you mean {nearest}\\?"):
        processor.apply_chat_template([user("Why?")], tokenize=tokenize, **{name: True})


def test_options_are_checked_without_tokenize(processor):
    with pytest.raises(TypeError, match="processor_kwargs must be a dict of options, got list"):
        processor.apply_chat_template([user("Why?")], processor_kwargs=[1])
    with pytest.raises(TypeError, match="did you mean max_tiles"):
        processor.apply_chat_template([user("Why?")], processor_kwargs={"max_tile": 1})


@pytest.mark.parametrize(
    "uri",
    ["data:image/jpeg;base64,@@@@", "data:text/plain,Why?", "data:image/svg+xml,<svg/>", "data:video/mp4;base64,AAAA"],
)
def test_a_url_without_an_image_raises(uri, processor):
    with pytest.raises(ValueError, match=r"these \d bytes are not an image that Pillow can read$"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image", "url": uri}]}], tokenize=True)


@pytest.mark.parametrize("source", ["ftp://host/a.png", "s3://bucket/a.png", "iVBORw0KGgo"])
def test_an_unsupported_url_raises_with_the_supported_ones(source, processor):
    with pytest.raises(ValueError, match=r"no such file.* supported URLs: http, https, file, data"):
        processor(source, "<IMG_CONTEXT>")


def test_openai_image_url_parts_are_images(processor):
    noise_url = {"type": "image_url", "image_url": {"url": str(PHOTOGRAPH)}}
    options = {"tokenize": True, "return_dict": True}
    ours = processor.apply_chat_template([{"role": "user", "content": [noise_url]}], **options)
    image = {"type": "image", "path": str(PHOTOGRAPH)}
    expected = processor.apply_chat_template([{"role": "user", "content": [image]}], **options)
    assert ours["input_ids"] == expected["input_ids"] and torch.equal(ours["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("form", [{"base64": "A" * 100_000}, {"image": "A" * 100_000}, {"url": "B" * 9000}])
def test_an_error_message_does_not_contain_base64_images(form, processor):
    with pytest.raises(ValueError, match="cannot be opened") as caught:
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image", **form}]}], tokenize=True)
    assert len(str(caught.value)) < 600


# Interface for servers and training frameworks


def test_servers_find_the_placeholder_attributes(processor):
    assert (processor.image_token, processor.image_token_id) == ("<IMG_CONTEXT>", CONTEXT)
    assert sorted(processor.image_token_ids) == [START, END, CONTEXT] and processor.video_token == "<video>"
    assert processor.tokenizer.convert_tokens_to_ids("<video>") in (None, processor.tokenizer.unk_token_id)


def test_ms_swift_expands_images_like_the_processor(processor):
    """As in its template sail_vl2: start and end ids around the placeholders of all tiles."""
    image = noise(130, 60)
    tiles = len(processor.image_processor(image)["pixel_values"])
    context = processor.encode("<IMG_CONTEXT>", add_special_tokens=False) * processor.num_image_token * tiles
    before, after = (processor.encode(text, add_special_tokens=False) for text in ("<img>", "</img>\nWhy?"))
    assert processor(image, "<IMG_CONTEXT>\nWhy?")["input_ids"] == [before + context + after]


def test_replacement_offsets_map_placeholders_to_their_expansion(processor):
    prompts = ["Why?<IMG_CONTEXT>\nSo? \n<video>\n", "<video><IMG_CONTEXT>"]
    media = ([noise(56, 56), noise(112, 56)], prompts, [[noise(60, 60)], [noise(60, 60), noise(60, 60)]])
    batch = processor(*media, return_text_replacement_offsets=True, return_offsets_mapping=True)
    spans = ["<img>" + TILE + "</img>", "Frame-1: <img>" + TILE + "</img>"]
    spans += [f"{spans[1]}\nFrame-2: {spans[0]}", "<img>" + TILE * 3 + "</img>"]
    found = [entry for row in batch["text_replacement_offsets"] for entry in row]
    assert [entry["replacement"] for entry in found] == spans
    assert [entry["type"] for entry in found] == ["image", "video", "video", "image"]
    for prompt, row, ids, offsets in zip(
        prompts, batch["text_replacement_offsets"], batch["input_ids"], batch["offset_mapping"], strict=True
    ):
        for entry in row:
            (start, end), (first, last) = entry["span"], entry["new_span"]
            assert prompt[start:end] == entry["text"] and last - first == len(entry["replacement"])
            own = [token for token, (a, b) in zip(ids, offsets, strict=True) if first <= a and b <= last]
            assert own == processor.tokenizer(entry["replacement"])["input_ids"]


def test_an_image_given_several_times_is_tiled_once(processor, tmp_path, monkeypatch):
    wide, tall, path, sizes = noise(112, 56), noise(56, 112), str(tmp_path / "square.png"), []
    noise(56, 56).save(path)

    def ask(*images):
        content = [{"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": "Why?"}]}]

    chats = [ask(*images) for images in ([wide], [wide, path], [tall], [path, wide])]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    expected = processor.apply_chat_template(chats, **options)
    preprocess = SAILViTImageProcessor.preprocess
    count = lambda self, images, **kwargs: sizes.append(len(images)) or preprocess(self, images, **kwargs)  # noqa: E731
    monkeypatch.setattr(SAILViTImageProcessor, "preprocess", count)
    shared = processor.apply_chat_template(chats, **options, return_tile_indices=True)
    assert sizes == [3] and len(shared["pixel_values"]) == 3 + 1 + 3
    assert shared["tile_indices"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 3, 0, 1, 2]
    assert torch.equal(shared["pixel_values"][shared["tile_indices"]], expected["pixel_values"])
    assert torch.equal(shared["input_ids"], expected["input_ids"]) and "tile_indices" not in expected
    assert "tile_indices" not in processor.apply_chat_template([ask()], **options, return_tile_indices=True)


@pytest.mark.skipif(RELEASE < (5, 24), reason="of transformers 5.24")
def test_escaped_placeholders_stay_text(processor):
    text = "What is <IMG_CONTEXT> and <|im_end|>?"
    content = [{"type": "image", "image": noise(56, 56)}, {"type": "text", "text": text}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    (ids,) = batch["input_ids"]
    assert image_lengths(ids) == [4] and len(batch["pixel_values"]) == 1
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
