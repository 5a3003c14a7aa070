"""@handler and @responder: what they declare, and what they refuse at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from receiver.errors import ConfigurationError
from receiver.handlers import Context, Message, handler, responder
from receiver.handlers.declaration import Declaration, declared

# What a plugin without a type checker says.
WRONG: Any = handler


def run(message: Message, context: Context) -> Any:
    """A function to decorate."""


def test_defaults() -> None:
    """By default a handler keeps the order of a source and has ten attempts of a minute."""

    def plain(message: Message, context: Context) -> None:
        pass

    assert handler("Clinical Summary.PatientPush", "FHIR.*", "FHIR.*", name="plain")(plain) is plain
    assert declared(plain) == Declaration(
        role="handler",
        name="plain",
        patterns=("ClinicalSummary.PatientPush", "FHIR.*"),
        ordering="source",
        patient_key=None,
        acknowledge="after_commit",
        on_failure="dead",
        max_attempts=10,
        timeout=60.0,
    )


def test_options() -> None:
    """Every option is in the declaration; a responder has one attempt."""

    def ask(message: Message, context: Context) -> dict[str, Any]:
        return {}

    def put(message: Message, context: Context) -> None:
        pass

    responder("PatientSearch.Query", "SSO.Sign-on", name="ask_1-b", timeout=5)(ask)
    handler(
        "*",
        name="put",
        ordering="patient",
        patient_key="MR",
        acknowledge="after_handling",
        on_failure="hold",
        max_attempts=3,
        timeout=7.5,
    )(put)

    assert declared(ask) == Declaration(
        role="responder", name="ask_1-b", max_attempts=1, timeout=5, patterns=("PatientSearch.Query", "SSO.Sign-on")
    )
    assert declared(put) == Declaration(
        role="handler",
        name="put",
        patterns=("*",),
        ordering="patient",
        patient_key="MR",
        max_attempts=3,
        timeout=7.5,
        acknowledge="after_handling",
        on_failure="hold",
    )
    assert declared(run) is None


@pytest.mark.parametrize(
    ("declare", "says"),
    [
        (lambda: handler("*", name="Big"), "'Big' is not a valid handler name"),
        (lambda: handler("*", name=""), "'' is not a valid handler name"),
        (lambda: handler("*", name="a/b"), "'a/b' is not a valid handler name"),
        (lambda: handler("*", name="a" * 41), "is not a valid handler name"),
        (lambda: handler(name="n"), "@handler n: it has no pattern: name at least one"),
        (lambda: handler("PatientAdmin", name="n"), "@handler n: 'PatientAdmin' is not a valid pattern"),
        (lambda: handler("PatientSearch.Query", name="n"), "@handler n: PatientSearch.Query is a query"),
        (lambda: responder("PatientSearch.*", name="n"), r"@responder n: PatientSearch.\* is not a query of Redox"),
        (lambda: responder("PatientAdmin.Arrival", name="n"), "@responder n: PatientAdmin.Arrival is not a query"),
        (lambda: handler("*", name="n", ordering="patient"), '@handler n: set ordering="patient" and patient_key'),
        (lambda: handler("*", name="n", patient_key="MR"), '@handler n: set ordering="patient" and patient_key'),
        (
            partial(WRONG, "*", name="n", ordering="fifo"),
            "@handler n: ordering='fifo' is not valid: use one of 'source', 'patient', 'none'",
        ),
        (partial(WRONG, "*", name="n", acknowledge="never"), "@handler n: acknowledge='never'"),
        (partial(WRONG, "*", name="n", on_failure="cry"), "@handler n: on_failure='cry'"),
        (
            lambda: handler("*", name="n", on_failure="hold", ordering="none"),
            '@handler n: on_failure="hold" has no effect',
        ),
        (lambda: handler("*", name="n", max_attempts=0), "@handler n: max_attempts must be 1 or more"),
        (lambda: handler("*", name="n", timeout=0), "@handler n: timeout must be more than 0"),
        (lambda: handler("*", name="n", timeout=3601), "at most 3600 seconds"),
        (lambda: handler("*", name="n", timeout=float("nan")), "@handler n: timeout must be more than 0"),
    ],
)
def test_what_is_refused(declare: Callable[[], Any], says: str) -> None:
    """An invalid declaration raises when the plugin is imported, and names the option and what is wrong."""
    with pytest.raises(ConfigurationError, match=says):
        declare()


def test_an_unknown_option() -> None:
    """An unknown option is an error."""
    with pytest.raises(TypeError, match="ordring"):
        WRONG("*", name="n", ordring="none")


def test_the_function_must_fit() -> None:
    """Only a plain function that takes a message and a context can be declared, and only once."""

    async def later(message: Message, context: Context) -> None:
        pass

    def one(message: Message) -> None:
        pass

    def twice(message: Message, context: Context) -> None:
        pass

    with pytest.raises(ConfigurationError, match="@handler n: the function must not be async"):
        WRONG("*", name="n")(later)
    with pytest.raises(ConfigurationError, match=r"@handler n: the function must accept \(message, context\)"):
        WRONG("*", name="n")(one)
    handler("*", name="n")(twice)
    with pytest.raises(ConfigurationError, match="@handler m: the function already has a declaration"):
        handler("*", name="m")(twice)
