"""The pipeline: signatures over the body."""

from __future__ import annotations

import pytest

from receiver.pipeline import Admitted
from receiver.protocol.verification.hmac import HmacCredential
from tests.protocol.made_up import BODY, SECRETS, SIGNATURES, destination, inbound, signing, token
from tests.support.verdicts import SECOND, SIGNED, TOKEN, Headers, accepted, described, receive

_STAMPED = "4qD6ecSrK1yop1f/yCVjIbPlDufMTE9k90OnTaae5H4="
_WRONG = "A" * 43 + "="
BAD_SIGNATURES: dict[str, tuple[Headers, str]] = {
    "missing": ({}, "credential_missing"),
    "malformed": ({"redox-signature": "sha256=zz"}, "signature_malformed"),
    "bad base64": ({"redox-signature": "*" * 44}, "signature_malformed"),
    "wrong length": ({"redox-signature": SIGNATURES["first"][4:]}, "signature_malformed"),
    "1 MB": ({"redox-signature": "A" * 1_000_000}, "signature_malformed"),
    "a thousand": ({"redox-signature": ",".join([_WRONG] * 999 + [SIGNATURES["first"]])}, "signature_malformed"),
    "another secret's": ({"redox-signature": SIGNATURES["second"]}, "signature_wrong"),
    "non-ASCII": ({"redox-signature": "\xe9" * 44}, "signature_malformed"),
    "not the token instead": (TOKEN, "credential_insufficient"),
    "right, and a wrong token": ({**SIGNED, "verification-token": SECOND}, "token_wrong"),
    "wrong, and the right token": ({**TOKEN, "redox-signature": _WRONG}, "signature_wrong"),
}


class TestSignature:
    """Bad inputs: the signature."""

    at = destination(signing(), token(id=2), require=("hmac",))

    @pytest.mark.parametrize(("headers", "reason"), BAD_SIGNATURES.values(), ids=BAD_SIGNATURES)
    def test_bad(self, headers: Headers, reason: str) -> None:
        """A wrong signature is a 401 with its reason, never an exception."""
        assert described(receive(inbound(headers=headers), self.at)) == f"refused 401 {reason}"

    @pytest.mark.parametrize(
        "body",
        [
            BODY[:-2] + b" }",
            BODY.replace(b"Arrival", b"Arrivel"),
            b"",
            BODY.replace(
                b'"DataModel":"PatientAdmin","EventType":"Arrival"', b'"EventType":"Arrival","DataModel":"PatientAdmin"'
            ),
        ],
    )
    def test_another_body(self, body: bytes) -> None:
        """A changed byte, reordered keys or a missing body are a 401."""
        assert described(receive(inbound(body, SIGNED), self.at)) == "refused 401 signature_wrong"

    @pytest.mark.parametrize("stamp", ["1767225000", "1767226000", "NaN", "-1", "1" * 30, ""])
    def test_time_stamps(self, stamp: str) -> None:
        """A time stamp that is stale, in the future, not a number or too long is a 401."""
        at = destination(
            HmacCredential(id=1, secret=SECRETS["first"].encode(), timestamp_header="x-time"), require=("hmac",)
        )
        headers = {"redox-signature": _STAMPED, "x-time": "1767225600"}
        assert described(receive(inbound(headers=headers), at)) == "admitted"
        assert described(receive(inbound(headers={**headers, "x-time": stamp}), at)) == "refused 401 signature_stale"

    def test_three_signatures(self) -> None:
        """With three signatures, of which the last is right, the message is admitted."""
        headers = {"redox-signature": f"{_WRONG},{_WRONG},{SIGNATURES['first']}"}
        assert described(receive(inbound(headers=headers), self.at)) == "admitted"

    def test_an_exact_replay(self) -> None:
        """The same request again is the same message: it has the same key."""
        once, again = (receive(inbound(headers=SIGNED), self.at) for _ in range(2))
        assert isinstance(once, Admitted)
        assert once == again
        assert once.message is not None

    def test_both(self) -> None:
        """If both are required and right, the verdict names both credentials."""
        at = destination(signing(), token(id=2), require=("hmac+token",))
        assert accepted(TOKEN, at).whole is False
        assert accepted({**TOKEN, **SIGNED}, at).whole is True
        assert accepted({**TOKEN, **SIGNED}, at).authenticated is False
        admitted = receive(inbound(headers={**TOKEN, **SIGNED}), at)
        assert isinstance(admitted, Admitted)
        assert set(admitted.verified.credentials) == {1, 2}
