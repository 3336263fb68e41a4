"""The rules of the layout: who may import whom, how large rooms and files are, and what no source may contain."""

import ast
import statistics
import sys

import pytest

from support.scripting import ROOT

RANK = {
    "arb_kernels": 0,
    "configuration_arb": 0,
    "tokenization_arb": 0,
    "modeling_arb": 1,
    "training_arb": 2,
    "scripts": 3,
}
LOOSE = "(files of the package itself)"
ROOMS = {  # a room imports from those before it; rooms on one line do not import each other
    "arb_kernels": [(LOOSE,), ("formats", "blocks"), ("matmul", "rules")],
    "configuration_arb": [(LOOSE,)],
    "tokenization_arb": [(LOOSE,)],
    "modeling_arb": [("layers",), ("backbone", "checkpoints"), ("blocks", "generation"), (LOOSE,)],
    "training_arb": [
        ("common",),
        ("ranks", "data"),
        ("optim", "cli"),
        ("memory",),
        ("checkpoints",),
        ("report",),
        ("hub",),
        ("train",),
        ("lora",),
        ("evaluation", "chat"),
        ("bench", "device_check"),
        (LOOSE,),
    ],
    "scripts": [(LOOSE, "developer")],
}
ROOM_RANK = {package: {room: i for i, row in enumerate(rows) for room in row} for package, rows in ROOMS.items()}
FOLDERS = {package: ROOT / package.replace("arb_kernels", "kernels") for package in RANK}
SOURCES = [(package, path) for package, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))]
DATA_FOLDERS = {ROOT / "training_arb" / "evaluation" / "lm_eval_tasks"}
WITH_TESTS = [*(path for _, path in SOURCES), *sorted((ROOT / "tests").rglob("*.py"))]
MOST_LINES, MEDIAN_LINES, MOST_FILES = 400, 150, 14
KERNEL_IMPORTS = {"torch", "triton", "arb_kernels"}


def named(path):
    return str(path.relative_to(ROOT))


def room_of(package, path):
    inside = path.relative_to(FOLDERS[package]).parts
    return inside[0] if len(inside) > 1 else LOOSE


def module_name(package, path):
    return ".".join((package, *path.relative_to(FOLDERS[package]).with_suffix("").parts)).removesuffix(".__init__")


def imported_modules(tree, folder):
    """(line, full module name) of every import, those relative to `folder` (dotted) resolved; None for
    `from . import x` and for what reaches out of the folder by dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module
        elif isinstance(node, ast.ImportFrom):
            inside = node.level == 1 and node.module
            yield node.lineno, f"{folder}.{node.module}" if inside else None


def import_faults(package, source, room=LOOSE):
    """What a file of a room of `package` imports against the rules."""
    faults = []
    folder = package if room == LOOSE else f"{package}.{room}"
    for line, module in imported_modules(ast.parse(source), folder):
        top, _, inside = (module or "").partition(".")
        if module is None:
            faults.append(f"line {line}: `from . import x`, or an import from outside the folder by dots")
        elif top == "kernels":
            faults.append(f"line {line}: `kernels` is another project's name; ours is arb_kernels")
        elif top in RANK and top != package and RANK[top] >= RANK[package]:
            faults.append(f"line {line}: {package} may not import {top}")
        elif package == "arb_kernels" and top not in KERNEL_IMPORTS | set(sys.stdlib_module_names):
            faults.append(f"line {line}: kernels need torch and triton only, not {top}")
        elif top == package:
            first, _, rest = inside.partition(".")
            other, ranks = first if rest or first in ROOM_RANK[package] else LOOSE, ROOM_RANK[package]
            if other != room and ranks.get(other, len(ranks)) >= ranks[room]:
                faults.append(f"line {line}: {folder} may not import {module}")
    return faults


def text_faults(data):
    """What the bytes of a source break: size and alphabet."""
    faults = [] if data.isascii() else ["not ASCII"]
    lines = data.count(b"\n")
    return faults + ([] if lines < MOST_LINES else [f"{lines} lines"])


def import_cycle(sources):
    """A cycle among modules, as a list of names, or None. sources: full module name -> source text."""
    graph = {}
    for name, source in sources.items():
        folder = name if any(other.startswith(f"{name}.") for other in sources) else name.rpartition(".")[0]
        modules = (module or "" for _, module in imported_modules(ast.parse(source), folder))
        graph[name] = [module for module in modules if module in sources]

    def cycle_from(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        return next(filter(None, (cycle_from(target, [*path, name]) for target in graph[name])), None)

    return next(filter(None, (cycle_from(name, []) for name in graph)), None)


def test_every_package_is_seen():
    assert {package for package, _ in SOURCES} == set(RANK)
    assert len(SOURCES) > 100
    for package in RANK:
        assert {room_of(package, path) for own, path in SOURCES if own == package} == ROOM_RANK[package].keys()


@pytest.mark.parametrize("package, path", [pytest.param(*source, id=named(source[1])) for source in SOURCES])
def test_imports(package, path):
    assert import_faults(package, path.read_text(), room_of(package, path)) == []


@pytest.mark.parametrize("path", WITH_TESTS, ids=named)
def test_text(path):
    assert text_faults(path.read_bytes()) == []


@pytest.mark.parametrize("path", WITH_TESTS, ids=named)
def test_kernels_go_by_our_name(path):
    modules = [module or "" for _, module in imported_modules(ast.parse(path.read_text()), "")]
    assert not [module for module in modules if module.partition(".")[0] == "kernels"]


@pytest.mark.parametrize("package", RANK)
def test_no_import_cycles(package):
    assert import_cycle({module_name(own, path): path.read_text() for own, path in SOURCES if own == package}) is None


def test_rooms_and_files_are_small():
    folders = {path.parent for path in WITH_TESTS} | {ROOT / "kernels" / "native"}
    sizes = {named(folder): len([path for path in folder.iterdir() if path.is_file()]) for folder in folders}
    assert {name: size for name, size in sizes.items() if size > MOST_FILES} == {}
    assert statistics.median(path.read_bytes().count(b"\n") for _, path in SOURCES) <= MEDIAN_LINES


@pytest.mark.parametrize("folder", sorted({path.parent for _, path in SOURCES} - DATA_FOLDERS), ids=named)
def test_every_room_is_installed_and_says_what_it_holds(folder):
    package = named(folder).replace("/", ".").replace("kernels", "arb_kernels").replace("scripts", "arb_scripts")
    assert f"    {package}\n" in (ROOT / "setup.cfg").read_text()
    if folder != ROOT / "kernels":
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_kernels_folder_is_no_package():
    """A regular package of that name would shadow the `kernels` that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()


