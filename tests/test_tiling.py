"""Image processor: grids and pixels compared with the released code and Pillow, also on random input."""

import base64
import copy
import http.server
import io
import itertools
import json
import math
import pickle
import struct
import threading
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from conftest import PHOTOGRAPH, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin
from transformers.image_utils import load_image

from sailvit import SAILViTImageProcessor, choose_tile_grid


MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
FIXTURE = ROOT / "tests" / "data" / "tile_grids.json"


@pytest.fixture(scope="module")
def processor() -> SAILViTImageProcessor:
    return SAILViTImageProcessor()


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.open(PHOTOGRAPH).convert("RGB")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def released_tiles(image: Image.Image, columns: int, rows: int, thumbnail: bool = True) -> list[Image.Image]:
    """Return the tiles as the released code computes them, with Pillow."""
    large = image.resize((448 * columns, 448 * rows), Image.BICUBIC)
    corners = [(448 * column, 448 * row) for row in range(rows) for column in range(columns)]
    tiles = [large.crop((left, top, left + 448, top + 448)) for left, top in corners]
    return [*tiles, image.resize((448, 448), Image.BICUBIC)] if thumbnail and len(tiles) > 1 else tiles


def eight_bit(pixel_values: torch.Tensor) -> torch.Tensor:
    return (pixel_values * STD + MEAN) * 255


# The grid


def exact_grid(
    width: int, height: int, maximum: int, pairs: list[tuple[int, int]] | None = None
) -> tuple[int, int] | None:
    """Apply the released rule by brute force, with exact fractions as aspect ratios."""
    pairs = itertools.product(range(1, maximum + 1), repeat=2) if pairs is None else pairs
    best, nearest = None, None
    for columns, rows in sorted((pair for pair in pairs if math.prod(pair) <= maximum), key=math.prod):
        distance = abs(float(Fraction(width, height)) - float(Fraction(columns, rows)))
        tie = distance == nearest and width * height > 0.5 * 448 * 448 * columns * rows
        if nearest is None or distance < nearest or tie:
            best, nearest = (columns, rows), distance
    return best


@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 24))
@settings(max_examples=300, deadline=None)
def test_grid_is_the_released_rule(width, height, maximum):
    assert choose_tile_grid(width, height, max_tiles=maximum) == exact_grid(width, height, maximum)


def test_grid_equals_got_ocr2_of_transformers():
    from transformers.models.got_ocr2 import image_processing_got_ocr2 as got

    theirs = getattr(got, "get_optimal_tiled_canvas", None)
    if theirs is None:  # transformers < 5: same name, in the slow processor's file
        pytest.fail("GotOcr2 has moved its grid rule")
    for width, height in itertools.product([1, 100, 224, 448, 449, 672, 896, 897, 1000, 1344, 4000], repeat=2):
        for minimum, maximum in [(1, 6), (1, 8), (1, 12), (2, 8), (4, 4)]:
            expected = theirs((height, width), (448, 448), minimum, maximum)
            assert choose_tile_grid(width, height, minimum, maximum) == tuple(expected)


def test_the_grid_fixture_for_ports_matches_the_rule():
    cases = json.loads(FIXTURE.read_text())["cases"]
    assert len(cases) > 300
    for width, height, maximum, columns, rows, tiles in cases:
        assert (
            (columns, rows) == choose_tile_grid(width, height, max_tiles=maximum) == exact_grid(width, height, maximum)
        )
        assert tiles == columns * rows + (columns * rows > 1)


def test_a_square_of_one_tile_stays_one_tile(processor):
    assert processor(noise(448, 448))["num_tiles"].tolist() == [1]


@pytest.mark.parametrize(
    ("width", "height", "bounds"), [(0, 5, (1, 8)), (5, -1, (1, 8)), (5, 5, (3, 2)), (5, 5, (0, 2))]
)
def test_an_empty_image_or_invalid_bounds_raise(width, height, bounds):
    with pytest.raises(ValueError, match=r"pixels|min_tiles"):
        choose_tile_grid(width, height, *bounds)


