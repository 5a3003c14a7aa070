"""The benchmark's machinery works: what it sends is taken, counted and judged. No test judges a speed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest

from receiver.testing.signer import Signer
from tests.bench import load, report
from tests.bench.bodies import HOLE, SIZES, Ids, of_size, signatures
from tests.bench.measure import WRONG, Bench, Plan, Results, Sample
from tests.bench.targets import Site, Target
from tests.postgres import session_cluster

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not on this machine")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site(session_cluster()) as made:
        yield made


@needs_wrk
def test_a_plan_is_run(site: Site) -> None:
    told: list[str] = []
    plan = Plan(targets=["orm"], parts=["closed", "open"], cases=[("4 KB", 4)], rates=[50], rounds=1, seconds=1,
                messages=0, largest=())
    results = Bench(site, plan, told.append).run()
    assert not results.faults
    closed, opened = results.samples
    assert (closed.part, closed.load, opened.part, opened.load) == ("closed", 4, "open", 50)
    assert all(each.rate > 0 and each.p50 > 0 and each.server_cpu > 0 for each in results.samples)
    target = site.of("orm")
    assert target.inbox is not None
    # The table was emptied before the open loop, which waits for every answer: a hundred, each with an id of its own.
    # Some of the four that were cut off before may have come after that.
    assert 100 <= target.inbox.value("SELECT count(DISTINCT log_id) FROM inbox") <= 104
    assert "plain Flask + SQLAlchemy ORM" in report.tables(results)
    assert json.dumps(results.as_json(), allow_nan=False)


@needs_wrk
def test_what_is_refused_is_not_counted_as_taken(site: Site) -> None:
    target = site.of("orm")
    assert isinstance(target, Target)
    target.empty()
    stranger = replace(target, headers=WRONG)
    closed = stranger.closed_loop(of_size("2 KB"), connections=2, seconds=1)
    opened = load.open_loop(stranger.url, of_size("2 KB"), stranger.headers, rate=20, seconds=0.5, connections=2)
    assert closed.wrong == closed.answered > 0
    assert opened.wrong == opened.answered == 10
    assert target.inbox is not None
    assert target.inbox.value("SELECT count(*) FROM inbox") == 0


def test_requests_to_nobody_are_broken() -> None:
    with pytest.raises(ConnectionRefusedError):
        load.open_loop("http://127.0.0.1:9/redox", of_size("2 KB"), {}, rate=20, seconds=0.1, connections=1)
    assert load.once("http://127.0.0.1:9/redox", of_size("2 KB"), {}) is None


@pytest.mark.parametrize("name", SIZES)
def test_each_body_is_a_message_with_its_id(name: str) -> None:
    body = of_size(name)
    message = json.loads(body.with_id("an-id"))
    assert message["Meta"]["Logs"][0]["ID"] == "an-id"
    size, unit = name.split()
    assert len(body.template) == pytest.approx(int(size) * (1_000_000 if unit == "MB" else 1_000), rel=0.15)


def test_signatures_are_of_the_ids_that_are_sent() -> None:
    ids = Ids()
    body = of_size("2 KB")
    _, second = signatures(body, b"secret", ids, 2)
    assert len(HOLE) == len(f"{ids.prefix}{2:012x}")
    headers = Signer(secret=b"secret").headers(body.with_id(f"{ids.prefix}{2:012x}"), now=0)
    assert list(headers.values()) == [second]


def sample(target: str, rate: float, *, part: str = "closed", load: int = 16, number: int = 1) -> Sample:
    return Sample(part=part, target=target, body="4 KB", load=load, round=number, rate=rate, p50=0.001, p99=0.003,
                  server_cpu=0.0005, database_cpu=0.0001)


def test_goals_are_judged_by_the_median_of_the_rounds() -> None:
    results = Results(samples=[
        *(sample("flask", 1_000, number=number) for number in (1, 2, 3)),
        *(sample("flask-door", rate, number=number) for number, rate in ((1, 100), (2, 500), (3, 900))),
        *(sample("orm", 300, number=number) for number in (1, 2, 3)),
        sample("flask-door", 300, part="open", load=300)])
    judged = {goal.says: (goal.reached and round(goal.reached, 2), goal.verdict) for goal in report.goals(results)}
    assert judged["Flask door to Flask that does nothing, 4 KB, 16 connections"] == (0.5, "met")
    assert judged["Flask door to plain ORM, 4 KB, 16 connections"] == (1.67, "missed")
    assert judged["Flask door to Express + pg, 4 KB, 16 connections"] == (None, "not measured")
    assert judged["300 a second, p99 over p50, Flask door"] == (2.0, "met")
    shown = report.markdown(results, {"machine": "2 cores", "Python": "3"})
    assert "| **this receiver, Flask door** | – | 500 | – |" in shown
    assert "3 rounds" in shown
