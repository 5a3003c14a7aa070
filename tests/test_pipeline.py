"""The sentence, from bytes to a verdict: what is refused, what is answered, what is admitted; and nothing else."""

from __future__ import annotations

import dataclasses
import gzip
import json
import tracemalloc
from collections.abc import Callable, Mapping
from datetime import timedelta
from threading import Thread, stack_size
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.errors import BadTransfer, Refusal
from receiver.pipeline import (
    UNPROVED_BODY,
    Admitted,
    Challenged,
    HeadAccepted,
    Refused,
    Verdict,
    check_head,
    judge,
    replayed,
)
from receiver.protocol.message import Inbound
from receiver.protocol.registry import Destination
from receiver.protocol.verification.hmac import HmacCredential
from tests.protocol.made_up import (
    BODY,
    NOW,
    SECRETS,
    SIGNATURES,
    SOURCE,
    TOKEN_DIGESTS,
    TOKEN_KEY,
    TOKENS,
    destination,
    head,
    inbound,
    registry,
    signing,
    token,
)

Headers = Mapping[str, str]

TOKEN: Headers = {"verification-token": TOKENS["first"]}
SIGNED: Headers = {"redox-signature": SIGNATURES["first"]}
UUID = "34b8d6a5-7d0e-4b0c-9d5f-0a1b2c3d4e5f"
MAIN = destination(token())
META = b'"Meta":{"DataModel":"PatientAdmin","EventType":"Arrival","Source":{"ID":"%b"}}' % SOURCE.encode()


def receive(request: Inbound, at: Destination = MAIN) -> Verdict:
    """What an endpoint does: check the head; where it does not suffice, cut to a handshake's length; then judge."""
    accepted = check_head(request.head, registry(at), NOW)
    if isinstance(accepted, Refused):
        return accepted
    if not accepted.whole and len(request.body) > UNPROVED_BODY:
        return accepted.missing()
    return judge(accepted, request.body, NOW)


def accepted(headers: Headers, at: Destination) -> HeadAccepted:
    """A head that is let pass."""
    found = check_head(head(headers), registry(at), NOW)
    assert isinstance(found, HeadAccepted)
    return found


def handshake(challenge: object = UUID, given_token: object = TOKENS["first"]) -> bytes:
    """The body of a POST handshake; None leaves a member out."""
    values = {"verification-token": given_token, "challenge": challenge}
    return json.dumps({name: value for name, value in values.items() if value is not None}).encode()


def said(verdict: Verdict) -> str:
    """A verdict in a few words."""
    match verdict:
        case Refused():
            return f"refused {verdict.status} {verdict.reason}"
        case Challenged():
            return f"challenged {verdict.challenge}"
        case Admitted(quarantine=None):
            return "admitted"
        case Admitted():
            return f"quarantined {verdict.quarantine}"


class TestDestination:
    """Which destination, and whether it is open."""

    @pytest.mark.parametrize(
        ("method", "headers", "body"), [("POST", TOKEN, BODY), ("POST", {}, handshake()), ("GET", TOKEN, b"")]
    )
    def test_unknown_or_disabled(self, method: Any, headers: Headers, body: bytes) -> None:
        """A destination that is not there, or closed, is refused like a wrong token, by its head."""
        closed = registry(destination(token(), enabled=False))
        for known, name, reason in ((closed, "main", "destination_disabled"), (closed, "other", "destination_unknown")):
            request = inbound(body, headers, method=method, name=name)
            refused = check_head(request.head, known, NOW)
            assert isinstance(refused, Refused)
            assert (refused.reason, refused.status, refused.body) == (reason, 401, None)

    def test_credentials_are_its_own(self) -> None:
        """One destination's token is another's wrong one."""
        known = registry(MAIN, destination(token("second", id=2), name="other"))
        assert isinstance(check_head(head(TOKEN), known, NOW), HeadAccepted)
        refused = check_head(head(TOKEN, name="other"), known, NOW)
        assert isinstance(refused, Refused)
        assert said(refused) == "refused 401 token_wrong"


class TestTransfer:
    """What is refused for how it arrives."""

    def test_a_body_that_nothing_vouches_for(self) -> None:
        """More than a handshake's bytes, with nothing in the head that could suffice: 401, with no look inside."""
        for at, headers in ((MAIN, {}), (destination(token(), signing(), require=("hmac+token",)), TOKEN)):
            refused = receive(inbound(handshake() + b" " * UNPROVED_BODY, headers), at)
            assert said(refused) == "refused 401 credential_missing"
            assert isinstance(refused, Refused)
            assert refused.destination is at
            assert refused.body is None

    def test_a_bad_transfer(self) -> None:
        """What did not arrive whole keeps its own reason and status."""
        refused = accepted({}, MAIN).not_received(BadTransfer("body_too_large", status_hint=413))
        assert (said(refused), refused.destination) == ("refused 413 body_too_large", MAIN)
        assert accepted(TOKEN, MAIN).not_received(BadTransfer("body_incomplete")).status == 400


_FIRST, _SECOND = TOKENS["first"], TOKENS["second"]

