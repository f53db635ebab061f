# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""What a corpus contains, and its samples as the model sees them: `sailvit data check`."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

from ..configuration_sailvit import SAILViTConfig
from ..configuration_sailvl import SAILVLConfig
from ..convert.storage.sources import check_name, find_source
from ..processing_sailvl import SAILVLProcessor
from .collate import IGNORED, EncodedSample, encode_sample
from .corpus import Corpus
from .formats import BadSample
from .order import permutation
from .packing import PackedBatches
from .tile_processor import TileProcessor


TRAINED = ("\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}")
TILES_PER_ROW = 8
# Model type -> its name in messages, and how to get such a folder.
TITLES = {"sailvl": "SAIL-VL", "sailvit": "SAILViT"}
FIXES = {
    "sailvl": "build one with `sailvit compose`, or convert a released one with `sailvit convert`",
    "sailvit": "make one with `sailvit convert SRC OUT --part vision`",
}


def load_processor(path: str | Path) -> tuple[SAILVLProcessor, SAILVLConfig]:
    """
    Return the processor and the config of a SAIL-VL folder or Hub name.

    Raises:
        ValueError: There is no such folder or name, it is no SAIL-VL, or its tokenizer and model do not match.
    """
    config = _load_config(path, "sailvl")
    processor = AutoProcessor.from_pretrained(path)
    vocabulary, rows = len(processor.tokenizer), config.text_config.vocab_size
    if vocabulary > rows:
        raise ValueError(f"{path}: the tokenizer has {vocabulary} tokens, the model embeds {rows}: use its tokenizer")
    for name in ("image_token_id", "image_seq_length"):
        ours, model = getattr(processor, name), getattr(config, name)
        if ours != model:
            raise ValueError(f"{path}: {name} is {ours} in the processor, {model} in config.json: use its processor")
    return processor, config


def load_tile_processor(path: str | Path) -> tuple[TileProcessor, SAILViTConfig]:
    """
    Return what makes tiles for a SAILViT folder or Hub name, and its config.

    Raises:
        ValueError: There is no such folder or name, it is no SAILViT, or its tiles have another size than its config.
        OSError: It has no preprocessor_config.json.
    """
    config = _load_config(path, "sailvit")
    image_processor = AutoImageProcessor.from_pretrained(path)
    size, expected = dict(image_processor.size), {"height": config.image_size, "width": config.image_size}
    if size != expected:
        raise ValueError(f"{path}: preprocessor_config.json: size: expected {expected} as in config.json, got {size}")
    return TileProcessor(image_processor, config.grid_size**2), config


def _load_config(path: str | Path, model_type: str) -> Any:
    check_name(str(path))
    if Path(path).is_file():
        raise ValueError(f"{path}: expected the folder of a {TITLES[model_type]}, got a file")
    if not Path(path).exists():
        find_source(str(path))  # one request; transformers would retry for half a minute if the Hub is unreachable
    config = AutoConfig.from_pretrained(path)
    if config.model_type != model_type:
        got = f"expected a {TITLES[model_type]}, got model_type {config.model_type!r}"
        raise ValueError(f"{path}: {got}: {FIXES[model_type]}")
    return config


