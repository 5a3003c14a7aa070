"""The enums of states are the states of the tables and of the command line."""

from __future__ import annotations

import ast
import re
from enum import StrEnum
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy import Engine, text

import receiver
from receiver.cli.commands import deliveries, messages, outbox
from receiver.states import DeliveryState, LaneState, MessageState, OutboxState
from receiver.storage import schema


@pytest.mark.parametrize(
    ("table", "states"),
    [
        ("messages", MessageState),
        ("deliveries", DeliveryState),
        ("lanes", LaneState),
        ("outbound_requests", OutboxState),
    ],
)
def test_the_database_has_the_same_states(engine: Engine, table: str, states: type[StrEnum]) -> None:
    """The constraint of a migrated table, and that of the schema, list the values of the enum."""
    name = f"ck_{table}_state"
    with engine.connect() as connection:
        found = connection.scalar(
            text("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = :name"), {"name": name}
        )
    declared = next(each for each in schema.metadata.tables[table].constraints if each.name == name)
    for definition in (str(found), str(declared.sqltext)):  # type: ignore[attr-defined]
        assert set(re.findall(r"'(\w+)'", definition)) == set(states)


def test_the_command_line_offers_the_same_states() -> None:
    """`--state` takes the values of the enums."""
    assert set(messages.STATES) == set(MessageState)
    assert set(deliveries.STATES) == set(DeliveryState)
    assert set(outbox.STATES) == set(OutboxState)


_PACKAGE: Final = Path(receiver.__file__).parent
_VALUES: Final = frozenset({*MessageState, *DeliveryState, *LaneState, *OutboxState})
_IN_SQL: Final = re.compile(rf"\bstate\s*(?:=|<>|!=|IN)\s*\(?\s*'(?:{'|'.join(sorted(_VALUES))})'")
# Files whose `state` is that of something else: of keys, of a finding's check, of what Redox's simulator sends.
_OTHER_STATES: Final = frozenset({"keyring.py", "cli/commands/keys.py"})


def literal_states(source: str) -> list[int]:
    """Return the lines in which a state is compared with, or set to, a string literal instead of a value of an enum."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Compare(left=left, comparators=comparators):
                sides = [left, *comparators]
                # In `x.state`, `x["state"]` and `state`, also as the text of a subscript.
                if any(re.search(r"\bstate\b", ast.unparse(side)) for side in sides) and any(map(_literals, sides)):
                    found.add(node.lineno)
            case ast.keyword(arg="state" | "lane_state", value=value) if _literals(value):
                found.add(value.lineno)
            case ast.Dict(keys=keys, values=values):
                found.update(
                    value.lineno
                    for key, value in zip(keys, values, strict=True)
                    if isinstance(key, ast.Constant) and key.value == "state" and _literals(value)
                )
            case ast.Constant(value=str(text)) if _IN_SQL.search(text):
                found.add(node.lineno)
    return sorted(found)


def _literals(node: ast.expr) -> bool:
    """Return whether the expression is a state's value as a literal, or chooses between or holds some."""
    match node:
        case ast.Constant(value=value):
            return value in _VALUES
        case ast.IfExp(body=body, orelse=orelse):
            return _literals(body) or _literals(orelse)
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
            return any(map(_literals, elements))
    return False


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("if row.state == 'pending': ...", [1]),
        ("x = 'held' != row['state']", [1]),
        ("x = row.state in ('dead', 'skipped')", [1]),
        ("f(state='dead')", [1]),
        ("f(state='dead' if x else DeliveryState.PENDING)", [1]),
        ("x = {'a': 1, 'state': 'sent'}", [1]),
        ("x = '''\nSELECT FROM lanes WHERE state = 'ready' '''", [1]),
        ("x = f\"UPDATE lanes SET state = 'ready' WHERE {y}\"", [1]),
        ("x = 'SELECT d.state IN (\\'dead\\')'", [1]),
        ("if row.state == DeliveryState.PENDING: ...", []),
        ("x = f\"WHERE state = '{DeliveryState.PENDING}'\"", []),
        ("if done.why == 'dead': ...", []),
        ("x = {'pending': 1}", []),
        ("'''A docstring of a state: pending.'''", []),
    ],
)
def test_literals_are_found(source: str, lines: list[int]) -> None:
    """The check finds a literal in Python and in SQL, and nothing else."""
    assert literal_states(source) == lines


def test_code_uses_the_enums() -> None:
    """No state is compared with, or set to, a literal: a new state is added in one place."""
    assert {
        f"{name}:{line}"
        for path in sorted(_PACKAGE.rglob("*.py"))
        if (name := str(path.relative_to(_PACKAGE))) not in _OTHER_STATES
        for line in literal_states(path.read_text())
    } == set()
