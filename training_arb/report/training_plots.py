"""Plots of runs as PNG files: training, finetuning, and comparisons of several.

Figures are made without pyplot, whose backend and list of open figures are global.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d5a97", "#e08e45", "#555555")
CURVES = [  # logged in training, on held-out text, title
    ("loss", "eval_loss", "loss, nats per byte"),
    ("bits_per_byte", "eval_bits_per_byte", "bits per byte"),
    ("flip_rate", None, "share of levels changed per step"),
]


def _series(history: Sequence[dict], key: str | None) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[key]) for entry in history if key in entry and "step" in entry]
    return [step for step, _ in points], [value for _, value in points]


def draw_curve(panel: Axes, history: Sequence[dict], training: str, held_out: str | None, title: str) -> None:
    """One measure over steps, from a Trainer's log history: in training, and on held-out text where it is measured."""
    styles: tuple[tuple[str | None, dict[str, Any]], ...] = (
        (training, {"color": COLOURS[0], "label": "training"}),
        (held_out, {"color": COLOURS[1], "label": "held out", "marker": "o", "markersize": 4}),
    )
    for key, style in styles:
        steps, values = _series(history, key)
        if steps:
            panel.plot(steps, values, **style)
    if panel.lines:
        panel.legend(frameon=False)
    panel.set(title=title, xlabel="step")
    tidy(panel)


def tidy(panel: Axes) -> None:
    """A light grid, and no frame above and at the right."""
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure as a PNG."""
    figure.savefig(path, dpi=110)


def plot_training(history: Sequence[dict], path: str | Path, title: str) -> None:
    """Loss, bits per byte and flip rate over steps, from a Trainer's log history, to a PNG."""
    figure = Figure(figsize=(13, 3.8), constrained_layout=True)
    panels = figure.subplots(1, len(CURVES))
    for panel, curve in zip(panels, CURVES, strict=True):
        draw_curve(panel, history, *curve)
    panels[2].set_ylim(bottom=0)
    figure.suptitle(title)
    save(figure, path)


def plot_finetuning(
    history: Sequence[dict], before: float, after: float, held_out_after: float, path: str | Path, title: str
) -> None:
    """Losses of an adapter over steps, from a Trainer's log history, to a PNG.

    before: loss of the base on held-out conversations; after, held_out_after: losses over all conversations at the end.
    """
    figure = Figure(figsize=(8, 4.2), constrained_layout=True)
    panel = figure.subplots()
    panel.plot(*_series(history, "loss"), color=COLOURS[0], label=f"training batches; all at the end: {after:.3f}")
    points = [(0, before), *zip(*_series(history, "eval_loss"), strict=True)]
    panel.plot(
        *zip(*points, strict=True), "o-", color=COLOURS[1], markersize=4, label=f"held out: {held_out_after:.3f}"
    )
    panel.axhline(before, color="#aaaaaa", linestyle=":", label=f"frozen base, held out: {before:.3f}")
    panel.set(xlabel="step", ylabel="nats per assistant byte", title=title)
    panel.set_ylim(bottom=0)
    tidy(panel)
    panel.legend(frameon=False)
    save(figure, path)


def plot_comparison(curves: Mapping[str, Sequence[tuple[int, float]]], path: str | Path, title: str) -> None:
    """Held-out losses (step, nats per byte) per configuration, to a PNG.

    The last point is over all held-out text, the others over its beginning, so it is drawn separately.
    """
    figure = Figure(figsize=(8, 5), constrained_layout=True)
    panel = figure.subplots()
    for (name, points), colour in zip(curves.items(), COLOURS * (1 + len(curves) // len(COLOURS)), strict=False):
        if points[:-1]:
            panel.plot(*zip(*points[:-1], strict=True), color=colour)
        panel.plot(*points[-1], "o", color=colour, label=f"{name}: {points[-1][1]:.3f}")
    panel.axhline(math.log(288), color="#aaaaaa", linestyle=":", label="uniform guess: ln 288")
    panel.set(xlabel="step", ylabel="nats per byte: lines, first held-out windows; dots, all", title=title)
    tidy(panel)
    panel.legend(frameon=False)
    save(figure, path)


def plot_ablation(rows: dict, baseline: str, path: str | Path, title: str) -> None:
    """Bits per byte of each variant (an AblationRow) less the baseline's, at equal steps and equal time, to a PNG."""
    names = [name for name in rows if name != baseline][::-1]
    figure = Figure(figsize=(11, 1.6 + 0.35 * len(rows)), constrained_layout=True)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, key in zip(panels, ("bits_per_byte_equal_steps", "bits_per_byte_equal_time"), strict=True):
        start = getattr(rows[baseline], key)
        change = [getattr(rows[name], key) - start for name in names]
        bars = panel.barh(names, change, color=[COLOURS[2] if value < 0 else COLOURS[1] for value in change])
        panel.bar_label(bars, fmt="%+.3f", padding=3)
        panel.axvline(0, color="#555555", linewidth=0.8)
        panel.margins(x=0.2)
        panel.set(title=key.removeprefix("bits_per_byte_").replace("_", " "))
        panel.set(xlabel=f"bits per byte over the {baseline}'s {start:.3f}; left is better")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    save(figure, path)
