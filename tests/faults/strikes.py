"""Mishaps that strike between two particular statements, and those that a plugin or a message brings.

The fail-points are in processes of the second host that are started for it: a receiver beside the first one, or a
worker in the place of another.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import psycopg
from psycopg import sql

from receiver.fault_injection.faults import POINTS, VARIABLE
from receiver.simulator.feed import FeedSimulator
from tests.faults import effects, outages
from tests.faults.load import name_of
from tests.faults.site import Host, Site
from tests.support.waiting import until

# How long a part is waited for to come to its point: what another mishap has left may keep it from ever getting there.
_PATIENCE: Final = 30.0
# Longer than a request may take, and than a lease.
_DELAY: Final = 6.0
_RECEIVERS: Final = tuple(name for name in POINTS if name.startswith(("door.", "ledger.", "query.", "inline.")))
_WORKERS: Final = tuple(name for name in POINTS if name.startswith(("lane.", "delivery.", "handler.")))
_ACTIONS: Final = ("kill", "kill", "raise", "cut", f"delay:{_DELAY:g}")
# Between them they pass every point of a receiver.
_KINDS: Final = ("Results.New", "Inventory.Update", "PatientSearch.Query")
_MESSAGES: Final = 7


def receiver_struck(site: Site, dice: random.Random) -> None:
    """A receiver beside the first struck at a fail-point: killed, cut off its database, late, or failing."""
    # Not the first time: what comes again would never get past a point at which each new process dies.
    order = f"{dice.choice(_RECEIVERS)}={dice.choice(_ACTIONS)}#{dice.randint(2, 4)}"
    before = site.second.log.stat().st_size
    with site.second.receiving(**{VARIABLE: order}) as url:
        redox = site.target("lab", url).redox()
        with FeedSimulator(redox, name="beside", time_scale=0.02, deadline=200, ledger=site.sent["lab"]) as feed:
            given_up = time.monotonic() + _PATIENCE
            for number in range(100):
                sent = feed.deliver(redox.body(_KINDS[number % len(_KINDS)], seed=dice.randrange(1 << 40)))
                if sent.answer.accepted:
                    feed.duplicate(sent)
                if (number >= _MESSAGES and site.second.told("failpoint.triggered", after=before)) or (
                    time.monotonic() > given_up
                ):
                    break


def worker_struck(site: Site, dice: random.Random) -> None:
    """A worker, or a process that runs its handlers, struck at a fail-point: killed, cut off, late, or failing."""
    order = f"{dice.choice(_WORKERS)}={dice.choice(_ACTIONS)}@0.3"
    before = site.second.log.stat().st_size
    site.second.end(site.second.workers[-1])
    armed = site.second.work(**{VARIABLE: order})
    strikes = dice.randint(1, 4)
    given_up = time.monotonic() + _PATIENCE
    while len(site.second.told("failpoint.triggered", after=before)) < strikes and time.monotonic() < given_up:
        if armed.poll() is not None:
            site.second.workers.remove(armed)
            armed = site.second.work(**{VARIABLE: order})
        time.sleep(0.1)
    site.second.end(armed)
    site.second.work()


_DEED: Final = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF random() < 0.3 THEN
        RAISE EXCEPTION 'not now' USING ERRCODE = CASE WHEN random() < 0.5 THEN '40001' ELSE '40P01' END;
    END IF;
    RETURN NULL;
END $$"""
_TABLES: Final = ("messages", "message_keys", "deliveries", "delivery_attempts", "lanes", "audit_events")


def transactions_refused(site: Site, dice: random.Random) -> None:
    """Serialization failures and deadlocks in every third statement, wherever we write."""
    with psycopg.connect(outages.address(site.cluster)) as connection:
        connection.execute(_DEED)
        for table in _TABLES:
            connection.execute(
                sql.SQL(
                    "CREATE TRIGGER refuse AFTER INSERT OR UPDATE ON {} FOR EACH STATEMENT EXECUTE FUNCTION refuse()"
                ).format(sql.Identifier(table))
            )
            connection.commit()  # one table's lock at a time: this is to deadlock with nobody
        time.sleep(dice.uniform(2.0, 4.0))
        for table in _TABLES:
            connection.execute(sql.SQL("DROP TRIGGER refuse ON {}").format(sql.Identifier(table)))
            connection.commit()
        connection.execute("DROP FUNCTION refuse()")


# What a transaction of ours takes first, and what it takes later.
_PAIRS: Final = (("messages", "payloads"), ("deliveries", "delivery_attempts"))


def deadlocked(site: Site, dice: random.Random) -> None:
    """Deadlocks with somebody who takes our tables in the other order, of which PostgreSQL ends ours."""
    ends = time.monotonic() + dice.uniform(4.0, 6.0)
    with psycopg.connect(outages.address(site.cluster)) as connection:
        # Whoever looks for the deadlock first is ended: they do after a second.
        connection.execute("SET deadlock_timeout = '1min'")
        connection.execute("SET lock_timeout = '3s'")
        connection.commit()
        while time.monotonic() < ends:
            first, later = dice.choice(_PAIRS)
            with suppress(psycopg.errors.LockNotAvailable), connection.transaction():
                connection.execute(sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(sql.Identifier(later)))
                if _holds(lambda: _waited_for(connection), ends):
                    connection.execute(sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(sql.Identifier(first)))
            time.sleep(0.1)


def _waited_for(connection: psycopg.Connection) -> bool:
    return connection.execute(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pg_backend_pid() = ANY (pg_blocking_pids(pid)))"
    ).fetchone() == (True,)


def _holds(condition: Callable[[], bool], until_then: float) -> bool:
    while not condition():
        if time.monotonic() > until_then:
            return False
        time.sleep(0.02)
    return True


def plugin_broken(site: Site, dice: random.Random) -> None:
    """A worker started with a plugin that cannot be imported: it names it, and runs the handlers of the others."""
    worker = site.second.work(RECEIVER_HANDLERS=f"{effects.__name__},tests.faults.nowhere")
    until(lambda: site.rows("SELECT FROM handler_problems WHERE detail LIKE '%tests.faults.nowhere%'"), _PATIENCE)
    site.second.end(worker)


def lane_held(site: Site, dice: random.Random) -> None:
    """A poison message at the head of a lane that is held for it, until an operator skips it."""
    redox = site.target("ward").redox()
    poison = redox.body(effects.POISON, seed=dice.randrange(1 << 40))
    after = redox.body("Vaccination.Administration", seed=dice.randrange(1 << 40))
    with FeedSimulator(redox, name="poison", time_scale=0.02, deadline=200, ledger=site.sent["ward"]) as feed:
        for body in (poison, after):
            feed.deliver(body)
    until(lambda: site.rows("SELECT FROM lanes WHERE handler = 'strict' AND state = 'held'"), 120)
    begun = {line["message"] for line in site.journal() if line["handler"] == "strict"}
    assert name_of(after) not in begun, "what comes after a held delivery has run"
    [head] = site.rows(
        "SELECT d.id FROM deliveries d JOIN messages m ON m.id = d.message_id "
        "WHERE d.handler = 'strict' AND m.log_id = :name",
        name=name_of(poison),
    )
    site.first.run("deliveries", "skip", str(head["id"]), "--reason", "entered by hand")


def struck(hosts: Iterable[Host]) -> int:
    """How often a fail-point has struck on these hosts."""
    return sum(len(host.told("failpoint.triggered")) for host in hosts)