@pytest.mark.parametrize(
    "options", [{}, {"max_tiles": 3}, {"use_thumbnail": False}, {"do_tile": False}, {"min_tiles": 4}]
)
def test_get_number_of_image_patches_equals_the_tiles(processor, options):
    for width, height in [(448, 448), (1000, 300), (30, 500), (1, 1)]:
        counted = processor.get_number_of_image_patches(height, width, options)
        batch = processor(noise(width, height), **options)
        assert counted == batch["num_tiles"].item() == len(batch["pixel_values"])


# The pixels


@pytest.mark.parametrize(
    "size", [(1024, 768), (300, 200), (1600, 1200), (480, 1280), (3000, 400), (448, 448), (50, 70)]
)
def test_pixels_are_within_two_levels_of_pillows(processor, photograph, size):
    for image in (photograph.resize(size, Image.LANCZOS), noise(*size)):
        batch = processor(image)
        expected = torch.stack([T.functional.pil_to_tensor(t) for t in released_tiles(image, *batch["tile_grids"][0])])
        difference = (eight_bit(batch["pixel_values"]) - expected).abs()
        assert difference.max() < 2.01 and difference.mean() < 0.1


@pytest.mark.parametrize("size", [(1024, 768), (480, 1280), (90, 60)])
def test_pil_backend_is_bit_equal_to_the_released_code(processor, photograph, size):
    image = photograph.resize(size, Image.LANCZOS)
    transform = T.Compose([T.ToTensor(), T.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])
    batch = processor(image, resize_backend="pil")
    expected = torch.stack([transform(tile) for tile in released_tiles(image, *batch["tile_grids"][0])])
    assert torch.equal(batch["pixel_values"], expected)


def evaluated_tiles(image: Image.Image, maximum: int) -> list[Image.Image]:
    """Return the msac tiles of the SAIL-VL evaluation: the second grid is inserted before the last tile."""
    first = exact_grid(*image.size, maximum)
    pairs = itertools.product(range(1, maximum + 1), repeat=2)
    others = [pair for pair in pairs if math.prod(pair) <= maximum and any(map(int.__mod__, first, pair))]
    second = exact_grid(*image.size, maximum, others) or (1, 1)
    tiles = released_tiles(image, *first)
    return [*tiles[:-1], *released_tiles(image, *second, thumbnail=False), tiles[-1]]


@pytest.mark.parametrize("size", [(300, 300), (1000, 640), (600, 1500), (448, 448), (2000, 700)])
@pytest.mark.parametrize("maximum", [1, 2, 6, 10])
def test_msac_equals_the_tiles_of_the_evaluation(photograph, size, maximum):
    processor = SAILViTImageProcessor(msac=True, max_tiles=maximum, resize_backend="pil")
    image = photograph.resize(size)
    expected = [T.functional.to_tensor(tile) for tile in evaluated_tiles(image, maximum)]
    batch = processor(image)
    assert processor.get_number_of_image_patches(size[1], size[0]) == len(expected) == len(batch["pixel_values"])
    for tile, tensor in zip(batch["pixel_values"], expected, strict=True):
        torch.testing.assert_close(tile, (tensor - MEAN) / STD, rtol=0, atol=1e-6)
    assert processor.get_number_of_image_patches(size[1], size[0], {"do_tile": False}) == 1


