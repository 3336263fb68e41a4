"""Draw the figures of docs/concepts.md from what the kernels really compute, into docs/figures/.

examples:
  python docs/tools/draw_figures.py
  python docs/tools/draw_figures.py elsewhere/
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.patches import FancyArrowPatch, Rectangle

from arb_kernels.formats.exponents import EIGHTHS, QUARTERS, power_of_two
from arb_kernels.formats.momentum_format import MomentumFormat
from arb_kernels.formats.packing import TRITS_PER_BYTE, largest_level, pack_levels, packed_width, unpack_levels
from arb_kernels.formats.rule_states import MomentumState
from arb_kernels.random_bits import random_bits, stream_key, uniform_from_high_bits, uniform_from_low_bits
from arb_kernels.rules.momentum import fold_momentum, momentum_update, move_weights, normalise, third_of_line

FOLDER = Path(__file__).resolve().parent.parent / "figures"
DPI = 130
MINUS, ZERO, PLUS, INK, FAINT, MARK = "#d1495b", "#f0eee9", "#1b6ca8", "#222222", "#8a8a8a", "#e08e45"
TRIT_COLOURS = ListedColormap([MINUS, ZERO, PLUS])
DIVERGING = LinearSegmentedColormap.from_list("arb", [MINUS, ZERO, PLUS])
FORM = MomentumFormat(4)
BETA = 0.9


def trit_text(trit: int) -> str:
    return f"{trit:+d}" if trit else "0"


def text_on(trit: int) -> str:
    """The colour of letters on a trit's cell."""
    return "white" if trit else INK


def draw_packing(path: Path) -> None:
    """A row of 23 trits, its five planes, and the five bytes that pack_levels makes of them."""
    torch.manual_seed(3)
    columns = 23
    row = torch.randint(-1, 2, (1, columns), dtype=torch.int8)
    packed = pack_levels(row)[0].tolist()
    trits, width = row[0].tolist(), packed_width(columns)
    figure, axes = plt.subplots(figsize=(10, 3.9), constrained_layout=True)
    axes.set(xlim=(-3.4, 23.4), ylim=(-8.9, 1.7), aspect="equal")
    axes.axis("off")

    def cell(x: float, y: float, trit: int | None, label: str | None = None) -> None:
        colour = "white" if trit is None else TRIT_COLOURS(trit + 1)
        hatch = "////" if trit is None else None
        axes.add_patch(
            Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="#bbbbbb" if hatch else "white", hatch=hatch, lw=1.5)
        )
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor="none", edgecolor=FAINT, linewidth=0.6))
        if trit is not None:
            axes.text(x + 0.5, y + 0.5, trit_text(trit), ha="center", va="center", fontsize=9, color=text_on(trit))
        if label is not None:
            axes.text(x + 0.5, y + 1.25, label, ha="center", va="center", fontsize=8, color=FAINT)

    for column, trit in enumerate(trits):
        cell(column, 0, trit, str(column))
    axes.text(-0.3, 0.5, "row", ha="right", va="center", fontsize=10)
    left, top = 1, -3
    for plane in range(TRITS_PER_BYTE):
        axes.plot([plane * width + 0.1, min((plane + 1) * width, columns) - 0.1], [-0.25, -0.25], color=INK, lw=1.2)
        axes.text(
            plane * width + 2.5 - (plane == 4), -0.75, f"plane {plane}", ha="center", va="center", fontsize=8, color=INK
        )
        axes.text(left - 0.3, top - plane + 0.5, f"plane {plane}  x {3**plane}", ha="right", va="center", fontsize=9)
        for byte in range(width):
            column = plane * width + byte
            cell(left + byte, top - plane, trits[column] if column < columns else None)
    for byte, value in enumerate(packed):
        middle = left + byte + 0.5
        axes.text(middle, top + 1.3, f"b {byte}", ha="center", va="center", fontsize=8, color=FAINT)
        axes.add_patch(
            FancyArrowPatch((middle, top - 4.1), (middle, top - 4.9), arrowstyle="-|>", mutation_scale=9, color=INK)
        )
        axes.text(middle, top - 5.3, str(value), ha="center", va="center", fontsize=10, weight="bold")
    axes.text(left - 0.3, top - 5.3, "stored", ha="right", va="center", fontsize=10)

    digits = [trits[plane * width] % 3 for plane in range(TRITS_PER_BYTE)]
    terms = " + ".join(f"{digit} x {3**plane}" for plane, digit in enumerate(digits))
    lines = [
        "a digit is the trit mod 3:   0 is 0,   +1 is 1,   -1 is 2",
        f"b 0:  {terms} = {packed[0]}",
        f"{columns} trits take {width} bytes; a byte holds 3^5 = 243 of its 256 values,",
        "243 to 255 mean nothing, and the audit looks for them",
        "hatched: padding, digit 0; a byte of zeros is five zero weights",
        "unpacking reads the planes: each is a stretch of neighbouring columns",
    ]
    for number, line in enumerate(lines):
        axes.text(8.2, top + 0.4 - 0.95 * number, line, ha="left", va="center", fontsize=9.5)
    save(figure, path)


