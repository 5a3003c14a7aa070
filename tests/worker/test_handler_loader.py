"""The handler loader: which handlers a worker has, and what it reports of the others."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text

from receiver.storage.registry.changes import RegistryChanges
from receiver.worker import discovery
from tests.support.waiting import until
from tests.worker.worker_processes import stop
from tests.worker.world import PLUGIN, ROOT, World


def problems(world: World) -> list[dict[str, Any]]:
    """Return the reported problems of handlers."""
    return world.rows(
        "SELECT handler, destination, kind, error_class, place, detail FROM handler_problems ORDER BY handler, kind"
    )


def _sign(world: World) -> None:
    """Sign the subscriptions that SQL inserted."""
    registration = RegistryChanges(world.engine, world.keyring, actor="tester@test")
    from receiver.storage import schema

    with world.engine.begin() as connection:
        for row in connection.execute(text("SELECT id FROM subscriptions")).all():
            registration._sign(connection, schema.subscriptions, row.id)


def test_enabled_while_it_runs(working: World, place: str) -> None:
    """A newly enabled handler runs without a restart. After it is disabled, pending deliveries stay."""
    working.enable("by-patient", place)
    sent = working.hand("nothing", destination=place)
    sent.until_states("succeeded")

    before = working.hand("raise", "nothing", destination=place)
    until(before.attempts, "it has failed once")
    working.registration.disable_handler(place, "by-patient", datetime.now(UTC))
    working.let_time_pass()
    after = working.hand("nothing", destination=place)
    assert after.states() == []
    assert before.states() == ["pending", "pending"]


@pytest.mark.parametrize(
    ("source", "detail", "error_class", "place"),
    [
        ("import no_such_library\n", "ModuleNotFoundError", "ModuleNotFoundError", "fresh:1"),
        ("import os; os._exit(3)\n", "its import ended the process with exit status 3", "Exit3", None),
    ],
)
def test_a_plugin_that_cannot_be_imported(
    world: World, source: str, detail: str, error_class: str, place: str | None
) -> None:
    """The other handlers run. The failure is reported, in the log and in the database, until the import succeeds."""
    (world.directory / "fresh.py").write_text(source)
    world.enable("scripted")
    sent = world.hand("nothing")
    process = world.start_worker(RECEIVER_HANDLERS=f"fresh,{PLUGIN}", PYTHONPATH=f"{world.directory}:{ROOT}")
    sent.until_states("succeeded")

    [problem] = until(lambda: problems(world), "it is reported")
    assert problem["detail"].startswith(f"module fresh of RECEIVER_HANDLERS cannot be imported: {detail}")
    assert (problem["kind"], problem["error_class"], problem["place"]) == ("plugin_not_loaded", error_class, place)
    assert '"event": "handler.not_loaded"' in world.log_path.read_text()
    (world.directory / "fresh.py").write_text(
        "from receiver.handlers import handler\n@handler('*', name='fresh')\ndef fresh(m, c): ...\n"
    )
    world.enable("fragile")  # a change of the registry makes the worker try again
    until(lambda: not problems(world), "it is over")
    assert stop(process) == 0


def test_two_responders_for_one_query(world: World) -> None:
    """Two responders for one query at one destination are reported, and the worker continues."""
    world.enable("search")
    world.enable("scripted")
    world.execute("""
        INSERT INTO subscriptions (destination_id, handler, role, patterns, ordering, acknowledge, on_failure,
                                   max_attempts, timeout, mac, mac_key)
        SELECT destination_id, 'rival', role, '{Notes.Query}', ordering, acknowledge, on_failure, max_attempts, timeout,
               mac, mac_key FROM subscriptions WHERE handler = 'search'""")
    _sign(world)
    sent = world.hand("nothing")
    process = world.start_worker(RECEIVER_HANDLERS="tests.worker.plugins.scripted,tests.worker.plugins.rival")
    sent.until_states("succeeded")
    until(
        lambda: any(
            "PatientSearch.Query is answered by both search and rival at lab" in each["detail"]
            for each in problems(world)
        ),
        "it is reported",
    )
    assert stop(process) == 0


def test_two_responders_in_development(world: World) -> None:
    """A module of RECEIVER_HANDLERS whose responder would be the second one of a development destination is
    reported.
    """
    world.add_destination("dev", environment="development")
    world.enable("search", "dev")
    process = world.start_worker(RECEIVER_HANDLERS="tests.worker.plugins.rival")
    [problem] = until(lambda: problems(world), "it is reported")
    assert (problem["handler"], problem["destination"], problem["detail"]) == (
        "rival",
        "dev",
        (
            "rival (module tests.worker.plugins.rival of RECEIVER_HANDLERS): PatientSearch.Query is answered by search "
            "at dev: a query has one responder"
        ),
    )
    assert stop(process) == 0
    assert problems(world) == []


def test_a_plugin_broken_under_a_live_worker(world: World) -> None:
    """A loaded handler that the handler processes cannot import is reported until they can."""
    code = "from receiver.handlers import handler\n@handler('*', name='fresh')\ndef fresh(m, c): ...\n"
    (world.directory / "fresh.py").write_text(code)
    world.registration.enable_handler(
        "lab", replace(discovery.load_handler("scripted", [PLUGIN]).spec, handler="fresh"), datetime.now(UTC)
    )
    process = world.start_worker(RECEIVER_HANDLERS="fresh", PYTHONPATH=f"{world.directory}:{ROOT}")
    until(lambda: world.rows("SELECT FROM workers WHERE 'fresh' = ANY(handlers)"), "it is loaded")
    (world.directory / "fresh.py").write_text("raise RuntimeError('half an upgrade, canary')\n")
    sent = world.hand("nothing")

    [problem] = until(lambda: problems(world), "it is reported")
    assert (problem["handler"], problem["kind"], problem["error_class"], problem["place"]) == (
        "fresh",
        "handler_not_started",
        "RuntimeError",
        "fresh:1",
    )
    assert "canary" not in problem["detail"] + world.log_path.read_text()
    (world.directory / "fresh.py").write_text(code)
    sent.until_states("succeeded")
    until(lambda: not problems(world), "it is over")
    assert stop(process) == 0


def test_development_bindings(world: World) -> None:
    """The handlers of RECEIVER_HANDLERS are bound to development destinations only, and not again after they were
    disabled.
    """
    world.add_destination("dev", environment="development")
    world.enable("fragile", "dev")
    world.registration.disable_handler("dev", "fragile", datetime.now(UTC))
    process = world.start_worker()
    query = (
        "SELECT d.name, s.handler, s.enabled FROM subscriptions s JOIN destinations d ON d.id = s.destination_id "
        "ORDER BY s.handler"
    )
    until(
        lambda: {"scripted", "search", "within"} <= {row["handler"] for row in world.rows(query) if row["enabled"]},
        "they are bound",
    )

    bound = {row["handler"]: row["enabled"] for row in world.rows(query)}
    assert bound["fragile"] is False
    assert {row["name"] for row in world.rows(query)} == {"dev"}
    sent = world.hand("nothing", destination="dev")
    until(lambda: "succeeded" in sent.states(), "they run")
    assert stop(process) == 0


def test_declarations_are_refreshed(world: World) -> None:
    """A worker updates the declaration in the registry to the handler's current one."""
    world.enable("scripted")
    world.execute("UPDATE subscriptions SET max_attempts = 99, timeout = 1")
    _sign(world)
    process = world.start_worker()
    until(lambda: world.rows("SELECT FROM subscriptions WHERE max_attempts = 2 AND timeout = 3"), "it is written down")
    assert world.rows("SELECT actor FROM audit_events WHERE action = 'handler.enable' AND actor LIKE 'worker:%'")
    assert stop(process) == 0


def test_a_handler_that_is_not_loaded(world: World) -> None:
    """A delivery whose handler no worker has loaded stays pending until a worker has."""
    world.enable("scripted")
    sent = world.hand("nothing", "nothing")
    process = world.start_worker(RECEIVER_HANDLERS="tests.worker.plugins.plain")
    until(lambda: world.rows("SELECT FROM workers"), "the worker works")
    until(lambda: '"event": "handler.not_installed", "handler": "scripted"' in world.log_path.read_text(), "it is told")
    assert [(each["state"], each["attempts"]) for each in sent.deliveries()] == [("pending", 0)] * 2
    assert stop(process) == 0

    process = world.start_worker()
    sent.until_states("succeeded", "succeeded")
    assert stop(process) == 0
