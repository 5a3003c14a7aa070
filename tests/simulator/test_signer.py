"""Signatures of the simulator, against RFC 4231 and Python's hmac."""

from __future__ import annotations

import hmac
from base64 import b64encode, urlsafe_b64encode

import pytest

from receiver.simulator.signer import Signer


def test_the_signature_is_that_of_the_rfc() -> None:
    """RFC 4231, test case 2."""
    signer = Signer(secret=b"Jefe", encoding="hex")
    signed = signer.headers(b"what do ya want for nothing?", now=0)
    assert signed == {"Redox-Signature": "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"}


def test_a_long_secret_is_hashed_first() -> None:
    """RFC 4231, test case 6: a key of 131 bytes, SHA-512."""
    signer = Signer(secret=b"\xaa" * 131, hash="sha512", encoding="hex")
    signed = signer.headers(b"Test Using Larger Than Block-Size Key - Hash Key First", now=0)
    assert signed["Redox-Signature"] == (
        "80b24263c7c1a3ebb71493c1dd7be8b49b46d1f41b4aeec1121b013783f8f352"
        "6b56d037e05f2598bd0fd2215d6a1e5295e64f73f63f0ae"
        "c8b915a985d786598"
    )


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_every_hash_and_encoding(algorithm: str) -> None:
    """Header, hash, encoding and prefix are settings. Checked against Python's hmac."""
    mac = hmac.digest(b"secret", b"body", algorithm)
    for encoding, text in (
        ("hex", mac.hex()),
        ("base64", b64encode(mac).decode()),
        ("base64url", urlsafe_b64encode(mac).decode()),
    ):
        signer = Signer(
            secret=b"secret",
            header="X-Redox-Signature",
            hash=algorithm,  # type: ignore[arg-type]  # a str
            encoding=encoding,  # type: ignore[arg-type]  # likewise
            prefix="v1=",
        )
        assert signer.headers(b"body", now=0) == {"X-Redox-Signature": f"v1={text}"}


def test_the_time_is_signed_with_the_body() -> None:
    """With a timestamp header, the signed bytes are the time, a period and the body."""
    signer = Signer(secret=b"secret", encoding="hex", timestamp_header="Redox-Timestamp")
    assert signer.headers(b"body", now=1767600000.9) == {
        "Redox-Timestamp": "1767600000",
        "Redox-Signature": hmac.digest(b"secret", b"1767600000.body", "sha256").hex(),
    }


def test_the_secret_is_in_no_repr() -> None:
    """The repr does not contain the secret."""
    assert "secret" not in repr(Signer(secret=b"hush-hush")).replace("secret=", "")
    assert "hush" not in repr(Signer(secret=b"hush-hush"))
