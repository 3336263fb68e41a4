"""Cases of bench_kernels.py: each kernel with its inputs, its least work, and other implementations of it.

Operations are multiplies and adds. A matmul of (M, K) with (N, K) does 2 * M * N * K; `momentum_update` 30 a weight, of
which 8 fold, 4 form the Nesterov direction, 10 normalise it and 8 move (momentum.py, line by line), without its random
bits, exponents and packing; AdamW 13 a weight; quantisation one an element. Minimum reads from DRAM: a quarter byte a
weight for a matmul, whatever the implementation; the gradient and ARB's state of one trit a weight once for an update;
the floats for a quantisation. Writes are not counted: they can overlap with reads, and the bandwidth is measured by
reading.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from arb_kernels.formats.decode_layout import in_huge_pages, to_decode_layout
from arb_kernels.formats.packing import largest_level, pack_levels
from arb_kernels.formats.rule_states import MomentumState
from arb_kernels.matmul.decode_linear import MATVEC_TOKENS, decode_linear, layout_matmul
from arb_kernels.matmul.quantise import naive_quantise_tokens, quantise_tokens
from arb_kernels.rules.momentum import momentum_update

from .ggml_peer import BLOCK, FORMATS, GgmlMatmul
from .measurement import rotating

OWN, TWO_TRITS = "arb", "arb_two_trits"
UPDATE_OPERATIONS, ADAMW_OPERATIONS, QUANTISE_OPERATIONS = 30, 13, 1  # an element
DECODE_BYTES = 0.25  # a weight
MOMENTUM_BLOCK = 64
ERROR_RATIO = 0.05  # activations of 8 bits: a wrong product is far beyond it


@dataclass
class Competitor:
    """One implementation. `call(copy)` runs it on one of `copies` equal sets of operands."""

    call: Callable[[int], object]
    copies: int
    operations: float
    bytes: float  # that a call reads and writes of weights or state

    def job(self) -> Callable[[], object]:
        return rotating(self.call, self.copies)


@dataclass
class Contest:
    """One kernel at one size, and all implementations. batch is None for kernels without one."""

    op: str
    shape: tuple[int, int]
    batch: int | None
    least_bytes: float  # to read from DRAM
    competitors: dict[str, Competitor]

    @property
    def title(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.op} {size}" + (f" batch {self.batch}" if self.batch else "")


def _copies(operands: torch.Tensor | list[torch.Tensor], cold_bytes: float) -> int:
    operands = operands if isinstance(operands, list) else [operands]
    return max(1, math.ceil(cold_bytes / sum(tensor.nbytes for tensor in operands)))


def _repeated(tensor: torch.Tensor, copies: int) -> torch.Tensor:
    """(copies, *shape), each copy with its own memory."""
    return tensor.expand(copies, *tensor.shape).contiguous()


def _checked(name: str, product: torch.Tensor, reference: torch.Tensor) -> None:
    """Checks the product before it is timed."""
    error = (product.float() - reference).norm() / reference.norm()
    assert error < ERROR_RATIO, f"{name}: error ratio {error:.3f}"


def matmul_contest(
    op: str, shape: tuple[int, int], batch: int, cold_bytes: float, threads: int, ggml: ctypes.CDLL | None
) -> Contest:
    """Int8 activations times weights of one and two trits from DRAM, against torch's float and int8 matmuls and, if it
    is built, ggml's, of one trit. A matvec includes the quantisation of its activations; above MATVEC_TOKENS that is a
    separate operation."""
    N, K = shape
    trits, levels = (_random_levels(shape, number) for number in (1, 2))
    x = torch.randn(batch, K)
    reference = F.linear(x, trits.float())
    operations = 2.0 * batch * N * K
    competitors: dict[str, Competitor] = {}

    def add(
        name: str,
        weight: torch.Tensor,
        multiply: Callable[[torch.Tensor], torch.Tensor],
        scale: float | torch.Tensor = 1,
        reference: torch.Tensor = reference,
    ) -> None:
        _checked(name, multiply(weight) * scale, reference)
        copies = _copies(weight, cold_bytes)
        weights = [in_huge_pages(weight.clone()) for _ in range(copies)]
        competitors[name] = Competitor(lambda i: multiply(weights[i]), copies, operations, weight.nbytes)

    row_scale, x16 = torch.ones(N), x.bfloat16()
    codes, token_scale = quantise_tokens(x)

    def multiply_layout(weight: torch.Tensor) -> torch.Tensor:
        if batch > MATVEC_TOKENS:
            return layout_matmul(codes, token_scale, weight, N, row_scale)
        return decode_linear(x, weight, N, row_scale)

    add(OWN, to_decode_layout(trits), multiply_layout)
    add(TWO_TRITS, to_decode_layout(levels, 2), multiply_layout, reference=F.linear(x, levels.float()))
    add("torch_fp32", trits.float(), lambda weight: F.linear(x, weight))
    add("torch_bf16", trits.bfloat16(), lambda weight: F.linear(x16, weight))
    int_mm = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
    add("torch_int_mm", trits, lambda weight: int_mm(codes, weight.T), token_scale[:, None])
    if ggml is not None and K % BLOCK == 0:
        for quantisation in FORMATS:
            one = GgmlMatmul(ggml, quantisation, trits, x, 1, threads)
            _checked(quantisation, one(0), reference)
            weight_bytes = one.weights.nbytes
            one.close()
            copies = math.ceil(cold_bytes / weight_bytes)
            many = GgmlMatmul(ggml, quantisation, trits, x, copies, threads)
            competitors[f"ggml_{quantisation}"] = Competitor(many, copies, operations, weight_bytes)
    return Contest(op, shape, batch, DECODE_BYTES * N * K, competitors)


def update_contest(shape: tuple[int, int], cold_bytes: float) -> Contest:
    """momentum_update of a matrix against torch's fused AdamW of as many float32 weights, gradients from DRAM."""
    N, K = shape
    gradient = torch.randn(N, K) * 1e-3
    states = {name: _momentum_state(shape, trits) for name, trits in ((OWN, 1), (TWO_TRITS, 2))}
    least_bytes = gradient.nbytes + sum(tensor.nbytes for tensor in states[OWN])
    competitors = {name: _momentum_rule(state, gradient, cold_bytes) for name, state in states.items()}
    adamw = [_adamw(gradient) for _ in range(math.ceil(cold_bytes / (4 * gradient.nbytes)))]
    # the weight and two moments in and out, the gradient in
    competitors["torch_adamw_fused"] = Competitor(
        lambda i: adamw[i].step(), len(adamw), ADAMW_OPERATIONS * N * K, 7 * gradient.nbytes
    )
    return Contest("cpu_update", shape, None, least_bytes, competitors)


