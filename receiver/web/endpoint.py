"""The endpoint of a destination: a request comes in, its verdict is carried out, a reply goes back.

A coroutine, which an event loop awaits or a thread drives (receiver.web.runtime):

    check the head → read the body as far as it may be → judge → refuse, challenge, or record → reply

| what happens                                                | answer                              |
|-------------------------------------------------------------|-------------------------------------|
| refused by the head                                         | 401, the body unread                |
| longer than the cap; broken off, malformed, or too slow     | 413; 400                            |
| a transfer coding that is not chunked                       | 501                                 |
| refused by the body; a signed query that was seen before    | 400, 401, 403                       |
| handshake                                                   | 200, the challenge as text/plain    |
| recorded                                                    | 200, empty                          |
| recorded, and handled in the request, or not yet            | 200, 503                            |
| query: answered, failed, out of time, nobody's, no room     | 200, 500, 504, 501, 503             |
| not recorded, whatever the cause; anything unexpected       | 503                                 |

Must not know a framework or a server, must not judge (receiver.pipeline does), and must not answer 200 before the
COMMIT. Redox pauses a whole feed at 400 and above, so what is not the sender's fault is a 503, which says that the
message may come again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Final, Protocol

import msgspec
import structlog

from receiver import pipeline
from receiver.errors import BadTransfer, NotFound, Unavailable
from receiver.fault_injection.faults import point
from receiver.pipeline import Admitted, Challenged, HeadAccepted, Receipt, Refused
from receiver.protocol.message import Head, Nonce, ParsedMessage, Reply, error_body
from receiver.protocol.patterns import matches
from receiver.protocol.registry import Destination, Registry, Subscription
from receiver.web.body import BodyMemoryBudget, Reservation, Transfer, discarded, receive
from receiver.web.runtime import ConcurrencyLimiter, Runtime, T

log: Final = structlog.get_logger(__name__)

# The ledger answers within five seconds; should it ever not, the sender is answered all the same.
LEDGER_TIMEOUT: Final = 4.9
# When the sender may come again after a 503. Redox has a schedule of its own; a proxy or another client may ask.
RETRY_AFTER: Final = 5
# Bodies in memory at once, at least this many bytes: a few of the largest and many of the usual ones.
BODIES: Final = 256 * 1024 * 1024
# Larger bodies are judged and sealed one at a time: that takes up to three times as much memory again. And it takes
# some ten milliseconds or more, which nobody else is to wait for.
LARGE: Final = 1024 * 1024

_body_read, _judged, _queued, _recorded = (
    point("request.body_read"),
    point("request.judged"),
    point("request.queued"),
    point("request.recorded"),
)
_query_answered, _query_recorded, _inline_handled = (
    point("query.answered"),
    point("query.recorded"),
    point("inline.handled"),
)

ACCEPTED: Final = Reply(status=200)
# What the sender of a refused request is told: nothing but that. The audit has the reason.
REFUSALS: Final = {
    400: Reply(status=400, body=b"bad request\n"),
    401: Reply(status=401, body=b"unauthorized\n"),
    403: Reply(status=403, body=b"forbidden\n"),
    413: Reply(status=413, body=b"too large\n"),
    501: Reply(status=501, body=b"not implemented\n"),
}
UNAVAILABLE: Final = Reply(status=503, body=b"try again later\n", retry_after=RETRY_AFTER)

# What the asker of a query is told when there is no answer: fixed sentences, for a responder's reason may be anything.
FAILURES: Final = {
    400: "The query could not be read.",
    403: "The query is not allowed.",
    500: "The query failed.",
    501: "Nobody answers this query here.",
    503: "The query cannot be answered now. Try again later.",
    504: "The query was not answered in time.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """How a query ended, for the audit. `body`: length and digest of what is sent, for it may disclose a patient."""

    receipt: Receipt
    head: Head
    destination: Destination
    responder: str | None
    status: int
    length: int
    sha256: bytes


class EndpointLedger(pipeline.Ledger, Protocol):
    """What the endpoint needs of the storage."""

    def answered(self, answered: Answered) -> Future[None]:
        """Write how a query ended in the audit; the future is done after the COMMIT, or raises Unavailable."""

    def first(self, once: Sequence[Nonce]) -> bool:
        """Whether none of it was ever seen; from now on all of it was. Raises Unavailable."""


class Responders(Protocol):
    """What the endpoint needs of the handlers that run inside a request, in processes that end when time is up."""

    def answer(
        self, message: ParsedMessage, responder: Subscription, destination: Destination, receipt: Receipt, /
    ) -> bytes:
        """The answer to a query, as JSON.

        Raises NotFound (nobody has loaded it), Unavailable (no process is free), TimeoutError; anything else is the
        responder's failure.
        """

    def run_inline(self, destination: Destination, receipt: Receipt, /) -> bool:
        """Run the deliveries of `receipt.inline`; whether all have succeeded.

        Raises Unavailable (no process is free) and TimeoutError.
        """


class Endpoint:
    """Serves requests to destinations. Safe in threads, one request each.

    `registry` gives the registry of the moment, None as long as it was never loaded. `max_body` bytes. `concurrency` is
    how many request threads may wait for handlers.
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
        self._responders = responders
        self._max_body = max_body
        self._memory = BodyMemoryBudget(max(BODIES, 4 * max_body))
        self._limiter = ConcurrencyLimiter(concurrency)
        self._one_at_a_time = threading.Lock()

    async def serve(self, head: Head, transfer: Transfer, runtime: Runtime) -> Reply:
        """The reply to a request. Raises nothing of its own."""
        try:
            reply = await self._serve(head, transfer, runtime)
        except Unavailable as exc:
            return self._unavailable(str(exc), head, None)
        except Exception:
            # A fault of ours must not look like the message's, which may come again.
            log.exception("request.failed")
            return self._unavailable("internal_error", head, None)
        # Whatever the reason of a refusal, its connection is kept or closed alike.
        unread = head.method == "GET" or reply.status >= 400
        return replace(reply, close=True) if unread and not discarded(_length(transfer)) else reply

    async def _serve(self, head: Head, transfer: Transfer, runtime: Runtime) -> Reply:
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
                return await self._carry_out(runtime, verdict, body)
        except Unavailable as exc:
            return self._unavailable(str(exc), head, accepted.destination, proved=proved)

    async def _body(self, accepted: HeadAccepted, transfer: Transfer, reservation: Reservation) -> bytes | Refused:
        if accepted.head.method == "GET":
            return b""  # all that is asked is in its head
        try:
            body, length = None, transfer.length
            if length is None or length <= self._max_body:
                limit = self._max_body if accepted.whole else pipeline.UNPROVED_BODY
                body = await receive(transfer, limit=limit, reservation=reservation)
                if body is None and not accepted.whole:
                    return accepted.missing()
            if body is None:
                # A stranger's is told apart: Redox, whose feed pauses at it, has at least a head that could suffice.
                raise BadTransfer("body_too_large" if accepted.whole else "body_too_large_unproved", status_hint=413)
        except BadTransfer as exc:
            return accepted.not_received(exc)
        return body

    async def _carry_out(self, runtime: Runtime, verdict: pipeline.Verdict, body: bytes) -> Reply:
        if isinstance(verdict, Refused):
            return await self._work(runtime, body, partial(self._refuse, verdict))
        if isinstance(verdict, Challenged):
            self._ledger.challenged(verdict)
            return Reply(status=200, body=verdict.challenge.encode("ascii"), media="text/plain; charset=utf-8")
        once = verdict.verified.nonces if verdict.query is not None else ()
        if once and not await runtime.run_in_thread(partial(self._ledger.first, once)):
            return self._refuse(pipeline.replayed(verdict))
        recording = await self._work(runtime, body, partial(self._ledger.accept, verdict, batch=True))
        _queued()
        receipt = await recorded(runtime, recording, flush=self._ledger.flush)
        _recorded()
        if verdict.query is not None:
            return await self._answer(runtime, verdict, verdict.query, receipt)
        if receipt.inline:
            await self._handle(runtime, verdict, receipt)
        return ACCEPTED

    async def _work(self, runtime: Runtime, body: bytes, call: Callable[[], T]) -> T:
        """What `call` makes of the body. A large body is worked on in a thread, one at a time."""
        if len(body) <= LARGE:
            return call()

        def in_turn() -> T:
            with self._one_at_a_time:
                return call()

        return await runtime.run_in_thread(in_turn)

    def _refuse(self, refused: Refused) -> Reply:
        self._ledger.refuse(refused)
        if refused.query is not None:
            return _failure(refused.query, refused.status)
        return REFUSALS[refused.status]

    def _unavailable(self, reason: str, head: Head, destination: Destination | None, *, proved: bool = False) -> Reply:
        log.warning("request.unavailable", reason=reason)
        self._ledger.unavailable(reason, head, destination, proved=proved)
        return replace(UNAVAILABLE, close=True)

    async def _answer(self, runtime: Runtime, admitted: Admitted, query: str, receipt: Receipt) -> Reply:
        """A query that is recorded: its answer leaves after the row that says so has committed."""
        message, destination = admitted.message, admitted.destination
        if message is None:
            return _failure(query, 400)  # kept in quarantine, and audited so
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
            return reply if reply.status != ACCEPTED.status else _failure(query, 503)
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
            # Whatever a responder raises is its failure, and the asker is told.
            status = 500
            log.exception("query.failed", destination=destination.name, uuid=receipt.uuid)
        else:
            return Reply(status=200, body=body, media=_JSON)
        log.warning("query.not_answered", status=status, kind=query, destination=destination.name, uuid=receipt.uuid)
        return _failure(query, status)

    async def _handle(self, runtime: Runtime, admitted: Admitted, receipt: Receipt) -> None:
        """after_handling: Redox keeps the message until it is handled. Raises Unavailable when it is not yet."""
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
        """A call that waits for a handler, in a thread. It holds its slot as long as it runs, whether the request still
        waits or not.

        Raises Unavailable at once when there is no slot.
        """

        def limited() -> T:
            with self._limiter.slot(destination.id):
                return call()

        return await runtime.run_in_thread(limited)


async def recorded(runtime: Runtime, future: Future[T], *, flush: Callable[[], None] | None = None) -> T:
    """What the ledger says, in time; `flush` where it batches. Raises Unavailable."""
    try:
        return await runtime.result(future, LEDGER_TIMEOUT, flush=flush)
    except TimeoutError as exc:
        raise Unavailable("ledger_silent") from exc


def _length(transfer: Transfer) -> int | None:
    """Its length; None where that is not known, or no length."""
    try:
        return transfer.length
    except BadTransfer:
        return None


_JSON: Final = "application/json"


def _failure(query: str, status: int) -> Reply:
    """No answer to a query, said as Redox says it (Redox: `Meta.Errors`)."""
    return Reply(
        status=status,
        body=msgspec.json.encode(error_body(kind=query, text=FAILURES[status])),
        media=_JSON,
        retry_after=RETRY_AFTER if status == UNAVAILABLE.status else None,
    )
