"""Streams images through a tower in micro-batches of tiles."""

import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig

from ..configuration_sailvit import SAILViTConfig
from ..convert.storage.sources import check_name
from ..devices import choose_device, choose_dtype, dtype_name
from ..image_processing_sailvit import SAILViTImageProcessor
from ..modeling_sailvit import SAILViTModel


SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LONGEST_NAME = 255 - len(".safetensors.part")  # bytes of a file name, on the usual file systems


@dataclass
class EncodedImage:
    """Tokens of one image, or why there are none."""

    source: str
    tokens: torch.Tensor | None = None  # (tiles, N / f^2, f^2 * D), the thumbnail last
    grid: tuple[int, int] | None = None  # columns, rows
    error: str | None = None
    warnings: list[str] = field(default_factory=list)  # what the processor warned of, each with the image's name


class TiledImages(Dataset):
    """Paths or URLs as a data set of tiles; a broken image is an item that says so."""

    def __init__(self, sources: list[str], processor: SAILViTImageProcessor):
        self.sources = sources
        self.processor = processor

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[EncodedImage, torch.Tensor]:
        """The image without its tokens, and its tiles (tiles, 3, h, w), none if it is broken."""
        image, tiles = EncodedImage(self.sources[index]), torch.empty(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                batch = self.processor(image.source)
                image.grid, tiles = tuple(batch["tile_grids"][0].tolist()), batch["pixel_values"]
            except ValueError as error:
                image.error = str(error)
        said = [" ".join(str(warning.message).split()) for warning in caught]
        called = f"image ({image.source}): "  # by the processor
        image.warnings = [f"{image.source}: {line.removeprefix(called)}" for line in said]
        return image, tiles


def load_config(path: str) -> SAILViTConfig:
    """
    The configuration of a tower, from a folder or a Hub name.

    Raises:
        ValueError: There is no such folder, or it is no SAILViT; the message names it.
    """
    check_name(path)
    if Path(path).is_file():
        raise ValueError(f"{path}: expected a SAILViT folder, got a file: `sailvit convert` makes a folder of it")
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "sailvit":
        raise ValueError(f"{path}: model_type is {config.model_type!r}, not 'sailvit'")
    return config


def load_tower(
    path: str,
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype = "auto",
    log: Callable[[str], None] = lambda line: None,
) -> SAILViTModel:
    """
    A tower ready to encode, from a folder or a Hub name, every weight of it accounted for; a classifier's head is left.

    Args:
        path: The folder, or the name on the Hub.
        device: To run on; None for a GPU if there is one.
        dtype: To compute in; "auto" for what `choose_dtype` says of the stored one and the device.
        log: Called with each progress message.

    Raises:
        ValueError: It is no SAILViT, or weights are missing, too many or of another shape; the message names them. Or
            the device cannot be used.
    """
    load_config(path)
    device = choose_device(device)
    try:
        model, report = SAILViTModel.from_pretrained(
            path, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except SafetensorError as error:
        raise ValueError(f"{path}: the weights cannot be read, copy them again: {error}") from error
    unexpected = [name for name in report["unexpected_keys"] if not name.startswith("classifier.")]
    wrong = {"missing": report["missing_keys"], "mismatched": report["mismatched_keys"], "unexpected": unexpected}
    for kind, names in wrong.items():
        if names:
            raise ValueError(f"{path}: {kind} keys in the checkpoint: {', '.join(map(str, names))}")
    compute_dtype, reason = choose_dtype(model.dtype, device, dtype)
    log(f"runs on {device} in {dtype_name(compute_dtype)}: {reason}")
    return model.to(device, compute_dtype).eval()


def find_images(inputs: Iterable[str]) -> dict[str, str]:
    """
    Every image that files, URLs and folders (searched through) name -> the name to write its tokens under.

    Raises:
        ValueError: An input does not exist, a folder holds no image, two images would be written to one name, or a name
            cannot be written.
    """
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for entry in inputs:
        for source, name in _images_of(entry):
            if not name or not name.isprintable() or len(os.fsencode(Path(name).name)) > LONGEST_NAME:
                raise ValueError(f"{source[:120]!a}: tokens cannot be written under the name {name[:120]!a}: rename it")
            if taken.setdefault(name, source) != source:
                raise ValueError(f"{source} and {taken[name]} would both be written as {name}: encode them apart")
            found[source] = name
    return found


def _images_of(entry: str) -> list[tuple[str, str]]:
    """The images that one file, URL or folder stands for, each with its name within it."""
    path = Path(entry)
    if entry[:8].lower().startswith(("http://", "https://", "file://")):
        return [(entry, entry.split("?")[0].rsplit("/", 1)[-1])]
    if not entry.strip() or not _exists(path):
        raise ValueError(f"{entry[:120]!r}: no such image: expected a file, a folder or a URL (http, https, file)")
    if path.is_file():
        return [(entry, path.name)]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{entry}: no image in this folder ({', '.join(sorted(SUFFIXES))})")
    return [(str(file), str(file.relative_to(path))) for file in files]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a name: a picture in base64, say
        return False


def encode_images(
    sources: list[str],
    model: SAILViTModel,
    processor: SAILViTImageProcessor,
    batch_size: int = 8,
    workers: int = 0,
) -> Iterator[EncodedImage]:
    """
    Yields every image in order, its tokens on the CPU in the dtype of the model. The tower sees `batch_size` tiles at a
    time, gathered across images; memory holds those and the tiles of the images they belong to.

    Args:
        sources: Paths or URLs.
        model: A tower in evaluation mode, on its device.
        batch_size: Tiles in a micro-batch.
        workers: Processes that read and tile ahead.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    loader = DataLoader(
        TiledImages(sources, processor), batch_size=None, num_workers=workers, worker_init_fn=_start_worker
    )
    waiting: deque[_Waiting] = deque()
    for image, tiles in loader:
        waiting.append(_Waiting(image, tiles))
        while sum(len(entry.tiles) for entry in waiting) >= batch_size:
            _encode_next(model, waiting, batch_size)
        yield from _finished(waiting)
    if any(len(entry.tiles) for entry in waiting):
        _encode_next(model, waiting, batch_size)
    yield from _finished(waiting)


@dataclass
class _Waiting:
    """An image some of whose tiles (tiles, 3, h, w) are still to be encoded."""

    image: EncodedImage
    tiles: torch.Tensor
    tokens: list[torch.Tensor] = field(default_factory=list)


def _encode_next(model: SAILViTModel, waiting: Iterable[_Waiting], batch_size: int) -> None:
    """Runs one micro-batch, of the first tiles that wait, and hands the tokens to their images."""
    shares: list[tuple[_Waiting, torch.Tensor]] = []
    for entry in waiting:
        share, entry.tiles = entry.tiles[:batch_size], entry.tiles[batch_size:]
        batch_size -= len(share)
        if len(share):
            shares.append((entry, share))
    tokens = _encode(model, torch.cat([tiles for _, tiles in shares]))
    for (entry, _), part in zip(shares, tokens.split([len(tiles) for _, tiles in shares]), strict=True):
        entry.tokens.append(part)


def _start_worker(worker: int) -> None:
    """Ctrl-C is the parent's to answer, and must not find it in the handshake that passes tensors by descriptor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.multiprocessing.set_sharing_strategy("file_system")


@torch.inference_mode()
def _encode(model: SAILViTModel, tiles: torch.Tensor) -> torch.Tensor:
    return model.get_image_features(tiles.to(model.device)).cpu()


def _finished(waiting: deque[_Waiting]) -> Iterator[EncodedImage]:
    while waiting and not len(waiting[0].tiles):
        entry = waiting.popleft()
        entry.image.tokens = torch.cat(entry.tokens) if entry.tokens else None
        yield entry.image
