# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Images and videos as data sets store them -> images and videos as SAILVLProcessor takes them.

Files are looked up, encoded images in memory are opened; no pixels are decoded.
"""

import base64
import io
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from stat import S_ISREG
from typing import Any
from urllib.parse import urlparse
from urllib.request import DataHandler, Request, url2pathname

from PIL import Image

from ..video_sailvl import FRAME_SUFFIXES


LONGEST_PATH = 4096  # PATH_MAX of Linux: a longer string can only be base64
REMOTE_SCHEMES = ("http://", "https://")
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<", b"v=0")  # the beginnings of HLS, concat, DASH and IMF, SDP


class BadSample(ValueError):  # noqa: N818
    """A sample that cannot be used. The message is the reason; the sample is skipped, never replaced."""


@dataclass(frozen=True)
class ImageRoot:
    """
    The folder of the images and videos of a data set.

    Attributes:
        path: The folder that relative paths are joined to; None if there is none.
        allow_outside: Accept files outside of the folder.
    """

    path: Path | None
    allow_outside: bool = False

    @cached_property
    def _resolved(self) -> Path:
        return Path(self.path).resolve()

    def find(self, path: str, name: str) -> str:
        """
        Return the path of a file, joined to the folder; symbolic links are not replaced, so that it keeps its suffix.

        Args:
            path: A path, or a URL with the scheme file.
            name: Name of the image or video in error messages.

        Raises:
            BadSample: There is no such file, it is empty, or it is outside of the folder, by way of `..`, a symbolic
                link or an absolute path.
        """
        shown = shorten(path)
        if self.path is None and not self.allow_outside:
            raise BadSample(f"{name}: {shown}: a path needs image_root, or allow_outside: true")
        try:
            joined = Path(self.path or "") / _local_path(path)
            is_inside = self.allow_outside or joined.resolve().is_relative_to(self._resolved)
            status = joined.stat() if is_inside else None
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
            reason = getattr(error, "strerror", None) or error
            raise BadSample(f"{name}: {shown} in {self.path}: {reason}") from error
        if status is None:
            raise BadSample(
                f"{name}: {shown} is outside of image_root {self.path}: move it, or set allow_outside: true"
            )
        if not (S_ISREG(status.st_mode) and status.st_size):
            raise BadSample(
                f"{name}: {shown} in {self.path}: {'an empty' if S_ISREG(status.st_mode) else 'not a'} file"
            )
        return str(joined)


def load_image(image: Any, name: str, root: ImageRoot) -> str | Image.Image:
    """
    Return an image as the processor takes it: the path of a file, an http or https URL, or a PIL image.

    Args:
        image: A path, a URL (http, https, file, data), the file in base64 or as bytes, a dict with one of these as
            `bytes`, `path` or `url`, as Arrow stores images, or a PIL image.
        name: Name of the image in error messages.
        root: Where paths are looked up.

    Raises:
        BadSample: There is no such file, or it is outside of the root; bytes are not an image.
    """
    image = _unwrap(image, name)
    if isinstance(image, Image.Image):
        return _check_size(image, name)
    if isinstance(image, bytes):
        return open_lazily(image, name)
    if not isinstance(image, str):
        raise BadSample(f"{name}: expected a path, a URL, base64, bytes or a PIL image, got {type(image).__name__}")
    scheme = _scheme(image, name)
    if scheme in REMOTE_SCHEMES:
        return image
    if scheme == "data:":
        return open_lazily(_read_data_url(image, name), name)
    return _find_or_decode(image, name, root)


def load_video(video: Any, name: str, root: ImageRoot, num_frames: int | None = None) -> str | list[Any]:
    """
    Return a video as the processor takes it: a path or URL of a file, or a list of frames, images as of `load_image`.

    Args:
        video: As in `load_image`, but base64 as a data URL only; or a list of frames.
        name: Name of the video in error messages.
        root: Where paths are looked up.
        num_frames: Take at most this many frames of a list, evenly spaced.

    Raises:
        BadSample: There is no such file, or it is outside of the root; there are no frames, or one is not an image.
    """
    video = _unwrap(video, name)
    if isinstance(video, (list, tuple)):
        return _load_frames(video, name, root, num_frames)
    if isinstance(video, Image.Image):
        return [_check_size(video, name)]
    if isinstance(video, bytes) and video:
        return "data:application/octet-stream;base64," + base64.b64encode(video).decode()
    if not isinstance(video, str):
        raise BadSample(f"{name}: expected a path, a URL, bytes or a list of frames, got {_type_name(video)}")
    if _scheme(video, name) in (*REMOTE_SCHEMES, "data:"):
        return video
    if len(video) > LONGEST_PATH:
        raise BadSample(
            f"{name}: expected a path or URL, got {len(video)} characters: base64 is data:video/mp4;base64,..."
        )
    path = root.find(video, name)
    if not root.allow_outside and _is_playlist(path):
        raise BadSample(f"{name}: {shorten(video)} is a list of other files: give a video file, or allow_outside: true")
    return path


def _is_playlist(path: str) -> bool:
    """Return whether FFmpeg would read a file as a list of other files, which may be outside of the root."""
    with open(path, "rb") as file:  # noqa: PTH123
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(PLAYLISTS)


def _load_frames(frames: list[Any], name: str, root: ImageRoot, num_frames: int | None) -> list[Any]:
    total = len(frames)
    count = min(total, num_frames or total)
    if not count:
        raise BadSample(f"{name}: the video has no frames")
    indices = [index * total // count for index in range(count)]  # those of the processor
    return [load_image(frames[index], f"{name}, frame {index}", root) for index in indices]


def group_videos(videos: Any) -> list[Any]:
    """Return a list of videos, from one video, a list of videos, or the frames of one video."""
    if not isinstance(videos, (list, tuple)):
        return [videos]
    is_frames = len(videos) > 0 and all(map(_is_frame, videos))
    return [videos] if is_frames else list(videos)


def _is_frame(entry: Any) -> bool:
    """Return whether an entry is a still image, by its suffix."""
    if isinstance(entry, Mapping):
        entry = entry.get("path") or entry.get("url")
    if not isinstance(entry, str):
        return isinstance(entry, Image.Image)
    if entry[:11].lower() == "data:image/":
        return not entry[11:].lower().startswith("gif")
    path = entry.split("?")[0] if entry.lower().startswith(REMOTE_SCHEMES) else entry
    return path.lower().endswith(FRAME_SUFFIXES)


def open_lazily(source: bytes | str | Path, name: str) -> Image.Image:
    """
    Open an image, or the path of one, without decoding its pixels.

    Raises:
        BadSample: Pillow does not recognise an image, it is empty, or it is so large that Pillow suspects a
            decompression bomb.
    """
    what = f"these {len(source)} bytes" if isinstance(source, bytes) else shorten(str(source))
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, once per image
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except bombs as error:
        raise BadSample(f"{name}: {what}: {error}") from error
    except Exception as error:  # the plugins of Pillow raise nearly anything on a broken file
        raise BadSample(f"{name}: {what}: not an image that Pillow can read") from error
    return _check_size(image, name)


def _check_size(image: Image.Image, name: str) -> Image.Image:
    if not (image.width and image.height):
        raise BadSample(f"{name}: the image is empty: {image.width} x {image.height} pixels")
    return image


def _unwrap(media: Any, name: str) -> Any:
    """Return the content of a dict as Arrow stores it, bytes of any type as `bytes`, a Path as a string."""
    if isinstance(media, Mapping):
        found = [media[key] for key in ("bytes", "path", "url") if media.get(key) is not None]
        if not found:
            raise BadSample(f"{name}: expected a dict with bytes, path or url, got the keys {list_keys(media)}")
        media = found[0]
    if isinstance(media, (bytearray, memoryview)):
        return bytes(media)
    return fspath(media) if isinstance(media, PathLike) else media


def _scheme(text: str, name: str) -> str:
    """Return the scheme of a URL, in lower case, with its colon and slashes; "" for anything that is not a URL."""
    start = text[:8].lower()
    for scheme in (*REMOTE_SCHEMES, "data:", "file:"):
        if start.startswith(scheme):
            return scheme
    if "://" in text[:20]:
        raise BadSample(f"{name}: expected a URL with http, https, file or data, got {shorten(text)}")
    return ""


def _local_path(path: str) -> str:
    return url2pathname(urlparse(path).path) if path[:5].lower() == "file:" else path


def _read_data_url(url: str, name: str) -> bytes:
    try:
        return DataHandler().data_open(Request(url)).read()
    except (OSError, ValueError) as error:
        raise BadSample(f"{name}: {shorten(url)} is not a data URL: {error}") from error


def _find_or_decode(text: str, name: str, root: ImageRoot) -> str | Image.Image:
    """Return the path of a file if there is one with this name, else open the string as base64."""
    if len(text) > LONGEST_PATH:
        return open_lazily(_decode_base64(text, name), name)
    try:
        return root.find(text, name)
    except BadSample:
        with suppress(BadSample):
            return open_lazily(_decode_base64(text, name), name)
        raise


def _decode_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise BadSample(f"{name}: {shorten(text)} is neither a path nor base64: {error}") from error


def _type_name(value: Any) -> str:
    return "empty bytes" if value == b"" else type(value).__name__


def list_keys(record: Mapping[Any, Any]) -> str:
    """Return the keys of a record for an error message."""
    return shorten(", ".join(map(str, record)), 200) if record else "none"


def shorten(text: str, limit: int = 120) -> str:
    """Return a string in one line of printable characters, at most `limit` and a few, for an error message."""
    short = text if len(text) <= limit else f"{text[: limit - 23]}...{text[-20:]}"
    return repr(short)
