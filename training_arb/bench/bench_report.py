"""Reports of the benches: a table for people, a plot, and one JSON line last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from training_arb.common.atomic_files import write_json
from training_arb.common.text_table import format_table


def report(result: dict, columns: dict[str, str], path: str | Path | None) -> None:
    """Print the table of result["rows"] and, last, the whole result as one JSON line; write it to `path` if given."""
    print(format_table(result["rows"], columns), flush=True)
    print()
    if path:
        write_json(path, result)
    print(json.dumps(result), flush=True)


def plot_fractions(rows: Sequence[dict], path: str | Path, title: str) -> None:
    """A PNG of the share of the physical limit that every row reached: a panel per comparison, a bar per
    implementation.

    rows: with "contest" (what was run), "peer" and "fraction_of_limit"; those without a fraction are left out.
    """
    from matplotlib.figure import Figure  # here, so that a bench that draws nothing does not need it

    from training_arb.report.training_plots import COLOURS

    rows = [row for row in rows if row["fraction_of_limit"] is not None]
    contests = list(dict.fromkeys(row["contest"] for row in rows))
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    colours = {peer: COLOURS[i % len(COLOURS)] for i, peer in enumerate(peers)}
    tall = 0.9 + sum(0.3 * sum(row["contest"] == contest for row in rows) + 0.7 for contest in contests)
    figure = Figure(figsize=(8, max(tall, 2)), constrained_layout=True)
    panels = figure.subplots(max(1, len(contests)), 1, sharex=True, squeeze=False)
    for panel, contest in zip(panels[:, 0], contests, strict=False):
        bars = [row for row in rows if row["contest"] == contest][::-1]
        values = [row["fraction_of_limit"] for row in bars]
        drawn = panel.barh([row["peer"] for row in bars], values, color=[colours[row["peer"]] for row in bars])
        panel.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
        panel.axvline(1, color="#aaaaaa", linestyle=":")
        panel.set_title(contest, loc="left", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    panels[-1, 0].set_xlabel("share of the physical limit measured in the same run")
    panels[-1, 0].set_xlim(0, max([1.1, *(1.12 * row["fraction_of_limit"] for row in rows)]))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
