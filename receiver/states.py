"""The states of messages, deliveries, lanes and outbound requests: the values of the tables' `state` columns.

The schema's constraints and the command line's `--state` options come from here. A lane or request that waits its turn
has no state of its own. Must not import anything of the package.
"""

from __future__ import annotations

from enum import StrEnum


class MessageState(StrEnum):
    """What a received message is to be done with (`messages.state`)."""

    ACCEPTED = "accepted"  # recorded, with a delivery for each handler that takes it, or answered by a responder
    UNHANDLED = "unhandled"  # recorded, but no enabled handler takes it; a repeat or a replay creates deliveries
    QUARANTINED = "quarantined"  # recorded, but must not reach a handler until an operator releases it
    DISCARDED = "discarded"  # an operator has decided that a quarantined message is not handled


class DeliveryState(StrEnum):
    """The progress of one message to one handler (`deliveries.state`)."""

    PENDING = "pending"  # to be run, running, or to be retried
    SUCCEEDED = "succeeded"  # the handler's work is committed
    DEAD = "dead"  # its attempts are used up, or the handler gave up; `deliveries retry` runs it again
    SKIPPED = "skipped"  # an operator has decided that it does not run


class LaneState(StrEnum):
    """Whether a lane's next delivery may run (`lanes.state`)."""

    READY = "ready"  # it may run now; a lane without a row is ready
    WAITING = "waiting"  # not before `ready_at`, after a failure or RetryLater
    HELD = "held"  # not until an operator retries, skips or releases: its first delivery used up its attempts
    PAUSED = "paused"  # not while its handler is paused


class OutboxState(StrEnum):
    """The progress of one request to Redox (`outbound_requests.state`)."""

    PENDING = "pending"  # to be sent, being sent, or to be retried
    SENT = "sent"  # Redox accepted it
    DEAD = "dead"  # Redox refused it, its attempts are used up, or it was a call whose end was never recorded
    HELD = "held"  # a restored database does not know whether it was sent; `outbox retry` sends it
