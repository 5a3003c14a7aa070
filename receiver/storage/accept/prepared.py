"""Prepared statements of fixed text, run through libpq on the psycopg connection that SQLAlchemy opens.

The cursors of SQLAlchemy and psycopg take more CPU time than all the rest of a message that is recorded alone.
Parameters are binary: libpq ends a text parameter at a NUL, while PostgreSQL refuses a NUL in a binary one.

Must not hold statements or rules. A PreparedStatements is used by one thread.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Any, Final

import psycopg
from psycopg import errors
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus

Parameters = Sequence[bytes | None]

# PostgreSQL counts times from this moment, in microseconds (timestamptz_send).
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_OIDS: Final = {"bigint": 20, "bytea": 17}
_SUCCEEDED: Final = (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK)

_bigint: Final = struct.Struct(">q").pack
_length: Final = struct.Struct(">i").pack
_array: Final = struct.Struct(">5i").pack


def array(kind: str, elements: Sequence[bytes]) -> bytes:
    """Return the elements, already encoded as `kind`, as a one-dimensional array (array_send)."""
    parts = [_array(1, 0, _OIDS[kind], len(elements), 1)]
    for element in elements:
        parts += _length(len(element)), element
    return b"".join(parts)


# PostgreSQL's binary format of each type.
_ENCODERS: Final[Mapping[str, Callable[[Any], bytes]]] = {
    "bigint": _bigint,
    "integer": _length,
    "boolean": struct.Struct(">?").pack,
    "text": str.encode,
    "bytea": bytes,
    "json": bytes,
    "uuid": attrgetter("bytes"),
    "timestamptz": lambda time: _bigint((time - _EPOCH) // _MICROSECOND),
    "bigint[]": lambda numbers: array("bigint", [_bigint(number) for number in numbers]),
}


def encoder(columns: Mapping[str, str]) -> Callable[[Mapping[str, Any]], list[bytes | None]]:
    """Return a function that encodes a row as parameters. `columns` maps names to PostgreSQL types.

    The function raises KeyError, and UnicodeEncodeError or struct.error for a value that the type cannot hold.
    """
    encoders = [(name, _ENCODERS[kind]) for name, kind in columns.items()]

    def encoded(row: Mapping[str, Any]) -> list[bytes | None]:
        return [None if (value := row[name]) is None else encode(value) for name, encode in encoders]

    return encoded


@dataclass(frozen=True, slots=True, eq=False)
class Statement:
    """A statement whose parameters are $1, $2, …, each with a cast that gives its type."""

    name: str
    text: str


class PreparedStatements:
    """Prepares each statement when it first runs on the connection."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._libpq = connection.pgconn
        self._names: dict[Statement, bytes] = {}

    def run(self, statement: Statement, parameters: Parameters) -> list[tuple[bytes | None, ...]]:
        """Run the statement and return its rows, each value as text. Raises psycopg.Error, without the server's
        message.
        """
        name = self._names.get(statement)
        if name is None:
            self._succeeded(self._libpq.prepare(statement.name.encode(), statement.text.encode()))
            name = self._names[statement] = statement.name.encode()
        values: Any = parameters  # psycopg's annotation does not allow NULL
        result = self._succeeded(self._libpq.exec_prepared(name, values, [1] * len(parameters)))
        columns = range(result.nfields)
        return [tuple([result.get_value(row, column) for column in columns]) for row in range(result.ntuples)]

    @property
    def lost(self) -> bool:
        """Return whether the connection is lost."""
        return self._libpq.status != ConnStatus.OK

    def _succeeded(self, result: Any) -> Any:
        """Return the result. Raises psycopg.Error: the class of its SQLSTATE, or OperationalError without one."""
        if result.status in _SUCCEEDED:
            return result
        code = result.error_field(DiagnosticField.SQLSTATE)
        if code is None:
            raise psycopg.OperationalError
        # The server's message may quote a row, so it is dropped.
        state = code.decode()
        try:
            raise errors.lookup(state)
        except KeyError:
            unknown = psycopg.DatabaseError()
            unknown.sqlstate = state
            raise unknown from None
