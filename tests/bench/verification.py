"""The cost of verifying a request by kind, compared with the bare cryptographic operation, at 4 KB and 1 MB.

Run it as `python -m tests.bench.verification`. Each request is checked by its head and then verified whole, as in the
receiver. Tokens are measured both ways: a new one for every request, and the same one again. Each pair is measured in
turn, and the best of many rounds counts, which excludes other work of the machine. It checks no speed.
"""

from __future__ import annotations

import hmac
import time
from base64 import urlsafe_b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import cycle
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificate

from receiver.protocol import jose, verification
from receiver.protocol.jose import Rules, VerifyingKey
from receiver.protocol.message import Inbound
from receiver.protocol.registry import Credential
from receiver.protocol.verification import bearer
from receiver.protocol.verification.hmac import HmacCredential
from receiver.protocol.verification.jwt import JwtCredential
from receiver.protocol.verification.mtls import MtlsCredential
from receiver.protocol.verification.oauth import Client, OAuthCredential, issue
from receiver.protocol.verification.sigv4 import SigV4Credential
from receiver.simulator.client_auth import (
    CertificateAuthenticator,
    HmacAuthenticator,
    OutgoingRequest,
    SigV4Authenticator,
)
from receiver.simulator.signer import Signer
from tests.protocol.made_up import NOW, TOKEN_KEY, TOKENS, destination, head, token
from tests.protocol.verification.issuers import P384, RSA_FIRST, Issuer, jwks
from tests.protocol.verification.test_mtls import _CERTIFICATES

