"""Acceptance of verified messages by source and test flag."""

from __future__ import annotations

import json
from typing import Any

import pytest

from receiver.errors import UnknownSource
from receiver.protocol.reading import read
from receiver.protocol.sources import ID_SHAPE, admit
from tests.protocol.made_up import SOURCE, destination

_OTHER = "11111111-2222-4333-8444-555555555555"


def _verdict(source: str | None, *, test: bool = False, query: bool = False, **policies: Any) -> str | None:
    """Return None if dispatched, a reason if quarantined, "403 reason" if refused."""
    meta: dict[str, Any] = {"DataModel": "PatientSearch", "EventType": "Query" if query else "Response", "Test": test}
    if source is not None:
        meta["Source"] = {"ID": source}
    try:
        return admit(read(json.dumps({"Meta": meta}).encode()), destination(**policies))
    except UnknownSource as exc:
        return f"{exc.status_hint} {exc.reason}"


@pytest.mark.parametrize(
    ("source", "sources", "reason"),
    [
        (SOURCE, {SOURCE: True}, None),
        (SOURCE.upper(), {SOURCE: True}, None),
        (f"urn:uuid:{SOURCE}", {SOURCE: True}, None),
        (_OTHER, {SOURCE: True}, "source_unknown"),
        (SOURCE, {SOURCE: False}, "source_disabled"),
        (SOURCE, {}, "source_unknown"),
        (None, {SOURCE: True}, "source_missing"),
        (None, {None: True}, None),
        (None, {None: False}, "source_disabled"),
        (SOURCE, {None: True}, "source_unknown"),
        ("x" * 10_000, {SOURCE: True}, "source_unknown"),
    ],
)
@pytest.mark.parametrize("query", [False, True])
def test_sources(source: str | None, sources: dict[str | None, bool], reason: str | None, query: bool) -> None:
    """Only a registered, enabled source is accepted; others get 403 or, by policy, quarantine, except for queries."""
    refused = None if reason is None else f"403 {reason}"
    assert _verdict(source, query=query, sources=sources) == refused
    kept = _verdict(source, query=query, sources=sources, on_unknown_source="quarantine")
    assert kept == (refused if query else reason)


@pytest.mark.parametrize(
    ("source", "sources", "expected"),
    [
        (_OTHER, {}, None),
        (None, {}, None),
        (SOURCE, {SOURCE: True}, None),
        (SOURCE, {SOURCE: False}, "403 source_disabled"),
        (None, {None: False}, "403 source_disabled"),
    ],
)
def test_any_source(source: str | None, sources: dict[str | None, bool], expected: str | None) -> None:
    """If any source is accepted, a disabled one is not."""
    assert _verdict(source, sources=sources, sources_policy="any") == expected


@pytest.mark.parametrize(
    ("policy", "notification", "query"),
    [
        ("accept", None, None),
        ("quarantine", "test_message", "403 test_rejected"),
        ("reject", "403 test_rejected", "403 test_rejected"),
    ],
)
def test_tests(policy: str, notification: str | None, query: str | None) -> None:
    """The destination's policy applies to messages marked as tests, not to others."""
    assert _verdict(SOURCE, test=True, test_messages=policy) == notification
    assert _verdict(SOURCE, test=True, query=True, test_messages=policy) == query
    assert _verdict(SOURCE, test_messages=policy) is None


def test_the_source_comes_first() -> None:
    """A test message of an unknown source is refused for its source, which the operator has to fix."""
    assert _verdict(_OTHER, test=True, test_messages="reject") == "403 source_unknown"
    assert _verdict(_OTHER, test=True, test_messages="reject", on_unknown_source="quarantine") == "source_unknown"


def test_the_shape_of_an_id() -> None:
    """UUIDs and OIDs are ids; a name, an empty text and a long one are stored as digests only."""
    assert all(map(ID_SHAPE.fullmatch, (SOURCE, "1.2.840.114350", "a1", "x" * 63 + "9")))
    assert not any(
        map(ID_SHAPE.fullmatch, ("Ann Example", "Quibbleworthington", "", "x" * 65, "a\n", "é", "=cmd|' /C calc'!A0"))
    )
