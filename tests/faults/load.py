"""A load that runs until it is stopped: feeds, a client with a wrong token, and queries. All attempts are logged.

Every patient has the same family name. Tests look for that name where it must not be.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from typing import Final

from receiver.samples import sample
from receiver.simulator.attempt_log import Attempt
from receiver.simulator.fake_redox import FakeRedox
from receiver.simulator.feed import FeedSimulator
from tests.faults.site import Installation

FAMILY: Final = "Quibbleworthington"
STRANGER: Final = "a-wrong-token-that-no-destination-has"
KINDS: Final = (
    "PatientAdmin.Arrival",
    "PatientAdmin.Transfer",
    "PatientAdmin.Discharge",
    "Results.New",
    "FHIR.PatientAdminUpdated",
    "Scheduling.New",
    "Inventory.Update",
)
# Kinds whose handler fails, each in its own way. Most of them block their lane for seconds, so they are rare.
FAILING: Final = ("Flowsheet.New", "Order.Cancel", "Notes.New", "Media.Delete", "Device.New")
_FAILING_SHARE: Final = 0.03
PATIENTS: Final = 6
# Seconds between two messages of a feed: work for two cores, but not more than they can do.
_PACE: Final = 0.1


class Load:
    """Several feeds to each destination, from `start` to `stop`. The seed determines the messages.

    `feed_timeout`: seconds after which a feed gives up a message that is not accepted; Redox never does.
    """

    def __init__(
        self, site: Installation, destinations: tuple[str, ...], *, feeds: int, seed: int, feed_timeout: float = 200.0
    ) -> None:
        self._site = site
        self._feed_timeout = feed_timeout
        self._stopping = threading.Event()
        self.given_up: list[str] = []  # violations: feeds that gave up a message
        self.unauthenticated: list[str] = []  # messages that only the client with the wrong token has sent
        self._threads = [
            *(
                self._thread(self._feed, destination, f"{destination}-{number}", seed * 1_000 + number)
                for destination in destinations
                for number in range(feeds)
            ),
            self._thread(self._send_with_wrong_token, destinations[0], "wrong-token", seed * 1_000 + 900),
            self._thread(self._send_queries, destinations[0], "queries", seed * 1_000 + 901),
        ]

    def _thread(
        self, run: Callable[[str, str, random.Random], None], destination: str, name: str, seed: int
    ) -> threading.Thread:
        return threading.Thread(target=run, args=(destination, name, random.Random(seed)), name=name, daemon=True)

    def start(self) -> None:
        """Start to send."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Send no new messages. Messages that were sent are repeated until they are accepted."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(self._feed_timeout + 100)

    def _body(self, redox: FakeRedox, kind: str, dice: random.Random) -> bytes:
        return redox.body(
            kind, seed=dice.randrange(1 << 40), patient=sample.person(dice.randrange(PATIENTS), family=FAMILY)
        )

    def _feed(self, destination: str, name: str, dice: random.Random) -> None:
        redox = self._site.target(destination).redox()
        with FeedSimulator(
            redox, name=name, time_scale=0.02, deadline=self._feed_timeout, ledger=self._site.sent[destination]
        ) as feed:
            while not self._stopping.wait(_PACE):
                kind = dice.choice(FAILING if dice.random() < _FAILING_SHARE else KINDS)
                sent = feed.deliver(self._body(redox, kind, dice), lose_answers=int(dice.random() < 0.02))
                if sent.answer.accepted and dice.random() < 0.05:
                    sent = feed.duplicate(sent)
                if not sent.answer.accepted:
                    self.given_up.append(f"{name}: {sent.message} was not accepted within {self._feed_timeout:g} s")
                    return

    def _send_queries(self, destination: str, name: str, dice: random.Random) -> None:
        redox = self._site.target(destination).redox()
        with FeedSimulator(redox, name=name, ledger=self._site.sent[destination]) as feed:
            while not self._stopping.wait(5 * _PACE):
                feed.deliver(self._body(redox, "PatientSearch.Query", dice))

    def _send_with_wrong_token(self, destination: str, name: str, dice: random.Random) -> None:
        target = self._site.target(destination)
        redox = target.redox(token=STRANGER)
        while not self._stopping.wait(3 * _PACE):
            body = self._body(redox, "PatientAdmin.Arrival", dice)
            answer = redox.send(body)
            self.unauthenticated.append(name_of(body))
            self._site.sent[destination].record(
                Attempt(
                    feed=name,
                    message=self.unauthenticated[-1],
                    number=1,
                    kind="PatientAdmin.Arrival",
                    attempt_id=None,
                    sha256=sha256(body).hexdigest(),
                    size=len(body),
                    sent_at=answer.sent_at,
                    status=answer.status,
                    answered_at=None if answer.status is None else time.monotonic(),
                    error=answer.error,
                )
            )


def name_of(body: bytes) -> str:
    """Return the id of the message in the attempt log."""
    return str(json.loads(body)["Meta"]["Logs"][0]["ID"])