@pytest.mark.parametrize(
    "package, source",
    [
        ("arb_kernels", "from configuration_arb import ArbConfig"),
        ("arb_kernels", "import modeling_arb.layers.norm"),
        ("arb_kernels", "from transformers import PreTrainedModel"),
        ("arb_kernels", "import numpy as np"),
        ("configuration_arb", "from tokenization_arb import ArbTokenizer"),
        ("tokenization_arb", "from arb_kernels.formats.packing import pack_levels"),
        ("modeling_arb", "from training_arb.data.byte_data import ByteBlocks"),
        ("modeling_arb", "def late():\n    from training_arb import state_audit"),
        ("training_arb", "import scripts.pretrain"),
        ("training_arb", "try:\n    import scripts\nexcept ImportError:\n    scripts = None"),
        ("modeling_arb", "from . import layers"),
        ("modeling_arb", "from .. import training_arb"),
        ("modeling_arb", "from ..training_arb import byte_data"),
        ("modeling_arb", "from kernels.packing import pack_levels"),
        ("scripts", "import os, kernels"),
    ],
)
def test_the_check_sees_a_bad_import(package, source):
    assert len(import_faults(package, source)) == 1


@pytest.mark.parametrize(
    "package, source",
    [
        ("arb_kernels", "import math\nimport torch\nfrom .packing import pack_levels"),
        (
            "modeling_arb",
            "from arb_kernels.formats.packing import pack_levels\nfrom configuration_arb import ArbConfig",
        ),
        ("modeling_arb", "from .norm import rms_norm\nimport transformers"),
        ("scripts", "from training_arb.data.byte_data import ByteBlocks\nfrom kernels_of_wisdom import x"),
    ],
)
def test_the_check_lets_a_good_import_pass(package, source):
    assert import_faults(package, source) == []


def test_the_checks_see_bad_sources():
    assert text_faults("x = '\u00e9'\n".encode()) == ["not ASCII"]
    assert text_faults(b"x = 1\n" * 400) == ["400 lines"] and text_faults(b"x = 1\n" * 399) == []


@pytest.mark.parametrize(
    "sources, cycle",
    [
        ({"p.a": "from .b import x", "p.b": "import p.a"}, ["p.a", "p.b", "p.a"]),
        ({"p.r.a": "from .b import x", "p.r.b": "import p.r.a"}, ["p.r.a", "p.r.b", "p.r.a"]),
        ({"p.r.a": "from p.q.b import x", "p.q.b": "from p.r.a import y"}, ["p.r.a", "p.q.b", "p.r.a"]),
        ({"p": "from .a import x", "p.a": "from p import y"}, ["p", "p.a", "p"]),
        ({"p.a": "from .a import x"}, ["p.a", "p.a"]),
        ({"p.a": "from .b import x\nfrom .c import x", "p.b": "from .c import x", "p.c": "import torch"}, None),
        ({"p": "from .a import x", "p.a": "from q import y"}, None),
    ],
)
def test_the_check_sees_a_cycle(sources, cycle):
    assert import_cycle(sources) == cycle


@pytest.mark.parametrize(
    "package, room, source",
    [
        ("arb_kernels", "formats", "from arb_kernels.matmul.quantise import quantise_tokens"),
        ("arb_kernels", "matmul", "from arb_kernels.rules.momentum import momentum_update"),
        ("modeling_arb", "layers", "from modeling_arb.blocks.memgram import MemGram"),
        ("modeling_arb", "blocks", "from modeling_arb.modeling_arb import ArbModel"),
        ("modeling_arb", "blocks", "from modeling_arb import ArbModel"),
        ("modeling_arb", "blocks", "from ..layers.norm import rms_norm"),
        ("training_arb", "data", "from training_arb.train.trainer_arb import ArbTrainer"),
        ("training_arb", "data", "from training_arb.unknown.thing import x"),
    ],
)
def test_the_check_sees_the_wrong_way_between_rooms(package, room, source):
    assert len(import_faults(package, source, room)) == 1


@pytest.mark.parametrize(
    "package, room, source",
    [
        ("arb_kernels", "matmul", "from arb_kernels.formats.packing import pack_levels\nfrom .quantise import x"),
        ("arb_kernels", "formats", "from arb_kernels.backend import uses_native"),
        ("modeling_arb", "blocks", "from modeling_arb.layers.norm import rms_norm"),
        ("training_arb", "train", "from training_arb.optim.integer_optimizer import IntegerOptimizer"),
    ],
)
def test_the_check_lets_the_right_way_between_rooms_pass(package, room, source):
    assert import_faults(package, source, room) == []
