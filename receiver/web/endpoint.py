"""The endpoint of a destination: receives a request, carries out its verdict, and replies.

A coroutine, which an event loop awaits or a thread drives (receiver.web.runtime):

    check the head → read as much of the body as is allowed → judge → refuse, challenge, or record → reply

| event                                                       | reply                               |
|-------------------------------------------------------------|-------------------------------------|
| refused by the head                                         | 401, the body unread                |
| larger than the limit; incomplete, malformed, or too slow   | 413; 400                            |
| a transfer coding that is not chunked                       | 501                                 |
| refused by the body; a signed query that was seen before    | 400, 401, 403                       |
| handshake                                                   | 200, the challenge as text/plain    |
| recorded                                                    | 200, empty                          |
| recorded with after_handling: handled, or not yet           | 200, 503                            |
| query: answered, failed, timed out, no responder, busy      | 200, 500, 504, 501, 503             |
| not recorded, for any cause; an unexpected error            | 503                                 |

Must not know a framework or a server, must not judge (receiver.pipeline does), and must not answer 200 before the
COMMIT. Redox pauses a whole feed at 400 and above. Failures of the receiver itself are a 503, which asks for the
message again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, Protocol

import structlog

from receiver import pipeline
from receiver.errors import BadTransfer, Unavailable
from receiver.fault_injection.faults import point
from receiver.metrics import counters
from receiver.pipeline import Admitted, Challenged, HeadAccepted, Receipt, Refused
from receiver.protocol.message import Head, Nonce, Reply
from receiver.protocol.registry import Destination, Registry
from receiver.web.body import BodyMemoryBudget, Reservation, Transfer, discarded, receive
from receiver.web.handler_calls import AnswerLedger, HandlerCalls, Responders
from receiver.web.replies import ACCEPTED, REFUSALS, UNAVAILABLE, query_failure
from receiver.web.runtime import Runtime, T, recorded

log: Final = structlog.get_logger(__name__)

# Bytes of bodies in memory, at least: a few of the largest, and many of the usual size.
BODIES: Final = 256 * 1024 * 1024
# Bytes. Larger bodies are judged and sealed in a thread, one at a time: that takes up to three times their size in
# memory, and ten milliseconds or more, for which other requests must not wait.
LARGE: Final = 1024 * 1024

_body_read, _judged, _queued, _recorded = (
    point("request.body_read"),
    point("request.judged"),
    point("request.queued"),
    point("request.recorded"),
)


class EndpointLedger(pipeline.Ledger, AnswerLedger, Protocol):
    """What the endpoint needs of the storage."""

    def first(self, once: Sequence[Nonce]) -> bool:
        """Mark the nonces as seen; return whether none of them was seen before. Raises Unavailable."""


class Endpoint:
    """Serves requests to destinations. Safe in threads, one request each.

    `registry` returns the present registry, or None until it is loaded. `max_body`: bytes. `concurrency`: how many
    request threads may wait for handlers.
    """

    def __init__(
        self,
        *,
        registry: Callable[[], Registry | None],
        ledger: EndpointLedger,
        responders: Responders,
        max_body: int,
        concurrency: int,
    ) -> None:
        self.registry: Final = registry
        self._ledger = ledger
        self._handlers = HandlerCalls(ledger, responders, concurrency=concurrency)
        self._max_body = max_body
        self._memory = BodyMemoryBudget(max(BODIES, 4 * max_body))
        self._one_at_a_time = threading.Lock()

    async def serve(self, head: Head, transfer: Transfer, runtime: Runtime) -> Reply:
        """The reply to a request. Raises no errors of its own."""
        try:
            reply = await self._serve(head, transfer, runtime)
        except Unavailable as exc:
            return self._unavailable(str(exc), head, None)
        except Exception:
            # An error of the receiver must not look like a fault of the message: 503 asks for it again.
            log.exception("request.failed")
            return self._unavailable("internal_error", head, None)
        # The connection is kept or closed alike for all reasons of a refusal, so that it reveals none.
        unread = head.method == "GET" or reply.status >= 400
        return replace(reply, close=True) if unread and not discarded(_length(transfer)) else reply

    async def _serve(self, head: Head, transfer: Transfer, runtime: Runtime) -> Reply:
        started = time.perf_counter()
        registry = self.registry()
        if registry is None:
            raise Unavailable("registry_never_loaded")
        accepted = pipeline.check_head(head, registry, head.received_at)
        if isinstance(accepted, Refused):
            return self._refuse(accepted)
        if accepted.authenticated:
            transfer.mark_authenticated()
        proved = False
        try:
            with self._memory.reservation(authenticated=accepted.authenticated) as reservation:
                body = await self._body(accepted, transfer, reservation)
                if isinstance(body, Refused):
                    return self._refuse(body)
                _body_read()
                verdict = await self._work(runtime, body, partial(pipeline.judge, accepted, body, head.received_at))
                if isinstance(verdict, Admitted):
                    proved = True
                    reservation.mark_authenticated()
                _judged()
                return await self._carry_out(runtime, verdict, body, started)
        except Unavailable as exc:
            return self._unavailable(str(exc), head, accepted.destination, proved=proved)

    async def _body(self, accepted: HeadAccepted, transfer: Transfer, reservation: Reservation) -> bytes | Refused:
        if accepted.head.method == "GET":
            return b""  # a handshake by GET is all in the head
        try:
            body, length = None, transfer.length
            if length is None or length <= self._max_body:
                limit = self._max_body if accepted.whole else pipeline.UNPROVED_BODY
                body = await receive(transfer, limit=limit, reservation=reservation)
                if body is None and not accepted.whole:
                    return accepted.missing()
            if body is None:
                # Reasons differ for strangers. If Redox's own feed pauses here, the head could at least suffice.
                raise BadTransfer("body_too_large" if accepted.whole else "body_too_large_unproved", status_hint=413)
        except BadTransfer as exc:
            return accepted.not_received(exc)
        return body

    async def _carry_out(self, runtime: Runtime, verdict: pipeline.Verdict, body: bytes, started: float) -> Reply:
        if isinstance(verdict, Refused):
            return await self._work(runtime, body, partial(self._refuse, verdict))
        if isinstance(verdict, Challenged):
            self._ledger.challenged(verdict)
            counters.count_request(verdict.destination.name, "handshake")
            return Reply(status=200, body=verdict.challenge.encode("ascii"), media="text/plain; charset=utf-8")
        once = verdict.verified.nonces if verdict.query is not None else ()
        if once and not await runtime.run_in_thread(partial(self._ledger.first, once)):
            return self._refuse(pipeline.replayed(verdict))
        recording = await self._work(runtime, body, partial(self._ledger.accept, verdict, batch=True))
        _queued()
        receipt = await recorded(runtime, recording, flush=self._ledger.flush)
        _recorded()
        _count(verdict, receipt, time.perf_counter() - started)
        if verdict.query is not None:
            return await self._handlers.answer(runtime, verdict, verdict.query, receipt)
        if receipt.inline:
            await self._handlers.handle(runtime, verdict, receipt)
        return ACCEPTED

    async def _work(self, runtime: Runtime, body: bytes, call: Callable[[], T]) -> T:
        """The result of `call`, which works on the body. A large body gets a thread, one at a time."""
        if len(body) <= LARGE:
            return call()

        def in_turn() -> T:
            with self._one_at_a_time:
                return call()

        return await runtime.run_in_thread(in_turn)

    def _refuse(self, refused: Refused) -> Reply:
        self._ledger.refuse(refused)
        counters.count_request(_name(refused.destination), "refused", refused.reason)
        if refused.query is not None:
            return query_failure(refused.query, refused.status)
        return REFUSALS[refused.status]

    def _unavailable(self, reason: str, head: Head, destination: Destination | None, *, proved: bool = False) -> Reply:
        log.warning("request.unavailable", reason=reason)
        self._ledger.unavailable(reason, head, destination, proved=proved)
        counters.count_request(_name(destination), "unavailable", reason)
        return replace(UNAVAILABLE, close=True)


def _count(admitted: Admitted, receipt: Receipt, seconds: float) -> None:
    destination, message = admitted.destination, admitted.message
    counters.count_request(destination.name, receipt.outcome, admitted.quarantine)
    counters.observe_accept(seconds)
    # Only registered sources: a message of another could make up any number of them.
    if message is not None and message.source_id in destination.sources:
        counters.source_seen(destination.name, message.source_id or "", admitted.inbound.head.received_at.timestamp())


def _name(destination: Destination | None) -> str | None:
    return None if destination is None else destination.name


def _length(transfer: Transfer) -> int | None:
    """The length of the body; None if it is chunked or not valid."""
    try:
        return transfer.length
    except BadTransfer:
        return None
