"""Client library for Redox: `RedoxClient`, `RedoxAuth` for any other httpx2 client, their keys and their errors.

    from receiver.outbound import RedoxClient, oauth_key_from_file

    key = oauth_key_from_file("redox.pem", client_id="…", kid="…")
    with RedoxClient(key, source="…") as redox:
        redox.send({"Meta": {"DataModel": "PatientAdmin", "EventType": "NewPatient", "Destinations": [{"ID": "…"}]}, …})

Must not import storage, web or handlers: this library works in any script, without a database.
"""

from receiver.outbound.answers import Answer
from receiver.outbound.auth import RedoxAuth
from receiver.outbound.client import RedoxClient
from receiver.outbound.errors import (
    AnswerLost,
    AuthenticationFailed,
    BadAnswer,
    ErrorDetail,
    OutboundError,
    RateLimited,
    RedoxUnavailable,
    Rejected,
    Unsendable,
    Untrusted,
    UnusableAnswer,
)
from receiver.outbound.fhir import FhirDestination
from receiver.outbound.keys import oauth_key_from_env, oauth_key_from_file
from receiver.outbound.limits import Limits, SlidingWindow
from receiver.outbound.messages import NetworkOnramp
from receiver.protocol.api_keys import CANADA, US, LegacyKey, OAuthKey, load_oauth_key
from receiver.protocol.api_tokens import AccessToken

__all__ = [
    "CANADA",
    "US",
    "AccessToken",
    "Answer",
    "AnswerLost",
    "AuthenticationFailed",
    "BadAnswer",
    "ErrorDetail",
    "FhirDestination",
    "LegacyKey",
    "Limits",
    "NetworkOnramp",
    "OAuthKey",
    "OutboundError",
    "RateLimited",
    "RedoxAuth",
    "RedoxClient",
    "RedoxUnavailable",
    "Rejected",
    "SlidingWindow",
    "Unsendable",
    "Untrusted",
    "UnusableAnswer",
    "load_oauth_key",
    "oauth_key_from_env",
    "oauth_key_from_file",
]