def test_do_tile_false_equals_the_resize_of_the_released_card(processor, photograph):
    interpolation = T.InterpolationMode.BICUBIC
    transform = T.Compose(
        [
            T.Resize((448, 448), interpolation=interpolation),
            T.ToTensor(),
            T.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    expected = transform(photograph)[None]
    assert torch.equal(processor(photograph, do_tile=False, resize_backend="pil")["pixel_values"], expected)
    ours = processor(photograph, do_tile=False)["pixel_values"]
    assert ((ours - expected) * STD * 255).abs().max() < 2.01


def test_a_batch_equals_single_images(processor, photograph):
    images = [photograph, noise(300, 900), photograph.resize((500, 500)), noise(300, 900, seed=1)]
    batch = processor(images)
    alone = [processor(image) for image in images]
    assert torch.equal(batch["pixel_values"], torch.cat([one["pixel_values"] for one in alone]))
    assert torch.equal(batch["tile_grids"], torch.cat([one["tile_grids"] for one in alone]))
    assert batch["num_tiles"].tolist() == [7, 4, 1, 4]


def test_batching_images_of_one_size_changes_nothing(processor, photograph, monkeypatch):
    import importlib

    module = importlib.import_module("sailvit.image_processing_sailvit")
    images = [photograph, noise(1024, 768), noise(300, 900)]
    expected = processor(images)["pixel_values"]
    batches = module._batches
    monkeypatch.setattr(module, "_batches", lambda arrays, device: batches(arrays, torch.device("cuda")))
    assert torch.equal(processor(images)["pixel_values"], expected)


def test_float_images_equal_their_8_bit_version(processor, photograph):
    expected = processor(photograph)["pixel_values"]
    values = torch.from_numpy(np.array(photograph))
    for image, options in [(values.float(), {}), (values.double() / 255, {"do_rescale": False})]:
        ours = processor(image, **options)["pixel_values"]
        assert ((ours - expected) * STD * 255).abs().max() < 2.01


def test_rescale_and_normalize_can_be_disabled(processor):
    image = noise(448, 448)
    raw = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(processor(image, do_rescale=False, do_normalize=False)["pixel_values"], raw)
    torch.testing.assert_close(processor(image, do_normalize=False)["pixel_values"], raw / 255)
    ours = processor(image, image_mean=0.5, image_std=[0.5, 0.5, 0.5])["pixel_values"]
    torch.testing.assert_close(ours, (raw / 255 - 0.5) / 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu(processor, photograph):
    ours = processor([photograph, noise(1000, 300)], device="cuda")["pixel_values"]
    expected = processor([photograph, noise(1000, 300)])["pixel_values"]
    assert ((ours.cpu() - expected) * STD * 255).abs().max() < 2.01


# Input types


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "L", "LA", "1", "P", "PA", "CMYK", "YCbCr", "HSV"])
def test_every_pil_mode_is_read_as_pillow_converts_it(processor, photograph, mode):
    small = photograph.resize((320, 240))
    image = small.convert("LA").convert(mode) if mode == "PA" else small.convert(mode)
    expected = processor(image.convert("RGB"))["pixel_values"]
    assert torch.equal(processor(image)["pixel_values"], expected)


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_a_palette_with_transparency_is_read_without_a_warning(processor, photograph, transparency):
    image = photograph.resize((320, 240)).quantize(256)
    expected = processor(image.convert("RGB"))["pixel_values"]
    image.info["transparency"] = transparency
    assert torch.equal(processor(image)["pixel_values"], expected)


def test_16_bit_images_are_scaled_not_saturated(processor):
    levels = np.random.default_rng(0).integers(0, 256, (448, 448), dtype=np.uint16)
    deep, plain = Image.fromarray(levels * 257), Image.fromarray(levels.astype(np.uint8))
    assert deep.mode == "I;16"
    assert torch.equal(processor(deep)["pixel_values"], processor(plain)["pixel_values"])


def as_12_bits(levels: np.ndarray) -> np.ndarray:
    """Store 8-bit levels in the lower 12 of 16 bits."""
    return (levels * (4095 / 255)).round().astype(np.uint16)


def png_of_16_bits(path: Path, samples: np.ndarray, significant: int | None = None) -> Path:
    """Write a PNG from (H, W, 1 to 4 channels); Pillow cannot write 16-bit colour."""
    height, width, channels = samples.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    says = chunk(b"sBIT", bytes([significant] * channels)) if significant else b""
    body = chunk(b"IHDR", header) + says + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def tiff_of_packed_12_bits(path: Path, samples: np.ndarray) -> Path:
    """Write a TIFF with BitsPerSample 12: two samples in three bytes."""
    first, second = samples.reshape(-1, 2).T.astype(np.uint32)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    height, width = samples.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 110), (277, 1), (279, len(packed))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + packed)
    return path


def test_12_bit_images_are_scaled_by_the_bit_depth_in_the_file(processor, tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (448, 448), dtype=np.uint8)
    expected, samples = processor(Image.fromarray(levels))["pixel_values"], as_12_bits(levels)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = 4095  # MaxSampleValue
    Image.fromarray(samples).save(tmp_path / "tagged.tif", tiffinfo=tags)
    (tmp_path / "tagged.pgm").write_bytes(b"P5 448 448 4095\n" + samples.astype(">u2").tobytes())
    tagged = png_of_16_bits(tmp_path / "tagged.png", samples[..., None], significant=12)
    with Image.open(tagged) as opened:
        images = [tagged, opened, tmp_path / "tagged.tif", tmp_path / "tagged.pgm"]
        for image in (*images, tiff_of_packed_12_bits(tmp_path / "packed.tif", samples)):
            assert torch.equal(processor(image)["pixel_values"], expected)


