# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Answers that outlive the process that gives them, in files of JSON lines."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance


class KeptAnswers:
    """
    Answers in FOLDER/answers-RANK.jsonl, one line each, written as they are given.

    An answer is found by task, number and text of its question.
    """

    def __init__(self, folder: Path, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"answers-{rank}.jsonl"
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):  # a killed process was writing a line
            with self.path.open("a") as file:
                file.write("\n")
        self.kept = {self._key(line): line["answer"] for file in folder.glob("*.jsonl") for line in read_lines(file)}

    def find(self, request: "Instance") -> str | None:
        context, _, _, index, task, split = request.args
        return self.kept.get((task, split, index, request.idx, context))

    def add(
        self, requests: Sequence["Instance"], answers: Sequence[str], prompts: Sequence[str], tiling: Mapping[str, Any]
    ) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for request, answer, prompt in zip(requests, answers, prompts, strict=True):
                context, _, options, index, task, split = request.args
                key = {"task": task, "split": split, "doc_id": index, "idx": request.idx, "context": context}
                line = {**key, "answer": answer, "prompt": prompt, "tiling": dict(tiling), "options": dict(options)}
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _key(line: Mapping[str, Any]) -> tuple:
        return line["task"], line["split"], line["doc_id"], line["idx"], line["context"]


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file, without lines that a killed process cut."""
    for line in file.read_bytes().splitlines():
        with suppress(ValueError):
            yield json.loads(line)
