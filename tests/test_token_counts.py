"""SAILVLProcessor.count_tokens compared with what apply_chat_template returns, and with the frames that are decoded."""

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_sailvl import load_tokenizer

from sailvit import SAILViTImageProcessor, SAILVLProcessor


SIZES = [(56, 56), (300, 90), (70, 410), (1, 1)]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ["The total is 42.", "\n\nno", "你好 déjà", "<|im_end|>", " "]
)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    tokenizer = load_tokenizer(tmp_path_factory.mktemp("tokenizers") / "toy")
    return SAILVLProcessor(SAILViTImageProcessor(size=56, max_tiles=4), tokenizer, image_seq_length=4)


def blank(index: int) -> Image.Image:
    return Image.new("RGB", SIZES[index])


@st.composite
def conversations(draw) -> list[dict]:
    """Turns of user and assistant; the user's have texts, images and videos in any order."""
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        kinds = draw(st.lists(st.sampled_from(["text", "image", "video"]), min_size=1, max_size=4))
        parts = []
        for kind in kinds:
            media = {
                "image": lambda: blank(draw(st.integers(0, 3))),
                "video": lambda: [blank(0)] * draw(st.integers(1, 3)),
            }
            parts.append({"type": kind, kind: draw(TEXTS) if kind == "text" else media[kind]()})
        messages.append({"role": "user", "content": parts})
        answer = draw(TEXTS)
        messages.append(
            {"role": "assistant", "content": [{"type": "text", "text": answer}] if draw(st.booleans()) else answer}
        )
    return messages


def expected(processor, messages: list[dict], **options) -> tuple[int, int, int, int]:
    batch = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt", **options
    )
    tiles = len(batch["pixel_values"]) if "pixel_values" in batch else 0
    (ids,) = batch["input_ids"]
    ends = (ids == processor.image_token_ids[-1]).nonzero()
    return len(ids), int(batch["assistant_masks"].sum()), tiles, int(ends[-1]) + 1 if tiles else 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations(), max_tiles=st.integers(1, 6))
def test_counts_are_those_of_the_processed_conversation(messages, max_tiles, processor):
    assert processor.count_tokens(messages, max_tiles=max_tiles) == expected(processor, messages, max_tiles=max_tiles)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chats=st.lists(conversations(), min_size=2, max_size=4))
def test_a_batch_counts_like_its_conversations(chats, processor):
    assert processor.count_tokens(chats) == [processor.count_tokens(chat) for chat in chats]


def ask(**media) -> list[dict]:
    ((kind, value),) = media.items()
    question = [{"type": kind, kind: value}, {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "A total."}]


def test_an_image_is_not_decoded(processor, tmp_path, monkeypatch):
    Image.new("RGB", (300, 90)).save(tmp_path / "wide.jpg")
    whole = expected(processor, ask(image=str(tmp_path / "wide.jpg")))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    assert processor.count_tokens(ask(image=str(tmp_path / "wide.jpg"))) == whole


def test_a_rotated_image_counts_as_it_is_shown(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: rotated by 90 degrees
    Image.new("RGB", (300, 50)).save(tmp_path / "rotated.jpg", exif=exif)
    for rotate in (False, True):
        messages, options = (
            ask(image=str(tmp_path / "rotated.jpg")),
            {"do_exif_transpose": rotate, "use_thumbnail": False},
        )
        assert processor.count_tokens(messages, **options) == expected(processor, messages, **options)
        assert processor.image_processor.image_size(messages[0]["content"][0]["image"], do_exif_transpose=rotate) == (
            (300, 50) if rotate else (50, 300)
        )


def write_video(path, frames: int, rate: int = 10) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = 64
        for index in range(frames):
            picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), index * 5, np.uint8))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("options", [{}, {"num_frames": 3}, {"fps": 2.0}, {"do_sample_frames": False}])
def test_frames_of_a_video_file_are_counted_as_they_are_sampled(options, processor, tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=25)
    assert processor.count_tokens(ask(video=video), **options) == expected(processor, ask(video=video), **options)


def test_a_video_without_frame_count_in_its_header_is_decoded(processor, tmp_path):
    video = write_video(tmp_path / "clip.mkv", frames=5)
    assert av.open(video).streams.video[0].frames == 0
    assert processor.count_tokens(ask(video=video)) == expected(processor, ask(video=video))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{"role": "user", "content": "<IMG_CONTEXT>"}, {"role": "assistant", "content": "a"}],
            "1 <IMG_CONTEXT> in the text",
        ),
        (ask(image="no/such.png"), "no such file"),
        ([], "is empty"),
    ],
)
def test_what_cannot_be_processed_cannot_be_counted(messages, message, processor):
    with pytest.raises(ValueError, match=message):
        processor.count_tokens(messages)
    with pytest.raises(ValueError, match=message):
        expected(processor, messages)