def test_16_bit_values_override_a_lower_bit_depth_in_the_file(processor, tmp_path):
    """PNG samples of 12 significant bits may use all 16 bits; the maximum in a TIFF may be a statistic."""
    levels = np.random.default_rng(0).integers(0, 256, (448, 448), dtype=np.uint8)
    expected, samples = processor(Image.fromarray(levels))["pixel_values"], levels.astype(np.uint16) * 257
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = 60_000
    Image.fromarray(samples).save(tmp_path / "statistic.tif", tiffinfo=tags)
    gray = png_of_16_bits(tmp_path / "gray.png", samples[..., None], significant=12)
    colour = png_of_16_bits(tmp_path / "colour.png", np.dstack([samples] * 3), significant=12)
    for image in (gray, colour, tmp_path / "statistic.tif"):
        assert torch.equal(processor(image)["pixel_values"], expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_16_bit_image_that_looks_like_12_bits_warns_once(processor, tmp_path, channels):
    levels = np.random.default_rng(0).integers(0, 256, (60, 60), dtype=np.uint8)
    samples = np.dstack([as_12_bits(levels)] * channels)
    path = png_of_16_bits(tmp_path / "dark.png", samples)
    with pytest.warns(
        UserWarning, match=r"image \(.*dark.png\): no 16-bit sample exceeds 4095: if it has 12 bits"
    ) as found:
        processor(path)
    assert len(found) == 1
    with Image.open(path) as opened, pytest.warns(UserWarning, match=r"image\[1\] \(.*dark.png\): no 16-bit"):
        processor([noise(9, 9), opened])


def test_12_bit_colour_warns_of_bits_that_pillow_drops(processor, tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (448, 448), dtype=np.uint8)
    path = png_of_16_bits(tmp_path / "colour.png", np.dstack([as_12_bits(levels)] * 3), significant=12)
    with pytest.warns(UserWarning, match="only 4 of its 12 bits, stored in 16, are read"):
        ours = eight_bit(processor(path)["pixel_values"])
    assert (ours - torch.from_numpy(levels)).abs().max() <= 17


def test_a_black_16_bit_image_is_black(processor):
    assert processor(Image.fromarray(np.zeros((9, 9), np.uint16)))["pixel_values"].unique().numel() == 3


def test_a_broken_png_chunk_raises_with_the_file_name(processor, tmp_path):
    whole = png_of_16_bits(tmp_path / "whole.png", np.zeros((9, 9, 1), np.uint16), significant=12).read_bytes()
    for cut in range(34, 60, 3):
        (tmp_path / "cut.png").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"image \(.*cut.png\): cannot be"):
            processor(tmp_path / "cut.png")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_integer_and_float_modes_are_limited_to_255(processor, mode):
    image = Image.new(mode, (448, 448), 200)
    expected = processor(Image.new("L", (448, 448), 200))["pixel_values"]
    assert torch.equal(processor(image)["pixel_values"], expected)
    with pytest.raises(ValueError, match=r"image: .*0\.\.255"):
        processor(Image.new(mode, (448, 448), 4000))


@pytest.mark.parametrize(
    ("value", "message"), [(0.5, "do_rescale=False"), (float("nan"), "NaN"), (-3.0, "expected floats")]
)
def test_pil_float_images_are_checked_like_arrays(processor, value, message):
    values = np.full((60, 60), 0.0, np.float32)
    values[3, 4] = value
    for image in (values, Image.fromarray(values)):
        with pytest.raises(ValueError, match=message):
            processor(image)
    ramp = np.linspace(0, 1, 448 * 448, dtype=np.float32).reshape(448, 448)
    ours, array = (processor(image, do_rescale=False)["pixel_values"] for image in (Image.fromarray(ramp), ramp))
    assert torch.equal(ours, array) and ours.max() > 2