# Headers, and the reason why they are refused.
BAD_TOKENS: dict[str, tuple[Headers, str]] = {
    "none": ({}, "credential_missing"),
    "wrong": ({"verification-token": "x" * 36}, "token_wrong"),
    "empty": ({"verification-token": ""}, "token_wrong"),
    "non-ASCII": ({"verification-token": "tok\xe9n"}, "token_wrong"),
    "right, then wrong": ({"verification-token": f"{_FIRST},{_SECOND}"}, "token_wrong"),
    "wrong, then right": ({"verification-token": f"{_SECOND},{_FIRST}"}, "token_wrong"),
    "padded": ({"verification-token": f" {_FIRST} "}, "token_wrong"),
    "other case": ({"verification-token": _FIRST.title()}, "token_wrong"),
    "a prefix": ({"verification-token": _FIRST[:-1]}, "token_wrong"),
    "another opaque Bearer": ({**TOKEN, "authorization": f"Bearer {_SECOND}"}, "bearer_differs"),
    "a wrong Bearer alone": ({"authorization": f"Bearer {_SECOND}"}, "token_wrong"),
    "in a header of another name": ({"x-verification-token": _FIRST}, "credential_missing"),
    "from a forged address": ({"x-forwarded-for": "127.0.0.1", "x-real-ip": "::1"}, "credential_missing"),
}


class TestToken:
    """Bad inputs: the token."""

    @pytest.mark.parametrize(("headers", "reason"), BAD_TOKENS.values(), ids=BAD_TOKENS)
    @pytest.mark.parametrize("body", [BODY, b"", b"{}", BODY + b" " * UNPROVED_BODY])
    def test_bad(self, headers: Headers, reason: str, body: bytes) -> None:
        """Every cause is a 401 with its reason for the audit, whatever the body."""
        assert said(receive(inbound(body, headers))) == f"refused 401 {reason}"

    def test_in_the_query_of_a_post(self) -> None:
        """A token in the query string counts for a GET handshake alone."""
        for body in (BODY, handshake(given_token=None)):
            request = inbound(body, query=f"verification-token={_FIRST}&challenge={UUID}")
            assert said(receive(request)) == "refused 401 credential_missing"

    def test_while_one_rotates(self) -> None:
        """The previous token is accepted until it ends, and the verdict names which one it was."""
        at = destination(token("first", id=1, expires_at=NOW + timedelta(hours=1)), token("second", id=2))
        for given_token, credential in ((_FIRST, 1), (_SECOND, 2)):
            admitted = receive(inbound(headers={"verification-token": given_token}), at)
            assert isinstance(admitted, Admitted)
            assert admitted.verified.credentials == (credential,)

    @pytest.mark.parametrize(
        ("credential", "reason"), [(token(revoked=True), "token_revoked"), (token(expires_at=NOW), "token_expired")]
    )
    def test_revoked_or_expired(self, credential: Any, reason: str) -> None:
        """A token that has ended opens neither for a message nor for a handshake in either form."""
        at = destination(credential, token("second", id=2))
        for request in (
            inbound(headers=TOKEN),
            inbound(handshake()),
            inbound(handshake(given_token=None), TOKEN),
            inbound(b"", TOKEN, method="GET", query=f"challenge={UUID}"),
        ):
            assert said(receive(request, at)) == f"refused 401 {reason}"

    def test_beside_a_jwt(self) -> None:
        """A linked auth credential takes `Authorization`; the token in its own header suffices beside it."""
        assert said(receive(inbound(headers={**TOKEN, "authorization": "Bearer a.b.c"}))) == "admitted"
        assert said(receive(inbound(headers={"authorization": "Bearer a.b.c"}))) == "refused 401 credential_missing"


HARMLESS = "refused 400 challenge_malformed"
# Challenges that are never echoed, also with the right token.
BAD_CHALLENGES: dict[str, object] = {
    "HTML": "<script>alert(1)</script>",
    "CRLF": "a\r\nSet-Cookie: a=b",
    "long": "a" * 5_000,
    "an array": [UUID],
    "an object": {"challenge": UUID},
    "null": "\0",
    "empty": "",
    "a number": 7,
    "a space": "a b",
    "missing": None,
}


