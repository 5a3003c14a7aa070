"""What can go wrong in speaking to Redox, as types.

May not quote a token, a key, a body, or the text of Redox's errors (it may name a patient): messages hold statuses, ids
and fixed words; the texts stand in `details`, out of every repr.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from receiver.errors import ReceiverError


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorDetail:
    """One entry of `Meta.Errors`, or one issue of a FHIR OperationOutcome (`type`: its code, `module`: its severity).

    `text` may quote a patient.
    """

    id: str | None = None
    type: str | None = None
    module: str | None = None
    text: str | None = field(default=None, repr=False)


class OutboundError(ReceiverError):
    """Speaking to Redox failed.

    `retryable`: the same request may succeed later, without anybody mending anything. `not_processed`: it is certain
    that Redox did not act on the request. `status`: of the answer, where there was one. `log_ids`: `Meta.Logs[].ID`,
    which Redox's support asks for. `retry_after`: seconds that the answer asked us to wait.
    """

    retryable: bool = False

    def __init__(
        self,
        message: str | None = None,
        *,
        status: int | None = None,
        not_processed: bool = False,
        details: tuple[ErrorDetail, ...] = (),
        log_ids: tuple[str, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.not_processed = not_processed
        self.details = details
        self.log_ids = log_ids
        self.retry_after = retry_after


class Unsendable(OutboundError):
    """Redox would refuse this request, so it was not sent."""


class AuthenticationFailed(OutboundError):
    """Redox does not accept our API key or its token. The fault is with the key, not with what was to be sent."""


class Rejected(OutboundError):
    """Redox read the request and refuses it: by its status, or by `Meta.Errors` in an answer of 200."""


class RateLimited(OutboundError):
    """Too many requests in the rolling window: Redox said so, or our own limiter would have had to wait too long."""

    retryable = True


class RedoxUnavailable(OutboundError):
    """Redox could not be reached, or says that it cannot serve now."""

    retryable = True


class AnswerLost(OutboundError):
    """The request went out and no answer that can be read came back: Redox may have processed it.

    To send it again is to send it at least once: keep the same body.
    """

    retryable = True


class BadAnswer(AnswerLost):
    """An answer came back whole and cannot be read: it is not JSON, or lacks what the call asks for.

    Of the token endpoint it is one without a token; then `not_processed` is set.
    """


class UnusableAnswer(OutboundError):
    """The answer is one that we refuse to take: a redirect, compressed though we asked otherwise, or too large."""


class Untrusted(OutboundError):
    """The server is not proved to be Redox: its certificate is expired, unknown, or for another host."""
