"""TernaryExperts: dispatch against a loop over tokens, gradients against autograd, grouped against looped, balance."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from configuration_arb import preset_config
from modeling_arb.blocks.ternary_experts import GroupedLinearFunction, TernaryExperts
from modeling_arb.layers.integer_state import IntegerState
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.ternary_linear import Int8LinearFunction, TernaryLinear
from modeling_arb.layers.ternary_matrix import TernaryMatrix
from support.gradients import Sink
from support.tensors import assert_same

D, EPS = 64, 1e-6
CASES = [
    pytest.param(*c, id="N{}-E{}-k{}".format(*c)) for c in [(1, 4, 2), (3, 1, 1), (50, 4, 2), (33, 6, 3), (9, 8, 8)]
]


def make_experts(num_experts=4, top_k=2, compute="auto", trits=1, **options):
    moe_graph = {"num_experts": num_experts, "top_k": top_k, **options}
    settings = {"compute": compute, "trits_per_weight": trits, "moe_graph": moe_graph}
    experts = TernaryExperts(preset_config("arb-tiny", **settings))
    for module in experts.modules():
        if isinstance(module, IntegerState):
            module.reset_state()
    experts.expert_bias += torch.randint(-20, 20, (num_experts,), dtype=torch.int8)
    experts.observing = True
    return experts.train()


def capture(experts):
    """Arm every matrix so that the sum of what it hands over lies under its name."""
    seen = {}

    def keep(matrix, dW):
        seen[names[matrix]] = seen.get(names[matrix], 0) + dW

    names = {module: name for name, module in experts.named_modules() if isinstance(module, TernaryMatrix)}
    for matrix in names:
        matrix.gradient_sink = Sink(keep)
    return seen


def run(experts, x, grad_y):
    seen = capture(experts)
    x = x.clone().requires_grad_()
    y = experts(x)
    y.backward(grad_y)
    return {"y": y.detach(), "x": x.grad, **seen}


def float_weights(experts):
    matrices = {name: module for name, module in experts.named_modules() if isinstance(module, TernaryMatrix)}
    return {name: matrix.effective_weight(torch.float32).requires_grad_() for name, matrix in matrices.items()}


def by_token(experts, x, weights):
    """Every token alone through its experts, in floats."""
    outputs = []
    for token in rms_norm(x, EPS):
        logits = weights["centroids"] @ token / D**0.5
        chosen = sorted(range(len(logits)), key=lambda e: -(logits[e] + experts.expert_bias[e] / 16).item())
        chosen = chosen[: experts.top_k]
        gates = torch.stack([logits[e] for e in chosen]).softmax(0)
        y = 0
        for gate, e in zip(gates, chosen, strict=True):
            hidden = F.relu(weights[f"up_proj.{e}"] @ token).square()
            y = y + gate * (weights[f"down_proj.{e}"] @ rms_norm(hidden, EPS))
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize("tokens, num_experts, top_k", CASES)
def test_forward_and_every_gradient(tokens, num_experts, top_k):
    experts = make_experts(num_experts, top_k, compute="float", expert_size=40)
    weights = float_weights(experts)
    x, grad_y = torch.randn(tokens, D), torch.randn(tokens, D)
    reference = x.clone().requires_grad_()
    expected = by_token(experts, reference, weights)
    expected.backward(grad_y)
    out = run(experts, x, grad_y)
    assert_same("y", expected.detach(), out["y"])
    assert_same("x", reference.grad, out["x"])
    for name, weight in weights.items():
        if weight.grad is None:
            assert name not in out, f"{name}: no token went there"
        else:
            assert_same(name, weight.grad, out[name])


@pytest.mark.parametrize("grouped", [False, True], ids=["looped", "grouped"])
@pytest.mark.parametrize("tokens, num_experts, top_k", CASES)
def test_a_token_gets_the_same_bits_in_any_company(tokens, num_experts, top_k, grouped):
    experts = make_experts(num_experts, top_k)
    experts.grouped = grouped
    x = torch.randn(tokens, D)
    alone = torch.cat([experts(token[None]) for token in x])
    assert_same("y", alone, torch.cat([experts(x)]))
    assert torch.equal(alone, experts(x))
    with torch.no_grad():
        assert torch.equal(alone, experts(x))


@pytest.mark.parametrize("trits", [1, 2])
@pytest.mark.parametrize("tokens, num_experts, top_k", CASES)
def test_grouped_gives_the_bits_of_the_loop(tokens, num_experts, top_k, trits):
    experts = make_experts(num_experts, top_k, trits=trits)
    x, grad_y = torch.randn(tokens, D), torch.randn(tokens, D)
    experts.grouped = False
    looped = run(experts, x, grad_y)
    experts.grouped = True
    grouped = run(experts, x, grad_y)
    assert torch.equal(looped["y"], grouped["y"])
    assert looped.keys() == grouped.keys()
    for name, ref in looped.items():  # the loop rounds gradients to int8, the grouped product does not
        assert (ref - grouped[name]).norm() <= 0.04 * ref.norm() + 1e-7, name


def make_layers(count, rows, columns, trits=1):
    config = preset_config("arb-tiny", trits_per_weight=trits)
    layers = torch.nn.ModuleList(TernaryLinear(columns, rows, config) for _ in range(count))
    for layer in layers:
        layer.reset_state()
        layer.E += torch.randint(-9, 9, layer.E.shape, dtype=torch.int8)
    return layers


@pytest.mark.parametrize("counts", [[4, 0, 3], [0, 0, 1], [5, 2, 0], [7, 7, 7]], ids=str)
@pytest.mark.parametrize("rows, columns", [(8, 12), (64, 36), (12, 132)])
def test_grouped_linear_and_every_gradient(rows, columns, counts):
    """Each segment as its layer alone; the gradients in double precision over the codes that the forward saw."""
    layers, seen = make_layers(3, rows, columns), {}
    for i, layer in enumerate(layers):
        layer.gradient_sink = Sink(lambda _, dW, i=i: seen.__setitem__(i, dW))
    counts = torch.tensor(counts)
    expert = torch.arange(3).repeat_interleave(counts)
    x = torch.randn(len(expert), columns, requires_grad=True)
    grad_y = torch.randn(len(expert), rows)
    y = GroupedLinearFunction.apply(x, expert, counts.cumsum(0).int(), layers)
    y.backward(grad_y)
    for i, layer in enumerate(layers):
        mine = expert == i
        if not mine.any():
            assert i not in seen
            continue
        part, grad = x.detach()[mine], grad_y[mine]
        assert torch.equal(Int8LinearFunction.apply(part, layer), y.detach()[mine])
        assert_same("x", grad @ layer.effective_weight(torch.float32), x.grad[mine])
        scale = part.abs().amax(1, keepdim=True) / 127
        assert_same("dW", (grad.double().T @ ((part / scale).round() * scale).double()).float(), seen[i])


@pytest.mark.parametrize("trits, columns", [(1, 132100), (2, 33024)])
def test_grouped_sums_are_exact_up_to_2_to_the_24(trits, columns):
    """Sums of up to 127 times the largest level in each column, and odd, so that one lost bit shows."""
    layers = make_layers(2, 4, columns, trits)
    assert 0.999 < columns * 127 * layers[0].largest_level / 2**24 <= 1
    for layer in layers:
        layer.T_packed.fill_(121)  # five digits of one: the largest levels
    x = torch.full((6, columns), 127.0)
    x[1:, :5] = torch.randint(1, 127, (5, 5)).float()
    expert = torch.tensor([0, 0, 0, 1, 1, 1])
    y = GroupedLinearFunction.apply(x, expert, torch.tensor([3, 6], dtype=torch.int32), layers)
    expected = torch.cat([Int8LinearFunction.apply(x[:3], layers[0]), Int8LinearFunction.apply(x[3:], layers[1])])
    assert torch.equal(expected, y)
    assert len(y[1:3, 0].unique()) == 2


@pytest.mark.parametrize("trits, size, expected", [(1, 33028, True), (2, 33024, True), (2, 33028, False)])
def test_the_grouped_path_only_where_its_sums_are_exact(trits, size, expected):
    experts = make_experts(num_experts=1, top_k=1, trits=trits, expert_size=size)
    experts.grouped = True
    assert experts._is_grouped(torch.zeros(1, D)) == expected


@pytest.mark.parametrize("compute, size, expected", [("auto", 40, True), ("auto", 42, False), ("float", 40, False)])
def test_the_grouped_path_only_where_it_can_run(compute, size, expected):
    experts = make_experts(compute=compute, expert_size=size)
    assert not experts._is_grouped(torch.zeros(2, D))
    experts.grouped = True
    assert experts._is_grouped(torch.zeros(2, D)) is expected
    assert experts(torch.randn(7, D)).isfinite().all()


def test_the_bias_chooses_but_does_not_weigh():
    experts = make_experts(4, 4)
    x = torch.randn(20, D)
    expected = experts(x).detach()
    experts.expert_bias.copy_(torch.tensor([100, -100, 50, 0]))
    assert_same("y", expected, experts(x).detach())
    experts.top_k = 1
    assert experts.route(rms_norm(x, EPS))[0].eq(0).all()


def test_loads_move_towards_balance():
    experts = make_experts(4, 2)
    experts.expert_bias.zero_()
    x = torch.randn(300, D) + 3 * torch.randn(D)  # one direction is common: some experts are everyone's first choice
    shares = []
    for _ in range(60):
        experts(x)
        (counts,) = experts.take_observations()
        assert counts.shape == (1, 4) and counts.sum() == 600
        shares.append((counts.max() / counts.sum()).item())
        before = experts.expert_bias.clone()
        experts.apply_observations(counts, key=0)
        moved = (experts.expert_bias - before).tolist()
        assert moved == [(load < 150) - (load > 150) for load in counts[0].tolist()]
    assert shares[0] > 0.45 and shares[-1] < 0.3, shares


def test_loads_add_up_over_calls_and_biases_stop_at_127():
    experts = make_experts(3, 1)
    experts.expert_bias.copy_(torch.tensor([127, -127, 5]))
    experts.apply_observations(torch.tensor([[0, 9, 0], [0, 0, 3], [0, 0, 2], [1, 0, 0]]), key=0)
    assert experts.expert_bias.tolist() == [127, -127, 5]
    experts.apply_observations(torch.tensor([[0, 0, 9], [0, 9, 0]]), key=0)
    assert experts.expert_bias.tolist() == [127, -127, 4]


def test_state_is_integer_and_shared():
    experts = make_experts()
    tensors = [*experts.parameters(), *experts.buffers()]
    assert not any(tensor.is_floating_point() for tensor in tensors)
    assert experts.expert_bias.dtype == torch.int8
    matrices = [module for module in experts.modules() if isinstance(module, TernaryMatrix)]
    assert len(matrices) == 9 and all(matrix.shared for matrix in matrices)
    assert {(m.rows, m.columns) for m in matrices} == {(4, D), (2 * D, D), (D, 2 * D)}


def test_bfloat16_activations_stay_bfloat16():
    experts = make_experts()
    for grouped in (False, True):
        experts.grouped = grouped
        x = torch.randn(5, D, dtype=torch.bfloat16, requires_grad=True)
        y = experts(x)
        y.sum().backward()
        assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)


def test_large_experts_are_not_stacked_on_a_gpu():
    """All float32 weights of arb-3b's experts at once are 0.86 GB, as much as the model's whole correlation state."""
    on_gpu = SimpleNamespace(is_cuda=True)
    assert make_experts()._is_grouped(on_gpu)
    with torch.device("meta"):
        large = TernaryExperts(preset_config("arb-3b"))
    assert not large._is_grouped(on_gpu)
