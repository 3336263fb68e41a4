"""Compiles every Triton kernel for GPUs that are not there, exactly as the public functions would launch it.

Run by test_triton_compile.py in a process without TRITON_INTERPRET. Every launch stops after compiling; the driver
is a stand-in that only says which GPU to compile for. Prints JSON: {kernel: {capability: [what its PTX has of ...]}}.
With the path of a model's kernels_arb.py as argument, it compiles the kernels of that file.
"""

import json
import runpy
import sys
from importlib import import_module
from types import SimpleNamespace

import torch
from scripting import ROOT
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from arb_kernels.formats.rule_states import CorrelationState, FlipState, MomentumState

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


def packed_weights():
    """Of one trit and of two."""
    return [torch.zeros(ROWS, trits * WIDTH, dtype=torch.uint8) for trits in (1, 2)]


def call_layers(k):
    """The functions of the layers, once for each way that they launch their kernels. k: has them as attributes."""
    dW = torch.zeros(ROWS, COLUMNS)
    ids, scale = torch.zeros(4, dtype=torch.int64), torch.ones(ROWS, GROUPS)
    codes = torch.zeros(ROWS, COLUMNS, dtype=torch.int8)
    k.triton_quantise_tokens(dW)
    k.triton_quantise_gradient(dW, dW[0], dW[:, 0])
    k.triton_quantise_gradient(dW, dW[0], None)
    k.triton_scale_sums(torch.zeros(ROWS, COLUMNS, dtype=torch.int32), dW[:, 0], dW[0], torch.bfloat16)
    for packed in packed_weights():
        k.triton_unpack_levels(packed, COLUMNS)
        k.triton_effective_weight(packed, COLUMNS, scale, GROUP, torch.bfloat16)
        k.triton_gather_rows(packed, ids, COLUMNS, scale[ids], GROUP)
        k.triton_packed_matvec(codes[:3], packed, torch.ones(3), torch.ones(ROWS))
    cell = torch.zeros(8, ROWS // 4)
    for dtype in (torch.float32, torch.bfloat16):
        gates, hidden = torch.zeros(8, ROWS, dtype=dtype), cell.to(dtype)
        k.triton_lstm_gates(gates, cell, 1.0)
        k.triton_lstm_gates_backward(gates, cell, cell, hidden, cell, 1.0)


def call_rules(k):
    """The functions of the update rules, which a model from the hub goes without."""
    int8, uint8 = torch.int8, torch.uint8
    dW = torch.zeros(ROWS, COLUMNS)
    codes, ids = torch.zeros(ROWS, COLUMNS, dtype=int8), torch.zeros(4, dtype=torch.int64)
    for dtype in (torch.int16, uint8):
        accum, accum_exp = torch.zeros(ROWS, COLUMNS, dtype=dtype), torch.zeros(ROWS, BLOCKS, dtype=int8)
        for packed in packed_weights():
            k.triton_momentum_update(MomentumState(packed, accum, accum_exp), dW, 1, 0.1)
    for packed in packed_weights():
        k.triton_momentum_update(MomentumState(packed, accum, accum_exp), dW[:4], 1, 0.1, row_ids=ids)
    packed, _ = packed_weights()
    k.triton_add_gradient(codes, accum_exp, dW, 1)
    k.triton_add_sum(dW, codes, accum_exp)
    E_accum = torch.zeros(ROWS, GROUPS, dtype=int8)
    k.triton_flip_update(FlipState(packed, E_accum, codes, E_accum), dW, GROUP)
    state = CorrelationState(packed, torch.zeros(ROWS, GROUPS, dtype=torch.int64), torch.zeros((), dtype=torch.int64))
    k.triton_correlation_update(state, dW, GROUP)
    for dtype in (torch.float32, torch.bfloat16):
        grad_y, x = torch.zeros(8, ROWS, dtype=dtype), torch.zeros(8, COLUMNS, dtype=dtype)
        k.triton_correlation_update_from_factors(state, grad_y, x, GROUP)


def names_of_package():
    """Everything that our Triton modules have, in one namespace."""
    names = {}
    for path in sorted((ROOT / "kernels").rglob("*_triton.py")):
        module = ".".join(("arb_kernels", *path.relative_to(ROOT / "kernels").with_suffix("").parts))
        names |= vars(import_module(module))
    return names


def main(path=None):
    torch.set_num_threads(1)
    names = names_of_package() if path is None else runpy.run_path(path)
    calls = (call_layers, call_rules) if path is None else (call_layers,)
    kernels = {name for name, value in names.items() if isinstance(value, JITFunction) and name.endswith("_kernel")}
    found = {name: {} for name in sorted(kernels)}
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
        for call in calls:
            call(SimpleNamespace(**names))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
