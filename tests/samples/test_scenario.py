"""Scenarios: values that belong together."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from receiver.samples.people import person
from receiver.samples.scenario import Node, make_scenario, render


def test_numbers_agree_within_a_seed_and_ids_differ_between_kinds() -> None:
    """An order and its result share the order's number, but not a log id."""
    order, result = make_scenario("Order.New", seed=4), make_scenario("Results.New", seed=4)
    assert order.number("order") == result.number("order") != make_scenario("Order.New", seed=5).number("order")
    assert order.number("order", 6) in range(100_000, 1_000_000)
    assert UUID(order.uuid("log")) != UUID(result.uuid("log"))


def test_times_are_utc_as_redox_writes_them() -> None:
    """Times are ISO 8601 with milliseconds and Z, before and after the event."""
    of = make_scenario("Order.New", seed=0, at=datetime(2026, 3, 1, 12, 30, tzinfo=UTC))
    assert of.time() == "2026-03-01T12:30:00.000Z"
    assert of.time(-0.5) == "2026-03-01T12:00:00.000Z"
    assert of.day(-1) == "2026-02-28"


def test_the_relative_has_the_patients_family_name() -> None:
    """A relative has the patient's family name."""
    assert make_scenario("Order.New", seed=1, patient=person(1, family="Zzcanary")).relative.family == "Zzcanary"


def test_rendering_gives_new_containers() -> None:
    """Changing a sample does not change the next one."""
    template: Node = {"a": [{"b": lambda of: of.seed}], "c": 1}
    of = make_scenario("Order.New", seed=9)
    first = render(template, of)
    first["a"][0]["b"] = "changed"
    assert render(template, of) == {"a": [{"b": 9}], "c": 1}
