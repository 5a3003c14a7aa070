"""The outbox and its worker: real handler processes, real workers, and the fake API over real sockets."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from receiver.fault_injection.api_faults import ApiFault
from receiver.outbound.outbox import Caller, Outbox
from receiver.simulator.api import FakeRedoxApi
from receiver.simulator.api_exchange import Received
from receiver.storage.queue.outbox import MAX_UNANSWERED
from receiver.storage.registry.api_keys import ApiEndpoint, ApiKeys, OAuthKeySpec
from receiver.worker import discovery
from tests.outbound.conftest import KEY, PRIVATE, jwks_of
from tests.support.waiting import until
from tests.worker.plugins.speaking import note
from tests.worker.world import World

PLUGIN = "tests.worker.plugins.speaking"
PEM = PRIVATE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.fixture
def api() -> Iterator[FakeRedoxApi]:
    with FakeRedoxApi() as running:
        running.register_oauth(KEY.client_id, jwks_of(KEY))
        running.respond("PatientSearch.Query", lambda asked: {"Patient": {"Demographics": {"LastName": "Canary"}}})
        yield running


@pytest.fixture
def speaking(world: World, api: FakeRedoxApi) -> World:
    """The world, whose destination `lab` replies with a key that the fake API knows."""
    ApiKeys(world.engine, world.keyring, actor="tester@test").add_api_key(
        "ours",
        ApiEndpoint(environment="staging", base_url=api.base_url, source_id="source-1"),
        OAuthKeySpec(client_id=KEY.client_id, private_key=PEM, kid=KEY.kid),
        datetime.now(UTC),
    )
    world.registration.set_destination("lab", datetime.now(UTC), {"reply_with": "ours"})
    for name in ("reply", "ask"):
        world.registration.enable_handler("lab", discovery.load_handler(name, [PLUGIN]).spec, datetime.now(UTC))
    return world


def start(world: World) -> subprocess.Popen[bytes]:
    return world.start_worker(RECEIVER_HANDLERS=PLUGIN)


def outbox(world: World) -> Outbox:
    return Outbox(world.engine, world.keyring, caller=Caller(name="tester@test"))


def requests(world: World) -> list[dict[str, Any]]:
    return world.rows("SELECT * FROM outbound_requests ORDER BY id")


def until_requests(world: World, *states: str) -> None:
    until(lambda: [each["state"] for each in requests(world)] == list(states), f"requests {states}")


def numbers(received: list[Received]) -> list[int]:
    return [each.json()["N"] for each in received]


def test_a_handler_answers_a_message(speaking: World, api: FakeRedoxApi) -> None:
    """A request that a handler puts into the outbox is sent after its success, with the destination's key, linked to
    the message that it answers.
    """
    [receipt] = speaking.send("nothing")
    start(speaking)
    until_requests(speaking, "sent")
    [request] = requests(speaking)

    assert (str(request["message_uuid"]), request["created_by"]) == (receipt.uuid, "handler:reply")
    assert (request["api_key"], request["kind"]) == ("ours", "Notes.New")
    assert api.processed[0]["Meta"]["Source"] == {"ID": "source-1"}
    message = speaking.rows(
        "SELECT outcome, destination, message_uuid FROM audit_events WHERE action = 'outbound.send' ORDER BY id"
    )
    assert message == [
        {"outcome": outcome, "destination": "lab", "message_uuid": request["message_uuid"]}
        for outcome in ("begun", "sent")
    ]


def test_what_a_failed_run_kept_is_not_sent(speaking: World, api: FakeRedoxApi) -> None:
    """The requests of a failed run are rolled back; those of the successful run are sent once."""
    speaking.send("fail-once", "give-up", "nothing")
    start(speaking)
    speaking.until_states("succeeded", "dead", "succeeded")
    until_requests(speaking, "sent", "sent")

    assert numbers(api.received("/endpoint")) == [1, 3]


def test_a_call_at_once_is_on_record(speaking: World, api: FakeRedoxApi) -> None:
    """A handler that calls Redox directly gets the answer. The call is recorded with the message, its bodies sealed."""
    [receipt] = speaking.send("nothing", kind="Order.New")
    start(speaking)
    until(lambda: len(api.processed) == 2, "both calls")
    until_requests(speaking, "sent", "sent")
    asked, kept = requests(speaking)

    assert api.processed[1]["Found"] == {"Demographics": {"LastName": "Canary"}}
    assert (asked["call"], asked["lane"], asked["created_by"]) == ("query", None, "handler:ask")
    assert {str(each["message_uuid"]) for each in (asked, kept)} == {receipt.uuid}
    assert b"Canary" not in asked["answer"]
    message = speaking.rows(
        "SELECT action, outcome, actor FROM audit_events WHERE action LIKE 'outbound.q%' ORDER BY id"
    )
    assert message == [
        {"action": "outbound.query", "outcome": outcome, "actor": "handler:ask"} for outcome in ("begun", "sent")
    ]
    log = speaking.log_path.read_text()
    assert "Canary" not in log
    assert "PRIVATE" not in log


def test_a_destination_without_a_key_says_so(speaking: World) -> None:
    """The delivery fails with an error that names the command to run."""
    speaking.registration.set_destination("lab", datetime.now(UTC), {"reply_with": None})
    speaking.send("nothing")
    start(speaking)
    until(lambda: speaking.deliveries()[0]["error_class"], "a failed attempt")

    assert speaking.deliveries()[0]["error_class"] == "ConfigurationError"
    assert requests(speaking) == []


def test_a_worker_that_is_killed_before_it_could_record(speaking: World, api: FakeRedoxApi) -> None:
    """If a worker is killed between Redox's answer and its record, another worker sends the same bytes again, then the
    next requests in order.
    """
    arrived, release = threading.Event(), threading.Event()

    def answer_late(_asked: dict[str, Any]) -> dict[str, Any]:
        arrived.set()
        release.wait(60)
        return {"Patient": None}

    api.respond("Organization.Query", answer_late)
    asked = note(1, "destination-1")
    asked["Meta"] |= {"DataModel": "Organization", "EventType": "Query"}
    outbox(speaking).query(asked)
    outbox(speaking).send(note(2, "destination-1"))
    first = start(speaking)
    assert arrived.wait(60)
    os.kill(first.pid, signal.SIGKILL)
    first.wait(30)
    release.set()
    assert [each["state"] for each in requests(speaking)] == ["pending", "pending"]
    start(speaking)
    until_requests(speaking, "sent", "sent")
    received = api.received("/endpoint")

    assert numbers(received) == [1, 1, 2]
    assert received[0].body == received[1].body
    assert [(each["attempts"], each["unanswered"]) for each in requests(speaking)] == [(2, 1), (1, 0)]


def test_dead_after_so_many_attempts(speaking: World, api: FakeRedoxApi) -> None:
    """A request whose answers are lost is dead after the last attempt, and the lane continues."""
    for number in (1, 2):
        outbox(speaking).send(note(number, "destination-1"))
    speaking.execute("UPDATE outbound_requests SET unanswered = :most WHERE id = 1", most=MAX_UNANSWERED - 1)
    api.fail("/endpoint", ApiFault.DROP_AFTER)
    start(speaking)
    until_requests(speaking, "dead", "sent")

    assert numbers(api.received("/endpoint")) == [1, 2]


def test_order_is_kept_for_each_destination(speaking: World, api: FakeRedoxApi) -> None:
    """If one of two workers is killed, every request still arrives, in order at each destination."""
    kept = {f"destination-{to}": list(range(to, 45, 3)) for to in range(3)}
    for number in range(45):
        outbox(speaking).send(note(number, f"destination-{number % 3}"))
    workers = [start(speaking) for _ in range(2)]
    until(lambda: len(api.processed) > 5, "some are sent")
    os.kill(workers[0].pid, signal.SIGKILL)
    until(lambda: {each["state"] for each in requests(speaking)} == {"sent"}, "all are sent")

    arrived: dict[str, list[int]] = {}
    for each in api.processed:
        arrived.setdefault(each["Meta"]["Destinations"][0]["ID"], []).append(each["N"])
    assert {to: list(dict.fromkeys(numbers)) for to, numbers in arrived.items()} == kept
    assert all(numbers == sorted(numbers) for numbers in arrived.values())


def test_a_worker_that_is_told_to_stop_lets_a_call_end(speaking: World, api: FakeRedoxApi) -> None:
    """After SIGTERM during a call, its end is recorded, nothing more is sent, and the lane is released."""
    arrived, release = threading.Event(), threading.Event()
    asked = note(1, "destination-1")
    asked["Meta"] |= {"DataModel": "Organization", "EventType": "Query"}

    def answer_late(_asked: dict[str, Any]) -> dict[str, Any]:
        arrived.set()
        release.wait(60)
        return {"Patient": None}

    api.respond("Organization.Query", answer_late)
    outbox(speaking).query(asked)
    outbox(speaking).send(note(2, "destination-1"))
    worker = start(speaking)
    assert arrived.wait(60)
    worker.terminate()
    until(lambda: "worker.stopping" in speaking.log_path.read_text(), "it stops")
    release.set()
    assert worker.wait(60) == 0

    assert [each["state"] for each in requests(speaking)] == ["sent", "pending"]
    assert speaking.rows("SELECT owner FROM lanes WHERE lane LIKE '@outbox%'") == [{"owner": None}]


def test_lanes_of_the_outbox_are_not_the_handlers(speaking: World, api: FakeRedoxApi) -> None:
    """A Redox that does not answer delays no handler."""
    silent = threading.Event()

    def answer_late(_asked: dict[str, Any]) -> dict[str, Any]:
        silent.wait(60)
        return {}

    api.respond("Organization.Query", answer_late)
    for number in range(6):
        asked = note(number, f"destination-{number}")
        asked["Meta"] |= {"DataModel": "Organization", "EventType": "Query"}
        outbox(speaking).query(asked)
    start(speaking)
    until(lambda: len(api.received("/endpoint")) >= 4, "calls that hang")
    speaking.send(*["nothing"] * 5)
    speaking.until_states(*["succeeded"] * 5)
    silent.set()
    until(lambda: {each["state"] for each in requests(speaking)} == {"sent"}, "all are sent in the end")