def _random_levels(shape: tuple[int, int], trits: int) -> torch.Tensor:
    return torch.randint(-largest_level(trits), largest_level(trits) + 1, shape, dtype=torch.int8)


def _momentum_state(shape: tuple[int, int], trits: int) -> MomentumState:
    N, K = shape
    return MomentumState(
        pack_levels(_random_levels(shape, trits), trits),
        torch.randint(0, 16, (N, K), dtype=torch.uint8),
        torch.zeros(N, -(-K // MOMENTUM_BLOCK), dtype=torch.int8),
    )


def _momentum_rule(state: MomentumState, gradient: torch.Tensor, cold_bytes: float) -> Competitor:
    copies = _copies([*state, gradient], cold_bytes)
    *tensors, gradients = (_repeated(tensor, copies) for tensor in (*state, gradient))
    states = [MomentumState(*each) for each in zip(*tensors, strict=True)]
    return Competitor(
        lambda i: momentum_update(states[i], gradients[i], key=i, lr=0.03),
        copies,
        UPDATE_OPERATIONS * gradient.numel(),
        gradient.nbytes + 2 * sum(tensor.nbytes for tensor in state),
    )


def _adamw(gradient: torch.Tensor) -> torch.optim.AdamW:
    weight = torch.zeros_like(gradient, requires_grad=True)
    weight.grad = gradient.clone()
    return torch.optim.AdamW([weight], fused=True)


def quantise_contest(shape: tuple[int, int], batch: int, cold_bytes: float) -> Contest:
    """quantise_tokens of a layer's input (batch, K) from DRAM against the same in plain torch."""
    x = torch.randn(batch, shape[1])
    traffic = 1.25 * x.nbytes
    copies = _copies(x, cold_bytes)
    inputs = _repeated(x, copies)
    competitors = {
        OWN: Competitor(lambda i: quantise_tokens(inputs[i]), copies, QUANTISE_OPERATIONS * x.numel(), traffic),
        "torch_eager": Competitor(
            lambda i: naive_quantise_tokens(inputs[i]), copies, QUANTISE_OPERATIONS * x.numel(), traffic
        ),
    }
    return Contest("cpu_quantise", shape, batch, x.nbytes, competitors)


def batches_of(op: str, batches: list[int]) -> list[int | None]:
    """The batches of `batches` that an operation runs at. Raises ValueError when it runs at none of them."""
    fitting: list[int | None] = {
        "cpu_matvec": [batch for batch in batches if batch <= MATVEC_TOKENS],
        "cpu_matmul": [batch for batch in batches if batch > MATVEC_TOKENS],
        "cpu_update": [None],
        "cpu_quantise": list(batches),
    }[op]
    if not fitting:
        side = "at most" if op == "cpu_matvec" else "more than"
        raise ValueError(f"batch={','.join(map(str, batches))}: {op} runs at {side} {MATVEC_TOKENS} tokens")
    return fitting
