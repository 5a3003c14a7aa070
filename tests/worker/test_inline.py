"""Inline handlers: queries and after_handling, in the receiver's own handler processes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from structlog.testing import capture_logs

from receiver.database.engine import open_engine
from receiver.errors import NotFound, Unavailable
from receiver.pipeline import Admitted, Receipt
from receiver.worker import inline
from receiver.worker.inline import InlineHandlers, ResponderFailed
from tests.support.processes import gone
from tests.support.tcp_proxy import connect_to, tcp_proxy
from tests.support.waiting import until
from tests.worker.plugins.scripted import PATIENT
from tests.worker.world import World


@pytest.fixture(scope="module")
def responders(shared: World) -> Iterator[InlineHandlers]:
    """Two handler processes, as one receiver has them."""
    made = InlineHandlers(shared.settings(responders=2), shared.url, shared.engine)
    made.start()
    yield made
    made.stop()


def record(world: World, do: str, place: str, **more: Any) -> tuple[Admitted, Receipt]:
    """Record a message, as the endpoint does."""
    with world.ledger() as ledger:
        admitted = world.admitted(do, destination=place, **more)
        return admitted, ledger.accept(admitted).result(30)


def ask(world: World, responders: InlineHandlers, place: str, do: str = "nothing", **more: Any) -> Any:
    """Return the answer to a query."""
    timeout = more.pop("timeout", None)
    admitted, receipt = record(world, do, place, kind="PatientSearch.Query", **more)
    assert admitted.message is not None
    [responder] = [each for each in admitted.destination.subscriptions if each.role == "responder"]
    if timeout is not None:
        responder = replace(responder, timeout=timeout)
    return json.loads(responders.answer(admitted.message, responder, admitted.destination, receipt))


def handle(world: World, responders: InlineHandlers, place: str, receipt: Receipt) -> bool:
    """Run the deliveries that must succeed before the reply, as a request does."""
    return responders.run_inline(world.destination(place), receipt)


# --- queries


def test_an_answer(shared: World, responders: InlineHandlers, place: str) -> None:
    """The responder's result is the answer, as JSON."""
    shared.enable("search", place)

    assert ask(shared, responders, place) == {
        "Meta": {"DataModel": "PatientSearch", "EventType": "Response"},
        "Echo": shared.count,
        "Much": "",
    }


@pytest.mark.parametrize(
    "more",
    [
        {"do": "raise"},
        {"do": "give_up"},
        {"do": "retry_later:1"},
        {"do": "exit"},
        {"do": "segfault"},
        {"do": "commit"},
        {"Answer": "none"},
        {"Size": inline.LARGEST_ANSWER},
    ],
)
def test_no_answer(shared: World, responders: InlineHandlers, place: str, more: dict[str, Any]) -> None:
    """A responder that raises, crashes, or returns too much or not a dict has failed; the next query is answered."""
    shared.enable("search", place)
    with pytest.raises(ResponderFailed) as caught:
        ask(shared, responders, place, **more)

    assert PATIENT not in str(caught.value)
    assert ask(shared, responders, place)["Echo"] == shared.count


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"Answer": "none"}, "a responder returns a dict, not None"),
        ({"Answer": "text"}, "a responder returns a dict, not str"),
        ({"Answer": "model"}, "a responder returns a dict, not Book: return model.model_dump("),
        ({"Answer": "empty"}, 'an answer has a "Meta"'),
        ({"Answer": "object"}, "the answer cannot be written as JSON"),
        ({"Size": inline.LARGEST_ANSWER}, f"at most {inline.LARGEST_ANSWER} can be sent"),
    ],
)
def test_an_invalid_answer(
    shared: World, responders: InlineHandlers, place: str, more: dict[str, Any], sentence: str
) -> None:
    """An invalid answer is explained in the log and among the problems of handlers, until the responder answers
    again.
    """
    shared.enable("search", place)
    with capture_logs() as lines, pytest.raises(ResponderFailed):
        ask(shared, responders, place, **more)
    [line] = [each for each in lines if each["event"] == "responder.failed"]
    assert line["error_class"] == "InvalidAnswer"
    assert sentence in line["error"]

    def problems() -> list[dict[str, Any]]:
        return shared.rows("SELECT kind, detail FROM handler_problems WHERE destination = :place", place=place)

    [problem] = until(problems, "it is reported")
    assert problem["kind"] == "responder_failed"
    assert sentence in problem["detail"]
    ask(shared, responders, place)
    until(lambda: not problems(), "it is over")


