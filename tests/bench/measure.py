"""The parts of the benchmark: closed loops, open loops, wrong tokens, the receiver's memory, and whether it stored
what it answered 200. All targets are measured in turn, round after round, so that other work of the machine affects
all of them equally.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Final, TypeVar

import psutil

from tests.bench import load, machine
from tests.bench.bodies import Body, entries, media, of_size
from tests.bench.load import Sent
from tests.bench.targets import OURS, Measured, Missing, PgBench, Server, Target, Workbench, await_answer

MB: Final = 1_000_000
LARGEST: Final = 40 * MB
_TRIES: Final = 5
WRONG: Final = {"verification-token": "somebody-who-guesses-it"}
Tell = Callable[[str], None]
Case = TypeVar("Case")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One measurement. Times in seconds. CPU of the server's processes and of PostgreSQL for each answer.

    `part` is closed, open or refused. `load`: connections, or requests a second in the open loop.
    """

    part: str
    target: str
    body: str
    load: int
    round: int
    rate: float
    p50: float
    p99: float
    server_cpu: float
    database_cpu: float

    @property
    def cpu(self) -> float:
        """CPU of the server's processes and of PostgreSQL."""
        return self.server_cpu + self.database_cpu


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which targets are measured, with which loads, and for how long.

    `messages`: the number after which memory is measured again. `largest`: the number of concurrent largest bodies.
    """

    targets: Sequence[str]
    parts: Sequence[str]
    cases: Sequence[tuple[str, int]]  # body, connections
    rates: Sequence[int]
    rounds: int
    seconds: float
    messages: int
    largest: Sequence[int]


@dataclass(kw_only=True)
class Results:
    """All results. `faults` make the run invalid, `missing` only incomplete."""

    samples: list[Sample] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def of(self, part: str, target: str, body: str, load: int) -> list[Sample]:
        """Return the samples of one case, in the order of the rounds."""
        return [
            each
            for each in self.samples
            if (each.part, each.target, each.body, each.load) == (part, target, body, load)
        ]

    def as_json(self) -> dict[str, Any]:
        """Return one document, with null for what was not measured."""
        samples = [
            {name: None if value != value else value for name, value in asdict(each).items()} for each in self.samples
        ]
        return asdict(self) | {"samples": samples}


class Bench:
    """Runs a plan on a workbench."""

    def __init__(self, workbench: Workbench, plan: Plan, tell: Tell) -> None:
        self._site = workbench
        self._plan = plan
        self._tell = tell
        self.results = Results()
        # Messages to this receiver: those that were answered 200, and those whose answer was not awaited.
        self._answered = self._cut = 0

    def run(self) -> Results:
        """Run all parts."""
        if "memory" in self._plan.parts:  # first, while no other process shares pages with ours
            self._memory()
        self._present = self._at_work()
        parts = {"closed": self._closed, "refused": self._refused, "open": self._open}
        for name, part in parts.items():
            if name in self._plan.parts:
                part()
        if self._answered:
            self._proof()
        return self.results

    def _at_work(self) -> dict[str, Measured]:
        found = {}
        for name in self._plan.targets:
            self._tell(f"starting {name}")
            try:
                found[name] = self._site.of(name)
            except Missing as exc:
                self.results.missing.append(f"{name}: {exc}")
                continue
            self._answered += name in OURS  # one message showed that it serves
        return found

    # --- loops

    def _closed(self) -> None:
        for number, (size, connections) in self._rounds(self._plan.cases):
            body = of_size(size)
            for name, target in self._present.items():
                if isinstance(target, PgBench) and connections != PgBench.CLIENTS:
                    continue
                self._sample(
                    "closed",
                    name,
                    body,
                    connections,
                    number,
                    partial(target.closed_loop, body, connections=connections, seconds=self._plan.seconds),
                )

    def _open(self) -> None:
        body = of_size("4 KB")
        for number, rate in self._rounds(self._plan.rates):
            for name, target in self._present.items():
                if isinstance(target, Target) and target.hmac is None:
                    self._sample(
                        "open",
                        name,
                        body,
                        rate,
                        number,
                        partial(
                            load.open_loop, target.url, body, target.headers, rate=rate, seconds=2 * self._plan.seconds
                        ),
                    )

    def _refused(self) -> None:
        body = of_size("4 KB")
        for number, name in self._rounds(["flask", *OURS]):
            target = self._present.get(name)
            if isinstance(target, Target) and target.hmac is None:
                asked = replace(target, headers=WRONG)
                self._sample(
                    "refused",
                    name,
                    body,
                    16,
                    number,
                    partial(asked.closed_loop, body, connections=16, seconds=self._plan.seconds),
                )

    def _rounds(self, cases: Sequence[Case]) -> Iterable[tuple[int, Case]]:
        return ((number, case) for number in range(1, self._plan.rounds + 1) for case in cases)

    def _sample(self, part: str, name: str, body: Body, size: int, number: int, act: Callable[[], Sent]) -> None:
        target = self._present[name]
        target.empty()
        server, database = target.cpu_seconds(), self._site.database_cpu()
        sent = act()
        server, database = target.cpu_seconds() - server, self._site.database_cpu() - database
        case = f"{part} {name}, {body.name}, {size}, round {number}"
        good = sent.answered - sent.wrong
        if part == "refused" and name in OURS:
            good = sent.wrong
        elif name in OURS:
            self._answered += good
            self._cut += sent.cut
        if good != sent.answered or sent.broken:
            self.results.faults.append(
                f"{case}: of {sent.answered} answers {sent.answered - good} were wrong, and {sent.broken} never came"
            )
        elif not good:
            self.results.faults.append(f"{case}: no answer within the measurement, which is too short")
        each = max(1, sent.answered)
        sample = Sample(
            part=part,
            target=name,
            body=body.name,
            load=size,
            round=number,
            rate=sent.rate,
            p50=sent.p50,
            p99=sent.p99,
            server_cpu=server / each,
            database_cpu=database / each,
        )
        self.results.samples.append(sample)
        self._tell(
            f"{case}: {sent.rate:.0f}/s, p50 {sent.p50 * 1e3:.2f} ms, p99 {sent.p99 * 1e3:.2f} ms, CPU "
            f"{sample.server_cpu * 1e6:.0f} + {sample.database_cpu * 1e6:.0f} µs"
        )

    # --- memory and storage of this receiver

    def _memory(self) -> None:
        found = self.results.memory
        with self._site.receiver.serve("memory") as server:
            target = self._site.receiver.target("memory", server)
            await_answer(target)
            self._answered += 1
            found["pss"] = [{"messages": 0, "bytes": _workers_pss(server)}]
            for _ in range(2):
                taken = 0
                while taken < self._plan.messages:
                    sent = target.closed_loop(of_size("4 KB"), connections=16, seconds=max(1, self._plan.seconds))
                    if sent.wrong or sent.broken or not sent.answered:
                        self.results.faults.append(f"memory: {sent.wrong} wrong answers, {sent.broken} never came")
                        return
                    taken += sent.answered
                    self._cut += sent.cut
                self._answered += taken
                found["pss"].append({"messages": found["pss"][-1]["messages"] + taken, "bytes": _workers_pss(server)})
                self._tell(f"memory: {found['pss'][-1]}")
        # The body that compresses worst, and the one that is largest when decoded.
        bodies = [Body(name="40 MB", template=media(LARGEST)), Body(name="40 MB of {}", template=entries(LARGEST))]
        found["largest"] = [self._largest(body, at_once) for body in bodies for at_once in self._plan.largest]

    def _largest(self, body: Body, at_once: int) -> dict[str, Any]:
        """Measure the peak memory of one receiver process that gets several of a largest body at once."""
        with self._site.receiver.serve("largest", receivers="1") as server:
            target = self._site.receiver.target("largest", server)
            await_answer(target)
            before = _workers_pss(server)
            with ThreadPoolExecutor(at_once) as pool:
                tries = list(pool.map(lambda _: _taken(target, body), range(at_once)))
            peak = max(machine.peak(each) for each in _workers(server))
        taken, refused = sum(done for done, _ in tries), sum(count for _, count in tries)
        self._answered += 1 + taken
        self._cut += refused  # was answered 503, but may be stored a moment later
        if taken != at_once:
            self.results.faults.append(f"largest: of {at_once} at once {taken} were taken")
        self._tell(
            f"largest: {body.name}, {at_once} at once, peak {peak / MB:.0f} MB, told {refused} times to come again"
        )
        return {
            "name": body.name,
            "at_once": at_once,
            "body": len(body.template),
            "before": before,
            "peak": peak,
            "refused": refused,
        }

    def _proof(self) -> None:
        """Check that each message that was answered 200 is in the database once, and in the audit."""
        receiver, kept = self._site.receiver, self.results.kept
        self._tell("proving the audit")
        kept |= {"answered": self._answered, "cut": self._cut, "kept": receiver.kept(), "repeats": receiver.repeats()}
        proof = receiver.proof()
        kept |= {"proved": proof.first_bad is None, "rows": proof.rows}
        if not self._answered <= kept["kept"] <= self._answered + self._cut:
            self.results.faults.append(
                f"{kept['kept']} messages are kept, {self._answered} were answered 200, and "
                f"{self._cut} were on their way when a load ended"
            )
        if kept["repeats"]:
            self.results.faults.append(f"{kept['repeats']} messages were taken for repeats")
        if proof.first_bad is not None:
            self.results.faults.append(f"the audit does not hold: {proof.first_bad}")


def _taken(target: Target, body: Body) -> tuple[bool, int]:
    """Send a body until it is accepted, as Redox does. Returns whether it was, and the number of refusals."""
    for refused in range(_TRIES):
        if load.once(target.url, body, target.headers) == 200:
            return True, refused
    return False, _TRIES


def _workers(server: Server) -> list[int]:
    """Return the receiver processes of a gunicorn: its children."""
    return [each.pid for each in psutil.Process(server.process.pid).children()]


def _workers_pss(server: Server) -> int:
    """Return the bytes of the largest of them."""
    return max(machine.pss(each) for each in _workers(server))


def ratio(over: Sequence[Sample], under: Sequence[Sample]) -> float | None:
    """Return the median ratio of the rates, round by round. None if either was not measured."""
    pairs = [one.rate / other.rate for one, other in zip(over, under, strict=False) if other.rate]
    return statistics.median(pairs) if pairs else None
