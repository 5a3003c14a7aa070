"""Exceptions of receiver.outbound.

Must not quote a token, a key, a body, or the text of Redox's errors (it may name a patient). Messages hold only
statuses, ids and fixed words. The texts are in `details`, which no repr shows.
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
    """A request to Redox failed.

    `retryable`: the same request may succeed later without a change. `not_processed`: Redox certainly did not process
    the request. `status`: the HTTP status, if there was a response. `log_ids`: `Meta.Logs[].ID`, which Redox's support
    asks for. `retry_after`: the seconds to wait that the response asked for.
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
    """Redox would reject this request, so it was not sent."""


class AuthenticationFailed(OutboundError):
    """Redox rejects the API key or its token. The cause is the key, not the request."""


class Rejected(OutboundError):
    """Redox read the request and rejects it, by its status or by `Meta.Errors` in a response with status 200."""


class RateLimited(OutboundError):
    """Too many requests in the rolling window: Redox reported it, or the wait of the client's own limiter would be too
    long.
    """

    retryable = True


class RedoxUnavailable(OutboundError):
    """Redox could not be reached, or reports that it is not available."""

    retryable = True


class AnswerLost(OutboundError):
    """The request was sent, but no readable response arrived: Redox may have processed it.

    Sending it again means at-least-once delivery: use the same body.
    """

    retryable = True


class BadAnswer(AnswerLost):
    """A complete response arrived but is not usable: it is not JSON, or lacks the data that the call asks for.

    For the token endpoint, the response contains no token; then `not_processed` is set.
    """


class UnusableAnswer(OutboundError):
    """The response is one that the client does not accept: a redirect, compressed, or too large."""


class Untrusted(OutboundError):
    """The server cannot be verified as Redox: its certificate is expired, unknown, or for another host."""
