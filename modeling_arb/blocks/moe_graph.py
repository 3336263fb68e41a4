"""MoEGraph: ternary experts in a loop with adaptive computation time, with messages between motifs as input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from arb_kernels.blocks.sigmoid import sigmoid
from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.ternary_linear import TernaryLinear

from .act_halting import iterate_until_halted
from .lti_injection import lti_injection
from .motif_graph import MotifGraph
from .ternary_experts import TernaryExperts

HALT_OFFSET = 1.0  # fresh logits have variance 1 around it: most positions reach 0.99 at the second iteration


class MoEGraph(nn.Module):
    """One iteration is h <- lti(h, e, experts(h)) with e = x + projected messages, starting at h = e. ACT
    (act_halting.py) sums the states. A position depends on its own x and motif, and on the edges of earlier steps:
    cached decoding needs no state.
    """

    def __init__(self, config: ArbConfig):
        super().__init__()
        options, width = config.block("moe_graph"), config.hidden_size
        self.eps, self.decay = config.rms_norm_eps, options["lti_decay"]
        self.max_iterations, self.halt_threshold = options["max_iterations"], options["halt_threshold"]
        self.experts = TernaryExperts(config)
        self.halting = TernaryLinear(width, 1, config)
        self.halting.shared = True
        self.motif_graph = self.message_proj = None
        if options["active_edges"]:
            self.motif_graph = MotifGraph(config)
            self.message_proj = TernaryLinear(config.block("codebook")["dim"], width, config)

    def forward(
        self,
        x: torch.Tensor,
        motif_ids: torch.Tensor | None = None,
        motif_rows: Callable[[torch.Tensor], torch.Tensor] | None = None,
        is_byte: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, T, D); motif_ids int64 (B, T) and motif_rows, ids (...) -> rows (..., dim), or None for no messages;
        is_byte (B, T), False under padding, or None.

        Returns what to add to the residual stream, (B, T, D), and the ponder cost () averaged over positions.
        """
        injected = x
        if self.motif_graph is not None and self.message_proj is not None and motif_ids is not None:
            messages = self.motif_graph(motif_ids, motif_rows, is_byte).to(x.dtype)
            # without a gradient to pass on, autograd would skip the projection, and it would never learn
            injected = x + self.message_proj(messages.requires_grad_(torch.is_grad_enabled()))
        injected = injected.flatten(0, 1)

        def iterate(h: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return lti_injection(h, injected[positions], self.experts(h), self.decay)

        h, ponder = iterate_until_halted(
            injected, iterate, self.halting_probability, self.max_iterations, self.halt_threshold
        )
        return h.view_as(x) - x, ponder.mean()

    def halting_probability(self, h: torch.Tensor) -> torch.Tensor:
        """(N, D) -> float32 (N,)."""
        return sigmoid(self.halting(rms_norm(h, self.eps)).squeeze(-1).float() + HALT_OFFSET)
