# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Photographs in, normalized 448-pixel tiles out, as the released SAIL-VL code cuts them.

    image -> RGB -> grid (columns x rows) nearest to its shape -> resize to the grid -> cut row by row
          -> + the whole image as a thumbnail, where there is more than one tile -> rescale, normalize

Shapes: n tiles of all images together, one image after the other; H and W the pixels of an image, h and w of a tile.
"""

import base64
import difflib
import errno
import http.client
import io
import json
import math
import urllib.request
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypedDict

import numpy as np
import PIL
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


try:
    from transformers.image_processing_backends import TorchvisionBackend
except ImportError:  # transformers < 5.4
    from transformers.image_processing_utils_fast import BaseImageProcessorFast as TorchvisionBackend

# The filters that torchvision has for tensors, and that give Pillow's pixels.
TENSOR_FILTERS = {
    Image.Resampling.NEAREST: tvF.InterpolationMode.NEAREST_EXACT,
    Image.Resampling.BILINEAR: tvF.InterpolationMode.BILINEAR,
    Image.Resampling.BICUBIC: tvF.InterpolationMode.BICUBIC,
}
# Since 13.0 Pillow resizes an image that loses much more height than width vertically first (its pull request 9549).
PILLOW_CHOOSES_PASS = int(PIL.__version__.split(".")[0]) >= 13
# A picture of 16-bit samples that needs no more bits than this is likely one of fewer bits, and would come out dark.
SUSPECT_BITS = 14
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What begins a URL; any other text is a path, or base64.
URL_SCHEMES = ("http://", "https://", "file://", "data:")
# Options that are True or False; None, which transformers keeps where it is given at construction, is False.
SWITCHES = ("do_tile", "use_thumbnail", "msac", "do_exif_transpose", "do_rescale", "do_normalize")
# More tiles than this are a mistake: 1,024 of 448 pixels are a 14,336-pixel square, and 2.4 GB.
MOST_TILES = 1024
# Keys that transformers itself writes into preprocessor_config.json or passes to from_pretrained.
SERVICE_KEYS = {"auto_map", "backend", "feature_extractor_type", "image_processor_type", "processor_class", "use_fast"}


@lru_cache(maxsize=64)
def tile_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Every grid (columns, rows) of `min_tiles` to `max_tiles` tiles, the smaller first, narrow before wide."""
    grids = ((columns, rows) for columns in range(1, max_tiles + 1) for rows in range(1, max_tiles // columns + 1))
    return tuple(sorted((grid for grid in grids if math.prod(grid) >= min_tiles), key=math.prod))


def choose_tile_grid(
    width: int, height: int, min_tiles: int = 1, max_tiles: int = 8, tile_size: tuple[int, int] = (448, 448)
) -> tuple[int, int]:
    """
    The grid (columns, rows) whose shape is nearest to that of an image: the one place that decides it.

    The first of the nearest grids wins, unless a later one is exactly as near and the image has more than half the
    pixels of its tiles (the rule of the released SAIL-VL and InternVL code).

    Args:
        width, height: Of the image, in pixels.
        min_tiles, max_tiles: Bounds on columns * rows.
        tile_size: (height, width) of a tile, in pixels.

    Raises:
        ValueError: The image has no pixels, or the bounds are not 1 <= min_tiles <= max_tiles <= 1,024.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels (width x height) has nothing to tile")
    if not 1 <= min_tiles <= max_tiles <= MOST_TILES:
        raise ValueError(
            f"1 <= min_tiles <= max_tiles <= {MOST_TILES} must hold, got min_tiles={min_tiles}, max_tiles={max_tiles}"
        )
    return _nearest_grid(tile_grids(min_tiles, max_tiles), width, height, tile_size)


def choose_second_grid(
    first: tuple[int, int],
    width: int,
    height: int,
    min_tiles: int = 1,
    max_tiles: int = 8,
    tile_size: tuple[int, int] = (448, 448),
) -> tuple[int, int]:
    """
    The second grid (columns, rows) of msac: chosen as `choose_tile_grid` does, among those whose columns or rows do not
    divide the first one's, so that its cuts lie elsewhere; (1, 1) where none is left.
    """
    columns, rows = first
    others = [grid for grid in tile_grids(min_tiles, max_tiles) if columns % grid[0] or rows % grid[1]]
    return _nearest_grid(others, width, height, tile_size)


def _nearest_grid(
    grids: Sequence[tuple[int, int]], width: int, height: int, tile_size: tuple[int, int]
) -> tuple[int, int]:
    tile_height, tile_width = tile_size
    best, best_distance = (1, 1), math.inf
    for columns, rows in grids:
        distance = abs(width / height - columns * tile_width / (rows * tile_height))
        large = width * height > 0.5 * tile_height * tile_width * columns * rows
        if distance < best_distance or (distance == best_distance and large):
            best, best_distance = (columns, rows), distance
    return best


class SAILViTImageProcessorKwargs(TypedDict, total=False):
    """Every option of SAILViTImageProcessor, at construction and in a call."""

    do_tile: bool
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    msac: bool
    size: dict[str, int] | tuple[int, int] | int
    resample: int
    resize_backend: str
    do_exif_transpose: bool
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Sequence[float]
    image_std: Sequence[float]
    input_data_format: str | None
    device: str | torch.device | None
    return_tensors: str | None


class SAILViTBatchFeature(BatchFeature):
    """A BatchFeature that also answers to `num_patches_list`, by which InternVL's templates ask for the tiles of each
    image, as a list of numbers. It is no key of its own, so that `model(**batch)` does not pass it on."""

    @property
    def num_patches_list(self) -> list[int]:
        return [int(count) for count in self.data["num_tiles"]]

    def __getitem__(self, item: str) -> Any:
        return self.num_patches_list if item == "num_patches_list" else super().__getitem__(item)

    def __contains__(self, item: object) -> bool:
        return super().__contains__("num_tiles" if item == "num_patches_list" else item)

    def pop(self, key: str, *default: Any) -> Any:
        return self.num_patches_list if key == "num_patches_list" else super().pop(key, *default)


class SAILViTImageProcessor(TorchvisionBackend):
    r"""
    Tiles images for SAILViT. Every option is given at construction or per call; an unknown one is refused.

    Args:
        do_tile: Cut an image into the grid of tiles nearest to its shape; `False` resizes it to one tile.
        min_tiles, max_tiles: Bounds on the tiles of an image, its thumbnail not counted.
        use_thumbnail: Append the whole image as one more tile, where the grid has more than one.
        msac: Cut the image a second time, along other lines (`choose_second_grid`), as SAIL-VL is evaluated: the tiles
            of the first grid, those of the second, the thumbnail; the one tile of a first grid of 1 x 1 comes last.
        size: `{"height": h, "width": w}` of a tile in pixels, `(h, w)`, or one number for both.
        resample: Filter of the resize, a `PIL.Image.Resampling`.
        resize_backend: `"torchvision"`, fast and within 2/255 of Pillow, or `"pil"`, Pillow and the arithmetic of
            torchvision's ToTensor and Normalize: bit-equal to the released code.
        do_exif_transpose: Turn a picture upright as its EXIF says. The released code does not.
        do_rescale, rescale_factor: Multiply by 1/255. Without it 8-bit images stay in 0..255, floats in 0..1.
        do_normalize, image_mean, image_std: Subtract and divide by the ImageNet statistics, one number a channel.
        input_data_format: `"channels_first"` or `"channels_last"`, of arrays and tensors whose shape does not tell.
        device: Where to resize and normalize; by default where the image is.
        return_tensors: `"pt"` (the default) or `"np"`.
    """

    valid_kwargs = SAILViTImageProcessorKwargs
    model_input_names = ["pixel_values"]

    do_tile = True
    min_tiles = 1
    max_tiles = 8
    use_thumbnail = True
    msac = False
    size = {"height": 448, "width": 448}
    resample = Image.Resampling.BICUBIC
    resize_backend = "torchvision"
    do_exif_transpose = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    input_data_format = None
    device = None
    return_tensors = None

    def __init__(self, **kwargs: Any):
        self.refuse_unknown(kwargs)
        if kwargs.get("size") is not None:  # transformers would take one number for the shortest edge
            kwargs["size"] = dict(zip(("height", "width"), _height_and_width(kwargs["size"]), strict=True))
        super().__init__(**kwargs)
        self._options({})

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own, and an override that misspells an option is refused, not dropped. Others must pass: the
        pipelines send here what they also send to the model."""
        cls.refuse_unknown({key: None for key in kwargs if cls._nearest_option(key)})
        own = {key: kwargs.pop(key) for key in cls.valid_kwargs.__annotations__.keys() & kwargs.keys()}
        return super().from_dict({**image_processor_dict, **own}, **kwargs)  # transformers < 5 would not check them

    def to_dict(self) -> dict[str, Any]:
        """The options alone, None where that is not the default. Where the class is found stands in config.json: beside
        the options, transformers < 5.4 would warn about slow and fast twins that do not exist, and ask for trust where
        the package is imported."""
        saved = self.valid_kwargs.__annotations__.keys() - {"device", "return_tensors"}  # these belong to a call
        options = {key: value for key, value in super().to_dict().items() if key in saved}
        return {key: value for key, value in options.items() if not (value is None is getattr(type(self), key))}

    def preprocess(self, images: Any, **kwargs: Any) -> SAILViTBatchFeature:
        """
        Args:
            images: One image or any nesting of lists of them: PIL images of any mode, arrays or tensors (H, W),
                (H, W, channels), (channels, H, W) or a batch of these, paths, URLs (http, https, file, data), base64.
                Integers run from 0 to 255, floats likewise, or from 0 to 1 with `do_rescale=False`; 16-bit files are
                scaled, by fewer bits where they say so. Alpha is dropped, as the released code drops it.
            kwargs: Any option of the class, for this call alone.

        Returns:
            pixel_values (n, 3, h, w) float32; num_tiles (images), thumbnails included; tile_grids (images, 2), columns
            and rows. `num_patches_list` is answered too: num_tiles as a list.

        Warns:
            UserWarning: The samples of a 16-bit picture use the lower bits alone, and its file does not say so: it is
                read too dark. Or of samples that the file says use fewer bits, Pillow reads the upper 8 of 16.

        Raises:
            ValueError: An image cannot be read or tiled, or an option is out of range; the message names it.
            TypeError: An option that does not exist.
        """
        self.refuse_unknown(kwargs)
        options = self._options(kwargs)
        pictures = [_read_picture(image, name, options) for name, image in _named_images(images)]
        if not pictures:
            raise ValueError("images is empty: give at least one")
        grids = [_grid_of(picture.shape[1], picture.shape[0], options) for picture in pictures]
        cuts = [
            _cuts_of(grid, picture.shape[1], picture.shape[0], options)
            for grid, picture in zip(grids, pictures, strict=True)
        ]
        counts = [sum(map(math.prod, own)) for own in cuts]
        data = {
            "pixel_values": self._fill_tiles(pictures, cuts, counts, options),
            "num_tiles": torch.tensor(counts),
            "tile_grids": torch.tensor(grids),
        }
        return SAILViTBatchFeature(data=data, tensor_type=options.return_tensors)

    def read_picture(self, image: Any, **kwargs: Any) -> Image.Image:
        """One image, of any kind that `preprocess` takes, as the 8-bit RGB picture that it tiles."""
        self.refuse_unknown(kwargs)
        options = self._options(kwargs)
        picture = _read_picture(image, "image", options)
        if picture.is_floating_point():
            picture = (picture * (255 / options.range)).round().clamp(0, 255).byte()
        return Image.fromarray(picture.cpu().numpy())

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: Mapping[str, Any] | None = None
    ) -> int:
        """The tiles that `preprocess` makes of an image of `height` x `width` pixels, its thumbnail included."""
        self.refuse_unknown(images_kwargs or {})
        options = self._options(images_kwargs or {})
        return sum(map(math.prod, _cuts_of(_grid_of(width, height, options), width, height, options)))

    def to_json_file(self, json_file_path: str | Path) -> None:
        """
        As transformers' own. Where no config.json beside the file says of what class the image processor is, as in the
        folder of an adapter, the file says it.
        """
        fields = json.loads(self.to_json_string())
        if not _names_image_processor(Path(json_file_path).with_name("config.json")):
            name = type(self).__name__
            auto_map = {self._auto_class: f"{type(self).__module__.rpartition('.')[2]}.{name}"}
            fields |= {"auto_map": auto_map, "image_processor_type": name}
        text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        Path(json_file_path).write_text(text, encoding="utf-8")

    def _fill_tiles(
        self,
        pictures: list[torch.Tensor],
        cuts: list[list[tuple[int, int]]],
        counts: list[int],
        options: SimpleNamespace,
    ) -> torch.Tensor:
        """Pictures (H, W, 3) -> (n, 3, h, w); pictures of one size and kind go through together."""
        device = options.device or pictures[0].device
        pixel_values = _empty_tiles((sum(counts), 3, *options.tile_size), device)
        slots = pixel_values.split(counts)
        for indices in _groups(pictures, device):
            group = [pictures[index].to(device) for index in indices]
            batch = (torch.stack(group) if len(group) > 1 else group[0][None]).permute(0, 3, 1, 2)
            done = 0
            for grid in cuts[indices[0]]:
                for index, tiles in zip(indices, _cut_tiles(batch, grid, options), strict=True):
                    slot = slots[index][done : done + math.prod(grid)]
                    _normalize_into(slot.unflatten(0, tiles.shape[:2]), tiles, options)
                done += math.prod(grid)
        return pixel_values

    @classmethod
    def refuse_unknown(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise a TypeError that names the first option of `kwargs` that does not exist, and the nearest that does."""
        known = cls.valid_kwargs.__annotations__
        for key in kwargs:
            if key not in known and key not in SERVICE_KEYS and not key.startswith("_"):
                close = cls._nearest_option(key)
                hint = f"did you mean {close}?" if close else f"the options are {', '.join(known)}"
                raise TypeError(f"{cls.__name__} has no option {_shown(key)}; {hint}")

    @classmethod
    def _nearest_option(cls, key: str) -> str | None:
        return next(iter(difflib.get_close_matches(key, cls.valid_kwargs.__annotations__, n=1, cutoff=0.8)), None)

    def _options(self, overrides: Mapping[str, Any]) -> SimpleNamespace:
        """The options of one call, checked, with `tile_size` (h, w) and the statistics as tensors (3, 1, 1)."""
        chosen = {name: overrides.get(name) for name in self.valid_kwargs.__annotations__}
        options = SimpleNamespace(**{k: getattr(self, k) if v is None else v for k, v in chosen.items()})
        options.tile_size = _height_and_width(options.size)
        if not (isinstance(options.rescale_factor, Real) and 0 < options.rescale_factor < math.inf):
            raise ValueError(f"rescale_factor must be positive, got {_shown(options.rescale_factor)}")
        options.range = 1 / options.rescale_factor if options.do_rescale else 1.0  # where floats must lie
        for name in ("image_mean", "image_std"):
            setattr(options, name, _channel_statistics(name, getattr(options, name)))
        _check_options(options)
        return options


def _check_options(options: SimpleNamespace) -> None:
    for name in ("min_tiles", "max_tiles"):
        if not _is_integer(getattr(options, name)):
            raise ValueError(f"{name} must be an integer, got {_shown(getattr(options, name))}")
    for name in SWITCHES:
        if not isinstance(getattr(options, name), (bool, np.bool_, type(None))):
            raise ValueError(f"{name} must be True or False, got {_shown(getattr(options, name))}")
    choose_tile_grid(1, 1, options.min_tiles, options.max_tiles)  # refuses bounds that cannot hold
    if options.resize_backend not in ("torchvision", "pil"):
        raise ValueError(f'resize_backend must be "torchvision" or "pil", got {_shown(options.resize_backend)}')
    if options.resample not in list(Image.Resampling):
        raise ValueError(f"resample must be a PIL.Image.Resampling, got {_shown(options.resample)}")
    if options.resize_backend == "torchvision" and options.resample not in TENSOR_FILTERS:
        raise ValueError(f'resample {Image.Resampling(options.resample).name} needs resize_backend="pil"')
    if options.input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(
            f'input_data_format must be "channels_first" or "channels_last", got {_shown(options.input_data_format)}'
        )
    if not (options.image_std != 0).all():
        raise ValueError(f"image_std must not be zero, got {options.image_std.flatten().tolist()}")


def _shown(value: Any) -> str:
    """A value that a message quotes."""
    return _shortened(repr(value))


def _shortened(text: str, limit: int = 120) -> str:
    """A text of any length (a picture in base64, say) on a line or two of a message."""
    return text if len(text) <= limit else f"{text[: limit - 23]}...{text[-20:]}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _height_and_width(size: Any) -> tuple[int, int]:
    """(h, w) of a number, a pair, a dictionary, or the SizeDict of transformers."""
    try:
        height, width = (size, size) if _is_integer(size) else (size["height"], size["width"])
    except (KeyError, TypeError):
        height, width = size if isinstance(size, (tuple, list)) and len(size) == 2 else (None, None)
    if not (_is_integer(height) and _is_integer(width) and height > 0 and width > 0):
        raise ValueError(f'size must be {{"height": pixels, "width": pixels}}, both positive, got {_shown(size)}')
    return int(height), int(width)


def _channel_statistics(name: str, values: float | Sequence[float]) -> torch.Tensor:
    """One number, or one a channel -> (3, 1, 1)."""
    numbers = values if isinstance(values, (tuple, list)) else [values]
    if len(numbers) not in (1, 3) or not all(isinstance(n, Real) and math.isfinite(n) for n in numbers):
        raise ValueError(f"{name} must be one finite number or three, got {_shown(values)}")
    return torch.tensor([float(number) for number in numbers]).expand(3).reshape(3, 1, 1)


def _grid_of(width: int, height: int, options: SimpleNamespace) -> tuple[int, int]:
    bounds = (options.min_tiles, options.max_tiles) if options.do_tile else (1, 1)
    return choose_tile_grid(width, height, *bounds, tile_size=options.tile_size)


def _cuts_of(grid: tuple[int, int], width: int, height: int, options: SimpleNamespace) -> list[tuple[int, int]]:
    """The grids an image is cut into, one after the other: its own, the second of msac, 1 x 1 for the thumbnail."""
    whole = [(1, 1)] if options.use_thumbnail or grid == (1, 1) else []
    second = []
    if options.msac and options.do_tile:
        bounds = (options.min_tiles, options.max_tiles)
        second = [choose_second_grid(grid, width, height, *bounds, tile_size=options.tile_size)]
    return [*([grid] if grid != (1, 1) else []), *second, *whole]


# Reading: whatever an image comes as -> (H, W, 3), uint8 or float32


def _named_images(images: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every image of a nesting, with the name that an error calls it by."""
    if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4):
        for index, image in enumerate(images):
            yield from _named_images(image, f"{name}[{index}]")
    else:
        source = images if isinstance(images, (str, Path)) else getattr(images, "filename", "")
        yield f"image{name} ({_shortened(str(source))})" if source else f"image{name}", images


def _read_picture(image: Any, name: str, options: SimpleNamespace) -> torch.Tensor:
    """One image of any kind -> (H, W, 3), uint8 or float32, or a ValueError that begins with its name."""
    if isinstance(image, (str, Path)):
        with open_image(image, name) as opened:
            return _picture_of_pil(opened, name, options)
    if isinstance(image, Image.Image):
        return _picture_of_pil(image, name, options)
    if isinstance(image, np.ndarray) and image.dtype.kind in "buif":
        native = image.dtype.newbyteorder("=") if image.dtype.itemsize <= 8 else np.float64
        image = torch.from_numpy(image.astype(native))
    if not isinstance(image, torch.Tensor) or image.is_complex():
        is_file = isinstance(image, (bytes, bytearray, io.IOBase))
        hint = ": open it with PIL.Image.open (bytes as io.BytesIO(...)), or pass base64 as a string" if is_file else ""
        raise ValueError(
            f"{name}: a PIL image, an array, a tensor, a path or a URL is wanted, not {_kind(image)}{hint}"
        )
    return _picture_of_tensor(image.detach(), name, options)


def _kind(image: Any) -> str:
    return f"{type(image).__name__} of {image.dtype}" if hasattr(image, "dtype") else type(image).__name__


def open_image(source: str | Path, name: str = "image") -> Image.Image:
    """
    Open an image, its pixels not decoded yet.

    Args:
        source: A path, a URL (http, https, file, data), or the file in base64, as transformers' `load_image` takes it.
        name: What an error calls it.

    Raises:
        ValueError: There is no such image; the message begins with `name`.
    """
    try:
        if str(source)[:8].lower().startswith(URL_SCHEMES):
            request = urllib.request.Request(str(source), headers={"User-Agent": "sailvit"})
            with urllib.request.urlopen(request, timeout=60) as response:
                return _open_bytes(response.read())
        return _open_file_or_base64(source)
    except (OSError, ValueError, http.client.HTTPException, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot be opened as an image: {_shortened(str(error), 300)}") from error


def _open_file_or_base64(source: str | Path) -> Image.Image:
    try:
        return Image.open(source)
    except OSError as error:
        try:
            content = base64.b64decode("".join(str(source).split()), validate=True)
            return _open_bytes(content)
        except (OSError, ValueError):  # no base64, or none of an image
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                raise ValueError(
                    "there is no such file, and it is no (complete) image in base64; of URLs http, https, file and "
                    "data are read"
                ) from error
            raise error from None


def _open_bytes(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # whose message is an address in memory
        raise ValueError(f"its {len(content)} bytes are no image that Pillow reads") from None


def _picture_of_pil(image: Image.Image, name: str, options: SimpleNamespace) -> torch.Tensor:
    if not (image.width and image.height):
        raise ValueError(f"{name}: an image of {image.width} x {image.height} pixels is empty")
    try:
        stored, used = _sample_bits(image)
        image.load()
        if options.do_exif_transpose:
            image = ImageOps.exif_transpose(image)
        is_deep = image.mode == "I" or image.mode.startswith("I;16")
        array = np.array(image if is_deep or image.mode == "F" else _rgb(image))
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise ValueError(f"{name}: cannot be decoded to RGB: {_shortened(str(error), 300)}") from error
    if is_deep and stored:
        array = _to_eight_bits(array, stored, used, 0, name)
    elif stored == 16 and image.mode in ("RGB", "RGBA", "LA"):  # of such samples Pillow reads the upper 8 bits alone
        array = _to_eight_bits(array, stored, used, 8, name)
    picture = torch.from_numpy(array).reshape(image.height, image.width, -1)
    return _checked_values(picture.expand(-1, -1, 3), name, options)


def _rgb(image: Image.Image) -> Image.Image:
    """Pillow's own conversion, save where that warns (palettes with alpha)."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _sample_bits(image: Image.Image) -> tuple[int | None, int | None]:
    """The bits of a sample that a file stores, and how many of them it says it uses; None for what is not known. To be
    asked before the pixels are decoded, since Pillow closes the file then."""
    stored = 16 if image.mode.startswith("I;16") else None
    if image.format == "PNG":
        depth, used = _png_bits(image)
        return depth or stored, used
    if image.format == "PPM" and image.mode == "I":  # Pillow has scaled its samples to 16 bits
        return 16, None
    if image.format != "TIFF" or image.mode == "I":
        return stored, None
    depth, maximum = (int(np.max(image.tag_v2.get(tag, 0))) for tag in (258, 281))  # BitsPerSample, MaxSampleValue
    # The latter may also be a statistic of the picture: only 2^n - 1 is taken for a number of bits.
    return depth or stored, maximum.bit_length() if maximum & (maximum + 1) == 0 else None


def _png_bits(image: Image.Image) -> tuple[int | None, int | None]:
    """Bit depth and significant bits of a PNG, from its chunks IHDR and sBIT, of which Pillow keeps neither."""
    file = getattr(image, "fp", None)
    if file is None or getattr(file, "closed", False):
        return None, None
    depth = used = None
    position = file.tell()
    file.seek(len(PNG_SIGNATURE))
    while len(header := file.read(8)) == 8 and (kind := header[4:]) not in (b"IDAT", b"IEND"):
        size = int.from_bytes(header[:4], "big")
        if kind == b"IHDR":
            depth = file.read(size)[8]
        elif kind == b"sBIT":
            used = max(file.read(size))
        else:
            file.seek(size, io.SEEK_CUR)
        file.seek(4, io.SEEK_CUR)  # the checksum
    file.seek(position)
    return depth, used


def _to_eight_bits(samples: np.ndarray, stored: int, used: int | None, lost: int, name: str) -> np.ndarray:
    """
    Scale samples to 0..255: by the bits that their file says it uses, if they need no more, else by those it stores.

    Args:
        samples: As Pillow reads them, without the lower `lost` bits of the `stored` ones.
        used: What the file says; None where it says nothing.
        name: What the warning calls the picture, if it looks as if it had fewer bits than its file stores.
    """
    highest = ((int(samples.max()) + 1) << lost) - 1
    bits = used if used and lost < used < stored and highest < 2**used else stored
    advice = "scale its samples to 16 bits"
    if bits == 16 and 0 < highest < 2**SUSPECT_BITS:
        tags = " or write how many there are (sBIT in a PNG, MaxSampleValue in a TIFF)" if not lost else ""
        message = f"no 16-bit sample exceeds {highest}: if {highest.bit_length()} bits are meant, it is read too dark"
        warnings.warn(f"{name}: {message}; {advice}{tags}", stacklevel=2)
    elif bits < stored and lost:
        message = f"of its {bits} bits, stored in {stored}, only {bits - lost} are read"
        warnings.warn(f"{name}: {message}; {advice}", stacklevel=2)
    top = (2**bits - 1) >> lost
    return samples if top == 255 and lost else (samples / (top / 255)).round().astype(np.uint8)


def _picture_of_tensor(image: torch.Tensor, name: str, options: SimpleNamespace) -> torch.Tensor:
    if image.ndim == 2:
        return _checked_values(image[..., None].expand(-1, -1, 3), name, options)
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"{name}: (H, W), (H, W, channels) or (channels, H, W) is wanted, got {tuple(image.shape)}")
    if _channels_first(image.shape, name, options):
        image = image.permute(1, 2, 0)
    if image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"{name}: 1, 3 or 4 channels are wanted, got {image.shape[-1]} in {tuple(image.shape)}")
    return _checked_values(image[..., :3].expand(-1, -1, 3), name, options)


def _channels_first(shape: torch.Size, name: str, options: SimpleNamespace) -> bool:
    """Where the channels of a (., ., .) array stand: three or four are likelier than one."""
    if options.input_data_format is not None:
        return options.input_data_format == "channels_first"
    for channels in ((3, 4), (1,)):
        first, last = shape[0] in channels, shape[-1] in channels
        if first and last and shape[0] != 1:
            raise ValueError(f"{name}: {tuple(shape)} has its channels first or last: pass input_data_format")
        if first or last:
            return first and not last
    raise ValueError(f"{name}: no dimension of {tuple(shape)} is 1, 3 or 4 channels")


def _checked_values(picture: torch.Tensor, name: str, options: SimpleNamespace) -> torch.Tensor:
    """(H, W, 3) of any type -> uint8 or float32, or a ValueError that says what is wrong with its values."""
    picture = picture.contiguous()
    if 0 in picture.shape:
        raise ValueError(f"{name}: an array of {tuple(picture.shape)} is empty")
    if picture.dtype == torch.uint8:
        return picture
    if picture.dtype == torch.bool:
        return picture.to(torch.uint8) * 255
    picture = picture if picture.is_floating_point() else picture.to(torch.int64)
    low, high = picture.min().item(), picture.max().item()
    if not picture.is_floating_point():
        if low < 0 or high > 255:
            advice = "scale them to it, samples of 16 bits by image // 257"
            raise ValueError(f"{name}: integers from {low} to {high} lie outside 0..255: {advice}")
        return picture.to(torch.uint8)
    if options.resize_backend == "pil":
        raise ValueError(
            f'{name}: resize_backend "pil" takes 8-bit images, not floats: pass resize_backend="torchvision"'
        )
    top = options.range
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name}: holds NaN or infinite pixels")
    if low < -1e-3 * top or high > 1.001 * top:
        raise ValueError(
            f"{name}: floats from {low:.4g} to {high:.4g} lie outside 0..{top:g} (do_rescale={options.do_rescale}): "
            "scale them to it"
        )
    if 0 < high <= 1 < top:
        raise ValueError(f"{name}: floats from {low:.4g} to {high:.4g} look rescaled already: pass do_rescale=False")
    return picture.float()


# Cutting: (B, 3, H, W) -> tiles


def _groups(pictures: list[torch.Tensor], device: torch.device) -> list[list[int]]:
    """Indices of the pictures to process together: those of one size and type, on an accelerator; on a CPU, where a
    batch is slower for being larger than the caches, each by itself."""
    if torch.device(device).type == "cpu":
        return [[index] for index in range(len(pictures))]
    groups = defaultdict(list)
    for index, picture in enumerate(pictures):
        groups[picture.shape, picture.dtype].append(index)
    return list(groups.values())


def _empty_tiles(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """float32 of a shape, to be filled. On a CPU numpy makes it, since it asks Linux for large pages, which
    are quicker to fill for the first time."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, device=device)


def _cut_tiles(batch: torch.Tensor, grid: tuple[int, int], options: SimpleNamespace) -> torch.Tensor:
    """(B, 3, H, W) -> tiles (B, rows, columns, 3, h, w)."""
    (columns, rows), (height, width) = grid, options.tile_size
    resize = _resize_with_pillow if options.resize_backend == "pil" else _resize_as_pillow
    canvas = resize(batch, (rows * height, columns * width), options)
    return rearrange(canvas, "b c (r h) (k w) -> b r k c h w", r=rows, k=columns)


def _resize_as_pillow(batch: torch.Tensor, size: tuple[int, int], options: SimpleNamespace) -> torch.Tensor:
    """
    (B, 3, H, W) -> (B, 3, *size), within 2/255 of Pillow: one dimension after the other in Pillow's order, each pass
    clipped (and 8-bit values rounded), as Pillow clips and rounds between its own.
    """
    lost_rows, lost_columns = batch.shape[-2] - size[0], batch.shape[-1] - size[1]
    vertical_first = PILLOW_CHOOSES_PASS and lost_rows > 0 and lost_rows > 2 * lost_columns
    between = (size[0], batch.shape[-1]) if vertical_first else (batch.shape[-2], size[1])
    for step in (between, size):
        batch = tvF.resize(batch, list(step), interpolation=TENSOR_FILTERS[options.resample], antialias=True)
        if batch.is_floating_point():
            batch = batch.clamp(0, options.range)
    return batch


def _resize_with_pillow(batch: torch.Tensor, size: tuple[int, int], options: SimpleNamespace) -> torch.Tensor:
    pictures = (Image.fromarray(picture) for picture in batch.permute(0, 2, 3, 1).cpu().numpy())
    resized = [np.array(picture.resize(size[::-1], options.resample)) for picture in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def _normalize_into(target: torch.Tensor, tiles: torch.Tensor, options: SimpleNamespace) -> None:
    """Tiles (..., 3, h, w) of any type into the float32 `target`, rescaled and normalized."""
    target.copy_(tiles)
    mean, std = options.image_mean.to(target.device), options.image_std.to(target.device)
    if options.resize_backend == "pil":  # step by step, as ToTensor and Normalize
        if options.do_rescale:
            target.div_(1 / options.rescale_factor)
        if options.do_normalize:
            target.sub_(mean).div_(std)
        return
    scale = options.rescale_factor if options.do_rescale else 1.0
    if options.do_normalize:
        target.mul_(scale / std).sub_(mean / std)
    elif options.do_rescale:
        target.mul_(scale)


def _names_image_processor(config: Path) -> bool:
    """Whether a config.json says where transformers finds the image processor."""
    return config.is_file() and "AutoImageProcessor" in json.loads(config.read_text("utf-8")).get("auto_map", {})


SAILViTImageProcessor.register_for_auto_class()

__all__ = ["SAILViTImageProcessor", "choose_tile_grid", "open_image", "tile_grids"]