@dataclass(frozen=True)
class CorpusReport:
    """
    What a corpus contains.

    Attributes:
        samples: Samples of an epoch.
        skipped: The bad samples: {source, path, line or index, reason}.
        kinds: Kind -> samples.
        tokens: {total, answers, longest}; visual tokens are included in total and longest.
        tiles: Tiles of an epoch.
        too_long: What was done to samples longer than a pack: {dropped, truncated}.
        packing: Statistics of packed batches, if they were asked for.
    """

    samples: int
    skipped: list[dict[str, Any]]
    kinds: dict[str, int]
    tokens: dict[str, int]
    tiles: int
    too_long: dict[str, int]
    packing: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as one flat JSON object."""
        fields = asdict(self)
        packing = fields.pop("packing")
        return fields | packing


def check_corpus(corpus: Corpus, batches: PackedBatches | None = None) -> CorpusReport:
    """
    Return what a corpus contains.

    Args:
        corpus: The corpus.
        batches: Its batches, if their packing is to be reported; then without the samples that are too long for a pack.
    """
    packing = {} if batches is None else {**batches.statistics(), "steps": len(batches)}
    corpus = corpus if batches is None else batches.corpus
    total, answers, tiles = (int(array.sum(dtype=np.int64)) for array in (corpus.tokens, corpus.answers, corpus.tiles))
    return CorpusReport(
        samples=len(corpus),
        skipped=[entry.to_dict() for entry in corpus.skipped],
        kinds=corpus.count_kinds(),
        tokens={"total": total, "answers": answers, "longest": int(corpus.tokens.max(initial=0))},
        tiles=tiles,
        too_long={name: corpus.too_long.get(name, 0) for name in ("dropped", "truncated")},
        packing=packing,
    )


def describe(report: CorpusReport) -> str:
    """Return a report as lines of text."""
    kinds = ", ".join(f"{name} {count:,} ({count / report.samples:.1%})" for name, count in report.kinds.items())
    tokens = report.tokens
    lines = {
        "samples": f"{report.samples:,} in an epoch",
        "kinds": kinds,
        "tokens": f"{tokens['total']:,}, of answers {tokens['answers']:,}; longest sample {tokens['longest']:,}",
        "tiles": f"{report.tiles:,}",
        "too long": ", ".join(f"{name} {count:,}" for name, count in report.too_long.items() if count),
    }
    if packing := report.packing:
        packs = packing["packs_per_rank"]
        lines |= {
            "steps": f"{packing['steps']:,}",
            "packs": f"{packs['min']} to {packs['max']} per rank and step, mean {packs['mean']:.2f}",
            "fill": f"{packing['fill']:.1%} of the tokens of all packs are used",
            "balance": f"a step takes {packing['balance']:.3f} times as long as if all ranks were always busy",
        }
    lines["bad"] = f"{len(report.skipped):,} samples are skipped" if report.skipped else "none"
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items() if text)


# Samples as the model sees them


@dataclass(frozen=True)
class ShownSample:
    """
    A sample as the model sees it: where it is from, its text with the trained tokens marked, and its tiles.

    Attributes:
        tiles: (n, 3, h, w) uint8; None without images.
        is_bad: The sample cannot be read; `text` is the reason.
    """

    title: str
    text: str
    tiles: torch.Tensor | None
    is_bad: bool = False

    def draw(self, path: str | Path) -> None:
        """Write the tiles to a PNG, row by row in the order of the model."""
        sheet = make_grid(self.tiles, nrow=min(TILES_PER_ROW, len(self.tiles)), padding=4, pad_value=255)
        to_pil_image(sheet).save(path)


def show_samples(corpus: Corpus, count: int, seed: int = 0) -> Iterator[ShownSample]:
    """
    Yield different random samples as the model sees them.
    """
    for index in _different(corpus, count, seed):
        source, number = corpus.locate(index)
        try:
            encoded = encode_sample(corpus[index], corpus.processor, uint8_tiles=True)
        except BadSample as error:
            yield ShownSample(f"{source} {number}", f"cannot be read: {error}", None, is_bad=True)
            continue
        tiles = 0 if encoded.tiles is None else len(encoded.tiles)
        title = f"{source} {number}: {len(encoded.input_ids)} tokens, {tiles} tiles"
        title += f", {len(encoded.lengths)} independent turns" if len(encoded.lengths) > 1 else ""
        yield ShownSample(title, mark_trained(encoded, corpus.processor), encoded.tiles)


def _different(corpus: Corpus, count: int, seed: int) -> list[int]:
    """Return random samples, none of which repeats another."""
    if not (count and len(corpus)):
        return []
    if len(corpus) < 100_000:
        order = permutation(len(corpus), seed)
    else:
        order = np.random.default_rng(seed).integers(len(corpus), size=2 * count)
    chosen = {int(corpus.arrays["rows"][index]): index for index in order.tolist()}
    return [*chosen.values()][:count]


def mark_trained(encoded: EncodedSample, processor: SAILVLProcessor) -> str:
    """
    Return the text of a sample, trained tokens in white square brackets, equal visual tokens counted.

    An empty line is between conversations of the same sample; a prefix that they share is shown once.
    """
    ids, labels = (tensor.split(encoded.lengths) for tensor in (encoded.input_ids, encoded.labels))
    between = "\n\n" + ("[the same up to the last image]" if encoded.prefix else "")
    return between.join(_mark_conversation(*row, processor) for row in zip(ids, labels, strict=True))


def _mark_conversation(ids: torch.Tensor, labels: torch.Tensor, processor: SAILVLProcessor) -> str:
    is_trained = labels != IGNORED
    edges = (is_trained.diff().nonzero().flatten() + 1).tolist()
    text = ""
    for begin, end in zip([0, *edges], [*edges, len(is_trained)], strict=True):
        part = processor.tokenizer.decode(ids[begin:end])
        text += part.join(TRAINED) if is_trained[begin] else part
    text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)  # no terminal codes
    token = re.escape(processor.image_token)
    return re.sub(
        f"(?:{token})+", lambda run: f"{processor.image_token} x {run[0].count(processor.image_token)} ", text
    )
