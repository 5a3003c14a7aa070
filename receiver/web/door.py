"""The door: a request comes in, its verdict is carried out, an answer goes back. Knows no framework and no server.

It is a sequence of steps (receiver.web.steps), which a thread of Flask's takes, or the event loop of ASGI.

    screen → read the body as far as it may be → judge → refuse, challenge, or record → answer

| what happens                                                | answer                              |
|-------------------------------------------------------------|-------------------------------------|
| refused by the head                                         | 401, the body unread                |
| longer than the cap; broken off, or malformed               | 413; 400                            |
| refused by the body; a signed query that was seen before    | 400, 401, 403                       |
| handshake                                                   | 200, the challenge as text/plain    |
| recorded                                                    | 200, empty                          |
| recorded, and handled in the request, or not yet            | 200, 503                            |
| query: answered, failed, out of time, nobody's, no room     | 200, 500, 504, 501, 503             |
| not recorded, whatever the cause; anything unexpected       | 503                                 |

May not judge (receiver.pipeline does), and may not answer 200 before the COMMIT. Redox pauses a whole feed at 400 and
above, so what is not the sender's fault is a 503, which says that the message may come again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any, Final, Protocol, cast

import msgspec
import structlog

from receiver import pipeline
from receiver.errors import BadTransfer, NotFound, Unavailable
from receiver.failpoints import point
from receiver.pipeline import Admitted, Challenged, Receipt, Refused
from receiver.protocol.message import Head, Inbound, Message, Once, Reply, error_body
from receiver.protocol.patterns import matches
from receiver.protocol.registry import Destination, Registry, Subscription
from receiver.web.steps import Call, Steps, T, Wait
from receiver.web.transfer import SMALL, Room, Share, receive

log: Final = structlog.get_logger(__name__)

# The ledger answers within five seconds; should it ever not, the sender is answered all the same.
PATIENCE: Final = 4.9
# When the sender may come again after a 503. Redox has a schedule of its own; a proxy or another client may ask.
RETRY_AFTER: Final = 5
# Bodies in memory at once, at least this many bytes: a few of the largest beside many of the usual ones.
BODIES: Final = 256 * 1024 * 1024
# Larger bodies are judged and sealed one at a time: that takes up to three times as much memory again. And it takes
# some ten milliseconds or more, which nobody else is to wait for.
LARGE: Final = 1024 * 1024

_body_read, _judged, _queued, _recorded = (
    point("door.body_read"), point("door.judged"), point("door.queued"), point("door.recorded"))
_query_answered, _query_recorded, _inline_handled = (
    point("query.answered"), point("query.recorded"), point("inline.handled"))

ACCEPTED: Final = Reply(status=200)
# What the sender of a refused request is told: nothing but that. The audit has the reason.
REFUSALS: Final = {
    400: Reply(status=400, body=b"bad request\n"),
    401: Reply(status=401, body=b"unauthorized\n"),
    403: Reply(status=403, body=b"forbidden\n"),
    413: Reply(status=413, body=b"too large\n"),
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


class Recorder(pipeline.Ledger, Protocol):
    """What the door needs of the storage."""

    def answered(self, answered: Answered) -> Future[None]:
        """Write how a query ended in the audit; the future is done after the COMMIT, or raises Unavailable."""

    def first(self, once: Sequence[Once]) -> bool:
        """Whether none of it was ever seen; from now on all of it was. Raises Unavailable."""


class Responders(Protocol):
    """What the door needs of the handlers: those that run inside a request, in processes that end when time is up."""

    def answer(self, message: Message, responder: Subscription, destination: Destination, receipt: Receipt, /) -> bytes:
        """The answer to a query, as JSON.

        Raises NotFound (nobody has loaded it), Unavailable (no process is free), TimeoutError; anything else is the
        responder's failure.
        """

    def run_inline(self, destination: Destination, receipt: Receipt, /) -> bool:
        """Run the deliveries of `receipt.inline`; whether all have succeeded.

        Raises Unavailable (no process is free) and TimeoutError.
        """


class Places:
    """Request threads that may wait for handlers, so that the others are left for feeds. Safe in threads.

    `total` in all; half of them for one destination, so that no destination's slow responder takes every place.
    """

    def __init__(self, total: int) -> None:
        self._total, self._each = total, max(1, total // 2)
        self._taken: Counter[int] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def place(self, destination: Destination) -> Iterator[None]:
        """A place while the block runs. Raises Unavailable at once when there is none."""
        with self._lock:
            if self._taken.total() >= self._total or self._taken[destination.id] >= self._each:
                raise Unavailable("responders_busy")
            self._taken[destination.id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[destination.id] -= 1


class Door:
    """Serves requests to destinations. Safe in threads, one request each.

    `registry` gives the registry of the moment, None as long as it was never loaded. `max_body` bytes. `places` is how
    many of the request threads may wait for handlers.
    """

    def __init__(self, *, registry: Callable[[], Registry | None], ledger: Recorder, responders: Responders,
                 max_body: int, places: int) -> None:
        self.registry: Final = registry
        self._ledger = ledger
        self._responders = responders
        self._max_body = max_body
        self._room = Room(max(BODIES, 4 * max_body))
        self._places = Places(places)
        self._one_at_a_time = threading.Lock()

    def steps(self, head: Head, length: int | None) -> Steps[Reply]:
        """The answer to a request whose body has that length; None: it comes in chunks. Raises nothing."""
        try:
            return (yield from self._serve(head, length))
        except Unavailable as exc:
            return self._unavailable(str(exc), head, None)
        except Exception:
            # A fault of ours must not look like the message's, which may come again.
            log.exception("request.failed")
            return self._unavailable("internal_error", head, None)

    def _serve(self, head: Head, length: int | None) -> Steps[Reply]:
        registry = self.registry()
        if registry is None:
            raise Unavailable("registry_never_loaded")
        screened = pipeline.screen(head, registry, head.received_at)
        if isinstance(screened, Refused):
            return _closing(self._refuse(screened))
        # A small one takes no room, whoever sends it.
        small = length is not None and length <= SMALL
        proved = small or (screened and pipeline.proved(head, registry, head.received_at))
        admitted = False
        try:
            with self._room.share(proved=proved) as share:
                body = yield from self._body(head, length, registry, share, whole=screened)
                if isinstance(body, Refused):
                    return _closing(self._refuse(body))
                _body_read()
                inbound = Inbound(head=head, body=body)
                verdict = yield from self._worked(body, partial(pipeline.judge, inbound, registry, head.received_at))
                if isinstance(verdict, Admitted):
                    admitted = True
                    share.prove()
                _judged()
                reply = yield from self._carry_out(verdict, body)
        except Unavailable as exc:
            return self._unavailable(str(exc), head, registry.destinations.get(head.destination), proved=admitted)
        return _closing(reply) if head.method == "GET" and length != 0 else reply

    def _body(self, head: Head, length: int | None, registry: Registry, share: Share, *,
              whole: bool) -> Steps[bytes | Refused]:
        if head.method == "GET":
            return b""  # all that is asked is in its head
        try:
            body = None
            if length is None or length <= self._max_body:
                limit = self._max_body if whole else pipeline.UNPROVED_BODY
                body = yield from receive(length, limit=limit, share=share)
                if body is None and not whole:
                    return pipeline.unproved(head, registry)
            if body is None:
                # A stranger's is told apart: Redox, whose feed pauses at it, has at least a head that could suffice.
                raise BadTransfer("body_too_large" if whole else "body_too_large_unproved", status_hint=413)
        except BadTransfer as exc:
            return pipeline.transfer_refused(exc, head, registry)
        return body

    def _carry_out(self, verdict: pipeline.Verdict, body: bytes) -> Steps[Reply]:
        if isinstance(verdict, Refused):
            return (yield from self._worked(body, partial(self._refuse, verdict)))
        if isinstance(verdict, Challenged):
            self._ledger.challenged(verdict)
            return Reply(status=200, body=verdict.challenge.encode("ascii"), media="text/plain; charset=utf-8")
        once = verdict.verified.once if verdict.query is not None else ()
        if once and not (yield Call(partial(self._ledger.first, once))):
            return self._refuse(pipeline.replayed(verdict))
        recording = yield from self._worked(body, partial(self._ledger.accept, verdict, gather=True))
        _queued()
        receipt: Receipt = yield from recorded(recording, self._ledger.hasten)
        _recorded()
        if verdict.query is not None:
            return (yield from self._answer(verdict, verdict.query, receipt))
        if receipt.inline:
            yield from self._handle(verdict, receipt)
        return ACCEPTED

    def _worked(self, body: bytes, call: Callable[[], T]) -> Steps[T]:
        """What `call` makes of the body. A large one takes its turn, beside those who serve others meanwhile."""
        if len(body) <= LARGE:
            return call()

        def in_turn() -> T:
            with self._one_at_a_time:
                return call()

        return cast("T", (yield Call(in_turn)))

    def _refuse(self, refused: Refused) -> Reply:
        self._ledger.refuse(refused)
        if refused.query is not None:
            return _failure(refused.query, refused.status)
        return REFUSALS[refused.status]

    def _unavailable(self, reason: str, head: Head, destination: Destination | None, *, proved: bool = False) -> Reply:
        log.warning("request.unavailable", reason=reason)
        self._ledger.unavailable(reason, head, destination, proved=proved)
        return _closing(UNAVAILABLE)

    def _answer(self, admitted: Admitted, query: str, receipt: Receipt) -> Steps[Reply]:
        """A query that is recorded: its answer leaves after the row that says so has committed."""
        message, destination = admitted.message, admitted.destination
        if message is None:
            return _failure(query, 400)  # kept in quarantine, and audited so
        responder = next((each for each in destination.subscriptions
                          if each.role == "responder" and matches(each.patterns, message.kind)), None)
        reply = yield from self._respond(message, query, responder, destination, receipt)
        answered = Answered(receipt=receipt, head=admitted.inbound.head, destination=destination,
                            responder=None if responder is None else responder.handler, status=reply.status,
                            length=len(reply.body), sha256=sha256(reply.body).digest())
        _query_answered()
        try:
            yield from recorded(self._ledger.answered(answered))
        except Unavailable as exc:
            log.warning("query.not_recorded", reason=str(exc), destination=destination.name, uuid=receipt.uuid)
            return reply if reply.status != ACCEPTED.status else _failure(query, 503)
        _query_recorded()
        return reply

    def _respond(self, message: Message, query: str, responder: Subscription | None, destination: Destination,
                 receipt: Receipt) -> Steps[Reply]:
        try:
            if responder is None:
                raise NotFound
            body = yield self._placed(destination, partial(
                self._responders.answer, message, responder, destination, receipt))
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

    def _handle(self, admitted: Admitted, receipt: Receipt) -> Steps[None]:
        """after_handling: Redox keeps the message until it is handled. Raises Unavailable when it is not yet."""
        destination = admitted.destination
        try:
            handled = yield self._placed(destination, partial(self._responders.run_inline, destination, receipt))
        except TimeoutError:
            handled = False
        if not handled:
            raise Unavailable("not_handled_yet")
        _inline_handled()

    def _placed(self, destination: Destination, call: Callable[[], Any]) -> Call:
        """A call that waits for a handler. It holds its place as long as it runs, whether anybody still waits or not.

        Raises Unavailable at once when there is none.
        """
        def placed() -> Any:
            with self._places.place(destination):
                return call()

        return Call(placed)


def recorded(future: Future[Any], *hasten: Callable[[], None]) -> Steps[Any]:
    """What the ledger says, in time; `hasten` where it gathers (see Wait). Raises Unavailable."""
    try:
        return (yield Wait(future, PATIENCE, *hasten))
    except TimeoutError as exc:
        raise Unavailable("ledger_silent") from exc


_JSON: Final = "application/json"


def _failure(query: str, status: int) -> Reply:
    """No answer to a query, said as Redox says it (Redox: `Meta.Errors`)."""
    return Reply(status=status, body=msgspec.json.encode(error_body(kind=query, text=FAILURES[status])), media=_JSON,
                 retry_after=RETRY_AFTER if status == UNAVAILABLE.status else None)


def _closing(reply: Reply) -> Reply:
    """The answer to a request of which something may be unread: what follows it on the connection is no request."""
    return replace(reply, close=True)
