# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Image processor of SAILViT: cuts images into normalized 448-pixel tiles, as the released SAIL-VL code does.

    image -> RGB -> grid (columns x rows) of the nearest aspect ratio -> resize to the grid -> cut into tiles row by row
          -> with more than one tile, append the image resized to one tile (thumbnail) -> rescale, normalize

Shapes: n tiles of all images, in order; H and W the height and width of an image in pixels, h and w those of a tile.
"""

import base64
import difflib
import errno
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
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


try:
    from transformers.image_processing_backends import TorchvisionBackend
except ImportError:  # transformers < 5.4
    from transformers.image_processing_utils_fast import BaseImageProcessorFast as TorchvisionBackend

# Resize filters of torchvision for tensors whose results match Pillow's.
TENSOR_FILTERS = {
    Image.Resampling.NEAREST: tvF.InterpolationMode.NEAREST_EXACT,
    Image.Resampling.BILINEAR: tvF.InterpolationMode.BILINEAR,
    Image.Resampling.BICUBIC: tvF.InterpolationMode.BICUBIC,
}
# Pillow >= 13.0 resizes vertically first if the height shrinks much more than the width (Pillow pull request 9549).
PILLOW_ORDERS_PASSES = int(PIL.__version__.split(".")[0]) >= 13
# A 16-bit image whose values need no more bits than this probably has a lower bit depth, and would be read too dark.
SUSPECT_BITS = 14
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Any other string is a path or base64.
URL_SCHEMES = ("http://", "https://", "file://", "data:")
# Boolean options; None, which transformers keeps if it is passed to the constructor, counts as False.
BOOLEAN_OPTIONS = ("do_tile", "use_thumbnail", "msac", "do_exif_transpose", "do_rescale", "do_normalize")
# Upper limit for max_tiles, to catch mistakes: 1,024 tiles of 448 pixels are a 14,336-pixel square and 2.4 GB.
MAX_TILES_LIMIT = 1024
# Keys that transformers itself writes into preprocessor_config.json or passes to from_pretrained.
TRANSFORMERS_KEYS = {
    "auto_map",
    "backend",
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    "use_fast",
}


@lru_cache(maxsize=64)
def tile_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return all grids (columns, rows) of `min_tiles` to `max_tiles` tiles, sorted by tiles, then by columns."""
    grids = ((columns, rows) for columns in range(1, max_tiles + 1) for rows in range(1, max_tiles // columns + 1))
    return tuple(sorted((grid for grid in grids if math.prod(grid) >= min_tiles), key=math.prod))


def choose_tile_grid(
    width: int, height: int, min_tiles: int = 1, max_tiles: int = 8, tile_size: tuple[int, int] = (448, 448)
) -> tuple[int, int]:
    """
    Return the grid (columns, rows) whose aspect ratio is nearest to that of an image.

    Of equally near grids the first one is taken, unless the image has more than half as many pixels as a later one (the
    rule of the released SAIL-VL and InternVL code).

    Args:
        width, height: Size of the image in pixels.
        min_tiles, max_tiles: Bounds on columns * rows.
        tile_size: (height, width) of a tile, in pixels.

    Raises:
        ValueError: The image is empty, or the bounds are not 1 <= min_tiles <= max_tiles <= 1,024.
    """
    if width < 1 or height < 1:
        raise ValueError(f"expected an image of at least 1 x 1 pixels, got {width} x {height} (width x height)")
    if not 1 <= min_tiles <= max_tiles <= MAX_TILES_LIMIT:
        raise ValueError(
            f"expected 1 <= min_tiles <= max_tiles <= {MAX_TILES_LIMIT}, got min_tiles={min_tiles}, "
            f"max_tiles={max_tiles}"
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
    Return the second grid (columns, rows) of msac (multi-scale adaptive cropping).

    It is chosen like the first one, among the grids whose columns or rows do not divide those of the first grid, so
    that the two are cut along different lines; (1, 1) if there is none.
    """
    columns, rows = first
    candidates = [grid for grid in tile_grids(min_tiles, max_tiles) if columns % grid[0] or rows % grid[1]]
    return _nearest_grid(candidates, width, height, tile_size)


def _nearest_grid(
    grids: Sequence[tuple[int, int]], width: int, height: int, tile_size: tuple[int, int]
) -> tuple[int, int]:
    tile_height, tile_width = tile_size
    best, best_distance = (1, 1), math.inf
    for columns, rows in grids:
        distance = abs(width / height - columns * tile_width / (rows * tile_height))
        is_large = width * height > 0.5 * tile_height * tile_width * columns * rows
        if distance < best_distance or (distance == best_distance and is_large):
            best, best_distance = (columns, rows), distance
    return best


class SAILViTImageProcessorKwargs(TypedDict, total=False):
    """All options of SAILViTImageProcessor, for the constructor and for a call."""

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
    """
    A BatchFeature with the alias `num_patches_list`, InternVL's name for `num_tiles`, as a list of numbers.

    The alias is not a key, so `model(**batch)` does not pass it on.
    """

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
    Image processor that cuts images into tiles. Options are set in the constructor or per call; unknown ones raise.

    Args:
        do_tile: Cut an image into the grid of tiles with the nearest aspect ratio; `False` resizes it to one tile.
        min_tiles, max_tiles: Bounds on the number of tiles of an image, without the thumbnail.
        use_thumbnail: If there is more than one tile, append the whole image, resized to one tile.
        msac: Multi-scale adaptive cropping: also cut the image into a second grid (`choose_second_grid`), as in the
            evaluation of SAIL-VL. The order is: first grid, second grid, thumbnail; the tile of a 1 x 1 grid is last.
        size: Size of a tile in pixels: `{"height": h, "width": w}`, `(h, w)`, or one number for both.
        resample: Resize filter, a `PIL.Image.Resampling`.
        resize_backend: `"torchvision"`, fast and within 2/255 of Pillow, or `"pil"`, bit-equal to the released code
            (Pillow and the arithmetic of torchvision's ToTensor and Normalize).
        do_exif_transpose: Rotate an image according to its EXIF orientation. The released code does not.
        do_rescale, rescale_factor: Multiply by 1/255. If False, 8-bit images stay in 0..255 and floats in 0..1.
        do_normalize, image_mean, image_std: Subtract the mean and divide by the standard deviation, per channel; the
            ImageNet statistics by default.
        input_data_format: `"channels_first"` or `"channels_last"`, for arrays and tensors of ambiguous shape.
        device: Device for resizing and normalizing; by default that of the image.
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
        self.check_option_names(kwargs)
        if kwargs.get("size") is not None:  # transformers would interpret one number as the shortest edge
            kwargs["size"] = dict(zip(("height", "width"), _height_and_width(kwargs["size"]), strict=True))
        super().__init__(**kwargs)
        self._options({})

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        As in transformers, except that a misspelt option raises an error.

        Other unknown keys are accepted: pipelines pass the arguments of the model here, too.
        """
        cls.check_option_names({key: None for key in kwargs if cls._nearest_option(key)})
        overrides = {key: kwargs.pop(key) for key in cls.valid_kwargs.__annotations__.keys() & kwargs.keys()}
        return super().from_dict({**image_processor_dict, **overrides}, **kwargs)  # transformers < 5 skips validation

    def to_dict(self) -> dict[str, Any]:
        """
        Return the options only; None is kept where it is not the default.

        `auto_map` is left to config.json: in preprocessor_config.json it makes transformers < 5.4 warn about slow and
        fast processors, and ask for trust_remote_code even if the package is imported.
        """
        saved = self.valid_kwargs.__annotations__.keys() - {"device", "return_tensors"}  # options of a call only
        options = {key: value for key, value in super().to_dict().items() if key in saved}
        return {key: value for key, value in options.items() if not (value is None is getattr(type(self), key))}

    def preprocess(self, images: Any, **kwargs: Any) -> SAILViTBatchFeature:
        """
        Cut images into tiles, resize, rescale and normalize them.

        Args:
            images: One image or nested lists of images: PIL images of any mode, arrays or tensors (H, W),
                (H, W, channels), (channels, H, W) or batches of these, paths, URLs (http, https, file, data), base64.
                Values are 0..255; floats are 0..1 with `do_rescale=False`; 16-bit files are scaled to 8 bits, by their
                bit depth if the file specifies one. Alpha is dropped, as in the released code.
            kwargs: Options of the class, for this call only.

        Returns:
            pixel_values (n, 3, h, w) float32; num_tiles (images), thumbnails included; tile_grids (images, 2), columns
            and rows. `num_patches_list` is an alias that returns num_tiles as a list.

        Warns:
            UserWarning: A 16-bit image uses the lower bits only and its file specifies no bit depth, so it is read too
                dark; or the bit depth is below 16 and Pillow reads only the upper 8 bits.

        Raises:
            ValueError: An image cannot be read or tiled, or an option is out of range; the message names it.
            TypeError: An unknown option.
        """
        self.check_option_names(kwargs)
        options = self._options(kwargs)
        arrays = [_read_image(image, name, options) for name, image in _named_images(images)]
        if not arrays:
            raise ValueError("images is empty: expected at least one image")
        grids = [_choose_grid(array.shape[1], array.shape[0], options) for array in arrays]
        grids_per_image = [
            _all_grids(grid, array.shape[1], array.shape[0], options) for grid, array in zip(grids, arrays, strict=True)
        ]
        counts = [sum(map(math.prod, image_grids)) for image_grids in grids_per_image]
        data = {
            "pixel_values": self._fill_tiles(arrays, grids_per_image, counts, options),
            "num_tiles": torch.tensor(counts),
            "tile_grids": torch.tensor(grids),
        }
        return SAILViTBatchFeature(data=data, tensor_type=options.return_tensors)

    def to_rgb_image(self, image: Any, **kwargs: Any) -> Image.Image:
        """Return an image of any type that `preprocess` takes as the 8-bit RGB image that it cuts into tiles."""
        self.check_option_names(kwargs)
        options = self._options(kwargs)
        array = _read_image(image, "image", options)
        if array.is_floating_point():
            array = (array * (255 / options.max_value)).round().clamp(0, 255).byte()
        return Image.fromarray(array.cpu().numpy())

    def image_size(self, image: Any, **kwargs: Any) -> tuple[int, int]:
        """
        Return (height, width) in pixels of an image of any type that `preprocess` takes, as it is cut into tiles.

        Only the header of a file is read.

        Raises:
            ValueError: The image cannot be opened.
        """
        self.check_option_names(kwargs)
        return _size_in_header(image, self._options(kwargs))

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: Mapping[str, Any] | None = None
    ) -> int:
        """Return the number of tiles of an image of `height` x `width` pixels, its thumbnail included."""
        self.check_option_names(images_kwargs or {})
        return _count_tiles(height, width, self._options(images_kwargs or {}))

    def count_tiles(self, images: Sequence[Any], **kwargs: Any) -> list[int]:
        """
        Return the number of tiles of every image, of any type that `preprocess` takes; only headers of files are read.

        Raises:
            ValueError: An image cannot be opened.
        """
        self.check_option_names(kwargs)
        options = self._options(kwargs)
        return [_count_tiles(*_size_in_header(image, options), options) for image in images]

    def to_json_file(self, json_file_path: str | Path) -> None:
        """
        As in transformers, plus `auto_map` if the folder has no config.json that names the image processor class, as in
        the folder of an adapter.
        """
        fields = json.loads(self.to_json_string())
        if not _has_image_processor_entry(Path(json_file_path).with_name("config.json")):
            name = type(self).__name__
            auto_map = {self._auto_class: f"{type(self).__module__.rpartition('.')[2]}.{name}"}
            fields |= {"auto_map": auto_map, "image_processor_type": name}
        text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        Path(json_file_path).write_text(text, encoding="utf-8")

    def _fill_tiles(
        self,
        arrays: list[torch.Tensor],
        grids_per_image: list[list[tuple[int, int]]],
        counts: list[int],
        options: SimpleNamespace,
    ) -> torch.Tensor:
        """Cut arrays (H, W, 3) into normalized tiles (n, 3, h, w); arrays of one shape and dtype are batched."""
        device = options.device or arrays[0].device
        pixel_values = _empty_tiles((sum(counts), 3, *options.tile_size), device)
        image_tiles = pixel_values.split(counts)
        for indices in _batches(arrays, device):
            group = [arrays[index].to(device) for index in indices]
            batch = (torch.stack(group) if len(group) > 1 else group[0][None]).permute(0, 3, 1, 2)
            start = 0
            for grid in grids_per_image[indices[0]]:
                stop = start + math.prod(grid)
                for index, tiles in zip(indices, _cut_tiles(batch, grid, options), strict=True):
                    target = image_tiles[index][start:stop].unflatten(0, tiles.shape[:2])
                    _normalize_into(target, tiles, options)
                start = stop
        return pixel_values

    @classmethod
    def check_option_names(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise a TypeError that names the first unknown option in `kwargs` and the closest known one."""
        known = cls.valid_kwargs.__annotations__
        for key in kwargs:
            if key not in known and key not in TRANSFORMERS_KEYS and not key.startswith("_"):
                close = cls._nearest_option(key)
                hint = f"did you mean {close}?" if close else f"the options are {', '.join(known)}"
                raise TypeError(f"{cls.__name__} has no option {_short_repr(key)}; {hint}")

    @classmethod
    def _nearest_option(cls, key: str) -> str | None:
        return next(iter(difflib.get_close_matches(key, cls.valid_kwargs.__annotations__, n=1, cutoff=0.8)), None)

    def _options(self, overrides: Mapping[str, Any]) -> SimpleNamespace:
        """Return the validated options of a call, with `tile_size` (h, w), `max_value`, and mean and std (3, 1, 1)."""
        given = {name: overrides.get(name) for name in self.valid_kwargs.__annotations__}
        options = SimpleNamespace(**{k: getattr(self, k) if v is None else v for k, v in given.items()})
        options.tile_size = _height_and_width(options.size)
        if not (isinstance(options.rescale_factor, Real) and 0 < options.rescale_factor < math.inf):
            raise ValueError(f"rescale_factor must be positive, got {_short_repr(options.rescale_factor)}")
        options.max_value = 1 / options.rescale_factor if options.do_rescale else 1.0  # of floating-point images
        for name in ("image_mean", "image_std"):
            setattr(options, name, _channel_statistics(name, getattr(options, name)))
        _check_options(options)
        return options


def _check_options(options: SimpleNamespace) -> None:
    for name in ("min_tiles", "max_tiles"):
        if not _is_integer(getattr(options, name)):
            raise ValueError(f"{name} must be an integer, got {_short_repr(getattr(options, name))}")
    for name in BOOLEAN_OPTIONS:
        if not isinstance(getattr(options, name), (bool, np.bool_, type(None))):
            raise ValueError(f"{name} must be True or False, got {_short_repr(getattr(options, name))}")
    choose_tile_grid(1, 1, options.min_tiles, options.max_tiles)  # validates the bounds
    if options.resize_backend not in ("torchvision", "pil"):
        raise ValueError(f'resize_backend must be "torchvision" or "pil", got {_short_repr(options.resize_backend)}')
    if options.resample not in list(Image.Resampling):
        raise ValueError(f"resample must be a PIL.Image.Resampling, got {_short_repr(options.resample)}")
    if options.resize_backend == "torchvision" and options.resample not in TENSOR_FILTERS:
        raise ValueError(f'resample {Image.Resampling(options.resample).name} needs resize_backend="pil"')
    if options.input_data_format not in (None, "channels_first", "channels_last"):
        shown = _short_repr(options.input_data_format)
        raise ValueError(f'input_data_format must be "channels_first" or "channels_last", got {shown}')
    if not (options.image_std != 0).all():
        raise ValueError(f"image_std must not be zero, got {options.image_std.flatten().tolist()}")


def _short_repr(value: Any) -> str:
    return _shorten(repr(value))


def _shorten(text: str, limit: int = 120) -> str:
    """Shorten a string, such as an image in base64, for an error message."""
    return text if len(text) <= limit else f"{text[: limit - 23]}...{text[-20:]}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _height_and_width(size: Any) -> tuple[int, int]:
    """Return (h, w) from a number, a pair, a dict, or the SizeDict of transformers."""
    try:
        height, width = (size, size) if _is_integer(size) else (size["height"], size["width"])
    except (KeyError, TypeError):
        height, width = size if isinstance(size, (tuple, list)) and len(size) == 2 else (None, None)
    if not (_is_integer(height) and _is_integer(width) and height > 0 and width > 0):
        raise ValueError(f'size must be {{"height": pixels, "width": pixels}}, both positive, got {_short_repr(size)}')
    return int(height), int(width)


def _channel_statistics(name: str, values: float | Sequence[float]) -> torch.Tensor:
    """Return one number, or one number per channel, as a tensor (3, 1, 1)."""
    numbers = values if isinstance(values, (tuple, list)) else [values]
    if len(numbers) not in (1, 3) or not all(isinstance(n, Real) and math.isfinite(n) for n in numbers):
        raise ValueError(f"{name} must be one finite number or three finite numbers, got {_short_repr(values)}")
    return torch.tensor([float(number) for number in numbers]).expand(3).reshape(3, 1, 1)


def _choose_grid(width: int, height: int, options: SimpleNamespace) -> tuple[int, int]:
    bounds = (options.min_tiles, options.max_tiles) if options.do_tile else (1, 1)
    return choose_tile_grid(width, height, *bounds, tile_size=options.tile_size)


def _count_tiles(height: int, width: int, options: SimpleNamespace) -> int:
    return sum(map(math.prod, _all_grids(_choose_grid(width, height, options), width, height, options)))


def _all_grids(grid: tuple[int, int], width: int, height: int, options: SimpleNamespace) -> list[tuple[int, int]]:
    """Return the grids that an image is cut into, in order: its own, the second of msac, 1 x 1 for the thumbnail."""
    thumbnail = [(1, 1)] if options.use_thumbnail or grid == (1, 1) else []
    second = []
    if options.msac and options.do_tile:
        bounds = (options.min_tiles, options.max_tiles)
        second = [choose_second_grid(grid, width, height, *bounds, tile_size=options.tile_size)]
    return [*([grid] if grid != (1, 1) else []), *second, *thumbnail]


# Reading: an image of any type -> (H, W, 3), uint8 or float32


def _named_images(images: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every image of nested lists with its name for error messages."""
    if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4):
        for index, image in enumerate(images):
            yield from _named_images(image, f"{name}[{index}]")
    else:
        source = images if isinstance(images, (str, Path)) else getattr(images, "filename", "")
        yield f"image{name} ({_shorten(str(source))})" if source else f"image{name}", images


def _read_image(image: Any, name: str, options: SimpleNamespace) -> torch.Tensor:
    """Return an image of any type as (H, W, 3), uint8 or float32."""
    if isinstance(image, (str, Path)):
        with open_image(image, name) as opened:
            return _pil_to_array(opened, name, options)
    if isinstance(image, Image.Image):
        return _pil_to_array(image, name, options)
    if isinstance(image, np.ndarray) and image.dtype.kind in "buif":
        native = image.dtype.newbyteorder("=") if image.dtype.itemsize <= 8 else np.float64
        image = torch.from_numpy(image.astype(native))
    if not isinstance(image, torch.Tensor) or image.is_complex():
        is_file = isinstance(image, (bytes, bytearray, io.IOBase))
        hint = ": open it with PIL.Image.open (bytes as io.BytesIO(...)), or pass base64 as a string" if is_file else ""
        raise ValueError(
            f"{name}: expected a PIL image, an array, a tensor, a path or a URL, got {_type_name(image)}{hint}"
        )
    return _tensor_to_array(image.detach(), name, options)


def _type_name(image: Any) -> str:
    return f"{type(image).__name__} of {image.dtype}" if hasattr(image, "dtype") else type(image).__name__


def open_image(source: str | Path, name: str = "image") -> Image.Image:
    """
    Open an image without decoding its pixels.

    Args:
        source: A path, a URL (http, https, file, data), or the file in base64, as in transformers' `load_image`.
        name: Name of the image in error messages.

    Raises:
        ValueError: The image does not exist or cannot be opened.
    """
    try:
        if str(source)[:8].lower().startswith(URL_SCHEMES):
            request = urllib.request.Request(str(source), headers={"User-Agent": "sailvit"})
            with urllib.request.urlopen(request, timeout=60) as response:
                return _open_bytes(response.read())
        return _open_file_or_base64(source)
    except Exception as error:  # the client and Pillow's plugins raise nearly anything
        raise ValueError(f"{name}: cannot be opened as an image: {_shorten(str(error), 300)}") from error


def _open_file_or_base64(source: str | Path) -> Image.Image:
    try:
        return Image.open(source)
    except OSError as error:
        try:
            content = base64.b64decode("".join(str(source).split()), validate=True)
            return _open_bytes(content)
        except (OSError, ValueError):  # not base64, or not an image
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                raise ValueError(
                    "no such file, and not a (complete) image in base64; supported URLs: http, https, file, data"
                ) from error
            raise error from None


def _open_bytes(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # its message contains a memory address instead of a file name
        raise ValueError(f"these {len(content)} bytes are not an image that Pillow can read") from None


def _pil_to_array(image: Image.Image, name: str, options: SimpleNamespace) -> torch.Tensor:
    if not (image.width and image.height):
        raise ValueError(f"{name}: the image is empty: {image.width} x {image.height} pixels")
    try:
        stored, used = _sample_bits(image)
        image.load()
        if options.do_exif_transpose:
            image = ImageOps.exif_transpose(image)
        is_integer = image.mode == "I" or image.mode.startswith("I;16")
        array = np.array(image if is_integer or image.mode == "F" else _to_rgb(image))
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise ValueError(f"{name}: cannot be decoded to RGB: {_shorten(str(error), 300)}") from error
    if is_integer and stored:
        array = _scale_to_8_bits(array, stored, used, 0, name)
    elif stored == 16 and image.mode in ("RGB", "RGBA", "LA"):  # Pillow reads only the upper 8 bits of these
        array = _scale_to_8_bits(array, stored, used, 8, name)
    tensor = torch.from_numpy(array).reshape(image.height, image.width, -1)
    return _check_values(tensor.expand(-1, -1, 3), name, options)


def _size_in_header(image: Any, options: SimpleNamespace) -> tuple[int, int]:
    """Return (height, width) of an image as it is cut into tiles; of a file only the header is read."""
    if isinstance(image, (str, Path)):
        ((name, source),) = _named_images(image)
        with open_image(source, name) as opened:
            return _upright_size(opened, options)
    if isinstance(image, Image.Image):
        return _upright_size(image, options)
    return tuple(_read_image(image, "image", options).shape[:2])


def _upright_size(image: Image.Image, options: SimpleNamespace) -> tuple[int, int]:
    """Return (height, width) after the rotation that `do_exif_transpose` applies."""
    is_rotated = options.do_exif_transpose and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (image.width, image.height) if is_rotated else (image.height, image.width)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert with Pillow, a palette with alpha by way of RGBA, which avoids a warning."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _sample_bits(image: Image.Image) -> tuple[int | None, int | None]:
    """
    Return the stored and the used bits per sample according to the file; None if unknown.

    Call it before the pixels are decoded: decoding closes the file.
    """
    stored = 16 if image.mode.startswith("I;16") else None
    if image.format == "PNG":
        depth, used = _png_bits(image)
        return depth or stored, used
    if image.format == "PPM" and image.mode == "I":  # Pillow scales the samples to 16 bits
        return 16, None
    if image.format != "TIFF" or image.mode == "I":
        return stored, None
    depth, maximum = (int(np.max(image.tag_v2.get(tag, 0))) for tag in (258, 281))  # BitsPerSample, MaxSampleValue
    # MaxSampleValue may also be the maximum of the image: only 2^n - 1 is read as a bit depth.
    return depth or stored, maximum.bit_length() if maximum & (maximum + 1) == 0 else None


def _png_bits(image: Image.Image) -> tuple[int | None, int | None]:
    """Return bit depth and significant bits of a PNG from its chunks IHDR and sBIT, which Pillow does not expose."""
    file = getattr(image, "fp", None)
    if file is None or getattr(file, "closed", False):
        return None, None
    depth = used = None
    position = file.tell()
    file.seek(len(PNG_SIGNATURE))
    while len(header := file.read(8)) == 8 and (chunk := header[4:]) not in (b"IDAT", b"IEND"):
        size = int.from_bytes(header[:4], "big")
        if chunk == b"IHDR":
            depth = file.read(size)[8]
        elif chunk == b"sBIT":
            used = max(file.read(size))
        else:
            file.seek(size, io.SEEK_CUR)
        file.seek(4, io.SEEK_CUR)  # the checksum
    file.seek(position)
    return depth, used


def _scale_to_8_bits(samples: np.ndarray, stored: int, used: int | None, lost: int, name: str) -> np.ndarray:
    """
    Scale samples to 0..255 by the used bits if no sample exceeds them, else by the stored bits.

    Args:
        samples: As Pillow reads them, without the lower `lost` of the `stored` bits.
        used: Used bits according to the file; None if unknown.
        name: Name of the image in the warning about a bit depth that appears lower than the stored one.
    """
    highest = ((int(samples.max()) + 1) << lost) - 1
    bits = used if used and lost < used < stored and highest < 2**used else stored
    advice = "scale its samples to 16 bits"
    if bits == 16 and 0 < highest < 2**SUSPECT_BITS:
        tags = " or store the bit depth (sBIT in a PNG, MaxSampleValue in a TIFF)" if not lost else ""
        message = f"no 16-bit sample exceeds {highest}: if it has {highest.bit_length()} bits, it is read too dark"
        warnings.warn(f"{name}: {message}; {advice}{tags}", stacklevel=2)
    elif bits < stored and lost:
        message = f"only {bits - lost} of its {bits} bits, stored in {stored}, are read"
        warnings.warn(f"{name}: {message}; {advice}", stacklevel=2)
    top = (2**bits - 1) >> lost
    return samples if top == 255 and lost else (samples / (top / 255)).round().astype(np.uint8)


def _tensor_to_array(image: torch.Tensor, name: str, options: SimpleNamespace) -> torch.Tensor:
    if image.ndim == 2:
        return _check_values(image[..., None].expand(-1, -1, 3), name, options)
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"{name}: expected (H, W), (H, W, channels) or (channels, H, W), got {tuple(image.shape)}")
    if _channels_first(image.shape, name, options):
        image = image.permute(1, 2, 0)
    if image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"{name}: expected 1, 3 or 4 channels, got {image.shape[-1]} in {tuple(image.shape)}")
    return _check_values(image[..., :3].expand(-1, -1, 3), name, options)


def _channels_first(shape: torch.Size, name: str, options: SimpleNamespace) -> bool:
    """Return whether channels are the first dimension; 3 or 4 take precedence over 1."""
    if options.input_data_format is not None:
        return options.input_data_format == "channels_first"
    for channels in ((3, 4), (1,)):
        first, last = shape[0] in channels, shape[-1] in channels
        if first and last and shape[0] != 1:
            raise ValueError(f"{name}: {tuple(shape)} may be channels first or last: pass input_data_format")
        if first or last:
            return first and not last
    raise ValueError(f"{name}: no dimension of {tuple(shape)} is 1, 3 or 4 channels")


def _check_values(array: torch.Tensor, name: str, options: SimpleNamespace) -> torch.Tensor:
    """Return (H, W, 3) of any dtype as uint8 or float32 after checking the range of its values."""
    array = array.contiguous()
    if 0 in array.shape:
        raise ValueError(f"{name}: the array is empty: {tuple(array.shape)}")
    if array.dtype == torch.uint8:
        return array
    if array.dtype == torch.bool:
        return array.to(torch.uint8) * 255
    if array.is_floating_point():
        _check_floats(array, name, options)
        return array.float()
    array = array.to(torch.int64)
    low, high = array.min().item(), array.max().item()
    if low < 0 or high > 255:
        hint = "scale them, 16-bit samples by image // 257"
        raise ValueError(f"{name}: expected integers in 0..255, got {low} to {high}: {hint}")
    return array.to(torch.uint8)


def _check_floats(array: torch.Tensor, name: str, options: SimpleNamespace) -> None:
    if options.resize_backend == "pil":
        raise ValueError(
            f'{name}: resize_backend "pil" takes 8-bit images, not floats: pass resize_backend="torchvision"'
        )
    low, high, limit = array.min().item(), array.max().item(), options.max_value
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name}: contains NaN or infinite pixels")
    if low < -1e-3 * limit or high > 1.001 * limit:
        raise ValueError(
            f"{name}: expected floats in 0..{limit:g} (do_rescale={options.do_rescale}), got {low:.4g} to {high:.4g}: "
            "scale them"
        )
    if 0 < high <= 1 < limit:
        raise ValueError(f"{name}: floats from {low:.4g} to {high:.4g} appear to be rescaled: pass do_rescale=False")


