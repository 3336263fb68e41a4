"""Every snippet of README, model card and docs runs and prints what is shown (snippets.py says how); links lead to
existing files and headings; generated tables and figures are those that docs/tools makes.

A file's snippets run in a folder that looks like the repository and holds a finished run of `make pretrain`, cut to a
few steps of arb-tiny, as runs/pretrain. The hub is the stand-in on loopback.
"""

import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest

from support.loopback_hub import used_by_this_process
from support.scripting import ROOT, run_script
from support.snippets import commands, missing_lines, run_snippet, snippets

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_LINKS = [*DOCUMENTS, ROOT / "LOG.md", ROOT / "benchmarks" / "README.md"]
TOOLS = ROOT / "docs" / "tools"
WRITE_REFERENCE = runpy.run_path(str(TOOLS / "write_reference.py"))
OUR_OWN = {"runs", "build", ".venv", ".git"}
TINY_CUT = "--max_steps 12 --save_steps 6 --ctx 64 --eval_bytes 2000 --eval_blocks 4"
TINY_RUN = f"--preset arb-tiny {TINY_CUT}"


def page_name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """What `make pretrain` leaves, at the smallest size."""
    command = ["make", "-n", "pretrain", "ARGS="]  # whatever `make test` was given
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
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


@pytest.mark.parametrize("document", [page for page in DOCUMENTS if page.name != "json_files.md"], ids=page_name)
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


def anchors(text):
    """The anchors that a Markdown page offers: its headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    """Relative links of a page to files or headings that do not exist."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if "://" in target or (path.exists() and not anchor):
            continue
        if not path.is_file() or anchor not in anchors(path.read_text(encoding="utf-8")):
            found.append(target)
    return found


@pytest.mark.parametrize("document", WITH_LINKS, ids=page_name)
def test_links_lead_somewhere(document):
    assert broken_links(document) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=page_name)
def test_files_that_a_page_names_exist(document):
    folders = "kernels|configuration_arb|modeling_arb|training_arb|scripts|tests|docs|benchmarks"
    named = re.findall(rf"`((?:{folders})/[\w/.]*\w)`", document.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / name).resolve() for name in re.findall(r"\]\(([^)#\s]+)", index.read_text())}
    assert {*(ROOT / "docs").rglob("*.md")} - linked == {index}


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "reference").glob("*.md")), ids=page_name)
def test_generated_tables_are_those_of_the_code(page):
    text = page.read_text(encoding="utf-8")
    assert WRITE_REFERENCE["written"](text) == text, "run python docs/tools/write_reference.py"


def test_every_table_that_can_be_generated_is_on_a_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    assert {name for _, name, _ in WRITE_REFERENCE["SECTION"].findall(pages)} == {*WRITE_REFERENCE["SECTIONS"]}


def key_paths(value, prefix=""):
    """`a.b` for the leaves of nested objects, `a[].b` for those of a list of objects."""
    if isinstance(value, dict) and value:
        return {path for key, inside in value.items() for path in key_paths(inside, f"{prefix}.{key}".lstrip("."))}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {path for inside in value for path in key_paths(inside, f"{prefix}[]")}
    return {prefix}


def wrong_keys(table, value):
    """Keys of a file that its table lacks, and keys of the table that the file lacks.

    A key stands for all that is below it; those of a row that says `(with ...)` may be missing.
    """
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    shown = {key: "(with" in row for row in rows for key in re.findall(r"`([^`]+)`", row.partition("(")[0])}
    patterns = {key: re.escape(key).replace("NAME", r"[^.]+") + r"($|[.\[])" for key in shown}
    paths = key_paths(value)
    unlisted = {path for path in paths if not any(re.match(pattern, path) for pattern in patterns.values())}
    absent = {
        key
        for key, pattern in patterns.items()
        if not shown[key] and not any(re.match(pattern, path) for path in paths)
    }
    return sorted(unlisted), sorted(absent)


