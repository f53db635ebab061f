"""Conversions that copy intervals of elements under new names, as two name tables prescribe."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..export.image_settings import center_crops, has_normalization
from ..plan import ConversionPlan
from ..storage.checkpoint import Checkpoint
from ..storage.tensors import NewTensor, StoredTensor, cast_stream
from .name_tables import Dimensions, Match, NamingScheme, TensorSource, plan_tensors, tensor_specs


@dataclass(kw_only=True)
class MappedPlan(ConversionPlan):
    """
    A model to write under the names of another scheme.

    Attributes:
        match: Its names in the checkpoint.
        stored: Name in the source's scheme -> tensor.
        dimensions: Of the source.
        layout: The scheme to write.
    """

    match: Match
    stored: dict[str, StoredTensor] = field(repr=False)
    dimensions: Dimensions
    layout: NamingScheme

    def sources(self) -> list[TensorSource]:
        """Where the elements of every tensor to write come from."""
        own, target = (tensor_specs(scheme, self.dimensions) for scheme in (self.match.scheme, self.layout))
        return plan_tensors(own, target)

    def tensors(self) -> list[NewTensor]:
        prefix, dtype = self.layout.prefix, self.dtype
        return [
            NewTensor(prefix + one.target.name, dtype, one.target.shape, lambda one=one: self.chunks(one))
            for one in self.sources()
        ]

    def source_tensors(self) -> Iterable[StoredTensor]:
        return self.stored.values()

    def chunks(self, source: TensorSource) -> Iterator[np.ndarray]:
        """The bytes (uint8) of a tensor to write."""
        for name, start, stop in source.sources:
            yield from cast_stream(self.stored[name], self.match.names[name], self.dtype, start, stop)

    def source_record(self, dropped: str) -> dict[str, Any]:
        """Return "source" of provenance.json; `dropped` is the kind of tensors that the scheme drops."""
        return {
            "layout": self.match.scheme.name,
            "prefix": self.match.prefix,
            "recognised": self.match.reason,
            "dropped": {dropped: self.match.dropped, "others": self.match.others},
        }


def match_notes(match: Match, kind: str) -> list[str]:
    """Return messages about a match; `kind` is that of the tensors that the scheme drops."""
    notes, title = [match.reason], match.family.title
    if match.wrappers:
        notes.append(f"removed from the names: {', '.join(match.wrappers)}")
    if match.dropped:
        notes.append(f"dropped {kind}: {len(match.dropped)} tensors ({match.dropped[0]}, ...)")
    for name, count in match.others.items():
        notes.append(f"not part of the {title}, not converted: {name} ({count} tensors)")
    return notes


def image_notes(checkpoint: Checkpoint) -> list[str]:
    """Differences between the source's image preprocessing and the one that is written."""
    notes = []
    if not has_normalization(checkpoint):
        notes.append("no image_mean and image_std in the source: ImageNet's, as for SAILViT, are assumed")
    if center_crops(checkpoint):
        notes.append("the source center-crops images; the folder resizes them to a square, as SAILViT does")
    return notes