def draw_exponents(path: Path) -> None:
    """The ladder of scales, and a small matrix with one exponent a row: trits, scales, effective weights."""
    torch.manual_seed(5)
    figure = plt.figure(figsize=(10, 4.2), constrained_layout=True)
    ladder, *panels = figure.subplot_mosaic(
        [["ladder"] * 3, ["T", "S", "W"]], height_ratios=[1, 1.5], width_ratios=[2, 1, 2]
    ).values()
    exponents = torch.arange(-32, 1, dtype=torch.int8)
    scales = power_of_two(exponents, EIGHTHS).tolist()
    ladder.set(xscale="log", xlim=(scales[0] / 1.06, scales[-1] * 1.06), ylim=(-0.9, 1.5))
    for exponent, scale in zip(exponents.tolist(), scales, strict=True):
        octave = exponent % EIGHTHS == 0
        ladder.plot(
            [scale, scale], [0, 0.7 if octave else 0.35], color=INK if octave else FAINT, lw=1.6 if octave else 1
        )
        if octave:
            ladder.text(scale, 0.85, f"E = {exponent}", ha="center", va="bottom", fontsize=9)
            ladder.text(
                scale, -0.3, f"S = 1/{round(1 / scale)}" if scale < 1 else "S = 1", ha="center", va="top", fontsize=9
            )
    ladder.axhline(0, color=INK, lw=1)
    step = scales[1] / scales[0] - 1
    ladder.text(
        scales[4], -0.45, f"one step of E: {100 * step:.1f} %", ha="center", va="center", fontsize=8.5, color=FAINT
    )
    ladder.axis("off")
    ladder.set_title("an exponent counts eighths of an octave: S = 2^(E / 8)", fontsize=11)

    rows, columns = 6, 20
    trits = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    exponent = torch.randint(-31, -8, (rows, 1), dtype=torch.int8)
    scale = power_of_two(exponent, EIGHTHS)
    weight = unpack_levels(pack_levels(trits), columns) * scale
    largest = weight.abs().max().item()
    panels[0].imshow(trits, cmap=TRIT_COLOURS, vmin=-1, vmax=1, aspect="auto")
    panels[0].set_title("T: trits, packed", fontsize=11)
    panels[1].set(xlim=(0, 1), ylim=(rows - 0.5, -0.5))
    for row in range(rows):
        text = f"2^({exponent[row].item()} / 8) = {scale[row].item():.4f}"
        panels[1].text(0.5, row, text, ha="center", va="center", fontsize=10)
    panels[1].set_title("S: one int8 a row (or group)", fontsize=11)
    panels[2].imshow(weight, cmap=DIVERGING, vmin=-largest, vmax=largest, aspect="auto")
    panels[2].set_title("W = S T: never stored", fontsize=11)
    for panel in panels:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    save(figure, path)


