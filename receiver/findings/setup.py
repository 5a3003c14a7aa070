"""Findings about the setup of destinations: missing or expiring credentials, missing sources and handlers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from receiver.findings.finding import Finding, command
from receiver.findings.formatting import at
from receiver.findings.view import View
from receiver.storage.operations import queries

# Credentials that expire within this time are reported.
_SOON: Final = timedelta(days=30)


def lacking(view: View) -> Iterator[Finding]:
    """Find enabled destinations without a live credential of each required kind, without a source, or a handler."""
    live, registered, bound = defaultdict[str, set[str]](set), set(), set()
    for credential in queries.credentials(view.connection):
        if credential["live"]:
            live[credential["destination"]].add(credential["kind"])
    for source in queries.sources(view.connection):
        if source["enabled"]:
            registered.add(source["destination"])
    for subscription in queries.subscriptions(view.connection):
        if subscription["enabled"]:
            bound.add(subscription["destination"])
    for each in queries.destinations(view.connection):
        name = each["name"]
        if not each["enabled"]:
            continue
        missing = [set(kinds.split("+")) - live[name] for kinds in each["require"]]
        if missing and all(missing):
            kind = min((len(kinds), min(kinds)) for kinds in missing)[1]
            yield Finding(
                code="no_credential",
                destination=name,
                text=f"{name}: every request is refused: no live credential of kind {kind}.",
                fix=_add(name, kind),
                details={"require": each["require"], "missing": kind},
            )
        if each["sources_policy"] == "registered" and name not in registered:
            yield Finding(
                code="no_source",
                destination=name,
                text=f"{name}: no source is registered, so every message "
                f"{'is refused' if each['on_unknown_source'] == 'reject' else 'goes to quarantine'}.",
                fix=command("source", "add", name, "…"),
                details={"on_unknown_source": each["on_unknown_source"]},
            )
        if name not in bound:
            yield Finding(
                code="no_handler",
                destination=name,
                severity="warning",
                text=f"{name}: no handler is enabled: messages are stored but not handled.",
                fix=command("handlers", "enable", "…", "--destination", name),
                details={"environment": each["environment"]},
            )


def _add(destination: str, kind: str) -> str:
    """Return the command that adds a credential. The operator fills in the options that most kinds need."""
    return command("credential", "add", destination, "--kind", kind, *(() if kind == "token" else ("…",)))


def expiring(view: View) -> Iterator[Finding]:
    """Find live credentials of enabled destinations that end within 30 days."""
    enabled = {each["destination"] for each in view.feeds if each["enabled"]}
    for each in queries.credentials(view.connection):
        ends = min((time for time in (each["expires_at"], each["revoked_at"]) if time is not None), default=None)
        name = each["destination"]
        if each["live"] and ends is not None and ends < view.now + _SOON and name in enabled:
            yield Finding(
                code="credential_expires",
                destination=name,
                severity="warning",
                text=f"{name}: credential "
                f"{each['id']} ({each['kind']}) ends at {at(ends)}: add another, then set it in Redox.",
                fix=_add(name, each["kind"]),
                details={"id": each["id"], "kind": each["kind"], "ends_at": ends},
            )
