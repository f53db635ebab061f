"""The processor of SAIL-VL, against prompts that are written out here, the image processor, and the hand-made model."""

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
from mllm import (
    SYSTEM,
    TILE,
    HandMade,
    Recorder,
    load_tokenizer,
    released_config,
    released_tensors,
    write_release,
    write_tokenizer,
)
from PIL import Image
from test_hub_folder import run_stranger
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
    """A model and its processor in one folder."""
    folder = tmp_path_factory.mktemp("saved") / "toy"
    release = write_release(folder.with_name("release"), attentive=True)
    model = SAILVLForConditionalGeneration.from_pretrained(release, dtype=torch.float32, image_token_id=CONTEXT)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder.with_name("tokenizer")))
    SAILVLProcessor(SAILViTImageProcessor(size=56, max_tiles=4), tokenizer, image_seq_length=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def by_hand() -> HandMade:
    config = released_config()
    return HandMade(config, released_tensors(config, attentive=True), CONTEXT)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def images_in(ids: list[int]) -> list[int]:
    """The placeholders of every image of a prompt; none stand elsewhere."""
    shorthand = "".join({START: "<", CONTEXT: "x", END: ">"}.get(token, ".") for token in ids)
    images = re.findall("<(x+)>", shorthand)
    assert re.sub("<x+>", "", shorthand).strip(".") == ""
    return [len(image) for image in images]


def tiles_of(processor: SAILVLProcessor, *pictures: Image.Image, **options) -> list[torch.Tensor]:
    return [processor.image_processor(picture, **options)["pixel_values"] for picture in pictures]


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
def test_the_template_renders_the_released_prompt_to_the_byte(case, processor):
    messages, expected = RENDERINGS[case]
    assert processor.apply_chat_template(messages, tokenize=False) == expected
    expected += "<|im_start|>assistant\n"
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


def test_the_template_refuses_what_it_has_no_words_for(processor):
    with pytest.raises(Exception, match="content of the type audio: image, video or text is wanted"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}], tokenize=False)


def test_chat_sends_the_same_tokens(processor, saved):
    model = SAILVLForConditionalGeneration.from_pretrained(saved).eval()
    pictures, recorder = [noise(60, 60), noise(130, 60, 1), noise(50, 90, 2)], Recorder(processor.tokenizer)
    first, second, third = tiles_of(processor, *pictures)
    asked = "Image-1: <image>\nImage-2: <image>\nWhy?"
    model.chat(
        recorder, torch.cat([first, second, third]), "<image>\nAnd here?", {"max_new_tokens": 1},
        history=[(asked, "So.")], num_patches_list=[len(first), len(second), len(third)],
    )  # fmt: skip
    messages = [user("<image>", "<image>", "Why?"), {"role": "assistant", "content": "So."}]
    messages.append(user("<image>", "And here?"))
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert processor(pictures, prompt)["input_ids"] == processor.tokenizer(recorder.prompts)["input_ids"]


# Images


def test_an_image_is_as_many_placeholders_as_its_tiles_have_tokens(processor):
    for picture, tiles in [(noise(56, 56), 1), (noise(112, 56), 3), (noise(300, 290), 5)]:
        batch = processor(picture, "Why? <IMG_CONTEXT>\nSo?")
        expected = f"Why? <img>{TILE * tiles}</img>\nSo?"
        assert batch["input_ids"] == [processor.tokenizer(expected)["input_ids"]]
        assert torch.equal(batch["pixel_values"], *tiles_of(processor, picture))
        assert len(batch["pixel_values"]) == tiles


