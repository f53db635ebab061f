# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""A SAIL-VL, or any model with a processor and `generate`, as a chat model of lmms-eval."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...devices import choose_device, choose_dtype
from .kept_answers import KeptAnswers
from .sets import MOST_TILES, tiles_of_task


# Options of a task that `generate` takes; `until` is not used: the end-of-turn token ends an answer.
GENERATION_OPTIONS = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample")


class SAILVLForLMMsEval(lmms):
    """
    Chat model of lmms-eval.

    Args:
        pretrained: Folder or name of the model.
        batch_size: Questions that are answered together.
        device, dtype: As for the other commands; default: the accelerator, and the dtype that it computes natively.
        msac: Add a second tiling of each single image, as VLMEvalKit does for SAIL-VL.
        max_tiles: Most tiles of an image; default: as in the table of the data sets, else the processor's own.
        answers: Folder that keeps the answers as they are given. Answers that are in it are not asked for again.
        only_kept: Raise an error instead of asking the model: the kept answers are scored again.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        msac: bool = True,
        max_tiles: int | None = None,
        answers: str | None = None,
        only_kept: bool = False,
        **kwargs: Any,
    ):
        super().__init__()
        if unknown := kwargs.keys() - {"max_batch_size"}:
            raise ValueError(f"sail_vl has no model argument {', '.join(sorted(unknown))}")
        self.pretrained, self.batch_size, self.msac, self.max_tiles = pretrained, int(batch_size), msac, max_tiles
        self.requested_dtype, self.only_kept = dtype, only_kept
        self.accelerator = Accelerator()
        self._rank, self._world_size = (int(os.environ.get(*default)) for default in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.device = self.accelerator.device if self._world_size > 1 else choose_device(device)
        self.answers = KeptAnswers(Path(answers), self._rank) if answers else None

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @cached_property
    def processor(self) -> Any:
        return AutoProcessor.from_pretrained(self.pretrained, trust_remote_code=True)

    @cached_property
    def model(self) -> Any:
        """The model, loaded when the first question is asked."""
        if self.only_kept:
            raise RuntimeError("a question has no kept answer: expected those of a finished run")
        model = AutoModelForImageTextToText.from_pretrained(self.pretrained, trust_remote_code=True, dtype="auto")
        dtype, _ = choose_dtype(model.dtype, self.device, self.requested_dtype)
        return model.to(self.device, dtype).eval()

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return an answer to each question; all that are asked together have the same task and options."""
        answers: dict[int, str] = {}
        if self.answers:
            answers = {
                i: kept for i, request in enumerate(requests) if (kept := self.answers.find(request)) is not None
            }
        bar = tqdm(total=len(requests), initial=len(answers), disable=self._rank != 0, desc="Answers")
        open_questions = [index for index in range(len(requests)) if index not in answers]
        for batch in _batches(requests, open_questions, self.batch_size):
            for index, answer in zip(batch, self._answer([requests[index] for index in batch]), strict=True):
                answers[index] = answer
            bar.update(len(batch))
        bar.close()
        return [answers[index] for index in range(len(requests))]

    def _answer(self, requests: Sequence[Instance]) -> list[str]:
        """Answer questions of one task, with one generation, and keep the answers."""
        _, _, options, _, task, _ = requests[0].args
        chats = [self._messages(request) for request in requests]
        images = max(sum(part["type"] == "image" for turn in chat for part in turn["content"]) for chat in chats)
        tiling = self._tiling(task, images)
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=len(chats) > 1,
            **tiling,
        ).to(self.device)
        with torch.inference_mode():
            output = self.model.generate(**inputs, **generation_options(options))
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts = [text.strip() for text in texts]
        if self.answers:
            self.answers.add(requests, texts, self._prompts(inputs), tiling)
        return texts

    def _messages(self, request: Instance) -> list[dict[str, Any]]:
        _, to_messages, _, index, task, split = request.args
        return ChatMessages(messages=to_messages(self.task_dict[task][split][index])).to_hf_messages()

    def _tiling(self, task: str, images: int) -> dict[str, Any]:
        """Return the tiling options for questions with at most so many images; {} for another model's processor."""
        if type(self.processor).__name__ != "SAILVLProcessor":  # this package's, or the copy in a model folder
            return {}
        most = self.max_tiles or tiles_of_task(task)
        options = {} if most is None or not images else {"max_tiles": max(1, min(most, MOST_TILES // images))}
        return {**options, "msac": True} if self.msac and images == 1 else options

    def _prompts(self, inputs: Mapping[str, torch.Tensor]) -> list[str]:
        """Return the prompts as text, runs of equal placeholders as `<IMG_CONTEXT> x 256`."""
        tokenizer = self.processor.tokenizer
        masks = inputs["attention_mask"].bool()
        texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(inputs["input_ids"], masks, strict=True)]
        pattern = re.compile(r"(<[A-Za-z_|]+>)\1+")
        return [pattern.sub(lambda run: f"{run[1]} x {len(run[0]) // len(run[1])}", text) for text in texts]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("sail_vl answers questions only: choose tasks with output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("sail_vl answers questions of one round only")


def generation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a task that `generate` takes; a temperature of 0 or none is greedy."""
    known = {key: options[key] for key in GENERATION_OPTIONS if options.get(key) is not None}
    if not known.get("temperature") or known.get("do_sample") is False:
        known = {key: value for key, value in known.items() if key not in ("temperature", "top_p", "top_k")}
        known["do_sample"] = False
    else:
        known["do_sample"] = True
    return known


def _batches(requests: Sequence[Instance], indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield batches of questions of the same task and the same options."""
    groups: dict[str, list[int]] = {}
    for index in indices:
        _, _, options, _, task, _ = requests[index].args
        groups.setdefault(repr((task, options)), []).append(index)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))
