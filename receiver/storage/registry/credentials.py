"""Credentials as rows: each kind's `settings`, how its secret is stored, and the value that a row yields.

Must not read or write rows (see receiver.storage.registry.loader, receiver.storage.registry.changes), nor verify
requests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from hmac import compare_digest, digest
from typing import Annotated, Any, Final, Literal

import msgspec

from receiver.errors import ConfigurationError
from receiver.keyring import Keyring
from receiver.protocol import tokens
from receiver.protocol.jose import ALGORITHMS, LEEWAY, Rules, VerifyingKey, read_keys
from receiver.protocol.registry import (
    MIN_TOKEN_LENGTH,
    RESERVED_HEADERS,
    RESERVED_PREFIXES,
    Client,
    Credential,
    GoogleCredential,
    HmacCredential,
    JwtCredential,
    MtlsCredential,
    OAuthCredential,
    SigV4Credential,
    SmartCredential,
    TokenCredential,
)
from receiver.protocol.verification import bearer, google, mtls, oauth
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import token_key

_HOUR: Final = 3600
# Seconds that fetched keys are trusted after the last successful fetch, unless a credential sets its own.
MAX_STALE: Final = 72 * _HOUR
# While keys are stale, the registry is checked for newer ones this often, in seconds.
_STALE_RELOAD: Final = 5.0
_Seconds = Annotated[int, msgspec.Meta(ge=1, le=24 * _HOUR)]
_MaxStale = Annotated[int, msgspec.Meta(ge=60, le=366 * 24 * _HOUR)]
_Leeway = Annotated[int, msgspec.Meta(ge=0, le=300)]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeySet:
    """Public keys as last fetched, `age` seconds ago."""

    keys: tuple[VerifyingKey, ...]
    age: float


# By URL.
KeySets = Mapping[str, KeySet]


class _Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The stored settings; a missing one has its default."""


class Token(_Settings, kw_only=True):
    """The settings of a verification token: none."""


class Hmac(_Settings, kw_only=True):
    """The settings of HmacCredential."""

    header: str = "redox-signature"
    hash: Literal["sha256", "sha384", "sha512"] = "sha256"
    encoding: Literal["hex", "base64", "base64url"] = "base64"
    prefix: str = ""
    timestamp_header: str | None = None
    tolerance: _Seconds = 300


class _Keys(_Settings, kw_only=True):
    """A source of public keys: a URL, fetched on a timer, or `keys`, the text of a JWKS or PEM.

    `max_stale`: seconds that keys of a URL are trusted after the last successful fetch.
    """

    jwks_url: str | None = None
    keys: str | None = None
    max_stale: _MaxStale = MAX_STALE
    leeway: _Leeway = LEEWAY


class Jwt(_Keys, kw_only=True):
    """The settings of JwtCredential and of Rules."""

    issuers: list[str]
    audiences: list[str]
    algorithms: list[str] = msgspec.field(default_factory=lambda: ["RS256", "RS384", "ES256", "ES384"])
    lifetime: _Seconds = _HOUR
    subject: str | None = None


class Google(_Keys, kw_only=True):
    """The settings of GoogleCredential and of Rules."""

    audiences: list[str]
    issuers: list[str] = msgspec.field(default_factory=lambda: list(google.ISSUERS))
    algorithms: list[str] = msgspec.field(default_factory=lambda: list(google.ALGORITHMS))
    lifetime: _Seconds = _HOUR
    email: str | None = None
    subject: str | None = None


class OAuth(_Settings, kw_only=True):
    """The settings of Client."""

    client_id: str
    names: dict[str, str] = {}
    grant_type: str = "client_credentials"
    audience: str | None = None
    scopes: list[str] = []
    lifetime: _Seconds = 300


class Smart(OAuth, kw_only=True):
    """The settings of Client, and the rules for an assertion. `audiences`: the receiver's token URL. Keys as in
    `_Keys`.
    """

    audiences: list[str]
    jwks_url: str | None = None
    keys: str | None = None
    max_stale: _MaxStale = MAX_STALE
    leeway: _Leeway = LEEWAY
    algorithms: list[str] = msgspec.field(default_factory=lambda: list(tokens.ASSERTION_ALGORITHMS))
    assertion_lifetime: _Seconds = tokens.ASSERTION_LIFETIME
    other_audiences: bool = False