NESTINGS = {
    "nested": lambda a, b, c: [[a], [], [b, c]],
    "None for none": lambda a, b, c: [[a], None, [b, c]],
    "flat": lambda a, b, c: [a, b, c],
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_images_fill_the_prompts_of_a_batch_in_order(nesting, processor):
    """Three images for three prompts, not one for each."""
    pictures = [noise(56, 56), noise(112, 56, 1), noise(56, 168, 2)]
    prompts = ["<IMG_CONTEXT>\nWhy?", "What is the total?", "Image-1: <IMG_CONTEXT>\nImage-2: <IMG_CONTEXT>\nWhy?"]
    batch = processor(NESTINGS[nesting](*pictures), prompts)
    tiles = tiles_of(processor, *pictures)
    first, second, third = (4 * len(own) for own in tiles)
    assert len({first, second, third}) == 3
    assert [images_in(ids) for ids in batch["input_ids"]] == [[first], [], [second, third]]
    assert torch.equal(batch["pixel_values"], torch.cat(tiles))


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_placeholders_tiles_and_the_counter_for_servers_agree(processor, width, height, max_tiles):
    picture = np.zeros((height, width, 3), np.uint8)
    options = {"return_mm_token_type_ids": True, "max_tiles": max_tiles, "input_data_format": "channels_last"}
    batch = processor(picture, "Why? <IMG_CONTEXT>", **options)
    counted = processor._get_num_multimodal_tokens([(height, width)], max_tiles=max_tiles)
    assert images_in(batch["input_ids"][0]) == [4 * len(batch["pixel_values"])]
    assert counted["num_image_patches"] == [len(batch["pixel_values"])]
    assert counted["num_image_tokens"] == [sum(batch["mm_token_type_ids"][0])]


def test_image_positions_are_marked_with_their_start_and_end(processor):
    prompts = ["<IMG_CONTEXT>\nWhy?", "What is the total, and what is it in words?"]
    batch = processor(noise(56, 56), prompts, padding=True, return_mm_token_type_ids=True, return_tensors="pt")
    assert batch["mm_token_type_ids"].shape == batch["input_ids"].shape
    assert torch.equal(batch["mm_token_type_ids"].bool(), torch.isin(batch["input_ids"], torch.tensor([307, 308, 309])))
    assert batch["mm_token_type_ids"].sum(1).tolist() == [6, 0]


# Videos


def frames(*seeds: int) -> list[Image.Image]:
    return [noise(80, 40, seed) for seed in seeds]


def test_a_video_is_numbered_frames_of_one_tile_in_whatever_form_it_comes(processor, tmp_path):
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
    picture, clip = noise(112, 56), frames(1, 2)
    batch = processor(picture, order, clip)
    image, *film = tiles_of(processor, picture), *tiles_of(processor, *clip, do_tile=False)
    parts = [*image, *film] if order.startswith("<IMG") else [*film, *image]
    assert torch.equal(batch["pixel_values"], torch.cat(parts))
    assert images_in(batch["input_ids"][0]) == [4 * len(part) for part in parts]


# The tokenizer's side


def test_prompts_of_a_batch_are_padded_on_the_left(processor):
    prompts = ["Why?", "What is the total?"]
    batch = processor(text=prompts, padding=True, return_tensors="pt")
    short, long = (processor.tokenizer(prompt)["input_ids"] for prompt in prompts)
    missing = len(long) - len(short)
    assert missing and batch["input_ids"].tolist() == [[PAD] * missing + short, long]
    assert batch["attention_mask"].tolist() == [[0] * missing + [1] * len(short), [1] * len(long)]
    batch = processor(text=prompts, text_kwargs={"padding": True, "padding_side": "right"}, return_tensors="pt")
    assert batch["input_ids"].tolist() == [short + [PAD] * missing, long]


def sides(processor: SAILVLProcessor, **options) -> str:
    """Where the padding of a batch is."""
    ids = processor(text=["Why?", "What is the total?"], padding=True, **options)["input_ids"][0]
    assert (ids[0] == PAD) != (ids[-1] == PAD)
    return "left" if ids[0] == PAD else "right"


def test_the_padding_side_is_left_unless_somebody_says_otherwise(tokenizer, processor, tmp_path):
    folder = write_tokenizer(tmp_path / "toy")
    build = partial(SAILVLProcessor, processor.image_processor, image_seq_length=4)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "padding_side" not in config and AutoTokenizer.from_pretrained(folder).padding_side == "right"
    assert sides(build(AutoTokenizer.from_pretrained(folder))) == "left"
    assert sides(build(AutoTokenizer.from_pretrained(folder, padding_side="right"))) == "right"
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "right"}))
    assert sides(build(AutoTokenizer.from_pretrained(folder))) == "right"


def test_a_padding_side_that_is_set_is_followed_and_saved(processor, tmp_path):
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


def test_options_that_the_tokenizer_was_loaded_with_are_followed(processor, tmp_path):
    """As transformers' own processors do."""
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


