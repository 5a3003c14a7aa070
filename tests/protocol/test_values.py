"""Values of a request: they cannot be changed, and their repr omits hidden fields."""

from __future__ import annotations

import pytest

from receiver.protocol.values import Value
from tests.protocol.made_up import NOW, head, inbound


class Person(Value, frozen=True, kw_only=True):
    """A made-up person."""

    hidden = frozenset({"name"})

    name: str
    age: int = 7


def test_a_repr_omits_hidden_fields() -> None:
    """Also for rich, which formats tracebacks."""
    assert repr(Person(name="Ada")) == "Person(age=7)"
    assert Person(name="Ada").__rich_repr__() == [("age", 7)]


def test_a_value_cannot_be_changed() -> None:
    """It is not equal to a value with another field."""
    person = Person(name="Ada")
    with pytest.raises(AttributeError):
        person.name = "Grace"  # type: ignore[misc]  # it is frozen
    assert person == Person(name="Ada") != Person(name="Grace")


def test_a_request_shows_no_token_and_no_content() -> None:
    """Its repr shows neither headers nor query nor body."""
    asked = inbound(b"of a patient", {"verification-token": "canary"})
    assert repr(asked) == (
        f"Inbound(head=Head(destination='main', method='POST', peer='192.0.2.1', received_at={NOW!r}, proxied=True))"
    )
    assert "canary" not in repr(head(query="verification-token=canary"))
