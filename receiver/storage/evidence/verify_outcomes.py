"""Verification of deliveries: the attempts are those that the audit recorded, and none was made without a reason.

Only reads. Must not check the audit rows themselves (see receiver.storage.evidence.verify).
"""

from __future__ import annotations

from typing import Final

import msgspec
from sqlalchemy import Connection

from receiver.states import DeliveryState, MessageState
from receiver.storage.evidence.outcome_records import ACTION, COLUMNS, OutcomeRange, outcome_range

_RECORDED: Final = f"SELECT id, detail FROM audit_events WHERE action = '{ACTION}' ORDER BY id"
_ATTEMPTS: Final = f"""
SELECT {COLUMNS} FROM delivery_attempts WHERE id > %(after)s AND id <= %(up_to)s ORDER BY id"""
_UNRUN: Final = f"""
SELECT d.id FROM deliveries d
WHERE d.state = '{DeliveryState.SUCCEEDED}' AND NOT EXISTS (
    SELECT FROM delivery_attempts a
    WHERE a.delivery_id = d.id AND a.received_at = d.received_at AND a.outcome = '{DeliveryState.SUCCEEDED}')
ORDER BY d.id LIMIT 1"""

# What was quarantined has a delivery only after an operator released it, or a repeat that was let in took it up.
_UNRELEASED: Final = f"""
SELECT d.id FROM deliveries d JOIN messages m ON m.id = d.message_id AND m.received_at = d.received_at
JOIN audit_events e ON e.message_uuid = m.uuid AND e.action = 'message.receive'
  AND e.outcome = '{MessageState.QUARANTINED}'
WHERE NOT EXISTS (
    SELECT FROM audit_events r WHERE r.message_uuid = m.uuid
    AND (r.action = 'message.release' OR r.action = 'message.receive' AND strpos(r.detail, '"taken_up"') > 0))
ORDER BY d.id LIMIT 1"""


def failed_outcome(connection: Connection) -> str | None:
    """Return what is wrong with the first delivery that fails verification, or None.

    An attempt that is not recorded yet proves a success all the same: it ended a few seconds ago.
    """
    after = 0
    for row in connection.exec_driver_sql(_RECORDED).all():
        recorded = msgspec.json.decode(row.detail, type=OutcomeRange)
        if recorded.after != after:
            return f"audit_events id {row.id}: its attempts do not follow those of the row before it"
        attempts = connection.exec_driver_sql(_ATTEMPTS, {"after": after, "up_to": recorded.up_to}).all()
        if outcome_range(after, recorded.up_to, attempts) != recorded:
            return (
                f"delivery_attempts ids {after + 1} to {recorded.up_to}: a row was changed, deleted or inserted after "
                f"audit row {row.id} recorded them"
            )
        after = recorded.up_to
    unrun = connection.exec_driver_sql(_UNRUN).scalar()
    if unrun is not None:
        return f"deliveries id {unrun}: marked as succeeded, but no attempt of it succeeded"
    unreleased = connection.exec_driver_sql(_UNRELEASED).scalar()
    return None if unreleased is None else f"deliveries id {unreleased}: its message is in quarantine, never released"
