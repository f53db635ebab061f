# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Records of users' data formats -> Sample."""

from dataclasses import dataclass
from typing import Any


class BadSample(ValueError):
    """A sample that cannot be used; the message is the reason. It is skipped, never replaced."""


@dataclass(frozen=True)
class Sample:
    """
    One training sample.

    Attributes:
        messages: As `processor.apply_chat_template` takes them; the content of each is a list of parts.
        kind: caption, ocr, open_qa, ...: as the record says, None if it does not.
    """

    messages: list[dict[str, Any]]
    kind: str | None = None
