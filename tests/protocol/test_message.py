"""The values of a request, and the names of answers to queries."""

from __future__ import annotations

import dataclasses
import inspect
from inspect import Parameter
from types import ModuleType
from typing import Any

import pytest

from receiver.protocol import message, registry
from receiver.protocol.message import DESTINATION_NAME, error_body
from receiver.protocol.reading import read
from receiver.protocol.values import Value
from receiver.protocol.verification import KINDS
from receiver.protocol.verification.kind import CredentialKind
from tests.protocol.made_up import head


@pytest.mark.parametrize("module", [message, registry])
def test_values_are_frozen(module: ModuleType) -> None:
    """Every value of these modules is frozen and slotted, and its arguments are keywords."""
    types = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    structs = [each for each in types if issubclass(each, Value)]
    values = [each for each in types if dataclasses.is_dataclass(each)]
    assert len(structs) + len(values) >= 4
    for value in values:
        assert value.__dataclass_params__.frozen, value  # type: ignore[attr-defined] # dataclass keeps them there
        assert all(field.kw_only for field in dataclasses.fields(value)), value
    for struct in structs:
        assert struct.__struct_config__.frozen, struct
        assert {each.kind for each in inspect.signature(struct).parameters.values()} == {Parameter.KEYWORD_ONLY}, struct
    assert not [each for each in (*structs, *values) if "__dict__" in dir(each)]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_credentials_are_frozen(kind: CredentialKind[Any, Any]) -> None:
    """So is the credential of each kind."""
    credential = kind.credential
    assert issubclass(credential, registry.Credential)
    assert credential.__dataclass_params__.frozen  # type: ignore[attr-defined] # dataclass keeps them there
    assert all(field.kw_only for field in dataclasses.fields(credential))
    assert "__dict__" not in dir(credential)


def test_header_returns_the_bytes_on_the_wire() -> None:
    """`header` returns the bytes on the wire; characters that cannot come from there raise no error."""
    made = head({"a": "caf\xe9", "b": "\u20ac"})
    assert (made.header("a"), made.header("b"), made.header("c")) == (b"caf\xe9", b"?", None)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("PatientSearch.Query", ("PatientSearch", "Response")),
        ("SSO.Sign-on", ("SSO", "Sign-on")),
        ("Results.Query", ("Results", "QueryResponse")),
        ("NeverHeard.Of", ("NeverHeard", "OfResponse")),
    ],
)
def test_the_name_of_an_answer(kind: str, expected: tuple[str, str]) -> None:
    """An answer has its query's model, and the event type that Redox documents, or one by its rule."""
    model, event = kind.split(".")
    assert read(f'{{"Meta":{{"DataModel":"{model}","EventType":"{event}"}}}}'.encode()).response_kind == expected


def test_errors_in_redox_s_shape() -> None:
    """An error has the answer's kind if the query's is known, and is in Meta.Errors."""
    error = {"ID": None, "Text": "No answer.", "Type": "application", "Module": "redox-receiver"}
    assert error_body(kind="PatientSearch.Query", text="No answer.") == {
        "Meta": {"DataModel": "PatientSearch", "EventType": "Response", "Errors": [error]}
    }
    assert error_body(kind=None, text="No answer.") == {"Meta": {"Errors": [error]}}


def test_names_of_destinations() -> None:
    """A destination's name is valid in a URL and a lane's name."""
    assert all(map(DESTINATION_NAME.fullmatch, ("a", "main", "clinic-2", "a" * 64)))
    assert not any(map(DESTINATION_NAME.fullmatch, ("", "-a", "a-", "A", "a/b", "a b", "a\n", "é", "a" * 65)))