def test_json_files_have_the_keys_of_their_tables(checkout):
    text = (ROOT / "docs" / "reference" / "json_files.md").read_text(encoding="utf-8")
    for snippet in snippets(text):
        run_snippet(snippet, {})
    files = re.findall(r"^File: `([^`]+)`\n\n((?:\|.*\n)+)", text, re.M)
    wrong = {name: wrong_keys(table, json.loads((checkout / name).read_text())) for name, table in files}
    assert len(files) == text.count("\nFile: ") and wrong == dict.fromkeys(wrong, ([], []))


def run_tool(name, *arguments, cwd=None):
    return subprocess.run([sys.executable, TOOLS / name, *arguments], capture_output=True, text=True, cwd=cwd)


def test_figures_are_drawn_from_the_kernels(tmp_path):
    """draw_figures.py compares its last figure with what momentum_update itself does."""
    for tool, target in (("draw_figures.py", tmp_path), ("draw_comparison.py", tmp_path / "comparison.png")):
        done = run_tool(tool, target, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_the_comparison_shows_what_was_measured():
    panels = runpy.run_path(str(TOOLS / "draw_comparison.py"))["panels"]()
    for panel in panels:
        rows = [json.loads((ROOT / "benchmarks" / name).read_text()) for name in panel.files]
        assert {*panel.values.values()} <= {*numbers(rows)} and "TrueTernary" in panel.values


def numbers(value):
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, float) else [number for one in inside for number in numbers(one)]


def test_the_8_bit_benchmark_names_the_package_that_it_needs():
    if find_spec("torchao") is None:
        done = run_tool("measure_adam_8bit.py")
        assert (done.returncode, done.stderr) == (2, "error: torchao is not installed: pip install torchao\n")
    else:
        done = run_tool(
            "measure_adam_8bit.py", "--preset=arb-tiny", "--steps=2", "--batch=2", "--ctx=32", "--rates=3e-3"
        )
        assert done.returncode == 0 and "bytes of state a weight" in done.stdout


def test_reference_shows_a_modules_docstrings():
    pdoc = pytest.importorskip("pdoc")
    names = runpy.run_path(str(TOOLS / "build_api.py"))["modules"]()
    assert {"arb_kernels.formats.packing", "modeling_arb.blocks.memgram", "training_arb.train.trainer_arb"} <= {*names}
    page = pdoc.render.html_module(pdoc.doc.Module.from_name("modeling_arb.blocks.memgram"), {})
    assert "byte n-grams are hashed to rows" in page and "history" in page


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
        fault for path in sorted((ROOT / folder).rglob("*.py")) for fault in undocumented(path.read_text(), path.stem)
    ] == []


def test_the_checks_see_what_is_missing():
    assert anchors("# A `b`, c\n```bash\n# no\n```\n## D-e f\n") == {"a-b-c", "d-e-f"}
    table = "| key | x |\n| --- | --- |\n| `a[].b`, `c` | x |\n| `d.NAME.e` (with `--f`) | x |\n"
    assert wrong_keys(table, {"a": [{"b": 1}], "c": {"x": 1}}) == ([], [])
    assert wrong_keys(table, {"a": [{"b": 1, "z": 2}], "d": {"n": {"e": 1}}}) == (["a[].z"], ["c"])
    assert undocumented("def f():\n    pass\n", "m") == ["m", "m.f"]
    assert undocumented('"""M."""\nclass C:\n    x = 1\ndef _g(): ...\ndef naive_f(): ...\n', "m") == ["m.C"]
    assert missing_lines("a 100 b 2.00\n...\nc", "x\na 103 b 1.95\nmore\nc\n") == []
    assert missing_lines("a 100\nb", "b\na 100\n") == ["b"]
    assert missing_lines("loss 2.0", "loss 3.0") == ["loss 2.0"]
    assert missing_lines("took 9 s", "took 400 s") == []
    assert commands("a \\\n  b\n# no\ncat <<'E'\nx\nE\nc") == ["a b", "cat <<'E'\nx\nE", "c"]
    found = snippets("<!-- tests add: --x 1 -->\n```bash\na\n```\n\n```text\nb\n```\nwords\n```text\nc\n```\n")
    assert [(one.given, one.output) for one in found] == [("--x 1", "b\n")]
