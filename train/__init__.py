# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Training: recipes of its stages, corpora of conversations, and batches of packed samples.

A name imports its module when it is used: recipes need no torch, so that `sailvit train` checks its arguments at once.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any


_MODULES = {
    "attention": ("can_share_prompt",),
    "check": ("check_corpus", "describe", "load_processor", "show_samples"),
    "collate": ("Pack", "normalize_tiles"),
    "corpus": ("Corpus", "Skipped", "TooManyBadSamplesError"),
    "packing": ("PackedBatches", "tile_cost"),
    "recipe": ("Recipe", "describe_recipe", "list_recipes", "load_recipe"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_PACKAGES = ("accelerate", "datasets", "peft", "pyarrow", "pydantic", "xxhash", "yaml")  # all modules import these

if _missing := [name for name in _PACKAGES if find_spec(name) is None]:
    raise ImportError(f'training needs more packages ({", ".join(_missing)}): pip install "sailvit[train]"')

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
