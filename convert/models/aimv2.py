"""Conversion of an AIMv2 encoder between layouts, resolutions and dtypes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..export.card import write_conversion_card
from ..export.runtimes import RUNTIMES, SIZE_NAMES, check_expressible
from ..plan import Options
from ..storage.checkpoint import Checkpoint, check_values
from ..storage.errors import CheckpointError
from ..storage.tensors import StoredTensor, cast, to_bytes, torch_name
from .aimv2_config import Tower, find_aimv2
from .aimv2_names import AIMV2, POSITIONS, AIMv2Dimensions, plan_layout
from .aimv2_reference import verify_folder
from .aimv2_state_dict import compute_positions
from .mapped_plan import MappedPlan, checked_dtype, image_notes, match_notes
from .name_tables import NamingScheme, TensorSource


@dataclass(kw_only=True)
class AIMv2Plan(MappedPlan):
    """The conversion of an encoder; `fields` are those of SAILViTConfig, of the folder."""

    dimensions: AIMv2Dimensions
    fields: dict[str, Any]

    @property
    def learned(self) -> StoredTensor | None:
        """The source's learned position embeddings."""
        return self.match.tensors.get(self.match.scheme.names_of(POSITIONS)[0])

    @property
    def grid_size(self) -> int | None:
        """Side of the square of position embeddings to write; None if they are left to be computed."""
        if self.fields["pos_embed_type"] == "sincos" and self.layout.has_sincos:
            return None
        return self.fields["image_size"] // self.fields["patch_size"]

    @property
    def positions(self) -> dict[str, Any] | None:
        """How position embeddings are computed, if they are not the source's."""
        before, after = self.dimensions.grid_size, self.grid_size
        if after in (before, None):
            return None
        if before is None:
            return {"to": [after, after], "method": "2-D sine-cosine, written out: the layout has no computed ones"}
        return {"from": [before, before], "to": [after, after], "method": "bicubic, antialiased, in float32"}

    def sources(self) -> list[TensorSource]:
        return plan_layout(self.match.scheme, self.layout, self.dimensions, self.grid_size)

    def chunks(self, source: TensorSource) -> Iterator[np.ndarray]:
        if not source.sources:
            positions = compute_positions(self.learned, self.fields["hidden_size"], self.grid_size)
            yield cast(to_bytes(positions), "F32", self.dtype)
        yield from super().chunks(source)

    def write_weights(
        self, folder: Path, max_shard_size: int | str, on_progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        if self.layout.name in RUNTIMES and not RUNTIMES[self.layout.name].reads_shards:
            max_shard_size = 1 << 62
        return super().write_weights(folder, max_shard_size, on_progress)

    def write_folder(self, folder: Path) -> None:
        fields, width = self.fields, self.fields["hidden_size"]
        size = f"{SIZE_NAMES.get(width, f'width {width}')}, {fields['num_hidden_layers']} blocks"
        size = f"{size}, {fields['image_size']} pixels, {torch_name(self.dtype)}"
        description = f"A vision encoder, {size}, under the names of {self.layout.title}."
        if runtime := RUNTIMES.get(self.layout.name):
            runtime.write_configs(folder, self.checkpoint, fields, self.dtype)
        else:
            description += f" They are part of a larger model, under `{self.layout.prefix}`: nothing loads them alone."
        tags = ["vision", "aimv2", *(["sailvit", "custom_code"] if self.layout.name == "sailvit" else [])]
        write_conversion_card(folder, [self.checkpoint.source], description, tags)

    def verify(self, folder: Path) -> dict[str, Any] | None:
        if self.layout.name not in RUNTIMES:
            return None
        return verify_folder(folder, self, self.fields, self.grid_size if self.learned and self.positions else None)

    def provenance(self) -> dict[str, Any]:
        record = {"source": self.source_record("heads"), "layout": self.layout.name, "tower": self.fields}
        return {**record, "positions": self.positions or "as in the source"}


def plan_aimv2(checkpoint: Checkpoint, options: Options) -> AIMv2Plan:
    """
    Return the conversion of an AIMv2. Raises CheckpointError if there is no whole one, or the options do not allow to
    write it.
    """
    layout = AIMV2.scheme("sailvit" if options.to_layout is None else options.to_layout)
    tower = find_aimv2(checkpoint, options.from_layout, options.prefix)
    dtype = checked_dtype(checkpoint, tower.match, tower.problems, options)
    plan = AIMv2Plan(
        checkpoint=checkpoint, dtype=dtype, match=tower.match, dimensions=tower.dimensions, layout=layout,
        fields=_output_fields(tower, layout, options),
    )  # fmt: skip
    check_expressible(checkpoint, layout.name, plan.fields)
    plan.notes = _notes(plan)
    check_values(checkpoint, tower.match.stored)
    return plan


def _output_fields(tower: Tower, layout: NamingScheme, options: Options) -> dict[str, Any]:
    size, patch = options.image_size or tower.fields["image_size"], tower.fields["patch_size"]
    if size % patch:
        what = f"expected a multiple of the patch size, {patch} pixels"
        raise CheckpointError(f"--image-size: {what}, got {options.image_size}")
    kind = tower.fields["pos_embed_type"] if layout.has_sincos else "absolute"
    return {**tower.fields, "image_size": size, "pos_embed_type": kind}


def _notes(plan: AIMv2Plan) -> list[str]:
    notes, fields = match_notes(plan.match, "head"), plan.fields
    if plan.dimensions.grid_size is None:
        notes.append("no learned position embeddings: a `native` encoder, with sine-cosine ones")
    if (fields["image_size"] // fields["patch_size"]) % fields.get("pixel_shuffle_factor", 2):
        notes.append(f"{fields['image_size']} pixels give a grid that the pixel shuffle factor does not divide")
    if plan.layout.name in RUNTIMES:
        notes += image_notes(plan.checkpoint)
    if plan.positions:
        grid = " x ".join(map(str, plan.positions["to"]))
        notes.append(f"position embeddings computed for {grid}: {plan.positions['method']}")
    return notes
