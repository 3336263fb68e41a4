"""The rules of the layout: who may import whom, and what no source may contain."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANK = {
    "arb_kernels": 0,
    "configuration_arb": 0,
    "tokenization_arb": 0,
    "modeling_arb": 1,
    "training_arb": 2,
    "scripts": 3,
}
FOLDERS = {package: ROOT / package.replace("arb_kernels", "kernels") for package in RANK}
SOURCES = [(package, path) for package, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))]
WITH_TESTS = [*(path for _, path in SOURCES), *sorted(Path(__file__).parent.glob("*.py"))]
MOST_LINES = 400
NO_ITEM = ("arb_kernels", "modeling_arb")
KERNEL_IMPORTS = {"torch", "triton", "arb_kernels"}


def named(path):
    return str(path.relative_to(ROOT))


def imported_modules(tree, package):
    """(line, full module name) of every import, relative ones resolved; None for `from . import x`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module
        elif isinstance(node, ast.ImportFrom):
            inside = node.level == 1 and node.module
            yield node.lineno, f"{package}.{node.module}" if inside else None


def import_faults(package, source):
    """What a file of `package` imports against the rules."""
    faults = []
    for line, module in imported_modules(ast.parse(source), package):
        top = (module or "").partition(".")[0]
        if module is None:
            faults.append(f"line {line}: `from . import x`, or an import from outside the package by dots")
        elif top == "kernels":
            faults.append(f"line {line}: `kernels` is another project's name; ours is arb_kernels")
        elif top in RANK and top != package and RANK[top] >= RANK[package]:
            faults.append(f"line {line}: {package} may not import {top}")
        elif package == "arb_kernels" and top not in KERNEL_IMPORTS | set(sys.stdlib_module_names):
            faults.append(f"line {line}: kernels need torch and triton only, not {top}")
    return faults


def item_calls(source):
    """Lines that call `.item()`, which waits for the device."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "item"]


def text_faults(data):
    """What the bytes of a source break: size and alphabet."""
    faults = [] if data.isascii() else ["not ASCII"]
    lines = data.count(b"\n")
    return faults + ([] if lines < MOST_LINES else [f"{lines} lines"])


def repeated_names(paths):
    """File names used twice; remote code lies in one flat folder."""
    names = [path.name for path in paths if path.name != "__init__.py"]
    return sorted({name for name in names if names.count(name) > 1})


def import_cycle(package, sources):
    """A cycle among a package's modules, as a list of names, or None. sources: module name -> source text."""
    graph = {}
    for name, source in sources.items():
        modules = (module or "" for _, module in imported_modules(ast.parse(source), package))
        own = (module.partition(".")[2] or "__init__" for module in modules if module.partition(".")[0] == package)
        graph[name] = [module for module in own if module in sources]

    def cycle_from(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        return next(filter(None, (cycle_from(target, [*path, name]) for target in graph[name])), None)

    return next(filter(None, (cycle_from(name, []) for name in graph)), None)


def test_every_package_is_seen():
    assert {package for package, _ in SOURCES} == set(RANK)
    assert len(SOURCES) > 30


@pytest.mark.parametrize("package, path", [pytest.param(*source, id=named(source[1])) for source in SOURCES])
def test_imports(package, path):
    assert import_faults(package, path.read_text()) == []


@pytest.mark.parametrize("path", WITH_TESTS, ids=named)
def test_text(path):
    assert text_faults(path.read_bytes()) == []


@pytest.mark.parametrize("path", WITH_TESTS, ids=named)
def test_kernels_go_by_our_name(path):
    modules = [module or "" for _, module in imported_modules(ast.parse(path.read_text()), "")]
    assert not [module for module in modules if module.partition(".")[0] == "kernels"]


@pytest.mark.parametrize("package, path", [pytest.param(*s, id=named(s[1])) for s in SOURCES if s[0] in NO_ITEM])
def test_no_waiting_for_the_device(package, path):
    assert item_calls(path.read_text()) == []


@pytest.mark.parametrize("package", RANK)
def test_no_import_cycles(package):
    sources = {path.stem: path.read_text() for own, path in SOURCES if own == package}
    assert import_cycle(package, sources) is None


def test_module_names_are_unique():
    assert repeated_names([path for _, path in SOURCES]) == []


def test_kernels_folder_is_no_package():
    """A regular package of that name would shadow the `kernels` that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()


@pytest.mark.parametrize(
    "package, source",
    [
        ("arb_kernels", "from configuration_arb import ArbConfig"),
        ("arb_kernels", "import modeling_arb.norm"),
        ("arb_kernels", "from transformers import PreTrainedModel"),
        ("arb_kernels", "import numpy as np"),
        ("configuration_arb", "from tokenization_arb import ArbTokenizer"),
        ("tokenization_arb", "from arb_kernels.packing import pack_trits"),
        ("modeling_arb", "from training_arb.byte_data import ByteBlocks"),
        ("modeling_arb", "def late():\n    from training_arb import state_audit"),
        ("training_arb", "import scripts.pretrain"),
        ("training_arb", "try:\n    import scripts\nexcept ImportError:\n    scripts = None"),
        ("modeling_arb", "from . import norm"),
        ("modeling_arb", "from .. import training_arb"),
        ("modeling_arb", "from ..training_arb import byte_data"),
        ("modeling_arb", "from kernels.packing import pack_trits"),
        ("scripts", "import os, kernels"),
    ],
)
def test_the_check_sees_a_bad_import(package, source):
    assert len(import_faults(package, source)) == 1


@pytest.mark.parametrize(
    "package, source",
    [
        ("arb_kernels", "import math\nimport torch\nfrom .packing import pack_trits"),
        ("modeling_arb", "from arb_kernels.packing import pack_trits\nfrom configuration_arb import ArbConfig"),
        ("modeling_arb", "from .norm import rms_norm\nimport transformers"),
        ("scripts", "from training_arb.byte_data import ByteBlocks\nfrom kernels_of_wisdom import x"),
    ],
)
def test_the_check_lets_a_good_import_pass(package, source):
    assert import_faults(package, source) == []


def test_the_checks_see_bad_sources():
    assert item_calls("x = 1\ny = total.sum().item()\n") == [2]
    assert item_calls("for key, value in d.items():\n    item(key)\n") == []
    assert text_faults("x = '\u00e9'\n".encode()) == ["not ASCII"]
    assert text_faults(b"x = 1\n" * 400) == ["400 lines"] and text_faults(b"x = 1\n" * 399) == []
    assert repeated_names([Path("a/x.py"), Path("b/x.py"), Path("a/__init__.py"), Path("b/__init__.py")]) == ["x.py"]


@pytest.mark.parametrize(
    "sources, cycle",
    [
        ({"a": "from .b import x", "b": "import p.a"}, ["a", "b", "a"]),
        ({"a": "", "b": "from p.c import x", "c": "from .d import x", "d": "from .b import x"}, ["b", "c", "d", "b"]),
        ({"__init__": "from .a import x", "a": "from p import y"}, ["__init__", "a", "__init__"]),
        ({"a": "from .a import x"}, ["a", "a"]),
        ({"a": "from .b import x\nfrom .c import x", "b": "from .c import x", "c": "import torch"}, None),
        ({"__init__": "from .a import x", "a": "from q import y"}, None),
    ],
)
def test_the_check_sees_a_cycle(sources, cycle):
    assert import_cycle("p", sources) == cycle
