"""
Similarity of the features of encoders: linear CKA by block, and the tokens of a few images for pictures.

CKA is centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414), estimated from minibatches with the unbiased
HSIC of Song et al. 2012, as Nguyen, Raghu and Kornblith 2021 (arXiv 2010.15327) do. The samples are patch tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from ..datasets import decode
from ..encoders import LAST, Encoder, blocks_of, load_encoder


IMAGES_PER_BATCH = 8
BATCH_SAMPLES = 1024  # tokens of a minibatch, drawn at random from its images, the same for all encoders
FEWEST_SAMPLES = 4  # that the unbiased HSIC needs


def unbiased_hsic(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    Return the unbiased HSIC of two Gram matrices (n, n), n >= 4: equation 3 of Nguyen et al.

    Raises:
        ValueError: There are fewer than 4 samples.
    """
    n = len(first)
    if n < FEWEST_SAMPLES:
        raise ValueError(f"unbiased HSIC: expected at least {FEWEST_SAMPLES} samples, got {n}")
    first, second = (gram - torch.diag(gram.diagonal()) for gram in (first, second))
    product = first.sum() * second.sum() / ((n - 1) * (n - 2))
    mixed = (first.sum(0) * second.sum(0)).sum() / (n - 2)
    return ((first * second).sum() + product - 2 * mixed) / (n * (n - 3))


@dataclass
class MinibatchCKA:
    """Linear CKA of two representations of the same samples, from minibatches."""

    both: float = 0.0
    own: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def update(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Add a minibatch: features (n, D) and (n, E) of the same n samples, n >= 4."""
        grams = [_gram(first), _gram(second)]
        self.both += unbiased_hsic(*grams).item()
        self.own = [total + unbiased_hsic(gram, gram).item() for total, gram in zip(self.own, grams, strict=True)]

    def value(self) -> float | None:
        """Return the similarity, at most 1; None if one of the representations is constant."""
        if min(self.own) <= 0:
            return None
        return self.both / (self.own[0] * self.own[1]) ** 0.5


def _gram(features: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrix of centred features: HSIC does not depend on the mean, its rounding errors do."""
    features = features.double()
    features = features - features.mean(0)
    return features @ features.T


@dataclass(frozen=True)
class EncoderView:
    """
    What an encoder makes of images.

    Attributes:
        weights_hash: As in results.json of a probe.
        layers: Numbers of blocks, from 1, and LAST.
        similarity: For each layer, the CKA with the first encoder; None where it is undefined.
        tokens: (pictures, rows, columns, D), of unit length, of the first images.
    """

    weights_hash: str
    layers: tuple[int | str, ...]
    similarity: tuple[float | None, ...]
    tokens: torch.Tensor


def compare_encoders(
    names: Sequence[str],
    images: Sequence[Path],
    pictures: int,
    device: str | None = None,
    dtype: str = "float32",
    log: Callable[[str], None] = lambda line: None,
) -> list[EncoderView]:
    """
    Encode images with several encoders, one in memory at a time, and compare all with the first one.

    The tokens that are compared of the first encoder are in memory: 13 MB an image for 25 layers of width 1,024.

    Args:
        names: As `load_encoder` takes them.
        images: Files that can be read; each image is one tile, as the encoder's own preprocessing makes it.
        pictures: Of the first so many images all tokens of the last layer are returned.
        device: To run on; None for a GPU if there is one.
        dtype: To compute in, the same for all: rounding would look like a change.
        log: Called with each message.

    Raises:
        ValueError: An encoder cannot be loaded, has other blocks, patches or width than the first, or returns NaN.
    """
    views: list[EncoderView] = []
    expected: list[list[torch.Tensor]] = []  # the samples of the first encoder
    for name in names:
        views.append(_view(load_encoder(name, device=device, dtype=dtype, log=log), images, pictures, expected))
    return views


def _view(encoder: Encoder, images: Sequence[Path], pictures: int, expected: list[list[torch.Tensor]]) -> EncoderView:
    """Return the view of an encoder; `expected` are the samples of the first one, which fills it."""
    layers = (*range(1, len(blocks_of(encoder.model) or ()) + 1), LAST)
    tokens: list[torch.Tensor] = []
    batches = _samples(encoder, layers, images, tokens, pictures)
    if not expected:
        expected += batches
        batches = iter(expected)
    similarity = _similarity(encoder.name, expected, batches)
    unit = F.normalize(torch.stack(tokens), dim=-1).unflatten(1, _grid(encoder, tokens[0]))
    return EncoderView(encoder.weights_hash, layers, similarity, unit)


def _samples(
    encoder: Encoder, layers: Sequence[int | str], images: Sequence[Path], tokens: list[torch.Tensor], pictures: int
) -> Iterator[list[torch.Tensor]]:  # fmt: skip
    """Yield for each minibatch the samples (n, D) of every layer; append to `tokens` (N, D) of the first images."""
    for number, start in enumerate(range(0, len(images), IMAGES_PER_BATCH)):
        batch = images[start : start + IMAGES_PER_BATCH]
        pixels = torch.stack([encoder.preprocessing(decode(path.read_bytes())) for path in batch])
        found = encoder.patch_tokens(pixels, layers)
        if not all(one.isfinite().all() for one in found):
            raise ValueError(f"{encoder.name}: tokens are NaN or infinite: try --dtype float32")
        tokens.extend(found[-1][: max(pictures - start, 0)])
        generator = torch.Generator().manual_seed(number)
        chosen = torch.randperm(found[0].shape[1], generator=generator)[: BATCH_SAMPLES // len(batch)]
        yield [one[:, chosen].flatten(0, 1) for one in found]


def _similarity(
    name: str, expected: Sequence[list[torch.Tensor]], batches: Iterator[list[torch.Tensor]]
) -> tuple[float | None, ...]:
    """Return the CKA of each layer."""
    estimates = [MinibatchCKA() for _ in expected[0]]
    for first, second in zip(expected, batches, strict=True):
        sizes = [(len(samples) - 1, *samples[0].shape) for samples in (first, second)]
        if sizes[0] != sizes[1]:
            text = "{} blocks, {} tokens of a batch of images, width {}".format
            raise ValueError(
                f"{name}: expected {text(*sizes[0])}, as in the base, got {text(*sizes[1])}: name its base"
            )
        for estimate, *pair in zip(estimates, first, second, strict=True):
            estimate.update(*pair)
    return tuple(estimate.value() for estimate in estimates)


def _grid(encoder: Encoder, tokens: torch.Tensor) -> tuple[int, int]:
    """Return rows and columns of the patches of (N, D) tokens: patches are squares."""
    count, (_, height, width) = len(tokens), encoder.pixel_shape
    rows = round((count * height / width) ** 0.5)
    if not rows or count % rows:
        raise ValueError(f"{encoder.name}: expected a token for each square patch of {height} x {width}, got {count}")
    return rows, count // rows
