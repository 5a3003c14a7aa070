"""What a feed through nginx notices of large bodies with a wrong token: `python -m tests.faults.proxied`.

nginx is configured by deploy/nginx.conf. Four bodies of 30 MB are on their way at any time, over and over, and refused;
a true feed sends meanwhile, one message after another. How long its answers take is reported, and judged by nobody;
that each of them is 200, and that everything is recorded and handled, is.
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
from tests.faults.report import Section, Tell
from tests.faults.site import Site, site
from tests.web import nginx as proxies
from tests.web.nginx import Nginx

_DESTINATION: Final = "main"
# True messages in each of the three parts.
_MESSAGES: Final = 300
_AT_ONCE: Final = 4
_SIZE: Final = 30 * 1024 * 1024
_COMMAND: Final = "python -m tests.faults.proxied"

_TEXT: Final = """\
nginx stands before the receiver, as `deploy/nginx.conf` has it. While a feed sends through it, one message after
another, {at_once} bodies of 30 MB with a wrong token are on their way at any time; {refused} of them were refused.
Milliseconds of the feed's answers, TLS included:

| meanwhile | messages | p50 | p99 | longest |
|---|--:|--:|--:|--:|
{rows}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What the feed met in one part: the statuses, and the seconds of each answer."""

    name: str
    statuses: Sequence[int | None]
    seconds: Sequence[float]

    def row(self) -> str:
        """Its line of the table."""
        cuts = quantiles(self.seconds, n=100, method="inclusive")
        return (
            f"| {self.name} | {len(self.seconds)} | {1000 * cuts[49]:.1f} | {1000 * cuts[98]:.1f} | "
            f"{1000 * max(self.seconds):.1f} |"
        )

    def violations(self) -> list[str]:
        """Answers that a feed would pause for."""
        return [
            f"{self.name}: {count} true messages were answered {status}"
            for status, count in Counter(self.statuses).items()
            if status != 200
        ]


def _fed(feed: FeedSimulator, redox: FakeRedox, name: str, seeds: Iterator[int], count: int) -> Part:
    answers = [feed.deliver(redox.body("Results.New", seed=next(seeds))).answer for _ in range(count)]
    return Part(name=name, statuses=[each.status for each in answers], seconds=[each.seconds for each in answers])


@contextmanager
def _flood(redox: FakeRedox, statuses: list[int | None]) -> Iterator[None]:
    """So many large bodies at a time while the block runs; what they were answered is added to `statuses`."""
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


def _parts(made: Site, nginx: Nginx, refused: list[int | None], count: int, tell: Tell) -> list[Part]:
    target = made.target(_DESTINATION)

    def redox(token: str) -> FakeRedox:
        return FakeRedox(
            f"https://127.0.0.1:{nginx.port}", _DESTINATION, token, source_id=target.source_id, tls=nginx.tls
        )

    seeds, true = itertools.count(), redox(target.token)
    with FeedSimulator(true, name="through-nginx", attempts=1, ledger=made.sent[_DESTINATION]) as feed:
        parts = [_fed(feed, true, "nothing else", seeds, count)]
        tell(parts[-1].row())
        with _flood(redox(STRANGER), refused):
            parts.append(_fed(feed, true, "four bodies of 30 MB with a wrong token at once", seeds, count))
        tell(parts[-1].row())
        parts.append(_fed(feed, true, "nothing else, right afterwards", seeds, count))
        tell(parts[-1].row())
    return parts


def measure(tell: Tell, *, messages: int = _MESSAGES) -> Section:
    """Send them, `messages` true ones in each part; the section says what came of it."""
    title = "Behind nginx, with large bodies of a stranger's"
    if proxies.found() is None:
        return Section(title=title, command=_COMMAND, text="It was not run.", violations=[proxies.MISSING])
    refused: list[int | None] = []
    with site() as made, TemporaryDirectory() as directory:
        made.first.environment["RECEIVER_TRUSTED_PROXIES"] = proxies.ADDRESS
        made.first.up()
        made.open(_DESTINATION)
        with proxies.proxying(Path(directory), int(made.first.url.rpartition(":")[2])) as nginx:
            parts = _parts(made, nginx, refused, messages, tell)
        wrong = [each for part in parts for each in part.violations()]
        wrong += [f"a stranger's body was answered {status}" for status in refused if status is None or status < 400]
        wrong += made.violations()
    return Section(
        title=title,
        command=_COMMAND,
        violations=wrong,
        text=_TEXT.format(at_once=_AT_ONCE, refused=len(refused), rows="\n".join(part.row() for part in parts)),
    )


def main() -> int:
    """The exit status: 0 when nothing was violated."""
    section = measure(lambda line: print(line, flush=True))
    for each in section.violations:
        print(f"VIOLATED {each}")
    print(section.text)
    return 1 if section.violations else 0


if __name__ == "__main__":
    sys.exit(main())