class SigV4(_Settings, kw_only=True):
    """The settings of SigV4Credential. The sealed secret has the session token, if there is one, on a second line."""

    access_key: str
    region: str
    service: str
    unsigned_payload: bool = False
    hosts: list[str] = []


class Mtls(_Settings, kw_only=True):
    """The settings of MtlsCredential, the fingerprint in hexadecimal."""

    proxy: Literal["nginx", "envoy", "aws-alb"]
    secret_header: str = "x-proxy-secret"  # noqa: S105 - a header's name
    subject: str | None = None
    san: str | None = None
    fingerprint: str | None = None


KINDS: Final[Mapping[str, type[_Settings]]] = {
    "token": Token,
    "hmac": Hmac,
    "jwt": Jwt,
    "oauth": OAuth,
    "smart": Smart,
    "sigv4": SigV4,
    "google": Google,
    "mtls": Mtls,
}
# How a kind's secret is stored: as a digest, if it is only compared; sealed, if it is used. Other kinds have none.
DIGESTED: Final = frozenset({"token", "oauth"})
SEALED: Final = frozenset({"hmac", "sigv4", "mtls"})
# The minimum length: shorter secrets could be guessed. AWS's own secret keys have 40 characters.
MIN_SECRET_LENGTH: Final = MIN_TOKEN_LENGTH

_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")
_HOST: Final = re.compile(r"(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")  # RFC 9110 7.2, in lower case
_HEADER: Final = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110 5.1, in lower case


def credential_binding(credential_id: int) -> str:
    """Return the binding to which a credential's secret is sealed."""
    return f"credential:{credential_id}"


