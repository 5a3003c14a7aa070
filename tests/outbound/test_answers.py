"""Reading Redox's answers: each status and error has its type, and no text of an answer is in an error's message."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.outbound import (
    Answer,
    AuthenticationFailed,
    BadAnswer,
    ErrorDetail,
    OutboundError,
    RateLimited,
    RedoxUnavailable,
    Rejected,
)
from receiver.outbound.answers import interpret

LOG = "0e5a54a4-61b3-4d53-8b29-3a3a6f0f5c11"
TEXT = "Canary Größe has no MRN"


def response(status: int, body: object = b"", **headers: str) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.Response(status, content=content, headers={name.replace("_", "-"): v for name, v in headers.items()})


def fails(status: int, body: object = b"", **headers: str) -> OutboundError:
    with pytest.raises(OutboundError) as caught:
        interpret(response(status, body, **headers))
    return caught.value


@pytest.mark.parametrize("status", [200, 201, 202])
def test_a_successful_answer(status: int) -> None:
    """Any 2xx without errors is an Answer, with the ids of Redox's logs. Its repr shows no content."""
    body = {"Meta": {"Logs": [{"ID": LOG, "AttemptID": "x"}, {"ID": 17}, {"ID": None}, "?"], "Errors": []}, "N": 2**80}
    answer = interpret(response(status, body))

    assert (answer.status, answer.data, answer.log_ids) == (status, body, (LOG, "17"))
    assert json.loads(answer.body) == body
    assert "N" not in repr(answer)


def test_an_empty_answer() -> None:
    """A 204 has no data."""
    assert interpret(response(204)) == Answer(status=204, data=None, body=b"")


def test_meta_errors_raise_even_with_200() -> None:
    """Meta.Errors with status 200 are raised with their ids and types. Their text is only in the details."""
    errors = [{"ID": 4098, "Text": TEXT, "Type": "transmission", "Module": "Send"}, {"ID": "e-2", "Text": None}]
    error = fails(200, {"Meta": {"Logs": [{"ID": LOG}], "Errors": errors}})

    assert type(error) is Rejected
    first = ErrorDetail(id="4098", type="transmission", module="Send", text=TEXT)
    assert error.details == (first, ErrorDetail(id="e-2"))
    assert error.log_ids == (LOG,)
    assert not error.retryable
    assert "4098/transmission/Send, e-2" in str(error)
    assert LOG in str(error)
    assert TEXT not in str(error) + repr(error) + repr(error.details)


@pytest.mark.parametrize("errors", ["text", {"ID": 1}, [None], [[]], 7], ids=str)
def test_meta_errors_of_any_shape_are_errors(errors: object) -> None:
    """Any value of Meta.Errors that is not empty is an error."""
    assert type(fails(200, {"Meta": {"Errors": errors}})) is Rejected


@pytest.mark.parametrize(
    ("status", "kind", "retryable", "not_processed"),
    [
        (400, Rejected, False, False),
        (401, AuthenticationFailed, False, False),
        (403, Rejected, False, False),
        (404, Rejected, False, False),
        (408, RedoxUnavailable, True, False),
        (413, Rejected, False, False),
        (422, Rejected, False, False),
        (429, RateLimited, True, True),
        (500, RedoxUnavailable, True, False),
        (502, RedoxUnavailable, True, False),
        (503, RedoxUnavailable, True, True),
        (504, RedoxUnavailable, True, False),
    ],
)
def test_a_status_has_its_error(status: int, kind: type[OutboundError], retryable: bool, not_processed: bool) -> None:
    """Each status has one error type, which says whether a retry may help and whether Redox may have processed it."""
    bodies: list[object] = [b"", b"plain " + TEXT.encode(), {"Meta": {"Errors": [{"ID": 1, "Text": TEXT}]}}, [], None]
    for body in bodies:
        error = fails(status, body)
        assert type(error) is kind
        assert (error.status, error.retryable, error.not_processed) == (status, retryable, not_processed)
        assert f"HTTP {status}" in str(error)
        assert "Canary" not in str(error) + repr(error)


def test_rate_limit_headers() -> None:
    """X-RateLimit-Limit is passed on. Retry-After, which Redox does not document, is used if it is in whole seconds."""
    error = fails(429, x_ratelimit_limit="7500", retry_after="12")
    assert "limit 7500" in str(error)
    assert error.retry_after == 12.0

    for odd in ("Wed, 21 Oct 2026 07:28:00 GMT", "-1", "1e9", "9999999"):
        assert fails(503, retry_after=odd).retry_after is None
    assert "evil" not in str(fails(429, x_ratelimit_limit="evil"))


def test_issues_of_an_operation_outcome() -> None:
    """The issues of an OperationOutcome are the details of the error."""
    outcome = {
        "resourceType": "OperationOutcome",
        "issue": [
            {"severity": "error", "code": "invalid", "diagnostics": TEXT},
            {"code": "a b", "details": {"text": "w"}},
            7,
        ],
    }
    error = fails(422, outcome)

    first = ErrorDetail(type="invalid", module="error", text=TEXT)
    assert error.details == (first, ErrorDetail(text="w"), ErrorDetail())
    assert "invalid/error" in str(error)


@pytest.mark.parametrize(
    "body", [b"<html>", b"{", b"\xff", b'"\xff"', b"[" * 200_000], ids=["html", "cut", "ff", "utf8", "deep"]
)
def test_an_answer_that_is_not_json(body: bytes) -> None:
    """A 200 that cannot be read is BadAnswer: Redox may or may not have accepted the message."""
    error = fails(200, body)

    assert type(error) is BadAnswer
    assert error.retryable
    assert not error.not_processed


@given(
    st.integers(200, 599).filter(lambda status: not 300 <= status < 400),
    st.binary()
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["Meta", "Errors", "Logs", "ID", "Type", "Text", "issue", "resourceType", "code"]),
                inner,
            )
        ),
    ),
)
def test_any_answer(status: int, body: Any) -> None:
    """Any body is an Answer or one of the named errors."""
    outcome: Answer | OutboundError
    try:
        outcome = interpret(response(status, body))
    except OutboundError as exc:
        outcome = exc
    assert outcome.status == status