def test_array_layouts_give_the_same_tiles(processor, photograph):
    array = np.array(photograph)
    expected = processor(photograph)["pixel_values"]
    layouts = [array, array.transpose(2, 0, 1), torch.from_numpy(array), torch.from_numpy(array).permute(2, 0, 1)]
    layouts += [array.astype(np.int64), array[:, ::-1][:, ::-1], np.dstack([array, array[..., :1]])]
    for image in layouts:
        assert torch.equal(processor(image)["pixel_values"], expected)
    gray = np.array(photograph.convert("L"))
    expected = processor(photograph.convert("L"))["pixel_values"]
    for image in [gray, gray[None], gray[..., None]]:
        assert torch.equal(processor(image)["pixel_values"], expected)


def test_an_image_of_one_row_is_channels_last(processor):
    row = np.random.default_rng(0).integers(0, 256, (1, 500, 3), dtype=np.uint8)
    assert torch.equal(processor(row)["pixel_values"], processor(Image.fromarray(row))["pixel_values"])


@pytest.mark.parametrize("shape", [(3, 50), (50, 4), (1, 9), (40, 40)])
def test_a_2d_array_is_a_gray_image(processor, shape):
    gray = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = processor(Image.fromarray(gray))["pixel_values"]
    for layout in (None, "channels_first", "channels_last"):
        assert torch.equal(processor(gray, input_data_format=layout)["pixel_values"], expected)


def test_an_ambiguous_layout_raises_without_input_data_format(processor):
    image = np.zeros((3, 40, 3), np.uint8)
    with pytest.raises(ValueError, match="input_data_format"):
        processor(image)
    for layout, grid in [("channels_last", (8, 1)), ("channels_first", (1, 8))]:
        assert processor(image, input_data_format=layout)["tile_grids"].tolist() == [list(grid)]


def test_nested_lists_batches_and_tuples_are_flattened(processor):
    image = noise(60, 40)
    batch = np.stack([np.array(image)] * 2)
    assert len(processor([[image], (image, [image]), batch])["num_tiles"]) == 5
    assert len(processor(torch.from_numpy(batch))["num_tiles"]) == 2


def test_paths_and_urls_are_opened(processor, tmp_path):
    path = tmp_path / "noise.png"
    noise(300, 200).save(path)
    expected = processor(noise(300, 200))["pixel_values"]
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/noise.png"
        text = base64.encodebytes(path.read_bytes()).decode()  # with line breaks, and below without
        for source in (
            path,
            str(path),
            url,
            data,
            path.as_uri(),
            text,
            "".join(text.split()),
            url.replace("h", "H", 1),
        ):
            assert torch.equal(processor(source)["pixel_values"], expected)
        with pytest.raises(ValueError, match=r"image \(http.*absent.png\): cannot be opened.*404"):
            processor(url.replace("noise", "absent"))
        with pytest.raises(ValueError, match=r"image \(http.*two words.png\): cannot be opened"):
            processor(url.replace("noise", "two words"))
        server.shutdown()


def test_strings_are_read_like_in_transformers(processor, tmp_path):
    """File names that are also base64, and names with spaces."""
    noise(60, 40).save(tmp_path / "abcd", "PNG")
    noise(60, 40).save(tmp_path / "two words.png")
    spelt = base64.b64encode((tmp_path / "abcd").read_bytes()).decode()
    for source in (str(tmp_path / "abcd"), str(tmp_path / "two words.png"), spelt):
        expected = processor(load_image(source))["pixel_values"]
        assert torch.equal(processor(source)["pixel_values"], expected)
    assert torch.equal(processor((tmp_path / "two words.png").as_uri())["pixel_values"], expected)


PICTURE_AS_TEXT = "iVBORw0KGgo" + "A" * 1_000_001


@pytest.mark.parametrize(
    "source",
    [
        PICTURE_AS_TEXT,
        PICTURE_AS_TEXT[:-2],
        "data:image/png;base64," + PICTURE_AS_TEXT,
        "http://127.0.0.1:9/" + PICTURE_AS_TEXT,
        "file:///" + PICTURE_AS_TEXT,
        "/" * 2000 + "absent.png",
        Path("a" * 3000),
    ],
)
def test_error_messages_shorten_long_sources(processor, source):
    with pytest.raises(ValueError, match=r"^image \(.*\.\.\..*\): cannot be opened as an image: ") as error:
        processor(source)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["image_mean", "size", "resize_backend", "max_tiles", "do_tile", "rescale_factor"])
