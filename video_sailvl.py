# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Videos in, the frames that SAIL-VL reads out.

    a file, a URL, an animated image -> decoded from its beginning -> some of its frames
    frames in memory                 -> all of them, or some

Files are read by PyAV, animated images (GIF, WebP, APNG, AVIF) by Pillow. PyAV is imported when it is needed alone.
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


NUM_FRAMES = 8  # taken from a video file, unless a call says otherwise
FRAME_SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ANIMATED_SUFFIXES = (".avif", ".png", ".webp")  # of these some files are one picture, and some are a video
ANIMATED_FORMATS = ("AVIF", "FLI", "GIF", "PNG", "WEBP")
MOVING_TYPES = ("data:image/apng", "data:image/avif", "data:image/png", "data:image/webp")  # likewise, as data URLs


class SAILVLVideosKwargs(TypedDict, total=False):
    """How frames are taken from a video."""

    do_sample_frames: bool | None
    num_frames: int | None
    fps: float | None
    video_metadata: Any
    return_metadata: bool | None


class Frames(list):
    """The frames of one video: pictures, or their paths or URLs."""


class Clip(NamedTuple):
    """The frames taken of a video, as anything the image processor takes, and what is known of it."""

    frames: list[Any]
    metadata: VideoMetadata


def flat_videos(videos: Any) -> list[Any]:
    """Nested lists of videos, as `group_frames` gives them, None among them -> a list."""
    if videos is None:
        return []
    if isinstance(videos, Frames) or not isinstance(videos, (list, tuple)):
        return list(videos) if getattr(videos, "ndim", 0) == 5 else [videos]
    return [video for own in videos for video in flat_videos(own)]


def group_frames(videos: Any) -> Any:
    """
    Videos in any nesting -> the same, with `Frames` for every list of pictures, which is one video. A path or URL by
    itself is opened as a video, which a picture is, too, of one frame. In a list it is a frame if all of the list are
    pictures; one that may be an animated image by its name is read to tell.
    """
    if isinstance(videos, (list, tuple)):
        is_video = len(videos) > 0 and all(map(_is_frame, videos))
        return Frames(videos) if is_video else [group_frames(own) for own in videos]
    return videos if isinstance(videos, (str, Path)) or not _is_frame(videos) else Frames([videos])


def _is_frame(entry: Any) -> bool:
    """A picture, or the path or URL of one; an animated image is a video of its own."""
    if not isinstance(entry, (str, Path)):
        return isinstance(entry, Image.Image) or getattr(entry, "ndim", 0) in (2, 3)
    if (text := str(entry)).startswith("data:"):
        may_move = text.startswith(MOVING_TYPES)
        is_picture = text.startswith("data:image/") and not text.startswith("data:image/gif")
    else:
        suffix = Path(urlparse(text).path if "://" in text else text).suffix.lower()
        may_move, is_picture = suffix in ANIMATED_SUFFIXES, suffix in FRAME_SUFFIXES
    return is_picture and not (may_move and _is_animated(text))


def _is_animated(source: str) -> bool:
    try:
        with Image.open(_open_source(source, "video")) as image:
            return _count_frames(image) > 1
    except (OSError, ValueError, Image.DecompressionBombError):  # cannot be read: the image processor will say so
        return False


def _count_frames(image: Image.Image) -> int:
    """1 of a picture, and of a file of several that are no animation: the pages of a TIFF, the views of a JPEG."""
    return getattr(image, "n_frames", 1) if image.format in ANIMATED_FORMATS else 1


def check_sampling(options: Mapping[str, Any]) -> SimpleNamespace:
    """
    The options of SAILVLVideosKwargs, all of them, by their names.

    Raises:
        ValueError: A value is out of its range, or both num_frames and fps are given.
    """
    chosen = SimpleNamespace(**options)
    count, fps = chosen.num_frames, chosen.fps
    if count is not None and (not isinstance(count, Integral) or isinstance(count, bool) or count < 1):
        raise ValueError(f"num_frames must be a positive integer, got {count!r}")
    if fps is not None and not _is_rate(fps):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    for switch in ("do_sample_frames", "return_metadata"):
        if not isinstance(options[switch], (bool, np.bool_, type(None))):
            raise ValueError(f"{switch} must be True or False, got {str(options[switch])[:80]!r}")
    if count is not None and fps is not None:
        raise ValueError(f"num_frames={count} and fps={fps} exclude each other: give one of them")
    chosen.num_frames = None if count is None else int(count)
    return chosen