class TestHandshake:
    """Bad inputs: the handshake. Good ones too."""

    @pytest.mark.parametrize(
        "request_",
        [
            inbound(handshake()),
            inbound(handshake(), TOKEN),
            inbound(handshake(given_token=None), TOKEN),
            inbound(handshake(), {**TOKEN, "authorization": f"Bearer {_FIRST}", "application-name": "RedoxEngine"}),
            inbound(b"", method="GET", query=f"challenge={UUID}&verification-token={_FIRST}"),
            inbound(b"", TOKEN, method="GET", query=f"challenge={UUID}"),
            inbound(b"", {"authorization": f"Bearer {_FIRST}"}, method="GET", query=f"challenge={UUID}"),
            inbound(handshake(given_token=None), {"authorization": f"bearer  {_FIRST}"}),
            inbound(b"ignored", TOKEN, method="GET", query=f"challenge={UUID}&verification-token={_FIRST}"),
        ],
    )
    @pytest.mark.parametrize("require", [("token",), ("hmac",), ("hmac+token",), ("hmac", "token"), ()])
    def test_right(self, request_: Inbound, require: tuple[str, ...]) -> None:
        """With the right token the challenge is echoed, wherever both stand, and whatever else messages require."""
        at = destination(token(id=5), signing(), require=require)
        challenged = receive(request_, at)
        assert challenged == Challenged(challenge=UUID, head=request_.head, destination=at, credential=5)

    def test_replayed(self) -> None:
        """The same handshake again gets the same answer: it changes nothing that a second one could double."""
        assert receive(inbound(handshake())) == receive(inbound(handshake()))

    @pytest.mark.parametrize(
        ("request_", "reason"),
        [
            (inbound(handshake(given_token="x" * 36)), "token_wrong"),
            (inbound(handshake(given_token="")), "token_wrong"),
            (inbound(handshake(given_token="tökén")), "token_wrong"),
            (inbound(handshake(given_token=5)), "credential_missing"),
            (inbound(handshake(given_token=[_FIRST])), "credential_missing"),
            (inbound(handshake(given_token=None)), "credential_missing"),
            (inbound(handshake(), {"verification-token": _SECOND}), "token_wrong"),
            (inbound(handshake(), {"authorization": f"Bearer {_SECOND}"}), "token_wrong"),
            (inbound(b"", method="GET"), "credential_missing"),
            (inbound(b"", method="GET", query=f"challenge={UUID}"), "credential_missing"),
            (inbound(b"", method="GET", query=f"challenge={UUID}&verification-token=x"), "token_wrong"),
            (inbound(b"", method="GET", query=f"challenge={UUID}&verification-token="), "token_wrong"),
            (inbound(b"", {"verification-token": "x"}, method="GET", query=f"challenge={UUID}"), "token_wrong"),
            (
                inbound(b"", {"authorization": f"Bearer {_SECOND}"}, method="GET", query=f"challenge={UUID}"),
                "token_wrong",
            ),
            (
                inbound(b"", {"authorization": f"Basic {_FIRST}"}, method="GET", query=f"challenge={UUID}"),
                "credential_missing",
            ),
            (
                inbound(
                    b"",
                    {"verification-token": "x", "authorization": f"Bearer {_FIRST}"},
                    method="GET",
                    query=f"challenge={UUID}",
                ),
                "token_wrong",
            ),
            (inbound(b"", TOKEN, method="GET", query=f"challenge={UUID}&verification-token=x"), "token_wrong"),
            (
                inbound(
                    b"",
                    {"verification-token": "x"},
                    method="GET",
                    query=f"challenge={UUID}&verification-token={_FIRST}",
                ),
                "token_wrong",
            ),
        ],
    )
    def test_wrong(self, request_: Inbound, reason: str) -> None:
        """Without the right token, or beside a wrong one, nothing is echoed: 401."""
        assert said(receive(request_)) == f"refused 401 {reason}"

    def test_without_a_token_of_the_destination(self) -> None:
        """Where no token is registered no handshake succeeds, also by another kind's credential."""
        at = destination(signing(), require=("hmac",))
        assert said(receive(inbound(handshake()), at)) == "refused 401 token_wrong"
        # openssl dgst -sha256 -hmac "$SECRET" -binary handshake | base64, the first secret.
        signed = {"redox-signature": "Ux+A73jp9HSN/IHgbQzPZ+G4C9lySBtfhg5tnFWt2DA="}
        assert said(receive(inbound(handshake(), signed), at)) == "quarantined no_meta"

    @pytest.mark.parametrize("challenge", BAD_CHALLENGES.values(), ids=BAD_CHALLENGES)
    def test_bad_challenges(self, challenge: object) -> None:
        """Nothing but a harmless text is echoed: 400, or 401 where there is no token."""
        assert said(receive(inbound(handshake(challenge)))) == HARMLESS
        assert said(receive(inbound(handshake(challenge, None)))) == "refused 401 credential_missing"

    @pytest.mark.parametrize(
        "query",
        [
            "challenge=%3Cscript%3E",
            "challenge=a%0d%0ab",
            "challenge=",
            "challenge=%ff",
            "",
            "challenge=" + "a" * 1_000_000,
            "&".join(["challenge=a"] * 1_000),
        ],
    )
    def test_bad_challenges_by_get(self, query: str) -> None:
        """The same in a query string, with the right token in the header."""
        assert said(receive(inbound(b"", TOKEN, method="GET", query=query))) == HARMLESS

    def test_a_megabyte(self) -> None:
        """A challenge of 1 MB without a token in the head is not read; with one it is no handshake, and kept."""
        body = handshake("a" * 1_000_000)
        assert said(receive(inbound(body))) == "refused 401 credential_missing"
        assert said(receive(inbound(body, TOKEN))) == "quarantined no_meta"

    @pytest.mark.parametrize("challenge", BAD_CHALLENGES.values(), ids=BAD_CHALLENGES)
    def test_a_message_that_looks_like_one(self, challenge: object) -> None:
        """What its head proves and is no good handshake may be a message of unforeseen shape: kept, not refused.

        A refusal would pause the whole feed.
        """
        for given_token in (None, _FIRST, _SECOND):
            assert said(receive(inbound(handshake(challenge, given_token), TOKEN))) == "quarantined no_meta"

    def test_beside_a_wrong_token_nothing_is_echoed(self) -> None:
        """Right in the head, wrong in the body: authentic, so kept, but the challenge is not answered."""
        assert said(receive(inbound(handshake(given_token=_SECOND), TOKEN))) == "quarantined no_meta"

    def test_what_does_not_suffice_is_not_kept(self) -> None:
        """Where messages require more than a token, a bad handshake with the right one is refused, not kept."""
        at = destination(token(), signing(), require=("hmac+token",))
        assert said(receive(inbound(handshake("a b"), TOKEN), at)) == HARMLESS
        assert said(receive(inbound(handshake("a b", _SECOND), TOKEN), at)) == "refused 401 token_wrong"

    def test_a_message_with_a_challenge_is_a_message(self) -> None:
        """A member of that name makes no handshake of a message."""
        for body in (b'{"challenge":"%b",%b}' % (UUID.encode(), META), b'{"x":{"challenge":"a"},%b}' % META):
            assert said(receive(inbound(body, TOKEN))) == "admitted"


