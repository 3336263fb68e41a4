"""Writes report.html, one file that shows a run, with its plots inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from training_arb.common.atomic_files import write_bytes

from .run_record import LEVELS, RunRecord, read_run
from .training_plots import COLOURS, CURVES, draw_curve

LEVEL_COLOURS = LinearSegmentedColormap.from_list("levels", [COLOURS[1], "#dddddd", COLOURS[0]])
LEAST_LABELLED = 0.04  # share of a bar that has room for its figure
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222 }}
img {{ max-width: 100% }} pre {{ background: #f5f5f5; padding: 1em; overflow-x: auto; white-space: pre-wrap }}
td {{ padding: 0 1.5em 0 0; vertical-align: top }} .missing {{ color: #a33 }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write_report(run_dir: str | Path, html: str | Path | None = None, png: str | Path | None = None) -> list[str]:
    """Write the report of a run's folder as a page, as a picture, or both; returns what was missing for it.

    Raises ValueError when the folder is not found.
    """
    record = read_run(run_dir)
    picture = _picture(record)
    if png is not None:
        write_bytes(png, picture)
    if html is not None:
        write_bytes(html, _page(record, picture).encode())
    return record.missing


def _picture(record: RunRecord) -> bytes:
    height = 4 + max(3.5, 0.16 * len(record.zeros_by_layer))
    figure = Figure(figsize=(13, height), constrained_layout=True)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[4, height - 4])[:, 0]
    for panel, curve in zip(upper.subplots(1, len(CURVES)), CURVES, strict=True):
        draw_curve(panel, record.history, *curve)
    flips, zeros, areas = lower.subplots(1, 3, width_ratios=[3, 2, 4])
    _draw_by_layer(flips, record.flips_by_layer, "share of levels changed per step")
    flips.set_xlabel(" to ".join(record.flips_between or ("no two checkpoints",)))
    _draw_by_layer(zeros, record.zeros_by_layer, "share of zeros")
    zeros.set(yticks=[] if record.flips_by_layer else zeros.get_yticks())
    _draw_levels(areas, record)
    for panel in (*upper.axes, *lower.axes):
        panel.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _draw_by_layer(panel: Axes, shares: Mapping[str, float], title: str) -> None:
    names = list(shares)[::-1]
    panel.barh(names, [shares[name] for name in names], color=COLOURS[0])
    panel.tick_params(axis="y", labelsize=7)
    panel.set_title(title, fontsize=10)


def _draw_levels(panel: Axes, record: RunRecord) -> None:
    names, left = list(record.levels_by_area)[::-1], [0.0] * len(record.levels_by_area)
    used = [level for level in LEVELS if any(counts[level - LEVELS[0]] for counts in record.levels_by_area.values())]
    largest = max(map(abs, used), default=0) or 1
    for level in used:
        counts = [record.levels_by_area[name] for name in names]
        shares = [(count[level - LEVELS[0]] / count.sum()).item() for count in counts]
        colour = LEVEL_COLOURS((level / largest + 1) / 2)
        bars = panel.barh(names, shares, left=left, label=f"{level:+d}" if level else "0", color=colour)
        labels = [f"{share:.0%}" if share >= LEAST_LABELLED else "" for share in shares]
        panel.bar_label(bars, labels, label_type="center", fontsize=8)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    if names:
        spacing = {"handlelength": 1, "handletextpad": 0.4, "columnspacing": 0.8, "fontsize": 8}
        panel.legend(frameon=False, ncols=len(used), loc="upper center", bbox_to_anchor=(0.5, -0.06), **spacing)
    panel.set_title("share of each level by area", fontsize=10)
    panel.set_xlim(0, 1)


def _page(record: RunRecord, picture: bytes) -> str:
    image = base64.b64encode(picture).decode()
    parts = [f'<p class="missing">{escape(line)}</p>' for line in record.missing]
    parts += [f'<img alt="curves, flips and zeros per layer, levels by area" src="data:image/png;base64,{image}">']
    parts += _section("Results", _table(record.results.items()) if record.results else None)
    parts += _section("Sample", _text(record.sample))
    parts += _section("State", _text(record.audit.table() if record.audit else None))
    parts += _section("Settings", _table(record.settings.items()) if record.settings else None)
    return PAGE.format(title=escape(f"ARB run {record.run_dir.resolve().name}"), body="\n".join(parts))


def _section(title: str, body: str | None) -> list[str]:
    return [] if body is None else [f"<h2>{title}</h2>", body]


def _text(text: str | None) -> str | None:
    return None if text is None else f"<pre>{escape(text)}</pre>"


def _table(rows: Iterable[tuple[str, object]]) -> str:
    cells = (f"<tr><td>{escape(str(key))}</td><td>{escape(str(value))}</td></tr>" for key, value in rows)
    return f"<table>{''.join(cells)}</table>"
