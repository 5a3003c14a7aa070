from __future__ import annotations

import pytest
from sqlalchemy import Engine, text

from receiver.keyring import Keyring
from receiver.storage import schema
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.queue.outcomes import delivery_binding
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import Door, body
from tests.storage.hand import FRAMES, LANE, Hand, arrive

WHY = "register lost the patient, fixed in 1.4.2"


@pytest.fixture
def dead(door: Door, ledger: MessageLedger, engine: Engine) -> list[int]:
    """Two dead deliveries, and a pending one after them."""
    door.enable()
    arrive(door, ledger, *(body(f"log-{each}") for each in range(3)))
    return [Hand(engine).take().fail() for _ in range(2)]


def test_list_by_columns(dead: list[int], run: Commands) -> None:
    """Deliveries are listed newest first, by state, error class and lane."""
    assert [each["id"] for each in run.json("deliveries", "list", "--state", "dead")] == dead[::-1]
    assert len(run.json("deliveries", "list", "--lane", LANE, "--error-class", "KeyError", "--since", "1h")) == 2
    assert run("deliveries", "list", "--limit", "1").stderr.startswith("for more rows, add --before ")


def test_what_runs_is_shown_as_running(dead: list[int], run: Commands, engine: Engine) -> None:
    """The table shows `running`; --json has the state and the fact separately."""
    running = Hand(engine).take().begin()
    found = {each["id"]: each for each in run.json("deliveries", "list")}
    assert (found[running]["state"], found[running]["running"]) == ("pending", True)
    assert "running" in run("deliveries", "list", "--state", "pending").stdout


def test_show_tells_where_it_failed(dead: list[int], run: Commands) -> None:
    """Each attempt is shown with its outcome and the frames, without the text of an error."""
    found = run.json("deliveries", "show", str(dead[0]))
    assert [each["outcome"] for each in found["delivery_attempts"]] == ["failed"]
    assert found["error_frames"] == FRAMES
    printed = run("deliveries", "show", str(dead[0])).stdout
    for shown in ("KeyError", *FRAMES, "hand-1"):
        assert shown in printed
    assert "deliveries list" in run.fails("deliveries", "show", "999")


def test_the_text_of_an_error(dead: list[int], run: Commands, door: Door, keyring: Keyring) -> None:
    """The text of an error is shown for a reason, after its audit row.

    A text that the receiver wrote is shown at once.
    """
    key, sealed = Sealer(keyring).seal("payload", b"no bed for Zoltana", delivery_binding(dead[0]))
    with door.engine.begin() as connection:
        connection.execute(
            schema.deliveries.update()
            .where(schema.deliveries.c.id == dead[0])
            .values(error_key=key, error_sealed=sealed, error_shown="set PLUGIN_REGISTER_URL")
        )
    shown = run("deliveries", "show", str(dead[0])).stdout
    assert "PLUGIN_REGISTER_URL" in shown
    assert "Zoltana" not in shown
    assert "--reason" in run.fails("deliveries", "show", str(dead[0]), "--error", status=2)
    found = run.json("deliveries", "show", str(dead[0]), "--error", "--reason", WHY)
    assert found["error_text"] == "no bed for Zoltana"
    [row] = run.json("audit", "list", "--action", "delivery.disclose", "--notes", "--reason", "review")
    assert (row["actor"], row["note"], row["subject"]) == (ACTOR, WHY, f"deliveries:{dead[0]}")
    assert "no error text" in run("deliveries", "show", str(dead[1]), "--error", "--reason", WHY).stderr
    assert len(run.json("audit", "list", "--action", "delivery.disclose")) == 1


def test_retry_tells_what_it_did(dead: list[int], run: Commands, engine: Engine) -> None:
    """A dry run reports what the retry then does, once, in the operator's name."""
    hand = Hand(engine).take()
    hand.succeed()
    hand.leave()
    arguments = ("deliveries", "retry", "--handler", "register", "--error-class", "KeyError", "--reason", WHY)
    assert run(*arguments, "--dry-run").stdout == (
        "would be retried: 2 deliveries in 1 lane\nnewer messages that these lanes have already handled: 1\n"
    )
    assert run.json(*arguments) == {"dry_run": False, "done": dead, "left": [], "made": 0, "lanes": [LANE], "newer": 1}
    assert run.json(*arguments)["done"] == []
    rows = run.json("audit", "list", "--action", "delivery.retry", "--notes", "--reason", "a review")
    assert [(each["actor"], each["note"], each["subject"]) for each in rows] == [
        (ACTOR, WHY, f"deliveries:{number}") for number in dead[::-1]
    ]


def test_skip_by_id(dead: list[int], run: Commands) -> None:
    """A delivery is skipped by id; the second time it is left unchanged, and reported."""
    assert run.json("deliveries", "skip", str(dead[0]), "--reason", WHY)["done"] == dead[:1]
    assert run("deliveries", "skip", str(dead[0]), "--reason", WHY, status=1).stderr == (
        f"not changed: {dead[0]}: skipped already\n"
    )


def test_what_runs_is_not_skipped(dead: list[int], run: Commands, engine: Engine) -> None:
    """A running delivery is left unchanged, and its lane is named."""
    running = Hand(engine).take().begin()
    done = run("deliveries", "skip", str(running), "--reason", WHY, status=1)
    assert LANE in done.stderr


def test_wrong_usage(dead: list[int], run: Commands) -> None:
    """A reason and a selection are required; skip by filters also requires a state."""
    for verb in ("retry", "skip"):
        assert "--reason" in run.fails("deliveries", verb, str(dead[0]), status=2)
        assert "nothing is selected" in run.fails("deliveries", verb, "--reason", WHY, status=2)
        assert "deliveries list" in run.fails("deliveries", verb, "999", "--reason", WHY)
    assert "--state" in run.fails("deliveries", "skip", "--handler", "register", "--reason", WHY, status=2)


def test_until(dead: list[int], run: Commands, engine: Engine) -> None:
    """--until leaves those that ended later unchanged; --since and --until together are a window."""
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE deliveries SET finished_at = now() - interval '3 hours' WHERE id = :id"), {"id": dead[0]}
        )
    assert [each["id"] for each in run.json("deliveries", "list", "--state", "dead", "--until", "1h")] == [dead[0]]
    window = ("--since", "4h", "--until", "2h")
    assert run.json("deliveries", "retry", *window, "--reason", WHY)["done"] == [dead[0]]
    assert run.json("deliveries", "list", "--state", "dead", "--since", "2h", "--until", "0s")[0]["id"] == dead[1]
