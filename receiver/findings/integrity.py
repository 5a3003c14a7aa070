"""Findings about integrity: registry rows that this host cannot verify, and public keys that cannot be fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from receiver.findings.finding import Finding, command
from receiver.findings.view import View
from receiver.storage.registry import jwks_refresher, loader
from receiver.storage.registry.loader import UnverifiedRow

# How many rows one finding names.
_MAX_NAMED: Final = 3


def registry_rows(view: View) -> Iterator[Finding]:
    """Find rows under a key that this host lacks, and rows that were changed by something else."""
    if view.keyring is None:
        return
    rows = loader.unverified_rows(view.connection, view.keyring)
    for key in sorted({each.key for each in rows if each.key is not None}):
        signed = [each for each in rows if each.key == key]
        yield Finding(
            code="registry_key_missing",
            text=f"Receivers on this host answer 503: {_named(signed)} signed "
            f"with key {key}, which the keyring of this host lacks. Copy the keyring file from the host that "
            "has it.",
            fix=command("keys", "list"),
            details={"key": key, "rows": len(signed)},
        )
    if changed := [each for each in rows if each.key is None]:
        yield Finding(
            code="registry_row_changed",
            text=f"{_named(changed)} changed by something other than redox-receiver, and not in force.",
            fix=command("audit", "verify"),
            details={"rows": len(changed)},
        )


def public_keys(view: View) -> Iterator[Finding]:
    """Find keys of a URL that cannot be fetched, or that are stale and no longer trusted."""
    for each in jwks_refresher.failing_keys(view.connection):
        why = "" if each.failure is None else f" ({each.failure})"
        since = f"since {each.fetched_at:%Y-%m-%d %H:%M} UTC"
        details = {
            "url": each.url,
            "credential": each.credential,
            "kind": each.kind,
            "fetched_at": each.fetched_at,
            "failure": each.failure,
        }
        if each.stale:
            yield Finding(
                code="key_set_stale",
                destination=each.destination,
                text=f"{each.destination}: requests of "
                f"kind {each.kind} are answered 503, because the keys at {each.url} could not be fetched "
                f"{since}{why}.",
                fix=command("credential", "list", each.destination),
                details=details,
            )
        else:
            yield Finding(
                code="key_set_failing",
                destination=each.destination,
                severity="warning",
                text=f"{each.destination}: the keys at {each.url} for kind {each.kind} could not be fetched "
                f"{since}{why}; the old ones are still in use.",
                fix=command("credential", "list", each.destination),
                details=details,
            )


def _named(rows: Sequence[UnverifiedRow]) -> str:
    named = [f"{each.table} id {each.id}" + (f" of {each.destination}" if each.destination else "") for each in rows]
    more = f" and {len(named) - _MAX_NAMED:,} more" if len(named) > _MAX_NAMED else ""
    return f"{', '.join(named[:_MAX_NAMED])}{more} {'is' if len(named) == 1 else 'are'}"
