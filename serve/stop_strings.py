# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Ends answers before a stop string, as OpenAI does.

transformers ends them after the token that completes one, so the stop string, and what else is in the token, is part of
its answers.
"""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any


def cut(text: str, stops: Sequence[str]) -> str:
    """Return the text before the stop string that is complete first."""
    found = ((start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0)
    return text[: min(found, default=(0, len(text)))[1]]


class StopFilter:
    """
    Passes on a text that comes in pieces, up to the first stop string.

    The end of a piece that may be the beginning of a stop string is kept until the next piece.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops, self.kept, self.is_done = stops, "", False

    def feed(self, piece: str) -> str:
        """Return what is known not to be part of a stop string."""
        if self.is_done:
            return ""
        text = self.kept + piece
        before = cut(text, self.stops)
        self.is_done = len(before) < len(text)
        last = len(before) if self.is_done else len(text) - self._kept_length(text)
        self.kept = "" if self.is_done else text[last:]
        return text[:last]

    def finish(self) -> str:
        """Return what was kept, which turned out to be no stop string."""
        kept, self.kept = self.kept, ""
        return kept

    def _kept_length(self, text: str) -> int:
        """Return the length of the longest end of a text that a stop string begins with."""
        longest = min(len(text), max(map(len, self.stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0)


def cut_completion(completion: dict[str, Any], stops: Sequence[str]) -> dict[str, Any]:
    """Return a chat completion whose answer ends before the first stop string."""
    for choice in completion["choices"]:
        choice["message"]["content"] = cut(choice["message"].get("content") or "", stops)
    return completion


async def cut_stream(chunks: AsyncIterator[str], stops: Sequence[str]) -> AsyncIterator[str]:
    """
    Yield the server-sent events of a chat completion without what follows the first stop string.

    Args:
        chunks: Each of one or several whole events, `data: {...}` and an empty line.
    """
    stop_filter = StopFilter(stops)
    async for chunk in chunks:
        for line in filter(None, chunk.split("\n\n")):
            event = json.loads(line.removeprefix("data: "))
            for choice in event.get("choices", ()):
                _cut_choice(choice, stop_filter)
            yield f"data: {json.dumps(event)}\n\n"


def _cut_choice(choice: dict[str, Any], stop_filter: StopFilter) -> None:
    delta = choice["delta"]
    text = stop_filter.feed(delta.get("content") or "")
    if choice.get("finish_reason"):
        text += stop_filter.finish()
    if text or "content" in delta:
        delta["content"] = text