def test_lists_come_back_unless_tensors_are_asked_for(processor):
    plain, tensors = (processor(noise(56, 56), "<IMG_CONTEXT>", return_tensors=kind) for kind in (None, "pt"))
    assert plain.keys() == tensors.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert isinstance(plain["input_ids"][0], list)
    for key in ("input_ids", "attention_mask"):
        assert tensors[key].dtype == torch.int64 and tensors[key].tolist() == plain[key]
    arrays = processor(noise(56, 56), "<IMG_CONTEXT>", return_tensors="np")
    assert isinstance(arrays["input_ids"], np.ndarray) and isinstance(arrays["pixel_values"], np.ndarray)


def test_options_may_be_given_for_their_part(processor):
    picture, prompt = noise(300, 300), "<IMG_CONTEXT>\nWhy?"
    flat = processor(picture, prompt, max_tiles=2, use_thumbnail=False, padding="max_length", max_length=40)
    parted = processor(
        picture,
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
def test_a_misspelt_option_is_refused_with_the_nearest(options, message, processor):
    with pytest.raises(TypeError, match=re.escape(message)) as caught:
        processor(noise(56, 56), "<IMG_CONTEXT>", **options)
    assert len(str(caught.value)) < 400
    conversation = [{"role": "user", "content": [{"type": "image", "image": noise(56, 56)}]}]
    if options.keys() - {"audio", "audios"}:
        with pytest.raises(TypeError, match=re.escape(message)):
            processor.apply_chat_template(conversation, tokenize=True, **options)


@pytest.mark.parametrize("nothing", [None, [], [[]], [None], ()])
def test_nothing_of_a_kind_that_is_not_taken_is_nothing(nothing, processor):
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
def test_an_option_that_is_given_twice_is_refused(options, processor):
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


def test_common_options_are_for_every_part_and_give_way(processor):
    common = {"return_tensors": "np", "max_tiles": 1}
    batch = processor(noise(300, 300), "<IMG_CONTEXT>", common_kwargs=common)
    assert isinstance(batch["pixel_values"], np.ndarray) and isinstance(batch["input_ids"], np.ndarray)
    assert len(batch["pixel_values"]) == 1
    batch = processor(noise(300, 300), "<IMG_CONTEXT>", common_kwargs=common, return_tensors="pt")
    assert isinstance(batch["pixel_values"], torch.Tensor)


def test_pixels_may_be_of_a_type_of_their_own(processor):
    batch = processor(noise(56, 56), "<IMG_CONTEXT>", images_kwargs={"return_tensors": "np"})
    assert isinstance(batch["pixel_values"], np.ndarray) and isinstance(batch["input_ids"], list)


# "<img>", 4 placeholders, "</img>", then 5 tokens of text
@pytest.mark.parametrize(("length", "side"), [(5, "right"), (3, "right"), (9, "left"), (10, "left")])
def test_truncation_through_an_image_is_refused(length, side, processor, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "truncation_side", side)
    with pytest.raises(ValueError, match=rf"max_length {length}: truncation would cut through an image"):
        processor(noise(56, 56), "<IMG_CONTEXT>What is the total?", truncation=True, max_length=length)


def test_truncation_of_text_alone_is_not(processor):
    whole = processor(noise(56, 56), "<IMG_CONTEXT>What is the total?")["input_ids"][0]
    cut = processor(noise(56, 56), "<IMG_CONTEXT>What is the total?", truncation=True, max_length=8)
    assert cut["input_ids"] == [whole[:8]] and images_in(whole) == [4] and len(whole) == 11


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
def test_placeholders_and_pictures_that_do_not_match_are_refused(text, images, videos, message, processor):
    with pytest.raises(ValueError, match=re.escape(message)):
        processor(images, text, videos)


@pytest.mark.parametrize("token", ["image_token", "image_start_token", "image_end_token"])
def test_a_tokenizer_that_lacks_a_token_is_refused(token, processor, tmp_path):
    with pytest.raises(
        ValueError, match=r"the tokenizer has no '<pic>': use the tokenizer .* or one extended by `sailvit compose`"
    ):
        SAILVLProcessor(processor.image_processor, processor.tokenizer, **{token: "<pic>"})
    bare = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, image_tokens=False))
    with pytest.raises(ValueError, match="the tokenizer has no '<IMG_CONTEXT>'"):
        SAILVLProcessor(processor.image_processor, bare)


