# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The arms of the experiment: ways from a pretrained or untrained vision encoder to a refined one, and their corpora.

Each arm answers one question about gradual feature refinement (paper, section 3 and the ablations of stage 3). Arms
that are compared over seeds send the same number of pictures through the encoder.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ...convert.storage.files import replace_text
from ...train.mix import scale_kinds
from .questions import TASKS
from .world import TEXT, WorldPlan


Chain = tuple[tuple[str, str], ...]  # recipe and corpus of every stage
KINDS = ("caption", "ocr", "open_qa", "short_qa", "math", TEXT)
SINGLE = 0  # the seed of the arms that have one seed alone
REFINED = "refined"


@dataclass(frozen=True)
class Arm:
    """
    A way to train the encoder further, or a baseline without it.

    Attributes:
        title: For tables.
        chain: The stages, each with the result of the one before.
        transfers: Whether the encoder is tried with other language models.
        single: Whether it is trained with one seed alone.
        pretrained: Whether its encoder is pretrained.
    """

    title: str
    chain: Chain = ()
    transfers: bool = False
    single: bool = False
    pretrained: bool = True

    @property
    def recipes(self) -> tuple[str, ...]:
        return tuple(recipe for recipe, _ in self.chain)

    @property
    def has_language(self) -> bool:
        """Whether the result is a multimodal model, which answers questions."""
        return bool(self.chain) and "aim" not in self.recipes


STAGES_1_2 = (("stage1", "stage1"), ("stage2", "stage2"))
STAGES = (*STAGES_1_2, ("stage3", "stage3"))
ARMS = {
    "untrained": Arm("random weights", (), True, pretrained=False),
    "base": Arm("pretraining alone", (), True),
    REFINED: Arm("stages 1, 2, 3", STAGES, True),
    "more_aim": Arm("pretraining goes on, with the pictures of the stages", (("aim", "all"),), True),
    "all_at_once": Arm("all components, all data at once", (("stage3", "all"),), True),
    "stage3": Arm("stage 3 alone, its data repeated", (("stage3", "stage3_repeated"),), True),
    "stages_1_3": Arm("stages 1 and 3, with the data of 2", (("stage1", "stage1"), ("stage3", "stages_2_3")), True),
    "stages_2_3": Arm("stages 2, with the data of 1, and 3", (("stage2", "stages_1_2"), ("stage3", "stage3")), True),
    "refined_untrained": Arm("stages 1, 2, 3, without pretraining", STAGES, True, pretrained=False),
    "frozen_language": Arm(
        "stage 3 with a frozen language model", (*STAGES_1_2, ("stage3-frozen-language", "stage3")), single=True
    ),
    "step_by_step": Arm(
        "stage 3 step by step: captions and text, then questions, then the rest",
        (*STAGES_1_2, ("stage3", "step1"), ("stage3", "step2"), ("stage3", "step3")), single=True,
    ),
    **{
        f"data_1_{part}": Arm(f"1/{part} of stage 3", (*STAGES_1_2, ("stage3", f"stage3_1_{part}")), single=True)
        for part in (2, 4, 8)
    },
    **{
        f"half_{kind}": Arm(
            f"1/4 of stage 3, half of it {kind}", (*STAGES_1_2, ("stage3", f"stage3_half_{kind}")), single=True
        )
        for kind in KINDS
    },
}  # fmt: skip
PLAIN = ("base", REFINED)  # the arms of a miniature without --arms


@dataclass(frozen=True)
class Mix:
    """
    A corpus made of those of the world.

    Attributes:
        corpora: Those of the world.
        kinds: The kinds of samples that are taken.
        part: The part of the samples that is taken, at random.
        half: The kind that gets one half; the others are scaled evenly (paper, appendix F).
        pictures_of: Repeat the samples until the corpus has as many pictures as these corpora.
    """

    corpora: tuple[str, ...]
    kinds: tuple[str, ...] = KINDS
    part: float = 1.0
    half: str | None = None
    pictures_of: tuple[str, ...] = ()