def test_error_messages_shorten_long_options(processor, name):
    with pytest.raises(ValueError, match=name) as error:
        processor(noise(9, 9), **{name: list(range(10_000))})
    assert len(str(error.value)) < 400
    with pytest.raises(TypeError) as error:
        processor(noise(9, 9), **{"z" * 10_000: 1})
    assert len(str(error.value)) < 600


def test_exif_orientation_is_applied_on_request(processor, tmp_path):
    image, exif = noise(300, 200), Image.Exif()
    exif[0x0112] = 6  # rotate right by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    stored, upright = (processor(tmp_path / "turned.png", do_exif_transpose=turn) for turn in (False, True))
    assert torch.equal(stored["pixel_values"], processor(image)["pixel_values"])
    assert torch.equal(upright["pixel_values"], processor(image.transpose(Image.Transpose.ROTATE_270))["pixel_values"])


# Invalid input


def broken_png() -> Image.Image:
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()[:3000]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), r"image\[1\]: .*\(0, 5, 3\)"),
        (np.zeros((0, 5), np.uint8), r"image\[1\]: .*empty"),
        (np.zeros((5, 6, 2), np.uint8), r"image\[1\]: .*\(5, 6, 2\)"),
        (np.zeros((2, 5, 6, 3, 1), np.uint8), r"image\[1\]: "),
        (np.full((5, 6, 3), np.nan, np.float32), r"image\[1\]: contains NaN"),
        (np.full((5, 6, 3), np.inf, np.float32), r"image\[1\]: contains NaN"),
        (np.full((5, 6, 3), -2.0, np.float32), r"image\[1\]: expected floats in 0\.\.255 .*: scale them"),
        (np.full((5, 6, 3), 0.5, np.float32), r"image\[1\]: .*do_rescale=False"),
        (
            np.full((5, 6, 3), 4000, np.uint16),
            r"expected integers in 0\.\.255, got 4000 to 4000: scale .* image // 257",
        ),
        (np.zeros((5, 6, 3), np.complex64), r"image\[1\]: .*got ndarray of complex64"),
        (np.array(["a"]), r"image\[1\]: "),
        (b"bytes", r"image\[1\]: .*got bytes: open it with PIL.Image.open .*, or pass base64"),
        (io.BytesIO(b"bytes"), r"image\[1\]: .*got BytesIO: open it with PIL.Image.open"),
        (None, r"image\[1\]: .*got NoneType"),
        ("/no/such/file.jpg", r"image\[1\] \(/no/such/file.jpg\): cannot be opened"),
        (str(ROOT / "LICENSE"), r"image\[1\] \(.*LICENSE\): cannot be opened"),
        (str(ROOT), r"image\[1\] \(.*\): cannot be opened"),
        (Image.new("RGB", (0, 5)), r"image\[1\]: .*empty"),
        (Image.new("La", (5, 5)), r"image\[1\]: cannot be decoded"),
        (broken_png(), r"image\[1\]: cannot be decoded"),
    ],
)
def test_an_invalid_image_raises_with_its_name(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor([noise(10, 10), image])


def test_a_decompression_bomb_raises(processor, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (3000, 3000)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(ValueError, match=r"bomb.png\): .*decompression bomb"):
        processor(path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tile": 4}, TypeError, "did you mean max_tiles"),
        ({"crop_to_patches": True}, TypeError, "the options are do_tile"),
        ({"min_tiles": 9}, ValueError, "min_tiles=9, max_tiles=8"),
        ({"max_tiles": 0}, ValueError, "max_tiles=0"),
        ({"max_tiles": 2.5}, ValueError, "max_tiles must be an integer"),
        ({"do_tile": "false"}, ValueError, "do_tile must be True or False, got 'false'"),
        ({"do_rescale": 0}, ValueError, "do_rescale must be True or False, got 0"),
        ({"size": {"shortest_edge": 448}}, ValueError, "height"),
        ({"size": {"height": 0, "width": 448}}, ValueError, "positive"),
        ({"size": True}, ValueError, "size must be"),
        ({"max_tiles": 10**8}, ValueError, "max_tiles <= 1024"),
        ({"image_mean": "x"}, ValueError, "image_mean must be"),
        ({"image_std": [1.0, float("nan"), 1.0]}, ValueError, "image_std must be"),
        ({"rescale_factor": "x"}, ValueError, "rescale_factor must be positive"),
        ({"image_std": [1.0, 0.0, 1.0]}, ValueError, "image_std must not be zero"),
        ({"image_mean": [1.0, 0.0]}, ValueError, "image_mean must be one finite number or three"),
        ({"resample": Image.Resampling.LANCZOS}, ValueError, 'resize_backend="pil"'),
        ({"rescale_factor": 0.0}, ValueError, "rescale_factor must be positive"),
        ({"resize_backend": "opencv"}, ValueError, "resize_backend"),
        ({"input_data_format": "last"}, ValueError, "input_data_format"),
    ],
)
def test_invalid_options_raise_in_constructor_and_call(processor, options, error, message):
    with pytest.raises(error, match=message):
        SAILViTImageProcessor(**options)
    with pytest.raises(error, match=message):
        processor(noise(10, 10), **options)


@pytest.mark.parametrize("size", [224, (224, 224), [224, 224], np.int64(224), {"height": 224, "width": 224}])
def test_size_may_be_a_number_a_pair_or_a_dictionary(processor, size):
    image = noise(300, 200)
    expected = processor(image, size={"height": 224, "width": 224})["pixel_values"]
    assert torch.equal(processor(image, size=size)["pixel_values"], expected)
    assert torch.equal(SAILViTImageProcessor(size=size)(image)["pixel_values"], expected)


def test_arrays_of_any_byte_order_and_width_are_read(processor):
    array = np.array(noise(50, 40))
    expected = processor(array)["pixel_values"]
    for dtype in (">u2", ">i4", "u8"):
        assert torch.equal(processor(array.astype(dtype))["pixel_values"], expected)
    floats = processor(array.astype(np.float32))["pixel_values"]
    for dtype in (">f4", np.longdouble):
        assert torch.equal(processor(array.astype(dtype))["pixel_values"], floats)


def test_to_rgb_image_returns_the_tiled_image(processor, photograph):
    assert (np.array(processor.to_rgb_image(photograph)) == np.array(photograph)).all()
    levels = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint16)
    deep = np.array(processor.to_rgb_image(Image.fromarray(levels * 257)))
    assert (deep == levels[..., None]).all()
    floats = processor.to_rgb_image(np.array(photograph) / 255, do_rescale=False)
    assert (np.array(floats) == np.array(photograph)).all()


