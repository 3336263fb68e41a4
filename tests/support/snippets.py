"""The code blocks of a Markdown file: found, run in order as a reader would, and their output held to what is shown.

A `python` block runs in one namespace per file. A `bash` block runs line by line in one folder: `arb NAME` and
`python scripts/NAME.py` in this process, all else in bash. `# exit code N` at the end of a line says what it ends with.
A `text` block after either is its output: each line must come, in order, its words as they are, its numbers within
TOLERANCE; those before a unit of time or speed may be any.

What would take minutes says how it is cut in an HTML comment before the block: `tests add: OPTIONS` puts options behind
each script's, `tests run: COMMAND` stands for the block. Such a block's output is not held to what is shown. With
ARB_DOCS=full in the environment `tests add` is ignored: then the blocks run as they stand.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.scripting import ROOT, run_script
from training_arb.cli import arb_command as arb

FENCE = re.compile(
    r"(?:<!-- tests (?P<how>add|run): (?P<given>.*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")
ANY_VALUE = re.compile(r"\s?(?:s|ms|us|seconds|tokens/s|MB/s|bytes/s)\b")
TOLERANCE = 0.05
SHELL = re.compile(r"[|<>&;$`*]")
RUNS_A_SCRIPT = re.compile(r"^arb |scripts/\w+\.py")
EXIT_CODE = re.compile(r"#.*exit code (\d+)")


@dataclass
class Snippet:
    """A block of code, what tests add to it or run for it, and the output shown after it."""

    language: str
    code: str
    line: int
    how: str | None = None
    given: str = ""
    output: str | None = None

    @property
    def cut(self) -> bool:
        return self.how == "run" or (self.how == "add" and os.environ.get("ARB_DOCS") != "full")


def snippets(text: str) -> list[Snippet]:
    """The python and bash blocks of a file, each with the text block that follows it without words between."""
    found, end = [], 0
    for match in FENCE.finditer(text):
        language = match["language"]
        if language in ("python", "bash"):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Snippet(language, match["code"], line, match["how"], match["given"] or ""))
        elif language == "text" and found and not text[end : match.start()].strip():
            found[-1].output = match["code"]
        end = match.end()
    return found


def commands(code: str) -> list[str]:
    """Whole commands: continued lines joined, here-documents kept together."""
    whole, lines = [], iter(code.splitlines())
    for line in lines:
        while line.endswith("\\"):
            line = line[:-1] + next(lines).strip()
        if here := re.search(r"<<\s*'?(\w+)'?", line):
            for more in lines:
                line += f"\n{more}"
                if more == here[1]:
                    break
        if line.strip() and not line.startswith("#"):
            whole.append(line)
    return whole


def run_arb(words: list[str], standard_input: str) -> int:
    """`arb ...` in this process, reading a file as its standard input. Returns the exit code."""
    before = sys.argv, sys.stdin
    with open(standard_input, encoding="utf-8") as file:
        sys.argv, sys.stdin = words, file
        try:
            return arb.main()
        except SystemExit as stop:
            return stop.code
        finally:
            sys.argv, sys.stdin = before


def run_command(command: str) -> int:
    """One command; its standard output goes to this process's. Returns the exit code."""
    words, given = shlex.split(command, comments=True), os.devnull
    if words[0] == "arb" and words[-2] == "<":
        words, given, command = words[:-2], words[-1], command.partition(" < ")[0]
    plain = not SHELL.search(re.sub(r"'[^']*'", "", command.partition("  #")[0]))
    if plain and words[0] == "arb":
        return run_arb(words, given)
    if plain and words[0] == "python" and words[1].startswith("scripts/"):
        return run_script(Path(words[1]).stem, *words[2:])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "ARB_ROOT": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=300)
    print(done.stdout + done.stderr)
    return done.returncode


def run_snippet(snippet: Snippet, namespace: dict) -> str:
    """Run a block; returns what it printed. Raises AssertionError naming the command whose exit code is not as said."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if snippet.language == "python":
            exec(compile(snippet.code, f"line {snippet.line}", "exec"), namespace)
            return printed.getvalue()
        code = snippet.given if snippet.how == "run" else snippet.code
        for command in commands(code):
            said = EXIT_CODE.search(command)
            if snippet.how == "add" and snippet.cut and RUNS_A_SCRIPT.search(command):
                command = f"{command.partition('  #')[0]} {snippet.given}"
            status = run_command(command)
            assert status == (int(said[1]) if said else 0), (
                f"{command}: exit code {status}\n{printed.getvalue()[-2000:]}"
            )
    return printed.getvalue()


def _skeleton(line: str) -> str:
    return " ".join(NUMBER.sub("#", line).split())


def _numbers(line: str) -> list[float | None]:
    """None for a number that may be any."""
    found = []
    for match in NUMBER.finditer(line):
        free = ANY_VALUE.match(line, match.end())
        found.append(None if free else float(match[0].replace(",", "")))
    return found


def missing_lines(shown: str, printed: str) -> list[str]:
    """Lines of `shown` that do not come in `printed`, in order; `...` stands for any lines."""
    missing, rest = [], printed.splitlines()
    for line in shown.splitlines():
        if not line.strip() or line.strip() == "...":
            continue
        place = next((i for i, other in enumerate(rest) if _agree(line, other)), None)
        if place is None:
            missing.append(line)
        else:
            rest = rest[place + 1 :]
    return missing


def _agree(shown: str, printed: str) -> bool:
    if _skeleton(shown) != _skeleton(printed):
        return False
    pairs = zip(_numbers(shown), _numbers(printed), strict=True)
    return all(a is None or b is None or abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) for a, b in pairs)
