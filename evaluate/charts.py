"""Line charts and bars as inline SVG, which takes its colours and fonts from the CSS of a page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from .pages import render


WIDTH, HEIGHT = 460, 270  # of a chart, in units of its view box; a phone shows 350 of them
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 12, 42  # margins
MOST_DOTS = 60  # of a line; more points have no dots
TICKS = 5
DODGE = 5  # distance of the lines of a chart with intervals, which would cover each other
LABEL_GAP, DIGIT = 12, 9  # on the x axis: between labels, and the width of a character
LEAST_RANGE = 1e-3  # of the y axis, relative to its values: a smaller difference is none to look at
NEAR = 0.015  # of the y axis: the width of a line
DASHES = ("", "14 6", "7 7", "2 6")  # of lines that cover each other, the sparser ones on top
Value = float | None


@dataclass(frozen=True)
class Line:
    """
    A line of a chart.

    Attributes:
        label: In the legend.
        values: One for each position; None is left out.
        colour: Number of its colour: --series-N of the page.
        low, high: The ends of an interval at each position, if there are any.
    """

    label: str
    values: Sequence[Value]
    colour: int
    low: Sequence[Value] = ()
    high: Sequence[Value] = ()


def line_chart(
    title: str, x_label: str, positions: Sequence[float | str], lines: Sequence[Line], percent: bool = False
) -> Markup:
    """
    Return a chart as SVG, its values in a text for each point.

    Args:
        title: What the values are.
        x_label: What the positions are.
        positions: Numbers, placed to scale, or names, at equal distances.
        lines: Of the same length as the positions.
        percent: Values are fractions and shown in percent.
    """
    numbers = [float(at) for at in positions] if _are_numbers(positions) else [float(i) for i in range(len(positions))]
    values = [v for line in lines for part in (line.values, line.low, line.high) for v in part if _is_finite(v)]
    ticks = nice_ticks(min(values, default=0.0), max(values, default=1.0))
    shifts = _shifts(lines)
    inset = max(map(abs, shifts), default=0.0)  # intervals stay clear of the axis
    xs = [LEFT + inset + (WIDTH - LEFT - RIGHT - 2 * inset) * share for share in _shares(numbers)]
    return Markup(
        render(
            "chart.svg",
            title=title,
            x_label=x_label,
            width=WIDTH,
            height=HEIGHT,
            left=LEFT,
            right=WIDTH - RIGHT,
            bottom=HEIGHT - BOTTOM,
            y_ticks=[(_y(tick, ticks), _text(tick, ticks, percent)) for tick in ticks],
            x_ticks=_x_ticks(positions, xs),
            lines=[
                {**_draw(line, positions, [x + shift for x in xs], ticks, percent), "dashes": dashes}
                for line, shift, dashes in zip(lines, shifts, _dashes(lines, ticks), strict=True)
            ],
        )
    )


def _shifts(lines: Sequence[Line]) -> list[float]:
    middle = (len(lines) - 1) / 2
    return [DODGE * (number - middle) if line.low else 0.0 for number, line in enumerate(lines)]


def _dashes(lines: Sequence[Line], ticks: Sequence[float]) -> list[str]:
    """Return for each line how it is dashed, so that an earlier line that it would cover shows in the gaps."""
    levels: list[int] = []
    for line in lines:
        covered = [level for level, other in zip(levels, lines, strict=False) if _covers(line, other, ticks)]
        levels.append(max(covered, default=-1) + 1)
    return [DASHES[level % len(DASHES)] for level in levels]


def _covers(line: Line, other: Line, ticks: Sequence[float]) -> bool:
    """Return whether two lines are within the width of a line at two points in a row, or at their only point."""
    pairs = [pair for pair in zip(line.values, other.values, strict=True) if all(map(_is_finite, pair))]
    near = [abs(first - second) < NEAR * (ticks[-1] - ticks[0]) for first, second in pairs]
    return near == [True] or any(map(all, pairwise(near)))


def nice_ticks(low: float, high: float) -> list[float]:
    """
    Return numbers at equal distances of 1, 2 or 5 times a power of 10, the first and the last around a range, which is
    LEAST_RANGE of its values at least.
    """
    least = LEAST_RANGE * max(abs(low), abs(high))
    if high - low < max(least, 1e-300):
        middle = (low + high) / 2
        low, high = (middle - least / 2, middle + least / 2) if least else (0.0, 1.0)
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _draw(
    line: Line, positions: Sequence[float | str], xs: Sequence[float], ticks: Sequence[float], percent: bool
) -> dict[str, object]:
    """Return the points, dots with their texts, and intervals, in units of the view box."""
    points, dots, intervals = [], [], []
    for index, value in enumerate(line.values):
        if not _is_finite(value):
            continue
        x, y = f"{xs[index]:.1f}", f"{_y(value, ticks):.1f}"
        points.append(f"{x},{y}")
        dots.append((x, y, f"{line.label}, {positions[index]}: {_value(value, percent)}"))
        if line.low:
            intervals.append((x, *(f"{_y(end[index], ticks):.1f}" for end in (line.low, line.high))))
    shown = dots if len(dots) <= MOST_DOTS else []
    return {"colour": line.colour, "points": " ".join(points), "dots": shown, "intervals": intervals}


def _x_ticks(positions: Sequence[float | str], xs: Sequence[float]) -> list[tuple[float, str]]:
    last = len(xs) - 1
    width = LABEL_GAP + DIGIT * max(len(f"{position}") for position in positions)
    every = math.ceil(len(xs) / max(1, (WIDTH - LEFT - RIGHT) // width))
    kept = [index for index in range(len(xs)) if index % every == 0 and (last - index >= every or index == last)]
    return [(xs[index], f"{positions[index]}") for index in dict.fromkeys([*kept, last])]


def _y(value: float, ticks: Sequence[float]) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _shares(values: Sequence[float]) -> list[float]:
    """Return where values are between the least, 0, and the largest, 1."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]


def _text(tick: float, ticks: Sequence[float], percent: bool) -> str:
    factor = 100 if percent else 1
    power = math.floor(math.log10((ticks[1] - ticks[0]) * factor) + 1e-9)
    if power > -6:
        return f"{tick * factor + 0.0:,.{max(0, -power)}f}"
    largest = math.floor(math.log10(max(map(abs, ticks)) * factor))
    return f"{tick * factor:.{max(0, largest - power)}e}"


def _value(value: float, percent: bool) -> str:
    return f"{100 * value:.2f}%" if percent else f"{value:.4g}"


def _are_numbers(positions: Sequence[float | str]) -> bool:
    return all(isinstance(at, (int, float)) for at in positions)


def _is_finite(value: Value) -> bool:
    return value is not None and math.isfinite(value)
