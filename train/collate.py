# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Batches: samples -> tokens, labels and tiles -> packs, each one row of tensors that `model(**pack.inputs)` takes.

A sample is one conversation, or several that do not depend on each other and show the same tiles, encoded once. Their
prefix, all up to the last visual token, is in the row once if they share it (see attention.py).

Shapes: S tokens of a sample or a pack, n tiles, m >= n tiles that its conversations show together, h and w the height
and width of a tile in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from ..image_processing_sailvit import SAILViTImageProcessor
from ..processing_sailvl import SAILVLProcessor
from .attention import Segment
from .formats import BadSample, Sample


if TYPE_CHECKING:
    from .corpus import Corpus

IGNORED = -100  # the label of a position without loss, in torch and transformers


@dataclass(frozen=True)
class EncodedSample:
    """
    Tokens, labels and tiles of a sample.

    Attributes:
        input_ids: (S,) int64, visual tokens included.
        labels: (S,) int64: the token at positions of answers and their end of turn, else -100.
        tiles: (n, 3, h, w), float32 pixel_values or uint8; None without images.
        tile_indices: (m,) int64, the tiles that its conversations show; None if each is shown once, in order.
        splits: Tokens of each of its conversations; () if it is one.
        prefix: Tokens at the start of the first conversation that belong to all of them; 0 if each has its own.
        kinds: The kind of each of its conversations; () if all are of the kind of the sample.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    tiles: torch.Tensor | None = None
    tile_indices: torch.Tensor | None = None
    splits: tuple[int, ...] = ()
    prefix: int = 0
    kinds: tuple[str, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each of its conversations; of those after the first without the shared prefix."""
        return self.splits or (len(self.input_ids),)

    @property
    def segments(self) -> list[Segment]:
        """Its conversations: one segment if they share a prefix, else one of each."""
        return [Segment(self.lengths, self.prefix)] if self.prefix else [Segment((n,)) for n in self.lengths]


