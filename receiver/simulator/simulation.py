"""A simulation: sends by a plan with several feeds, queries, duplicates and faults, and judges each response.

`redox-receiver simulate` is its command. Must not print. Must not inspect the receiver: it judges only the responses.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from receiver.errors import Unreadable
from receiver.protocol.message import QUERIES
from receiver.protocol.reading import read
from receiver.simulator.attacks import AttackTarget, attack_cases
from receiver.simulator.attempt_log import AttemptLog
from receiver.simulator.fake_redox import HandshakeResult
from receiver.simulator.feed import FeedSimulator
from receiver.simulator.http_connection import HttpReply

# After this many notifications of a feed, one is sent again, as an at-least-once sender may do.
DUPLICATE_EVERY: Final = 5
# With faults enabled: after this many messages, the response is lost and Redox tries again.
LOSE_EVERY: Final = 3

# The possible outcomes, in the order of the summary.
OUTCOMES: Final = ("handshake", "accepted", "accepted again", "answered", "no responder", "misbehaviour met", "wrong")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationPlan:
    """What to send.

    `kinds`: `count` messages of each, with consecutive seeds from `seed`. `bodies`: each is sent unchanged, once.
    `rate`: messages per second of all feeds together. `timeout`: seconds without progress until a feed is given up;
    Redox never gives up. `test`: the value of Meta.Test. `unknown_source`: see `attack_cases`.
    """

    kinds: Sequence[str] = ()
    bodies: Sequence[bytes] = field(default=(), repr=False)
    count: int = 1
    feeds: int = 4
    rate: float | None = None
    time_scale: float = 1.0
    timeout: float = 60.0
    seed: int
    test: bool = True
    misbehave: bool = False
    unknown_source: int = 403


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedResult:
    """The result of one item.

    `outcome`: one of OUTCOMES. `wrong`: the error, if any. `seconds`: the duration of the last attempt. `attempts`:
    more than one if the first was rejected or lost.
    """

    outcome: str
    what: str
    seconds: float
    attempts: int = 1
    wrong: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    kind: str
    make: Callable[[], bytes]


class Simulation:
    """One run of a plan. `stop` may be called from any thread."""

    def __init__(self, target: AttackTarget, plan: SimulationPlan) -> None:
        self.ledger: Final = AttemptLog()
        self._target, self._plan = target, plan
        self._on_result: Callable[[SimulatedResult], None] = lambda _: None
        self._queues, self._queries = self._make_queues()
        self._attacks = attack_cases(unknown_source=plan.unknown_source) if plan.misbehave else ()
        self._results: list[SimulatedResult] = []
        self._feeds: list[FeedSimulator] = []
        self._lock = threading.RLock()  # `on_result` may call `stop`
        self._stopped = threading.Event()
        self._next_turn = time.monotonic()

    @property
    def total(self) -> int:
        """Return the number of results if no feed stops."""
        notifications = sum(len(queue) + len(queue) // DUPLICATE_EVERY for queue in self._queues)
        return 2 + notifications + len(self._queries) + len(self._attacks)

    def run(self, on_result: Callable[[SimulatedResult], None] = lambda _: None) -> list[SimulatedResult]:
        """Send everything and return the results. `on_result` is called for each one, from several threads.

        A failed handshake ends the run, because no other request would succeed.
        """
        self._on_result = on_result
        redox = self._target.redox()
        by_post = self._handshake("by POST", redox.handshake_post())
        by_get = self._handshake("by GET", redox.handshake_get())
        if not (by_post and by_get):
            return self._results
        jobs: list[Callable[[], None]] = [
            *(partial(self._feed, f"feed-{number}", queue) for number, queue in enumerate(self._queues, 1)),
            self._ask,
            self._misbehave,
        ]
        with ThreadPoolExecutor(max_workers=len(jobs)) as threads:
            try:
                for running in [threads.submit(job) for job in jobs]:
                    running.result()
            except BaseException:
                self.stop()
                raise
        return self._results

    def refused(self) -> dict[str, int]:
        """Return how often attempts were repeated, by status or `no answer`, the most frequent first."""
        last = {attempt.message: attempt for attempt in self.ledger.attempts}
        found = Counter(
            "no answer" if attempt.status is None else str(attempt.status)
            for attempt in self.ledger.attempts
            if not attempt.accepted and attempt.number < last[attempt.message].number
        )
        return dict(found.most_common())

    def stop(self) -> None:
        """Stop sending."""
        with self._lock:
            self._stopped.set()
            for feed in self._feeds:
                feed.stop()

    # Items to send

    def _make_queues(self) -> tuple[list[list[_Item]], list[_Item]]:
        """Return the queues of the feeds (each Data Model is in one of them), and the queries, which do not wait in a
        queue.
        """
        plan = self._plan
        items = [
            _Item(kind=kind, make=partial(self._sample, kind, plan.seed + turn))
            for turn in range(plan.count)
            for kind in plan.kinds
        ]
        items += [_Item(kind=_kind(body), make=partial(bytes, body)) for body in plan.bodies]
        notifications = [item for item in items if item.kind not in QUERIES]
        models = list(dict.fromkeys(_model(item.kind) for item in notifications))
        queues: list[list[_Item]] = [[] for _ in range(min(plan.feeds, len(models)))]
        for item in notifications:
            queues[models.index(_model(item.kind)) % plan.feeds].append(item)
        return queues, [item for item in items if item.kind in QUERIES]

    def _sample(self, kind: str, seed: int) -> bytes:
        return self._target.redox().body(kind, seed=seed, test=self._plan.test)

    # Sending

    def _handshake(self, how: str, handshake: HandshakeResult) -> bool:
        answer = handshake.answer
        wrong = (
            None
            if handshake.passed_as_before
            else _unexpected(answer)
            if answer.status != 200
            else ("responded 200, but the body is not the challenge as text/plain")
        )
        self._add_result("handshake", how, answer, wrong=wrong)
        return wrong is None

    def _feed(self, name: str, queue: Sequence[_Item]) -> None:
        plan = self._plan
        with FeedSimulator(
            self._target.redox(), name=name, time_scale=plan.time_scale, deadline=plan.timeout, ledger=self.ledger
        ) as feed:
            with self._lock:
                self._feeds.append(feed)
            for number, item in enumerate(queue, 1):
                if not self._wait_for_rate():
                    return
                lost = plan.misbehave and number % LOSE_EVERY == 0
                sent = feed.deliver(item.make(), lose_answers=int(lost))
                if self._stopped.is_set():
                    return
                if not sent.answer.accepted:
                    behind = len(queue) - number
                    self._add_result(
                        "accepted",
                        item.kind,
                        sent.answer,
                        attempts=sent.attempts,
                        wrong=(f"{_unexpected(sent.answer)}; {name} is paused with {behind} more messages"),
                    )
                    return
                self._add_accepted("accepted", item.kind, sent.answer, sent.attempts)
                if number % DUPLICATE_EVERY == 0:
                    again = feed.duplicate(sent)
                    self._add_accepted("accepted again", item.kind, again.answer, again.attempts)

    def _ask(self) -> None:
        with FeedSimulator(self._target.redox(), name="queries", ledger=self.ledger) as feed:
            for item in self._queries:
                if not self._wait_for_rate():
                    return
                answer = feed.deliver(item.make()).answer
                outcome, wrong = _judge(item.kind, answer)
                self._add_result(outcome, item.kind, answer, wrong=wrong)

    def _misbehave(self) -> None:
        for number, attack in enumerate(self._attacks):
            if not self._wait_for_rate():
                return
            # Seeds far from those of the feeds, so that these messages are not duplicates.
            answer = attack.send(self._target, self._plan.seed + 1_000_000 + number)
            self._add_result("misbehaviour met", attack.name, answer, wrong=attack.check(answer))

    def _wait_for_rate(self) -> bool:
        """Wait for the next send that the rate allows. Returns False if the run was stopped."""
        if self._plan.rate is None:
            return not self._stopped.is_set()
        with self._lock:
            turn = max(self._next_turn, time.monotonic())
            self._next_turn = turn + 1 / self._plan.rate
        return not self._stopped.wait(turn - time.monotonic())

    # Checks

    def _add_accepted(self, outcome: str, kind: str, answer: HttpReply, attempts: int) -> None:
        wrong = None if answer.status == 200 else _unexpected(answer)
        self._add_result(outcome, kind, answer, attempts=attempts, wrong=wrong)

    def _add_result(self, outcome: str, what: str, answer: HttpReply, *, wrong: str | None, attempts: int = 1) -> None:
        result = SimulatedResult(
            outcome=outcome if wrong is None else "wrong",
            what=what,
            seconds=answer.seconds,
            attempts=attempts,
            wrong=wrong,
        )
        with self._lock:
            self._results.append(result)
            self._on_result(result)


def _unexpected(answer: HttpReply) -> str:
    return f"responded {answer.status}, expected 200" if answer.status is not None else f"no answer ({answer.error})"


def _judge(kind: str, answer: HttpReply) -> tuple[str, str | None]:
    """Return (outcome, error) for the response to a query: its Response, or 501 in Redox's format if there is none."""
    meta = _meta(answer)
    if answer.status == 501 and meta.get("Errors"):
        return "no responder", None
    if answer.status is None or not 200 <= answer.status < 300:
        no_errors = answer.status is not None and not meta.get("Errors")
        return "wrong", _unexpected(answer) + (", and without Meta.Errors" if no_errors else "")
    if meta.get("Errors"):
        return "wrong", f"responded {answer.status} with Meta.Errors"
    wanted = (_model(kind), QUERIES[kind])
    found = tuple(str(meta.get(name)).replace(" ", "") for name in ("DataModel", "EventType"))
    return "answered", None if found == wanted else f"responded {'.'.join(found)[:80]!a}, expected {'.'.join(wanted)}"


def _meta(answer: HttpReply) -> dict[str, Any]:
    try:
        meta = answer.json()["Meta"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _kind(body: bytes) -> str:
    try:
        return read(body).kind
    except Unreadable:
        return "unreadable"


def _model(kind: str) -> str:
    return kind.partition(".")[0]
