"""Plots of a report as inline SVG.

Guarantees: text from a checkpoint or a bundle is escaped; color (classes of style.css) never carries meaning alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from builder.util.text import figure
from builder.verify.report.exhibits import Exhibit
from builder.verify.report.gates import Gate, Report

FLOOR, ROOF = 1e-9, 1e3  # in standard deviations: errors plotted at the lower and the upper edge
# Places compared with a tolerance, in the order of the computation; layered places have a point per layer.
_GROUPS = (
    ("vision layers", "vision layers"),
    ("image features", "features"),
    ("deepstack features", "DeepStack"),
    ("embeddings", "embed"),
    ("decoder layers", "decoder layers"),
    ("decoder prefill", "prefill"),
    ("decoder chunk", "chunk"),
    ("decoder step", "step"),
)
_LAYERED = ("vision layers", "deepstack features", "decoder layers")


@dataclass(frozen=True)
class Plot:
    """A plot with its caption; `svg` is empty if there is nothing to plot, and the caption gives the reason."""

    title: str
    svg: Markup
    caption: str


@dataclass(frozen=True)
class _Point:
    """All cases of one layer or place: the smallest and the largest error, and the number of failing gates."""

    place: str
    label: str
    low: float
    high: float
    limit: float
    failing: int


def error_plot(report: Report) -> Plot:
    """Plot the error along the computation, one point per layer."""
    groups = [(name, _points(place, report.gates)) for place, name in _GROUPS]
    groups = [(name, points) for name, points in groups if points]
    title = "Error along the computation"
    if not groups:
        return Plot(title, Markup(), "No comparison with a tolerance was made.")
    layered = any(point.place in ("vision layers", "decoder layers") for _, points in groups for point in points)
    width, height, left, top, bottom = 960, 330, 58, 16, 58
    columns = sum(max(1.6, len(points)) for _, points in groups) + 0.6 * (len(groups) - 1)
    step = (width - left - 12) / columns
    highest = max(point.high for _, points in groups for point in points)
    limit = max(point.limit for _, points in groups for point in points)
    lowest = min((p.high for _, points in groups for p in points if p.high > FLOOR), default=limit)
    axis = _Log(_below(min(lowest, limit) / 3), _above(max(min(highest, ROOF), limit) * 3), height - bottom, top)
    bands: list[Markup] = []
    parts = [_rows(axis, left, width - 12), _line(left, axis(limit), width - 12, axis(limit), "limit")]
    parts.append(_text(width - 16, axis(limit) - 7, f"limit {figure(limit)}", "limit-text", "end"))
    x = float(left)
    for index, (name, points) in enumerate(groups):
        span = step * max(1.6, len(points))
        if index % 2 == 0:
            bands.append(_box(x, top, span, height - bottom - top, "band"))
        offset = span / len(points)
        every = max(1, math.ceil(24 / offset))
        for number, point in enumerate(points):
            at = x + offset * (number + 0.5)
            parts.append(_point(at, point, axis))
            if point.label and number % every == 0:
                parts.append(_text(at, height - bottom + 16, point.label, "tick", "middle"))
        parts.append(_text(x + span / 2, height - bottom + (34 if index % 2 else 50), name, "label", "middle"))
        x += span + 0.6 * step
    caption = (
        "Largest absolute difference from PyTorch, in standard deviations of PyTorch's values. A dot is the worst "
        "case, and the line below it extends to the best; a ring is 0, a cross is over its limit."
    )
    if not layered:
        caption += " This verification did not compare layer by layer."
    return Plot(title, _svg(width, height, [*bands, *parts], title), caption)


def scatter(exhibits: Sequence[Exhibit]) -> Plot:
    """Plot logits of the artifact against PyTorch's, and their differences below."""
    title = "Logits, bundle against PyTorch"
    pairs = np.array([pair for exhibit in exhibits for pair in exhibit.logits], float).reshape(-1, 2)
    if not len(pairs):
        return Plot(title, Markup(), "No logits were sampled.")
    low, high = float(pairs.min()), float(pairs.max())
    pad = 0.04 * ((high - low) or 1.0)
    gaps = pairs[:, 1] - pairs[:, 0]
    largest = float(np.abs(gaps).max())
    reach = (1.15 * largest) or 1.0
    across = _Linear(low - pad, high + pad, 52, 406)
    up, gap = _Linear(low - pad, high + pad, 262, 12), _Linear(-reach, reach, 374, 284)
    ticks = _ticks(low - pad, high + pad)
    parts = [_line(across(tick), 12, across(tick), 374, "grid") for tick in ticks]
    parts += [_text(across(tick), 391, f"{tick:g}", "tick", "middle") for tick in ticks]
    for axis, values in ((up, ticks), (gap, (-largest, 0.0, largest))):
        for value in values:
            parts.append(_line(52, axis(value), 406, axis(value), "grid"))
            parts.append(_text(46, axis(value) + 4, f"{value:.2g}".replace("e-0", "e-"), "tick", "end"))
    parts.append(_line(across(low), up(low), across(high), up(high), "diagonal"))
    for axis, heights in ((up, pairs[:, 1]), (gap, gaps)):
        spots = "".join(f"M{across(x):.1f} {axis(y):.1f}h0" for x, y in zip(pairs[:, 0], heights, strict=True))
        parts.append(Markup('<path class="cloud" d="{}"/>').format(spots))
    parts += [_text(229, 412, "PyTorch", "label", "middle"), _upright(137, "bundle"), _upright(329, "difference")]
    caption = (
        f"{len(pairs):,} logits: the largest of each position and others from the full range. Above: both are equal "
        f"on the line. Below: bundle minus PyTorch, at most {figure(largest)}."
    )
    return Plot(title, _svg(420, 420, parts, title), caption)