@dataclass
class Matrix:
    """A matrix that learns another one, `wanted`, from noisy gradients: real state, real updates."""

    wanted: torch.Tensor
    packed: torch.Tensor
    accum: torch.Tensor
    accum_exp: torch.Tensor
    noise: float
    steps: int = 0

    @classmethod
    def fresh(cls, rows: int, columns: int, noise: float) -> Matrix:
        residual = torch.randint(0, FORM.cell, (rows, columns)).to(FORM.dtype)
        packed = pack_levels(torch.randint(-1, 2, (rows, columns), dtype=torch.int8))
        wanted = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
        return cls(wanted, packed, residual, torch.zeros(rows, 1, dtype=torch.int8), noise)

    @property
    def levels(self) -> torch.Tensor:
        return unpack_levels(self.packed, self.wanted.shape[1])

    @property
    def latent(self) -> torch.Tensor:
        """int16 (rows, columns): the position of each weight on its line, 16 T + residual."""
        return self.levels.to(torch.int16) * FORM.cell + FORM.split(self.accum)[0]

    def gradient(self) -> torch.Tensor:
        """float32 (rows, columns): towards the wanted trits, with noise, small as gradients are."""
        error = (self.levels - self.wanted).float()
        return 0.01 * (error + self.noise * torch.randn(error.shape))

    def key(self) -> int:
        return stream_key(0, self.steps, 0, 1)

    def step(self, dW: torch.Tensor, lr: float) -> None:
        momentum_update(MomentumState(self.packed, self.accum, self.accum_exp), dW, self.key(), lr, BETA)
        self.steps += 1


def draw_latent_line(path: Path) -> None:
    """The three cells with one weight's place on them, and how four weights of a learning matrix travel."""
    torch.manual_seed(1)
    figure, (line, travel) = plt.subplots(2, 1, figsize=(10, 6.2), height_ratios=[1, 2.1], constrained_layout=True)
    low, high = -FORM.cell * 3 // 2, FORM.cell * 3 // 2
    line.set(xlim=(low - 2.5, high + 2.5), ylim=(-1.9, 2.4))
    for trit in (-1, 0, 1):
        start = FORM.cell * trit - FORM.cell // 2
        line.add_patch(Rectangle((start, 0), FORM.cell, 1, facecolor=TRIT_COLOURS(trit + 1), edgecolor="white", lw=2))
        line.text(start + 8, 1.45, f"trit {trit_text(trit)}", ha="center", va="center", fontsize=11)
        for position in range(start, start + FORM.cell):
            line.text(
                position + 0.5,
                0.5,
                position - FORM.cell * trit,
                ha="center",
                va="center",
                fontsize=7,
                color=text_on(trit),
            )
    for edge in (low, low + FORM.cell, high - FORM.cell, high - 1):
        line.text(edge + 0.5, -0.45, edge, ha="center", va="center", fontsize=8.5, color=FAINT)
    line.text(low - 0.6, 0.5, "residual", ha="right", va="center", fontsize=8.5, color=FAINT)
    line.text(low - 0.6, -0.45, "latent", ha="right", va="center", fontsize=8.5, color=FAINT)
    place = 11
    trit, residual = move_weights(
        torch.ones(1, 1, dtype=torch.int8), torch.full((1, 1), -5), torch.zeros(1, 1), torch.zeros(1, 1), 0.0, FORM.cell
    )
    assert trit.item() * FORM.cell + residual.item() == place
    line.add_patch(Rectangle((place, 0), 1, 1, facecolor="none", edgecolor=MARK, lw=2.5))
    line.annotate(
        f"latent {place}: trit {trit_text(trit.item())}, residual {residual.item()} ({place} = 16 x 1 - 5)",
        (place + 0.5, 0),
        (place + 0.5, -1.5),
        ha="center",
        va="center",
        fontsize=10,
        color=INK,
        arrowprops={"arrowstyle": "-|>", "color": MARK, "lw": 1.5},
    )
    line.set_title(
        "a weight's latent line: three cells of 16 steps, a 4-bit residual says where in the cell", fontsize=11
    )
    line.axis("off")

    matrix = Matrix.fresh(16, 64, noise=2.0)
    places, lr = [matrix.latent], 0.08
    for _ in range(120):
        matrix.step(matrix.gradient(), lr)
        places.append(matrix.latent)
    history = torch.stack(places)
    for trit in (-1, 0, 1):
        travel.axhspan(
            FORM.cell * trit - 8.5,
            FORM.cell * trit + 7.5,
            color=TRIT_COLOURS(trit + 1),
            alpha=0.18 if trit else 0.7,
            lw=0,
        )
        travel.text(121.5, FORM.cell * trit, f"trit {trit_text(trit)}", va="center", fontsize=10)
    for start, wanted, colour in ((-1, 1, MARK), (1, -1, "#2e933c"), (0, 0, INK), (0, 1, "#8d5a97")):
        chosen = (history[0] + 8).div(16, rounding_mode="floor").eq(start) & matrix.wanted.eq(wanted)
        row, column = chosen.nonzero()[2].tolist()
        travel.step(
            range(len(history)),
            history[:, row, column],
            where="post",
            color=colour,
            lw=1.6,
            label=f"starts at {trit_text(start)}, wants {trit_text(wanted)}",
        )
    travel.set(
        xlim=(0, 120),
        ylim=(-25, 24),
        xlabel=f"update (rate {lr} thirds of the line per step, noisy gradients)",
        ylabel="latent",
        yticks=[-24, -8, 8, 23],
    )
    travel.spines[["top", "right"]].set_visible(False)
    travel.legend(frameon=False, ncol=4, loc="upper center", bbox_to_anchor=(0.5, 1.12), fontsize=9)
    save(figure, path)


