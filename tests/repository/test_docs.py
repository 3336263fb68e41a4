"""Every snippet of README, model card and docs runs, and prints what is shown. snippets.py says how.

A file's snippets run in a folder that looks like the repository and holds a finished run of `make pretrain`, cut to a
few steps of arb-tiny, as runs/pretrain. The hub is the stand-in on loopback.
"""

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from support.loopback_hub import used_by_this_process
from support.scripting import ROOT, run_script
from support.snippets import commands, missing_lines, run_snippet, snippets

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OUR_OWN = {"runs", "build", ".venv", ".git"}
TINY_CUT = "--max_steps 12 --save_steps 6 --ctx 64 --eval_bytes 2000 --eval_blocks 4"
TINY_RUN = f"--preset arb-tiny {TINY_CUT}"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """What `make pretrain` leaves, at the smallest size."""
    shown = subprocess.run(["make", "-n", "pretrain"], cwd=ROOT, capture_output=True, text=True).stdout
    line = next(line for line in shown.splitlines() if "scripts/pretrain.py" in line)  # a make within make says more
    _, script, *arguments = shlex.split(line)
    assert script == "scripts/pretrain.py"
    folder = tmp_path_factory.mktemp("made")
    assert run_script("pretrain", *arguments, *TINY_RUN.split(), "--output_dir", folder / "pretrain") == 0
    return folder / "pretrain"


@pytest.fixture
def checkout(tmp_path, monkeypatch, pretrained):
    """A folder like the repository's, for what the snippets write."""
    for path in ROOT.iterdir():
        if path.name not in OUR_OWN and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(pretrained, tmp_path / "runs" / "pretrain", symlinks=True)
    monkeypatch.chdir(tmp_path)
    with used_by_this_process(tmp_path / "hub"):
        yield tmp_path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_snippets_run(document, checkout):
    namespace = {"__name__": "__main__"}
    for snippet in snippets(document.read_text(encoding="utf-8")):
        printed = run_snippet(snippet, namespace)
        if snippet.output is not None and not snippet.cut:
            assert missing_lines(snippet.output, printed) == [], f"line {snippet.line} printed:\n{printed[-3000:]}"


def test_a_cards_snippets_run(checkout):
    """The card of an export, with the names that it leaves open filled in."""
    assert run_script("export_hub", "runs/pretrain/final", "export") == 0
    card = (checkout / "export" / "README.md").read_text(encoding="utf-8")
    card = card.replace("path/to/this/folder", "export").replace("FILES", "README.md docs").replace("FILE", "README.md")
    python, adapter, shell = snippets(card.replace("```sh\n", "```bash\n"))
    assert (python.language, adapter.language, shell.language) == ("python", "python", "bash")
    namespace = {}
    assert "def " in run_snippet(python, namespace)
    run_snippet(adapter, namespace)
    for number, command in enumerate(commands(shell.code)):
        cut = (
            "--max_bytes 500"
            if "evaluate" in command
            else f"{TINY_CUT} --data README.md LOG.md --output_dir runs/card-{number}"
        )
        run_snippet(replace(shell, code=command, how="add", given=cut), {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#\s]+)\)", document.read_text(encoding="utf-8"))
    missing = [name for name in targets if "://" not in name and not (document.parent / name).exists()]
    assert missing == []


def test_figures_are_drawn_from_the_kernels(tmp_path):
    """The script holds its last figure to what momentum_update itself does."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "draw_figures.py", tmp_path], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_reference_shows_a_modules_docstrings():
    pdoc = pytest.importorskip("pdoc")
    names = runpy.run_path(str(ROOT / "docs" / "build_api.py"))["modules"]()
    assert {"arb_kernels.formats.packing", "modeling_arb.blocks.memgram", "training_arb.train.trainer_arb"} <= {*names}
    page = pdoc.render.html_module(pdoc.doc.Module.from_name("modeling_arb.blocks.memgram"), {})
    assert "a memory of byte n-grams" in page and "history" in page


def undocumented(source: str, name: str) -> list[str]:
    """What a module offers without a docstring. References (`naive_`) stand beside a documented function; what triton
    compiles is no Python to call."""
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) or not tree.body else [name]
    for node in tree.body:
        public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith(("_", "naive_"))
        if public and not node.decorator_list and not ast.get_docstring(node):
            missing.append(f"{name}.{node.name}")
    return missing


@pytest.mark.parametrize("folder", ["kernels", "configuration_arb", "tokenization_arb", "modeling_arb", "training_arb"])
def test_every_public_name_has_a_docstring(folder):
    assert [
        fault for path in sorted((ROOT / folder).glob("*.py")) for fault in undocumented(path.read_text(), path.stem)
    ] == []


def test_the_checks_see_what_is_missing():
    assert undocumented("def f():\n    pass\n", "m") == ["m", "m.f"]
    assert undocumented('"""M."""\nclass C:\n    x = 1\ndef _g(): ...\ndef naive_f(): ...\n', "m") == ["m.C"]
    assert missing_lines("a 100 b 2.00\n...\nc", "x\na 103 b 1.95\nmore\nc\n") == []
    assert missing_lines("a 100\nb", "b\na 100\n") == ["b"]
    assert missing_lines("loss 2.0", "loss 3.0") == ["loss 2.0"]
    assert missing_lines("took 9 s", "took 400 s") == []
    assert commands("a \\\n  b\n# no\ncat <<'E'\nx\nE\nc") == ["a b", "cat <<'E'\nx\nE", "c"]
    found = snippets("<!-- tests add: --x 1 -->\n```bash\na\n```\n\n```text\nb\n```\nwords\n```text\nc\n```\n")
    assert [(one.given, one.output) for one in found] == [("--x 1", "b\n")]
