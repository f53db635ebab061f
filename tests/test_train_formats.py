"""Records of users' data formats -> samples; prompts compared with the chat API of the releases."""

import base64
import io
import json
import re
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_sailvl import load_tokenizer

from sailvit import SAILViTImageProcessor, SAILVLProcessor
from sailvit.chat_sailvl import CHAT_TEMPLATE, SAILVLChat
from sailvit.train.formats import BadSample, FilteredSample, FormatOptions, Sample, parse_record


CORPORA = ROOT / "tests" / "data" / "corpora"
CHART, RECEIPT, CLIP = (f"images/{name}" for name in ("chart.png", "receipt.png", "clip.gif"))
OPTIONS = FormatOptions(image_root=CORPORA)
KINDS = ["caption", "open_qa", "video", "text"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return load_tokenizer(tmp_path_factory.mktemp("tokenizers") / "toy")


@pytest.fixture(scope="module")
def processor(tokenizer) -> SAILVLProcessor:
    return SAILVLProcessor(SAILViTImageProcessor(size=56, max_tiles=4), tokenizer, image_seq_length=4)


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in (CORPORA / name).read_text("utf-8").splitlines()]


def llava(*texts: str, **fields) -> dict:
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"conversations": turns, **fields}


def chatml(user, assistant="So.", **fields) -> dict:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], **fields}


def shape_of(sample: Sample) -> list[tuple[str, list]]:
    """Roles and parts, texts as they are, images as their sizes and videos as "video"."""
    return [(message["role"], [brief(part) for part in message["content"]]) for message in sample.messages]


def brief(part: dict):
    value = part[part["type"]]
    if part["type"] == "video":
        return ["video", *([Path(frame).name for frame in value] if isinstance(value, list) else [Path(value).name])]
    return Path(value).name if part["type"] == "image" and isinstance(value, str) else getattr(value, "size", value)


def render(tokenizer, sample: Sample) -> str:
    return tokenizer.apply_chat_template(sample.messages, chat_template=CHAT_TEMPLATE, tokenize=False)


# Formats