# { printf '%s' "$STAMP."; cat body; } | openssl dgst -sha256 -hmac "$SECRET" -binary | base64, STAMP 1767225600.
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
    "right, and a wrong token": ({**SIGNED, "verification-token": _SECOND}, "token_wrong"),
    "wrong, and the right token": ({**TOKEN, "redox-signature": _WRONG}, "signature_wrong"),
}


class TestSignature:
    """Bad inputs: the signature."""

    at = destination(signing(), token(id=2), require=("hmac",))

    @pytest.mark.parametrize(("headers", "reason"), BAD_SIGNATURES.values(), ids=BAD_SIGNATURES)
    def test_bad(self, headers: Headers, reason: str) -> None:
        """401 with its reason, never an exception."""
        assert said(receive(inbound(headers=headers), self.at)) == f"refused 401 {reason}"

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
        """One byte changed, the keys reordered, no body at all: 401."""
        assert said(receive(inbound(body, SIGNED), self.at)) == "refused 401 signature_wrong"

    @pytest.mark.parametrize("stamp", ["1767225000", "1767226000", "NaN", "-1", "1" * 30, ""])
    def test_time_stamps(self, stamp: str) -> None:
        """Stale, in the future, no number, far too long: 401."""
        at = destination(
            HmacCredential(id=1, secret=SECRETS["first"].encode(), timestamp_header="x-time"), require=("hmac",)
        )
        headers = {"redox-signature": _STAMPED, "x-time": "1767225600"}
        assert said(receive(inbound(headers=headers), at)) == "admitted"
        assert said(receive(inbound(headers={**headers, "x-time": stamp}), at)) == "refused 401 signature_stale"

    def test_three_signatures(self) -> None:
        """Three signatures, the last one right: admitted."""
        headers = {"redox-signature": f"{_WRONG},{_WRONG},{SIGNATURES['first']}"}
        assert said(receive(inbound(headers=headers), self.at)) == "admitted"

    def test_an_exact_replay(self) -> None:
        """The very same request again is the same message: one key, so that it is recorded once."""
        once, again = (receive(inbound(headers=SIGNED), self.at) for _ in range(2))
        assert isinstance(once, Admitted)
        assert once == again
        assert once.message is not None

    def test_both(self) -> None:
        """Where both are required and both are right, the verdict names both credentials."""
        at = destination(signing(), token(id=2), require=("hmac+token",))
        assert accepted(TOKEN, at).whole is False
        assert accepted({**TOKEN, **SIGNED}, at).whole is True
        assert accepted({**TOKEN, **SIGNED}, at).authenticated is False
        admitted = receive(inbound(headers={**TOKEN, **SIGNED}), at)
        assert isinstance(admitted, Admitted)
        assert set(admitted.verified.credentials) == {1, 2}


def test_what_vouches_for_a_body_before_it_is_read() -> None:
    """A token does; nothing does in a handshake by GET, which has no body."""
    assert accepted(TOKEN, MAIN).authenticated is True
    asked = check_head(head(TOKEN, method="GET"), registry(MAIN), NOW)
    assert isinstance(asked, HeadAccepted)
    assert (asked.whole, asked.authenticated) == (False, False)


def message(members: bytes) -> bytes:
    """A message with these members beside its Meta."""
    return b"{%b,%b}" % (META, members)


