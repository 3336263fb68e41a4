"""The layers and kernels do not wait for the device: a program that reads a value back leaves a GPU without work."""

import ast

import pytest

from support.scripting import ROOT

FOLDERS = ("kernels", "modeling_arb", "training_arb/optim")
READS = {"item", "tolist", "nonzero", "unique", "cpu", "numpy", "masked_select"}  # methods, and functions of torch
REDUCTIONS = {"all", "any", "amax", "amin", "argmax", "clamp", "equal", "isfinite", "max", "mean", "min", "sum"}
CASTS = {"bool", "float", "int"}
ALLOWED = {
    "kernels/blocks/edge_routing.py:merge_edges": "once a step, in optimizer.step()",
    "kernels/formats/state_layout.py:StateTensor._count_illegal": "a check of loaded tensors",
    "kernels/matmul/quantise.py:naive_quantise_gradient": "the reference; Triton keeps the key on the device",
    "modeling_arb/blocks/act_halting.py:iterate_until_halted": "the next iteration has as many rows as still run",
    "modeling_arb/blocks/motif_graph.py:MotifGraph.forward": "on the CPU alone",
    "modeling_arb/blocks/ternary_codebook.py:TernaryCodebook._renew": "once a step, in optimizer.step()",
    "modeling_arb/blocks/ternary_codebook.py:TernaryCodebook.apply_observations": "once a step, in optimizer.step()",
    "modeling_arb/blocks/ternary_experts.py:TernaryExperts._visit": "large experts run one by one, each on its rows",
    "modeling_arb/generation/contrastive_search.py:contrastive_search": "once a byte, to end; so does transformers",
    "modeling_arb/layers/ternary_matrix.py:TernaryMatrix.reset_state": "a number made on the CPU, at initialisation",
    "modeling_arb/layers/ternary_table.py:TernaryTable.pass_on_gradient": "the touched rows are the work of the update",
    "training_arb/optim/integer_optimizer.py:IntegerOptimizer._update_rows": "once a step: which rows any rank touched",
    "training_arb/optim/step_flags.py:StepFlags.take": "once a step, for all gradients together",
}


def reads_back(node):
    """Whether a call, or the condition of a branch, needs a tensor's value on the host."""
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        return any(_calls_one_of(part, REDUCTIONS - {"max", "min", "sum"}) for part in ast.walk(node.test))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CASTS:
        return any(_calls_one_of(part, REDUCTIONS) for argument in node.args for part in ast.walk(argument))
    return _calls_one_of(node, READS)


def _calls_one_of(node, names):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names


def device_waits(source):
    """(function, line) of each place that reads a value back, the function by its full name in the file."""
    found = []

    def visit(node, function):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".lstrip(".")
        if reads_back(node):
            found.append((function, node.lineno))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def places(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield from ((f"{path.relative_to(ROOT)}:{function}", line) for function, line in device_waits(path.read_text()))


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_waits_for_the_device_but_what_is_listed(folder):
    assert [f"{place}, line {line}" for place, line in places(folder) if place not in ALLOWED] == []


def test_the_list_is_of_places_that_are_there():
    assert {place for folder in FOLDERS for place, _ in places(folder)} == ALLOWED.keys()


@pytest.mark.parametrize(
    "source",
    [
        "y = total.sum().item()",
        "sizes = counts.tolist()",
        "rows = torch.unique(ids)",
        "rows, place = ids.unique(return_inverse=True)",
        "left = (~halts).nonzero().squeeze(1)",
        "fine = bool(torch.isfinite(dW).all())",
        "key = int(x.amax().view(torch.int32))",
        "if torch.isfinite(x).all():\n    pass",
        "while going.any():\n    pass",
        "x = 1 if torch.equal(a, b) else 2",
    ],
)
def test_the_check_sees_a_wait(source):
    assert device_waits(f"class A:\n    def f(self):\n        {source.replace(chr(10), chr(10) + ' ' * 8)}\n") == [
        ("A.f", 3)
    ]


def test_the_check_lets_the_host_count():
    source = (
        "if any(x > 1 for x in sizes) and rows.numel():\n    y = int(2.5) + max(sizes) + float(cell)\n    item(y)\n"
    )
    assert device_waits(source) == []