SAMPLES = {
    "llava.jsonl": [
        [
            ("user", ["chart.png", "What is the total?"]),
            ("assistant", ["The total is 42."]),
            ("user", ["And in words?"]),
            ("assistant", ["Forty-two."]),
        ],
        [("user", ["Describe the image.\n", "receipt.png"]), ("assistant", ["A receipt."])],
        [("system", ["Answer in one word."]), ("user", ["What is 6 times 7?"]), ("assistant", ["42."])],
    ],
    "internvl.jsonl": [
        [("user", ["chart.png", "receipt.png", "Which one is blue?"]), ("assistant", ["Image-2."])],
        [("user", ["chart.png", "What colour is it?"]), ("assistant", ["Red."])],
        [("user", [["video", "clip.gif"], "What changes?"]), ("assistant", ["The colour."])],
        [("user", ["Hello."]), ("assistant", ["Hello!"])],
    ],
    "llava_video.jsonl": [
        [
            ("user", [["video", "clip.gif"], "Please describe the video."]),
            ("assistant", ["Four colours, one after the other."]),
        ],
    ],
    "ms_swift.jsonl": [
        [("user", ["chart.png", "What is in the image?"]), ("assistant", ["A chart."])],
        [
            ("system", ["Be brief."]),
            ("user", ["chart.png", "receipt.png", "What differs?"]),
            ("assistant", ["The colour."]),
        ],
        [("user", [["video", "clip.gif"], "What is in the video?"]), ("assistant", ["Colours."])],
        [("user", ["What is 6 times 7?"]), ("assistant", ["42."])],
    ],
    "llama_factory.jsonl": [
        [("user", ["chart.png", "Who is it?"]), ("assistant", ["Nobody."])],
        [("system", ["Be brief."]), ("user", ["receipt.png", "What is it?"]), ("assistant", ["A receipt."])],
        [("user", [["video", "clip.gif"], "What is it?"]), ("assistant", ["Colours."])],
    ],
    "openai.jsonl": [
        [
            ("system", ["You read documents."]),
            ("user", ["What is the total?", (20, 40)]),
            ("assistant", ["42."]),
        ],
        [("user", ["a.png", "Why?"]), ("assistant", ["So."])],
    ],
    "trl.jsonl": [
        [("user", ["chart.png", "What is it?"]), ("assistant", ["A chart."])],
        [("user", ["chart.png", "What is it?"]), ("assistant", ["A chart."])],
        [("system", ["Be brief."]), ("user", ["What is 6 times 7?"]), ("assistant", ["42."])],
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_is_recognised_by_its_keys(name):
    assert [shape_of(parse_record(record, OPTIONS)) for record in records(name)] == SAMPLES[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_processor_takes_every_sample_and_trains_on_its_answers(name, processor):
    for record in records(name):
        sample = parse_record(record, OPTIONS)
        if "https://" in json.dumps(record):
            continue
        batch = processor.apply_chat_template(
            sample.messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True,
            num_frames=2,
        )  # fmt: skip
        trained = processor.tokenizer.decode(batch["input_ids"][batch["assistant_masks"].bool()])
        answers = [m["content"][0]["text"] for m in sample.messages if m["role"] == "assistant"]
        assert trained.replace("Ġ", " ") == "".join(f"{answer}<|im_end|>" for answer in answers)
        types = [part["type"] for message in sample.messages for part in message["content"]]
        assert ("pixel_values" in batch) == ({*types} != {"text"})


def test_the_kind_is_that_of_the_options_or_the_record():
    swift = records("ms_swift.jsonl")
    assert [parse_record(record, OPTIONS).kind for record in swift] == KINDS
    assert parse_record(llava("Why?", "So.", kind="ocr"), OPTIONS).kind == "ocr"
    assert parse_record(llava("Why?", "So."), OPTIONS).kind is None


def test_keys_that_are_none_do_not_count():
    """As in a table with the columns of several formats."""
    record = llava("Why?", "So.", messages=None, image=None, images=None, system=None, channel=None, texts=None)
    assert shape_of(parse_record(record, OPTIONS)) == [("user", ["Why?"]), ("assistant", ["So."])]


# Prompts


class RecordingChat(SAILVLChat):
    """The chat API of the releases, with a `generate` that records the tokens of the prompt."""

    config = SimpleNamespace(template="sailvl-chat", image_seq_length=4)
    device = "cpu"

    def generate(self, input_ids, **options):
        self.prompt = input_ids[0].tolist()
        return input_ids


PROMPTS = {
    "an image": ["<image>\nWhy?"],
    "an image without a mark": ["Why?"],
    "an image between two lines": ["In this image:\n<image>\nwhat is the total?"],
    "two newlines after the image": ["<image>\n\nWhy?"],
    "two numbered images": ["Image-1: <image>\nImage-2: <image>\nWhy?"],
    "one numbered image": ["Image-1: <image>\nWhy?"],
    "two turns": ["<image>\nWhy?", "So.", "And here?"],
    "an image in each of two turns": ["<image>\nWhy?", " So.\n", "<image>\n And here? "],
    "an image in the second turn": ["Hello.", "Hello!", "<image>\nWhy?"],
    "no image": ["Why?\n"],
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_has_the_tokens_of_the_chat_api(case, processor):
    texts, images = PROMPTS[case], [] if case == "no image" else [CHART, RECEIPT]
    images = images[: max(1, sum(text.count("<image>") for text in texts))]
    sample = parse_record(llava(*texts, "So.", image=images), OPTIONS)
    ours = processor.apply_chat_template(
        sample.messages[:-1], tokenize=True, return_dict=True, add_generation_prompt=True, max_tiles=1
    )
    model, history = RecordingChat(), list(zip(texts[:-1:2], texts[1::2], strict=True))
    pixels = torch.zeros(len(images), 3, 56, 56) if images else None
    model.chat(processor.tokenizer, pixels, texts[-1], {}, history, num_patches_list=[1] * len(images))
    assert ours["input_ids"][0] == model.prompt


PLAIN_TEXT = st.text(max_size=8).filter(lambda text: "<" not in text) | st.sampled_from(
    ["\n", "\n\n", " ", "Image-1: ", "\nImage-2: ", "Image-2: ", "<image", "image>", "\r\n", "<b>"]
)


def as_rendered(text: str, placeholder: str) -> str:
    """The text with one newline after every mark, and the number of several images before it."""
    count = text.count("<image>")
    for number in range(1, count + 1):
        label = f"Image-{number}: " if count > 1 else ""
        text = re.sub(f"({label})?<image>\n?", lambda _, label=label: f"{label}{placeholder}\n", text, count=1)
    return text


@given(st.lists(PLAIN_TEXT, min_size=1, max_size=4), PLAIN_TEXT)
@settings(max_examples=300, deadline=None)
def test_texts_are_rendered_unchanged_except_for_newlines_and_numbers_at_images(tokenizer, pieces, answer):
    question = "<image>".join(pieces)
    count = len(pieces) - 1
    sample = parse_record(llava(question, answer + "."), FormatOptions()) if not count else parse_record(
        llava(question, answer + ".", image=[CHART] * count), OPTIONS
    )  # fmt: skip
    user, assistant = render(tokenizer, sample).split("<|im_start|>")[2:]
    assert user == f"user\n{as_rendered(question, '<IMG_CONTEXT>')}<|im_end|>"
    assert assistant == f"assistant\n{answer}.<|im_end|>"


def test_marks_in_answers_and_system_messages_are_text(tokenizer):
    record = llava("<image>\nWhy?", " <image>\n", system="Write <image>\n.", image=CHART)
    sample = parse_record(record, OPTIONS)
    assert shape_of(sample) == [
        ("system", ["Write <image>\n."]),
        ("user", ["chart.png", "Why?"]),
        ("assistant", [" <image>\n"]),
    ]


def test_marks_are_text_in_records_with_image_parts():
    parts = [
        {"type": "text", "text": "What does <image>\nmean in "},
        {"type": "image"},
        {"type": "text", "text": "\n?"},
    ]
    user = shape_of(parse_record(chatml(parts, images=[CHART]), OPTIONS))[0]
    assert user == ("user", ["What does <image>\nmean in ", "chart.png", "\n?"])


def test_marks_are_text_in_lists_of_parts_without_images():
    parts = [{"type": "text", "text": "What does <image> mean?"}]
    assert shape_of(parse_record(chatml(parts), OPTIONS))[0] == ("user", ["What does <image> mean?"])
    with pytest.raises(BadSample, match="1 <image> in the messages, 0 images"):
        parse_record(chatml("What does <image> mean?"), OPTIONS)
    marked = [{"type": "text", "text": "<image>Why?"}]
    assert shape_of(parse_record(chatml(marked, images=[CHART]), OPTIONS))[0] == ("user", ["chart.png", "Why?"])


def test_images_and_videos_without_marks_come_before_the_first_user_text():
    record = chatml("Why?", images=[CHART, RECEIPT], videos=[CLIP])
    assert shape_of(parse_record(record, OPTIONS))[0] == (
        "user",
        ["chart.png", "receipt.png", ["video", "clip.gif"], "Why?"],
    )


# Images


def conversations_of(sample: Sample) -> list[list[tuple[str, list]]]:
    return [shape_of(Sample(messages)) for messages in sample.conversations]


def test_every_independent_turn_shows_the_images_of_the_first():
    record = llava("Look: <image>\n<image> What?", "A.", "And?", "B.", images=[CHART, RECEIPT], system="Be brief.")
    images = ["chart.png", "receipt.png"]
    first = [("system", ["Be brief."]), ("user", ["Look: ", *images, " What?"]), ("assistant", ["A."])]
    sample = parse_record(record, replace(OPTIONS, independent_turns=True))
    second = [("system", ["Be brief."]), ("user", [*images, "And?"]), ("assistant", ["B."])]
    assert conversations_of(sample) == [first, second]
    dialogue = parse_record(record, OPTIONS)
    assert conversations_of(dialogue) == [[*first, ("user", ["And?"]), ("assistant", ["B."])]]
    assert dialogue.messages == sample.messages


def test_turns_with_a_high_rating_may_be_independent():
    texts = [{"user": f"{number}?", "assistant": f"{number}."} for number in range(3)]
    record = {"images": [CHART], "texts": texts, "relevance_ratings": [1, 5, 5]}
    sample = parse_record(record, replace(OPTIONS, min_rating=4, independent_turns=True))
    expected = [[("user", ["chart.png", f"{n}?"]), ("assistant", [f"{n}."])] for n in (1, 2)]
    assert conversations_of(sample) == expected


KINDS_OF_TURNS = {
    "one": (["ocr", "ocr"], None, "ocr", ()),
    "several": (["ocr", "caption"], None, "caption+ocr", ("ocr", "caption")),
    "some from the record": (["ocr", None], "math", "math+ocr", ("ocr", "math")),
    "one unknown": ([None, "ocr"], None, "ocr+unknown", ("unknown", "ocr")),
    "none": ([None, None], "math", "math", ()),
}


@pytest.mark.parametrize("of_turns, of_record, kind, turn_kinds", KINDS_OF_TURNS.values(), ids=KINDS_OF_TURNS)
def test_independent_turns_may_have_kinds_of_their_own(of_turns, of_record, kind, turn_kinds):
    texts = [{"user": "Why?", "assistant": "So.", "kind": each} for each in of_turns]
    record = {"texts": texts, "kind": of_record}
    sample = parse_record(record, FormatOptions(independent_turns=True))
    assert (sample.kind, sample.turn_kinds) == (kind, turn_kinds)
    assert (parse_record(record, OPTIONS).kind, parse_record(record, OPTIONS).turn_kinds) == (of_record, ())
    texts[0]["kind"] = "a+b"
    with pytest.raises(BadSample, match=r"texts\[0\].kind: expected a name without \+, got .*a\+b"):
        parse_record(record, OPTIONS)


@pytest.mark.parametrize(
    "record",
    [
        llava("Why?", "So.", "<image> And?", "So.", image=CHART),
        llava("<image>", "So.", "<video>", "So.", image=CHART, video=CLIP),
    ],
)
def test_images_in_a_later_independent_turn_are_a_bad_sample(record):
    assert parse_record(record, OPTIONS)
    with pytest.raises(
        BadSample, match=r"conversations\[2\]: independent_turns: .* first question only, got (image|video)"
    ):
        parse_record(record, replace(OPTIONS, independent_turns=True))


def encoded(size: tuple[int, int] = (30, 20), image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, image_format)
    return buffer.getvalue()


JPEG = base64.b64encode(encoded((90, 80), "JPEG")).decode()
IMAGES = {
    "a path": (CHART, "chart.png"),
    "a Path": (Path(CHART), "chart.png"),
    "an absolute path": (str(CORPORA / CHART), "chart.png"),
    "a file URL": (f"file://{CORPORA.as_posix()}/images/chart.png", "chart.png"),
    "an http URL": ("http://example.com/a%20b.png?x=1", "a%20b.png?x=1"),
    "a data URL": ("data:image/png;base64," + base64.b64encode(encoded()).decode(), (30, 20)),
    "a short base64 string": (base64.b64encode(encoded((3, 2))).decode(), (3, 2)),
    "a long base64 string, which begins like a path": (JPEG, (90, 80)),
    "base64 in lines": ("\n".join(JPEG[start : start + 76] for start in range(0, len(JPEG), 76)), (90, 80)),
    "bytes": (encoded(), (30, 20)),
    "a dict of bytes": ({"bytes": encoded(), "path": "a.png"}, (30, 20)),
    "a dict of a path": ({"bytes": None, "path": CHART}, "chart.png"),
    "a dict of a URL": ({"url": "https://example.com/a.png"}, "a.png"),
    "a PIL image": (Image.new("L", (5, 6)), (5, 6)),
}


@pytest.mark.parametrize("case", IMAGES)
def test_an_image_may_be(case):
    image, expected = IMAGES[case]
    assert case != "a long base64 string, which begins like a path" or (image[0] == "/" and len(image) > 4096)
    for record in (
        chatml("<image>Why?", images=[image]),
        chatml("Why?", image=image),
        chatml([{"type": "image", "image": image}, {"type": "text", "text": "Why?"}]),
    ):
        assert shape_of(parse_record(record, OPTIONS))[0] == ("user", [expected, "Why?"])


def test_image_parts_take_the_images_of_the_record_in_order():
    parts = [{"type": "image"}, {"type": "image", "image": encoded()}, {"type": "image", "path": None}]
    user = shape_of(parse_record(chatml([*parts, {"type": "text", "text": "Why?"}], images=[CHART, RECEIPT]), OPTIONS))[
        0
    ]
    assert user == ("user", ["chart.png", (30, 20), "receipt.png", "Why?"])


def test_encoded_images_are_opened_without_decoding():
    truncated = encoded((300, 200))[:200]
    image = parse_record(chatml("Why?", images=[truncated]), OPTIONS).messages[0]["content"][0]["image"]
    assert image.size == (300, 200)
    with pytest.raises(OSError, match="truncated"):
        image.load()


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = encoded()
    return body[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + body[33:]


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_decompression_bomb_is_a_bad_sample_without_a_warning(side):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(BadSample, match=rf"images: .*{side**2} pixels"):
            parse_record(chatml("Why?", images=[png_header(side, side)]), OPTIONS)
    assert caught == []


BAD_IMAGES = {
    "missing": ("images/no.png", r"images: 'images/no\.png' in .*corpora: No such file or directory"),
    "a folder": ("images", "images: 'images' in .*: not a file"),
    "a path with a null byte": ("a\0.png", r"images: 'a\\x00\.png' in .*: .*null"),
    "a path with a surrogate": ("\ud800.png", "images: .*surrogates not allowed"),
    "a long string": ("a, b" * 3000, "images: .* is neither a path nor base64"),
    "a long base64 string of something else": ("abcd" * 3000, "these 9000 bytes: not an image"),
    "an unknown scheme": ("s3://bucket/a.png", "expected a URL with http, https, file or data, got 's3://bucket/a.png'"),
    "bytes of something else": (b"GIF89a", "images: these 6 bytes: not an image that Pillow can read"),
    "a data URL of something else": ("data:text/plain,hello", "images: these 5 bytes: not an image"),
    "a data URL without data": ("data:image/png", "is not a data URL"),
    "an empty dict": ({}, "expected a dict with bytes, path or url, got the keys none"),
    "a number": (3, "expected a path, a URL, base64, bytes or a PIL image, got int"),
    "an image without pixels": (Image.new("RGB", (0, 5)), "the image is empty: 0 x 5 pixels"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_a_bad_sample(case):
    image, message = BAD_IMAGES[case]
    with pytest.raises(BadSample, match=message) as caught:
        parse_record(chatml("Why?", images=[image]), OPTIONS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_an_empty_file_is_a_bad_sample(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(BadSample, match=r"'empty\.png' in .*: an empty file"):
        parse_record(llava("Why?", "So.", image="empty.png"), FormatOptions(tmp_path))


# Paths


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with an image next to another image, and with links to both and to itself."""
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "outside.png", folder / "inside.png"):
        path.write_bytes(encoded())
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "a.png").write_bytes(encoded())
    (folder / "out.png").symlink_to(tmp_path / "outside.png")
    (folder / "in.png").symlink_to("inside.png")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    return folder


def image_path(path: str, options: FormatOptions) -> str:
    return parse_record(llava("Why?", "So.", image=path), options).messages[0]["content"][0]["image"]


OUTSIDE = ["../outside.png", "sub/../../outside.png", "out.png", "up/outside.png", "../root-2/a.png", "{}/outside.png",
           "file://{}/outside.png"]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_files_outside_of_the_image_root_are_refused_unless_allowed(path, root):
    path = path.format(root.parent)
    with pytest.raises(BadSample, match=r"is outside of image_root .*root: move it, or set allow_outside: true"):
        image_path(path, FormatOptions(root))
    found = Path(image_path(path, FormatOptions(root, allow_outside=True)))
    assert found.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("path", ["inside.png", "in.png", "sub/../inside.png", "{}/root/inside.png", "up/root/in.png"])
def test_files_inside_of_the_image_root_keep_their_names(path, root):
    found = image_path(path.format(root.parent), FormatOptions(root))
    assert Path(found).name == Path(path).name and Path(found).is_file()


def test_the_image_root_itself_may_be_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert image_path("inside.png", FormatOptions(tmp_path / "link")) == str(tmp_path / "link" / "inside.png")


def test_a_loop_of_links_is_a_bad_sample(root):
    with pytest.raises(BadSample, match="'loop' in "):
        image_path("loop", FormatOptions(root))


def test_a_path_without_an_image_root_is_refused_unless_allowed(root, monkeypatch):
    monkeypatch.chdir(root)
    with pytest.raises(BadSample, match=r"'inside\.png': a path needs image_root, or allow_outside: true"):
        image_path("inside.png", FormatOptions())
    assert image_path("inside.png", FormatOptions(allow_outside=True)) == "inside.png"


# Videos


FRAMES = [CHART, RECEIPT, CHART, RECEIPT, RECEIPT]
VIDEOS = {
    "a file": (CLIP, [["video", "clip.gif"]]),
    "a list of a file": ([CLIP], [["video", "clip.gif"]]),
    "two files": ([CLIP, CLIP], [["video", "clip.gif"]] * 2),
    "a URL": ("https://example.com/a.mp4", [["video", "a.mp4"]]),
    "a dict of a path": ({"bytes": None, "path": CLIP}, [["video", "clip.gif"]]),
    "frames": (FRAMES, [["video", *(Path(frame).name for frame in FRAMES)]]),
    "a list of frames": ([FRAMES], [["video", *(Path(frame).name for frame in FRAMES)]]),
    "a file and frames": ([CLIP, FRAMES[:1]], [["video", "clip.gif"], ["video", "chart.png"]]),
}


@pytest.mark.parametrize("case", VIDEOS)
def test_a_video_may_be(case):
    videos, expected = VIDEOS[case]
    for key in ("video", "videos"):
        record = llava("<video>\n" * len(expected) + "Why?", "So.", **{key: videos})
        assert shape_of(parse_record(record, OPTIONS))[0] == ("user", [*expected, "Why?"])


def test_frames_are_sampled_as_the_processor_samples_them(processor):
    options = FormatOptions(CORPORA, num_frames=2)
    sampled = parse_record(llava("<video>\nWhy?", "So.", video=FRAMES), options)
    full = parse_record(llava("<video>\nWhy?", "So.", video=FRAMES), OPTIONS)
    assert shape_of(sampled)[0] == ("user", [["video", "chart.png", "chart.png"], "Why?"])
    ours, theirs = (
        processor.apply_chat_template(sample.messages, tokenize=True, return_dict=True, **extra)
        for sample, extra in ((sampled, {}), (full, {"num_frames": 2}))
    )
    assert ours["input_ids"] == theirs["input_ids"]
    assert torch.equal(torch.as_tensor(ours["pixel_values"]), torch.as_tensor(theirs["pixel_values"]))


def test_a_video_in_bytes_is_read_by_the_processor(processor):
    record = chatml([{"type": "video", "video": {"bytes": (CORPORA / CLIP).read_bytes()}}])
    batch = processor.apply_chat_template(parse_record(record, OPTIONS).messages, tokenize=True, return_dict=True)
    assert len(batch["pixel_values"]) == 4


BAD_VIDEOS = {
    "missing": ("no.mp4", "video: 'no.mp4' in .*: No such file"),
    "a missing frame": ([CHART, "no.png"], "video, frame 1: 'no.png' in .*: No such file"),
    "no frames": ([CLIP, []], r"video\[1\]: the video has no frames"),
    "empty bytes": ({"bytes": b""}, "expected a path, a URL, bytes or a list of frames, got empty bytes"),
    "a number": (3, "expected a path, a URL, bytes or a list of frames, got int"),
}


@pytest.mark.parametrize("case", BAD_VIDEOS)
def test_a_bad_video_is_a_bad_sample(case):
    video, message = BAD_VIDEOS[case]
    with pytest.raises(BadSample, match=message):
        parse_record(llava("<video>" * (2 if case == "no frames" else 1), "So.", video=video), OPTIONS)


# Rated turns


def finevision(decode: bool) -> list[dict]:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_parquet(str(CORPORA / "finevision.parquet"), keep_in_memory=True)
    if not decode:
        rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    return [*rows]


@pytest.mark.parametrize("decode", [True, False])
def test_rows_of_finevision_have_their_images_before_the_first_text(decode, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    assert [shape_of(parse_record(row, FormatOptions())) for row in finevision(decode)] == [
        [
            ("user", [(48, 32), "What is it?"]),
            ("assistant", ["A chart."]),
            ("user", ["What colour?"]),
            ("assistant", ["Red."]),
            ("user", ["What year?"]),
            ("assistant", ["1066."]),
        ],
        [("user", [(48, 32), (20, 40), "Compare them."]), ("assistant", ["Red and blue."])],
        [("user", ["What is 6 times 7?"]), ("assistant", ["42."])],
    ]


def rated(**ratings: list) -> dict:
    texts = [{"user": f"{index}?", "assistant": f"{index}."} for index in range(3)]
    return {"texts": texts, "images": [encoded()], **{f"{name}_ratings": column for name, column in ratings.items()}}


RATED = {
    "all are high enough": (4, {"relevance": [4, 5, 4]}, [0, 1, 2]),
    "one is too low": (4, {"relevance": [4, 3, 4], "formatting": [5, 5, 5]}, [0, 2]),
    "the first is too low": (3, {"relevance": [5, 5, 5], "formatting": [2, 3, 3]}, [1, 2]),
    "each in another rating": (4, {"relevance": [3, 4, 4], "formatting": [5, 5, 1]}, [1]),
    "none is not low": (4, {"relevance": [None, 3, 4]}, [0, 2]),
    "a minimum for one rating": ({"relevance": 4}, {"relevance": [5, 3, 4], "formatting": [1, 1, 1]}, [0, 2]),
    "no minimum": (None, {"relevance": [1, 1, 1]}, [0, 1, 2]),
}


@pytest.mark.parametrize("case", RATED)
def test_turns_below_the_minimum_rating_are_dropped(case):
    min_rating, ratings, kept = RATED[case]
    messages = shape_of(parse_record(rated(**ratings), FormatOptions(min_rating=min_rating)))
    assert messages[0] == ("user", [(30, 20), f"{kept[0]}?"])
    assert messages[1::2] == [("assistant", [f"{index}."]) for index in kept]


def test_a_sample_without_turns_left_is_filtered_and_not_bad():
    with pytest.raises(FilteredSample, match="all 3 turns have a rating below min_rating 4") as caught:
        parse_record(rated(relevance=[1, 2, 3]), FormatOptions(min_rating=4))
    assert not isinstance(caught.value, BadSample)


BAD_RATINGS = {
    "no ratings": (4, {}, "min_rating: the record has no relevance_ratings"),
    "not the rating": ({"formatting": 4}, {"relevance": [5, 5, 5]}, "the record has no formatting_ratings"),
    "too few": (4, {"relevance": [5]}, "relevance_ratings: expected a list of 3 ratings, .*, got 1 ratings"),
    "no list": (4, {"relevance": 5}, "relevance_ratings: expected a list of 3 ratings, .*, got int"),
    "no numbers": (4, {"relevance": [5, "5", 5]}, "relevance_ratings: expected numbers, got str"),
}


@pytest.mark.parametrize("case", BAD_RATINGS)
def test_ratings_that_do_not_fit_are_a_bad_sample(case):
    min_rating, ratings, message = BAD_RATINGS[case]
    with pytest.raises(BadSample, match=message):
        parse_record(rated(**ratings), FormatOptions(min_rating=min_rating))


def test_a_minimum_rating_of_a_format_without_ratings_is_refused():
    with pytest.raises(BadSample, match="min_rating: only texts have ratings, the record has conversations"):
        parse_record(llava("Why?", "So."), FormatOptions(min_rating=4))


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"expected the ratings relevance, .*, formatting, got 'beauty'"):
        FormatOptions(min_rating={"beauty": 4})
    with pytest.raises(ValueError, match="num_frames: expected a positive number, got 0"):
        FormatOptions(num_frames=0)


# Bad samples


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "Why?"} for role in roles]}


BAD_RECORDS = {
    "not a record": ([], r"expected a record with keys \(a JSON object\), got list"),
    "no format": (
        {"id": 3, "text": "Why?"},
        r"expected the keys of one of messages, conversations, prompt \+ completion, texts; got 'id, text'",
    ),
    "no keys": ({}, "got none"),
    "no messages": ({"messages": []}, "no assistant turn"),
    "an unknown role": (turns("user", "tool", "assistant"), r"messages\[1\]: expected one of the roles .*, got 'tool'"),
    "no role": ({"messages": [{"content": "Why?"}]}, r"messages\[0\]: expected one of the roles .*, got 'None'"),
    "no assistant": (turns("system", "user"), "no assistant turn"),
    "the assistant first": (turns("assistant", "user"), r"messages\[0\]: expected user, got assistant"),
    "two users": (turns("user", "user", "assistant"), r"messages\[1\]: expected assistant, got user"),
    "two answers": (turns("user", "assistant", "assistant"), r"messages\[2\]: expected user, got assistant"),
    "a system message inside": (turns("user", "system", "assistant"), r"messages\[1\]: expected assistant, got system"),
    "two system messages": (
        {**turns("system", "user", "assistant"), "system": "Be brief."},
        r"messages\[0\]: expected user, got system",
    ),
    "no last answer": (turns("user", "assistant", "user"), r"messages\[2\]: the last user turn has no answer"),
    "an empty answer": (llava("Why?", " \n"), r"conversations\[1\]: the answer is empty"),
    "an answer without parts": (chatml("Why?", []), r"messages\[1\]: the answer is empty"),
    "no answer": (chatml("Why?", None), r"messages\[1\]: content: expected a string or a list of parts, got NoneType"),
    "an answer that is a number": (chatml("Why?", 42), r"messages\[1\]: content: .*, got int"),
    "an answer with an image": (
        chatml("Why?", [{"type": "image", "image": CHART}]),
        r"messages\[1\]: assistant: expected text only, got image",
    ),
    "a part of another type": (
        chatml([{"type": "audio", "audio": "a.wav"}]),
        r"messages\[0\], part 0: expected a part of the type text, image, image_url or video, got 'audio'",
    ),
    "a part that is no dict": (chatml(["Why?"]), r"messages\[0\], part 0: .*, got str"),
    "a text part without text": (chatml([{"type": "text"}]), r"part 0: expected a string as text, got NoneType"),
    "an image_url without a URL": (chatml([{"type": "image_url", "image_url": {}}]), "image_url: .* got NoneType"),
    "more marks than images": (llava("<image> <image>", "So.", image=CHART), "2 <image> in the messages, 1 images"),
    "marks without images": (llava("<image>", "So."), "1 <image> in the messages, 0 images"),
    "fewer marks than images": (llava("<image>", "So.", image=[CHART] * 3), "1 <image> in the messages, 3 images"),
    "fewer parts than images": (chatml([{"type": "image"}], images=[CHART] * 2), "1 <image> in the messages, 2 images"),
    "more marks than videos": (llava("<video><video>", "So.", video=CLIP), "2 <video> in the messages, 1 videos"),
    "image and images": (llava("Why?", "So.", image=CHART, images=[CHART]), "expected image or images, got both"),
    "messages that are a string": ({"messages": "Why?"}, "messages: expected a list of messages, got str"),
    "a message that is a string": ({"messages": ["Why?"]}, r"messages\[0\]: expected a message with role"),
    "a prompt that is a string": ({"prompt": "Why?", "completion": "So."}, "prompt: expected a list of messages"),
    "texts that are a string": ({"texts": "Why?"}, "texts: expected a list"),
    "a text that is a string": ({"texts": ["Why?"]}, r"texts\[0\]: expected user and assistant, got str"),
    "a text without an answer": ({"texts": [{"user": "Why?"}]}, r"texts\[0\].assistant: expected a string"),
    "a lone surrogate": (llava("Why?", "\ud800"), r"conversations\[1\]: the text is not valid Unicode"),
    "a token of the prompt format": (
        llava("Why?<|im_end|>", "So."),
        r"conversations\[0\]: the text contains <\|im_end\|>",
    ),
    "a placeholder in an answer": (
        llava("Why?", "<IMG_CONTEXT>"),
        r"conversations\[1\]: the text contains <IMG_CONTEXT>",
    ),
    "a video in an answer": (llava("Why?", "<video>"), r"conversations\[1\]: the text contains <video>"),
    "a kind that is a number": (llava("Why?", "So.", kind=3), "kind: expected a string as text, got int"),
    "a system message that is a list": (llava("Why?", "So.", system=["a"]), "system: expected a string as text"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_faulty_record_is_a_bad_sample(case):
    record, message = BAD_RECORDS[case]
    with pytest.raises(BadSample, match=message) as caught:
        parse_record(record, OPTIONS)
    assert "\n" not in str(caught.value)


KEYS = [
    *("messages", "conversations", "prompt", "completion", "texts", "image", "images", "video", "videos", "system"),
    *("kind", "channel", "role", "from", "content", "value", "type", "text", "image_url", "url", "bytes", "path"),
    *("user", "assistant", "relevance_ratings", "formatting_ratings"),
]
WORDS = [
    *("user", "assistant", "system", "human", "gpt", "text", "image", "video", "image_url", "<image>", "<video>\n"),
    *("/", "..", "\0", "data:", "data:,", "file:", "file://[", "http://", "s3://", "/9j/", "iVBORw0KGgo=", CHART, CLIP),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from([*WORDS, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
RECORDS = [record for name in SAMPLES for record in records(name)]


@st.composite
def changed_records(draw) -> dict:
    """A record of the files with one value, anywhere inside, replaced or removed."""
    record = parent = json.loads(json.dumps(draw(st.sampled_from(RECORDS))))
    key = draw(st.sampled_from([*parent]))
    while isinstance(parent[key], (dict, list)) and parent[key] and draw(st.booleans()):
        parent = parent[key]
        key = draw(st.sampled_from([*parent] if isinstance(parent, dict) else range(len(parent))))
    parent[key] = draw(JSON)
    if draw(st.booleans()):
        del parent[key]
    return record


@given(JSON | changed_records(), st.sampled_from([None, None, None, 3, {"relevance": 2}]))
@settings(max_examples=400, deadline=None)
def test_any_json_value_is_a_sample_or_a_bad_sample(record, min_rating):
    try:
        sample = parse_record(record, FormatOptions(CORPORA, min_rating=min_rating))
    except (BadSample, FilteredSample) as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert sample.messages[-1]["role"] == "assistant"


@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}])
def test_an_answer_that_is_not_to_be_trained_is_refused(mark):
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", **mark}]
    with pytest.raises(BadSample, match="every answer is trained"):
        parse_record({"messages": turns}, FormatOptions())


@pytest.mark.parametrize("token", ["<img>", "</img>", "<|endoftext|>"])
def test_special_tokens_of_the_prompt_format_are_refused_in_texts(token):
    with pytest.raises(BadSample, match=re.escape(token)):
        parse_record(llava("Why?", f"So {token}."), OPTIONS)


@pytest.mark.parametrize(
    "record",
    [
        llava("Why?", "So.", objects={"bbox": [[1, 2, 3, 4]]}),
        llava("Why?", "So.", tools=[{"name": "search"}]),
        llava("Why?", "So.", messages=[{"role": "user", "content": "Why?"}]),
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So.", "reasoning_content": "Hm."},
            ]
        },
    ],
)
def test_what_would_be_left_out_silently_is_refused(record):
    with pytest.raises(BadSample, match=r"not supported|several formats"):
        parse_record(record, OPTIONS)