def nested(levels: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    """A message of that depth."""
    return message(b'"x":' + opening * levels + b"0" + closing * levels)


# Bodies, and the reason why they are quarantined.
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "HTML": (b"<!doctype html><title>502</title>", "not_json"),
    "truncated JSON": (BODY[:-5], "not_json"),
    "trailing data": (BODY + b"x", "not_json"),
    "two documents": (BODY + BODY, "not_json"),
    "100,000 nested arrays": (nested(100_000), "too_deep"),
    "100,000 arrays that never close": (b'{"Meta":' + b"[" * 100_000, "too_deep"),
    "5,000 nested arrays": (nested(5_000), "too_deep"),
    "5,000 nested objects": (nested(5_000, b'{"a":', b"}"), "too_deep"),
    "5,000 levels behind an escape": (message(b'"a":"\\n","x":' + b"[" * 5_000 + b"]" * 5_000 + b',"b":1'), "too_deep"),
    "5,000 levels in Meta": (b'{"Meta":{"x":' + b"[" * 5_000 + b"]" * 5_000 + b"}}", "too_deep"),
    "NaN": (message(b'"x":NaN'), "not_json"),
    "Infinity": (message(b'"x":[-Infinity]'), "not_json"),
    "duplicate keys at the top": (message(b'"x":1,"x":2'), "top_duplicate_key"),
    "Meta twice": (b"{%b,%b}" % (META, META), "top_duplicate_key"),
    "Meta twice, once escaped": (b'{%b,"M\\u0065ta":{}}' % META, "top_duplicate_key"),
    "duplicate keys in Meta": (BODY.replace(b'"Source"', b'"Source":{"ID":"x"},"Source"'), "meta_duplicate_key"),
    "bad UTF-8": (message(b'"x":"\xff"'), "not_utf8"),
    "bad UTF-8 in a key": (message(b'"\xc3(":1'), "not_utf8"),
    "UTF-8 of a surrogate": (message(b'"x":"\xed\xa0\x80"'), "not_utf8"),
    "UTF-16": (BODY.decode().encode("utf-16"), "not_utf8"),
    "UTF-16 without a mark": ("{}".encode("utf-16-be"), "not_json"),
    "a byte order mark": (b"\xef\xbb\xbf" + BODY, "not_json"),
    "a lone surrogate": (message(b'"x":"\\ud800"'), "not_json"),
    "a lone surrogate in a key": (message(b'"\\udc00":[]'), "not_json"),
    "a raw line feed in a string": (message(b'"x":"\n"'), "not_json"),
    "a raw NUL": (message(b'"x":"\0"'), "not_json"),
    "a list": (b"[%b]" % BODY, "top_not_object"),
    "a string": (b'"Meta"', "top_not_object"),
    "null": (b"null", "top_not_object"),
    "no Meta": (b'{"Patient":{}}', "no_meta"),
    "Meta a list": (b'{"Meta":[{"DataModel":"A","EventType":"B"}]}', "meta_not_object"),
    "DataModel a number": (BODY.replace(b'"PatientAdmin"', b"7"), "kind_malformed"),
    "DataModel of 10 KB": (BODY.replace(b"PatientAdmin", b"x" * 10_240), "kind_malformed"),
    "EventType null": (BODY.replace(b'"Arrival"', b"null"), "kind_missing"),
    "gzip": (gzip.compress(BODY), "not_utf8"),
    "a form": (b"&".join(b"k%d=v" % n for n in range(100_000)), "not_json"),
    "XML": (b'<?xml version="1.0"?><ClinicalDocument/>', "not_json"),
    "a FHIR resource": (b'{"resourceType":"Patient"}', "fhir_not_message"),
}
READABLE: dict[str, bytes] = {
    "200 levels": nested(199),
    "an integer of 30 digits": message(b'"x":' + b"1" * 30),
    "an integer of 5,000 digits": message(b'"x":' + b"1" * 5_000),
    "1e400": message(b'"x":[1e400,-1E999]'),
    "duplicate keys deeper down": message(b'"x":{"a":1,"a":2}'),
    "NUL in values, keys and ids": BODY.replace(b'"Source"', b'"FacilityCode":"a\\u0000b","Source"')
    .replace(b"Note", b"No\\u0000te")
    .replace(b"\xc3\xa9", b"\\u0000"),
    "an unknown DataModel": BODY.replace(b"PatientAdmin", b"NeverHeardOf"),
    "a URL to a metadata service": message(b'"x":"http://169.254.169.254/latest/meta-data/"'),
    "injections": message(
        json.dumps(
            {"x": ["' OR 1=1 --", "{{7*7}}", "${jndi:ldap://x}", "=cmd|' /C calc'!A0", "<script>", "\n\x1b[31m\u202e"]}
        ).encode()[1:-1]
    ),
    "a year of five digits": BODY.replace(b'"Source"', b'"EventDateTime":"99999-01-01T00:00:00Z","Source"'),
    "the year 0": BODY.replace(b'"Source"', b'"EventDateTime":"0000-01-01T00:00:00Z","Source"'),
    "space all around": b"\r\n\t " + BODY + b" \n",
}


