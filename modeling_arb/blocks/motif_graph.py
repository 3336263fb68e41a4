"""MotifGraph: counts which motif follows which, in a bounded list of signed edges, and sends messages along them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init

from arb_kernels.blocks.edge_routing import EMPTY, MAX_SCORE, decay_scores, incoming_edges, merge_edges
from arb_kernels.formats.state_layout import COUNTER, StateTensor
from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.integer_state import ObservedState

DECAY_EVERY = 64  # steps after which an edge that was seen once is dropped
EDGE_TENSORS = ("active_edge_src", "active_edge_dst", "active_edge_attr", "active_edge_score")


class MotifGraph(ObservedState):
    """Edges m[t-1] -> m[t] between successive motifs of a row, counted in training.

    The list's length does not depend on the number of motifs. No gradient changes it; a forward reads the edges of
    earlier steps.
    """

    active_edge_src: torch.Tensor
    active_edge_dst: torch.Tensor
    edge_steps: torch.Tensor

    def __init__(self, config: ArbConfig):
        nn.Module.__init__(self)
        self.num_motifs = config.block("codebook")["size"]
        self.num_edges = config.block("moe_graph")["active_edges"]
        self.neighbours = config.block("moe_graph")["neighbours"]
        self.register_state(config.training_state)

    def layout(self) -> dict[str, StateTensor]:
        dtypes = (torch.int32, torch.int32, torch.int8, torch.int8)
        roles = ("edge sources", "edge targets", "edge signs", "edge scores")
        motif = ((EMPTY, self.num_motifs - 1),)
        legal = (motif, motif, ((-1, 1),), ((0, MAX_SCORE),))
        edges = {
            name: StateTensor((self.num_edges,), dtype, role, True, values)
            for name, dtype, role, values in zip(EDGE_TENSORS, dtypes, roles, legal, strict=True)
        }
        return {**edges, "edge_steps": StateTensor((), torch.int64, "edge decay counter", legal=COUNTER)}

    def reset_state(self) -> None:
        """No edges."""
        super().reset_state()
        init.constant_(self.active_edge_src, EMPTY)
        init.constant_(self.active_edge_dst, EMPTY)

    def edges(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """src, dst, sign and score, each (active_edges,)."""
        src, dst, sign, score = (getattr(self, name) for name in EDGE_TENSORS)
        return src, dst, sign, score

    def forward(
        self,
        motif_ids: torch.Tensor,
        motif_rows: Callable[[torch.Tensor], torch.Tensor],
        is_byte: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """motif_ids int64 (B, T) -> messages (B, T, dim) in the dtype of the rows, without a gradient.

        A message is the mean of sign * score / 127 * row[src] over the position's strongest incoming edges, at most
        `neighbours`; zero without any. motif_rows: ids (...) -> rows (..., dim). is_byte (B, T): False under
        padding, whose motifs make no edges; None: no padding.
        """
        if motif_ids.is_cuda:  # which would wait for the number of distinct motifs
            ids, place = (
                motif_ids.flatten(),
                torch.arange(motif_ids.numel(), device=motif_ids.device).view_as(motif_ids),
            )
        else:
            ids, place = torch.unique(motif_ids, return_inverse=True)  # equal motifs get equal messages
        with torch.no_grad():
            messages = self._messages(ids, motif_rows)[place]
            agree = self._agreement(motif_rows(ids)[place]) if self.observing and self.training else None
        if agree is not None:
            pairs = torch.stack([motif_ids[:, :-1], motif_ids[:, 1:]], dim=-1)
            if is_byte is not None:
                pairs = pairs.masked_fill(~(is_byte[:, :-1] & is_byte[:, 1:])[..., None], EMPTY)
            self.observe(pairs.flatten(0, 1), agree.flatten())
        return messages

    def _messages(self, ids: torch.Tensor, motif_rows: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """ids (N,) -> (N, dim)."""
        src, dst, sign, score = self.edges()
        index, mask = incoming_edges(dst, ids, self.neighbours)
        sources = motif_rows(src[index].clamp(min=0).long())  # (N, neighbours, dim)
        weight = torch.where(mask, sign[index] * (score[index] / MAX_SCORE), 0.0) / mask.sum(1, keepdim=True).clamp(1)
        return (weight[..., None].to(sources.dtype) * sources).sum(1)

    @staticmethod
    def _agreement(rows: torch.Tensor) -> torch.Tensor:
        """int8 (B, T - 1): the sign of each dot product of successive rows' trits, an integer; +1 where it is zero."""
        trits = rows.sign()
        return torch.where((trits[:, :-1] * trits[:, 1:]).sum(-1) >= 0, 1, -1).to(torch.int8)

    @torch.no_grad()
    def apply_observations(self, pairs: torch.Tensor, pair_sign: torch.Tensor, *, key: int) -> None:
        """Count pairs int64 (P, 2), EMPTY where padding stands, with signs int8 (P,), into the edges; every DECAY_EVERY
        steps all scores fall by one."""
        seen = pairs[:, 0] != EMPTY
        edges = merge_edges(*self.edges(), pairs[seen], pair_sign[seen], self.num_motifs, self.num_edges)
        self.edge_steps += 1
        if self.edge_steps % DECAY_EVERY == 0:
            edges = decay_scores(*edges)
        for name, tensor in zip(EDGE_TENSORS, edges, strict=True):
            getattr(self, name).copy_(tensor)
