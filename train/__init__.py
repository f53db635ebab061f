# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Training: recipes of its stages, corpora of conversations, and batches of packed samples."""

try:
    from .check import check_corpus, describe, load_processor, show_samples
    from .collate import Pack, normalize_tiles
    from .corpus import Corpus, Skipped, TooManyBadSamplesError
    from .packing import PackedBatches, tile_cost
    from .recipe import Recipe, describe_recipe, list_recipes, load_recipe
except ImportError as error:
    raise ImportError(f'{error}: training needs more packages: pip install "sailvit[train]"') from error

__all__ = [
    "Corpus",
    "Pack",
    "PackedBatches",
    "Recipe",
    "Skipped",
    "TooManyBadSamplesError",
    "check_corpus",
    "describe",
    "describe_recipe",
    "list_recipes",
    "load_processor",
    "load_recipe",
    "normalize_tiles",
    "show_samples",
    "tile_cost",
]