class TestBody:
    """Bad inputs: the body, with the right token."""

    @pytest.mark.parametrize(("body", "reason"), UNREADABLE.values(), ids=UNREADABLE)
    def test_unreadable(self, body: bytes, reason: str) -> None:
        """Authentic but unreadable: admitted to quarantine with its reason and its exact bytes."""
        request = inbound(body, TOKEN)
        verdict = receive(request)
        assert isinstance(verdict, Admitted)
        assert (verdict.quarantine, verdict.message, verdict.query) == (reason, None, None)
        assert verdict.inbound.body is body

    @pytest.mark.parametrize("body", READABLE.values(), ids=READABLE)
    def test_readable(self, body: bytes) -> None:
        """Odd, but a message like any other: admitted with its exact bytes."""
        verdict = receive(inbound(body, TOKEN))
        assert isinstance(verdict, Admitted)
        assert verdict.quarantine is None
        assert verdict.message is not None
        assert verdict.message.raw is body

    def test_ten_thousand_kinds(self) -> None:
        """10,000 event types are 10,000 kinds, each a short name that a label could hold."""
        kinds = set()
        for n in range(10_000):
            verdict = receive(inbound(BODY.replace(b"Arrival", b"Arrival%d" % n), TOKEN))
            assert isinstance(verdict, Admitted)
            assert verdict.message is not None
            kinds.add(verdict.message.kind)
        assert len(kinds) == 10_000
        assert max(map(len, kinds)) < 202

    @pytest.mark.parametrize(
        ("make", "bound"),
        [
            (lambda: message(b'"x":"' + b"A" * 40_000_000 + b'"'), 1),
            (lambda: message(b'"x":{' + b",".join(b'"k%d":%d' % (n, n) for n in range(1_000_000)) + b"}"), 4),
            (lambda: message(b",".join(b'"k%d":%d' % (n, n) for n in range(200_000))), 4),
            (
                lambda: (
                    b'{"Meta":{"DataModel":"A","EventType":"B",%b,"Source":{"ID":"%b"}}}'
                    % (b",".join(b'"k%d":%d' % (n, n) for n in range(200_000)), SOURCE.encode())
                ),
                4,
            ),
            *(
                (
                    lambda text=text: text.replace(b"~", b"{}" + b",{}" * 1_000_000).replace(
                        b"SOURCE", SOURCE.encode()
                    ),
                    4,
                )
                for text in (
                    (
                        b'{"Meta":{"DataModel":"A","EventType":"B","Source":{"ID":"SOURCE","x":[~]},'
                        b'"Logs":[{"ID":"1","x":[~]},~]}}'
                    ),
                    (
                        b'{"Meta":{"DataModel":"A","EventType":"B","Source":{"ID":"SOURCE"},"Test":false,'
                        b'"FacilityCode":[~]}}'
                    ),
                    (
                        b'{"resourceType":"Bundle","type":"message","entry":['
                        b'{"resource":{"resourceType":"MessageHeader","eventUri":"a/B",'
                        b'"source":{"endpoint":"SOURCE"}}},~]}'
                    ),
                    (
                        b'{"resourceType":"Bundle","type":"message","entry":['
                        b'{"x":[~],"resource":{"eventUri":"a/B","x":[~],"resourceType":"MessageHeader",'
                        b'"source":{"x":[~],"endpoint":"SOURCE"},"eventCoding":[~]}}]}'
                    ),
                )
            ),
        ],
        ids=[
            "one string of 40 MB",
            "a million keys",
            "200,000 keys at the top",
            "200,000 keys in Meta",
            "lists in Meta",
            "a list for a name",
            "entries",
            "lists in a MessageHeader",
        ],
    )
    def test_memory(self, make: Callable[[], bytes], bound: float) -> None:
        """40 MB in one string, a million keys, and lists of millions are admitted; judging takes a few times the body's
        memory at most."""
        body = make()
        tracemalloc.start()
        verdict = receive(inbound(body, TOKEN))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert said(verdict) == "admitted"
        assert peak < bound * len(body)

    def test_a_million_keys_at_the_top(self) -> None:
        """So are a million keys of the outermost object, each of which is looked at."""
        body = message(b",".join(b'"k%d":%d' % (n, n) for n in range(1_000_000)))
        assert said(receive(inbound(body, TOKEN))) == "admitted"

    def test_in_a_thread_of_a_small_stack(self) -> None:
        """Depth needs no stack: in a thread of 256 KB every body gets the verdict that it gets in the main thread."""
        verdicts: list[str] = []
        bodies = [
            nested(100_000),
            nested(5_000, b'{"a":', b"}"),
            nested(199),
            b'{"challenge":' + b"[" * 4_000 + b"]" * 4_000,
        ]

        def work() -> None:
            verdicts.extend(said(receive(inbound(body, headers))) for body in bodies for headers in (TOKEN, {}))

        before = stack_size(256 * 1024)
        try:
            thread = Thread(target=work)
            thread.start()
        finally:
            stack_size(before)
        thread.join()
        missing = "refused 401 credential_missing"
        assert verdicts == [
            "quarantined too_deep",
            missing,
            "quarantined too_deep",
            missing,
            "admitted",
            missing,
            "quarantined too_deep",
            missing,
        ]


