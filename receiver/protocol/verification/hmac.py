"""Kind `hmac`: the webhook signing secret, over exactly the bytes that arrived.

Redox documents that the secret exists and that a change takes effect at once, but not the header, hash, encoding and
signed bytes. So all of them are settings of the credential, and several secrets can be live during a rotation.

Must not parse the body: the signature is over exactly the bytes that arrived.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import ClassVar, Final, Literal, get_args

import msgspec

from receiver.errors import ConfigurationError, Unverified
from receiver.protocol.message import Head, Inbound, Nonce, Verified
from receiver.protocol.registry import Credential, Destination, live
from receiver.protocol.verification.headers import header_name
from receiver.protocol.verification.kind import (
    HOUR,
    BodyKind,
    CredentialOption,
    CredentialSettings,
    OptionUse,
    Seconds,
    SecretStorage,
    StoredCredential,
)

Hash = Literal["sha256", "sha384", "sha512"]
Encoding = Literal["hex", "base64", "base64url"]

# A header may hold several signatures, separated by commas, while the sender rotates its secret. More than this is an
# attack on our time.
MAX_SIGNATURES: Final = 8
# Eight SHA-512 values in base64 with prefixes have less than 1 KB.
MAX_HEADER: Final = 2048
_SECONDS: Final = re.compile(rb"[0-9]{1,11}")
_BASE64URL: Final = re.compile(rb"[A-Za-z0-9_-]*={0,2}")


@dataclass(frozen=True, kw_only=True, slots=True)
class HmacCredential(Credential):
    """A webhook signing secret, and the format of its signature.

    `header` and `timestamp_header` are in lower case. `prefix` (such as `sha256=`) stands before the signature. With a
    `timestamp_header`, the signed bytes are its value, a full stop, and the body; otherwise only the body. `tolerance`:
    the largest difference of the timestamp from now, in seconds.
    """

    secret: bytes = field(repr=False)
    header: str = "redox-signature"
    hash: Hash = "sha256"
    encoding: Encoding = "base64"
    prefix: str = ""
    timestamp_header: str | None = None
    tolerance: int = 300


class HmacSettings(CredentialSettings, kw_only=True):
    """The settings of HmacCredential."""

    header: str = "redox-signature"
    hash: Hash = "sha256"
    encoding: Encoding = "base64"
    prefix: str = ""
    timestamp_header: str | None = None
    tolerance: Seconds = 300


class HmacKind(BodyKind[HmacSettings, HmacCredential]):
    """A signature over the body."""

    name = "hmac"
    text = "the webhook signing secret"
    settings = HmacSettings
    credential = HmacCredential
    secret = SecretStorage.SEALED
    options = (
        OptionUse(
            option=CredentialOption(name="header", help="header with the signature.  [default: redox-signature]")
        ),
        OptionUse(
            option=CredentialOption(name="hash", help="hash function.  [default: sha256]", choices=get_args(Hash))
        ),
        OptionUse(
            option=CredentialOption(
                name="encoding", help="encoding of the signature.  [default: base64]", choices=get_args(Encoding)
            )
        ),
        OptionUse(
            option=CredentialOption(name="prefix", help="text before the signature, such as sha256=.  [default: none]")
        ),
        OptionUse(
            option=CredentialOption(
                name="timestamp_header", help="header with Unix seconds; TIMESTAMP.BODY is signed.  [default: none]"
            )
        ),
        OptionUse(
            option=CredentialOption(
                name="tolerance",
                bounds=(1, 24 * HOUR),
                help="largest difference of the timestamp, in seconds.  [default: 300]",
            )
        ),
    )
    reasons: ClassVar = {
        "signature_wrong": "the webhook signature does not verify: compare the secret and the signed bytes",
        "signature_malformed": "the webhook signature does not have the credential's hash, encoding or prefix",
        "signature_stale": "the timestamp of the webhook signature is missing or too old: compare the clocks",
        "signature_credential_expired": "the webhook signing secret has expired or was revoked: add the current one",
    }

    def normalize(self, settings: HmacSettings) -> HmacSettings:
        """Convert header names to lower case."""
        stamp = settings.timestamp_header
        changed = msgspec.structs.replace(
            settings,
            header=header_name(settings.header),
            timestamp_header=None if stamp is None else header_name(stamp),
        )
        if changed.header == changed.timestamp_header:
            raise ConfigurationError("the signature and its timestamp are in two headers: the names must differ")
        return changed

    def make(self, settings: HmacSettings, stored: StoredCredential) -> HmacCredential:
        """Return the secret, with every setting."""
        return HmacCredential(secret=stored.secret, **stored.common, **msgspec.structs.asdict(settings))

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:
        """The signature header of one of the destination's hmac credentials (see `_secrets`)."""
        return any(credential.header in head.headers for credential in _secrets(destination, now))

    def screen(self, head: Head, destination: Destination, now: datetime) -> None:
        """Check the format and the timestamp."""
        for credentials in _by_header(head, destination, now):
            if not any(_candidates(head, credential, now) for credential in credentials):
                raise Unverified(_why(head, credentials, now))

    def verify(self, inbound: Inbound, destination: Destination, now: datetime) -> Verified:
        """Return the credentials that matched, one for each header. A signature with a timestamp is valid once.

        Raises Unverified: `signature_wrong`, `_malformed`, `_stale`, `_credential_expired`.
        """
        found = [self._match(inbound, credentials, now) for credentials in _by_header(inbound.head, destination, now)]
        once = [
            Nonce.of(f"{self.name} {destination.id}", mac, _end(inbound.head, credential))
            for credential, mac in found
            if credential.timestamp_header is not None
        ]
        return Verified(
            credentials=tuple(credential.id for credential, _ in found),
            kinds=frozenset({self.name}),
            nonces=tuple(once),
        )

    def _match(
        self, inbound: Inbound, credentials: Sequence[HmacCredential], now: datetime
    ) -> tuple[HmacCredential, bytes]:
        found = None
        for credential in credentials:
            signatures = _candidates(inbound.head, credential, now)
            if not signatures:
                continue
            mac = hmac.new(credential.secret, digestmod=credential.hash)
            if credential.timestamp_header is not None:
                mac.update((inbound.head.header(credential.timestamp_header) or b"") + b".")
            mac.update(inbound.body)
            expected = mac.digest()
            for signature in signatures:
                if hmac.compare_digest(signature, expected):
                    found = credential, expected
        if found is None:
            raise Unverified(_why(inbound.head, credentials, now))
        return found


