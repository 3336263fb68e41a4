"""Writes report.html, one file that shows a run, with its plots inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training_arb.common.atomic_files import write_bytes

from .run_record import RunRecord, read_run
from .training_plots import COLOURS, CURVES, draw_curve

TRITS = ("-1", "0", "+1")
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
    height = 4 + max(3.5, 0.16 * len(record.flips_by_layer))
    figure = Figure(figsize=(13, height), constrained_layout=True)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[4, height - 4])[:, 0]
    for panel, curve in zip(upper.subplots(1, len(CURVES)), CURVES, strict=True):
        draw_curve(panel, record.history, *curve)
    layers, areas = lower.subplots(1, 2)
    _draw_flips(layers, record)
    _draw_trits(areas, record)
    for panel in (*upper.axes, *lower.axes):
        panel.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _draw_flips(panel: Axes, record: RunRecord) -> None:
    names = list(record.flips_by_layer)[::-1]
    panel.barh(names, [record.flips_by_layer[name] for name in names], color=COLOURS[0])
    panel.tick_params(axis="y", labelsize=7)
    between = " to ".join(record.flips_between or ("no two checkpoints",))
    panel.set(title=f"trits changed per step, {between}")


def _draw_trits(panel: Axes, record: RunRecord) -> None:
    names, left = list(record.trits_by_area)[::-1], [0.0] * len(record.trits_by_area)
    for i, trit in enumerate(TRITS):
        shares = [(record.trits_by_area[name][i] / record.trits_by_area[name].sum()).item() for name in names]
        bars = panel.barh(names, shares, left=left, label=trit, color=(COLOURS[1], "#cccccc", COLOURS[0])[i])
        panel.bar_label(bars, [f"{share:.0%}" for share in shares], label_type="center", fontsize=8)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    if names:
        panel.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.06))
    panel.set(title="share of each trit by area", xlim=(0, 1))


def _page(record: RunRecord, picture: bytes) -> str:
    image = base64.b64encode(picture).decode()
    parts = [f'<p class="missing">{escape(line)}</p>' for line in record.missing]
    parts += [f'<img alt="curves, flips per layer, trits by area" src="data:image/png;base64,{image}">']
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