def draw_two_trits(path: Path) -> None:
    """The latent lines of one trit and of two, at a scale that makes them equally long: rates are in their thirds."""
    figure, panels = plt.subplots(2, 1, figsize=(10, 3.6), constrained_layout=True)
    for trits, panel in zip((1, 2), panels, strict=True):
        largest = largest_level(trits)
        cells, end = 2 * largest + 1, FORM.cell * (2 * largest + 1) // 2
        for level in range(-largest, largest + 1):
            start, colour = FORM.cell * level - FORM.cell // 2, DIVERGING((level / largest + 1) / 2)
            panel.add_patch(Rectangle((start, 0), FORM.cell, 1, facecolor=colour, edgecolor="white", lw=2))
            first, second = (level + 1) // 3, (level + 1) % 3 - 1
            parts = f"\n3 x {first} + {second}" if trits == 2 else ""
            ink = "white" if 2 * abs(level) > largest else INK
            panel.text(
                FORM.cell * level, 0.5, trit_text(level) + parts, ha="center", va="center", fontsize=9, color=ink
            )
            panel.text(start, -0.22, start, ha="center", va="center", fontsize=8, color=FAINT)
        panel.text(end - 1, -0.22, end - 1, ha="center", va="center", fontsize=8, color=FAINT)
        third = third_of_line(FORM.cell, trits)
        panel.annotate(
            "", (-end + third, 1.2), (-end, 1.2), arrowprops={"arrowstyle": "<|-|>", "color": MARK, "lw": 1.5}
        )
        middle = -end + third / 2
        panel.text(middle, 1.42, f"a rate of 1: {third:.0f} steps", ha="center", va="center", fontsize=8.5)
        panel.set(xlim=(-end * 1.04, end * 1.04), ylim=(-0.5, 1.7))
        panel.set_title(
            f"{trits} trit{'s' * (trits - 1)} a weight: {cells} levels, {cells} cells of {FORM.cell} steps", fontsize=11
        )
        panel.axis("off")
    save(figure, path)