def _is_rate(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < value < math.inf


def read_clips(videos: Sequence[Any], options: SimpleNamespace) -> list[Clip]:
    """
    Args:
        videos: As `flat_videos` gives them of what `group_frames` gives.
        options: As `check_sampling` gives them.

    Raises:
        ValueError: A video cannot be decoded, or has no known rate where `fps` needs one; video_metadata does not fit.
        FileNotFoundError: There is no such file.
        ImportError: A video file is given, and PyAV is not installed.
        TypeError: A video is neither a file nor frames, or a field of video_metadata does not exist.
    """
    known = _flat_metadata(options.video_metadata) or [None] * len(videos)
    if len(known) != len(videos):
        raise ValueError(f"expected a video_metadata for each of {len(videos)} videos, got {len(known)}")
    return [
        _read_clip(video, f"video[{index}]", options, _checked_metadata(own or {}, f"video_metadata[{index}]"))
        for index, (video, own) in enumerate(zip(videos, known, strict=True))
    ]


def _flat_metadata(known: Any) -> list[Any]:
    """One or nested lists of them, None among them -> a list."""
    if isinstance(known, (list, tuple)):
        return [entry for own in known for entry in ([None] if own is None else _flat_metadata(own))]
    if known is not None and not isinstance(known, Mapping):
        raise TypeError(f"video_metadata must be a VideoMetadata, a dict or a list of them, got {type(known).__name__}")
    return [] if known is None else [known]


def _checked_metadata(known: Mapping[str, Any], name: str) -> dict[str, Any]:
    names = [field.name for field in fields(VideoMetadata)]
    for key in known:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(names)}"
            raise TypeError(f"{name} has no field {str(key)[:80]!r}; {hint}")
    if (rate := known.get("fps")) is not None and not _is_rate(rate):
        raise ValueError(f"{name}: fps must be a positive number, or None if it is not known, got {str(rate)[:80]!r}")
    return dict(known)


def _read_clip(video: Any, name: str, options: SimpleNamespace, known: dict[str, Any]) -> Clip:
    if isinstance(video, (str, Path)):
        name = f"{name} ({str(video)[:120]})"
        source = _open_source(str(video), name)
        return _read_film(_open_animation(source) or _open_film(source, name), name, options, known)
    if isinstance(video, (bytes, bytearray, Mapping)) or not hasattr(video, "__getitem__"):
        raise TypeError(f"{name}: expected a path, a URL, or a sequence of frames, got {type(video).__name__}")
    if not len(video):
        raise ValueError(f"{name}: a video without frames")
    metadata = VideoMetadata(**{"total_num_frames": len(video), **known})
    indices = list(range(len(video)))
    places = indices if metadata.frames_indices is None else list(metadata.frames_indices)
    if options.do_sample_frames or (options.do_sample_frames is None and (options.num_frames or options.fps)):
        total = metadata.total_num_frames
        if len(places) != len(video) or (options.fps and metadata.frames_indices is None and total != len(video)):
            raise ValueError(
                f"{name}: {len(video)} frames, but video_metadata is of {total} frames, with the indices of "
                f"{len(places)}: pass the frames_indices of these, or do_sample_frames=False"
            )
        indices = _choose(_Times.at_rate(places, metadata.fps, total), name, options)
    metadata.frames_indices = [int(places[index]) for index in indices] if len(places) == len(video) else places
    return Clip([video[index] for index in indices], metadata)


class _Times(NamedTuple):
    """When the frames of a video are shown, in seconds: each one's start, the last one's end; how exact that is."""

    starts: Sequence[float]
    end: float
    tick: float = 0.0

    @classmethod
    def at_rate(cls, frames: Sequence[int], fps: float | None, total: int) -> "_Times":
        """Frames of the given numbers, of a video of `total` frames at a constant rate, or at an unknown one."""
        return cls([frame / (fps or math.inf) for frame in frames], total / (fps or math.inf))


def _choose(times: _Times, name: str, options: SimpleNamespace) -> list[int]:
    """Which frames are taken: as transformers takes them, and of a video without a constant rate by their time."""
    total, length = len(times.starts), times.end - times.starts[0]
    if options.fps is None or total == 1:
        return _evenly(total, options.num_frames or NUM_FRAMES)
    if length <= 0:
        raise ValueError(f'{name}: fps={options.fps} needs the rate of its frames: pass video_metadata={{"fps": ...}}')
    count = max(1, math.floor(length * options.fps + 1e-6))
    step = (times.starts[-1] - times.starts[0]) / (total - 1)
    slack = min(times.tick, step / 4) + 1e-6
    late = [start - times.starts[0] - index * step for index, start in enumerate([*times.starts, times.end])]
    if count >= total or max(map(abs, late)) <= slack:
        return _evenly(total, count)
    moments = [times.starts[0] + index * length / count + slack / 2 for index in range(count)]
    return [bisect_right(times.starts, moment) - 1 for moment in moments]