class TestSource:
    """After verification: whether the source may in."""

    @pytest.mark.parametrize(
        ("claimed", "normal", "reason"),
        [
            (
                b'{"ID":"11111111-2222-4333-8444-555555555555"}',
                "11111111-2222-4333-8444-555555555555",
                "source_unknown",
            ),
            (b'{"ID":"Ann Example, born 1950"}', "Ann Example, born 1950", "source_unknown"),
            (b"null", None, "source_missing"),
        ],
    )
    def test_refused(self, claimed: bytes, normal: str | None, reason: str) -> None:
        """403 with the proof and the id that was claimed, raw: whoever keeps it looks at its shape first."""
        body = BODY.replace(b'{"ID":"%b"}' % SOURCE.encode(), claimed)
        refused = receive(inbound(body, TOKEN))
        assert isinstance(refused, Refused)
        assert (refused.status, refused.reason, refused.claimed_source) == (403, reason, normal)
        assert refused.verified is not None
        assert refused.verified.credentials == (1,)
        assert refused.query is None
        assert refused.body is body
        assert normal is None or normal not in repr(refused)

    @pytest.mark.parametrize(
        ("policies", "expected"),
        [
            ({"sources": {}, "on_unknown_source": "quarantine"}, "quarantined source_unknown"),
            ({"sources": {}, "sources_policy": "any"}, "admitted"),
            ({"sources": {SOURCE: False}}, "refused 403 source_disabled"),
        ],
    )
    def test_policies(self, policies: dict[str, Any], expected: str) -> None:
        """What the destination says about sources is what happens; what is kept back has been read all the same."""
        verdict = receive(inbound(headers=TOKEN), destination(token(), **policies))
        assert said(verdict) == expected
        assert isinstance(verdict, Refused | Admitted)
        assert isinstance(verdict, Refused) or verdict.message is not None

    @pytest.mark.parametrize(
        ("policy", "expected"),
        [("accept", "admitted"), ("quarantine", "quarantined test_message"), ("reject", "refused 403 test_rejected")],
    )
    def test_tests(self, policy: str, expected: str) -> None:
        """Messages that are tests go as the destination says."""
        body = BODY.replace(b'"Source"', b'"Test":true,"Source"')
        assert said(receive(inbound(body, TOKEN), destination(token(), test_messages=policy))) == expected


class TestQuery:
    """Somebody waits for the answer."""

    body = BODY.replace(b"PatientAdmin", b"PatientSearch").replace(b"Arrival", b"Query")

    def test_a_replay(self) -> None:
        """A signed query that was seen before is refused; its body is only told by its digest."""
        admitted = receive(inbound(self.body, TOKEN))
        assert isinstance(admitted, Admitted)
        refused = replayed(admitted)
        assert (refused.reason, refused.status, refused.body) == ("signature_replayed", 401, self.body)

    def test_admitted(self) -> None:
        """An admitted query says so, and nothing else does."""
        verdicts = [receive(inbound(body, TOKEN)) for body in (self.body, BODY)]
        assert [verdict.query for verdict in verdicts if isinstance(verdict, Admitted)] == ["PatientSearch.Query", None]

    def test_refused(self) -> None:
        """A query of an unknown source is refused whatever the policy, and its asker can be told."""
        refused = receive(inbound(self.body, TOKEN), destination(token(), sources={}, on_unknown_source="quarantine"))
        assert isinstance(refused, Refused)
        assert (refused.status, refused.query) == (403, "PatientSearch.Query")

    def test_unreadable(self) -> None:
        """A query that cannot be read for its duplicate keys is kept, and its asker can be told."""
        verdict = receive(inbound(self.body[:-1] + b',"x":1,"x":2}', TOKEN))
        assert isinstance(verdict, Admitted)
        assert (verdict.quarantine, verdict.query) == ("top_duplicate_key", "PatientSearch.Query")

    def test_unproved(self) -> None:
        """Who is not proved to be Redox is told nothing in Redox's shape."""
        refused = receive(inbound(self.body))
        assert isinstance(refused, Refused)
        assert refused.query is None


# Bytes in all states of being a message: noise, JSON of any shape, and a message with a few bytes damaged.
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["Meta", "challenge"]), inner),
    max_leaves=8,
)
_META = st.dictionaries(
    st.sampled_from(
        ["DataModel", "EventType", "EventDateTime", "Test", "Source", "Logs", "Message", "Transmission", "FacilityCode"]
    ),
    _JSON | st.just("New"),
)
_HEADER = st.dictionaries(
    st.sampled_from(["resourceType", "eventUri", "eventCoding", "source", "code"]), _JSON | st.just("MessageHeader")
)
_SHAPED = st.one_of(
    st.builds(lambda meta, beside: {"Meta": meta, **beside}, _META, st.dictionaries(st.text(), _JSON)),
    _HEADER.map(lambda header: {"resourceType": "Bundle", "type": "message", "entry": [{"resource": header}]}),
)


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    body = bytearray(draw(st.sampled_from([BODY, handshake(), *READABLE.values()])))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(body)))
        piece = draw(st.binary(max_size=2) | st.sampled_from([b'"', b"\\", b"{", b"]", b","]))
        body[at : at + draw(st.integers(0, 2))] = piece
    return bytes(body)


_BODIES = st.binary() | st.one_of(_JSON, _SHAPED).map(lambda value: json.dumps(value).encode()) | _damaged()
_HEADERS = st.dictionaries(
    st.sampled_from(["verification-token", "authorization", "redox-signature", "x-time", "content-type"])
    | st.text(max_size=9),
    st.text(max_size=60) | st.sampled_from([_FIRST, _SECOND, f"Bearer {_FIRST}", SIGNATURES["first"], "1767225600"]),
)
_DESTINATIONS = st.sampled_from(
    [
        MAIN,
        destination(signing(), require=("hmac",)),
        destination(token(), signing(id=2), require=("hmac+token",)),
        destination(token(), signing(id=2), require=("hmac", "token"), sources_policy="any"),
        destination(),
        destination(
            HmacCredential(id=1, secret=b"x", timestamp_header="x-time", encoding="base64url"), require=("hmac",)
        ),
        destination(token(), on_unknown_source="quarantine", test_messages="reject", sources={}),
    ]
)