@pytest.mark.parametrize("kind", [None, "pt", "np"])
def test_num_patches_list_is_an_alias_and_not_a_key(processor, kind):
    batch = processor([noise(300, 200), noise(50, 50)], return_tensors=kind)
    assert batch["num_patches_list"] == batch.num_patches_list == batch.get("num_patches_list") == [7, 1]
    assert all(type(count) is int for count in batch["num_patches_list"]) and "num_patches_list" in batch
    assert set(batch) == set(dict(**batch)) == {"pixel_values", "num_tiles", "tile_grids"}
    again = pickle.loads(pickle.dumps(copy.deepcopy(batch)))
    assert again["num_patches_list"] == [7, 1] and again.pop("num_patches_list") == [7, 1]
    if kind == "pt":
        moved = batch.to("cpu", torch.bfloat16)
        assert moved["num_patches_list"] == [7, 1] and moved["pixel_values"].dtype == torch.bfloat16
    del again["num_tiles"]
    assert "num_patches_list" not in again and again.get("num_patches_list") is None
    with pytest.raises(KeyError):
        again["num_patches_list"]


def test_the_model_accepts_every_output_of_the_processor(tower):
    batch = SAILViTImageProcessor(size=56)([noise(300, 200), noise(50, 50)], return_tensors="pt")
    with torch.no_grad():
        assert len(tower(**batch).last_hidden_state) == sum(batch["num_patches_list"]) == 8


def test_numpy_tensors_are_returned_on_request(processor):
    batch = processor(noise(300, 200), return_tensors="np")
    assert {type(value) for value in batch.values()} == {np.ndarray}


