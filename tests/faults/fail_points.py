"""Faults at fail-points, that is between two particular statements of the program.

The fail-points are enabled in a process of the second host that is started for the fault: an additional receiver, or a
worker that replaces another.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from typing import Final

from receiver.fault_injection.faults import POINTS, VARIABLE
from receiver.simulator.feed import FeedSimulator
from tests.faults.site import Host, Installation

# Seconds to wait for a process to reach its fail-point. An earlier fault may keep it from doing so.
_REACH_TIMEOUT: Final = 30.0
# Seconds: longer than a request may take, and than a lease.
_DELAY: Final = 6.0
_RECEIVERS: Final = tuple(name for name in POINTS if name.startswith(("request.", "ledger.", "query.", "inline.")))
_WORKERS: Final = tuple(name for name in POINTS if name.startswith(("lane.", "delivery.", "handler.")))
_ACTIONS: Final = ("kill", "kill", "raise", "cut", f"delay:{_DELAY:g}")
# These kinds pass every fail-point of a receiver.
_KINDS: Final = ("Results.New", "Inventory.Update", "PatientSearch.Query")
_MESSAGES: Final = 7


def receiver_at_fail_point(site: Installation, dice: random.Random) -> None:
    """A second receiver with an action at a fail-point: kill, raise, cut or delay."""
    # Not on the first pass: if each new process died there, the repeats of a message would never get past it.
    setting = f"{dice.choice(_RECEIVERS)}={dice.choice(_ACTIONS)}#{dice.randint(2, 4)}"
    before = site.second.log.stat().st_size
    with site.second.receiving(**{VARIABLE: setting}) as url:
        redox = site.target("lab", url).redox()
        with FeedSimulator(
            redox, name="second-receiver", time_scale=0.02, deadline=200, ledger=site.sent["lab"]
        ) as feed:
            give_up_at = time.monotonic() + _REACH_TIMEOUT
            for number in range(100):
                sent = feed.deliver(redox.body(_KINDS[number % len(_KINDS)], seed=dice.randrange(1 << 40)))
                if sent.answer.accepted:
                    feed.duplicate(sent)
                if (number >= _MESSAGES and _count([site.second], after=before)) or time.monotonic() > give_up_at:
                    break


def worker_at_fail_point(site: Installation, dice: random.Random) -> None:
    """A delivery worker with an action at a fail-point: kill, raise, cut or delay."""
    setting = f"{dice.choice(_WORKERS)}={dice.choice(_ACTIONS)}@0.3"
    before = site.second.log.stat().st_size
    site.second.end(site.second.workers[-1])
    worker = site.second.work(**{VARIABLE: setting})
    wanted = dice.randint(1, 4)
    give_up_at = time.monotonic() + _REACH_TIMEOUT
    while _count([site.second], after=before) < wanted and time.monotonic() < give_up_at:
        if worker.poll() is not None:
            site.second.workers.remove(worker)
            worker = site.second.work(**{VARIABLE: setting})
        time.sleep(0.1)
    site.second.end(worker)
    site.second.work()


def triggered(hosts: Iterable[Host]) -> int:
    """Return how often a fail-point has triggered its action on these hosts."""
    return _count(hosts, after=0)


def _count(hosts: Iterable[Host], *, after: int) -> int:
    return sum(len(host.log_lines("failpoint.triggered", after=after)) for host in hosts)