SIZES = {"4 KB": 4 * 1024, "1 MB": 1024 * 1024}
ROUNDS = 300
TOKENS_IN_TURN = 256
SECRET = b"a made-up secret of some length"
_AT = int(NOW.timestamp())


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind at work: requests in turn, and the bare operation for one of them."""

    name: str
    credential: Credential
    headers: list[Mapping[str, str]]
    bare: Callable[[], object]
    fresh: bool = False


def cases(body: bytes) -> list[Case]:
    """All of them, for one body."""
    return [_token(), _hmac(body), *_jwt("RS256"), *_jwt("ES384"), *_oauth(), _sigv4(body), _mtls()]


def _token() -> Case:
    value = TOKENS["first"].encode()
    return Case(
        name="token",
        credential=token(),
        headers=[{"verification-token": TOKENS["first"]}],
        bare=lambda: hmac.digest(TOKEN_KEY, value, "sha256"),
    )


def _hmac(body: bytes) -> Case:
    return Case(
        name="hmac",
        credential=HmacCredential(id=1, secret=SECRET),
        headers=[HmacAuthenticator(signer=Signer(secret=SECRET)).headers(_outgoing(body), now=_AT)],
        bare=lambda: hmac.digest(SECRET, body, "sha256"),
    )


def _jwt(algorithm: str) -> list[Case]:
    key = RSA_FIRST if algorithm == "RS256" else P384
    issuer = Issuer(key=key, algorithm=algorithm, kid="k")
    rules = Rules(
        issuers=("https://issuer.example",),
        audiences=("https://receiver.example/redox/main",),
        lifetime=3600,
        algorithms=frozenset({algorithm}),
        keys=jwks(k=key),
    )
    texts = [
        issuer.token(
            {
                "iss": "https://issuer.example",
                "aud": "https://receiver.example/redox/main",
                "iat": _AT,
                "exp": _AT + 300,
                "sub": "redox",
                "jti": str(n),
            }
        )
        for n in range(TOKENS_IN_TURN)
    ]
    signed, _, signature = texts[0].encode().rpartition(b".")
    raw = urlsafe_b64decode(signature + b"==")
    credential = JwtCredential(id=1, rules=rules)
    if algorithm == "RS256":
        rsa, scheme, sha = RSA_FIRST.public_key(), padding.PKCS1v15(), SHA256()
        return _both("jwt RS256", credential, texts, lambda: rsa.verify(raw, signed, scheme, sha))
    curve, ecdsa = P384.public_key(), ec.ECDSA(SHA384())
    der = encode_dss_signature(int.from_bytes(raw[:48]), int.from_bytes(raw[48:]))
    return _both("jwt ES384", credential, texts, lambda: curve.verify(der, signed, ecdsa))


def _oauth() -> list[Case]:
    key = VerifyingKey(kid="token-1", algorithms=frozenset({"HS256"}), key=b"k" * 32)
    credential = OAuthCredential(id=1, client=Client(client_id="redox"), digest=b"", key=b"", token_keys=(key,))
    at = destination(credential, require=("oauth",))
    texts = [issue(credential, at, NOW, scopes=(), jti=str(n)) for n in range(TOKENS_IN_TURN)]
    signed = texts[0].encode().rpartition(b".")[0]
    return _both("oauth", credential, texts, lambda: hmac.digest(b"k" * 32, signed, "sha256"))


def _both(name: str, credential: Credential, texts: list[str], bare: Callable[[], object]) -> list[Case]:
    headers: list[Mapping[str, str]] = [{"authorization": f"Bearer {text}"} for text in texts]
    return [
        Case(name=f"{name}, new token", credential=credential, headers=headers, bare=bare, fresh=True),
        Case(name=f"{name}, same token", credential=credential, headers=headers[:1], bare=bare),
    ]


def _sigv4(body: bytes) -> Case:
    signer = SigV4Authenticator(access_key="AKID", secret=SECRET.decode(), region="us-east-1", service="execute-api")
    outgoing = _outgoing(body)
    return Case(
        name="sigv4",
        headers=[{**outgoing.headers, **signer.headers(outgoing, now=_AT)}],
        credential=SigV4Credential(id=1, access_key="AKID", secret=SECRET, region="us-east-1", service="execute-api"),
        bare=lambda: hmac.digest(SECRET, sha256(body).digest(), "sha256"),
    )


def _mtls() -> Case:
    pem = _CERTIFICATES["first"].public_bytes(Encoding.PEM)
    return Case(
        name="mtls (bare: reading the certificate)",
        credential=MtlsCredential(
            id=1, proxy="nginx", secret=SECRET, fingerprint=_CERTIFICATES["first"].fingerprint(SHA256())
        ),
        headers=[
            CertificateAuthenticator(proxy="nginx", pem=pem.decode(), secret=SECRET.decode()).headers(
                _outgoing(b""), now=_AT
            )
        ],
        bare=lambda: load_pem_x509_certificate(pem).fingerprint(SHA256()),
    )


def _outgoing(body: bytes) -> OutgoingRequest:
    return OutgoingRequest(
        method="POST",
        host="receiver.example",
        target="/redox/main",
        body=body,
        headers={"host": "receiver.example", "content-type": "application/json"},
    )


def measure(case: Case, body: bytes) -> tuple[float, float]:
    """(seconds of a request, seconds of the bare operation), the best of many rounds."""
    kind = case.name.split()[0].strip(",")
    at = destination(case.credential, require=(kind,))
    requests = [Inbound(head=head(each), body=body) for each in case.headers]
    turn = cycle(requests)

    def request() -> None:
        each = next(turn)
        verification.check_head(each.head, at, NOW).complete(each, at, NOW)

    count = 2 if len(body) > 100_000 else 16  # short, so that some round is left alone

    def timed(act: Callable[[], Any]) -> float:
        began = time.perf_counter()
        for _ in range(count):
            act()
        return (time.perf_counter() - began) / count

    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        if case.fresh:  # as if none of them had ever been seen
            for memory in (jose.peek, jose._verified, bearer._token):
                memory.cache_clear()
        best = [min(best[0], timed(request)), min(best[1], timed(case.bare))]
    return best[0], best[1]


def main() -> None:
    """Measure and print."""
    for name, size in SIZES.items():
        body = b'{"Meta":{}}'.ljust(size)
        print(f"{name:<38}{'request µs':>12}{'bare µs':>10}{'ratio':>8}")
        for case in cases(body):
            request, bare = measure(case, body)
            print(f"  {case.name:<36}{request * 1e6:>12.1f}{bare * 1e6:>10.1f}{request / bare:>8.2f}")


if __name__ == "__main__":
    main()
