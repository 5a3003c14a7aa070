"""Which notices are due."""

from __future__ import annotations

from receiver.notices.plan import LOOKS, MOST_AN_HOUR, Condition, NoticePlan

REPEAT = 14_400.0


def condition(code: str = "dead", destination: str | None = "lab", text: str = "3 are dead.") -> Condition:
    """Return a condition."""
    return Condition(code=code, destination=destination, text=text, fix="redox-receiver status")


def events(plan: NoticePlan, conditions: list[Condition], now: float) -> list[str]:
    """Return what is due, as words."""
    return [each.event for each in plan.due(conditions, now)]


def test_a_condition_that_lasts() -> None:
    """It is said at the second look, again after `repeat`, and resolved when two looks have missed it."""
    plan, found = NoticePlan(repeat=REPEAT), [condition()]
    mail = [events(plan, found, minute * 60.0) for minute in range(4)]
    assert mail == [[], ["opened"], [], []]
    assert events(plan, found, 60 + REPEAT - 1) == []
    assert events(plan, found, 60 + REPEAT) == ["reminder"]
    assert [events(plan, [], 60 + REPEAT + minute) for minute in (1, 2, 3)] == [[], ["resolved"], []]
    assert [events(plan, found, 99_999.0 + minute) for minute in range(LOOKS)] == [[], ["opened"]]


def test_what_comes_and_goes() -> None:
    """A condition of a single look is never said, nor is one that a single look missed resolved."""
    plan = NoticePlan(repeat=REPEAT)
    assert [events(plan, [condition()] * (minute % 2), minute * 60.0) for minute in range(10)] == [[]] * 10
    assert [events(plan, [condition()], now) for now in (1000.0, 1060.0)] == [["opened"], []]
    assert [events(plan, each, 1100.0) for each in ([], [condition()], [])] == [[], [], []]


def test_code_and_destination_identify_it() -> None:
    """A new count is the same condition; another destination is another one."""
    plan = NoticePlan(repeat=REPEAT)
    plan.due([condition(text="3 are dead.")], 0)
    (notice,) = plan.due([condition(text="4 are dead."), condition(destination="clinic")], 60)
    assert notice.condition.text == "4 are dead."
    (notice,) = plan.due([condition(text="5 are dead."), condition(destination="clinic")], 120)
    assert notice.condition.destination == "clinic"


def test_a_flood() -> None:
    """At most so many an hour; what was left out is counted in the next notice, and said when the hour is over."""
    plan = NoticePlan(repeat=REPEAT)
    many = [condition(destination=str(number)) for number in range(MOST_AN_HOUR + 5)]
    plan.due(many, 0)
    assert len(plan.due(many, 60)) == MOST_AN_HOUR
    assert plan.due(many, 120) == []
    later = plan.due(many, 3_700)
    assert [each.event for each in later] == ["opened"] * 5
    assert [each.left_out for each in later] == [5, 0, 0, 0, 0]


def test_another_host_takes_over() -> None:
    """What this host has said is forgotten, and nothing is called resolved."""
    plan = NoticePlan(repeat=REPEAT)
    for now in (0.0, 60.0):
        plan.due([condition()], now)
    plan.forget()
    assert [events(plan, [], now) for now in (120.0, 180.0, 240.0)] == [[], [], []]
