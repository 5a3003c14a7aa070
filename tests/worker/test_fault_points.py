"""Fault points: receivers and workers pass each of them, and production has none."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from receiver.fault_injection.faults import POINTS, VARIABLE
from receiver.simulator.api import FakeRedoxApi
from receiver.simulator.fake_redox import FakeRedox
from receiver.storage.registry.api_keys import ApiEndpoint, ApiKeys, OAuthKeySpec
from receiver.worker import discovery
from tests.outbound.conftest import KEY, PRIVATE, jwks_of
from tests.support.waiting import until
from tests.worker.plugins import speaking
from tests.worker.world import PLUGIN, World

_PLUGINS = f"{PLUGIN},{speaking.__name__}"
_TOKEN = "a token of twenty-four characters"


@contextmanager
def _serving(world: World, **more: str) -> Iterator[FakeRedox]:
    """Run a receiver of the world, with Redox in front of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener, world.log_path.open("ab") as log:
        world.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "receiver", "serve", "--receivers", "1", "--fd", str(listener.fileno())],
                env=world.environment(**more),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        )
        yield FakeRedox(f"http://127.0.0.1:{listener.getsockname()[1]}", "lab", _TOKEN, source_id="s1")


def _lines(world: World, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in world.log_path.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


def _struck(world: World) -> set[str]:
    return {line["subject"] for line in _lines(world, "failpoint.triggered")}


def test_every_point_is_passed(world: World) -> None:
    """A message and its repeat, a failing handler, a handler that exits, a query and a call to Redox pass all
    points.
    """
    pem = PRIVATE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    everything = {VARIABLE: ",".join(f"{name}=delay:0" for name in POINTS), "RECEIVER_HANDLERS": _PLUGINS}
    with FakeRedoxApi() as api, _serving(world, **everything) as redox:
        api.register_oauth(KEY.client_id, jwks_of(KEY))
        ApiKeys(world.engine, world.keyring, actor="tester@test").add_api_key(
            "ours",
            ApiEndpoint(environment="staging", base_url=api.base_url, source_id="source-1"),
            OAuthKeySpec(client_id=KEY.client_id, private_key=pem, kid=KEY.kid),
            datetime.now(UTC),
        )
        world.registration.set_destination("lab", datetime.now(UTC), {"reply_with": "ours"})
        for name in ("scripted", "within", "search", "reply"):
            world.registration.enable_handler(
                "lab", discovery.load_handler(name, _PLUGINS.split(",")).spec, datetime.now(UTC)
            )
        world.start_worker(**everything)
        bodies = [world.admitted(do).inbound.body for do in ("nothing", "raise", "exit")]
        bodies.append(world.admitted(kind="PatientSearch.Query").inbound.body)
        until(lambda: redox.send(bodies[0]).status == 200, "accepted, and handled within the request")
        for body in bodies:
            redox.send(body)
        until(lambda: _struck(world) >= POINTS.keys(), f"all but {POINTS.keys() - _struck(world)}")
    assert _struck(world) == POINTS.keys()


@pytest.mark.parametrize("command", ["worker", "serve", "up"])
def test_none_starts_where_production_is(world: World, command: str) -> None:
    """A process with fault points refuses to start if a production destination exists, and names the variable and the
    destination.
    """
    world.add_destination("ward", "production")
    done = subprocess.run(
        [sys.executable, "-m", "receiver", command],
        env=world.environment(
            **{VARIABLE: "request.judged=raise", "RECEIVER_BIND": "127.0.0.1:0", "RECEIVER_ADMIN_BIND": "127.0.0.1:0"}
        ),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert f"Error: {VARIABLE} is set, but ward is a production destination" in done.stderr


def test_production_that_appears_ends_them(world: World) -> None:
    """When a running worker sees a production destination, its fault points end, in it and in its handler processes,
    and it continues to work.
    """
    world.enable("scripted")
    world.start_worker(**{VARIABLE: "lane.claimed=delay:0,handler.ended=delay:0"})
    world.hand("nothing").until_states("succeeded")
    assert _struck(world) == {"lane.claimed", "handler.ended"}
    world.add_destination("ward", "production")
    until(lambda: _lines(world, "failpoints.disabled"), "disarmed")
    before = len(_lines(world, "failpoint.triggered"))
    world.hand("nothing", "exit", "nothing")
    until(lambda: world.states().count("succeeded") >= 2, "handled")
    world.let_time_pass()
    world.until_done()
    assert len(_lines(world, "failpoint.triggered")) == before
