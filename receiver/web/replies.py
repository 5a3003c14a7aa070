"""Fixed replies. The audit has the reason of a refusal; the reply never shows it."""

from __future__ import annotations

from typing import Final

import msgspec

from receiver.protocol.message import Reply, error_body

JSON: Final = "application/json"
# Seconds after which a sender may repeat a request that got a 503. Redox has its own schedule; others read this.
RETRY_AFTER: Final = 5

ACCEPTED: Final = Reply(status=200)
# Status → the reply to a refused request.
REFUSALS: Final = {
    400: Reply(status=400, body=b"bad request\n"),
    401: Reply(status=401, body=b"unauthorized\n"),
    403: Reply(status=403, body=b"forbidden\n"),
    413: Reply(status=413, body=b"too large\n"),
    501: Reply(status=501, body=b"not implemented\n"),
}
UNAVAILABLE: Final = Reply(status=503, body=b"try again later\n", retry_after=RETRY_AFTER)

# Status → the text of the reply to a query without an answer. Fixed: a responder's reason may quote a patient.
FAILURES: Final = {
    400: "The query could not be read.",
    403: "The query is not allowed.",
    500: "The query failed.",
    501: "Nobody answers this query here.",
    503: "The query cannot be answered now. Try again later.",
    504: "The query was not answered in time.",
}


def query_failure(query: str, status: int) -> Reply:
    """The reply to a query without an answer, in Redox's form (Redox: `Meta.Errors`)."""
    return Reply(
        status=status,
        body=msgspec.json.encode(error_body(kind=query, text=FAILURES[status])),
        media=JSON,
        retry_after=RETRY_AFTER if status == UNAVAILABLE.status else None,
    )