def histogram(exhibits: Sequence[Exhibit]) -> Plot:
    """Plot a histogram of the divergences of the next-token distributions."""
    title = "Divergence of the next token's distribution"
    values = np.array([value for exhibit in exhibits for value in exhibit.divergences], float)
    undefined = sum(exhibit.undefined for exhibit in exhibits)
    if not len(values):
        return Plot(title, Markup(), "No distributions were compared.")
    least = 1e-16  # smaller values are float64 rounding of the comparison itself
    exponents = np.floor(np.log10(np.maximum(values, least))).astype(int)
    first, last = min(int(exponents.min()), -9), max(int(exponents.max()), -7)
    counts = [(exponent, int((exponents == exponent).sum())) for exponent in range(first, last + 1)]
    width, height, left, bottom, top = 420, 420, 48, 44, 22
    tallest = max(count for _, count in counts)
    step = (width - left - 12) / len(counts)
    parts = [_line(left, height - bottom, width - 12, height - bottom, "axis")]
    every = max(1, math.ceil(46 / step))
    for index, (exponent, count) in enumerate(counts):
        x, tall = left + index * step, (height - bottom - top) * count / tallest
        if count:
            parts.append(_box(x + 1.5, height - bottom - tall, step - 3, max(tall, 1.5), "column"))
            parts.append(_text(x + step / 2, height - bottom - tall - 5, f"{count:,}", "tick", "middle"))
        if (index - len(counts) + 1) % every == 0:
            words = f"<1e{exponent + 1}" if exponent == -16 else f"1e{exponent}"
            parts.append(_text(x + step / 2, height - bottom + 17, words, "tick", "middle"))
    parts.append(_text((left + width - 12) / 2, height - 8, "Kullback–Leibler divergence, nats", "label", "middle"))
    parts.append(_upright((top + height - bottom) / 2, "positions"))
    caption = (
        f"{len(values):,} positions: mean {figure(float(values.mean()))}, 99th percentile "
        f"{figure(float(np.percentile(values, 99)))}, largest {figure(float(values.max()))} nats."
    )
    if undefined:
        caption += f" At {undefined:,} more positions a logit was not finite."
    return Plot(title, _svg(width, height, parts, title), caption)


@dataclass(frozen=True)
class _Linear:
    """Maps values to pixels, from `low` at `begin` to `high` at `end`."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


@dataclass(frozen=True)
class _Log:
    """Maps values to pixels logarithmically, from `low` at `bottom` to `high` at `top`."""

    low: float
    high: float
    bottom: float
    top: float

    def __call__(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        share = math.log10(inside / self.low) / math.log10(self.high / self.low)
        return self.bottom - share * (self.bottom - self.top)

    @property
    def decades(self) -> list[int]:
        return list(range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1))


def _points(place: str, gates: Iterable[Gate]) -> list[_Point]:
    rows: dict[int | None, list[Gate]] = {}
    for gate in gates:
        if gate.place == place:
            rows.setdefault(gate.layer if place in _LAYERED else None, []).append(gate)
    if len(rows) > 1:
        rows.pop(None, None)  # a gate of the place itself next to its layers: a comparison that raised
    points = []
    for layer in sorted(rows, key=lambda layer: layer or 0):
        errors = [gate.measured if math.isfinite(gate.measured) else ROOF for gate in rows[layer]]
        failing = sum(not gate.ok for gate in rows[layer])
        limit = max(gate.limit for gate in rows[layer])
        label = "" if layer is None else str(layer)
        points.append(_Point(place, label, min(errors), max(errors), limit, failing))
    return points


def _point(x: float, point: _Point, axis: _Log) -> Markup:
    high, low = axis(point.high), axis(max(point.low, FLOOR))
    words = f"{point.place}{f' {point.label}' if point.label else ''}: {figure(point.high)}"
    if point.high >= ROOF:
        words = f"{point.place} {point.label}: not comparable, or {figure(ROOF)} and more"
    words += f", {point.failing} over the limit" if point.failing else ""
    kind = "dot" if point.high else "ring"
    shape = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(kind, x, high)
    if point.failing:
        cross = f"M{x - 5:.1f} {high - 5:.1f}l10 10m0 -10l-10 10"
        shape = Markup('<path class="cross" d="{}"/>').format(cross)
    reach = _line(x, high, x, low, "reach fail" if point.failing else "reach")
    return Markup("<g>{}{}<title>{}</title></g>").format(reach, shape, words)


def _rows(axis: _Log, left: float, right: float) -> Markup:
    parts = []
    every = max(1, len(axis.decades) // 8)
    for exponent in axis.decades[::every]:
        y = axis(10.0**exponent)
        parts.append(_line(left, y, right, y, "grid"))
        parts.append(_text(left - 7, y + 4, f"1e{exponent}", "tick", "end"))
    return Markup("").join(parts)


def _below(value: float) -> float:
    return math.pow(10, max(math.floor(math.log10(max(value, FLOOR))), math.log10(FLOOR)))


def _above(value: float) -> float:
    return math.pow(10, math.ceil(math.log10(value)))


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _svg(width: float, height: float, parts: Iterable[Markup], title: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, title, Markup("").join(parts)
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<path class="{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(kind, x1, y1, x2, y2)


def _box(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
        kind, x, y, width, height
    )


def _text(x: float, y: float, words: str, kind: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, escape(words)
    )


def _upright(y: float, words: str) -> Markup:
    """Return the label of the vertical axis."""
    rotated = '<text class="label" text-anchor="middle" transform="translate(13 {:.1f}) rotate(-90)">{}</text>'
    return Markup(rotated).format(y, words)