def test_a_misspelt_option_of_from_pretrained_raises():
    with pytest.raises(TypeError, match="did you mean max_tiles"):
        SAILViTImageProcessor.from_pretrained(ROOT, max_tile=4)
    with pytest.raises(ValueError, match="max_tiles <= 1024"):
        SAILViTImageProcessor.from_pretrained(ROOT, max_tiles=5000)
    assert SAILViTImageProcessor.from_pretrained(ROOT, size=56).size == {"height": 56, "width": 56}
    assert SAILViTImageProcessor.from_pretrained(ROOT, max_tiles=4).max_tiles == 4


def test_an_empty_list_raises(processor):
    with pytest.raises(ValueError, match="images is empty"):
        processor([])


def test_inputs_are_not_modified(processor):
    before = processor.to_dict()
    image = np.array(noise(300, 200))
    copy, options = image.copy(), {"size": {"height": 224, "width": 224}, "max_tiles": 4}
    processor(image, **options)
    SAILViTImageProcessor(**options)
    assert processor.to_dict() == before == SAILViTImageProcessor().to_dict()
    assert (image == copy).all() and options == {"size": {"height": 224, "width": 224}, "max_tiles": 4}


def test_saved_equals_loaded(tmp_path):
    ours = SAILViTImageProcessor(max_tiles=5, size=224, use_thumbnail=False, image_mean=[0.5, 0.5, 0.5])
    ours.save_pretrained(tmp_path)
    assert SAILViTImageProcessor.from_pretrained(tmp_path).to_dict() == ours.to_dict()


def test_an_explicit_none_is_kept(tmp_path):
    """transformers keeps None, which counts as False."""
    ours, image = SAILViTImageProcessor(do_rescale=None, do_normalize=None), noise(60, 60)
    ours.save_pretrained(tmp_path)
    loaded = SAILViTImageProcessor.from_pretrained(tmp_path)
    assert loaded.do_rescale is None and loaded.to_dict() == ours.to_dict()
    assert (
        torch.equal(loaded(image)["pixel_values"], ours(image)["pixel_values"]) and ours(image).pixel_values.max() > 99
    )


def test_root_preprocessor_config_is_the_default():
    saved = json.loads((ROOT / "preprocessor_config.json").read_text())
    defaults = json.loads(SAILViTImageProcessor().to_json_string())
    assert saved == defaults


sides = st.one_of(st.integers(1, 40), st.integers(1, 1200), st.sampled_from([447, 448, 449, 896, 50_000]))


@pytest.mark.filterwarnings("ignore:.*no 16-bit sample exceeds")  # a few random pixels may all be dark
@given(data=st.data(), width=sides, height=sides)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_images_have_the_predicted_number_of_tiles(data, width, height):
    width, height = (width, min(height, 2_000_000 // width + 1))
    mode = data.draw(st.sampled_from(["RGB", "L", "RGBA", "1", "P", "CMYK", "LA", "I;16", "array", "float", "chw"]))
    image = noise(width, height)
    if mode == "I;16":
        image = Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)
    elif mode in ("array", "float", "chw"):
        image = np.array(image)
        image = image.astype(np.float32) if mode == "float" else image
        image = image.transpose(2, 0, 1) if mode == "chw" else image
    else:
        image = image.convert(mode)
    maximum = data.draw(st.integers(1, 12))
    options = {
        "max_tiles": maximum,
        "min_tiles": data.draw(st.integers(1, maximum)),
        "use_thumbnail": data.draw(st.booleans()),
        "size": data.draw(st.sampled_from([448, 28, {"height": 28, "width": 56}])),
        "input_data_format": {"array": "channels_last", "float": "channels_last", "chw": "channels_first"}.get(mode),
    }
    processor = SAILViTImageProcessor(**options)
    batch = processor(image)
    size = (
        options["size"] if isinstance(options["size"], dict) else {"height": options["size"], "width": options["size"]}
    )
    tiles = batch["pixel_values"]
    assert tiles.shape[1:] == (3, size["height"], size["width"]) and tiles.isfinite().all()
    assert len(tiles) == batch["num_tiles"].item() == processor.get_number_of_image_patches(height, width)
    assert options["min_tiles"] <= batch["tile_grids"].prod() <= maximum
