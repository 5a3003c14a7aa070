"""Kind `hmac`: the webhook signing secret."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Literal

import pytest

from receiver.protocol.registry import Credential
from receiver.protocol.verification.hmac import MAX_HEADER, MAX_SIGNATURES, HmacCredential
from tests.protocol.made_up import BODY, NOW, SECRETS, SIGNATURES, TOKENS, Which, destination, signing, token
from tests.protocol.verification.cases import Headers, VerificationCases, refusal, verify

_FIRST, _SECOND = SIGNATURES["first"], SIGNATURES["second"]
# A value of the right length that is not a signature.
_NOBODY = "A" * 43 + "="


def _signed(value: str) -> Headers:
    return {"redox-signature": value}


class TestHmac(VerificationCases):
    """The webhook signing secret with default settings."""

    kind = "hmac"
    by_head = False
    right: ClassVar[Mapping[Which, Headers]] = {"first": _signed(_FIRST), "second": _signed(_SECOND)}
    bad: ClassVar[Mapping[str, tuple[Headers, str]]] = {
        "wrong": (_signed(_NOBODY), "signature_wrong"),
        "empty": (_signed(""), "signature_malformed"),
        "not base64": (_signed("!" * 44), "signature_malformed"),
        "no padding": (_signed(_FIRST.rstrip("=")), "signature_malformed"),
        "too short": (_signed(_FIRST[:-4]), "signature_malformed"),
        "too long": (_signed(f"AAAA{_FIRST}"), "signature_malformed"),
        "in hex": (_signed("4c81bb622d6d115c5221734c282b367bbb1622a769b6e9e601bbf8cb9d2db0ff"), "signature_malformed"),
        "with a prefix": (_signed(f"sha256={_FIRST}"), "signature_malformed"),
        "non-ASCII": (_signed(f"\xef{_FIRST}"), "signature_malformed"),
        "not latin-1": (_signed("\u20ac" * 44), "signature_malformed"),
        "line feed inside": (_signed(f"{_FIRST[:20]}\n{_FIRST[20:]}"), "signature_malformed"),
        "1 MB": (_signed("A" * 1_000_000), "signature_malformed"),
        "1,000 signatures, the last right": (_signed(f"{_NOBODY}," * 999 + _FIRST), "signature_malformed"),
        "commas": (_signed(",,,"), "signature_malformed"),
        "a token": (_signed(TOKENS["first"]), "signature_malformed"),
    }
    expired = "signature_credential_expired"
    revoked = "signature_credential_expired"
    unknown = "credential_insufficient"
    companion: ClassVar[tuple[str, Credential, Headers]] = (
        "token",
        token(id=9),
        {"verification-token": TOKENS["first"]},
    )

    def credential(
        self,
        which: Which = "first",
        *,
        id: int = 1,  # noqa: A002
        expires_at: datetime | None = None,
        revoked: bool = False,
    ) -> Credential:
        """A signing secret."""
        return signing(which, id=id, expires_at=expires_at, revoked=revoked)

    def presenting(self, value: str) -> Headers:
        """In the signature header."""
        return _signed(value)

    def secrets(self) -> list[str]:
        """The secrets."""
        return [*SECRETS.values()]


class TestSignedBytes:
    """The signature is over exactly the bytes that arrived."""

    @pytest.mark.parametrize(
        "body",
        [
            BODY.replace(b"Arrival", b"arrival"),
            BODY + b" ",
            BODY[:-1],
            b"",
            b" " + BODY,
            BODY.replace("é".encode(), b"\\u00e9"),
            BODY.replace(
                b'"DataModel":"PatientAdmin","EventType":"Arrival"', b'"EventType":"Arrival","DataModel":"PatientAdmin"'
            ),
        ],
    )
    def test_any_change_is_refused(self, body: bytes) -> None:
        """A changed, added or removed byte, another escape or order of keys: the signature does not verify."""
        assert body != BODY
        assert refusal(_signed(_FIRST), destination(signing(), require=("hmac",)), body=body) == "signature_wrong"

    def test_several_signatures(self) -> None:
        """One of several signatures in a header must verify; a header with too many is refused."""
        at = destination(signing(), require=("hmac",))
        for value in (
            f"{_NOBODY},{_NOBODY},{_FIRST}",
            f"{_FIRST}, {_NOBODY}",
            f"!,{_FIRST},",
            f"{_SECOND} ,{_FIRST}",
            f"{_NOBODY}," * (MAX_SIGNATURES - 1) + _FIRST,
        ):
            assert verify(_signed(value), at).credentials == (1,)
        assert refusal(_signed(f"{_NOBODY}," * MAX_SIGNATURES + _FIRST), at) == "signature_malformed"
        assert refusal(_signed(f"{_NOBODY},{_NOBODY}"), at) == "signature_wrong"

    def test_a_long_header_is_not_parsed(self) -> None:
        """A header of more than MAX_HEADER bytes is malformed, even with a right signature in it."""
        at = destination(signing(), require=("hmac",))
        assert verify(_signed(_FIRST + " " * (MAX_HEADER - len(_FIRST))), at).credentials == (1,)
        assert refusal(_signed(_FIRST + " " * (MAX_HEADER - len(_FIRST) + 1)), at) == "signature_malformed"


# openssl dgst -sha384 -hmac "$SECRET" body, the first secret; -binary | base64 for those in base64.
_SHA384 = "46ae0789810ab5c6f1ca3671fe0a533639744f0346ba09eec4e0dd791ae08c6302c0f91afaa8f1e9bc3e632274e8c277"
_SHA512 = "VSUpC0UUnK/3GvDDrM0YKkmnToi/AfUCR9Ek9wzAV78Edy6Jcdb+IQlog/5zH2c9Ej3zvOqH1VK/T5zm6Zyahg=="
_SHA512_SECOND = "AxVcqvQSF4ODx1dYjsCVBuZoJWmh67GgS7urHhF6Z2S5SVYxlHDlhgKt4e1f9QKkCBHPRk5VQmXeQDHf2enO0w=="
_SHA256_HEX = "4c81bb622d6d115c5221734c282b367bbb1622a769b6e9e601bbf8cb9d2db0ff"
_SHA256_SECOND_URL = "Au_bu_g1nnu9usH2bi7QaPhWTF8xG6g2Gk4jdFVKMHY"
# { printf '1767225600.'; cat body; } | openssl dgst -sha256 -hmac "$SECRET" -binary | base64, the first secret.
_STAMPED = "4qD6ecSrK1yop1f/yCVjIbPlDufMTE9k90OnTaae5H4="
_STAMP = datetime(2026, 1, 1, tzinfo=UTC)  # 1767225600


class TestSettings:
    """Redox does not document the format of the signature: every part of it is a setting."""

    @pytest.mark.parametrize(
        ("settings", "headers", "reason"),
        [
            ({"hash": "sha384", "encoding": "hex"}, _signed(_SHA384), None),
            ({"hash": "sha384", "encoding": "hex"}, _signed(_SHA384.upper()), None),
            ({"hash": "sha384", "encoding": "hex"}, _signed(_SHA256_HEX), "signature_malformed"),
            ({"hash": "sha384", "encoding": "hex"}, _signed(_SHA384[:-1]), "signature_malformed"),
            ({"hash": "sha384", "encoding": "hex"}, _signed(f"{_SHA384[:-2]} {_SHA384[-2:]}"), "signature_malformed"),
            ({"hash": "sha512"}, _signed(_SHA512), None),
            ({"hash": "sha512"}, _signed(_SHA512_SECOND), "signature_wrong"),
            ({"hash": "sha512", "encoding": "base64url"}, _signed(_SHA512.translate(str.maketrans("+/", "-_"))), None),
            (
                {"hash": "sha512", "encoding": "base64url"},
                _signed(_SHA512.translate(str.maketrans("+/", "-_", "="))),
                None,
            ),
            ({"hash": "sha512", "encoding": "base64url"}, _signed(_SHA512), "signature_malformed"),
            ({"secret": SECRETS["second"].encode(), "encoding": "base64url"}, _signed(_SHA256_SECOND_URL), None),
            ({"secret": SECRETS["second"].encode(), "encoding": "base64url"}, _signed(f"{_SHA256_SECOND_URL}="), None),
            (
                {"secret": SECRETS["second"].encode(), "encoding": "base64url"},
                _signed(f"{_SHA256_SECOND_URL}!"),
                "signature_malformed",
            ),
            ({"secret": SECRETS["second"].encode(), "encoding": "base64url"}, _signed("A"), "signature_malformed"),
            ({"secret": SECRETS["second"].encode()}, _signed(_SHA256_SECOND_URL), "signature_malformed"),
            ({"prefix": "sha256=", "encoding": "hex"}, _signed(f"sha256={_SHA256_HEX}"), None),
            ({"prefix": "sha256=", "encoding": "hex"}, _signed(f"v0=x, sha256={_SHA256_HEX}"), None),
            ({"prefix": "sha256=", "encoding": "hex"}, _signed(_SHA256_HEX), "signature_malformed"),
            ({"prefix": "sha256=", "encoding": "hex"}, _signed(f"sha512={_SHA256_HEX}"), "signature_malformed"),
            ({"header": "x-redox-signature"}, {"x-redox-signature": _FIRST}, None),
            ({"header": "x-redox-signature"}, _signed(_FIRST), "credential_missing"),
        ],
    )
    def test_hash_encoding_prefix_header(self, settings: dict[str, Any], headers: Headers, reason: str | None) -> None:
        """A signature made by openssl is accepted in the credential's format, and in no other."""
        values: dict[str, Any] = {"id": 1, "secret": SECRETS["first"].encode(), **settings}
        at = destination(HmacCredential(**values), require=("hmac",))
        if reason is None:
            assert verify(headers, at).credentials == (1,)
        else:
            assert refusal(headers, at) == reason

    @pytest.mark.parametrize(
        "stamp",
        [
            "",
            "NaN",
            "-1",
            "+1767225600",
            "1767225600.0",
            "1767225600 ",
            " 1767225600",
            "1" * 30,
            "1_767_225_600",
            "0x6955b900",
            "2026-01-01T00:00:00Z",
            "1767225600\n",
            "\u0661\u0667",
            "\xb2",
            "1767225600,1767225600",
        ],
    )
    def test_an_invalid_timestamp(self, stamp: str) -> None:
        """A timestamp that is not Unix seconds in digits is refused as stale, and raises no other error."""
        assert refusal({**_signed(_STAMPED), "x-time": stamp}, _stamped()) == "signature_stale"

    @pytest.mark.parametrize(
        ("seconds", "good"),
        [(0, True), (300, True), (-300, True), (300.001, False), (-301, False), (10**8, False), (-(10**8), False)],
    )
    def test_the_window(self, seconds: float, good: bool) -> None:
        """The timestamp may differ from the clock by at most `tolerance` seconds, in either direction."""
        headers = {**_signed(_STAMPED), "x-time": "1767225600"}
        now = _STAMP + timedelta(seconds=seconds)
        if good:
            assert verify(headers, _stamped(), now=now).credentials == (1,)
        else:
            assert refusal(headers, _stamped(), now=now) == "signature_stale"

    def test_the_timestamp_is_signed(self) -> None:
        """Another timestamp than the signed one, none, and a signature of only the body are refused."""
        assert refusal({**_signed(_STAMPED), "x-time": "1767225601"}, _stamped()) == "signature_wrong"
        assert refusal(_signed(_STAMPED), _stamped()) == "signature_stale"
        assert refusal({**_signed(_FIRST), "x-time": "1767225600"}, _stamped()) == "signature_wrong"