def _evenly(total: int, count: int) -> list[int]:
    count = min(total, count)
    return [index * total // count for index in range(count)]


class _Frame(NamedTuple):
    """A decoded frame: when it is shown and how long, in seconds (0 if unknown); what makes an image of it."""

    start: float
    seconds: float
    to_image: Callable[[], Image.Image]


class _Film(NamedTuple):
    """
    A file of frames.

    Attributes:
        decode: Gives its frames from the first one on, each time it is called.
        frames, rate: As the file says; 0 where it does not.
        tick: The unit that it gives times in, in seconds.
        backend: What reads it.
    """

    decode: Callable[[], Iterator[_Frame]]
    frames: int
    rate: float
    tick: float
    backend: str


def _read_film(film: _Film, name: str, options: SimpleNamespace, known: dict[str, Any]) -> Clip:
    """
    The frames are guessed from what the file says of itself, and counted while those are decoded: a second pass is
    needed only where the file was wrong, or says nothing.
    """
    rate = known.get("fps")

    def choose(times: _Times) -> list[int]:
        total = len(times.starts)
        if options.do_sample_frames is False:
            return list(range(total))
        return _choose(_Times.at_rate(range(total), rate, total) if rate else times, name, options)

    is_guess = film.frames and (film.rate or rate or options.fps is None)
    guess = choose(_Times.at_rate(range(film.frames), film.rate, film.frames)) if is_guess else []
    times, images = _decode(film, set(guess), name)
    indices = choose(times)
    if not images.keys() >= set(indices):
        _, images = _decode(film, set(indices), name)
    total, first = len(times.starts), images[indices[0]]
    found = {"total_num_frames": total, "fps": rate or (total / times.end if times.end > 0 else None)}
    found |= {"width": first.width, "height": first.height, "video_backend": film.backend}
    found["duration"] = total / found["fps"] if found["fps"] else None
    metadata = VideoMetadata(**{**found, **known, "frames_indices": indices})
    return Clip([images[index] for index in indices], metadata)


def _decode(film: _Film, wanted: set[int], name: str) -> tuple[_Times, dict[int, Image.Image]]:
    """One pass: when every frame is shown, and those that are wanted, by their index."""
    starts, seconds, images = [], 0.0, {}
    try:
        for index, frame in enumerate(film.decode()):
            starts.append(frame.start)
            seconds = frame.seconds
            if index in wanted:
                images[index] = frame.to_image()
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise ValueError(f"{name}: cannot be decoded: {str(error)[:300]}") from error
    if not starts:
        raise ValueError(f"{name}: a video without frames")
    count, begin = len(starts), min(starts)
    starts = sorted(start - begin for start in starts)
    if not seconds:
        seconds = starts[-1] / (count - 1) if count > 1 else 1 / (film.rate or math.inf)
    end = starts[-1] + seconds
    if film.rate and abs(end * film.rate / count - 1) < 0.01:  # the rate is exact where the times are rounded
        end = count / film.rate
    return _Times(starts, end, film.tick), images


def _open_source(video: str, name: str) -> str | io.BytesIO:
    """A path, or a URL (file, http, https, data) -> a path, or the bytes."""
    if not video.startswith(("http://", "https://", "data:")):
        path = _local_path(video)
        try:
            if Path(path).is_file():
                return path
        except (OSError, ValueError):  # no path at all: too long, or with a zero byte
            pass
        known = "; of URLs http, https, file and data are read" if "://" in video else ""
        raise FileNotFoundError(f"{name}: no such video{known}")
    try:
        request = urllib.request.Request(video, headers={"User-Agent": "sailvit"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return io.BytesIO(response.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"{name}: cannot be read: {str(error)[:300]}") from error


def _local_path(path: str) -> str:
    return urllib.request.url2pathname(urlparse(path).path) if path.startswith("file:/") else path


def _rewound(source: str | io.BytesIO) -> str | io.BytesIO:
    if isinstance(source, io.BytesIO):
        source.seek(0)
    return source


def _open_animation(source: str | io.BytesIO) -> _Film | None:
    """What Pillow reads: GIF, WebP, APNG, AVIF."""
    try:
        with Image.open(_rewound(source)) as image:
            skipped = int(image.info.get("default_image", False))  # of an APNG, for those that do not animate
            frames = _count_frames(image) - skipped
            if image.format == "MPEG":  # which Pillow knows, and does not read
                return None
    except OSError:
        return None

    def decode() -> Iterator[_Frame]:
        start = 0.0  # in milliseconds
        with Image.open(_rewound(source)) as image:
            for index, frame in enumerate(islice(ImageSequence.Iterator(image), skipped + frames)):
                if index >= skipped:
                    frame.load()
                    length = frame.info.get("duration", 0)
                    yield _Frame(start / 1000, length / 1000, frame.copy)
                    start += length

    return _Film(decode, frames, 0.0, 0.001, "pillow")


def _open_film(source: str | io.BytesIO, name: str) -> _Film:
    """What PyAV reads."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{name}: PyAV reads video files: pip install av, or pass the frames as images") from error
    try:
        with av.open(_rewound(source)) as container:
            streams = container.streams.video
            if not streams:
                raise ValueError("it holds no video")
            frames, rate, tick = streams[0].frames, float(streams[0].average_rate or 0), streams[0].time_base
    except Exception as error:  # as above
        raise ValueError(f"{name}: cannot be opened as a video: {str(error)[:300]}") from error

    def decode() -> Iterator[_Frame]:
        with av.open(_rewound(source)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for index, frame in enumerate(container.decode(stream)):
                start = index / (rate or 1) if frame.pts is None else frame.pts * tick
                yield _Frame(float(start), float((getattr(frame, "duration", 0) or 0) * tick), frame.to_image)

    return _Film(decode, frames, rate, float(tick), "pyav")


__all__ = ["Clip", "Frames", "SAILVLVideosKwargs", "check_sampling", "flat_videos", "group_frames", "read_clips"]
