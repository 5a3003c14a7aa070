"""The admin listener, with checks that block or fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence

import pytest

from receiver.web import admin
from receiver.web.admin import Check, admin_app


def test_a_check_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each probe gets its reply in time, and checks that block run once at a time."""
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
    """An error in the checks is a 500 that quotes nothing."""

    def checks() -> Sequence[Check]:
        raise ValueError("CANARY")

    answer = admin_app(checks, list).test_client().get("/readyz")
    assert (answer.status_code, answer.data) == (500, b'{"error":"failed"}')
