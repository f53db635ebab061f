"""An AIMv2 tower in any layout, resolution and precision to another."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..export.image_settings import center_crops, has_normalization
from ..export.runtimes import RUNTIMES, check_expressible, write_folder
from ..plan import DTYPES, ConversionPlan, Options
from ..storage.checkpoint import Checkpoint
from ..storage.errors import CheckpointError, raise_if_any
from ..storage.hashes import check_values
from ..storage.tensors import TORCH_DTYPES, NewTensor, StoredTensor, cast, cast_stream, to_bytes
from .aimv2_config import Tower, find_aimv2
from .aimv2_names import NamingScheme, TensorSource, get_layout, plan_tensors
from .aimv2_reference import verify_folder
from .aimv2_state_dict import compute_positions


@dataclass(kw_only=True)
class AIMv2Plan(ConversionPlan):
    """
    The tower of a checkpoint, to be written.

    Attributes:
        tower: What was found.
        layout: What is written.
        fields: Those of SAILViTConfig, of what is written.
        positions: How the positions were computed, where they are not the source's.
    """

    tower: Tower
    layout: NamingScheme
    fields: dict[str, Any]
    positions: dict[str, Any] | None = None

    @property
    def learned(self) -> StoredTensor | None:
        """The source's learned positions."""
        return self.tower.tensors.get(self.tower.found.layout.names_of("preprocessor.pos_embed")[0])

    @property
    def resampled(self) -> bool:
        """Whether learned positions are written for another grid than the source's."""
        return self.learned is not None and self.tower.shape.grid_size != self.grid_size

    @property
    def grid_size(self) -> int | None:
        """Side of the square of positions that is written; None where they are left to be computed."""
        if self.fields["pos_embed_type"] == "sincos" and self.layout.has_sincos:
            return None
        return self.fields["image_size"] // self.fields["patch_size"]

    def tensors(self) -> list[NewTensor]:
        moves = plan_tensors(self.tower.found.layout, self.layout, self.tower.shape, self.grid_size)
        return [
            NewTensor(
                self.layout.prefix + move.target.name, self.dtype, move.target.shape, lambda m=move: self._chunks(m)
            )
            for move in moves
        ]

    def source_tensors(self) -> Iterable[StoredTensor]:
        return self.tower.tensors.values()

    def _chunks(self, move: TensorSource) -> Iterator[np.ndarray]:
        """The bytes of a tensor to be written."""
        if not move.sources:
            positions = compute_positions(self.learned, self.fields["hidden_size"], self.grid_size)
            yield cast(to_bytes(positions), "F32", self.dtype)
        for name, start, stop in move.sources:
            yield from cast_stream(self.tower.tensors[name], self.tower.found.names[name], self.dtype, start, stop)

    def write_weights(
        self, folder: Path, max_shard_size: int | str, on_progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        if self.layout.name in RUNTIMES and not RUNTIMES[self.layout.name].reads_shards:
            max_shard_size = 1 << 62
        return super().write_weights(folder, max_shard_size, on_progress)

    def write_folder(self, folder: Path) -> None:
        write_folder(folder, self)

    def verify(self, folder: Path) -> dict[str, Any] | None:
        return verify_folder(folder, self) if self.layout.name in RUNTIMES else None

    def provenance(self) -> dict[str, Any]:
        found = self.tower.found
        return {
            "source": {
                "layout": found.layout.name,
                "prefix": found.prefix,
                "recognised": found.reason,
                "dropped": {"heads": found.heads, "others": found.others},
            },
            "layout": self.layout.name,
            "tower": self.fields,
            "positions": self.positions or "as in the source",
        }


def plan_aimv2(checkpoint: Checkpoint, asked: Options) -> AIMv2Plan:
    """
    Raises:
        CheckpointError: There is no whole tower, or what is wanted of it cannot be.
    """
    layout = get_layout("sailvit" if asked.to_layout is None else asked.to_layout)
    tower = find_aimv2(checkpoint, asked.from_layout, asked.prefix)
    harmless = ("mixed",) if asked.dtype else ()
    raise_if_any([problem for problem in tower.problems if problem.kind not in harmless], checkpoint.source.name)
    fields = {**tower.fields, "image_size": asked.image_size or tower.fields["image_size"]}
    if not layout.has_sincos:
        fields["pos_embed_type"] = "absolute"
    if fields["image_size"] % fields["patch_size"]:
        what = f"not a multiple of the patch, {fields['patch_size']} pixels"
        raise CheckpointError(f"--image-size {asked.image_size}: {what}")
    dtype = TORCH_DTYPES[asked.dtype] if asked.dtype else next(iter(tower.dtypes))
    job = AIMv2Plan(checkpoint=checkpoint, dtype=dtype, tower=tower, layout=layout, fields=fields)
    if job.dtype not in map(TORCH_DTYPES.get, DTYPES):
        raise CheckpointError(f"{checkpoint.source.name}: the tower is {job.dtype}: choose with --dtype")
    check_expressible(job)
    job.positions = _how_positions(job)
    job.notes = [tower.found.reason, *_notes(job)]
    check_values(checkpoint, {tower.found.names[name]: tensor for name, tensor in tower.tensors.items()})
    return job


def _how_positions(job: AIMv2Plan) -> dict[str, Any] | None:
    before, after = job.tower.shape.grid_size, job.grid_size
    if after in (before, None):
        return None
    if before is None:
        return {"to": [after, after], "method": "2-D sine-cosine, written out: the layout has no computed ones"}
    return {"from": [before, before], "to": [after, after], "method": "bicubic, antialiased, in float32"}


def _notes(job: AIMv2Plan) -> list[str]:
    found, notes = job.tower.found, []
    if found.wrappers:
        notes.append(f"left out of the names: {', '.join(found.wrappers)}")
    if found.heads:
        notes.append(f"dropped: a head, {len(found.heads)} tensors ({found.heads[0]}, ...)")
    for part, count in found.others.items():
        notes.append(f"not of the tower, left: {part} ({count} tensors)")
    if job.tower.shape.grid_size is None:
        notes.append("no learned positions: a `native` tower, with sine-cosine positions")
    if job.layout.name in RUNTIMES and not has_normalization(job.checkpoint):
        notes.append("the source does not say how pictures are normalised: ImageNet's mean and std, SAILViT's, assumed")
    if (job.fields["image_size"] // job.fields["patch_size"]) % job.fields.get("pixel_shuffle_factor", 2):
        notes.append(f"{job.fields['image_size']} pixels make a grid that the pixel shuffle does not divide")
    if job.layout.name in RUNTIMES and center_crops(job.checkpoint):
        notes.append("the source crops pictures to a square; what is written resizes them to it, as SAILViT does")
    if job.positions:
        grid = " x ".join(map(str, job.positions["to"]))
        notes.append(f"positions computed for {grid}: {job.positions['method']}")
    return notes
