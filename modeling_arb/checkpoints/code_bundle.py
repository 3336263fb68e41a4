"""Joins the modules of a package into one readable file.

A file has one docstring, the imports of all its modules once, and a section for each module: its name, its docstring as
a comment, its code. Imports within the file are removed. Imports from another file become `from .name import x`, the
form by which transformers finds the files of a checkpoint's code. All modules of a file share one namespace, so a name
must have one meaning.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
import textwrap
from collections.abc import Container, Iterable, Mapping, Sequence
from symtable import symtable
from typing import NamedTuple

HEADER = '''"""{subject} of ARB, a byte-level language model of ternary weights.

Generated from the modules of {package} in the ARB repository, in the order of their imports; change them there,
not here. Apache License 2.0.
"""

from __future__ import annotations

'''
LINE_LENGTH = 120


class CodeFile(NamedTuple):
    """A file to write: its name without .py, the package whose modules it holds, its subject."""

    name: str
    package: str
    subject: str


class SourceModule:
    """One module, parsed.

    own_imports: imported names by our module that defines them. outside_imports: (source, clause) by bound name, such
    as {"F": ("", "torch.nn.functional as F"), "nn": ("torch", "nn")}. struck: names from modules in `left_out`. Raises
    ValueError on an import of our modules that can be neither removed nor made relative: under another name, of a whole
    module, or below the top level.
    """

    def __init__(self, name: str, source: str, packages: Container[str], left_out: Container[str] = ()):
        self.name, self.source, self.tree = name, source, ast.parse(source)
        self.own_imports: dict[str, list[str]] = {}
        self.outside_imports: dict[str, tuple[str, str]] = {}
        self.struck: set[str] = set()
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            target = "" if isinstance(node, ast.Import) else self._absolute(node)
            for alias in node.names:
                if (target or alias.name).partition(".")[0] in packages:
                    if node not in self.tree.body or "." not in target or alias.asname or alias.name == "*":
                        raise ValueError(
                            f"{name}, line {node.lineno}: {ast.unparse(node)!r} is not allowed in one file; write"
                            " `from package.module import name` at the top level"
                        )
                    if target in left_out:
                        self.struck.add(alias.name)
                    else:
                        self.own_imports.setdefault(target, []).append(alias.name)
                elif node in self.tree.body and target != "__future__":
                    self.outside_imports[alias.asname or alias.name] = (target, ast.unparse(alias))

    def _absolute(self, node: ast.ImportFrom) -> str:
        module = node.module or ""
        return f"{self.name.rpartition('.')[0]}.{module}" if node.level else module

    def definitions(self) -> set[str]:
        """Names bound at the module's top level, except by imports."""
        symbols = symtable(self.source, self.name, "exec").get_symbols()
        bound = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
        return bound.difference(self.outside_imports, *self.own_imports.values(), self.struck, ["annotations"])

    def section(self) -> str:
        """Its name and docstring as a comment, then its code."""
        lines, left_away = self.source.splitlines(), set()
        docstring = ast.get_docstring(self.tree)
        for i, node in enumerate(self.tree.body):
            if isinstance(node, ast.Import | ast.ImportFrom) or (docstring and i == 0):
                left_away.update(range(node.lineno - 1, node.end_lineno or node.lineno))
            for base in node.bases if isinstance(node, ast.ClassDef) else []:
                if isinstance(base, ast.Name) and base.id in self.struck:
                    lines[base.lineno - 1] = re.sub(rf"\b{base.id}, ", "", lines[base.lineno - 1])
        code = "\n".join(line for number, line in enumerate(lines) if number not in left_away).strip("\n")
        code = re.sub("\n{4,}", "\n\n\n", code)
        gap = "\n\n\n" if code.startswith(("def ", "class ", "@")) else "\n\n"
        return f"# From {self.name}:\n{_as_comment(docstring or '')}{gap}{code}\n"


def bundle(modules: Sequence[SourceModule], files: Iterable[CodeFile]) -> dict[str, str]:
    """The text of each file by its name. modules: in import order. Raises ValueError if two modules of one file use a
    name for different things, or one hides a builtin.
    """
    file_of = {file.package: file for file in files}
    texts = {}
    for package, file in file_of.items():
        members = [module for module in modules if module.name.startswith(f"{package}.")]
        relative: dict[str, str] = {}  # name: the other file that it comes from
        for module in members:
            for home, names in module.own_imports.items():
                if not home.startswith(f"{package}."):
                    relative |= dict.fromkeys(names, f".{file_of[home.partition('.')[0]].name}")
        _check_names(f"{file.name}.py", members, relative)
        header = HEADER.format(subject=file.subject, package=package)
        imports = _import_lines([clause for module in members for clause in module.outside_imports.values()])
        imports += _import_lines([(home, name) for name, home in relative.items()])
        sections = "\n\n".join(module.section() for module in members)
        texts[f"{file.name}.py"] = f"{header}{imports}{sections}"
    return texts


def _check_names(file: str, members: Iterable[SourceModule], relative: Mapping[str, str]) -> None:
    """Every name that the file's top level binds must have one origin."""
    origins = {name: f"`{_statement(home, name)}`" for name, home in relative.items()}
    for module in members:
        given = {name: f"`{_statement(*source)}`" for name, source in module.outside_imports.items()}
        given |= dict.fromkeys(module.definitions(), f"defined by {module.name}")
        for name, origin in given.items():
            if hasattr(builtins, name):
                raise ValueError(f"{file}: {name}, {origin}, hides a builtin from the other modules; rename it")
            if origins.setdefault(name, origin) != origin:
                raise ValueError(f"{file}: {name} is {origins[name]} and {origin}; rename one of them")


def _statement(source: str, clause: str) -> str:
    return f"from {source} import {clause}" if source else f"import {clause}"


def _import_lines(clauses: Sequence[tuple[str, str]]) -> str:
    """(source, clause) of imports, source "" for plain ones -> the statements, ordered as isort orders them: standard
    library, other libraries, relative imports; a clause with `as` has a statement of its own."""
    statements = [(name, _statement("", name)) for source, name in sorted(set(clauses)) if not source]
    grouped: dict[tuple[str, str], set[str]] = {}
    for source, clause in clauses:
        if source:
            grouped.setdefault((source, clause if " as " in clause else ""), set()).add(clause)
    for (source, _), names in sorted(grouped.items()):
        listed = sorted(names, key=_kind_and_name)
        line = _statement(source, ", ".join(listed))
        if len(line) > LINE_LENGTH:
            line = f"from {source} import (\n" + "".join(f"    {name},\n" for name in listed) + ")"
        statements.append((source, line))
    parts: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for source, line in statements:
        standard = source.partition(".")[0].partition(" ")[0] in sys.stdlib_module_names
        parts[2 if source.startswith(".") else 0 if standard else 1].append(line)
    return "".join("\n".join(lines) + "\n\n" for lines in parts.values() if lines)


def _kind_and_name(name: str) -> tuple[int, str]:
    """Constants first, then classes, then the rest, as isort orders them."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


def _as_comment(text: str) -> str:
    """Each line after a `#`; paragraphs that become too wide are wrapped again."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        if max(map(len, lines), default=0) + 2 > LINE_LENGTH:
            lines = textwrap.wrap(" ".join(lines), LINE_LENGTH - 2)
        paragraphs.append("\n".join(f"# {line}".rstrip() for line in lines))
    return "\n#\n".join(paragraphs)