# Cutting: (B, 3, H, W) -> tiles


def _batches(arrays: list[torch.Tensor], device: torch.device) -> list[list[int]]:
    """
    Return the indices of the arrays to process as one batch: on an accelerator those of one shape and dtype.

    On a CPU every array is processed by itself: a batch exceeds the caches and is slower.
    """
    if torch.device(device).type == "cpu":
        return [[index] for index in range(len(arrays))]
    groups = defaultdict(list)
    for index, array in enumerate(arrays):
        groups[array.shape, array.dtype].append(index)
    return list(groups.values())


def _empty_tiles(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Allocate an uninitialised float32 tensor; on a CPU with numpy, whose huge pages are faster to fill on Linux."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, device=device)


def _cut_tiles(batch: torch.Tensor, grid: tuple[int, int], options: SimpleNamespace) -> torch.Tensor:
    """Resize images (B, 3, H, W) to the grid and cut them into tiles (B, rows, columns, 3, h, w)."""
    (columns, rows), (height, width) = grid, options.tile_size
    resize = _resize_with_pillow if options.resize_backend == "pil" else _resize_like_pillow
    canvas = resize(batch, (rows * height, columns * width), options)
    return rearrange(canvas, "b c (r h) (k w) -> b r k c h w", r=rows, k=columns)


def _resize_like_pillow(batch: torch.Tensor, size: tuple[int, int], options: SimpleNamespace) -> torch.Tensor:
    """
    Resize (B, 3, H, W) to (B, 3, *size) with torchvision, within 2/255 of Pillow.

    Like Pillow, it resizes one dimension after the other, and clips (and for 8 bits rounds) after each pass.
    """
    shrink_y, shrink_x = batch.shape[-2] - size[0], batch.shape[-1] - size[1]
    vertical_first = PILLOW_ORDERS_PASSES and shrink_y > 0 and shrink_y > 2 * shrink_x
    intermediate = (size[0], batch.shape[-1]) if vertical_first else (batch.shape[-2], size[1])
    for target in (intermediate, size):
        batch = tvF.resize(batch, list(target), interpolation=TENSOR_FILTERS[options.resample], antialias=True)
        if batch.is_floating_point():
            batch = batch.clamp(0, options.max_value)
    return batch


def _resize_with_pillow(batch: torch.Tensor, size: tuple[int, int], options: SimpleNamespace) -> torch.Tensor:
    images = (Image.fromarray(array) for array in batch.permute(0, 2, 3, 1).cpu().numpy())
    resized = [np.array(image.resize(size[::-1], options.resample)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def _normalize_into(target: torch.Tensor, tiles: torch.Tensor, options: SimpleNamespace) -> None:
    """Copy tiles (..., 3, h, w) of any dtype into the float32 `target`, rescaled and normalized."""
    target.copy_(tiles)
    mean, std = options.image_mean.to(target.device), options.image_std.to(target.device)
    if options.resize_backend == "pil":  # in separate steps, like ToTensor and Normalize
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


def _has_image_processor_entry(config: Path) -> bool:
    """Return whether the `auto_map` of a config.json names the image processor class."""
    return config.is_file() and "AutoImageProcessor" in json.loads(config.read_text("utf-8")).get("auto_map", {})


SAILViTImageProcessor.register_for_auto_class()

__all__ = ["SAILViTImageProcessor", "choose_tile_grid", "open_image", "tile_grids"]
