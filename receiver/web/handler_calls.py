"""Calls of handlers inside a request: the answer to a query, and deliveries that must succeed before the reply.

Must not know a framework or a server, and must not send an answer before the audit row of it has committed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Final, Protocol

import structlog

from receiver.errors import NotFound, Unavailable
from receiver.fault_injection.faults import point
from receiver.pipeline import Admitted, Receipt
from receiver.protocol.message import Head, ParsedMessage, Reply
from receiver.protocol.patterns import matches
from receiver.protocol.registry import Destination, Subscription
from receiver.web.replies import ACCEPTED, JSON, query_failure
from receiver.web.runtime import ConcurrencyLimiter, Runtime, T, recorded

log: Final = structlog.get_logger(__name__)

_query_answered, _query_recorded, _inline_handled = (
    point("query.answered"),
    point("query.recorded"),
    point("inline.handled"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """How a query ended, for the audit. `length`, `sha256`: of the reply's body, which may disclose a patient."""

    receipt: Receipt
    head: Head
    destination: Destination
    responder: str | None
    status: int
    length: int
    sha256: bytes


class AnswerLedger(Protocol):
    """The ledger of how queries ended."""

    def answered(self, answered: Answered) -> Future[None]:
        """Write an audit row. The future is done after the COMMIT, or raises Unavailable."""


class Responders(Protocol):
    """Handlers that run inside a request, in processes that are killed when their time is up."""

    def answer(
        self, message: ParsedMessage, responder: Subscription, destination: Destination, receipt: Receipt, /
    ) -> bytes:
        """The answer to a query, as JSON.

        Raises NotFound (the responder is not loaded), Unavailable (no process is free) and TimeoutError. Any other
        exception is a failure of the responder.
        """

    def run_inline(self, destination: Destination, receipt: Receipt, /) -> bool:
        """Run the deliveries of `receipt.inline`; return whether all have succeeded.

        Raises Unavailable (no process is free) and TimeoutError.
        """


class HandlerCalls:
    """Calls of `responders`, each in a thread. `concurrency`: how many threads may wait for them."""

    def __init__(self, ledger: AnswerLedger, responders: Responders, *, concurrency: int) -> None:
        self._ledger, self._responders = ledger, responders
        self._limiter = ConcurrencyLimiter(concurrency)

    async def answer(self, runtime: Runtime, admitted: Admitted, query: str, receipt: Receipt) -> Reply:
        """The reply to a query that is recorded. It is sent after its audit row has committed."""
        message, destination = admitted.message, admitted.destination
        if message is None:
            return query_failure(query, 400)  # kept in quarantine, as the audit says
        responder = next(
            (
                each
                for each in destination.subscriptions
                if each.role == "responder" and matches(each.patterns, message.kind)
            ),
            None,
        )
        reply = await self._respond(runtime, message, query, responder, destination, receipt)
        answered = Answered(
            receipt=receipt,
            head=admitted.inbound.head,
            destination=destination,
            responder=None if responder is None else responder.handler,
            status=reply.status,
            length=len(reply.body),
            sha256=sha256(reply.body).digest(),
        )
        _query_answered()
        try:
            await recorded(runtime, self._ledger.answered(answered))
        except Unavailable as exc:
            log.warning("query.not_recorded", reason=str(exc), destination=destination.name, uuid=receipt.uuid)
            return reply if reply.status != ACCEPTED.status else query_failure(query, 503)
        _query_recorded()
        return reply

    async def _respond(
        self,
        runtime: Runtime,
        message: ParsedMessage,
        query: str,
        responder: Subscription | None,
        destination: Destination,
        receipt: Receipt,
    ) -> Reply:
        try:
            if responder is None:
                raise NotFound
            body = await self._limited(
                runtime, destination, partial(self._responders.answer, message, responder, destination, receipt)
            )
        except NotFound:
            status = 501
        except Unavailable:
            status = 503
        except TimeoutError:
            status = 504
        except Exception:
            # Whatever a responder raises is its failure, and the reply says so.
            status = 500
            log.exception("query.failed", destination=destination.name, uuid=receipt.uuid)
        else:
            return Reply(status=200, body=body, media=JSON)
        log.warning("query.not_answered", status=status, kind=query, destination=destination.name, uuid=receipt.uuid)
        return query_failure(query, status)

    async def handle(self, runtime: Runtime, admitted: Admitted, receipt: Receipt) -> None:
        """Run the deliveries with after_handling. Raises Unavailable if not all have succeeded yet."""
        destination = admitted.destination
        try:
            handled = await self._limited(
                runtime, destination, partial(self._responders.run_inline, destination, receipt)
            )
        except TimeoutError:
            handled = False
        if not handled:
            raise Unavailable("not_handled_yet")
        _inline_handled()

    async def _limited(self, runtime: Runtime, destination: Destination, call: Callable[[], T]) -> T:
        """Run a call that waits for a handler in a thread. It holds its slot until it ends, even if the request no
        longer waits.

        Raises Unavailable at once if no slot is free.
        """

        def limited() -> T:
            with self._limiter.slot(destination.id):
                return call()

        return await runtime.run_in_thread(limited)
