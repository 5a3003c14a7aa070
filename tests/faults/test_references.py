"""The suite's references to the receiver: log events, queries and modules that exist. The long runs are rare."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy import Engine, text

import receiver
from tests.faults import effects

HERE: Final = Path(__file__).parent
MODULES: Final = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith(("test_", "__")))
SOURCE: Final = "\n".join(path.read_text() for path in Path(receiver.__file__).parent.rglob("*.py"))


def _events() -> Iterator[str]:
    for module in MODULES:
        for node in ast.walk(ast.parse((HERE / f"{module}.py").read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr="log_lines"), args=[ast.Constant(value=str(event)), *_]):
                    yield event


def _queries() -> Iterator[tuple[str, str]]:
    for module in MODULES:
        for name, value in vars(importlib.import_module(f"tests.faults.{module}")).items():
            if isinstance(value, str) and re.match(r"\s*(SELECT|WITH)\b", value):
                yield f"{module}.{name}", value


QUERIES: Final = dict(_queries())


def test_events_are_logged() -> None:
    """Each log event that the suite waits for is logged somewhere in the receiver."""
    events = set(_events())
    assert events
    assert {event for event in events if f'"{event}"' not in SOURCE} == set()


def test_module_of_handler_processes() -> None:
    """The suite finds handler processes by this module."""
    assert '"receiver.worker.handler_process"' in SOURCE
    assert '"receiver.worker.handler_process"' in (HERE / "faults.py").read_text()


@pytest.mark.parametrize("name", QUERIES)
def test_queries_are_valid(engine: Engine, name: str) -> None:
    """PostgreSQL accepts each query with the current schema: every table and column exists."""
    parameters: dict[str, str] = {}

    def number(found: re.Match[str]) -> str:
        return parameters.setdefault(found[1], f"${len(parameters) + 1}")

    statement = re.sub(r"(?<!:):([a-z]+)", number, QUERIES[name])
    with engine.begin() as connection:
        connection.execute(text(effects.TABLE))
        connection.exec_driver_sql(f"PREPARE query AS {statement}")
        connection.exec_driver_sql("DEALLOCATE query")
