"""TernaryCodebook: vector quantisation against a packed ternary book of any size.

A small codebook is searched completely, tile by tile. In a large one, the signs of randomly rotated inputs hash to
candidate rows: several hashes, and for each the probes with the least certain signs flipped (multi-probe LSH, Lv et al.
2007). Only these rows are decoded and compared. The nearest row replaces the input with a straight-through gradient.
Rows that were used learn to match their inputs (van den Oord et al. 2017, eq. 3, both terms).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from arb_kernels.blocks.ngram_hash import hash_tokens, mix_bits, to_slot
from arb_kernels.formats.state_layout import StateTensor
from arb_kernels.random_bits import random_bits
from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.integer_state import ObservedState
from modeling_arb.layers.ternary_table import TernaryTable

EXACT_ROWS = 1 << 14  # larger codebooks are searched by candidates
TILE_SCORES = 1 << 22  # of an exact search, at a time
SAMPLES = 64  # inputs a forward keeps for renewal
RENEWED = 16  # rows a step, at most
MOST_USES = 32767
FADE_STEPS, FADE_ROWS = 256, 4096  # usage halves once in so many steps, at most so many rows a step


class Quantised(NamedTuple):
    """ids int64 (...), values (..., dim) straight through, loss () of codebook and commitment."""

    ids: torch.Tensor
    values: torch.Tensor
    loss: torch.Tensor


class TernaryCodebook(ObservedState):
    """`size` rows of `dim`. `usage` int16 counts how often a row was chosen; counts decay."""

    usage: torch.Tensor
    fade_position: torch.Tensor

    def __init__(self, settings: dict, config: ArbConfig):
        super().__init__()
        self.size, self.dim = settings["size"], settings["dim"]
        self.commitment = settings.get("commitment", 0.25)
        self.hashes, self.probes = settings["hashes"], settings.get("probes", 1)
        self.table = TernaryTable(self.size, self.dim, config)
        self.register_state(config.training_state)

    def layout(self) -> dict[str, StateTensor]:
        return {
            "usage": StateTensor((self.size,), torch.int16, "code usage", legal=((0, MOST_USES),)),
            "fade_position": StateTensor((), torch.int64, "code usage", legal=((0, self.size - 1),)),
        }

    def forward(self, values: torch.Tensor, candidates: torch.Tensor | None = None) -> Quantised:
        """values (..., dim); candidates int64 (..., C): rows to choose from, None to search the book."""
        flat = values.flatten(0, -2)
        if candidates is not None:
            candidates = candidates.flatten(0, -2)
        elif self.size > EXACT_ROWS:
            candidates = self.candidate_rows(flat.detach())
        with torch.no_grad():
            ids = self._nearest(flat) if candidates is None else self._nearest_of(flat, candidates)
        rows = self.table(ids, values.dtype)
        loss = F.mse_loss(rows, flat.detach()) + self.commitment * F.mse_loss(flat, rows.detach())
        self._observe(ids, flat, candidates)
        straight_through = flat + (rows - flat).detach()
        return Quantised(ids.view(values.shape[:-1]), straight_through.view(values.shape), loss)

    def rows_of(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The book's rows (..., dim), without autograd."""
        return self.table.rows_of(ids, dtype)

    def _nearest(self, values: torch.Tensor) -> torch.Tensor:
        """(N, dim) -> int64 (N,) over the whole book; the first of equally near rows.

        Scores are computed in float64 and rounded: the last bit of a float32 product depends on the number of inputs,
        and the choice must not.
        """
        book = self.table.effective_weight(torch.float32).double()  # (size, dim)
        offset = book.square().sum(1) / 2
        step = max(1, TILE_SCORES // self.size)
        return torch.cat([(tile.double() @ book.T - offset).float().argmax(1) for tile in values.split(step)])

    def _nearest_of(self, values: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """(N, dim), (N, C) -> int64 (N,)."""
        step = max(1, TILE_SCORES // (candidates.shape[1] * self.dim))
        chosen = []
        for tile, ids in zip(values.split(step), candidates.split(step), strict=True):
            distance = (self.rows_of(ids) - tile.float()[:, None]).square().sum(-1)
            chosen.append(ids.gather(1, distance.argmin(1, keepdim=True))[:, 0])
        return torch.cat(chosen)

    def candidate_rows(self, values: torch.Tensor) -> torch.Tensor:
        """(N, dim) -> int64 (N, hashes * probes): candidate rows by the signs of the input."""
        bits = max(1, (self.size - 1).bit_length())
        found = []
        for seed in range(self.hashes):
            index = torch.arange(bits * self.dim, device=values.device).view(bits, self.dim)
            directions = (mix_bits(index + (seed + 1) * (1 << 32)) >> 40 & 1) * 2 - 1
            angles = values.double() @ directions.double().T  # (N, bits), in float64 as in `_nearest`
            pattern = ((angles > 0).long() << torch.arange(bits, device=values.device)).sum(1, keepdim=True)
            least_sure = angles.abs().topk(min(self.probes - 1, bits), largest=False).indices
            patterns = torch.cat([pattern, pattern ^ (1 << least_sure)], dim=1)
            found.append(to_slot(hash_tokens(patterns[..., None], seed), self.size))
        return torch.cat(found, dim=1)

    def _observe(self, ids: torch.Tensor, values: torch.Tensor, candidates: torch.Tensor | None) -> None:
        stride = -(-len(ids) // SAMPLES)
        searched = ids.new_empty(len(ids), 0) if candidates is None else candidates
        self.observe(ids, values[::stride].float(), searched[::stride])

    @torch.no_grad()
    def apply_observations(self, ids: torch.Tensor, sample: torch.Tensor, searched: torch.Tensor, key: int) -> None:
        """Count uses, halve the counts of the next rows in turn, and set unused rows to inputs of the step.

        ids (N,), sample (S, dim) inputs, searched (S, C) the rows each was compared with; C = 0: the whole book.
        """
        used, counts = ids.unique(return_counts=True)
        self.usage[used] = (self.usage[used] + counts).clamp_(max=MOST_USES).to(torch.int16)
        span = min(-(-self.size // FADE_STEPS), FADE_ROWS)
        fading = (self.fade_position + torch.arange(span, device=ids.device)) % self.size
        self.usage[fading] = self.usage[fading] >> 1
        self.fade_position.add_(span).remainder_(self.size)
        order = random_bits(key, len(sample), 1, ids.device)[:, 0].argsort(stable=True)[:RENEWED]
        self._renew(sample[order], searched[order])

    def _renew(self, sample: torch.Tensor, searched: torch.Tensor) -> None:
        if searched.shape[1]:
            unused = self.usage[searched] == 0
            has_one = unused.any(1)
            rows = searched.gather(1, unused.int().argmax(1, keepdim=True))[:, 0][has_one]
            sample = sample[has_one]
        else:
            rows = (self.usage == 0).nonzero()[: len(sample), 0]
        rows, place = rows.unique(return_inverse=True)
        first = torch.full_like(rows, len(sample))
        first.scatter_reduce_(0, place, torch.arange(len(place), device=rows.device), "amin")
        self.table.write_rows(rows, sample[first])
        self.usage[rows] = 1
