"""Every script under one name: `arb NAME ...` does what `python scripts/NAME.py ...` does, with the same exit code.

A name can be cut as long as one script alone begins with it: `arb audit` is `arb audit_state`.

examples:
  arb pretrain --help
  arb pretrain --preset arb-tiny --max_steps 50 --output_dir runs/tiny
  arb audit runs/tiny/final
  arb completion > ~/.local/share/bash-completion/completions/arb      # options by the tab key, in bash
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

COMPLETION = "completion"


def scripts_folder() -> Path:
    """scripts/ of a checkout, or of the installed package."""
    return Path(find_spec("arb_scripts").submodule_search_locations[0])


def script_files() -> dict[str, Path]:
    """Script name -> its file, those in scripts/developer/ among them."""
    return {path.stem: path for path in scripts_folder().rglob("*.py") if path.stem != "__init__"}


def summaries() -> dict[str, str]:
    """Script name -> the first line of its docstring; nothing is imported."""
    found = {}
    for name, path in sorted(script_files().items()):
        found[name] = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).partition("\n")[0]
    return found


def resolve(command: str, names: list[str]) -> str:
    """The name that `command` is or alone begins. Raises ValueError when there is none, or more than one."""
    wanted = command.replace("-", "_")
    matches = [wanted] if wanted in names else [name for name in names if wanted and name.startswith(wanted)]
    if len(matches) != 1:
        raise ValueError(
            f"command={command!r} is not one of {', '.join(matches or names)}; `arb --help` describes them"
        )
    return matches[0]


def load_script(name: str) -> ModuleType:
    """The script as a module whose help speaks of `arb NAME`, ready for `main`, which reads sys.argv."""
    path = script_files()[name].relative_to(scripts_folder()).with_suffix("")
    module = importlib.import_module(".".join(["arb_scripts", *path.parts]))
    text = re.sub(r"python scripts/(?:developer/)?(\w+)\.py", r"arb \1", module.__doc__)
    module.__doc__ = re.sub(r"scripts/(\w+)\.py", r"-m arb_scripts.\1", text)
    return module


def options(name: str) -> list[str]:
    """The options that the script's help lists."""
    module, text = load_script(name), io.StringIO()
    sys.argv = [f"arb {name}", "--help"]
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        module.main()
    lines = [line for line in text.getvalue().splitlines() if line.startswith("  -")]
    return sorted({*re.findall(r"(?<!\S)--[\w-]+", "\n".join(lines))})


def completion(names: list[str]) -> str:
    """A bash function that completes names, options and files. zsh reads it after `bashcompinit`."""
    cases = "\n".join(f'    {name}) options="{" ".join(options(name))}" ;;' for name in names)
    return f"""_arb() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} options=""
  case ${{COMP_WORDS[1]}} in
{cases}
  esac
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W "{" ".join([*names, COMPLETION])}" -- "$word"))
  elif [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$word"))
  else
    COMPREPLY=()
  fi
}}
complete -o default -F _arb arb"""


def overview(scripts: dict[str, str]) -> str:
    """What `arb --help` prints."""
    rows = {**scripts, COMPLETION: "Print the completion of names and options for bash."}
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
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if name == COMPLETION:
        print(completion([*scripts]))
        return 0
    module = load_script(name)
    sys.argv = [f"arb {name}", *arguments[1:]]
    module.run(module.main)
    raise AssertionError(f"{name} ended without an exit code")


if __name__ == "__main__":
    sys.exit(main())