def _secrets(destination: Destination, now: datetime) -> list[HmacCredential]:
    """Return the credentials whose header is checked: all if hmac is required, otherwise those that are live.

    Their headers are settings: a wrong one must have no effect once its credential is not live.
    """
    required = HmacKind.name in destination.kinds
    return [
        credential
        for credential in destination.credentials
        if isinstance(credential, HmacCredential) and (required or live(credential, now))
    ]


def _by_header(head: Head, destination: Destination, now: datetime) -> list[list[HmacCredential]]:
    """Return the credentials of each signature header that is presented: one of each group must match."""
    groups: dict[str, list[HmacCredential]] = {}
    for credential in _secrets(destination, now):
        if credential.header in head.headers:
            groups.setdefault(credential.header, []).append(credential)
    return list(groups.values())


def _candidates(head: Head, credential: HmacCredential, now: datetime) -> list[bytes]:
    """Return the well-formed signatures that this credential could have made; none if it is not live or not in time."""
    if not live(credential, now) or not _timely(head, credential, now):
        return []
    value = head.header(credential.header) or b""
    items = value.split(b",", MAX_SIGNATURES)
    if len(value) > MAX_HEADER or len(items) > MAX_SIGNATURES:
        return []
    prefix = credential.prefix.encode()
    length = hmac.new(b"", digestmod=credential.hash).digest_size
    decode = _DECODERS[credential.encoding]
    found = []
    for item in items:
        text = item.strip(b" ")
        if not text.startswith(prefix):
            continue
        try:
            signature = decode(text[len(prefix) :])
        except ValueError:  # binascii.Error is one
            continue
        if len(signature) == length:
            found.append(signature)
    return found


def _timely(head: Head, credential: HmacCredential, now: datetime) -> bool:
    if credential.timestamp_header is None:
        return True
    stamp = head.header(credential.timestamp_header) or b""
    return _SECONDS.fullmatch(stamp) is not None and abs(now.timestamp() - int(stamp)) <= credential.tolerance


def _end(head: Head, credential: HmacCredential) -> datetime:
    """Return the time after which the timestamp, which is valid, is stale."""
    stamp = int(head.header(credential.timestamp_header or "") or b"")
    return datetime.fromtimestamp(stamp, UTC) + timedelta(seconds=credential.tolerance + 1)


def _why(head: Head, credentials: Sequence[HmacCredential], now: datetime) -> str:
    """Return the reason that helps an operator most."""
    alive = [credential for credential in credentials if live(credential, now)]
    if not alive:
        return "signature_credential_expired"
    timely = [credential for credential in alive if _timely(head, credential, now)]
    if not timely:
        return "signature_stale"
    return "signature_wrong" if any(_candidates(head, each, now) for each in timely) else "signature_malformed"


def _base64url(text: bytes) -> bytes:
    # Senders differ about padding. Python accepts + and / too, unless they are rejected here.
    if not _BASE64URL.fullmatch(text):
        raise ValueError("not base64url")
    bare = text.rstrip(b"=")
    return base64.urlsafe_b64decode(bare + b"=" * (-len(bare) % 4))


_DECODERS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "hex": lambda text: base64.b16decode(text, casefold=True),
    "base64": lambda text: base64.b64decode(text, validate=True),
    "base64url": _base64url,
}
