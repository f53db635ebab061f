# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""A summary of the arms as tables in Markdown; accuracies are in %, with intervals."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import Any

from .answers import CATEGORIES
from .arms import REFINED, SINGLE
from .results import HEADS, SETS


ALL_LANGUAGES = "mean"  # the name of the means over the language models
BY_HEAD = {head: [f"probes/{name}/{head}" for name in SETS] for head in HEADS}


def to_markdown(summary: Mapping[str, Any]) -> str:
    """Return the tables of a summary; one without rows is left out, with its title."""
    arms, single = summary["arms"], summary["single"]
    differences = {arm: one for arm, one in summary["differences"].items() if arm in arms}
    transfers = {one: _names(arms, f"transfer/{one}/") for one in _languages(arms)}
    figures = [*chain(*BY_HEAD.values()), *transfers.get(ALL_LANGUAGES, ()), *_names(arms, "answers/")]
    parts = [
        summary["method"], "Accuracies are means over the seeds, in %, some with 95% intervals in brackets.",
        _under("## Arms", _arm_table({**arms, **single, **arms})),  # refined, which is in both, with all its seeds
        _under("## Probes", *_by_head(arms)),
        _under("## Answers", *_answer_tables(arms)),
        _under("## Transfer", *(_under(_language_title(one), _by_arm(arms, own)) for one, own in transfers.items())),
        _under(f"## {REFINED} minus another arm", _by_figure(differences, figures)),
        _under(f"## Seed {SINGLE} alone", *_by_head(single), *_answer_tables(single)),
        _under("## Goals", _goal_table(summary["goals"])),
    ]  # fmt: skip
    return "\n\n".join(filter(None, parts)) + "\n"


def _under(title: str, *parts: str) -> str:
    """Return a title and what is below it; nothing if nothing is."""
    text = "\n\n".join(filter(None, parts))
    return f"{title}\n\n{text}" if text else ""


def _by_head(arms: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of probes for each head."""
    for head, names in BY_HEAD.items():
        yield _under(f"With {HEADS[head]} heads:", _by_arm(arms, names))


def _answer_tables(arms: Mapping[str, Any]) -> Iterator[str]:
    yield _under("Questions about the picture:", _by_arm(arms, _names(arms, "answers/")))
    yield _under("The same questions about another picture:", _blind_table(arms))


def _names(arms: Mapping[str, Any], start: str) -> list[str]:
    """Return the figures that some arms have, questions in the order of CATEGORIES."""
    names = dict.fromkeys(name for one in arms.values() for name in one["figures"] if name.startswith(start))
    groups = dict.fromkeys(name.rpartition("/")[0] for name in names)
    return [f"{group}/{category}" for group in groups for category in CATEGORIES if f"{group}/{category}" in names]


def _languages(arms: Mapping[str, Any]) -> list[str]:
    """Return the language models that encoders were transferred to, after ALL_LANGUAGES."""
    names = dict.fromkeys(name.split("/")[1] for name in _names(arms, "transfer/"))
    return sorted(names, key=lambda name: name != ALL_LANGUAGES)


def _language_title(name: str) -> str:
    return "Means over the language models:" if name == ALL_LANGUAGES else f"The language model `{name}`:"


def _arm_table(arms: Mapping[str, Any]) -> str:
    rows = []
    for arm, one in arms.items():
        counts = [f"{round(fmean(one[name])):,}" for name in ("pictures", "tiles_seen")]
        rows.append([arm, one["title"], ", ".join(map(str, one["seeds"])), *counts])
    return _table(("arm", "stages", "seeds", "pictures", "tiles"), rows)


def _by_arm(arms: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return a table with a row for each arm that has one of the figures."""
    rows = [
        [arm, *(_interval(one["figures"].get(name)) for name in names)]
        for arm, one in arms.items()
        if any(name in one["figures"] for name in names)
    ]
    return _table(("arm", *(_column(name) for name in names)), rows)


def _by_figure(arms: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return a table with a row for each figure that one of the arms has, and a column for each arm."""
    rows = [
        [_long(name), *(_interval(one["figures"].get(name)) for one in arms.values())]
        for name in names
        if any(name in one["figures"] for one in arms.values())
    ]
    return _table(("figure", *arms), rows)


def _blind_table(arms: Mapping[str, Any]) -> str:
    blind = {arm: one["with_another_picture"] for arm, one in arms.items() if one["with_another_picture"]}
    rows = [[arm, *(_percent(one[category]) for category in CATEGORIES)] for arm, one in blind.items()]
    return _table(("arm", *CATEGORIES), rows)


def _goal_table(goals: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [_long(goal["figure"]), goal["of"], _percent(goal["mean"]), _percent(goal["expected"]), _yes(goal["met"])]
        for goal in goals
    ]
    return _table(("figure", "of", "mean", "at least", "reached"), rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _column(name: str) -> str:
    """Return what tells the figures of a table apart: "objects" for "probes/objects/knn"."""
    kind, *parts = name.split("/")
    return {"probes": parts[0], "answers": parts[0], "transfer": ", ".join(parts[1:])}[kind].replace("_", " ")


def _short(name: str) -> str:
    """Return "objects, kNN" for "probes/objects/knn"."""
    return ", ".join(HEADS.get(part, part.replace("_", " ")) for part in name.split("/")[1:] if part != ALL_LANGUAGES)


def _long(name: str) -> str:
    return f"{name.split('/')[0]}: {_short(name)}"


def _interval(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    interval = "" if figure["low"] is None else f" [{_percent(figure['low'])}, {_percent(figure['high'])}]"
    return _percent(figure["mean"]) + interval


def _percent(value: float) -> str:
    return f"{round(100 * value, 1) + 0:.1f}"  # + 0 turns -0.0 into 0.0


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; nothing if it has no rows."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else ""
