"""Fifty steps of arb-tiny from a fixed seed on fixed bytes end in one state, whose hash is written down here.

After a change that is meant to move weights otherwise, `python tests/test_golden_runs.py` prints the hashes of now.

Integers, and basic operations on floats, give the same bits on any CPU, with any number of threads and on every backend
of the kernels. Two operations of a training step do not, because torch and MKL choose their order by the CPU:
    scaled_dot_product_attention in float32    by torch's vector width and by MKL's matmul for the make of CPU
    log_softmax of the loss in float32         by torch's vector width
So the hash of a training run is written down once for each way of rounding these two, told apart by what they make of
fixed inputs. In eval mode attention computes in float64 and is rounded; with the loss in float64 as well the run has
one hash on every machine.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F

from arb_kernels.backend import use_backend
from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from modeling_arb.byte_head import IGNORE, mask_incomplete_trigrams
from training_arb.integer_optimizer import IntegerOptimizer
from training_arb.state_audit import state_hash

STEPS, ROWS, CTX = 50, 4, 64
TEXT = (Path(__file__).parents[1] / "LICENSE").read_bytes()
ON_EVERY_MACHINE = "4f793e5ebb08af69225140cc2f91f00d030456208d7841b851d577492392cd3b"
BY_ROUNDING = {  # seen on an Intel Xeon with AVX-512 and AMX; torch's name for the vector width it used
    "b91e35138f69": "9336e6981300f1fb0927aadc92cb3ec584b18a9528308af040f8a7ec441b6605",  # AVX512
    "036b52683c37": "3cd5c975c46a1d8a5b492d26c4697a2a3a9499056af7c15e9cd72a1340f4438d",  # AVX2
    "566def696bd9": "03966611f8d93d016d55f0efe14ffec5166b52585ce584ecb472b0d0a3175e28",  # DEFAULT
}


def trained(exact):
    """The state's hash after the run. exact: with attention and loss in float64."""
    torch.manual_seed(0)
    model = ArbForCausalLM(preset_config("arb-tiny")).train(not exact)
    optimizer, text = IntegerOptimizer(model), torch.tensor(list(TEXT))
    places = torch.arange(ROWS)[:, None] * (len(text) // ROWS) + torch.arange(CTX)
    for step in range(STEPS):
        ids = text[(places + step * CTX) % len(text)]
        loss = exact_loss(model(ids, use_cache=False).logits, ids) if exact else model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    return state_hash(model)


def exact_loss(logits, ids):
    """The model's own loss, in float64."""
    targets = mask_incomplete_trigrams(ids)[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), targets, ignore_index=IGNORE)


def rounding():
    """What float32 attention, its gradients and log_softmax make of fixed inputs, as a short hash."""

    def spread(*shape):
        index = torch.arange(torch.Size(shape).numel())
        return (index * 2654435761 % 65536 / 16384 - 2).view(shape).requires_grad_()

    inputs = [spread(ROWS, 2, CTX, width) for width in (32, 32, 32)]
    mixed = F.scaled_dot_product_attention(*inputs, is_causal=True)
    logits = spread(ROWS * CTX, 288)
    scores = logits.log_softmax(-1)
    torch.autograd.backward([mixed, scores], [mixed.detach(), logits.detach()])
    made = [mixed, scores, logits.grad, *(tensor.grad for tensor in inputs)]
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in made)).hexdigest()[:12]


def test_a_run_in_exact_arithmetic_ends_in_one_state_on_every_machine():
    assert trained(exact=True) == ON_EVERY_MACHINE, "an update rule, a kernel or an activation computes otherwise"


def test_a_training_run_ends_in_one_state():
    """On a CPU whose float32 rounding is not in the table the reference backend's run stands for the written hash."""
    found = rounding()
    written = BY_ROUNDING.get(found)
    source = f"BY_ROUNDING[{found!r}]"
    if written is None:
        source = f"the torch backend's run: float32 attention rounds as {found} here, which BY_ROUNDING does not list"
        with use_backend("torch"):
            written = trained(exact=False)
    assert trained(exact=False) == written, f"differs from {source}"


if __name__ == "__main__":
    print(f'ON_EVERY_MACHINE = "{trained(exact=True)}"')
    print(f'"{rounding()}": "{trained(exact=False)}",  # {torch.backends.cpu.get_cpu_capability()}')
