from __future__ import annotations

from sqlalchemy import Engine

from receiver.storage.accept.ledger import MessageLedger
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import Door, body, handler
from tests.storage.hand import LANE, Hand, arrive


def test_list_what_waits(door: Door, ledger: MessageLedger, run: Commands) -> None:
    """The list shows lanes in which deliveries wait, by state."""
    assert "no lane has work" in run("lanes", "list").stdout
    door.enable()
    arrive(door, ledger, body())
    (found,) = run.json("lanes", "list", "--handler", "register", "--state", "ready")
    assert (found["lane"], found["pending"]) == (LANE, 1)
    assert run.json("lanes", "list", "--state", "held") == []


def test_release_lets_a_held_one_go_on(door: Door, ledger: MessageLedger, run: Commands, engine: Engine) -> None:
    """A held lane is released once, and the audit has actor and reason. For another lane the error shows its state."""
    door.enable(handler(on_failure="hold"))
    arrive(door, ledger, body())
    number = Hand(engine).take().fail("pending", lane_state="held")
    assert run.json("lanes", "release", LANE, "--reason", "fixed") == {"lane": LANE, "state": "ready"}
    assert Hand(engine).take().begin() == number
    message, *_ = run.json("audit", "list", "--action", "lane.release", "--notes", "--reason", "a review")
    assert (message["actor"], message["subject"], message["note"]) == (ACTOR, f"lanes:{LANE}", "fixed")
    assert "not held" in run.fails("lanes", "release", LANE)
    assert "lanes list" in run.fails("lanes", "release", "nowhere")