class TestAnything:
    """Whatever comes there is one verdict, and no exception."""

    @given(_BODIES)
    @settings(max_examples=400)
    def test_any_body_with_the_right_token(self, body: bytes) -> None:
        """With the right token any bytes are admitted, or are a handshake, where every source may in."""
        verdict = receive(inbound(body, TOKEN), destination(token(), sources_policy="any"))
        assert isinstance(verdict, Admitted | Challenged)
        if isinstance(verdict, Admitted):
            assert verdict.inbound.body == body
            assert (verdict.message is None) <= (verdict.quarantine is not None)

    @given(_HEADERS, _BODIES, _DESTINATIONS, st.sampled_from(["GET", "POST"]), st.text(max_size=60))
    @settings(max_examples=400)
    def test_any_request(self, headers: Headers, body: bytes, at: Destination, method: Any, query: str) -> None:
        """Any request gets a verdict, at any destination; a refusal has a status of the table."""
        verdict = receive(inbound(body, headers, method=method, query=query), at)
        assert isinstance(verdict, Refused | Challenged | Admitted)
        if isinstance(verdict, Refused):
            assert verdict.status in {400, 401, 403}

    @given(_HEADERS, _BODIES, _DESTINATIONS)
    def test_head_and_whole_agree(self, headers: Headers, body: bytes, at: Destination) -> None:
        """What is admitted has a head that could suffice. Where the head alone authenticates, no body changes the
        verdict, unless a signature over it was sent.
        """
        checked = check_head(head(headers), registry(at), NOW)
        if isinstance(checked, HeadAccepted):
            judged = judge(checked, body, NOW)
            if isinstance(judged, Admitted):
                assert checked.whole
            if checked.authenticated:
                refused = isinstance(judged, Refused) and judged.status == 401 and judged.verified is None
                assert not refused or b"challenge" in body or "signature" in getattr(judged, "reason", "")


class TestNothingLeaks:
    """Bodies, tokens and header values stand where they must, and nowhere else."""

    canary = "CANARY-of-a-patient"
    everywhere = BODY.replace("é".encode(), canary.encode()).replace(b'"Source"', b'"FacilityCode":null,"Source"')
    query = f"challenge={UUID}&verification-token={_FIRST}&more={canary}"

    @pytest.mark.parametrize(
        "request_",
        [
            inbound(everywhere, {**TOKEN, "x-more": canary}),
            inbound(everywhere, {"verification-token": canary}),
            inbound(everywhere, {"x-more": canary}),
            inbound(everywhere[:-1], TOKEN),
            inbound(everywhere.replace(SOURCE.encode(), canary.encode()), TOKEN),
            inbound(handshake(canary), TOKEN),
            inbound(handshake(_FIRST, _FIRST)),
            inbound(handshake(canary, canary)),
            inbound(handshake("a b", _FIRST)),
            inbound(everywhere, {**TOKEN, "redox-signature": canary}),
            inbound(b"", method="GET", query=query),
        ],
    )
    def test_no_repr_shows_them(self, request_: Inbound) -> None:
        """The repr of a request, of its head and of every verdict shows no body, token, header value or query."""
        at = destination(token(), signing(id=2))
        known = registry(at)
        shown = [
            repr(each)
            for each in (request_, request_.head, known, check_head(request_.head, known, NOW), receive(request_, at))
        ]
        secrets = [self.canary, *TOKENS.values(), *TOKEN_DIGESTS.values(), TOKEN_KEY.decode(), *SECRETS.values()]
        assert not [secret for secret in secrets for text in shown if secret in text]

    @pytest.mark.parametrize(
        ("body", "headers"),
        [
            (everywhere, {}),
            (everywhere, {"verification-token": "x"}),
            (handshake(canary, "x"), {}),
            (handshake(f"{canary}!", _FIRST), {}),
            (everywhere.replace(SOURCE.encode(), b"unknown"), TOKEN),
        ],
    )
    def test_a_refusal_carries_the_body_in_one_place(self, body: bytes, headers: Headers) -> None:
        """Of a refused body nothing is anywhere but in `body`, whose length and digest are all that is to be kept."""
        refused = receive(inbound(body, headers))
        assert isinstance(refused, Refused)
        assert refused.body is (None if "verification-token" in headers and headers != TOKEN else body)
        assert self.canary not in str(dataclasses.asdict(dataclasses.replace(refused, body=None)))

    @pytest.mark.parametrize("body", [everywhere[:-1], b"\xff" + everywhere, everywhere.replace(b"{", b'{"a":NaN,', 1)])
    def test_no_error_quotes_them(self, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        """The refusals and what they were raised from say where and what, not which text."""
        raised: list[BaseException] = []
        plain = Refusal.__init__

        def remembering(self: Refusal, *args: Any, **values: Any) -> None:
            plain(self, *args, **values)
            raised.append(self)

        monkeypatch.setattr(Refusal, "__init__", remembering)
        receive(inbound(body, TOKEN))
        assert raised
        chain = [each for error in raised for each in (error, error.__cause__, error.__context__) if each is not None]
        assert not [error for error in chain if self.canary in str(error)]