# Saved and loaded


def test_saved_equals_loaded(processor, saved, tmp_path):
    """Beside the model's configuration, which says of what class the image processor is."""
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


def test_the_tokenizer_is_left_alone(saved):
    text = f"{SYSTEM}<quad><img>{TILE}</img></quad>\n Why?  42\n<|im_end|>"
    original = AutoTokenizer.from_pretrained(saved.with_name("tokenizer"))
    for other in (AutoTokenizer.from_pretrained(saved), AutoProcessor.from_pretrained(saved).tokenizer):
        assert other(text)["input_ids"] == original(text)["input_ids"] and len(other) == len(original)
        assert other.special_tokens_map == original.special_tokens_map
        assert other.all_special_ids == original.all_special_ids
        assert (other.padding_side, other.model_max_length) == ("left", original.model_max_length)


ALONE = """
import json, sys
from transformers import AutoImageProcessor, AutoProcessor
from transformers.utils import logging
logging.set_verbosity_error()  # transformers < 5.4 has something to say on fast and slow ones
both, pictures = sys.argv[1:]
processor = AutoProcessor.from_pretrained(both, trust_remote_code=True)
parts = [AutoImageProcessor.from_pretrained(folder, trust_remote_code=True) for folder in (both, pictures)]
parts.append(processor.image_processor)
assert not any(name.split(".")[0] == "sailvit" for name in sys.modules)
print(json.dumps([type(processor).__name__, processor.image_seq_length, *(part.to_dict() for part in parts)]))
"""


def test_a_processor_without_a_model_loads_from_its_folder(processor, tmp_path):
    """As beside an adapter: no config.json says of what class the image processor is."""
    both, pictures = tmp_path / "both", tmp_path / "pictures"
    processor.save_pretrained(both)
    processor.image_processor.save_pretrained(pictures)
    expected = processor.image_processor.to_dict()
    for options in ({}, {"trust_remote_code": True}):
        for loaded in (
            SAILVLProcessor.from_pretrained(both, **options),
            AutoProcessor.from_pretrained(both, **options),
        ):
            assert loaded.to_dict() == processor.to_dict() and loaded.image_processor.to_dict() == expected
        for folder in (both, pictures):
            assert AutoImageProcessor.from_pretrained(folder, **options).to_dict() == expected
    loaded = json.loads(run_stranger(ALONE, both, pictures, home=tmp_path))
    assert loaded == ["SAILVLProcessor", 4, *[json.loads(json.dumps(expected))] * 3]


def test_beside_a_model_its_configuration_alone_names_classes(saved, processor):
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


def asked_about_the_photograph(processor: SAILVLProcessor) -> tuple[str, torch.Tensor]:
    """The prompt and the tiles of a question about the photograph."""
    tiles = processor.image_processor(Image.open(PHOTOGRAPH))["pixel_values"]
    image = f"<img>{TILE * len(tiles)}</img>"
    prompt = f"{SYSTEM}<|im_start|>user\n{image}\nWhat is the total?<|im_end|><|im_start|>assistant\n"
    return prompt, tiles


def test_card_usage_with_remote_code_is_silent_and_writes_the_hand_made_models_tokens(saved, by_hand, tmp_path):
    ids, tokens, answer = json.loads(run_stranger(CARD, saved, PHOTOGRAPH, home=tmp_path))
    processor = SAILVLProcessor.from_pretrained(saved)
    prompt, tiles = asked_about_the_photograph(processor)
    expected = processor.tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert ids == expected.tolist() and tokens == by_hand.greedy(expected, tiles, 6)
    assert answer == processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_pipeline_writes_the_hand_made_models_tokens(saved, by_hand):
    """With the package imported, and so without remote code."""
    answerer = pipeline("image-text-to-text", model=str(saved), device="cpu")
    prompt, tiles = asked_about_the_photograph(answerer.processor)
    ids = answerer.tokenizer(prompt, return_tensors="pt")["input_ids"]
    content = [{"type": "image", "image": str(PHOTOGRAPH)}, {"type": "text", "text": "What is the total?"}]
    settings = {"do_sample": False, "max_new_tokens": 6}
    options = {"text": [{"role": "user", "content": content}], "generate_kwargs": settings}
    (written,) = answerer(**options, return_tensors=True)
    expected = by_hand.greedy(ids, tiles, 6)
    assert written["generated_token_ids"].tolist() == ids[0].tolist() + expected
    (written,) = answerer(**options, return_full_text=False)
    assert written["generated_text"] == answerer.tokenizer.decode(expected, skip_special_tokens=True)


