"""The admin listener, whatever the checks behind it do."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence

import pytest

from receiver.web import admin
from receiver.web.admin import Check, admin_app


def test_a_check_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks is told in time that there is no answer, and the checks that hang are asked once."""
    monkeypatch.setattr(admin, "PROBE_TIMEOUT", 0.1)
    thawed, asked = threading.Event(), []

    def checks() -> Sequence[Check]:
        asked.append(1)
        thawed.wait(30)
        return [Check(name="database", ok=True, detail="fine")]

    client = admin_app(checks, list).test_client()
    for _ in range(3):
        answer = client.get("/readyz")
        assert (answer.status_code, json.loads(answer.data)["ready"]) == (503, False)
    assert len(asked) == 1
    thawed.set()
    while (answer := client.get("/readyz")).status_code != 200:
        pass
    assert json.loads(answer.data)["checks"] == [{"name": "database", "ok": True, "detail": "fine"}]


def test_a_check_that_fails() -> None:
    """A fault of ours is a 500 that quotes nothing."""

    def checks() -> Sequence[Check]:
        raise ValueError("CANARY")

    answer = admin_app(checks, list).test_client().get("/readyz")
    assert (answer.status_code, answer.data) == (500, b'{"error":"failed"}')
