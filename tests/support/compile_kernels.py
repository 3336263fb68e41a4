"""Compiles every Triton kernel for GPUs that are not there, exactly as the public functions would launch it.

Run by test_triton_compile.py in a process without TRITON_INTERPRET. Every launch stops after compiling; the driver
is a stand-in that only says which GPU to compile for. Prints JSON: {kernel: {capability: [what its PTX has of ...]}}.
"""

import json
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import arb_kernels.triton_support
from arb_kernels.blocks.lstm_gates_triton import triton_lstm_gates, triton_lstm_gates_backward
from arb_kernels.formats.packing_triton import (
    triton_effective_weight,
    triton_gather_rows,
    triton_unpack_trits,
)
from arb_kernels.formats.rule_states import CorrelationState, FlipState, MomentumState
from arb_kernels.matmul.matvec_triton import triton_packed_matvec
from arb_kernels.matmul.quantise_triton import triton_quantise_gradient, triton_quantise_tokens, triton_scale_sums
from arb_kernels.rules.correlation_triton import triton_correlation_update, triton_correlation_update_from_factors
from arb_kernels.rules.flip_triton import triton_flip_update
from arb_kernels.rules.gradient_sum_triton import triton_add_gradient, triton_add_sum
from arb_kernels.rules.momentum_triton import triton_momentum_update

CAPABILITIES = (80, 90)
INEXACT = ("fma.rn.f32", ".ftz", "div.full", ".approx")  # float instructions that round another way than torch
EXPONENTIALS = {"lstm_gates_forward_kernel", "lstm_gates_backward_kernel"}  # compared by error ratio, not bit by bit
ROWS, COLUMNS, GROUP = 96, 320, 32
WIDTH, BLOCKS, GROUPS = COLUMNS // 5, COLUMNS // 64, COLUMNS // GROUP


class StandInDriver:
    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


def call_everything():
    """Every public function, once for each way that it launches its kernels."""
    int8, uint8 = torch.int8, torch.uint8
    packed, dW = torch.zeros(ROWS, WIDTH, dtype=uint8), torch.zeros(ROWS, COLUMNS)
    ids, scale = torch.zeros(4, dtype=torch.int64), torch.ones(ROWS, GROUPS)
    codes = torch.zeros(ROWS, COLUMNS, dtype=int8)
    for dtype in (torch.int16, uint8):
        accum, accum_exp = torch.zeros(ROWS, COLUMNS, dtype=dtype), torch.zeros(ROWS, BLOCKS, dtype=int8)
        triton_momentum_update(MomentumState(packed, accum, accum_exp), dW, 1, 0.1)
    triton_momentum_update(MomentumState(packed, accum, accum_exp), dW[:4], 1, 0.1, row_ids=ids)
    triton_add_gradient(codes, accum_exp, dW, 1)
    triton_add_sum(dW, codes, accum_exp)
    triton_quantise_tokens(dW)
    triton_quantise_gradient(dW, dW[0], dW[:, 0])
    triton_quantise_gradient(dW, dW[0], None)
    triton_scale_sums(torch.zeros(ROWS, COLUMNS, dtype=torch.int32), dW[:, 0], dW[0], torch.bfloat16)
    triton_unpack_trits(packed, COLUMNS)
    triton_effective_weight(packed, COLUMNS, scale, GROUP, torch.bfloat16)
    triton_gather_rows(packed, ids, COLUMNS, scale[ids], GROUP)
    triton_packed_matvec(codes[:3], packed, torch.ones(3), torch.ones(ROWS))
    E_accum = torch.zeros(ROWS, GROUPS, dtype=int8)
    triton_flip_update(FlipState(packed, E_accum, codes, E_accum), dW, GROUP)
    state = CorrelationState(packed, torch.zeros(ROWS, GROUPS, dtype=torch.int64), torch.zeros((), dtype=torch.int64))
    triton_correlation_update(state, dW, GROUP)
    for dtype in (torch.float32, torch.bfloat16):
        grad_y, x = torch.zeros(8, ROWS, dtype=dtype), torch.zeros(8, COLUMNS, dtype=dtype)
        triton_correlation_update_from_factors(state, grad_y, x, GROUP)
    cell = torch.zeros(8, ROWS // 4)
    for dtype in (torch.float32, torch.bfloat16):
        gates, hidden = torch.zeros(8, ROWS, dtype=dtype), cell.to(dtype)
        triton_lstm_gates(gates, cell, 1.0)
        triton_lstm_gates_backward(gates, cell, cell, hidden, cell, 1.0)


def all_kernels():
    """Names of the kernels in our Triton modules."""
    names = set()
    folder = Path(arb_kernels.triton_support.__file__).parent
    for path in folder.glob("*/*_triton.py"):
        module = __import__(f"arb_kernels.{path.parent.name}.{path.stem}", fromlist=["_"])
        names |= {name for name, value in vars(module).items() if isinstance(value, JITFunction)}
    return sorted(name for name in names if name.endswith("_kernel"))


def main():
    torch.set_num_threads(1)
    found = {name: {} for name in all_kernels()}
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        assert compiled.asm["cubin"], self.__name__
        ptx = compiled.asm["ptx"]
        if self.__name__ in EXPONENTIALS:
            ptx = ptx.replace("ex2.approx.f32", "")  # a GPU has no other
        inexact = [instruction for instruction in INEXACT if instruction in ptx]
        found[self.__name__].setdefault(driver.active.capability, []).extend(inexact)

    JITFunction.run = compile_only
    for capability in CAPABILITIES:
        driver.set_active(StandInDriver(capability))
        call_everything()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
