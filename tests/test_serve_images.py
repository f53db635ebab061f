"""Images of requests to the server: what is read, from where, and how much of it."""

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trustme
from conftest import PHOTOGRAPH
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sailvit import SAILViTImageProcessor
from sailvit.serve.images import ImageError, Limits, is_public, read_images


NAME, OTHER, PRIVATE = "images.example", "other.example", "intranet.example"
PUBLIC_ADDRESS, PRIVATE_ADDRESS = "93.184.215.14", "10.1.2.3"
ADDRESSES = {NAME: [PUBLIC_ADDRESS], OTHER: [PUBLIC_ADDRESS], PRIVATE: [PRIVATE_ADDRESS]}


def encode(image: Image.Image, file_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


PICTURE = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)))
REDIRECTS = {
    "/public": f"https://{OTHER}/picture",
    "/private": f"https://{PRIVATE}/picture",
    "/loopback": "https://127.0.0.1/picture",
    "/http": f"http://{NAME}/picture",
    "/file": "file:///etc/passwd",
    "/data": data_url(PICTURE),
    "/loop": "/loop",
    "/endless%20redirect": "/picture",
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path in REDIRECTS:
            self.send_response(302)
            self.send_header("Location", REDIRECTS[self.path])
            self.end_headers()
            if self.path == "/endless%20redirect":
                self._send_bytes(100_000, 0)
        elif self.path == "/picture":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PICTURE)
        elif self.path in ("/slow", "/endless"):
            self.send_response(200)
            self.end_headers()
            self._send_bytes(*{"/slow": (1, 0.05), "/endless": (100_000, 0)}[self.path])
        else:
            self.send_error(404)

    def _send_bytes(self, size: int, pause: float) -> None:
        while not self.server.released.wait(pause):
            try:
                self.wfile.write(bytes(size))
            except OSError:
                return

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def port(authority: trustme.CA) -> Iterator[int]:
    """The port of an https server on this machine."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(NAME, OTHER, PRIVATE).configure_cert(context)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.released = threading.Event()
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *arguments: None  # clients hang up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def internet(port: int, authority: trustme.CA, monkeypatch, tmp_path) -> SimpleNamespace:
    """Names and addresses, all of which lead to the server of this machine; what was resolved and connected to."""
    seen = SimpleNamespace(resolved=[], connected=[], addresses=dict(ADDRESSES))
    getaddrinfo, create_connection = socket.getaddrinfo, socket.create_connection

    def resolve(host: str, *arguments: object, **options: object) -> list[tuple]:
        seen.resolved.append(host)
        if host not in seen.addresses:
            return getaddrinfo(host, *arguments, **options)
        found = seen.addresses[host]
        found = found.pop(0) if isinstance(found[0], list) else found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in found]

    def connect(address: tuple[str, int], *arguments: object, **options: object) -> socket.socket:
        seen.connected.append(address[0])
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", getaddrinfo)
            return create_connection(("127.0.0.1", port), *arguments, **options)

    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    return seen


def read(path: str, host: str = NAME, **limits: object) -> Image.Image:
    return read_images([f"https://{host}{path}"], Limits(**{"seconds": 20, **limits}))[0]


# Addresses


def test_an_image_is_read_from_the_address_that_was_checked(internet):
    assert np.array_equal(np.asarray(read("/picture")), np.asarray(Image.open(io.BytesIO(PICTURE))))
    assert (internet.resolved, internet.connected) == ([NAME], [PUBLIC_ADDRESS])


def test_a_redirect_is_followed_to_another_public_host(internet):
    assert read("/public").size == (30, 20)
    assert (internet.resolved, internet.connected) == ([NAME, OTHER], [PUBLIC_ADDRESS] * 2)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/private", f"'{PRIVATE}' has a private"),
        ("/loopback", "'127.0.0.1' has a private"),
        ("/http", "unknown url type: http"),
        ("/file", "HTTP status 302"),
        ("/data", "HTTP status 302"),
        ("/loop", "HTTP status 302"),
    ],
)
def test_other_redirects_are_refused(path, message, internet):
    with pytest.raises(ImageError, match=message):
        read(path)
    assert {*internet.connected} == {PUBLIC_ADDRESS}


def test_a_private_host_is_refused_before_a_connection(internet):
    with pytest.raises(
        ImageError, match=r"^image 1: the host 'intranet\.example' has a private, .*--allow-private-urls$"
    ):
        read("/picture", PRIVATE)
    assert internet.connected == []


def test_private_hosts_are_read_on_request(internet):
    assert read("/picture", PRIVATE, allow_private=True).size == (30, 20)
    assert read("/private", allow_private=True).size == (30, 20)


def test_one_private_address_of_a_host_is_enough_to_refuse_it(internet):
    internet.addresses[NAME] = [PUBLIC_ADDRESS, PRIVATE_ADDRESS]
    with pytest.raises(ImageError, match="has a private"):
        read("/picture")
    assert internet.connected == []


def test_a_name_that_changes_its_address_gains_nothing(internet):
    """DNS rebinding: the second answer of the name server is a private address."""
    internet.addresses[NAME] = [[PUBLIC_ADDRESS], [PRIVATE_ADDRESS]]
    assert read("/picture").size == (30, 20)
    assert (internet.resolved, internet.connected) == ([NAME], [PUBLIC_ADDRESS])
    with pytest.raises(ImageError, match="has a private"):
        read("/picture")


def test_proxies_of_the_environment_are_not_used(internet, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", f"http://{PRIVATE_ADDRESS}:3128")
    assert read("/picture").size == (30, 20) and internet.connected == [PUBLIC_ADDRESS]


def test_the_certificate_must_be_that_of_the_name(internet):
    internet.addresses["elsewhere.example"] = [PUBLIC_ADDRESS]
    with pytest.raises(ImageError, match=r"cannot be downloaded: .*certificate"):
        read("/picture", "elsewhere.example")


def test_an_unknown_certificate_is_refused(internet, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ImageError, match=r"cannot be downloaded: .*certificate"):
        read("/picture")


PRIVATE_ADDRESSES = (
    "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254",
    "ff02::1", "fec0::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1",
    "2001:0:7f00:1::1",
)  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE_ADDRESSES)
def test_addresses_of_the_own_network_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", PUBLIC_ADDRESS, "2606:4700:4700::1111"])
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.1", "0x7f.0.0.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "LOCALHOST."])
def test_other_spellings_of_this_machine_are_refused(host):
    with pytest.raises(ImageError, match=r"has a private|is unknown"):
        read("/picture", host)


# Limits


def test_a_download_ends_at_the_limit_of_bytes(internet):
    with pytest.raises(ImageError, match=r"^image 1: expected at most 1000000 bytes in all images together$"):
        read("/endless", size=1_000_000)


def test_a_download_ends_at_the_limit_of_time(internet):
    """Its bytes come one by one, so that no single wait is long."""
    with pytest.raises(ImageError, match=r"image 1: not downloaded in 0\.3 seconds"):
        read("/slow", seconds=0.3)


def test_all_addresses_of_a_host_share_the_limit_of_time(internet, monkeypatch):
    limits = []

    def wait(address: tuple[str, int], timeout: float) -> None:
        limits.append(timeout)
        time.sleep(min(timeout, 0.1))
        raise TimeoutError("timed out")

    internet.addresses[NAME] = [f"93.184.215.{number}" for number in range(9)]
    monkeypatch.setattr(socket, "create_connection", wait)
    with pytest.raises(ImageError, match="timed out"):
        read("/picture", seconds=0.3)
    assert limits == sorted(limits, reverse=True) and limits[0] <= 0.3 and limits[-1] == 0.001


def test_the_body_of_a_redirect_is_not_read(internet):
    assert read("/endless%20redirect", size=1_000_000).size == (30, 20)


def test_limits_are_those_of_all_images_together():
    urls = [data_url(PICTURE)] * 3
    assert len(read_images(urls, Limits(images=3, size=3 * len(PICTURE), pixels=3 * 600))) == 3
    for limits, message in (
        ({"images": 2}, "expected at most 2 images in a request, got 3"),
        ({"size": 3 * len(PICTURE) - 1}, "image 3: expected at most"),
        ({"pixels": 3 * 600 - 1}, "image 3: expected at most 1799 pixels"),
    ):
        with pytest.raises(ImageError, match=message):
            read_images(urls, Limits(**limits))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_decompression_bomb_is_not_decoded(side):
    """A header of many pixels, without them: decoding would fail with another message."""
    header = encode(Image.new("1", (8, 8)))
    start = header.index(b"IHDR")
    size = side.to_bytes(4, "big") * 2
    import zlib

    chunk = b"IHDR" + size + header[start + 12 : start + 17]
    bomb = header[:start] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + header[start + 21 :]
    with pytest.raises(ImageError, match="image 1: expected at most 64000000 pixels"):
        read_images([data_url(bomb)], Limits())


# Images


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_image_is_refused(file_format):
    content = encode(Image.open(PHOTOGRAPH).resize((200, 150)), file_format)
    assert read_images([data_url(content)], Limits())[0].size == (200, 150)
    with pytest.raises(ImageError, match=r"image 2: cannot be decoded|image 2: these"):
        read_images([data_url(content), data_url(content[: len(content) // 2])], Limits())


def test_a_jpeg_of_few_pixels_is_read():
    assert read_images([data_url(encode(Image.new("RGB", (300, 7)), "JPEG"))], Limits())[0].size == (300, 7)


def test_formats_that_run_other_programs_are_not_read():
    script = encode(Image.new("RGB", (8, 8)), "EPS")
    with pytest.raises(ImageError, match="are not an image in PNG, JPEG"):
        read_images([data_url(script)], Limits())


def test_16_bits_are_read_as_from_a_file(tmp_path):
    samples = np.random.default_rng(0).integers(0, 1 << 16, (40, 40), np.uint16)
    content = encode(Image.fromarray(samples))
    (tmp_path / "image.png").write_bytes(content)
    processor = SAILViTImageProcessor(size=56)
    images = [read_images([data_url(content)], Limits())[0], str(tmp_path / "image.png")]
    tiles = [processor(image, return_tensors="pt")["pixel_values"] for image in images]
    assert torch.equal(*tiles)


@given(
    st.text() | st.builds("{}{}".format, st.sampled_from(["data:", "data:image/png;base64,", "file:", " "]), st.text())
)
def test_any_other_text_is_refused(text):
    with pytest.raises(ImageError, match=r"^image 1: "):
        read_images([text], Limits())


@given(st.binary(max_size=200), st.integers(0, len(PICTURE)))
def test_any_bytes_are_an_image_or_are_refused(content, position):
    for damaged in (content, PICTURE[:position] + content + PICTURE[position:]):
        try:
            read_images([data_url(damaged)], Limits())
        except ImageError as error:
            assert "\n" not in str(error)
