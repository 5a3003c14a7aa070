"""A feed through nginx while large bodies with a wrong token arrive: `python -m tests.faults.proxied`.

nginx is configured by deploy/nginx.conf. Four bodies of 30 MB are sent at any time, and refused. Meanwhile a valid feed
sends one message after another. Its response times are reported and have no bound. Each of its messages must be
answered 200, recorded and handled.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import Final

from receiver.simulator.fake_redox import FakeRedox
from receiver.simulator.feed import FeedSimulator
from tests.faults.load import STRANGER
from tests.faults.report import Progress, Section
from tests.faults.site import Installation, site
from tests.web import nginx as proxies
from tests.web.nginx import Nginx

_DESTINATION: Final = "main"
# Valid messages in each of the three phases.
_MESSAGES: Final = 300
_AT_ONCE: Final = 4
_SIZE: Final = 30 * 1024 * 1024
_COMMAND: Final = "python -m tests.faults.proxied"

_TEXT: Final = """\
nginx runs in front of the receiver, configured by `deploy/nginx.conf`. A feed sends one message after another through
it. In the second phase, {at_once} bodies of 30 MB with a wrong token are sent at any time; {refused} of them were
refused. Response times of the feed in milliseconds, with TLS:

| meanwhile | messages | p50 | p99 | longest |
|---|--:|--:|--:|--:|
{rows}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """What the feed received in one phase: the statuses, and the response times in seconds."""

    name: str
    statuses: Sequence[int | None]
    seconds: Sequence[float]

    def row(self) -> str:
        """Return the row of the table."""
        cuts = quantiles(self.seconds, n=100, method="inclusive")
        return (
            f"| {self.name} | {len(self.seconds)} | {1000 * cuts[49]:.1f} | {1000 * cuts[98]:.1f} | "
            f"{1000 * max(self.seconds):.1f} |"
        )

    def violations(self) -> list[str]:
        """Return the responses for which a feed would pause."""
        return [
            f"{self.name}: {count} valid messages were answered {status}"
            for status, count in Counter(self.statuses).items()
            if status != 200
        ]


def _fed(feed: FeedSimulator, redox: FakeRedox, name: str, seeds: Iterator[int], count: int) -> Phase:
    answers = [feed.deliver(redox.body("Results.New", seed=next(seeds))).answer for _ in range(count)]
    return Phase(name=name, statuses=[each.status for each in answers], seconds=[each.seconds for each in answers])


@contextmanager
def _flood(redox: FakeRedox, statuses: list[int | None]) -> Iterator[None]:
    """Send large bodies during the block. Adds the statuses of the responses to `statuses`."""
    over = threading.Event()
    body = _SIZE * b"x"

    def send() -> None:
        while not over.is_set():
            statuses.append(redox.send(body).status)

    threads = [threading.Thread(target=send) for _ in range(_AT_ONCE)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _phases(made: Installation, nginx: Nginx, refused: list[int | None], count: int, progress: Progress) -> list[Phase]:
    target = made.target(_DESTINATION)

    def redox(token: str) -> FakeRedox:
        return FakeRedox(
            f"https://127.0.0.1:{nginx.port}", _DESTINATION, token, source_id=target.source_id, tls=nginx.tls
        )

    seeds, valid = itertools.count(), redox(target.token)
    with FeedSimulator(valid, name="through-nginx", attempts=1, ledger=made.sent[_DESTINATION]) as feed:
        phases = [_fed(feed, valid, "nothing", seeds, count)]
        progress(phases[-1].row())
        with _flood(redox(STRANGER), refused):
            phases.append(_fed(feed, valid, "four bodies of 30 MB with a wrong token", seeds, count))
        progress(phases[-1].row())
        phases.append(_fed(feed, valid, "nothing, right afterwards", seeds, count))
        progress(phases[-1].row())
    return phases


def measure(progress: Progress, *, messages: int = _MESSAGES) -> Section:
    """Run the three phases, with `messages` valid messages in each."""
    title = "Behind nginx, with large bodies of an unauthenticated client"
    if proxies.found() is None:
        return Section(title=title, command=_COMMAND, text="This part did not run.", violations=[proxies.MISSING])
    refused: list[int | None] = []
    with site() as made, TemporaryDirectory() as directory:
        made.first.environment["RECEIVER_TRUSTED_PROXIES"] = proxies.ADDRESS
        made.first.up()
        made.open(_DESTINATION)
        with proxies.proxying(Path(directory), int(made.first.url.rpartition(":")[2])) as nginx:
            phases = _phases(made, nginx, refused, messages, progress)
        violations = [each for phase in phases for each in phase.violations()]
        violations += [
            f"a body with a wrong token was answered {status}" for status in refused if status is None or status < 400
        ]
        violations += made.violations()
    return Section(
        title=title,
        command=_COMMAND,
        violations=violations,
        text=_TEXT.format(at_once=_AT_ONCE, refused=len(refused), rows="\n".join(phase.row() for phase in phases)),
    )


def main() -> int:
    """Run from the command line. Returns the exit status: 0 if there was no violation."""
    section = measure(lambda line: print(line, flush=True))
    for each in section.violations:
        print(f"VIOLATION {each}")
    print(section.text)
    return 1 if section.violations else 0


if __name__ == "__main__":
    sys.exit(main())
