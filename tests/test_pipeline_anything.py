"""The pipeline: properties of any request, and that no repr shows a secret."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.errors import Refusal
from receiver.pipeline import Admitted, Challenged, HeadAccepted, Refused, check_head, judge
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
from tests.support.verdicts import FIRST, MAIN, SECOND, TOKEN, UUID, Headers, handshake, receive
from tests.test_pipeline_body import READABLE

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
    st.builds(lambda meta, others: {"Meta": meta, **others}, _META, st.dictionaries(st.text(), _JSON)),
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
    st.text(max_size=60) | st.sampled_from([FIRST, SECOND, f"Bearer {FIRST}", SIGNATURES["first"], "1767225600"]),
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
    """Every request gets one verdict, and no exception."""

    @given(_BODIES)
    @settings(max_examples=400)
    def test_any_body_with_the_right_token(self, body: bytes) -> None:
        """With the right token and any source allowed, any bytes are admitted, or are a handshake."""
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
    """Bodies, tokens and header values are in no repr and no error text."""

    canary = "CANARY-of-a-patient"
    everywhere = BODY.replace("é".encode(), canary.encode()).replace(b'"Source"', b'"FacilityCode":null,"Source"')
    query = f"challenge={UUID}&verification-token={FIRST}&more={canary}"

    @pytest.mark.parametrize(
        "request_",
        [
            inbound(everywhere, {**TOKEN, "x-more": canary}),
            inbound(everywhere, {"verification-token": canary}),
            inbound(everywhere, {"x-more": canary}),
            inbound(everywhere[:-1], TOKEN),
            inbound(everywhere.replace(SOURCE.encode(), canary.encode()), TOKEN),
            inbound(handshake(canary), TOKEN),
            inbound(handshake(FIRST, FIRST)),
            inbound(handshake(canary, canary)),
            inbound(handshake("a b", FIRST)),
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
            (handshake(f"{canary}!", FIRST), {}),
            (everywhere.replace(SOURCE.encode(), b"unknown"), TOKEN),
        ],
    )
    def test_a_refusal_carries_the_body_in_one_place(self, body: bytes, headers: Headers) -> None:
        """A refused body is only in the field `body`, for its length and digest."""
        refused = receive(inbound(body, headers))
        assert isinstance(refused, Refused)
        assert refused.body is (None if "verification-token" in headers and headers != TOKEN else body)
        assert self.canary not in str(dataclasses.asdict(dataclasses.replace(refused, body=None)))

    @pytest.mark.parametrize("body", [everywhere[:-1], b"\xff" + everywhere, everywhere.replace(b"{", b'{"a":NaN,', 1)])
    def test_no_error_quotes_them(self, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        """Refusals and their causes do not quote the body."""
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
