"""Every snippet of README, model card and docs runs, and prints what is shown. snippets.py says how.

A file's snippets run in a folder that looks like the repository and holds a finished run of `make pretrain`, cut to a
few steps of arb-tiny, as runs/pretrain. The hub is the stand-in on loopback.
"""

import shlex
import shutil
import subprocess

import pytest
from loopback_hub import used_by_this_process
from scripting import ROOT, run_script
from snippets import missing_lines, run_snippet, snippets

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OUR_OWN = {"runs", "build", ".venv", ".git"}
TINY_RUN = "--preset arb-tiny --max_steps 12 --save_steps 6 --ctx 64 --eval_bytes 2000 --eval_blocks 4"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """What `make pretrain` leaves, at the smallest size."""
    shown = subprocess.run(["make", "-n", "pretrain"], cwd=ROOT, capture_output=True, text=True).stdout
    _, script, *arguments = shlex.split(shown.splitlines()[-1])
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