def _stamped() -> Any:
    return destination(
        HmacCredential(id=1, secret=SECRETS["first"].encode(), timestamp_header="x-time"), require=("hmac",)
    )


class TestSeveral:
    """Several credentials with different settings."""

    def test_each_presented_header_must_verify(self) -> None:
        """While the header's name changes, a sender may present both: then both are checked, and a bad one refuses."""
        old = HmacCredential(id=1, secret=SECRETS["first"].encode(), header="x-old")
        at = destination(old, signing("second", id=2), require=("hmac",))
        assert verify({"x-old": _FIRST}, at).credentials == (1,)
        assert verify({"x-old": _FIRST, **_signed(_SECOND)}, at).credentials == (1, 2)
        assert refusal({"x-old": _FIRST, **_signed(_FIRST)}, at) == "signature_wrong"
        assert refusal({"x-old": "", **_signed(_SECOND)}, at) == "signature_malformed"

    def test_formats_differ_under_one_header(self) -> None:
        """Two secrets of one header may differ in all other settings: each is checked in its own format."""
        hexed = HmacCredential(id=1, secret=SECRETS["first"].encode(), encoding="hex", prefix="sha256=")
        at = destination(hexed, signing("second", id=2), require=("hmac",))
        assert verify(_signed(f"sha256={_SHA256_HEX}"), at).credentials == (1,)
        assert verify(_signed(_SECOND), at).credentials == (2,)
        assert verify(_signed(f"{_NOBODY},sha256={_SHA256_HEX}"), at).credentials == (1,)

    def test_a_header_ends_with_its_credential(self) -> None:
        """If hmac is not required, a live secret's header is still checked, an expired secret's header is not."""
        ended = HmacCredential(id=1, secret=SECRETS["first"].encode(), header="x-old", expires_at=NOW)
        at = destination(ended, signing("second", id=2), token(id=3), require=("token",))
        proof = {"verification-token": TOKENS["first"], "x-old": "anything"}
        assert verify(proof, at).credentials == (3,)
        assert verify({**proof, **_signed(_SECOND)}, at).kinds == {"token", "hmac"}
        assert refusal({**proof, **_signed(_FIRST)}, at) == "signature_wrong"
        assert refusal(proof, at, now=NOW - timedelta(seconds=1)) == "signature_malformed"
        required = destination(ended, token(id=3), require=("token", "hmac"))
        assert refusal(proof, required) == "signature_credential_expired"

    def test_the_reason_that_helps_most(self) -> None:
        """The reason comes from a live secret, not an expired one, and from a signature in time before a stale one."""
        stamped = HmacCredential(id=1, secret=SECRETS["first"].encode(), timestamp_header="x-time")
        dead = signing("first", id=3, revoked=True)
        assert refusal(_signed(_NOBODY), destination(stamped, dead, require=("hmac",))) == "signature_stale"
        assert (
            refusal(_signed(_NOBODY), destination(stamped, signing("second", id=2), require=("hmac",)))
            == "signature_wrong"
        )
        assert (
            refusal(_signed("?"), destination(dead, signing("second", id=2), require=("hmac",)))
            == "signature_malformed"
        )