def test_out_of_time(shared: World, responders: InlineHandlers, place: str) -> None:
    """A responder that exceeds its timeout is killed, and the query times out."""
    shared.enable("search", place)
    ask(shared, responders, place)
    with capture_logs() as lines, pytest.raises(TimeoutError):
        ask(shared, responders, place, do="loop", timeout=1.0)
    [late] = [each for each in lines if each["event"] == "responder.late"]
    assert late["frames"][-1].startswith("tests.worker.plugins.scripted:")
    assert late["frames"][-1].endswith(":_loop")

    [begun] = [line for line in shared.journal("begin") if line["n"] == shared.count]
    assert gone(begun["pid"])
    assert ask(shared, responders, place)["Echo"] == shared.count


def test_no_responder(shared: World, place: str) -> None:
    """A responder that is paused, or not installed on this host, is not found."""
    shared.enable("search", place)
    elsewhere = InlineHandlers(shared.settings(handlers=()), shared.url, shared.engine)
    with pytest.raises(NotFound):
        ask(shared, elsewhere, place)
    shared.registration.pause_handler("search", datetime.now(UTC), destination=place, reason="operator")
    with pytest.raises(NotFound, match="handlers resume"):
        ask(shared, elsewhere, place)
    elsewhere.stop()


def test_its_work_is_committed(shared: World, responders: InlineHandlers, place: str) -> None:
    """A responder's work on context.connection is committed with its answer, and rolled back when it fails."""
    shared.execute("CREATE TABLE IF NOT EXISTS effects (n integer, attempt integer)")
    shared.enable("search", place)
    answered = ask(shared, responders, place, do="insert")["Echo"]
    with pytest.raises(ResponderFailed):
        ask(shared, responders, place, do="insert_raise")

    assert shared.rows("SELECT n FROM effects WHERE n >= :n", n=answered) == [{"n": answered}]


