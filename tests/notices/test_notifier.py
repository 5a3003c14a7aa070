"""The notifier and its look, on a real database, a real endpoint and a real admin listener."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from receiver.keyring import Keyring
from receiver.notices.channels import NoticeNotSent
from receiver.notices.look import DATABASE_UNAVAILABLE, FindingsLook
from receiver.notices.notifier import Notifier
from receiver.notices.plan import Condition, Notice
from receiver.outbound.standard_webhooks import secret_key, signature
from tests.storage.conftest import door
from tests.storage.door import Door
from tests.support.scripted_endpoint import ScriptedEndpoint, answer
from tests.support.server import OURS, serving
from tests.support.waiting import until

__all__ = ["door"]

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_one_host_looks(door: Door, engine: Engine, keyring: Keyring) -> None:
    """The first one, until its connection ends; then another takes over."""
    first, second = FindingsLook(engine, keyring, "one"), FindingsLook(engine, keyring, "two")
    found = first()
    assert found is not None
    assert "no_receiver" in {each.code for each in found}
    assert second() is None
    first._leave()
    taken = second()
    assert taken is not None
    assert {each.code for each in taken} == {each.code for each in found}
    assert first() is None
    second._leave()


def test_a_database_that_does_not_answer(door: Door, engine: Engine, keyring: Keyring) -> None:
    """It is a condition of its own, and what was known before is not called resolved."""
    look = FindingsLook(engine, keyring, "one")
    before = look()
    assert before is not None
    with engine.connect() as other:
        other.execute(text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"))
        other.commit()
    during = look()
    assert during is not None
    assert [each.code for each in during] == [*(each.code for each in before), DATABASE_UNAVAILABLE]
    after = look()
    assert after is not None
    assert {each.code for each in after} == {each.code for each in before}
    look._leave()


def test_a_notice_that_does_not_arrive() -> None:
    """It is tried again at each look, in order; nothing else is lost."""
    condition = Condition(code="dead", destination=None, text="x", fix="y")
    arrived: list[Notice] = []
    failures = iter([True, True, False])
    tried = threading.Semaphore(0)

    def look() -> Sequence[Condition]:
        return [condition]

    def send(notice: Notice) -> None:
        tried.release()
        if next(failures, False):
            raise NoticeNotSent("no")
        arrived.append(notice)

    notifier = Notifier(look, send, repeat=99_999, interval=0.01)
    notifier.start()
    for _ in range(3):
        assert tried.acquire(timeout=60)
    until(lambda: arrived)
    notifier.stop()
    assert [each.event for each in arrived] == ["opened"]


@pytest.mark.first
def test_the_admin_listener_tells(door: Door, database_url: str, keyring_path: Path, tmp_path: Path) -> None:
    """A real one, with a real endpoint: no receiver runs, and a signed notice says so."""
    with ScriptedEndpoint(*[answer(204, b"") for _ in range(50)]) as endpoint:
        environment = {
            "DATABASE_URL": database_url,
            "RECEIVER_DATA_DIR": str(tmp_path),
            "RECEIVER_KEYRING": str(keyring_path),
            "RECEIVER_NOTIFY_URL": endpoint.url,
            "RECEIVER_NOTIFY_SECRET": SECRET,
        }
        with serving(tmp_path, environment, arguments=(*OURS, "--workers", "1", "receiver.asgi:admin")) as server:
            until(lambda: endpoint.received, "the first notice", seconds=240)
            until(lambda: server.lines("notice.sent"))
        request = endpoint.received[0]
    data = json.loads(request.body)["data"]
    assert data["code"] == "no_receiver"
    assert data["fix"].startswith("redox-receiver ")
    headers = request.headers
    made = signature(secret_key(SECRET), headers["webhook-id"], int(headers["webhook-timestamp"]), request.body)
    assert headers["webhook-signature"] == made
