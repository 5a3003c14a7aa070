"""Responses of Redox: turns an HTTP response into an Answer or an exception. `Meta.Errors` is an error even with status
200.

Must not send anything. Must not put the text of an error into a message, because it may name a patient.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2
import msgspec

from receiver.outbound.errors import (
    AuthenticationFailed,
    BadAnswer,
    ErrorDetail,
    OutboundError,
    RateLimited,
    RedoxUnavailable,
    Rejected,
)

# Only ids and the words of Redox's error types may appear in our messages, never a sentence.
_WORD: Final = re.compile(r"[\w.:/-]{1,64}", re.ASCII)
_MOST_TEXT: Final = 2_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A response without an error. `data`: its JSON (None for an empty body). `body`: its bytes.

    For a notification, status 200 means that Redox accepted it, not that it was delivered.
    """

    status: int
    data: Any = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def log_ids(self) -> tuple[str, ...]:
        """`Meta.Logs[].ID`: the ids of this message in Redox's logs."""
        return _log_ids(self.data)


def interpret(response: httpx2.Response) -> Answer:
    """Return the Answer, or raise an error of receiver.outbound.errors, depending on the status and `Meta.Errors`."""
    status, body = response.status_code, response.content
    if not 200 <= status < 300:
        raise _failure(response)
    try:
        data = msgspec.json.decode(body) if body else None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise BadAnswer(
            f"the response is not valid JSON (HTTP {status}, {len(body)} bytes); Redox may have processed the request",
            status=status,
        ) from exc
    details = _meta_errors(data)
    if details:
        raise Rejected(
            _sentence("Redox rejected the request", status, details, _log_ids(data)),
            status=status,
            details=details,
            log_ids=_log_ids(data),
        )
    return Answer(status=status, data=data, body=body)


def _failure(response: httpx2.Response) -> OutboundError:
    status = response.status_code
    try:
        data = msgspec.json.decode(response.content)
        details = _meta_errors(data) or _issues(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        data, text = None, response.content[:_MOST_TEXT].decode("utf-8", "replace")
        details = (ErrorDetail(text=text),) if text else ()
    log_ids = _log_ids(data)
    kind: type[OutboundError] = Rejected
    detail, not_processed, retry_after = "Redox rejected the request", False, None
    if status == httpx2.codes.UNAUTHORIZED:
        kind, detail = (
            AuthenticationFailed,
            "Redox rejected a token that it has just issued: check the permissions of the API key",
        )
    elif status == httpx2.codes.TOO_MANY_REQUESTS:
        limit = response.headers.get("x-ratelimit-limit", "")
        detail = "Redox received too many requests from this address" + (
            f" (limit {limit})" if limit.isdecimal() else ""
        )
        kind, not_processed, retry_after = RateLimited, True, _retry_after(response)
    elif status == httpx2.codes.SERVICE_UNAVAILABLE:
        kind, detail, not_processed = RedoxUnavailable, "Redox is not available", True
        retry_after = _retry_after(response)
    elif status >= 500 or status == httpx2.codes.REQUEST_TIMEOUT:
        kind, detail = RedoxUnavailable, "Redox failed to process the request"
    return kind(
        _sentence(detail, status, details, log_ids),
        status=status,
        details=details,
        log_ids=log_ids,
        not_processed=not_processed,
        retry_after=retry_after,
    )


def _sentence(detail: str, status: int, details: tuple[ErrorDetail, ...], log_ids: tuple[str, ...]) -> str:
    words = ["/".join(filter(None, (each.id, each.type, each.module))) for each in details]
    named = [word for word in words if word]
    parts = [f"HTTP {status}"]
    if named:
        parts.append(f"errors {', '.join(named[:5])}" + (f" and {len(named) - 5} more" if len(named) > 5 else ""))
    if log_ids:
        parts.append(f"log {', '.join(log_ids[:5])}")
    return f"{detail} ({'; '.join(parts)})"


def _meta_errors(data: Any) -> tuple[ErrorDetail, ...]:
    errors = _member(_member(data, "Meta"), "Errors")
    if not errors:
        return ()
    listed = errors if isinstance(errors, Sequence) and not isinstance(errors, str) else [errors]
    return tuple(
        ErrorDetail(
            id=_word(_member(error, "ID")),
            type=_word(_member(error, "Type")),
            module=_word(_member(error, "Module")),
            text=_text(_member(error, "Text")),
        )
        for error in listed
    )


def _issues(data: Any) -> tuple[ErrorDetail, ...]:
    """Return the issues of a FHIR OperationOutcome (FHIR R4: OperationOutcome.issue)."""
    issues = _member(data, "issue")
    if _member(data, "resourceType") != "OperationOutcome" or not isinstance(issues, list):
        return ()
    return tuple(
        ErrorDetail(
            type=_word(_member(issue, "code")),
            module=_word(_member(issue, "severity")),
            text=_text(_member(issue, "diagnostics") or _member(_member(issue, "details"), "text")),
        )
        for issue in issues
    )


def _log_ids(data: Any) -> tuple[str, ...]:
    logs = _member(_member(data, "Meta"), "Logs")
    ids = [_word(_member(log, "ID")) for log in logs] if isinstance(logs, list) else []
    return tuple(one for one in ids if one)


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _word(value: Any) -> str | None:
    word = str(value) if isinstance(value, str | int) else ""
    return word if _WORD.fullmatch(word) else None


def _text(value: Any) -> str | None:
    return value[:_MOST_TEXT] if isinstance(value, str) else None


def _retry_after(response: httpx2.Response) -> float | None:
    """Return the Retry-After header in seconds (RFC 9110 10.2.3). Redox documents none, but a proxy may send it."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() and len(value) < 6 else None
