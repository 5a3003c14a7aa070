"""Faults that a plugin or a message brings: a plugin that cannot be imported, a message that always fails."""

from __future__ import annotations

import random
from typing import Final

from receiver.simulator.feed import FeedSimulator
from tests.faults import effects
from tests.faults.load import name_of
from tests.faults.site import Installation
from tests.support.waiting import until

# Seconds to wait until a worker has reported its plugins: an earlier fault may delay it.
_REPORT_TIMEOUT: Final = 60.0
_MISSING: Final = "tests.faults.nowhere"
_REPORTED: Final = """
SELECT FROM workers w JOIN handler_problems p ON p.process = w.name
WHERE w.pid = :pid AND p.detail LIKE :named AND 'book' = ANY (w.handlers)"""


def plugin_broken(site: Installation, dice: random.Random) -> None:
    """A worker with a plugin that cannot be imported: it reports the plugin, and runs the other handlers."""
    worker = site.second.work(RECEIVER_HANDLERS=f"{effects.__name__},{_MISSING}")
    until(lambda: site.rows(_REPORTED, pid=worker.pid, named=f"%{_MISSING}%"), seconds=_REPORT_TIMEOUT)
    site.second.end(worker)


def lane_held(site: Installation, dice: random.Random) -> None:
    """A message whose handler always fails holds its lane, until an operator skips it."""
    redox = site.target("ward").redox()
    failing = redox.body(effects.POISON, seed=dice.randrange(1 << 40))
    after = redox.body("Vaccination.Administration", seed=dice.randrange(1 << 40))
    with FeedSimulator(redox, name="held-lane", time_scale=0.02, deadline=200, ledger=site.sent["ward"]) as feed:
        for body in (failing, after):
            feed.deliver(body)
    until(lambda: site.rows("SELECT FROM lanes WHERE handler = 'strict' AND state = 'held'"), seconds=120)
    begun = {line["message"] for line in site.journal() if line["handler"] == "strict"}
    assert name_of(after) not in begun, "the message after a held delivery has run"
    [head] = site.rows(
        "SELECT d.id FROM deliveries d JOIN messages m ON m.id = d.message_id "
        "WHERE d.handler = 'strict' AND m.log_id = :name",
        name=name_of(failing),
    )
    site.first.run("deliveries", "skip", str(head["id"]), "--reason", "entered by hand")
