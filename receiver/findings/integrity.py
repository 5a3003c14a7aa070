"""Findings about the proof of what is stored: rows of the registry that this host cannot prove."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from receiver.findings.finding import Finding, command
from receiver.findings.view import View
from receiver.storage import registry
from receiver.storage.registry import UnprovedRow

# So many rows are named in one finding.
_NAMED: Final = 3


def registry_rows(view: View) -> Iterator[Finding]:
    """Rows under a key that this host lacks, and rows that were changed by something else."""
    if view.keyring is None:
        return
    rows = registry.unproved_rows(view.connection, view.keyring)
    for key in sorted({each.key for each in rows if each.key is not None}):
        signed = [each for each in rows if each.key == key]
        yield Finding(code="registry_key_missing", text=f"Receivers on this host answer 503: {_named(signed)} signed "
                      f"with key {key}, which the keyring of this host lacks. Copy the keyring file from the host that "
                      "has it.", fix=command("keys", "list"), details={"key": key, "rows": len(signed)})
    if changed := [each for each in rows if each.key is None]:
        yield Finding(code="registry_row_changed", text=f"{_named(changed)} changed by something other than "
                      "redox-receiver, and not in force.", fix=command("audit", "verify"),
                      details={"rows": len(changed)})


def _named(rows: Sequence[UnprovedRow]) -> str:
    named = [f"{each.table} id {each.id}" + (f" of {each.destination}" if each.destination else "") for each in rows]
    more = f" and {len(named) - _NAMED:,} more" if len(named) > _NAMED else ""
    return f"{', '.join(named[:_NAMED])}{more} {'is' if len(named) == 1 else 'are'}"