def draw_update(path: Path) -> None:
    """One real update of an 8 x 16 matrix, stage by stage, and the numbers of one weight that flips."""
    torch.manual_seed(2)
    matrix, lr = Matrix.fresh(8, 16, noise=1.0), 0.25
    for _ in range(12):
        matrix.step(matrix.gradient(), lr)
    before, trits = matrix.latent, matrix.levels
    residual, codes = FORM.split(matrix.accum)
    old_step = power_of_two(matrix.accum_exp, QUARTERS)
    dW, noise = matrix.gradient(), random_bits(matrix.key(), 8, 16)
    new_codes, exponent = fold_momentum(codes, matrix.accum_exp, dW, uniform_from_low_bits(noise), BETA, FORM)
    step = power_of_two(exponent, QUARTERS)
    direction = BETA * new_codes * step + (1 - BETA) * dW
    update = normalise(direction.clone())
    new_trits, new_residual = move_weights(
        trits, residual, update.clone(), uniform_from_high_bits(noise), lr, FORM.cell
    )
    matrix.step(dW, lr)
    assert torch.equal(new_trits, matrix.levels) and torch.equal(new_residual, FORM.split(matrix.accum)[0])
    after = matrix.latent

    flipped = (new_trits != trits).nonzero().tolist()
    unclipped = [at for at in flipped if abs(update[tuple(at)]) < 1.5]
    row, column = max(unclipped, key=lambda at: abs(new_codes[tuple(at)]))
    at = (row, column)
    shift = (after - before)[at].item()
    stages = [
        ("1  gradient", dW, f"dW = {dW[at]:+.4f}\nlives in this layer's backward only"),
        (
            "2  fold",
            new_codes,
            f"m = 0.9 m + 0.1 dW, in 4 bits\n"
            f"code {codes[at]:+d} x {old_step[row, 0]:.5f}  becomes  {new_codes[at]:+d} x {step[row, 0]:.5f}",
        ),
        ("3  Nesterov direction", direction, f"d = 0.9 m + 0.1 dW\nd = {direction[at]:+.5f}"),
        ("4  normalise", update, f"by row and column RMS, to unit RMS, clip at 2\nu = {update[at]:+.3f}"),
        (
            "5  move",
            after,
            f"by -rate x 16 x u = {-lr * FORM.cell * update[at]:+.2f}, rounded at random: {shift:+d}\n"
            f"latent {before[at]} becomes {after[at]}",
        ),
        (
            "6  flip",
            new_trits,
            f"the next cell begins: trit {trit_text(trits[at].item())} becomes {trit_text(new_trits[at].item())}\n"
            f"{len(flipped)} of {trits.numel()} trits flip in this update",
        ),
    ]
    figure, panels = plt.subplots(2, 3, figsize=(11, 5.7), constrained_layout=True)
    for panel, (title, values, caption) in zip(panels.flat, stages, strict=True):
        values = values.float()
        largest = {"5  move": 24.0, "6  flip": 1.0}.get(title, values.abs().max().item())
        panel.imshow(values, cmap=DIVERGING, vmin=-largest, vmax=largest, aspect="auto")
        panel.set_title(title, fontsize=12, loc="left", weight="bold")
        panel.set_xlabel(caption, fontsize=9.5)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
        panel.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="none", edgecolor=MARK, lw=2.5))
    for y, x in flipped:
        panels.flat[-1].plot(x, y, marker="o", markersize=4, color=MARK if [y, x] != [row, column] else "white")
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
    plt.close(figure)


FIGURES = {
    "packing.png": draw_packing,
    "exponents.png": draw_exponents,
    "latent_line.png": draw_latent_line,
    "two_trits.png": draw_two_trits,
    "update.png": draw_update,
}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(folder / name)
        print(f"written     {folder / name}")


if __name__ == "__main__":
    main()