class CredentialFactory:
    """Makes credentials from rows, under one keyring.

    `reload_after`: seconds after which the first of the credentials changes, because its keys become stale.
    """

    def __init__(self, keyring: Keyring) -> None:
        self.reload_after = math.inf
        self._seals = Sealer(keyring)
        self._digest_keys = {"token": token_key(keyring), "oauth": client_secret_key(keyring)}
        newest = sorted((key for key in keyring.keys if key.purpose == "token"), key=lambda key: key.created)
        self._token_keys = tuple(
            VerifyingKey(kid=key.id, algorithms=frozenset({oauth.ALGORITHM}), key=key.derive("access token"))
            for key in reversed(newest)
        )

    def credential(self, row: Mapping[str, Any], sets: KeySets, now: datetime) -> Credential:
        """Return the credential of a row. `now`: the database's time. Raises ConfigurationError or IntegrityError for a
        bad row.

        A credential to be revoked later (`credential revoke --grace`) is live until then.
        """
        revoked, ends = row["revoked_at"], row["expires_at"]
        if revoked is not None and revoked > now:
            ends, revoked = min(filter(None, (ends, revoked))), None
        common = {"id": row["id"], "expires_at": ends, "revoked": revoked is not None}
        secret = b""
        if row["kind"] in SEALED:
            secret = self._seals.open(row["secret_key"], row["secret"], credential_binding(row["id"]))
        return self._value(row["kind"], row["settings"], common, secret, row["digest"] or b"", sets)

    def resolve(self, kind: str, settings: Mapping[str, Any], secret: bytes | None) -> dict[str, Any]:
        """Return the settings to store. Raises ConfigurationError naming the invalid one."""
        if (secret is not None) != (kind in DIGESTED | SEALED):
            raise ConfigurationError(f"kind {kind} has {'no' if secret is not None else 'a'} secret")
        if secret is not None and len(secret.partition(b"\n")[0]) < MIN_SECRET_LENGTH:
            raise ConfigurationError(
                f"a secret of kind {kind} has at least {MIN_SECRET_LENGTH} characters: a shorter one could be guessed"
            )
        try:
            read = msgspec.convert(dict(settings), KINDS[kind])
        except msgspec.ValidationError as exc:
            raise ConfigurationError(f"kind {kind}: {exc}; see `credential add --help`") from None
        normal: dict[str, Any] = msgspec.to_builtins(_normalized(read))
        # Keys of a URL are fetched later: these are placeholders.
        self._value(kind, normal, {"id": 0}, secret or b"", b"", {})
        return normal

    def same(self, row: Mapping[str, Any], kind: str, settings: Mapping[str, Any], secret: bytes | None) -> bool:
        """Return whether a row is a credential of that kind, secret and settings (as `resolve` returns them)."""
        if row["kind"] != kind or dict(row["settings"]) != settings:
            return False
        if kind in DIGESTED:
            return compare_digest(self.digest(kind, secret or b""), row["digest"])
        if kind in SEALED:
            return compare_digest(
                self._seals.open(row["secret_key"], row["secret"], credential_binding(row["id"])), secret or b""
            )
        return True

    def digest(self, kind: str, secret: bytes) -> bytes:
        """Return the stored digest of a secret that is only compared."""
        return digest(self._digest_keys[kind], secret, "sha256")

    def _value(
        self,
        kind: str,
        settings: Mapping[str, Any],
        common: dict[str, Any],
        secret: bytes,
        digest: bytes,
        sets: KeySets,
    ) -> Credential:
        try:
            read = msgspec.convert(dict(settings), KINDS[kind])
            return _MAKERS[type(read)](self, read, common, secret, digest, sets)
        except (KeyError, msgspec.ValidationError) as exc:
            raise ConfigurationError(f"this version cannot read a credential of kind {kind}") from exc

    # --- kinds

    def _token(self, _: Token, common: dict[str, Any], __: bytes, digest: bytes, ___: KeySets) -> Credential:
        return TokenCredential(digest=digest, key=self._digest_keys["token"], **common)

    def _hmac(self, read: Hmac, common: dict[str, Any], secret: bytes, _: bytes, __: KeySets) -> Credential:
        return HmacCredential(secret=secret, **common, **msgspec.structs.asdict(read))

    def _jwt(self, read: Jwt, common: dict[str, Any], _: bytes, __: bytes, sets: KeySets) -> Credential:
        if bearer.OURS in read.issuers:
            raise ConfigurationError(f"{bearer.OURS} is the issuer of our own access tokens")
        return JwtCredential(rules=self._rules(read, sets), subject=read.subject, **common)

    def _google(self, read: Google, common: dict[str, Any], _: bytes, __: bytes, sets: KeySets) -> Credential:
        return GoogleCredential(rules=self._rules(read, sets), email=read.email, subject=read.subject, **common)

    def _oauth(self, read: OAuth, common: dict[str, Any], _: bytes, digest: bytes, __: KeySets) -> Credential:
        return OAuthCredential(
            client=_client(read), digest=digest, key=self._digest_keys["oauth"], token_keys=self._token_keys, **common
        )

    def _smart(self, read: Smart, common: dict[str, Any], _: bytes, __: bytes, sets: KeySets) -> Credential:
        keys, stale = self._public_keys(read, sets)
        rules = Rules(
            issuers=(read.client_id,),
            audiences=tuple(read.audiences),
            keys=keys,
            stale=stale,
            algorithms=_algorithms(read.algorithms),
            lifetime=read.assertion_lifetime,
            leeway=read.leeway,
            other_audiences=read.other_audiences,
        )
        return SmartCredential(client=_client(read), rules=rules, token_keys=self._token_keys, **common)

    def _sigv4(self, read: SigV4, common: dict[str, Any], secret: bytes, _: bytes, __: KeySets) -> Credential:
        key, newline, session = secret.partition(b"\n")
        return SigV4Credential(
            secret=key,
            session_token=session if newline else None,
            **common | msgspec.structs.asdict(read) | {"hosts": tuple(read.hosts)},
        )

    def _mtls(self, read: Mtls, common: dict[str, Any], secret: bytes, _: bytes, __: KeySets) -> Credential:
        fingerprint = None if read.fingerprint is None else bytes.fromhex(read.fingerprint)
        return MtlsCredential(
            proxy=read.proxy,
            secret=secret,
            secret_header=read.secret_header,
            subject=read.subject,
            san=read.san,
            fingerprint=fingerprint,
            **common,
        )

    # --- public keys

    def _rules(self, read: Jwt | Google, sets: KeySets) -> Rules:
        keys, stale = self._public_keys(read, sets)
        return Rules(
            issuers=tuple(read.issuers),
            audiences=tuple(read.audiences),
            keys=keys,
            stale=stale,
            algorithms=_algorithms(read.algorithms),
            lifetime=read.lifetime,
            leeway=read.leeway,
        )

    def _public_keys(self, read: _Keys | Smart, sets: KeySets) -> tuple[tuple[VerifyingKey, ...], bool]:
        """Return the keys (none until they were fetched), and whether they are stale."""
        if (read.keys is None) == (read.jwks_url is None):
            raise ConfigurationError("public keys come from a file or from a URL: give one of --keys and --jwks-url")
        if read.keys is not None:
            if read.max_stale != MAX_STALE:
                raise ConfigurationError("--max-stale is for keys of a --jwks-url: keys of a file do not get old")
            return read_keys(read.keys.encode()), False
        found = sets.get(read.jwks_url or "")
        if found is None:
            return (), False
        left = read.max_stale - found.age
        self.reload_after = min(self.reload_after, left if left > 0 else _STALE_RELOAD)
        return found.keys, left <= 0


