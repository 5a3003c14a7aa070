"""Outcome records: the outcomes of delivery attempts in the audit log, many attempts in one row.

An audit row names a range of ids of `delivery_attempts`, how many had each outcome, and a digest over them. The ranges
follow one another. An outcome is recorded within seconds, not in the transaction that commits it: a row for each would
double what a worker writes.

Must not change an attempt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from hashlib import sha256
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Engine, Row

from receiver.keyring import Keyring
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.commit_horizon import CommitHorizon
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import encode

ACTION: Final = "delivery.outcomes"
# Attempts of one row. What is left is recorded next.
MOST: Final = 5_000
_LOCK: Final = 0x6F7574636F6D6573  # "outcomes" as a number

_LAST: Final = f"SELECT detail FROM audit_events WHERE action = '{ACTION}' ORDER BY id DESC LIMIT 1"
# The columns that the digest is over.
COLUMNS: Final = "id, delivery_id, received_at, attempt, epoch, worker, started_at, ended_at, outcome, error_class"
_ATTEMPTS: Final = f"""
SELECT {COLUMNS} FROM delivery_attempts WHERE id > %(after)s AND id <= %(up_to)s ORDER BY id LIMIT {MOST}"""


class OutcomeRange(msgspec.Struct, frozen=True, kw_only=True):
    """The detail of an audit row: the attempts with ids above `after`, up to `up_to`, and their digest."""

    after: int
    up_to: int
    attempts: int
    outcomes: dict[str, int]
    digest: str


def outcome_range(after: int, up_to: int, attempts: Iterable[Row[Any]]) -> OutcomeRange:
    """Return the range of these attempts, which are rows of COLUMNS in the order of their ids."""
    digest, outcomes = sha256(), Counter[str]()
    for each in attempts:
        digest.update(encode(*each))
        outcomes[each.outcome] += 1
    return OutcomeRange(
        after=after,
        up_to=up_to,
        attempts=outcomes.total(),
        outcomes=dict(sorted(outcomes.items())),
        digest=digest.hexdigest(),
    )


class OutcomeRecorder:
    """Records outcomes, one recorder at a time on all hosts. `actor`: the name in the audit log. Not thread-safe."""

    def __init__(self, engine: Engine, keyring: Keyring, *, actor: str) -> None:
        self._engine = engine
        self._audit = AuditChain(keyring, Sealer(keyring))
        self._actor = actor
        self._horizon = CommitHorizon("delivery_attempts")

    def record(self) -> int:
        """Record the attempts that have ended and are not recorded, and return how many. Raises SQLAlchemyError."""
        try:
            with self._engine.begin() as connection:
                if not connection.exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({_LOCK})").scalar():
                    return 0
                return self._record(connection)
        except BaseException:
            self._audit.restart()
            raise

    def _record(self, connection: Connection) -> int:
        last = connection.exec_driver_sql(_LAST).scalar()
        after = 0 if last is None else msgspec.json.decode(last, type=OutcomeRange).up_to
        up_to = self._horizon.advance(connection, after)
        rows = connection.exec_driver_sql(_ATTEMPTS, {"after": after, "up_to": up_to}).all()
        if not rows:
            return 0
        made = outcome_range(after, rows[-1].id if len(rows) == MOST else up_to, rows)
        now: datetime = connection.exec_driver_sql("SELECT pg_catalog.clock_timestamp()").scalar_one()
        write(
            connection,
            self._audit,
            [
                AuditEvent(
                    action=ACTION, outcome="recorded", at=now, actor=self._actor, detail=msgspec.to_builtins(made)
                )
            ],
        )
        return made.attempts