_A = "aa" * 131
# RFC 4231, section 4: key, data, HMAC-SHA-256, -384, -512. Case 5 is truncated to 128 bits, and has its own test.
_RFC_4231: Mapping[str, tuple[str, bytes, str, str, str]] = {
    "4.2": (
        "0b" * 20,
        b"Hi There",
        "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
        "afd03944d84895626b0825f4ab46907f15f9dadbe4101ec682aa034c7cebc59cfaea9ea9076ede7f4af152e8b2fa9cb6",
        (
            "87aa7cdea5ef619d4ff0b4241a1d6cb02379f4e2ce4ec2787ad0b30545e17cde"
            "daa833b7d6b8a702038b274eaea3f4e4be9d914eeb61f1702e696c203a126854"
        ),
    ),
    "4.3": (
        "4a656665",
        b"what do ya want for nothing?",
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
        "af45d2e376484031617f78d2b58a6b1b9c7ef464f5a01b47e42ec3736322445e8e2240ca5e69e2c78b3239ecfab21649",
        (
            "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea250554"
            "9758bf75c05a994a6d034f65f8f0e6fdcaeab1a34d4a6b4b636e070a38bce737"
        ),
    ),
    "4.4": (
        "aa" * 20,
        b"\xdd" * 50,
        "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe",
        "88062608d3e6ad8a0aa2ace014c8a86f0aa635d947ac9febe83ef4e55966144b2a5ab39dc13814b94e3ab6e101a34f27",
        (
            "fa73b0089d56a284efb0f0756c890be9b1b5dbdd8ee81a3655f83e33b2279d39"
            "bf3e848279a722c806b485a47e67c807b946a337bee8942674278859e13292fb"
        ),
    ),
    "4.5": (
        "0102030405060708090a0b0c0d0e0f10111213141516171819",
        b"\xcd" * 50,
        "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b",
        "3e8a69b7783c25851933ab6290af6ca77a9981480850009cc5577c6e1f573b4e6801dd23c4a7d679ccf8a386c674cffb",
        (
            "b0ba465637458c6990e5a8c5f61d4af7e576d97ff94b872de76f8050361ee3db"
            "a91ca5c11aa25eb4d679275cc5788063a5f19741120c4f2de2adebeb10a298dd"
        ),
    ),
    "4.7": (
        _A,
        b"Test Using Larger Than Block-Size Key - Hash Key First",
        "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
        "4ece084485813e9088d2c63a041bc5b44f9ef1012a2b588f3cd11f05033ac4c60c2ef6ab4030fe8296248df163f44952",
        (
            "80b24263c7c1a3ebb71493c1dd7be8b49b46d1f41b4aeec1121b013783f8f352"
            "6b56d037e05f2598bd0fd2215d6a1e5295e64f73f63f0aec8b915a985d786598"
        ),
    ),
    "4.8": (
        _A,
        (
            b"This is a test using a larger than block-size key and a larger than block-size data. The key needs "
            b"to be hashed before being used by the HMAC algorithm."
        ),
        "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2",
        "6617178e941f020d351e2f254e8fd32c602420feb0b8fb9adccebb82461e99c5a678cc31e799176d3860e6110c46523e",
        (
            "e37b6a775dc87dbaa4dfa9f96e5e3ffddebd71f8867289865df5a32d20cdc944"
            "b6022cac3c4982b10d5eeb55c3e4de15134676fb6de0446065c97440fa8c6a58"
        ),
    ),
}


