# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""How large a miniature is: its world, its models, how many questions test it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...convert.storage.files import read_json, replace_text
from .world import WorldPlan


SETTING = "setting.json"
LANGUAGE = "language"  # the name of the language model that refines


def _language(width: int, layers: int, heads: int) -> dict[str, int]:
    """Return fields of Qwen2Config."""
    return {
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


@dataclass(frozen=True)
class Setting:
    """
    What `run_miniature` makes.

    Attributes:
        world: The pictures, questions and texts.
        encoder: Fields of SAILViTConfig, over those of `random_encoder`.
        language: Fields of Qwen2Config, over those of `random_language`.
        other_languages: Name -> such fields, of the language models that encoders are transferred to.
        vocabulary: Entries of the tokenizer.
        max_tiles: Of a picture, without its thumbnail.
        recipe: Overrides of every recipe, KEY=VALUE.
        questions: Held-out questions of each category that the model answers.
        transfer_questions: The same with other language models.
        name: Of SIZES, for messages and results.
        part: Of the pictures, texts and questions, for the same.
    """

    world: WorldPlan = field(default_factory=WorldPlan)
    encoder: Mapping[str, Any] = field(default_factory=dict)
    language: Mapping[str, Any] = field(default_factory=dict)
    other_languages: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {"narrow": _language(64, 4, 4), "wide": _language(128, 2, 4)}
    )
    vocabulary: int = 640
    max_tiles: int = 4
    recipe: tuple[str, ...] = ()
    questions: int = 2000
    transfer_questions: int = 500
    name: str = "32px"
    part: float = 1.0

    @property
    def title(self) -> str:
        """What results of the same setting have in common: "32px", or "32px, 0.03 of the pictures"."""
        return self.name if self.part == 1 else f"{self.name}, {self.part:.3g} of the pictures"

    def scaled(self, factor: float) -> "Setting":
        """Return the setting with all numbers of pictures, texts and questions multiplied by a positive number."""
        counts = {name: max(1, round(getattr(self, name) * factor)) for name in ("questions", "transfer_questions")}
        return replace(self, world=self.world.scaled(factor), part=self.part * factor, **counts)

    def with_seed(self, seed: int) -> "Setting":
        """Return the setting with another seed of world, weights and order."""
        return replace(self, world=replace(self.world, seed=seed))


def check_setting(folder: Path, setting: Setting) -> None:
    """
    Write the setting into a folder, or compare it with the one that is there.

    Raises:
        ValueError: The folder holds a miniature of another setting, or of an unknown one.
        OSError: It is no folder, or cannot be written.
    """
    path, now = folder / SETTING, json.loads(json.dumps(asdict(setting)))
    if not path.exists():
        if (folder / "world").exists():
            raise ValueError(f"{folder}: expected a new folder, or one with {SETTING}: give another one")
        replace_text(path, json.dumps(now, indent=1) + "\n")
        return
    before = read_json(path)
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise ValueError(
            f"{folder}: was made with {_describe(before)}, which is not {_describe(now)}: other {', '.join(changed)}; "
            "give another folder"
        )


def _describe(record: Mapping[str, Any]) -> str:
    world = record.get("world")
    seed = world.get("seed") if isinstance(world, dict) else None
    return f"{record.get('name')}, {record.get('part')} of the pictures, seed {seed}"


# Name -> widths. Parameters of the encoder: 0.2, 3.6, 39 and 310 million.
SIZES = {
    "32px": Setting(),
    "48px": Setting(
        WorldPlan(size=48),
        {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 6,
         "image_size": 48},
        {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4},
        {"narrow": _language(192, 6, 4), "wide": _language(320, 4, 4)},
        name="48px",
    ),
    "224px": Setting(
        WorldPlan(size=224),
        {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8,
         "image_size": 224, "patch_size": 14},
        {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
        {"narrow": _language(384, 10, 6), "wide": _language(640, 6, 10)},
        name="224px",
    ),
    "448px": Setting(
        WorldPlan(size=448),
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 8,
         "image_size": 448, "patch_size": 14},
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
        {"narrow": _language(640, 24, 10), "wide": _language(1152, 16, 18)},
        name="448px",
    ),
}  # fmt: skip