_MAKERS: Final[Mapping[type[_Settings], Callable[..., Credential]]] = {
    Token: CredentialFactory._token,
    Hmac: CredentialFactory._hmac,
    Jwt: CredentialFactory._jwt,
    Google: CredentialFactory._google,
    OAuth: CredentialFactory._oauth,
    Smart: CredentialFactory._smart,
    SigV4: CredentialFactory._sigv4,
    Mtls: CredentialFactory._mtls,
}


def client_secret_key(keyring: Keyring) -> bytes:
    """Return the key under which the secrets of token endpoint clients are digested."""
    return keyring.current("index").derive("client secret")


def _client(read: OAuth) -> Client:
    return Client(
        client_id=read.client_id,
        names=read.names,
        grant_type=read.grant_type,
        audience=read.audience,
        scopes=tuple(read.scopes),
        lifetime=read.lifetime,
    )


def _algorithms(named: list[str]) -> frozenset[str]:
    if unknown := sorted(set(named) - ALGORITHMS):
        raise ConfigurationError(f"{', '.join(unknown)}: choose algorithms of {', '.join(sorted(ALGORITHMS))}")
    return frozenset(named)


def _normalized(read: _Settings) -> _Settings:
    """Return the settings in the form that is compared with requests. Raises ConfigurationError."""
    changes: dict[str, Any] = {}
    for name in ("header", "timestamp_header", "secret_header"):
        value = getattr(read, name, None)
        # A default must stay the same object: msgspec then leaves it out of what is stored.
        if value is not None and (normal := _header(value)) != value:
            changes[name] = normal
    if isinstance(read, SigV4):
        changes["hosts"] = [_host(each) for each in read.hosts]
    if isinstance(read, OAuth) and (unknown := sorted(read.names.keys() - set(tokens.PARAMETERS))):
        raise ConfigurationError(
            f"{', '.join(unknown)}: the parameters that may be renamed are {', '.join(tokens.PARAMETERS)}"
        )
    if isinstance(read, Google) and read.keys is None and read.jwks_url is None:
        changes["jwks_url"] = google.JWKS_URL
    if isinstance(read, Mtls):
        if read.subject is not None:
            changes["subject"] = mtls.normalise_subject(read.subject)
        if read.fingerprint is not None:
            changes["fingerprint"] = read.fingerprint.replace(":", "").lower()
            if not _FINGERPRINT.fullmatch(changes["fingerprint"]):
                raise ConfigurationError(
                    "a fingerprint is SHA-256: 64 hexadecimal digits, as `openssl x509 "
                    "-fingerprint -sha256` prints them"
                )
    changed = msgspec.structs.replace(read, **changes)
    if isinstance(changed, Hmac) and changed.timestamp_header == changed.header:
        raise ConfigurationError("the signature and its time stamp are in two headers: the names must differ")
    return changed


def _header(text: str) -> str:
    name = text.lower()
    if not _HEADER.fullmatch(name):
        raise ConfigurationError("a header's name has letters, digits and hyphens")
    if name in RESERVED_HEADERS or name.startswith(RESERVED_PREFIXES):
        raise ConfigurationError(
            f"{text} is a header that every request has, or that a proxy sets, for another "
            "purpose: the destination would refuse every request; name the header that was agreed "
            "upon"
        )
    return name


def _host(text: str) -> str:
    host = text.lower()
    if not _HOST.fullmatch(host):
        raise ConfigurationError(
            f"{text!r} is not a valid host: write it as the Host header has it, such as "
            "hooks.example.org or hooks.example.org:8443"
        )
    return host
