"""Line charts as inline SVG, coloured by the classes s0, s1, ... of the page that holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stepkto_kernels.training.inspect_text import as_html

COLOURS = 8  # classes s0 ... s7, then again from s0
WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 34


@dataclass(frozen=True)
class Point:
    """A point of a line; low and high: ends of its interval, both or neither."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A line of a chart. name: what hovering over a point shows; colour: 0, 1, ..."""

    name: str
    colour: int
    points: Sequence[Point]


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_name: str,
    format_y: Callable[[float], str],
    limits: tuple[float, float] | None = None,
    dots: bool = True,
    marks: Sequence[float] = (),
) -> str:
    """A figure with a chart of its own axes.

    Args:
        title: above it.
        lines: with at least one point in all.
        x_name: of the x axis; x values are shown as integers.
        format_y: of a value of the y axis.
        limits: which the y axis does not pass.
        dots: whether points are drawn and told when hovered over.
        marks: x values with a vertical rule.
    """
    points = [point for line in lines for point in line.points]
    xs = [point.x for point in points]
    ys = [y for p in points for y in (p.y, p.low, p.high) if y is not None]
    x_low, x_high = min(xs), max(xs)
    ticks = _ticks(min(ys), max(ys), limits)
    place_x = _scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    place_y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place_y(y):.1f}" '
        f'y2="{place_y(y):.1f}"/><text x="{LEFT - 6}" y="{place_y(y) + 3.5:.1f}" '
        f'text-anchor="end">{as_html(format_y(y))}</text>'
        for y in ticks
    ]
    parts += [
        f'<line class="mark" x1="{place_x(x):.1f}" x2="{place_x(x):.1f}" y1="{TOP}" '
        f'y2="{HEIGHT - BOTTOM}"/>'
        for x in marks
    ]
    parts += [
        f'<text x="{place_x(x):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{x:.0f}</text>'
        for x in _integers(x_low, x_high)
    ]
    parts += [_band(line, place_x, place_y) for line in lines]
    parts += [_curve(line, place_x, place_y, dots, format_y) for line in lines]
    told = f"{title} by {x_name}: " + "; ".join(
        f"{line.name} {format_y(line.points[0].y)} to {format_y(line.points[-1].y)}"
        for line in lines
        if line.points
    )
    return (
        f'<figure class="chart"><figcaption>{as_html(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{as_html(told)}">'
        + "".join(parts)
        + f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">'
        f"{as_html(x_name)}</text></svg></figure>"
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Where a value lies between two pixels; in the middle where all values are the same."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, limits: tuple[float, float] | None) -> list[float]:
    """Four or so round numbers around the values."""
    if high == low:
        margin = abs(low) * 0.05 or 0.05
        low, high = low - margin, high + margin
    if limits:
        low, high = max(low, limits[0]), min(high, limits[1])
    size = _round_size((high - low) / 3)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [size * k for k in range(first, max(last, first + 1) + 1)]


def _integers(low: float, high: float) -> list[float]:
    """Up to seven round integers between two values."""
    size = max(1, round(_round_size((high - low) / 6)))
    first, last = math.ceil(low / size), math.floor(high / size)
    return [float(size * k) for k in range(first, last + 1)]


def _round_size(rough: float) -> float:
    """The next of 1, 2, 2.5, 5 and 10 times a power of ten; 1 for 0."""
    if rough < 1e-300:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough), 10 * power)


def _band(line: Line, place_x: Callable[..., float], place_y: Callable[..., float]) -> str:
    ends = [(p.x, p.low, p.high) for p in line.points if p.low is not None and p.high is not None]
    if not ends:
        return ""
    colour = f"s{line.colour % COLOURS}"
    if len(ends) == 1:  # a band of one point has no area
        x, low, high = ends[0]
        place = f'x1="{place_x(x):.1f}" x2="{place_x(x):.1f}"'
        return (
            f'<line class="whisker {colour}" {place} y1="{place_y(low):.1f}" '
            f'y2="{place_y(high):.1f}"/>'
        )
    there = [f"{place_x(x):.1f},{place_y(high):.1f}" for x, _, high in ends]
    back = [f"{place_x(x):.1f},{place_y(low):.1f}" for x, low, _ in reversed(ends)]
    return f'<polygon class="band {colour}" points="{" ".join(there + back)}"/>'


def _curve(
    line: Line,
    place_x: Callable[..., float],
    place_y: Callable[..., float],
    dots: bool,
    format_y: Callable[[float], str],
) -> str:
    colour = f"s{line.colour % COLOURS}"
    places = [(place_x(p.x), place_y(p.y)) for p in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline class="line {colour}" points="{path}"/>'
    if not dots and len(line.points) > 1:
        return drawn
    for point, (x, y) in zip(line.points, places, strict=True):
        told = f"{line.name}, {point.x:.0f}: {format_y(point.y)}"
        if point.low is not None and point.high is not None:
            told += f" [{format_y(point.low)}, {format_y(point.high)}]"
        drawn += (
            f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
            f"<title>{as_html(told)}</title></circle>"
        )
    return drawn
