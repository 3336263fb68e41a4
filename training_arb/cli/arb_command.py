"""Runs every script under one name: `arb NAME ...` does what `python scripts/NAME.py ...` does.

The exit code is the same. A name can be cut as long as only one script begins with it: `arb audit` is `arb
audit_state`.

examples:
  arb pretrain --help
  arb pretrain --preset arb-tiny --max_steps 50 --output_dir runs/tiny
  arb audit runs/tiny/final
  arb completion > ~/.local/share/bash-completion/completions/arb      # names and options by the tab key, in bash
  arb completion zsh > "${fpath[1]}/_arb"                               # the same in zsh
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

COMPLETION, SHELLS = "completion", ("bash", "zsh")
COMPLETION_SUMMARY = "Print the completion of names, options and files for bash (the default) or zsh."


def scripts_folder() -> Path:
    """scripts/ of a checkout, or of the installed package."""
    spec = find_spec("arb_scripts")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def script_files() -> dict[str, Path]:
    """Script name -> its file, those in scripts/developer/ among them."""
    return {path.stem: path for path in scripts_folder().rglob("*.py") if path.stem != "__init__"}


def summaries() -> dict[str, str]:
    """Script name -> the first line of its docstring; nothing is imported."""
    found = {}
    for name, path in sorted(script_files().items()):
        found[name] = str(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))).partition("\n")[0]
    return found


def resolve(command: str, names: list[str]) -> str:
    """The one name that `command` is or begins. Raises ValueError when it begins none, or more than one."""
    wanted = command.replace("-", "_")
    matches = [wanted] if wanted in names else [name for name in names if wanted and name.startswith(wanted)]
    if len(matches) != 1:
        raise ValueError(
            f"command={command!r} is not one of {', '.join(matches or names)}; `arb --help` describes them"
        )
    return matches[0]


def load_script(name: str) -> ModuleType:
    """The script as a module whose help speaks of `arb NAME`; its `main` reads sys.argv."""
    path = script_files()[name].relative_to(scripts_folder()).with_suffix("")
    module = importlib.import_module(".".join(["arb_scripts", *path.parts]))
    text = re.sub(r"python scripts/(?:developer/)?(\w+)\.py", r"arb \1", str(module.__doc__))
    module.__doc__ = re.sub(r"scripts/(\w+)\.py", r"-m arb_scripts.\1", text)
    return module


def command_parser() -> argparse.ArgumentParser:
    """The parsers of all scripts as those of one command's subcommands."""
    import shtab  # here, so that other commands start without it

    parser = argparse.ArgumentParser(prog="arb")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, summary in summaries().items():
        script = load_script(name).build_parser()
        commands.add_parser(name, help=summary, parents=[script], add_help=False)
        for action in script._actions:  # a file's name may stand for any text
            if action.nargs != 0 and not action.choices and action.type in (None, str):
                action.complete = shtab.FILE
    commands.add_parser(COMPLETION, help=COMPLETION_SUMMARY).add_argument("shell", nargs="?", choices=SHELLS)
    return parser


def completion(shell: str) -> str:
    """The shell's function that completes names, options, choices and files. Raises ValueError on another shell."""
    import shtab

    if shell not in SHELLS:
        raise ValueError(f"shell={shell!r} is not one of {', '.join(SHELLS)}")
    return shtab.complete(command_parser(), shell)


def overview(scripts: dict[str, str]) -> str:
    """What `arb --help` prints."""
    rows = {**scripts, COMPLETION: COMPLETION_SUMMARY}
    width = max(map(len, rows))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in rows.items())
    return f"usage: arb NAME ...    arb NAME --help    arb --version\n\n{__doc__}\ncommands:\n{commands}"


def main() -> int:
    """Run one command; returns the exit code, or exits with the script's."""
    scripts, arguments = summaries(), sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview(scripts))
        return 0
    if arguments[0] == "--version":
        print(f"arb {version('arb')}")
        return 0
    try:
        name = resolve(arguments[0], [*scripts, COMPLETION])
        if name == COMPLETION:
            print(completion(*(arguments[1:2] or SHELLS[:1])))
            return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    module = load_script(name)
    sys.argv = [f"arb {name}", *arguments[1:]]
    module.run(module.main)
    raise AssertionError(f"{name} ended without an exit code")


if __name__ == "__main__":
    sys.exit(main())
