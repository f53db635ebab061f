"""Encode a stream of images in micro-batches of tiles."""

import signal
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, Dataset

from ..image_processing_sailvit import SAILViTImageProcessor
from ..modeling_sailvit import SAILViTModel
from .onnx_model import OnnxEncoder


@dataclass
class EncodedImage:
    """The visual tokens of one image, or the error of a broken one."""

    source: str
    tokens: torch.Tensor | None = None  # (tiles, N / f^2, f^2 * D), the thumbnail last
    grid: tuple[int, int] | None = None  # columns, rows
    error: str | None = None
    warnings: list[str] = field(default_factory=list)  # of the image processor, each with the image's source


class TiledImages(Dataset):
    """Paths or URLs as a dataset of tiles; a broken image is an item with an error."""

    def __init__(self, sources: list[str], processor: SAILViTImageProcessor):
        self.sources = sources
        self.processor = processor

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[EncodedImage, torch.Tensor]:
        """Return the image without tokens, and its tiles (tiles, 3, h, w), none if it is broken."""
        image, tiles = EncodedImage(self.sources[index]), torch.empty(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                batch = self.processor(image.source)
                image.grid, tiles = tuple(batch["tile_grids"][0].tolist()), batch["pixel_values"]
            except ValueError as error:
                image.error = str(error)
        messages = [" ".join(str(warning.message).split()) for warning in caught]
        prefix = f"image ({image.source}): "  # of the processor's messages
        image.warnings = [f"{image.source}: {message.removeprefix(prefix)}" for message in messages]
        return image, tiles


def encode_images(
    sources: list[str],
    model: SAILViTModel | OnnxEncoder,
    processor: SAILViTImageProcessor,
    batch_size: int = 8,
    workers: int = 0,
) -> Iterator[EncodedImage]:
    """
    Yield every image in order, its tokens on the CPU in the dtype of the model.

    The model runs on `batch_size` tiles at a time, of one or several images. Memory holds the tiles of those images.

    Args:
        sources: Paths or URLs.
        model: A vision tower in evaluation mode, on its device, or a session of onnxruntime.
        batch_size: Tiles in a micro-batch.
        workers: Processes that read and tile images ahead.

    Raises:
        ValueError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    loader = DataLoader(
        TiledImages(sources, processor), batch_size=None, num_workers=workers, worker_init_fn=_start_worker
    )
    queue: deque[_QueuedImage] = deque()
    for image, tiles in loader:
        queue.append(_QueuedImage(image, tiles))
        while sum(len(entry.tiles) for entry in queue) >= batch_size:
            _encode_next(model, queue, batch_size)
        yield from _pop_encoded(queue)
    if any(len(entry.tiles) for entry in queue):
        _encode_next(model, queue, batch_size)
    yield from _pop_encoded(queue)


@dataclass
class _QueuedImage:
    """An image with the tiles (tiles, 3, h, w) not yet encoded, and the tokens of the others."""

    image: EncodedImage
    tiles: torch.Tensor
    tokens: list[torch.Tensor] = field(default_factory=list)


def _encode_next(model: SAILViTModel | OnnxEncoder, queue: Iterable[_QueuedImage], batch_size: int) -> None:
    """Encode one micro-batch of the first tiles in the queue, and give every image its tokens."""
    chunks: list[tuple[_QueuedImage, torch.Tensor]] = []
    for entry in queue:
        chunk, entry.tiles = entry.tiles[:batch_size], entry.tiles[batch_size:]
        batch_size -= len(chunk)
        if len(chunk):
            chunks.append((entry, chunk))
    tokens = _encode(model, torch.cat([tiles for _, tiles in chunks]))
    for (entry, _), split in zip(chunks, tokens.split([len(tiles) for _, tiles in chunks]), strict=True):
        entry.tokens.append(split)


def _start_worker(worker: int) -> None:
    """Ignore Ctrl-C, which the parent handles: it must not interrupt the handshake that passes tensors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.multiprocessing.set_sharing_strategy("file_system")


@torch.inference_mode()
def _encode(model: SAILViTModel | OnnxEncoder, tiles: torch.Tensor) -> torch.Tensor:
    return model.get_image_features(tiles.to(model.device)).cpu()


def _pop_encoded(queue: deque[_QueuedImage]) -> Iterator[EncodedImage]:
    while queue and not len(queue[0].tiles):
        entry = queue.popleft()
        entry.image.tokens = torch.cat(entry.tokens) if entry.tokens else None
        yield entry.image