ALL_STAGES = ("stage1", "stage2", "stage3")
MIXES = {
    "all": Mix(ALL_STAGES),
    "stages_1_2": Mix(("stage1", "stage2")),
    "stages_2_3": Mix(("stage2", "stage3")),
    "stage3_repeated": Mix(("stage3",), pictures_of=ALL_STAGES),
    "step1": Mix(("stage3",), ("caption", "ocr")),
    "step2": Mix(("stage3",), ("open_qa", "short_qa")),
    "step3": Mix(("stage3",), ("math", TEXT)),
    **{f"stage3_1_{part}": Mix(("stage3",), part=1 / part) for part in (2, 4, 8)},
    **{f"stage3_half_{kind}": Mix(("stage3",), part=1 / 4, half=kind) for kind in KINDS},
}


def check_arms(names: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise ValueError if there is no such arm, or if it has none of the seeds."""
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"--arms: expected some of {', '.join(ARMS)}, got {unknown[0]!r}")
    if SINGLE not in seeds and (single := [name for name in names if ARMS[name].single]):
        raise ValueError(f"--seeds: expected {SINGLE} among them, the only seed of {single[0]}")


def choose_arms(names: Sequence[str], seed: int) -> tuple[str, ...]:
    """Return the arms that a seed has, in the order of the table."""
    return tuple(name for name, arm in ARMS.items() if name in names and (seed == SINGLE or not arm.single))


def run_names(arm: str) -> list[str]:
    """
    Return ARM/CORPUS for each stage of an arm: the folders of its runs.

    Arms that begin with the same stages share their runs, in the folder of the first of them in the table.
    """
    chain, names = ARMS[arm].chain, []
    for end in range(1, len(chain) + 1):
        owner = next(
            name
            for name, other in ARMS.items()
            if other.pretrained == ARMS[arm].pretrained and other.chain[:end] == chain[:end]
        )
        names.append(f"{owner}/{chain[end - 1][1]}")
    return names


def count_kinds(corpus: str, plan: WorldPlan) -> dict[str, int]:
    """Return kind -> samples of a corpus of the world or of MIXES."""
    if corpus == "language":
        return {TEXT: plan.language[0]}
    mix = MIXES.get(corpus, Mix((corpus,)))
    counts: Counter[str] = Counter()
    for name in mix.corpora:
        for task, count in plan.corpora[name].items():
            if (kind := _kind_of(task)) in mix.kinds:
                counts[kind] += _repeated(count, mix, plan)
    return scale_kinds(counts, {mix.half: 0.5}, _total(mix, plan)) if mix.half else dict(counts)


def write_corpus(name: str, world: Path, out: Path, plan: WorldPlan) -> None:
    """Write the corpus.yaml of a mix; `out` is in a folder next to the world's."""
    mix, sources = MIXES[name], []
    for corpus in mix.corpora:
        for source in yaml.safe_load((world / f"{corpus}.yaml").read_text("utf-8"))["sources"]:
            if source["kind"] in mix.kinds:
                path, repeat = f"../{world.name}/{source['path']}", _repeat(mix, plan)
                sources.append({**source, "name": f"{corpus}-{source['name']}", "path": path, "repeat": repeat})
    shares = {"kinds": {mix.half: 0.5}, "total": _total(mix, plan)} if mix.half else {}
    replace_text(out, yaml.safe_dump({"sources": sources, **shares}, sort_keys=False))


def _kind_of(task: str) -> str:
    return TEXT if task == TEXT else TASKS[task].kind


def _pictures(corpora: Sequence[str], plan: WorldPlan) -> int:
    return sum(count for name in corpora for task, count in plan.corpora[name].items() if task != TEXT)


def _repeat(mix: Mix, plan: WorldPlan) -> float:
    """Return how often a mix has each sample of its corpora; below 1 for a part of them."""
    if mix.pictures_of:
        return _pictures(mix.pictures_of, plan) / _pictures(mix.corpora, plan)
    return 1.0 if mix.half else mix.part


def _repeated(count: int, mix: Mix, plan: WorldPlan) -> int:
    return max(1, round(count * _repeat(mix, plan)))


def _total(mix: Mix, plan: WorldPlan) -> int:
    return round(mix.part * sum(sum(plan.corpora[name].values()) for name in mix.corpora))
