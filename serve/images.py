# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Images of a request, from data: and https: URLs.

The URLs come from clients. transformers opens any path or URL that a message names; here nothing of the server's disk
is read, no address of its network is connected to, and bytes, pixels and time are bounded.

A name is resolved once for a connection, all of its addresses are checked, and the connection is to the address that
was checked: a name server cannot give another one afterwards (DNS rebinding). Redirects are new connections.
Proxies of the environment are not used, since a proxy would resolve the name again.
"""

import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError

from PIL import Image


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # Pillow has more, with less tested decoders
CHUNK = 1 << 16  # bytes


class ImageError(ValueError):
    """An image that a request may not contain, or that is broken."""


@dataclass(frozen=True)
class Limits:
    """
    What the images of one request may have, all together.

    Attributes:
        images: Number of images.
        size: Bytes of files.
        pixels: Pixels, decoded.
        seconds: Time to download them, redirects included.
        allow_private: Whether https: URLs may lead to private, loopback and link-local addresses.
    """

    images: int = 16
    size: int = 64_000_000
    pixels: int = 64_000_000
    seconds: float = 20
    allow_private: bool = False

    def __post_init__(self) -> None:
        most = 2 * (Image.MAX_IMAGE_PIXELS or self.pixels)
        if self.pixels > most:
            raise ValueError(f"--max-pixels: expected at most {most}, the limit of Pillow, got {self.pixels}")


def read_images(urls: Sequence[str], limits: Limits) -> list[Image.Image]:
    """
    Return the images of a request, opened; each is known to decode.

    Args:
        urls: data: or https: URLs, in the order of the request.

    Raises:
        ImageError: A URL is of another scheme or leads to an address that is not public, an image cannot be downloaded
            or decoded, or a limit is exceeded. The message has the number of the image, from 1.
    """
    if len(urls) > limits.images:
        raise ImageError(f"expected at most {limits.images} images in a request, got {len(urls)}")
    images, size, pixels = [], limits.size, limits.pixels
    downloads = _HTTPSHandler(limits.allow_private, time.monotonic() + limits.seconds)
    opener = _opener(downloads)
    for number, url in enumerate(urls, start=1):
        try:
            content = _read_url(url, opener, limits.seconds, size)
            if downloads.is_late():  # the rest may be missing
                raise ImageError(f"not downloaded in {limits.seconds:g} seconds, the limit of all images together")
            image = _open(content, pixels)
        except _BytesError:
            raise ImageError(f"image {number}: expected at most {limits.size} bytes in all images together") from None
        except _PixelsError:
            raise ImageError(
                f"image {number}: expected at most {limits.pixels} pixels in all images together"
            ) from None
        except ImageError as error:
            raise ImageError(f"image {number}: {error}") from error
        size, pixels = size - len(content), pixels - image.width * image.height
        images.append(image)
    return images


class _BytesError(Exception):
    """Too many bytes."""


class _PixelsError(Exception):
    """Too many pixels."""


def _read_url(url: str, opener: urllib.request.OpenerDirector, timeout: float, size: int) -> bytes:
    scheme = url.lstrip()[:8].partition(":")[0].lower()
    if scheme not in ("data", "https"):
        raise ImageError(
            "expected a data: URL (data:image/png;base64,...) or an https: URL; other schemes and paths are not read"
        )
    try:
        with opener.open(url.strip(), timeout=timeout) as response:
            return _read_response(response, size)
    except ImageError:
        raise
    except HTTPError as error:
        raise ImageError(f"cannot be downloaded: HTTP status {error.code}") from error
    except URLError as error:
        if isinstance(error.reason, ImageError):
            raise error.reason from error
        raise ImageError(f"cannot be downloaded: {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        what = "cannot be downloaded" if scheme == "https" else "not a valid data: URL"
        raise ImageError(f"{what}: {str(error)[:200] or type(error).__name__}") from error


def _read_response(response: Any, size: int) -> bytes:
    content = bytearray()
    while chunk := response.read(CHUNK):
        content += chunk
        if len(content) > size:
            raise _BytesError
    return bytes(content)


def _open(content: bytes, pixels: int) -> Image.Image:
    """Open an image without decoding it, after another copy was decoded to find damage."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        image, trial = (Image.open(io.BytesIO(content), formats=formats) for _ in range(2))
        if image.width * image.height > pixels:
            raise _PixelsError
        eighth = max(1, image.width // 8), max(1, image.height // 8)
        trial.draft("RGB", eighth)  # a JPEG is decoded at 1/8 of its size, faster
        trial.load()
    except (Image.DecompressionBombError, _PixelsError):
        raise _PixelsError from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"these {len(content)} bytes are not an image in {', '.join(formats)}") from None
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise ImageError(f"cannot be decoded: {str(error)[:200]}") from error
    return image


