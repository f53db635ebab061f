# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The benchmark suites of the paper (arXiv 2507.01643), under the names of VLMEvalKit and lmms-eval.

The paper names the data sets; where a data set has several splits, the one with public answers is chosen. The most
tiles of an image are those of VLMEvalKit's SailVL wrapper (vlmeval/vlm/sail_vl.py, set_max_num).
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


VLMEVALKIT, LMMS_EVAL = "vlmevalkit", "lmms-eval"
HARNESSES = (VLMEVALKIT, LMMS_EVAL)
MOST_TILES = 64  # of all images of a question together


@dataclass(frozen=True)
class DataSet:
    """
    A data set of a suite.

    Attributes:
        name: As in the paper.
        vlmevalkit: Its name in VLMEvalKit.
        vlmevalkit_class: Its class in vlmeval.dataset.
        lmms_eval: Its task in lmms-eval; None if lmms-eval has none.
        tiles: Most tiles of an image, without the thumbnail.
        judge: "none": the harness compares answers by rules; "optional": VLMEvalKit can ask a language model about
            answers that its rules cannot read; "required": a language model scores the answers.
        lmms_eval_judge: The same in lmms-eval.
        fixed_judge: The model that lmms-eval asks whatever `--judge` is; None if it asks the one of `--judge`.
    """

    name: str
    vlmevalkit: str
    vlmevalkit_class: str
    lmms_eval: str | None
    tiles: int = 10
    judge: Literal["none", "optional", "required"] = "none"
    lmms_eval_judge: Literal["none", "optional", "required"] = "none"
    fixed_judge: str | None = None

    def harness_name(self, harness: str) -> str | None:
        """Return the name in a harness."""
        return self.vlmevalkit if harness == VLMEVALKIT else self.lmms_eval

    def harness_judge(self, harness: str) -> str:
        """Return whether a harness needs a judge."""
        return self.judge if harness == VLMEVALKIT else self.lmms_eval_judge


def _multiple_choice(name: str, vlmevalkit: str, lmms_eval: str, **options) -> DataSet:
    return DataSet(name, vlmevalkit, "ImageMCQDataset", lmms_eval, judge="optional", **options)


def _yes_or_no(name: str, lmms_eval: str, **options) -> DataSet:
    return DataSet(name, name, "ImageYORNDataset", lmms_eval, judge="optional", **options)


def _short_answer(name: str, vlmevalkit: str, lmms_eval: str | None, **options) -> DataSet:
    return DataSet(name, vlmevalkit, "ImageVQADataset", lmms_eval, **options)


_JUDGED = {"judge": "required", "lmms_eval_judge": "required"}
_OPENCOMPASS = (
    _multiple_choice("AI2D", "AI2D_TEST", "ai2d"),
    _yes_or_no("HallusionBench", "hallusion_bench_image", lmms_eval_judge="required", fixed_judge="gpt-4"),
    _multiple_choice("MMBench", "MMBench_DEV_EN_V11", "mmbench_en_dev", lmms_eval_judge="required"),
    DataSet("MMMU", "MMMU_DEV_VAL", "MMMUDataset", "mmmu_val", tiles=12, judge="optional"),
    DataSet("MMVet", "MMVet", "MMVet", "mmvet", **_JUDGED),
    DataSet("OCRBench", "OCRBench", "OCRBench", "ocrbench", tiles=24),
    _multiple_choice("MMStar", "MMStar", "mmstar"),
    DataSet("MathVista_MINI", "MathVista_MINI", "MathVista", "mathvista_testmini_format", **_JUDGED),
)
_OPENSOURCE = (
    *_OPENCOMPASS,
    _short_answer("ChartQA", "ChartQA_TEST", "chartqa", tiles=12),
    _short_answer("DocVQA", "DocVQA_VAL", "docvqa_val", tiles=18),
    _short_answer("InfoVQA", "InfoVQA_VAL", "infovqa_val", tiles=24),
    _short_answer("TextVQA", "TextVQA_VAL", "textvqa_val"),
    DataSet("LLaVABench", "LLaVABench", "LLaVABench", "llava_in_the_wild", **_JUDGED),
    _yes_or_no("MME", "mme"),
    _short_answer("OCRVQA", "OCRVQA_TESTCORE", None, tiles=12),
    _yes_or_no("POPE", "pope"),
    _multiple_choice("RealWorldQA", "RealWorldQA", "realworldqa"),
    _multiple_choice("SEEDBench", "SEEDBench_IMG", "seedbench"),
    _multiple_choice("ScienceQA", "ScienceQA_TEST", "scienceqa_img"),
)
DRAWN = "drawn"  # questions about pictures that this package draws: a trial without downloads
SUITES: dict[str, tuple[DataSet, ...]] = {
    "opencompass": _OPENCOMPASS,
    "opensource": _OPENSOURCE,
    DRAWN: (DataSet("SAILViTDrawn", "SAILViTDrawn", "ImageMCQDataset", "sailvit_drawn"),),
}


def choose_data_sets(suite: str, only: Sequence[str] = (), leave_out: Sequence[str] = ()) -> tuple[DataSet, ...]:
    """
    Return the data sets of a suite.

    Args:
        only: Names of the data sets to take; all if empty.
        leave_out: Names of the data sets not to take.

    Raises:
        ValueError: The suite or a name is unknown, or no data set is left.
    """
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown: expected one of {', '.join(SUITES)}{_hint(suite, [*SUITES])}")
    names = [data_set.name for data_set in SUITES[suite]]
    for name in (*only, *leave_out):
        if name not in names:
            raise ValueError(
                f"suite {suite} has no data set {name!r}: expected some of {', '.join(names)}{_hint(name, names)}"
            )
    chosen = [name for name in (only or names) if name not in leave_out]
    if not chosen:
        raise ValueError(f"no data set of {suite} is left: give more with --only, or less with --leave-out")
    return tuple(data_set for data_set in SUITES[suite] if data_set.name in chosen)


def tiles_of_task(task: str) -> int | None:
    """Return the most tiles of an image for an lmms-eval task; None for a task outside the suites."""
    return next((found.tiles for suite in SUITES.values() for found in suite if found.lmms_eval == task), None)


def _hint(name: str, known: Sequence[str]) -> str:
    lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean {lower[close[0]]}?" if close else ""
