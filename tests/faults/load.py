"""A load that does not end by itself: feeds, strangers and queries, each in the sender's ledger.

Everybody in it bears one family name, which may then be found nowhere.
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
from tests.faults.site import Site

FAMILY: Final = "Quibbleworthington"
STRANGER: Final = "what-a-stranger-presents-instead-of-it"
KINDS: Final = (
    "PatientAdmin.Arrival",
    "PatientAdmin.Transfer",
    "PatientAdmin.Discharge",
    "Results.New",
    "FHIR.PatientAdminUpdated",
    "Scheduling.New",
    "Inventory.Update",
)
# Each goes wrong in its own way, and most hold up their lane for seconds: now and then is enough.
FAILING: Final = ("Flowsheet.New", "Order.Cancel", "Notes.New", "Media.Delete", "Device.New")
_FAILING_SHARE: Final = 0.03
PATIENTS: Final = 6
# Seconds between two messages of a feed: enough work for two cores, and not too much.
_PACE: Final = 0.1


class Load:
    """So many feeds to each destination, until `stop`. Which message comes next follows from the seed.

    `patience`: seconds after which a feed that stands still gives up; Redox never does.
    """

    def __init__(
        self, site: Site, destinations: tuple[str, ...], *, feeds: int, seed: int, patience: float = 200.0
    ) -> None:
        self._site = site
        self._patience = patience
        self._stopping = threading.Event()
        self.given_up: list[str] = []  # feeds that stood still for too long
        self.strange: list[str] = []  # messages that only strangers have sent
        self._threads = [
            *(
                self._thread(self._feed, destination, f"{destination}-{number}", seed * 1_000 + number)
                for destination in destinations
                for number in range(feeds)
            ),
            *(
                self._thread(each, destinations[0], each.__name__, seed * 1_000 + 900 + number)
                for number, each in enumerate((self._strangers, self._queries))
            ),
        ]

    def _thread(
        self, run: Callable[[str, str, random.Random], None], destination: str, name: str, seed: int
    ) -> threading.Thread:
        return threading.Thread(target=run, args=(destination, name, random.Random(seed)), name=name, daemon=True)

    def start(self) -> None:
        """Begin to send."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Send nothing new; what has been sent is sent again until it is accepted."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(self._patience + 100)

    def _body(self, redox: FakeRedox, kind: str, dice: random.Random) -> bytes:
        return redox.body(
            kind, seed=dice.randrange(1 << 40), patient=sample.person(dice.randrange(PATIENTS), family=FAMILY)
        )

    def _feed(self, destination: str, name: str, dice: random.Random) -> None:
        redox = self._site.target(destination).redox()
        with FeedSimulator(
            redox, name=name, time_scale=0.02, deadline=self._patience, ledger=self._site.sent[destination]
        ) as feed:
            while not self._stopping.wait(_PACE):
                kind = dice.choice(FAILING if dice.random() < _FAILING_SHARE else KINDS)
                sent = feed.deliver(self._body(redox, kind, dice), lose_answers=int(dice.random() < 0.02))
                if sent.answer.accepted and dice.random() < 0.05:
                    sent = feed.duplicate(sent)
                if not sent.answer.accepted:
                    self.given_up.append(f"{name} stood still: {sent.message}")
                    return

    def _queries(self, destination: str, name: str, dice: random.Random) -> None:
        redox = self._site.target(destination).redox()
        with FeedSimulator(redox, name=name, ledger=self._site.sent[destination]) as feed:
            while not self._stopping.wait(5 * _PACE):
                feed.deliver(self._body(redox, "PatientSearch.Query", dice))

    def _strangers(self, destination: str, name: str, dice: random.Random) -> None:
        target = self._site.target(destination)
        redox = target.redox(token=STRANGER)
        while not self._stopping.wait(3 * _PACE):
            body = self._body(redox, "PatientAdmin.Arrival", dice)
            answer = redox.send(body)
            self.strange.append(name_of(body))
            self._site.sent[destination].record(
                Attempt(
                    feed=name,
                    message=self.strange[-1],
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
    """The message's name in the ledger."""
    return str(json.loads(body)["Meta"]["Logs"][0]["ID"])
