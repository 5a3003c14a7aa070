"""Export of the registry as the TOML file that `registry apply` reads.

Must not write a secret: the export names a file for each, which the operator provides.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection

from receiver.cli.registry_file import COLUMNS
from receiver.cli.session import Session
from receiver.protocol.verification import KINDS
from receiver.protocol.verification.kind import SecretStorage
from receiver.storage.operations import queries
from receiver.storage.registry import loader

_HEAD: Final = """\
# The registry, for `redox-receiver registry apply`. Put each secret into the file that is named for it, mode 0600, in
# the directory of this file.
"""


def exported(session: Session, connection: Connection, names: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Destination → its TOML table: columns, live credentials, enabled sources and handlers. Raises NotFound."""
    chosen = [queries.destination_named(connection, name) for name in names] or queries.destinations(connection)
    known = loader.load_registry(connection, session.keyring).destinations
    found = {}
    for each in chosen:
        name = each["name"]
        found[name] = {column: each[column] for column in COLUMNS if each[column] is not None}
        credentials = {} if name not in known else {value.id: value for value in known[name].credentials}
        counted: Counter[str] = Counter()
        found[name]["credentials"] = [
            _credential(row, name, counted, credentials.get(row["id"]))
            for row in queries.credentials(connection, destination=name)
            if row["live"] and row["revoked_at"] is None
        ]
        found[name]["sources"] = [
            {key: value for key, value in (("id", row["source_id"]), ("name", row["name"])) if value is not None}
            for row in queries.sources(connection, destination=name)
            if row["enabled"]
        ]
        found[name]["handlers"] = [
            row["handler"] for row in queries.subscriptions(connection, destination=name) if row["enabled"]
        ]
    return found


def _credential(row: Mapping[str, Any], destination: str, counted: Counter[str], value: object) -> dict[str, Any]:
    kind = row["kind"]
    counted[kind] += 1
    file = f"{destination}-{kind}-{counted[kind]}"
    found: dict[str, Any] = {"kind": kind}
    if KINDS[kind].secret is not SecretStorage.NONE:
        found["file"] = f"{file}.secret"
    second = KINDS[kind].second_secret
    if second is not None and getattr(value, second, None) is not None:
        found[f"{second}_file"] = f"{file}.{second.replace('_', '-')}"
    found |= {name: row[name] for name in ("label", "expires_at") if row[name] is not None}
    found |= {name: each for name, each in row["settings"].items() if each is not None}
    return found


def to_toml(destinations: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the file. Names of destinations are valid bare keys."""
    lines = [_HEAD]
    for name, table in destinations.items():
        lines.append(f"[destinations.{name}]")
        for key, value in table.items():
            if isinstance(value, list) and value and isinstance(value[0], Mapping):
                lines += [f"{key} = [", *(f"  {_value(each)}," for each in value), "]"]
            else:
                lines.append(f"{key} = {_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, datetime):
        return value.isoformat()
    return _string(value) if isinstance(value, str) else json.dumps(value)


def _key(text: str) -> str:
    return text if text.isascii() and text.isidentifier() else _string(text)


def _string(text: str) -> str:
    """A TOML basic string. JSON escapes like TOML, except for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
