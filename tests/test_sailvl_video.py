"""Videos of SAIL-VL: decoding and sampling, compared with transformers and the original frames."""

import base64
import builtins
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_sailvl import SYSTEM, TILE, load_tokenizer
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, load_video

from sailvit import SAILViTImageProcessor, SAILVLProcessor


av = pytest.importorskip("av")

RELEASE = tuple(int(number) for number in version("transformers").split(".")[:2])
older_rounds_floats = pytest.mark.skipif(RELEASE < (5, 23), reason="older releases choose frames by rounded floats")
START = 307
PROMPT = "<video>\nWhy?"
STEP = 6  # brightness difference of successive frames


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> SAILVLProcessor:
    tokenizer = load_tokenizer(tmp_path_factory.mktemp("tokenizers") / "toy")
    return SAILVLProcessor(SAILViTImageProcessor(size=56, max_tiles=4), tokenizer, image_seq_length=4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 4 seconds at 10 frames per second."""
    return write_video(tmp_path_factory.mktemp("videos") / "clip.mp4")


@pytest.fixture
def served():
    """Return a function that serves a file over http and returns its URL."""
    servers = []

    def serve(path: Path) -> str:
        handler = partial(SimpleHTTPRequestHandler, directory=str(path.parent))
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/{path.name}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def grey_images(count: int) -> list[np.ndarray]:
    return [np.full((64, 64, 3), STEP * index, np.uint8) for index in range(count)]


def write_video(
    path: Path, codec: str = "libx264", count: int = 40, rate: int = 10, times: Sequence[int] | None = None
) -> Path:
    """Write grey frames of increasing brightness, at a frame rate or at times in milliseconds."""
    formats = {"mjpeg": "yuvj420p", "ffv1": "yuv444p"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 64, formats.get(codec, "yuv420p")
        stream.bit_rate = 8_000_000
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, image in enumerate(grey_images(count)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_animation(path: Path, count: int = 40, duration: int | list[int] = 100) -> Path:
    first, *others = map(Image.fromarray, grey_images(count))
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0)
    return path


def frames_of(processor: SAILVLProcessor, videos: object, text: str = PROMPT, **options) -> list[int]:
    """Return the indices of the sampled frames, from their brightness."""
    batch = processor(text=text, videos=videos, do_normalize=False, return_tensors="pt", **options)
    assert (batch["input_ids"] == START).sum() == len(batch["pixel_values"])
    return (batch["pixel_values"].mean((1, 2, 3)) * 255 / STEP).round().int().tolist()


# Options

OPTIONS = {
    "8 frames of a file by default": ({}, [0, 5, 10, 15, 20, 25, 30, 35]),
    "num_frames": ({"num_frames": 4}, [0, 10, 20, 30]),
    "fps": ({"fps": 1}, [0, 10, 20, 30]),
    "a fractional fps": ({"fps": 0.5}, [0, 20]),
    "every frame": ({"do_sample_frames": False}, list(range(40))),
    "every frame, whatever the rate": ({"do_sample_frames": False, "fps": 1}, list(range(40))),
    "sampled on request": ({"do_sample_frames": True}, [0, 5, 10, 15, 20, 25, 30, 35]),
    "None for what is not given": ({"num_frames": 2, "fps": None, "do_sample_frames": None}, [0, 20]),
    "more frames than there are": ({"num_frames": 100}, list(range(40))),
    "more a second than there are": ({"fps": 60}, list(range(40))),
    "a rate that goes before the file's": ({"fps": 1, "video_metadata": {"fps": 20}}, [0, 20]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_select_the_frames(case, processor, clip):
    options, expected = OPTIONS[case]
    assert frames_of(processor, clip, **options) == expected
    messages = [{"role": "user", "content": [{"type": "video", "path": str(clip)}, {"type": "text", "text": "Why?"}]}]
    reading = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    nested, raw = {"videos_kwargs": options}, {"do_normalize": False}
    assert frames_of(processor, clip, **nested) == expected
    for given_as in (
        options | raw,
        nested | raw,
        {"processor_kwargs": options | raw},
        {"processor_kwargs": nested | raw},
    ):
        batch = processor.apply_chat_template(messages, **reading, **given_as)
        assert (batch["pixel_values"].mean((1, 2, 3)) * 255 / STEP).round().int().tolist() == expected


@older_rounds_floats
@pytest.mark.parametrize("options", [{"num_frames": 5}, {"fps": 1}, {"fps": 5}, {"fps": 2.5}])
@pytest.mark.parametrize("rate", [10, 12, 30])
def test_frames_and_metadata_are_those_of_transformers(rate, options, processor, tmp_path):
    path = write_video(tmp_path / "clip.mp4", count=37, rate=rate)
    pixels, metadata = load_video(str(path), backend="pyav", **options)
    batch = processor(text=PROMPT, videos=path, return_metadata=True, return_tensors="pt", **options)
    expected = processor.image_processor(list(pixels), do_tile=False, input_data_format="channels_last")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    (ours,) = batch["video_metadata"]
    assert list(ours.frames_indices) == list(metadata.frames_indices)
    for field in ("total_num_frames", "fps", "width", "height", "duration", "video_backend"):
        assert getattr(ours, field) == pytest.approx(getattr(metadata, field)), field


LISTS = {
    "all frames of a list": ({}, list(range(12))),
    "num_frames": ({"num_frames": 4}, [0, 3, 6, 9]),
    "sampled on request": ({"do_sample_frames": True}, [0, 1, 3, 4, 6, 7, 9, 10]),
    "not sampled": ({"do_sample_frames": False, "num_frames": 4}, list(range(12))),
    "fps": ({"fps": 1, "video_metadata": {"fps": 4}}, [0, 4, 8]),
    "fps, nested": ({"videos_kwargs": {"fps": 2, "video_metadata": [[{"fps": 4}]]}}, [0, 2, 4, 6, 8, 10]),
    "fps of frames that were taken from more": (
        {"fps": 1, "video_metadata": VideoMetadata(120, fps=20, frames_indices=list(range(0, 120, 10)))},
        [0, 2, 4, 6, 8, 10],
    ),
}


@pytest.mark.parametrize("case", LISTS)
def test_frames_in_memory_are_sampled_like_those_of_a_file(case, processor):
    options, expected = LISTS[case]
    frames = grey_images(12)
    for video in ([Image.fromarray(frame) for frame in frames], np.stack(frames), torch.from_numpy(np.stack(frames))):
        assert frames_of(processor, [video], **options) == expected


def test_metadata_of_presampled_frames_is_used(processor):
    known = VideoMetadata(120, fps=20, frames_indices=list(range(0, 120, 10)))
    options = {"video_metadata": known, "return_metadata": True}
    (all_frames,) = processor(text=PROMPT, videos=np.stack(grey_images(12)), **options)["video_metadata"]
    (some,) = processor(text=PROMPT, videos=np.stack(grey_images(12)), num_frames=3, **options)["video_metadata"]
    assert (all_frames.frames_indices, some.frames_indices) == (list(range(0, 120, 10)), [0, 40, 80])
    assert known.frames_indices == list(range(0, 120, 10)) and some.fps == 20


def test_each_video_has_its_own_metadata(processor):
    videos, prompt = [np.stack(grey_images(8)), np.stack(grey_images(6))], "<video>\n<video>"
    rates = [{"fps": 2}, {"fps": 3}]
    assert frames_of(processor, videos, prompt, fps=1, video_metadata=rates) == [0, 2, 4, 6, 0, 3]
    with pytest.raises(ValueError, match="expected one video_metadata for each of 2 videos, got 1"):
        processor(text=prompt, videos=videos, video_metadata=rates[:1])


REFUSED = [
    ({"num_frames": 2, "fps": 1}, ValueError, "num_frames=2 and fps=1 exclude each other"),
    ({"videos_kwargs": {"num_frames": 2, "fps": 1}}, ValueError, "exclude each other"),
    ({"num_frames": 0}, ValueError, "num_frames must be a positive integer, got 0"),
    ({"num_frames": 2.5}, ValueError, "num_frames must be a positive integer, got 2.5"),
    ({"fps": -1}, ValueError, "fps must be a positive number, got -1"),
    ({"fps": "2"}, ValueError, "fps must be a positive number, got '2'"),
    ({"videos_kwargs": {"num_frame": 2}}, TypeError, "no option 'num_frame'; did you mean num_frames?"),
    ({"videos_kwargs": {"max_tiles": 2}}, TypeError, "no option 'max_tiles'; it belongs in images_kwargs"),
    ({"images_kwargs": {"num_frames": 2}}, TypeError, "no option 'num_frames'; it belongs in videos_kwargs"),
    ({"num_frames": 2, "videos_kwargs": {"num_frames": 2}}, ValueError, "num_frames: given twice, in videos_kwargs"),
    ({"fps": True}, ValueError, "fps must be a positive number, got True"),
    ({"do_sample_frames": "no"}, ValueError, "do_sample_frames must be True or False, got 'no'"),
    ({"return_metadata": 1}, ValueError, "return_metadata must be True or False"),
    ({"video_metadata": {"fsp": 2}}, TypeError, "video_metadata[0] has no field 'fsp'; did you mean fps?"),
    ({"video_metadata": {"nonsense": 2}}, TypeError, "no field 'nonsense'; the fields are total_num_frames, fps"),
    *[
        ({"video_metadata": {"fps": fps}}, ValueError, "video_metadata[0]: fps must be a positive number, or None")
        for fps in ("25", 0, -1, True)
    ],
    ({"videos_kwargs": [1]}, TypeError, "videos_kwargs must be a dict of options, got list"),
    ({"images_kwargs": "fps"}, TypeError, "images_kwargs must be a dict of options, got str"),
    ({"common_kwargs": 3}, TypeError, "common_kwargs must be a dict of options, got int"),
    ({"video_kwargs": {"fps": 1}}, TypeError, "no option 'video_kwargs'; did you mean videos_kwargs?"),
    ({"video_metadata": 25}, TypeError, "video_metadata must be a VideoMetadata, a dict or a list of them, got int"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_an_invalid_option_raises(options, error, message, processor, clip):
    with pytest.raises(error, match=re.escape(message)):
        processor(text=PROMPT, videos=clip, **options)
    with pytest.raises(error, match=re.escape(message)):
        message_of_it = {"role": "user", "content": [{"type": "video", "path": str(clip)}]}
        processor.apply_chat_template([message_of_it], tokenize=True, **options)


def test_indices_are_plain_integers(processor, clip):
    for video in (clip, np.stack(grey_images(6))):
        batch = processor(text=PROMPT, videos=video, num_frames=np.int64(3), return_metadata=True)
        assert {type(index) for index in batch["video_metadata"][0].frames_indices} == {int}


def test_fps_needs_the_frame_rate_of_the_video(processor):
    with pytest.raises(ValueError, match=r"video\[0\]: fps=1 needs the frame rate of the video: pass video_metadata="):
        processor(text=PROMPT, videos=np.stack(grey_images(4)), fps=1)
    with pytest.raises(ValueError, match=r"4 frames, but video_metadata describes 40 frames.* pass frames_indices"):
        known = {"fps": 10, "total_num_frames": 40}
        processor(text=PROMPT, videos=np.stack(grey_images(4)), fps=1, video_metadata=known)


def test_image_options_do_not_apply_to_frames(processor, clip):
    text, image = "<IMG_CONTEXT>\n<video>", Image.fromarray(grey_images(2)[1])
    options = {"images_kwargs": {"do_normalize": False}, "videos_kwargs": {"num_frames": 1, "do_rescale": False}}
    batch = processor(image, text, clip, **options)
    expected = [processor.image_processor(image, do_normalize=False)["pixel_values"]]
    expected.append(processor.image_processor(Image.new("RGB", (64, 64)), do_rescale=False)["pixel_values"])
    torch.testing.assert_close(batch["pixel_values"], torch.cat(expected), rtol=0, atol=0.1)
    with pytest.raises(ValueError, match="expected the same size"):
        processor(image, text, clip, images_kwargs={"size": 28})


# Files

FILMS = {
    "clip.mp4": ("libx264", "mpeg4"),
    "clip.mkv": ("libx264", "mpeg4", "mjpeg", "libvpx-vp9"),
    "clip.webm": ("libvpx", "libvpx-vp9"),
    "clip.avi": ("mpeg4", "mjpeg", "libx264"),
    "clip.mov": ("libx264", "mjpeg"),
    "clip.ts": ("libx264",),
    "clip.flv": ("flv",),
    "clip.wmv": ("wmv2",),
    "clip.nut": ("ffv1",),
}


@pytest.mark.parametrize(("file", "codec"), [(file, codec) for file, codecs in FILMS.items() for codec in codecs])
def test_video_files_of_any_codec_decode_to_their_frames(file, codec, processor, tmp_path):
    try:
        path = write_video(tmp_path / file, codec)
    except (ValueError, av.FFmpegError) as error:
        pytest.skip(f"this PyAV does not write it: {error}")
    for options, expected in ({"num_frames": 4}, [0, 10, 20, 30]), ({"fps": 2}, list(range(0, 40, 5))):
        assert frames_of(processor, path, **options) == expected
    assert frames_of(processor, path, do_sample_frames=False) == list(range(40))


@pytest.mark.parametrize("file", ["clip.gif", "clip.webp", "clip.png"])
def test_an_animated_image_is_a_video(file, processor, tmp_path, monkeypatch):
    path = write_animation(tmp_path / file)
    monkeypatch.setattr(builtins, "__import__", without_pyav(builtins.__import__))
    for video in (path, str(path), [path], [[path]], path.as_uri()):
        assert frames_of(processor, video, num_frames=4) == [0, 10, 20, 30]
    assert frames_of(processor, path, fps=2) == list(range(0, 40, 5))
    assert frames_of(processor, path, do_sample_frames=False) == list(range(40))


@pytest.mark.parametrize("file", ["clip.gif", "clip.webp", "clip.png"])
def test_an_animated_image_is_a_video_at_any_url(file, processor, tmp_path, served):
    content = base64.b64encode(write_animation(tmp_path / file).read_bytes()).decode()
    for url in (f"data:image/{file[5:]};base64,{content}", served(tmp_path / file)):
        for video in (url, [url], [[url]]):
            assert frames_of(processor, video, num_frames=4) == [0, 10, 20, 30]
        assert frames_of(processor, [url, url], "<video>\n<video>", num_frames=2) == [0, 20, 0, 20]
        message = {"role": "user", "content": [{"type": "video", "url": url}]}
        assert len(processor.apply_chat_template([message], tokenize=True, return_dict=True)["pixel_values"]) == 8


@pytest.mark.parametrize("file", ["still.png", "still.webp", "still.jpg"])
def test_image_urls_are_frames(file, processor, tmp_path, served):
    Image.fromarray(grey_images(4)[3]).save(tmp_path / file, quality=100)
    content = base64.b64encode((tmp_path / file).read_bytes()).decode()
    for url in (f"data:image/{file[6:].replace('jpg', 'jpeg')};base64,{content}", served(tmp_path / file)):
        assert frames_of(processor, url) == frames_of(processor, [url]) == [3]
        assert frames_of(processor, [url, url]) == [3, 3]


def test_tiff_pages_and_mpo_views_are_not_frames(processor, tmp_path):
    for file in ("pages.tif", "views.mpo", "views.jpg"):
        first, *others = map(Image.fromarray, grey_images(2))
        first.save(tmp_path / file, "TIFF" if file.endswith("tif") else "MPO", save_all=True, append_images=others)
        assert frames_of(processor, str(tmp_path / file)) == [0]


def test_still_images_of_animated_formats_are_frames(processor, tmp_path):
    stills = [tmp_path / f"{index}.png" for index in range(3)]
    for path, image in zip(stills, grey_images(3), strict=True):
        Image.fromarray(image).save(path)
    assert frames_of(processor, stills) == [0, 1, 2]
    assert frames_of(processor, stills[2]) == [2] and frames_of(processor, Image.open(stills[1])) == [1]
    animated = [write_animation(tmp_path / f"{count}.webp", count) for count in (2, 3)]
    assert frames_of(processor, animated, "<video>\n<video>") == [0, 1, 0, 1, 2]


def test_the_fallback_image_of_an_apng_is_not_a_frame(processor, tmp_path):
    first, *others = map(Image.fromarray, grey_images(4))
    first.save(tmp_path / "clip.png", save_all=True, append_images=others, duration=100, default_image=True)
    assert frames_of(processor, tmp_path / "clip.png") == [1, 2, 3]


@pytest.mark.parametrize("file", ["clip.mp4", "clip.mkv", "clip.webp"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_short_video_returns_all_frames(count, file, processor, tmp_path):
    write = write_animation if file.endswith("webp") else write_video
    path = write(tmp_path / file, count=count)
    for options in ({}, {"num_frames": 8}, {"fps": 100}):
        assert frames_of(processor, path, **options) == list(range(count))
    assert frames_of(processor, path, fps=0.1) == [0]


TIMES = [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 3000]


@pytest.mark.parametrize(
    ("file", "codec"), [("clip.mp4", "libx264"), ("clip.mkv", "libx264"), ("clip.webm", "libvpx-vp9")]
)
def test_fps_samples_by_time_if_the_frame_rate_varies(file, codec, processor, tmp_path):
    """10 frames in the first second, then none for two seconds: the last frame stays visible."""
    path = write_video(tmp_path / file, codec, count=len(TIMES), times=TIMES)
    assert frames_of(processor, path, fps=1) == [0, 9, 9]
    assert frames_of(processor, path, num_frames=4) == [0, 2, 5, 8]


def test_an_animation_with_uneven_frame_durations_is_sampled_by_time(processor, tmp_path):
    path = write_animation(tmp_path / "clip.webp", 8, [100] * 7 + [3300])
    assert frames_of(processor, path, fps=1) == [0, 7, 7, 7]


def test_a_wrong_frame_count_in_the_header_is_corrected(processor, tmp_path):
    path = write_video(tmp_path / "clip.avi", "mpeg4")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 40
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    count = len(frames_of(processor, path, do_sample_frames=False))
    assert 4 < count < 40
    assert frames_of(processor, path, num_frames=4) == [index * count // 4 for index in range(4)]


def test_a_video_url_is_read(processor, clip):
    content = base64.b64encode(clip.read_bytes()).decode()
    for video in (clip.as_uri(), f"data:video/mp4;base64,{content}"):
        assert frames_of(processor, video, num_frames=4) == [0, 10, 20, 30]


UNREADABLE = [
    ("nowhere.mp4", FileNotFoundError, r"video\[0\] \(nowhere.mp4\): no such video"),
    ("s3://bucket/clip.mp4", FileNotFoundError, "expected a URL with http, https, file or data"),
    ("A" * 100_000, FileNotFoundError, "no such video"),
    ("data:video/mp4;base64," + "A" * 100_001, ValueError, "cannot be read"),
    ("data:video/mp4;base64," + "A" * 100_000, ValueError, "cannot be opened as a video"),
    ("http://127.0.0.1:9/clip.mp4", ValueError, "cannot be read: .*refused"),
    (b"clip", TypeError, r"video\[0\]: expected a path, a URL, or a sequence of frames, got bytes"),
    (3.0, TypeError, "expected a path, a URL, or a sequence of frames, got float"),
    (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "the video has no frames"),
]


@pytest.mark.parametrize(("video", "error", "message"), UNREADABLE, ids=range(len(UNREADABLE)))
def test_an_unreadable_video_raises_a_short_message_with_its_name(video, error, message, processor):
    with pytest.raises(error, match=message) as caught:
        processor(text=PROMPT, videos=[video])
    assert len(str(caught.value)) < 600


def test_an_audio_file_raises(processor, tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound.wav\): cannot be opened as a video: the file has no video stream"):
        processor(text=PROMPT, videos=tmp_path / "sound.wav")


def without_pyav(original):
    def imports(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    return imports


def test_a_video_file_without_pyav_raises_with_the_install_command(processor, clip, monkeypatch):
    monkeypatch.setattr(builtins, "__import__", without_pyav(builtins.__import__))
    with pytest.raises(ImportError, match=r"clip.mp4\): video files need PyAV: pip install av, or pass the frames"):
        processor(text=PROMPT, videos=clip)


# Prompts and messages


def test_a_message_accepts_a_video_in_every_form(processor, clip, tmp_path):
    frames = [Image.fromarray(image) for image in grey_images(3)]
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for frame, path in zip(frames, paths, strict=True):
        frame.save(path)
    forms = [{"video": frames}, {"video": np.stack(grey_images(3))}, {"video": [str(path) for path in paths]}]
    files = [{"path": str(clip)}, {"url": clip.as_uri()}, {"video": str(clip)}, {"url": str(clip)}]
    for form, expected in [
        *((form, [0, 1, 2]) for form in forms),
        *((video_file, [0, 13, 26]) for video_file in files),
    ]:
        content = [{"type": "video", **form}, {"type": "text", "text": "Why?"}]
        options = {"num_frames": 3, "do_normalize": False, "return_tensors": "pt"}
        batch = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, **options
        )
        assert (batch["pixel_values"].mean((1, 2, 3)) * 255 / STEP).round().int().tolist() == expected
        lines = "\n".join(f"Frame-{number}: <img>{TILE}</img>" for number in (1, 2, 3))
        prompt = f"{SYSTEM}<|im_start|>user\n{lines}\nWhy?<|im_end|>"
        assert batch["input_ids"].tolist() == [processor.tokenizer(prompt)["input_ids"]]


def test_videos_nested_per_prompt_must_match_each_prompt(processor):
    video = np.stack(grey_images(1))
    assert frames_of(processor, [[video], [video]], ["<video>", "<video>"]) == [0, 0]
    with pytest.raises(ValueError, match=r"1 \+ 1 <video> in the text, 2 \+ 0 videos"):
        processor(text=["<video>", "<video>"], videos=[[video, video], []])


@older_rounds_floats
@given(st.integers(1, 50), st.integers(1, 60), st.floats(0.05, 60), st.floats(0.5, 60))
@settings(max_examples=200, deadline=None)
def test_sampled_frames_match_transformers(processor, total, count, fps, rate):
    video, known = np.zeros((total, 2, 2, 3), np.uint8), {"fps": rate}
    for options in ({"num_frames": count}, {"fps": fps}):
        ours = processor(
            text=PROMPT, videos=video, video_metadata=known, return_metadata=True, size=14,
            input_data_format="channels_last", **options,
        )["video_metadata"][0].frames_indices  # fmt: skip
        expected_count = count if "num_frames" in options else max(1, int(total / rate * fps))
        nearly = abs(total / rate * fps - round(total / rate * fps)) < 1e-5  # an integer up to rounding
        if expected_count >= total:
            assert ours == list(range(total))
        elif "num_frames" in options or not nearly:
            assert ours == list(default_sample_indices_fn(VideoMetadata(total, fps=rate), **options))
