"""Modules put into one file a package: what falls away, what is refused, and how the files of the model read."""

import subprocess
import sys

import pytest

from modeling_arb.checkpoints.code_bundle import CodeFile, SourceModule, bundle
from modeling_arb.checkpoints.remote_code import code_files, needed_modules
from support.scripting import ROOT

PACKAGES = ("low", "high")
FILES = [CodeFile("low_arb", "low", "Low things"), CodeFile("high_arb", "high", "High things")]


def bundled(left_out=(), **sources):
    """Bundle modules given as low__a="source", in the order given."""
    modules = [SourceModule(name.replace("__", "."), source, PACKAGES, left_out) for name, source in sources.items()]
    return bundle(modules, FILES)


def body(text):
    """What follows the docstring of a file."""
    return text.partition('"""\n\n')[2]


def test_a_file_is_its_modules_one_after_another():
    files = bundled(
        low__a='"""Adds.\n\nAnd more."""\n\nfrom __future__ import annotations\n\nimport math\nimport os as system\n\n'
        "X = math.pi  # kept\n\n\ndef f():\n    return X, system.sep\n",
        low__b='"""Twice."""\n\nfrom __future__ import annotations\n\nimport math\n\nfrom .a import f\n\n\n'
        "def g():\n    return f(), math.e\n",
        high__c='"""High."""\n\nfrom collections.abc import Callable, Iterable\n\nimport torch\n\n'
        "from low.b import g\n\nfrom .d import h\n\nY: Callable | Iterable = g, h, torch\n",
    )
    assert body(files["low_arb.py"]) == (
        "from __future__ import annotations\n\nimport math\nimport os as system\n\n"
        "# From low.a:\n# Adds.\n#\n# And more.\n\nX = math.pi  # kept\n\n\ndef f():\n    return X, system.sep\n\n\n"
        "# From low.b:\n# Twice.\n\n\ndef g():\n    return f(), math.e\n"
    )
    assert body(files["high_arb.py"]) == (
        "from __future__ import annotations\n\nfrom collections.abc import Callable, Iterable\n\nimport torch\n\n"
        "from .low_arb import g\n\n# From high.c:\n# High.\n\nY: Callable | Iterable = g, h, torch\n"
    )
    namespace = {}
    exec(files["low_arb.py"], namespace)
    assert namespace["g"]()[0] == namespace["f"]()


@pytest.mark.parametrize(
    "first, second, said",
    [
        ("def f(): pass", "f = 1", "low_arb.py: f is defined by low.a and defined by low.b; rename one"),
        ("X = 1", "X = 1", "X is defined by low.a and defined by low.b"),
        ("import math", "math = 1", "math is `import math` and defined by low.b"),
        ("from os import path", "from sys import path", "path is `from os import path` and `from sys import path`"),
        (
            "import numpy as F",
            "import torch.nn.functional as F",
            "F is `import numpy as F` and `import torch.nn.functional as F`",
        ),
        ("try:\n    import math\nexcept ImportError:\n    math = None", "import math", "math is defined by low.a"),
        ("if True:\n    X = 1", "for X in range(2):\n    pass", "X is defined by low.a"),
        ("def round(x): pass", "", "low_arb.py: round, defined by low.a, hides a builtin"),
        ("from math import pow", "", "pow, `from math import pow`, hides a builtin"),
    ],
)
def test_a_name_with_two_meanings_is_refused(first, second, said):
    with pytest.raises(ValueError) as error:
        bundled(low__a=first, low__b=second)
    assert said in str(error.value)


def test_a_name_of_another_file_cannot_be_defined_again():
    with pytest.raises(ValueError, match=r"high_arb.py: f is `from .low_arb import f` and defined by high.d"):
        bundled(low__a="def f(): pass", high__c="from low.a import f", high__d="f = 1")


@pytest.mark.parametrize(
    "source",
    [
        "import low.a",
        "import low.a as a",
        "from low import a",
        "from low.a import f as g",
        "from .a import f as g",
        "from low.a import *",
        "def late():\n    from low.a import f",
        "try:\n    from low.a import f\nexcept ImportError:\n    f = None",
    ],
)
def test_an_import_of_ours_in_another_form_is_refused(source):
    with pytest.raises(ValueError, match=r"low.b, line [12]: .* is not allowed in one file; write"):
        bundled(low__a="def f(): pass", low__b=source)


def test_what_is_local_or_the_same_may_have_one_name():
    files = bundled(
        low__a="import math\nfrom os import path\n\nX = [f for f in range(3)]\n\n\ndef g(f):\n    y = f\n    return y",
        low__b="import math\nfrom os import path\n\n\ndef f():\n    y = [X for X in (math, path)]\n    return y",
        low__c="from .a import X\n\nZ = X\n",
        low__d="from .c import X, Z\n",
    )
    assert files["low_arb.py"].count("import math") == files["low_arb.py"].count("from os import path") == 1


def test_names_of_a_module_that_is_left_out_are_struck_from_bases():
    source = "from low.tool import Saves\n\n\nclass Model(Saves, dict):\n    pass\n"
    (text, _) = bundled(("low.tool",), low__a=source).values()
    assert "Saves" not in text and "class Model(dict):" in text


def test_the_files_of_the_model_are_few_and_hold_nothing_of_training():
    files = code_files()
    assert files.keys() == {"kernels_arb.py", "configuration_arb.py", "modeling_arb.py"}
    modules = [module.name for module in needed_modules()]
    assert {"modeling_arb.modeling_arb", "configuration_arb.configuration_arb", "arb_kernels.formats.packing"} <= {
        *modules
    }
    assert not any(name.startswith(("training_arb", "tokenization_arb", "arb_kernels.rules")) for name in modules)
    assert not any("remote_code" in name or "code_bundle" in name for name in modules)
    headings = [line for text in files.values() for line in text.splitlines() if line.startswith("# From ")]
    assert sorted(headings) == sorted(f"# From {name}:" for name in modules)
    assert "SavesItsCode" not in files["modeling_arb.py"]
    for module in needed_modules():
        assert all(modules.index(imported) < modules.index(module.name) for imported in module.own_imports)


def test_the_files_of_the_model_pass_the_linter_and_the_formatter(tmp_path):
    """No unused import, no unknown or redefined name; sorted, spaced and wrapped as the sources are."""
    for name, text in code_files().items():
        (tmp_path / name).write_text(text)
        assert text.isascii() and text.count("from __future__") == 1
    for check in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        command = [sys.executable, "-m", "ruff", *check, "--config", ROOT / "pyproject.toml", tmp_path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
