"""The one tree of errors."""

from __future__ import annotations

import re

import pytest

from receiver import errors
from receiver.errors import (
    BadTransfer,
    GiveUp,
    ReceiverError,
    Refusal,
    RetryLater,
    UnknownSource,
    Unreadable,
    Unverified,
)

_CLASSES = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]


def test_one_tree() -> None:
    """Every error is a ReceiverError, and says in its docstring what happened."""
    assert len(_CLASSES) > 10
    for each in _CLASSES:
        assert issubclass(each, ReceiverError)
        assert re.match(r"[A-Z].*\.", each.__doc__ or ""), each


def test_the_docstring_is_the_message() -> None:
    """An error raised without a word says what its class says, without the indentation of the source."""
    assert str(errors.Unavailable()) == errors.Unavailable.__doc__
    assert "\n    " not in str(errors.ReceiverError())
    assert str(errors.NotFound("no message 7")) == "no message 7"


@pytest.mark.parametrize(
    ("kind", "status"), [(Refusal, 400), (Unverified, 401), (UnknownSource, 403), (BadTransfer, 400), (Unreadable, 400)]
)
def test_refusals(kind: type[Refusal], status: int) -> None:
    """A refusal carries its machine reason and a status, which the place that raises it may set."""
    assert (kind("some_reason").reason, kind("some_reason").status_hint, str(kind("some_reason"))) == (
        "some_reason",
        status,
        "some_reason",
    )
    assert kind("some_reason", status_hint=413).status_hint == 413
    assert kind("some_reason").status_hint == status


def test_what_a_handler_may_say() -> None:
    """A handler says how many seconds to wait, or the code of why it gives up."""
    assert (RetryLater(5).after, str(RetryLater(90.0)), RetryLater().after) == (5, "retry after 90 s", 60)
    assert (GiveUp("no_such_patient").code, str(GiveUp("no_such_patient"))) == ("no_such_patient", "no_such_patient")
