"""UUIDs of version 7, as RFC 9562 5.7 lays them out."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime

import time_machine

from receiver.storage.identifiers import uuid7


def test_the_time_stands_in_front() -> None:
    """48 bits of milliseconds: those of 2022-02-22T19:22:22Z as the RFC's own example has them (A.6)."""
    with time_machine.travel(datetime(2022, 2, 22, 19, 22, 22, tzinfo=UTC), tick=False):
        assert str(uuid7()).startswith("017f22e2-79b0-7")


def test_version_and_variant_are_right() -> None:
    """As the standard library reads them."""
    made = [uuid7() for _ in range(1000)]
    assert {(each.version, each.variant) for each in made} == {(7, uuid.RFC_4122)}


def test_none_comes_twice_and_later_ones_sort_later() -> None:
    """A thousand in a millisecond differ; an index over them grows at its end."""
    made = [uuid7() for _ in range(10_000)]
    assert len(set(made)) == len(made)
    before = uuid7()
    end = time.time_ns() + 2_000_000
    while time.time_ns() < end:
        pass
    assert before < uuid7()