def test_a_batch_of_messages_writes_what_each_writes_alone(saved, by_hand):
    processor, model = AutoProcessor.from_pretrained(saved), AutoModelForImageTextToText.from_pretrained(saved).eval()
    prompt, tiles = asked_about_the_photograph(processor)
    content = [{"type": "image", "path": str(PHOTOGRAPH)}, {"type": "text", "text": "What is the total?"}]
    messages = [[{"role": "user", "content": "Why?"}], [{"role": "user", "content": content}]]
    batch = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    output = model.generate(**batch, do_sample=False, max_new_tokens=6, pad_token_id=PAD)
    alone = [(f"{SYSTEM}<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n", None), (prompt, tiles)]
    for row, (text, own) in zip(output, alone, strict=True):
        assert row[-6:].tolist() == by_hand.greedy(processor.tokenizer(text, return_tensors="pt")["input_ids"], own, 6)


def test_a_pipeline_writes_the_same_in_batches_as_one_by_one(saved):
    """The tokenizer's own files name no padding side."""
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
def test_a_pipeline_hands_on_the_options_of_a_call(saved):
    answerer = pipeline("image-text-to-text", model=str(saved), device="cpu")
    video = [noise(60, 60, seed) for seed in range(6)]
    chat = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "Why?"}]}]
    for options in ({"num_frames": 2}, {"processor_kwargs": {"num_frames": 2}}):
        preprocess, *_ = answerer._sanitize_parameters(**options)
        assert len(answerer.preprocess(Chat(chat), **preprocess)["pixel_values"]) == 2


# Messages


def image_forms(path: Path, picture: Image.Image) -> dict[str, dict]:
    picture.save(path)
    content = base64.b64encode(path.read_bytes()).decode()
    return {
        "a picture": {"image": picture},
        "an array": {"image": np.asarray(picture)},
        "a path": {"path": str(path)},
        "a path as an image": {"image": str(path)},
        "a path as a URL": {"url": str(path)},
        "a file URL": {"url": path.as_uri()},
        "a data URL": {"url": f"data:image/png;base64,{content}"},
        "base64": {"base64": content},
        "base64 as an image": {"image": content},
        "a data URL as base64": {"base64": f"data:image/png;base64,{content}"},
    }


