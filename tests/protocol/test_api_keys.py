"""API keys: each form of a private key is read, and each useless one is refused with an explanation."""

from __future__ import annotations

import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from receiver.errors import ConfigurationError
from receiver.protocol.api_keys import LegacyKey, load_oauth_key

RSA = rsa.generate_private_key(65537, 2048)
P384 = ec.generate_private_key(ec.SECP384R1())


def pem(key: Any, password: bytes | None = None) -> str:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    text: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    return text.decode()


def rsa_jwk(**members: object) -> str:
    return json.dumps({**jwt.algorithms.RSAAlgorithm.to_jwk(RSA, as_dict=True), **members})


@pytest.mark.parametrize(
    "text",
    [
        pem(RSA),
        pem(RSA).encode(),
        "\n" + pem(RSA) + "\n",
        pem(RSA).strip().replace("\n", "\\n"),
        rsa_jwk(),
        rsa_jwk(alg="RS384", use="sig"),
    ],
    ids=["pem", "bytes", "padded", "escaped line ends", "jwk", "jwk with alg"],
)
def test_key_text_is_read(text: str | bytes) -> None:
    """PEM, also with the escaped line ends of environment variables, and JWK give the same key."""
    key = load_oauth_key(text, client_id="c", kid="k", scope="s")

    assert key.private_key.private_numbers() == RSA.private_numbers()
    assert (key.client_id, key.kid, key.scope, key.algorithm) == ("c", "k", "s", "RS384")


def test_traditional_and_elliptic_pem_are_read() -> None:
    """The older "BEGIN RSA PRIVATE KEY" is read too, and a P-384 key in PEM or JWK."""
    old = RSA.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())

    assert load_oauth_key(old, client_id="c", kid="k").algorithm == "RS384"
    assert load_oauth_key(pem(P384), client_id="c", kid="k").algorithm == "ES384"
    jwk = json.dumps({**jwt.algorithms.ECAlgorithm.to_jwk(P384, as_dict=True), "kid": "named"})
    assert load_oauth_key(jwk, client_id="c").kid == "named"


def test_the_kid_of_a_jwk() -> None:
    """The kid of a JWK is used if none is given."""
    assert load_oauth_key(rsa_jwk(kid="own"), client_id="c").kid == "own"
    assert load_oauth_key(rsa_jwk(kid="own"), client_id="c", kid="given").kid == "given"


PUBLIC_PEM = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
PUBLIC_JWK = json.dumps(jwt.algorithms.RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True))


USELESS: dict[str, str | bytes] = {
    "empty": "",
    "can't be read as PEM": "no key at all",
    "neither PEM nor JWK": b"\xff\xfe",
    "can't be read as PEM ": pem(RSA)[:-200],
    "public half": PUBLIC_PEM,
    "passphrase": pem(RSA, b"pass"),
    "1024 bits, fewer than 2048": pem(rsa.generate_private_key(65537, 1024)),
    "secp256r1, not on P-384": pem(ec.generate_private_key(ec.SECP256R1())),
    "does not accept a private key of this type": pem(ed25519.Ed25519PrivateKey.generate()),
    "not a valid JSON object": "{",
    "not a valid JSON object ": "{" * 100_000,
    "JWKS": json.dumps({"keys": [json.loads(rsa_jwk())]}),
    "neither RSA nor EC": json.dumps({"kty": "oct", "k": "AAAA"}),
    "no member d": PUBLIC_JWK,
    "are not a valid key": rsa_jwk(n=17),
    "alg is not RS384": rsa_jwk(alg="RS256"),
}


@pytest.mark.parametrize("message", USELESS)
def test_a_useless_key_is_explained(message: str) -> None:
    """Each useless key is refused when it is loaded, with an explanation that does not quote it."""
    with pytest.raises(ConfigurationError) as caught:
        load_oauth_key(USELESS[message], client_id="c", kid="k")

    assert message.strip() in str(caught.value)
    assert caught.value.__cause__ is None
    assert "MII" not in str(caught.value)


@pytest.mark.parametrize(
    ("client_id", "kid", "message"), [("", "k", "client id"), ("c", None, "kid"), ("c", "", "kid")]
)
def test_a_key_needs_client_id_and_kid(client_id: str, kid: str | None, message: str) -> None:
    """Without a client id or a kid, Redox could not find the public half: the key is refused."""
    with pytest.raises(ConfigurationError, match=message):
        load_oauth_key(pem(RSA), client_id=client_id, kid=kid)


def test_a_legacy_key_needs_both_halves() -> None:
    """A legacy key without its secret is refused."""
    with pytest.raises(ConfigurationError, match="secret"):
        LegacyKey(api_key="k", secret="")