# Downloads


def _opener(downloads: "_HTTPSHandler") -> urllib.request.OpenerDirector:
    """Return an opener of data: and https: URLs only. Redirects to other schemes find no handler."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.DataHandler(),
        downloads,
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", "sailvit"), ("Accept", "image/*")]
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects without reading their bodies, which may be endless."""

    def http_error_302(self, request: Any, response: Any, *arguments: Any) -> Any:
        response.close()
        return super().http_error_302(request, response, *arguments)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def __init__(self, allow_private: bool, deadline: float):
        super().__init__()
        self.allow_private, self.deadline, self.is_used = allow_private, deadline, False

    def is_late(self) -> bool:
        """Return whether there was a download, and the deadline is over."""
        return self.is_used and time.monotonic() > self.deadline

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        self.is_used = True
        return self.do_open(self._connection, request)

    def _connection(self, host: str, **options: Any) -> "_CheckedConnection":
        return _CheckedConnection(host, self.allow_private, self.deadline, **options)


class _CheckedConnection(http.client.HTTPSConnection):
    """A connection to an address that was checked, and that is closed at a deadline."""

    def __init__(self, host: str, allow_private: bool, deadline: float, **options: Any):
        self.allow_private, self.deadline = allow_private, deadline
        self.tls = ssl.create_default_context()
        super().__init__(host, context=self.tls, **options)

    def connect(self) -> None:
        addresses = resolve(self.host, self.port, self.allow_private)
        plain = self._connect_to_any(addresses)
        # The certificate is that of the name, not of the address. The deadline covers the handshake, too.
        self.sock = self.tls.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        timer = threading.Timer(self._seconds_left(), _shut_down, [self.sock])
        timer.daemon = True
        timer.start()
        self.sock.do_handshake()

    def _connect_to_any(self, addresses: Sequence[str]) -> socket.socket:
        for address in addresses[:-1]:
            with suppress(OSError):
                return socket.create_connection((address, self.port), self._seconds_left())
        return socket.create_connection((addresses[-1], self.port), self._seconds_left())

    def _seconds_left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.001)


def _shut_down(connected: socket.socket) -> None:
    with suppress(OSError):  # closed in the meantime
        connected.shutdown(socket.SHUT_RDWR)


def resolve(host: str, port: int, allow_private: bool) -> list[str]:
    """
    Return the addresses of a host, given by name or address.

    Raises:
        ImageError: The name is unknown, or any of its addresses is not public and `allow_private` is False.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ImageError(f"cannot be downloaded: the host {host[:100]!r} is unknown") from error
    addresses = [*dict.fromkeys(entry[4][0] for entry in found)]
    if not allow_private and not all(map(is_public, addresses)):
        raise ImageError(
            f"the host {host[:100]!r} has a private, loopback or link-local address: not read; send the image as a "
            "data: URL, or start the server with --allow-private-urls"
        )
    return addresses


def is_public(address: str) -> bool:
    """
    Return whether an IP address is of the public internet.

    False too for multicast, reserved and site-local addresses, and for IPv6 addresses that contain one of IPv4 (mapped,
    NAT64, 6to4), which may lead back to a private network.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    is_special = ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False)
    return ip.is_global and not (is_special or getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None))