def test_a_message_takes_an_image_in_every_form(processor, tmp_path):
    (tiles,) = tiles_of(processor, noise(130, 60))
    for name, form in image_forms(tmp_path / "noise.png", noise(130, 60)).items():
        parts = [{"type": "image", **form}, {"type": "text", "text": "Why?"}]
        messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": parts}]
        for conversation, rows in (messages, 1), ([messages, messages], 2):
            batch = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
            assert torch.equal(batch["pixel_values"], torch.cat([tiles] * rows)), name
            assert [images_in(ids) for ids in batch["input_ids"].tolist()] == [[4 * len(tiles)]] * rows


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
    "a plain picture": (Image.new("RGB", (8, 8)), "expected a part with a type, .* got Image"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_part_that_cannot_be_read_is_refused_where_it_is(case, processor):
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
def test_what_is_no_conversation_is_refused(case, tokenize, processor):
    conversation, message = CONVERSATIONS[case]
    with pytest.raises((TypeError, ValueError), match="^" + message.replace("'", '"').replace("{", r"\{")):
        processor.apply_chat_template(conversation, tokenize=tokenize)


def test_what_a_template_can_render_is_a_conversation(processor):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    prompt = processor.apply_chat_template([user("Why?"), call])
    assert prompt == processor.apply_chat_template([user("Why?"), {"role": "assistant", "content": ""}])
    merged = {"type": "text", "text": "Why?", "image": None}  # as rows of a table hold it
    chats = [[{"role": "user", "content": [merged]}], [user("Why?")]]
    alone = processor.apply_chat_template(chats[1])
    assert processor.apply_chat_template(chats) == [alone] * 2
    assert processor.apply_chat_template([Chat(chat) for chat in chats]) == [alone] * 2


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize(
    ("name", "nearest"), [("add_generation_promt", "add_generation_prompt"), ("tokenise", "tokenize")]
)
def test_a_misspelt_option_of_a_template_is_refused(name, nearest, tokenize, processor):
    with pytest.raises(TypeError, match=f"no option '{name}'; did you mean {nearest}\\?"):
        processor.apply_chat_template([user("Why?")], tokenize=tokenize, **{name: True})


def test_options_of_a_call_are_checked_where_only_the_prompt_is_asked_for(processor):
    with pytest.raises(TypeError, match="processor_kwargs must be a dict of options, got list"):
        processor.apply_chat_template([user("Why?")], processor_kwargs=[1])
    with pytest.raises(TypeError, match="did you mean max_tiles"):
        processor.apply_chat_template([user("Why?")], processor_kwargs={"max_tile": 1})


@pytest.mark.parametrize(
    "uri",
    ["data:image/jpeg;base64,@@@@", "data:text/plain,Why?", "data:image/svg+xml,<svg/>", "data:video/mp4;base64,AAAA"],
)
def test_a_url_of_what_is_no_image_is_said_to_be_none(uri, processor):
    with pytest.raises(ValueError, match=r"these \d bytes are not an image that Pillow can read$"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image", "url": uri}]}], tokenize=True)


@pytest.mark.parametrize("source", ["ftp://host/a.png", "s3://bucket/a.png", "iVBORw0KGgo"])
def test_the_urls_that_are_read_are_named(source, processor):
    with pytest.raises(ValueError, match=r"no such file.* supported URLs: http, https, file, data"):
        processor(source, "<IMG_CONTEXT>")


def test_openais_image_url_is_an_image(processor):
    noise_url = {"type": "image_url", "image_url": {"url": str(PHOTOGRAPH)}}
    options = {"tokenize": True, "return_dict": True}
    ours = processor.apply_chat_template([{"role": "user", "content": [noise_url]}], **options)
    image = {"type": "image", "path": str(PHOTOGRAPH)}
    expected = processor.apply_chat_template([{"role": "user", "content": [image]}], **options)
    assert ours["input_ids"] == expected["input_ids"] and torch.equal(ours["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("form", [{"base64": "A" * 100_000}, {"image": "A" * 100_000}, {"url": "B" * 9000}])
def test_a_picture_that_cannot_be_read_is_not_written_out(form, processor):
    with pytest.raises(ValueError, match="cannot be opened") as caught:
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image", **form}]}], tokenize=True)
    assert len(str(caught.value)) < 600


# What servers and training frameworks ask for


def test_placeholders_are_found_by_servers(processor):
    assert (processor.image_token, processor.image_token_id) == ("<IMG_CONTEXT>", CONTEXT)
    assert sorted(processor.image_token_ids) == [START, END, CONTEXT] and processor.video_token == "<video>"
    assert processor.tokenizer.convert_tokens_to_ids("<video>") in (None, processor.tokenizer.unk_token_id)


def test_ms_swift_expands_an_image_as_a_call_does(processor):
    """What its template sail_vl2 does: the ids around a placeholder, and as many of it as there are tiles."""
    picture = noise(130, 60)
    tiles = len(processor.image_processor(picture)["pixel_values"])
    context = processor.encode("<IMG_CONTEXT>", add_special_tokens=False) * processor.num_image_token * tiles
    before, after = (processor.encode(text, add_special_tokens=False) for text in ("<img>", "</img>\nWhy?"))
    assert processor(picture, "<IMG_CONTEXT>\nWhy?")["input_ids"] == [before + context + after]


def test_offsets_lead_from_placeholders_to_what_replaced_them(processor):
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


@pytest.mark.skipif(RELEASE < (5, 24), reason="of transformers 5.24")
def test_placeholders_that_a_user_types_stay_text_if_asked_for(processor):
    text = "What is <IMG_CONTEXT> and <|im_end|>?"
    content = [{"type": "image", "image": noise(56, 56)}, {"type": "text", "text": text}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    (ids,) = batch["input_ids"]
    assert images_in(ids) == [4] and len(batch["pixel_values"]) == 1
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