class TestRfc4231:
    """The published test vectors for HMAC-SHA-2."""

    @pytest.mark.parametrize("section", _RFC_4231)
    def test_vectors(self, section: str) -> None:
        """Each vector is accepted with its own hash; values of another length are refused."""
        key, data, *macs = _RFC_4231[section]
        hashes: tuple[Literal["sha256", "sha384", "sha512"], ...] = ("sha256", "sha384", "sha512")
        for name, mac in zip(hashes, macs, strict=True):
            at = destination(
                HmacCredential(id=1, secret=bytes.fromhex(key), hash=name, encoding="hex"), require=("hmac",)
            )
            assert verify(_signed(mac), at, body=data).credentials == (1,)
            for other in {*macs} - {mac}:
                assert refusal(_signed(other), at, body=data) == "signature_malformed"

    def test_a_truncated_mac_is_refused(self) -> None:
        """Section 4.6 truncates the MAC to 128 bits: it is refused, the whole one is accepted."""
        at = destination(HmacCredential(id=1, secret=b"\x0c" * 20, encoding="hex"), require=("hmac",))
        cut = "a3b6167473100ee06e0c796c2955552b"
        assert refusal(_signed(cut), at, body=b"Test With Truncation") == "signature_malformed"
        # printf 'Test With Truncation' | openssl dgst -sha256 -mac HMAC -macopt hexkey:0c0c…
        whole = f"{cut}fa6f7c0a6a8aef8b93f860aab0cd20c5"
        assert verify(_signed(whole), at, body=b"Test With Truncation", now=NOW).credentials == (1,)


class TestNonces:
    """A signature with a timestamp is for one request."""

    def test_the_proof_has_it(self) -> None:
        """The proof has its nonce, until the timestamp is stale, whatever else is in the header."""
        headers = {**_signed(_STAMPED), "x-time": "1767225600"}
        (nonce,) = verify(headers, _stamped()).nonces
        assert refusal(headers, _stamped(), now=nonce.until) == "signature_stale"
        assert verify({**headers, **_signed(f"{_NOBODY}, {_STAMPED}")}, _stamped()).nonces == (nonce,)

    def test_without_a_timestamp_there_is_none(self) -> None:
        """A message that is signed without a time may be sent again."""
        assert verify(_signed(_FIRST), destination(signing(), require=("hmac",))).nonces == ()