@dataclass
class Pack:
    """
    Samples of one micro-step of one rank, in one row.

    Attributes:
        inputs: Arguments of the model: input_ids, labels, position_ids (1, S), use_cache=False, and pixel_values
            (n, 3, h, w) if there are tiles, tile_indices (m,) if some are shown several times.
        samples: Corpus indices of its samples.
        segments: Their conversations, with the tokens of each.
        skipped: (corpus index, reason) of the samples that were left out.
        answers: Positions with a label of each conversation; of next-patch prediction predicted patches of each sample.
        conversations: The number of conversations of each sample.
        kinds: The kind of each conversation; None if it is that of its sample.
    """

    inputs: dict[str, Any]
    samples: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    conversations: list[int] = field(default_factory=list)
    kinds: list[str | None] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each conversation; of those after the first of a segment without its prefix."""
        return [length for segment in self.segments for length in segment.lengths]

    @property
    def num_labels(self) -> int:
        """Positions with a label."""
        return sum(self.answers)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Pack":
        """Return the pack with its tensors on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Pack":
        """Return the pack with its tensors in pinned memory; `DataLoader(pin_memory=True)` calls it."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Pack":
        inputs = self.inputs.items()
        return replace(self, inputs={k: function(v) if isinstance(v, torch.Tensor) else v for k, v in inputs})


def encode_sample(sample: Sample, processor: SAILVLProcessor, uint8_tiles: bool = False) -> EncodedSample:
    """
    Turn a sample into tokens, labels and tiles. Only answers of the assistant and their end of turn have a label.

    Its conversations follow each other; each has its own placeholders of the same tiles, or they share those of the
    first.

    Args:
        uint8_tiles: Return the tiles as uint8, before they are rescaled and normalised; see `normalize_tiles`.

    Raises:
        BadSample: An image or video cannot be read, or nothing is left to learn from.
    """
    conversations = sample.conversations
    options = {**sample.options, **({"do_rescale": False, "do_normalize": False} if uint8_tiles else {})}
    options |= {"return_assistant_tokens_mask": True, "return_tile_indices": len(conversations) > 1}
    try:
        batch = processor.apply_chat_template(conversations, tokenize=True, return_dict=True, **options)
    except ImportError:  # of PyAV, which all videos need
        raise
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise BadSample(" ".join(str(error).split()) or type(error).__name__) from error
    ids = [torch.tensor(row) for row in batch["input_ids"]]
    labels = [_labels(*row) for row in zip(ids, batch["assistant_masks"], strict=True)]
    tiles, indices, prefix = batch.get("pixel_values"), None, 0
    if tiles is not None and len(ids) > 1:  # all show the same tiles, in the same order
        tiles = tiles[batch["tile_indices"][: len(batch["tile_indices"]) // len(ids)]]
        indices = torch.arange(len(tiles)).repeat(len(ids))
    if sample.share_prompt and len(ids) > 1:
        prefix, indices = _prefix(ids, processor), None
        ids, labels = ([rows[0], *(row[prefix:] for row in rows[1:])] for rows in (ids, labels))
    return EncodedSample(
        torch.cat(ids),
        torch.cat(labels),
        tiles.to(torch.uint8) if uint8_tiles and tiles is not None else tiles,
        indices,
        tuple(map(len, ids)),
        prefix,
        sample.turn_kinds[: len(ids)],  # fewer if it is truncated
    )


def _prefix(conversations: Sequence[torch.Tensor], processor: SAILVLProcessor) -> int:
    """Return the number of tokens up to the last visual one, which conversations have in common."""
    first, *others = conversations
    prefix = 1 + int((first == processor.image_token_ids[-1]).nonzero()[-1])
    if not all(torch.equal(other[:prefix], first[:prefix]) for other in others):
        raise BadSample(
            "independent turns: expected the same tokens up to the last image in all of them, got different ones: let "
            "the chat template put images before texts"
        )
    return prefix


def _labels(ids: torch.Tensor, mask: list[int]) -> torch.Tensor:
    """Return the labels of a conversation."""
    labels = ids.masked_fill(torch.tensor(mask) == 0, IGNORED)
    labels[:1] = IGNORED  # its prediction would come from the conversation before it in the pack
    if (labels == IGNORED).all():
        raise BadSample("expected an answer of the assistant, got none")
    return labels


def normalize_tiles(tiles: torch.Tensor, image_processor: SAILViTImageProcessor) -> torch.Tensor:
    """
    Return uint8 tiles as float32 pixel_values (n, 3, h, w), on their device.

    The result is equal, to the bit, to what the image processor returns if it normalises the tiles itself.
    """
    return image_processor(tiles, do_tile=False, return_tensors="pt")["pixel_values"]


def collate(
    encoded: Sequence[EncodedSample],
    samples: Sequence[int] = (),
    skipped: Sequence[tuple[int, str]] = (),
    pad_token_id: int = 0,
    flash_attention: bool = False,
) -> Pack:
    """
    Concatenate samples to a pack.

    Attention keeps the conversations apart: sdpa and eager attention of transformers by position_ids that restart at
    each one, without an attention mask and with use_cache=False; FlashAttention by their boundaries. Conversations
    that share a prefix need the mask, see `attention_arguments`.

    Without samples the pack is one padding token without a label: its loss is 0 if num_items_in_batch is passed to the
    model, and not a number (a mean over nothing) if it is not.

    Args:
        samples: Corpus indices of `encoded`.
        skipped: (corpus index, reason) of samples that belong to the pack but could not be read.
        flash_attention: Add cu_seq_lens_q, cu_seq_lens_k (conversations + 1) int32 and max_length_q, max_length_k.

    Raises:
        ValueError: Conversations share a prefix, which FlashAttention does not know.
    """
    rows = list(encoded) or [EncodedSample(torch.tensor([pad_token_id]), torch.tensor([IGNORED]))]
    lengths = [length for row in rows for length in row.lengths]
    segments = [segment for row in rows for segment in row.segments]
    inputs = {
        "input_ids": torch.cat([row.input_ids for row in rows])[None],
        "labels": torch.cat([row.labels for row in rows])[None],
        "position_ids": torch.cat([segment.position_ids() for segment in segments])[None],
        "use_cache": False,
    }
    inputs["labels"][0, [0, *accumulate(lengths[:-1])]] = IGNORED
    inputs |= _concatenate_tiles([row for row in rows if row.tiles is not None])
    if flash_attention:
        if any(segment.prefix for segment in segments):
            raise ValueError("flash_attention: expected conversations with prefixes of their own, got a shared one")
        boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
        inputs |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    answers = [int((labels != IGNORED).sum()) for labels in inputs["labels"][0].split(lengths)]
    return Pack(
        inputs,
        samples=list(samples),
        segments=segments if encoded else [],
        skipped=list(skipped),
        answers=answers if encoded else [],
        conversations=[len(row.lengths) for row in encoded],
        kinds=[kind for row in encoded for kind in row.kinds or [None] * len(row.lengths)],
    )


def _concatenate_tiles(rows: list[EncodedSample]) -> dict[str, torch.Tensor]:
    """Return the arguments of the model for the tiles of samples with tiles."""
    if not rows:
        return {}
    inputs = {"pixel_values": torch.cat([row.tiles for row in rows])}
    if all(row.tile_indices is None for row in rows):
        return inputs
    shown = [torch.arange(len(row.tiles)) if row.tile_indices is None else row.tile_indices for row in rows]
    starts = accumulate((len(row.tiles) for row in rows), initial=0)
    return inputs | {
        "tile_indices": torch.cat([start + indices for start, indices in zip(starts, shown, strict=False)])
    }


def read_pack(
    corpus: "Corpus", indices: Sequence[int], uint8_tiles: bool = False, flash_attention: bool = False
) -> Pack:
    """
    Read samples of a corpus and return their pack.

    A sample that cannot be read, or whose tokens or tiles are not those that it was planned with, is left out and
    listed in `skipped`.
    """
    encoded, samples, skipped = [], [], []
    for index in indices:
        try:
            sample = encode_sample(corpus[index], corpus.processor, uint8_tiles)
            _check_lengths(sample, int(corpus.tokens[index]), int(corpus.tiles[index]))
        except BadSample as error:
            skipped.append((index, str(error)))
            continue
        encoded.append(sample)
        samples.append(index)
    tokenizer = corpus.processor.tokenizer
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return collate(encoded, samples, skipped, pad_token_id, flash_attention)


def _check_lengths(sample: EncodedSample, tokens: int, tiles: int) -> None:
    got = (len(sample.input_ids), 0 if sample.tiles is None else len(sample.tiles))
    if got != (tokens, tiles):
        raise BadSample(
            f"expected {tokens} tokens and {tiles} tiles, as measured from headers, got {got[0]} and {got[1]}: a file "
            "changed since, or a video has fewer frames than its header says"
        )
