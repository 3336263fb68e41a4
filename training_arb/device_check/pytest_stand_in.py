"""The part of pytest that the kernel tests use, for machines with a GPU but without pytest.

`install()` puts it in pytest's place before a test file is imported; `calls_of` then gives the file's tests, one call
for each set of parameters, with conftest.py's fixtures.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any


class Skipped(Exception):
    """Raised where a test does not apply to this machine."""


@dataclass(frozen=True)
class Param:
    """One row of a parameter table."""

    values: tuple
    name: str | None = None
    marks: tuple = ()


@dataclass(frozen=True)
class Mark:
    """pytest.mark.NAME(...): a decorator that leaves itself on the function."""

    name: str
    args: tuple = ()
    options: dict = field(default_factory=dict)

    def __call__(self, *args, **options):
        if not self.args and not self.options:
            return Mark(self.name, args, options)
        (function,) = args
        function.marks = [self, *getattr(function, "marks", [])]
        return function


class Marks:
    """pytest.mark: every attribute is a mark."""

    def __getattr__(self, name: str) -> Mark:
        return Mark(name)


@dataclass
class MonkeyPatch:
    """Attributes and environment variables that `undo` brings back."""

    _undo: list[Callable[[], object]] = field(default_factory=list)

    def setattr(self, target: object, name: str, value: object) -> None:
        before = getattr(target, name)
        self._undo.append(lambda: setattr(target, name, before))
        setattr(target, name, value)

    def setenv(self, name: str, value: str) -> None:
        before = os.environ.get(name)
        self._undo.append(lambda: os.environ.pop(name, None) if before is None else os.environ.update({name: before}))
        os.environ[name] = value

    def delenv(self, name: str, raising: bool = True) -> None:
        before = os.environ.pop(name, None)
        if before is not None:
            self._undo.append(lambda: os.environ.update({name: before}))
        elif raising:
            raise KeyError(name)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


def param(*values: object, id: str | None = None, marks: object = ()) -> Param:
    """pytest.param."""
    return Param(values, id, marks if isinstance(marks, tuple) else (marks,))


def fixture(function: Callable | None = None, *, autouse: bool = False, **_options: object) -> Callable:
    """pytest.fixture: a decorator that leaves itself on the function."""

    def mark(function: Callable) -> Callable:
        function.is_fixture, function.autouse = True, autouse
        return function

    return mark if function is None else mark(function)


def importorskip(name: str, reason: str | None = None) -> types.ModuleType:
    """pytest.importorskip. Raises Skipped where the module is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skipped(reason or f"{name} is not installed") from error


@contextmanager
def raises(expected: type[Exception], match: str = "") -> Iterator[None]:
    """pytest.raises."""
    try:
        yield
    except expected as error:
        assert re.search(match, str(error)), f"{error} does not match {match}"
    else:
        raise AssertionError(f"{expected.__name__} was not raised")


@contextmanager
def warns(expected: type[Warning]) -> Iterator[None]:
    """pytest.warns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert any(issubclass(warning.category, expected) for warning in caught), f"no {expected.__name__}"


def install() -> None:
    """Make `import pytest` return this module."""
    module = types.ModuleType("pytest")
    setattr(module, "mark", Marks())  # noqa: B010, a module has no such attribute for a type checker
    for entry in (param, fixture, importorskip, raises, warns):
        setattr(module, entry.__name__, entry)
    sys.modules["pytest"] = module


@dataclass(frozen=True)
class Test:
    """One call of a test function."""

    name: str
    function: Callable
    parameters: dict[str, Any]
    marks: tuple[Mark, ...]

    def run(self, fixtures: dict[str, Callable], seed_again: Callable[[], object]) -> None:
        """Call it within its fixtures and the automatic ones. Raises what the test raises, or Skipped."""
        for mark in self.marks:
            if mark.name == "skipif" and mark.args[0]:
                raise Skipped(mark.options["reason"])
        node = types.SimpleNamespace(callspec=types.SimpleNamespace(params=self.parameters))
        made: dict[str, Any] = {**self.parameters, "request": types.SimpleNamespace(node=node)}
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch = made["monkeypatch"] = MonkeyPatch()
            stack.callback(patch.undo)

            def value_of(name: str) -> Any:
                if name not in made:
                    made[name] = enter(fixtures[name])
                return made[name]

            def enter(function: Callable) -> Any:
                arguments = {name: value_of(name) for name in inspect.signature(function).parameters}
                if inspect.isgeneratorfunction(function):
                    return stack.enter_context(contextmanager(function)(**arguments))
                return function(**arguments)

            for name, function in fixtures.items():
                if function.autouse:
                    value_of(name)
            arguments = {name: value_of(name) for name in inspect.signature(self.function).parameters}
            seed_again()
            self.function(**arguments)


def fixtures_of(*modules: types.ModuleType) -> dict[str, Callable]:
    """The fixtures that the modules define, by name."""
    return {name: value for module in modules for name, value in vars(module).items() if hasattr(value, "is_fixture")}


def calls_of(module: types.ModuleType) -> list[Test]:
    """Every test of a module at every set of its parameters, in the file's order."""
    functions = [value for name, value in vars(module).items() if name.startswith("test_") and callable(value)]
    return [test for function in functions for test in _calls(function)]


def _calls(function: Callable) -> Iterator[Test]:
    marks = getattr(function, "marks", [])
    tables = [_rows(*mark.args, **mark.options) for mark in marks if mark.name == "parametrize"]
    for rows in itertools.product(*tables):
        parameters = {name: value for names, row in rows for name, value in zip(names, row.values, strict=True)}
        label = "-".join(str(row.name) for _, row in reversed(rows))
        name = f"{function.__name__}[{label}]" if rows else function.__name__
        row_marks = [mark for _, row in rows for mark in row.marks]
        yield Test(name, function, parameters, (*(mark for mark in marks if mark.name == "skipif"), *row_marks))


def _rows(
    names: str | tuple[str, ...], values: list, ids: Callable | list | None = None
) -> list[tuple[list[str], Param]]:
    columns = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    rows = []
    for i, value in enumerate(values):
        row = value if isinstance(value, Param) else Param((value,) if len(columns) == 1 else tuple(value))
        given = ids[i] if isinstance(ids, list) else None
        label = row.name or given or "-".join(ids(v) if callable(ids) else str(v) for v in row.values)
        rows.append((columns, Param(row.values, label, row.marks)))
    return rows
