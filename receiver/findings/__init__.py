"""Findings: conditions that need an operator, read from the database for `status` and `check`.

To add one: add a line in `receiver.findings.codes`, a finder (a function from a View to findings) in the module of its
subject, that finder in FINDERS, and a situation in tests/findings/test_codes.py.

Must not print, and must not write to the database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from receiver.findings import backlog, deliveries, feeds, hosts, installation, integrity, plugins, setup
from receiver.findings.codes import CODES
from receiver.findings.finding import Finding
from receiver.findings.view import View, read

__all__ = ["CODES", "FINDERS", "Finding", "View", "collect", "read"]

# In the order of their findings: causes before effects.
FINDERS: Final[tuple[Callable[[View], Iterator[Finding]], ...]] = (
    integrity.registry_rows,
    integrity.public_keys,
    installation.clocks,
    hosts.receivers,
    installation.workers,
    installation.outbox,
    setup.lacking,
    setup.expiring,
    feeds.nowhere,
    feeds.silent,
    feeds.refusals,
    deliveries.lanes,
    deliveries.handlers,
    plugins.problems,
    deliveries.dead,
    backlog.waiting,
    backlog.unhandled,
    feeds.quarantine,
)


def collect(view: View) -> list[Finding]:
    """Return all findings, in the order of FINDERS. Raises SQLAlchemyError."""
    return [finding for finder in FINDERS for finding in finder(view)]
