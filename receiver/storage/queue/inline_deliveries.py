"""Inline deliveries, which run within the request that brought their message (acknowledge="after_handling")."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection

from receiver.states import DeliveryState

# States in SQL texts are literals: a partial index is not used for a parameter.
_PENDING: Final = DeliveryState.PENDING

_INLINE: Final = "SELECT lane, state FROM deliveries WHERE id = %(id)s AND inline"
_DEMOTE: Final = f"""
UPDATE deliveries SET inline = false WHERE lane = %(lane)s AND state = '{_PENDING}' AND inline RETURNING id"""
_BEFORE: Final = f"""
SELECT EXISTS (SELECT FROM deliveries WHERE lane = %(lane)s AND state = '{_PENDING}' AND NOT inline AND id < %(id)s)"""


def inline_delivery(connection: Connection, delivery: int) -> tuple[str, bool] | None:
    """Return (lane, whether it is still pending) of an inline delivery; None when the delivery is not inline."""
    row = connection.exec_driver_sql(_INLINE, {"id": delivery}).first()
    return None if row is None else (row.lane, row.state == DeliveryState.PENDING)


def hand_to_workers(connection: Connection, lane: str) -> None:
    """Make the pending inline deliveries ordinary ones: the handler no longer runs within the request."""
    connection.exec_driver_sql(_DEMOTE, {"lane": lane})


def workers_first(connection: Connection, lane: str, delivery: int) -> bool:
    """Return whether an earlier delivery of the lane is to be run by a worker."""
    return bool(connection.exec_driver_sql(_BEFORE, {"lane": lane, "id": delivery}).scalar())
