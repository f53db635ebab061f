# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Video decoding and frame sampling for SAIL-VL.

    a file, a URL, an animated image -> decoded from the first frame -> sampled frames
    frames in memory                 -> all frames, or sampled frames

PyAV decodes video files, Pillow animated images (GIF, WebP, APNG, AVIF). PyAV is imported only when it is needed.
"""

import difflib
import http.client
import io
import math
import urllib.request
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypedDict
from urllib.parse import urlparse

import numpy as np
from PIL import Image, ImageSequence
from transformers.video_utils import VideoMetadata


NUM_FRAMES = 8  # sampled from a video file by default
FRAME_SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ANIMATED_SUFFIXES = (".avif", ".png", ".webp")  # formats whose files may be still or animated images
ANIMATED_FORMATS = ("AVIF", "FLI", "GIF", "PNG", "WEBP")
ANIMATED_DATA_URLS = (
    "data:image/apng",
    "data:image/avif",
    "data:image/png",
    "data:image/webp",
)  # the same, as data URLs


class SAILVLVideosKwargs(TypedDict, total=False):
    """Options of frame sampling; SAILVLProcessor.__call__ documents them."""

    do_sample_frames: bool | None
    num_frames: int | None
    fps: float | None
    video_metadata: Any
    return_metadata: bool | None


class Frames(list):
    """The frames of one video: images, or their paths or URLs."""


class Clip(NamedTuple):
    """The sampled frames of a video, of any type that the image processor takes, and the metadata of the video."""

    frames: list[Any]
    metadata: VideoMetadata


def flatten_videos(videos: Any) -> list[Any]:
    """Flatten nested lists of videos, as returned by `group_frames`; None is an empty list."""
    if videos is None:
        return []
    if isinstance(videos, Frames) or not isinstance(videos, (list, tuple)):
        return list(videos) if getattr(videos, "ndim", 0) == 5 else [videos]
    return [video for entry in videos for video in flatten_videos(entry)]


def group_frames(videos: Any) -> Any:
    """
    Replace every list of images in nested lists of videos by `Frames`, one video.

    A path or URL that is not in a list is a video, a still image a video of one frame. A list is one video if all its
    entries are still images, else a list of videos; files that may be animated by their suffix are opened to decide.
    """
    if isinstance(videos, (list, tuple)):
        is_video = len(videos) > 0 and all(map(_is_frame, videos))
        return Frames(videos) if is_video else [group_frames(entry) for entry in videos]
    return videos if isinstance(videos, (str, Path)) or not _is_frame(videos) else Frames([videos])


def _is_frame(entry: Any) -> bool:
    """Return whether an entry is a still image or the path or URL of one; an animated image is a video."""
    if not isinstance(entry, (str, Path)):
        return isinstance(entry, Image.Image) or getattr(entry, "ndim", 0) in (2, 3)
    if (text := str(entry)).startswith("data:"):
        may_be_animated = text.startswith(ANIMATED_DATA_URLS)
        is_image = text.startswith("data:image/") and not text.startswith("data:image/gif")
    else:
        suffix = Path(urlparse(text).path if "://" in text else text).suffix.lower()
        may_be_animated, is_image = suffix in ANIMATED_SUFFIXES, suffix in FRAME_SUFFIXES
    return is_image and not (may_be_animated and _is_animated(text))


def _is_animated(source: str) -> bool:
    try:
        with Image.open(_open_source(source, "video")) as image:
            return _count_frames(image) > 1
    except (OSError, ValueError, Image.DecompressionBombError):  # unreadable: the image processor raises the error
        return False


def _count_frames(image: Image.Image) -> int:
    """Return the number of frames of an animation, else 1: the pages of a TIFF or the views of an MPO are no video."""
    return getattr(image, "n_frames", 1) if image.format in ANIMATED_FORMATS else 1


def check_video_options(options: Mapping[str, Any]) -> SimpleNamespace:
    """
    Validate the options of SAILVLVideosKwargs and return them as a namespace.

    Args:
        options: Every option of SAILVLVideosKwargs.

    Raises:
        ValueError: A value is out of range, or both num_frames and fps are given.
    """
    checked = SimpleNamespace(**options)
    count, fps = checked.num_frames, checked.fps
    if count is not None and (not isinstance(count, Integral) or isinstance(count, bool) or count < 1):
        raise ValueError(f"num_frames must be a positive integer, got {count!r}")
    if fps is not None and not _is_rate(fps):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    for switch in ("do_sample_frames", "return_metadata"):
        if not isinstance(options[switch], (bool, np.bool_, type(None))):
            raise ValueError(f"{switch} must be True or False, got {str(options[switch])[:80]!r}")
    if count is not None and fps is not None:
        raise ValueError(f"num_frames={count} and fps={fps} exclude each other: pass one of them")
    checked.num_frames = None if count is None else int(count)
    return checked


def _is_rate(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < value < math.inf


def read_clips(videos: Sequence[Any], options: SimpleNamespace) -> list[Clip]:
    """
    Read videos and sample their frames.

    Args:
        videos: A list from `flatten_videos`, applied after `group_frames`.
        options: A namespace from `check_video_options`.

    Raises:
        ValueError: A video cannot be decoded; `fps` needs a frame rate that is unknown; video_metadata does not fit.
        FileNotFoundError: A file does not exist.
        ImportError: A video file is given and PyAV is not installed.
        TypeError: A video is neither a file nor frames, or video_metadata has an unknown field.
    """
    metadata = _flatten_metadata(options.video_metadata) or [None] * len(videos)
    if len(metadata) != len(videos):
        raise ValueError(f"expected one video_metadata for each of {len(videos)} videos, got {len(metadata)}")
    return [
        _read_clip(video, f"video[{index}]", options, _checked_metadata(given or {}, f"video_metadata[{index}]"))
        for index, (video, given) in enumerate(zip(videos, metadata, strict=True))
    ]


def count_frames(video: Any, options: SimpleNamespace) -> int:
    """
    Return the number of frames that `read_clips` samples from a video without video_metadata.

    A file is decoded only if its header does not suffice. Errors are those of `read_clips`.
    """
    if isinstance(video, (str, Path)) and options.do_sample_frames is not False:
        name = f"video ({str(video)[:120]})"
        indices = _sample_by_header(_open_file(video, name), name, options)
        if indices is not None:
            return len(indices)
    return len(_read_clip(video, "video", options, {}).frames)


def _flatten_metadata(metadata: Any) -> list[Any]:
    """Flatten nested lists of metadata, keeping None entries."""
    if isinstance(metadata, (list, tuple)):
        return [flat for entry in metadata for flat in ([None] if entry is None else _flatten_metadata(entry))]
    if metadata is not None and not isinstance(metadata, Mapping):
        got = type(metadata).__name__
        raise TypeError(f"video_metadata must be a VideoMetadata, a dict or a list of them, got {got}")
    return [] if metadata is None else [metadata]


def _checked_metadata(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    names = [field.name for field in fields(VideoMetadata)]
    for key in given:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(names)}"
            raise TypeError(f"{name} has no field {str(key)[:80]!r}; {hint}")
    if (fps := given.get("fps")) is not None and not _is_rate(fps):
        raise ValueError(f"{name}: fps must be a positive number, or None if unknown, got {str(fps)[:80]!r}")
    return dict(given)


def _read_clip(video: Any, name: str, options: SimpleNamespace, given: dict[str, Any]) -> Clip:
    """Read a video file, or sample frames in memory; `given` is the video_metadata of the call."""
    if isinstance(video, (str, Path)):
        name = f"{name} ({str(video)[:120]})"
        return _read_file(_open_file(video, name), name, options, given)
    if isinstance(video, (bytes, bytearray, Mapping)) or not hasattr(video, "__getitem__"):
        raise TypeError(f"{name}: expected a path, a URL, or a sequence of frames, got {type(video).__name__}")
    if not len(video):
        raise ValueError(f"{name}: the video has no frames")
    metadata = VideoMetadata(**{"total_num_frames": len(video), **given})
    indices = list(range(len(video)))
    numbers = indices if metadata.frames_indices is None else list(metadata.frames_indices)  # in the original video
    if options.do_sample_frames or (options.do_sample_frames is None and (options.num_frames or options.fps)):
        total = metadata.total_num_frames
        if len(numbers) != len(video) or (options.fps and metadata.frames_indices is None and total != len(video)):
            raise ValueError(
                f"{name}: got {len(video)} frames, but video_metadata describes {total} frames, with "
                f"{len(numbers)} frames_indices: pass frames_indices of these frames, or do_sample_frames=False"
            )
        indices = _sample(_Timestamps.at_rate(numbers, metadata.fps, total), name, options)
    metadata.frames_indices = [int(numbers[index]) for index in indices] if len(numbers) == len(video) else numbers
    return Clip([video[index] for index in indices], metadata)


class _Timestamps(NamedTuple):
    """Start of every frame, end of the last frame, and resolution of these times, in seconds."""

    starts: Sequence[float]
    end: float
    tick: float = 0.0

    @classmethod
    def at_rate(cls, frames: Sequence[int], fps: float | None, total: int) -> "_Timestamps":
        """Return the times of frames with these numbers in a video of `total` frames; all 0 if `fps` is unknown."""
        return cls([frame / (fps or math.inf) for frame in frames], total / (fps or math.inf))


def _sample(times: _Timestamps, name: str, options: SimpleNamespace) -> list[int]:
    """Return the indices of the sampled frames: those of transformers, but by time if the frame rate varies."""
    total, length = len(times.starts), times.end - times.starts[0]
    if options.fps is None or total == 1:
        return _spread_evenly(total, options.num_frames or NUM_FRAMES)
    if length <= 0:
        hint = 'pass video_metadata={"fps": ...}'
        raise ValueError(f"{name}: fps={options.fps} needs the frame rate of the video: {hint}")
    count = max(1, math.floor(length * options.fps + 1e-6))
    step = (times.starts[-1] - times.starts[0]) / (total - 1)
    tolerance = min(times.tick, step / 4) + 1e-6
    delays = [start - times.starts[0] - index * step for index, start in enumerate([*times.starts, times.end])]
    if count >= total or max(map(abs, delays)) <= tolerance:
        return _spread_evenly(total, count)
    moments = [times.starts[0] + index * length / count + tolerance / 2 for index in range(count)]
    return [bisect_right(times.starts, moment) - 1 for moment in moments]


def _spread_evenly(total: int, count: int) -> list[int]:
    count = min(total, count)
    return [index * total // count for index in range(count)]


class _DecodedFrame(NamedTuple):
    """Start and duration of a frame in seconds (0 if unknown), and a function that converts it to an image."""

    start: float
    duration: float
    to_image: Callable[[], Image.Image]


class _VideoFile(NamedTuple):
    """
    A video file or an animated image.

    Attributes:
        decode: Return an iterator over all frames, from the first one, on every call.
        num_frames, fps: According to the file header; 0 if unknown.
        tick: Time base of the file, in seconds.
        backend: The decoding library, "pyav" or "pillow".
    """

    decode: Callable[[], Iterator[_DecodedFrame]]
    num_frames: int
    fps: float
    tick: float
    backend: str


def _read_file(file: _VideoFile, name: str, options: SimpleNamespace, given: dict[str, Any]) -> Clip:
    """
    Decode the frames that the file header suggests, and count all frames meanwhile.

    A second pass is needed only if the header is missing or wrong.
    """
    fps = given.get("fps")

    def sample(times: _Timestamps) -> list[int]:
        total = len(times.starts)
        if options.do_sample_frames is False:
            return list(range(total))
        return _sample(_Timestamps.at_rate(range(total), fps, total) if fps else times, name, options)

    expected = _sample_by_header(file, name, options, fps) or ()
    times, images = _decode(file, set(expected), name)
    indices = sample(times)
    if not images.keys() >= set(indices):
        _, images = _decode(file, set(indices), name)
    total, first = len(times.starts), images[indices[0]]
    found = {"total_num_frames": total, "fps": fps or (total / times.end if times.end > 0 else None)}
    found |= {"width": first.width, "height": first.height, "video_backend": file.backend}
    found["duration"] = total / found["fps"] if found["fps"] else None
    metadata = VideoMetadata(**{**found, **given, "frames_indices": indices})
    return Clip([images[index] for index in indices], metadata)


def _sample_by_header(
    file: _VideoFile, name: str, options: SimpleNamespace, fps: float | None = None
) -> list[int] | None:
    """Return the indices of the sampled frames according to the file header; None if it does not suffice."""
    total = file.num_frames
    if not total or not (file.fps or fps or options.fps is None):
        return None
    if options.do_sample_frames is False:
        return list(range(total))
    return _sample(_Timestamps.at_rate(range(total), fps or file.fps, total), name, options)


def _decode(file: _VideoFile, indices: set[int], name: str) -> tuple[_Timestamps, dict[int, Image.Image]]:
    """Decode a file once; return the times of all frames, and the images of the frames at `indices`."""
    starts, duration, images = [], 0.0, {}
    try:
        for index, frame in enumerate(file.decode()):
            starts.append(frame.start)
            duration = frame.duration
            if index in indices:
                images[index] = frame.to_image()
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise ValueError(f"{name}: cannot be decoded: {str(error)[:300]}") from error
    if not starts:
        raise ValueError(f"{name}: the video has no frames")
    count, begin = len(starts), min(starts)
    starts = sorted(start - begin for start in starts)
    if not duration:
        duration = starts[-1] / (count - 1) if count > 1 else 1 / (file.fps or math.inf)
    end = starts[-1] + duration
    if file.fps and abs(end * file.fps / count - 1) < 0.01:  # the times are rounded, the frame rate is exact
        end = count / file.fps
    return _Timestamps(starts, end, file.tick), images


def _open_file(video: str | Path, name: str) -> _VideoFile:
    source = _open_source(str(video), name)
    return _open_animation(source) or _open_video(source, name)


def _open_source(video: str, name: str) -> str | io.BytesIO:
    """Return the path of a local file (path or file URL), or the content of an http, https or data URL."""
    if not video.startswith(("http://", "https://", "data:")):
        path = _local_path(video)
        try:
            if Path(path).is_file():
                return path
        except (OSError, ValueError):  # an invalid path: too long, or with a null byte
            pass
        hint = ": expected a URL with http, https, file or data" if "://" in video else ""
        raise FileNotFoundError(f"{name}: no such video{hint}")
    try:
        request = urllib.request.Request(video, headers={"User-Agent": "sailvit"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return io.BytesIO(response.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"{name}: cannot be read: {str(error)[:300]}") from error


def _local_path(path: str) -> str:
    return urllib.request.url2pathname(urlparse(path).path) if path.startswith("file:/") else path


def _rewind(source: str | io.BytesIO) -> str | io.BytesIO:
    if isinstance(source, io.BytesIO):
        source.seek(0)
    return source


def _open_animation(source: str | io.BytesIO) -> _VideoFile | None:
    """Open an image with Pillow (GIF, WebP, APNG, AVIF, ...); None if Pillow cannot decode the file."""
    try:
        with Image.open(_rewind(source)) as image:
            # an APNG may begin with a fallback image that is not part of the animation
            skipped = int(image.info.get("default_image", False))
            num_frames = _count_frames(image) - skipped
            if image.format == "MPEG":  # Pillow identifies MPEG files, but does not decode them
                return None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{str(source)[:120]}: {error}") from error
    except Exception:  # Pillow's plugins raise nearly anything on a file that they do not know
        return None

    def decode() -> Iterator[_DecodedFrame]:
        start = 0.0  # in milliseconds
        with Image.open(_rewind(source)) as image:
            for index, frame in enumerate(islice(ImageSequence.Iterator(image), skipped + num_frames)):
                if index >= skipped:
                    frame.load()
                    duration = frame.info.get("duration", 0)
                    yield _DecodedFrame(start / 1000, duration / 1000, frame.copy)
                    start += duration

    return _VideoFile(decode, num_frames, 0.0, 0.001, "pillow")


def _open_video(source: str | io.BytesIO, name: str) -> _VideoFile:
    """Open a video file with PyAV."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{name}: video files need PyAV: pip install av, or pass the frames as images") from error
    try:
        with av.open(_rewind(source)) as container:
            streams = container.streams.video
            if not streams:
                raise ValueError("the file has no video stream")
            num_frames, fps, tick = streams[0].frames, float(streams[0].average_rate or 0), streams[0].time_base
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise ValueError(f"{name}: cannot be opened as a video: {str(error)[:300]}") from error

    def decode() -> Iterator[_DecodedFrame]:
        with av.open(_rewind(source)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for index, frame in enumerate(container.decode(stream)):
                start = index / (fps or 1) if frame.pts is None else frame.pts * tick
                duration = (getattr(frame, "duration", 0) or 0) * tick
                yield _DecodedFrame(float(start), float(duration), frame.to_image)

    return _VideoFile(decode, num_frames, fps, float(tick), "pyav")


__all__ = [
    "Clip",
    "Frames",
    "SAILVLVideosKwargs",
    "check_video_options",
    "count_frames",
    "flatten_videos",
    "group_frames",
    "read_clips",
]
