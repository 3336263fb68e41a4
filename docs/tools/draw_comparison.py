"""Draw README's picture: ARB against AdamW in float32, bfloat16 and 8 bits, from the rows in benchmarks/.

Each panel names the files that its numbers come from. A configuration without a row is shown as "not measured".

examples:
  python docs/tools/draw_comparison.py
  python docs/tools/draw_comparison.py elsewhere/comparison.png
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import json
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent.parent
BENCHMARKS = ROOT / "benchmarks"
TARGET = ROOT / "docs" / "figures" / "comparison.png"
OURS = {
    "TwoTrit": "ARB, two trits a weight",
    "TwoTrit_Edges": "ARB, two trits at the edges",
    "TrueTernary": "ARB, one trit a weight",
}
NAMES = {
    **OURS,
    "Adam_STE": "AdamW, ternary forward",
    "Adam_FP32": "AdamW, float32",
    "Adam_BF16": "AdamW, bfloat16 matmuls",
    "Adam_8bit": "AdamW, 8-bit moments",
}
BLUE, GREY, FAINT = "#1b6ca8", "#b9bec5", "#8a8a8a"
QUALITY = (
    "quality_wikitext2_seed0.json",
    "quality_wikitext2_bf16_seed0.json",
    "quality_wikitext2_adam8bit_seed0.json",
)


class Panel(NamedTuple):
    """values: configuration -> number, for those that were measured."""

    title: str
    values: dict[str, float]
    style: str
    files: tuple[str, ...]


def read(name: str) -> dict:
    return json.loads((BENCHMARKS / name).read_text(encoding="utf-8"))


def quality(key: str) -> dict[str, float]:
    """One number of every configuration in the files of QUALITY; the first file that has it counts."""
    rows = [row for name in QUALITY for row in read(name)["configs"].items()]
    return {name: row[key] for name, row in reversed(rows) if name in NAMES}


def step_times(file: str) -> dict[str, float]:
    """Median step in ms; of ARB the int8 rows."""
    rows = read(file)["rows"]
    return {row["config"]: row["step_ms_p50"] for row in rows if row["config"] not in OURS or row["compute"] == "int8"}


def panels() -> list[Panel]:
    xeon = "train_xeon_amx.json"
    return [
        Panel("state that training keeps,\nbytes a weight", quality("state_bytes_per_weight"), "{:.2f}", QUALITY),
        Panel("held-out loss, nats per byte\n(1.1M weights, WikiText-2)", quality("val_loss"), "{:.3f}", QUALITY),
        Panel("training step, ms\n(14M weights, Xeon with AMX)", step_times(xeon), "{:.0f}", (xeon,)),
    ]


def draw(path: Path) -> None:
    """One panel a quantity, one bar a configuration; shorter is better in all of them."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, constrained_layout=True)
    names = [*NAMES][::-1]
    for axis, panel in zip(axes, panels(), strict=True):
        largest = max(panel.values.values())
        for place, name in enumerate(names):
            value = panel.values.get(name)
            if value is None:
                axis.text(0.02 * largest, place, "not measured", va="center", fontsize=8.5, color=FAINT, style="italic")
                continue
            axis.barh(place, value, height=0.66, color=BLUE if name in OURS else GREY)
            axis.text(value + 0.02 * largest, place, panel.style.format(value), va="center", fontsize=9)
        axis.set(xlim=(0, 1.25 * largest), ylim=(-0.6, len(names) - 0.4), yticks=range(len(names)), xticks=[])
        axis.set_yticklabels([NAMES[name] for name in names], fontsize=9.5)
        axis.set_title(panel.title, fontsize=10, loc="left")
        axis.set_xlabel("\n".join(panel.files), fontsize=6.5, color=FAINT, loc="left")
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(length=0)
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path)
    print(f"written     {path}")


if __name__ == "__main__":
    main()