def test_one_destination_does_not_take_all(
    shared: World, responders: InlineHandlers, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the slow responder of one destination has a process and more of its queries wait, another destination uses
    the other process. A query that waits too long is told that no process is free.
    """
    shared.enable("search", place)
    shared.add_destination(f"{place}x")
    shared.enable("search", f"{place}x")
    ask(shared, responders, place)
    before = shared.count
    flag = shared.flag(f"go-{place}")
    with ThreadPoolExecutor(2) as requests:
        slow = requests.submit(ask, shared, responders, place, f"wait_for:{flag}", timeout=60.0)
        until(lambda: [line for line in shared.journal("begin") if line["n"] > before], "it runs")
        monkeypatch.setattr(inline, "_START_TIMEOUT", 1.0)
        waiting: Future[Any] = requests.submit(ask, shared, responders, place, timeout=1.0)
        assert ask(shared, responders, f"{place}x", timeout=60.0)["Meta"]["EventType"] == "Response"
        with pytest.raises(Unavailable):
            waiting.result(60)
        flag.touch()
        assert slow.result(60)["Meta"]["EventType"] == "Response"


# --- after_handling


def test_handled(shared: World, responders: InlineHandlers, place: str) -> None:
    """With acknowledge="after_handling" the delivery has run before the reply, its attempt is recorded, and no worker
    is notified.
    """
    shared.enable("within", place)
    sent = shared.hand("nothing", destination=place)
    [receipt] = sent.receipts
    assert receipt.inline == (sent.deliveries()[0]["id"],)

    assert handle(shared, responders, place, receipt)
    assert (sent.states(), sent.outcomes(), sent.ran()) == (["succeeded"], ["succeeded"], [1])
    assert handle(shared, responders, place, receipt)  # a repeat, for which nothing is left to do
    assert sent.ran() == [1]
    assert shared.rows("SELECT owner FROM lanes WHERE lane = :lane", lane=sent.lane) == [{"owner": None}]


@pytest.mark.parametrize(
    ("deed", "outcome"),
    [
        ("raise", "failed"),
        ("give_up", "gave_up"),
        ("retry_later:3600", "retry_later"),
        ("exit", "crashed"),
        ("loop", "timed_out"),
    ],
)
def test_not_handled_yet(shared: World, responders: InlineHandlers, place: str, deed: str, outcome: str) -> None:
    """A failed inline delivery is never dead and never waits: each repetition by Redox runs it again until it
    succeeds.
    """
    shared.enable("within", place)
    sent = shared.hand(deed, destination=place)
    for _ in range(3 if outcome != "timed_out" else 1):
        assert not handle(shared, responders, place, sent.receipts[0])

    assert set(sent.outcomes()) == {outcome}
    assert sent.states() == ["pending"]
    shared.execute("UPDATE deliveries SET state = 'skipped' WHERE lane = :lane", lane=sent.lane)
    assert handle(shared, responders, place, sent.receipts[0])


def test_what_came_before_runs_first(shared: World, responders: InlineHandlers, place: str) -> None:
    """Earlier pending deliveries of the lane run first; while one of them fails, the new one does not run."""
    shared.enable("within", place)
    flag = shared.flag(f"up-{place}")
    sent = shared.hand(f"retry_later:0:{flag}", "nothing", "nothing", destination=place)
    assert not handle(shared, responders, place, sent.receipts[1])
    assert sent.ran() == [1]

    flag.touch()
    assert handle(shared, responders, place, sent.receipts[1])
    assert sent.ran() == [1, 1, 2]
    assert sent.states() == ["succeeded", "succeeded", "pending"]


def test_two_requests_for_one_lane(shared: World, responders: InlineHandlers, place: str) -> None:
    """Of two requests for one message, one runs it, and both are answered afterwards."""
    shared.enable("within", place)
    sent = shared.hand("sleep:0.5", destination=place)
    with ThreadPoolExecutor(2) as requests:
        both = [requests.submit(handle, shared, responders, place, sent.receipts[0]) for _ in range(2)]
        assert [each.result(60) for each in both] == [True, True]
    assert sent.ran() == [1]


def test_no_worker_takes_it(shared: World, responders: InlineHandlers, place: str) -> None:
    """Neither a worker nor a sweep takes a lane with only inline deliveries."""
    from receiver.storage.queue import wake_ups
    from receiver.worker.handler_process.bootstrap import init_message
    from receiver.worker.handler_process.supervisor import HandlerSlot

    shared.enable("within", place)
    sent = shared.hand("nothing", destination=place)
    slot = HandlerSlot(lambda: init_message(shared.settings(), shared.url))
    try:
        assert shared.stay(slot, sent.lane) is None
    finally:
        slot.close()
    with shared.engine.connect() as connection:
        assert sent.lane not in wake_ups.due(connection, ["within"], after="", limit=1000)[0]
    assert handle(shared, responders, place, sent.receipts[0])


def test_no_longer_within_the_request(shared: World, responders: InlineHandlers, place: str) -> None:
    """If the handler is no longer after_handling, or no longer enabled, workers run what is pending, and Redox gets a
    success.
    """
    shared.enable("within", place)
    sent = shared.hand("raise", "nothing", destination=place)
    assert not handle(shared, responders, place, sent.receipts[0])
    shared.registration.disable_handler(place, "within", datetime.now(UTC))

    assert handle(shared, responders, place, sent.receipts[0])
    assert handle(shared, responders, place, sent.receipts[1])
    assert [(each["inline"], each["state"]) for each in sent.deliveries()] == [(False, "pending")] * 2


def test_workers_first(shared: World, responders: InlineHandlers, place: str) -> None:
    """The deliveries of the lane that workers have to run come first; until then Redox gets an error."""
    shared.enable("within", place)
    sent = shared.hand("nothing", "nothing", destination=place)
    first = sent.deliveries()[0]["id"]
    shared.execute("UPDATE deliveries SET inline = false WHERE id = :id", id=first)
    assert not handle(shared, responders, place, sent.receipts[1])

    shared.execute("UPDATE deliveries SET state = 'succeeded' WHERE id = :id", id=first)
    assert handle(shared, responders, place, sent.receipts[1])


def test_paused(shared: World, responders: InlineHandlers, place: str) -> None:
    """A paused handler runs nothing within requests either; Redox gets an error."""
    shared.enable("within", place)
    sent = shared.hand("nothing", destination=place)
    shared.registration.pause_handler("within", datetime.now(UTC), destination=place, reason="operator")
    assert not handle(shared, responders, place, sent.receipts[0])
    assert sent.ran() == []


def test_a_busy_lane(shared: World, responders: InlineHandlers, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request does not wait long for a lane that another process holds."""
    monkeypatch.setattr(inline, "_BUSY_LANE_TIMEOUT", 0.5)
    shared.enable("within", place)
    sent = shared.hand("nothing", destination=place)
    shared.execute(
        "INSERT INTO lanes (lane, handler, destination_id, owner, epoch, lease_until) "
        "SELECT lane, handler, destination_id, 'another', 1, now() + interval '1 hour' FROM deliveries "
        "WHERE lane = :lane",
        lane=sent.lane,
    )
    assert not handle(shared, responders, place, sent.receipts[0])
    assert sent.ran() == []


def test_a_lease_that_is_kept(shared: World, place: str) -> None:
    """A handler that runs for longer than a lease keeps its lane."""
    shared.enable("within", place)
    sent = shared.hand("sleep:2", destination=place)
    brief = InlineHandlers(shared.settings(responders=1).model_copy(update={"lease": 0.9}), shared.url, shared.engine)
    brief.start()
    try:
        assert handle(shared, brief, place, sent.receipts[0])
    finally:
        brief.stop()
    assert sent.outcomes() == ["succeeded"]


def test_a_lane_that_could_not_be_given_back(shared: World, place: str) -> None:
    """If the database was unavailable at the end of a run, the lane is released soon after it is back, before the lease
    ends.
    """
    shared.enable("within", place)
    sent = shared.hand("sleep:1", destination=place)
    away = threading.Event()

    def connect() -> socket.socket:
        if away.is_set():
            raise ConnectionRefusedError
        return connect_to(shared.url)

    with tcp_proxy(connect) as proxy, ThreadPoolExecutor(1) as threads:
        engine = open_engine(proxy.url(shared.url))
        made = InlineHandlers(shared.settings(responders=1, lease=600.0), shared.url, engine)
        made.start()
        request = threads.submit(handle, shared, made, place, sent.receipts[0])
        try:
            sent.until_begun()
            away.set()
            proxy.cut()
            with pytest.raises(Unavailable):
                request.result(60)
            assert sent.outcomes() == ["succeeded"]
            away.clear()
            until(
                lambda: shared.rows("SELECT FROM lanes WHERE lane = :lane AND owner IS NULL", lane=sent.lane),
                "the lane is given back",
            )
        finally:
            made.stop()
            engine.dispose()


def test_without_a_database(shared: World, responders: InlineHandlers, place: str) -> None:
    """If the database does not answer, the request is unavailable."""
    shared.enable("within", place)
    sent = shared.hand("nothing", destination=place)
    away = InlineHandlers(shared.settings(), shared.url, open_engine("postgresql://nobody@127.0.0.1:1/nothing"))
    with pytest.raises(Unavailable):
        handle(shared, away, place, sent.receipts[0])


def test_stopped(shared: World, place: str) -> None:
    """When the receiver stops, inline runs end with its processes and run again when Redox repeats the message; no new
    request is served.
    """
    shared.enable("within", place)
    sent = shared.hand("sleep", destination=place)
    made = InlineHandlers(shared.settings(responders=1), shared.url, shared.engine)
    made.start()
    answers: list[bool] = []
    request = threading.Thread(target=lambda: answers.append(handle(shared, made, place, sent.receipts[0])))
    request.start()
    begun = sent.until_begun()
    made.stop()
    request.join(30)

    assert (answers, gone(begun["pid"])) == ([False], True)
    assert [(each["state"], each["attempts"]) for each in sent.deliveries()] == [("pending", 0)]
    assert not handle(shared, made, place, sent.receipts[0])
    shared.enable("search", place)
    with pytest.raises(Unavailable):
        ask(shared, made, place)


def test_a_late_process_is_not_the_responder_s_fault(
    shared: World, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query that times out before its process has started has timed out, and the process is kept."""
    shared.enable("search", place)
    made = InlineHandlers(shared.settings(responders=1), shared.url, shared.engine)
    try:
        monkeypatch.setattr(inline, "_START_TIMEOUT", 0.0)
        with pytest.raises(TimeoutError):
            ask(shared, made, place, timeout=0.001)
        assert ask(shared, made, place, timeout=60.0)["Echo"] == shared.count
    finally:
        made.stop()
