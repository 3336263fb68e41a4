"""ACT against a dense version that computes every position at every iteration and leaves the rest to autograd."""

import pytest
import torch

from modeling_arb.blocks.act_halting import iterate_until_halted
from support.tensors import assert_same

N, D = 40, 6
THRESHOLD = 0.9


class Weights:
    """A random recurrence h <- tanh(h W + e), halting sigmoid(3 h v + offset); all of it wants gradients."""

    def __init__(self, offset):
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return torch.randn(shape, generator=generator).requires_grad_()

        self.h, self.e, self.W, self.v = draw(N, D), draw(N, D), draw(D, D), draw(D)
        self.offset = torch.tensor(float(offset), requires_grad=True)
        self.cost, self.c = torch.randn(N, generator=generator), torch.randn(N, D, generator=generator)
        self.calls = []

    def step(self, h, positions):
        self.calls.append(positions)
        return torch.tanh(h @ self.W + self.e[positions])

    def halting(self, h):
        return torch.sigmoid(3 * h @ self.v + self.offset)

    def gradients(self, output, ponder):
        loss = (output * self.c).sum() + (ponder * self.cost).sum()
        return torch.autograd.grad(loss, [self.h, self.e, self.W, self.v, self.offset], allow_unused=True)


def dense(weights, max_iterations):
    """All states and probabilities first; then each position's own sum, one by one."""
    h, everyone = weights.h, torch.arange(N)
    states, probabilities = [], []
    for _ in range(max_iterations):
        h = weights.step(h, everyone)
        states.append(h)
        probabilities.append(weights.halting(h))
    outputs, ponders, iterations = [], [], []
    for i in range(N):
        p = [probability[i] for probability in probabilities]
        reached = (n for n in range(1, max_iterations) if sum(p[:n]).item() >= THRESHOLD)
        last = next(reached, max_iterations)
        remainder = 1 - sum(p[: last - 1])
        outputs.append(sum(p[n] * states[n][i] for n in range(last - 1)) + remainder * states[last - 1][i])
        ponders.append(torch.as_tensor(last + remainder))
        iterations.append(last)
    return torch.stack(outputs), torch.stack(ponders).float(), iterations


@pytest.mark.parametrize("offset", [-4, 0, 2])
@pytest.mark.parametrize("max_iterations", [1, 2, 4, 7])
def test_output_ponder_cost_and_every_gradient(max_iterations, offset):
    reference, weights = Weights(offset), Weights(offset)
    expected, expected_ponder, iterations = dense(reference, max_iterations)
    output, ponder = iterate_until_halted(weights.h, weights.step, weights.halting, max_iterations, THRESHOLD)
    assert_same("output", expected.detach(), output.detach())
    assert_same("ponder", expected_ponder.detach(), ponder.detach())
    if max_iterations == 4 and offset == 0:
        assert set(iterations) == {1, 2, 3, 4}
    pairs = zip(reference.gradients(expected, expected_ponder), weights.gradients(output, ponder), strict=True)
    for name, (ref, out) in zip("heWvo", pairs, strict=True):
        if ref is None:
            assert out is None or not out.any(), name  # one iteration: the remainder is one
        else:
            assert_same(f"gradient of {name}", ref, out)
    running = [len(call) for call in weights.calls]
    assert running == [sum(n > i for n in iterations) for i in range(max(iterations))]


def test_the_ponder_cost_alone_has_a_gradient():
    weights = Weights(-1)
    ponder = iterate_until_halted(weights.h, weights.step, weights.halting, 4, THRESHOLD)[1]
    (gradient,) = torch.autograd.grad(ponder.sum(), weights.offset)
    assert gradient < 0  # who halts more readily ponders less


def test_weights_sum_to_one():
    weights = Weights(0)
    ones = torch.ones(N, D)
    output, _ = iterate_until_halted(ones, lambda h, _: h, lambda h: weights.halting(weights.h[: len(h)]), 4, THRESHOLD)
    assert_same("ones", ones, output.detach())


def test_it_stops_when_all_have_halted():
    weights = Weights(50)
    output, ponder = iterate_until_halted(weights.h, weights.step, weights.halting, 9, THRESHOLD)
    assert len(weights.calls) == 1
    assert_same("ponder", torch.full((N,), 2.0), ponder.detach())
    assert_same("output", weights.step(weights.h, torch.arange(N)).detach(), output.detach())


def test_bfloat16_states_stay_bfloat16():
    halting = lambda h: torch.full((len(h),), 0.3)  # noqa: E731
    output, ponder = iterate_until_halted(torch.randn(5, D).bfloat16(), lambda h, _: h * 0.5, halting, 4, 0.99)
    assert (output.dtype, ponder.dtype) == (torch.bfloat16, torch.float32)
    assert_same("ponder", torch.full((5,), 4 + 0.1), ponder)
