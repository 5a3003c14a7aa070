"""Files that describe how the simulated Redox authenticates, for `simulate --present`: one type for each kind."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

import msgspec

from receiver.errors import ConfigurationError
from receiver.simulator.client_auth import (
    AccessTokenAuthenticator,
    Authenticator,
    CertificateAuthenticator,
    HmacAuthenticator,
    SignedTokenAuthenticator,
    SigV4Authenticator,
)
from receiver.simulator.signer import Signer


class AuthenticatorFile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The content of an authenticator's file. Values whose names end in _file are paths relative to its folder."""

    def authenticator(self, values: dict[str, Any], files: Mapping[str, str], token_url: str) -> Authenticator:
        """Return the authenticator. `values`: everything but paths. `files`: NAME of NAME_file → the file's text."""
        raise NotImplementedError


class HmacFile(AuthenticatorFile, kw_only=True):
    """Kind hmac: the webhook signing secret, and how it signs."""

    secret_file: str
    header: str = "Redox-Signature"
    hash: Literal["sha256", "sha384", "sha512"] = "sha256"
    encoding: Literal["hex", "base64", "base64url"] = "base64"
    prefix: str = ""
    timestamp_header: str | None = None

    def authenticator(self, values: dict[str, Any], files: Mapping[str, str], _: str) -> Authenticator:
        """See AuthenticatorFile."""
        return HmacAuthenticator(signer=Signer(secret=files["secret"].encode(), **values))


class JwtFile(AuthenticatorFile, kw_only=True):
    """Kind jwt: a private key in PEM, and the claims of its tokens."""

    key_file: str
    algorithm: str
    issuer: str
    audience: str
    kid: str | None = None
    subject: str | None = None
    lifetime: int = 300

    def authenticator(self, values: dict[str, Any], files: Mapping[str, str], _: str) -> Authenticator:
        """See AuthenticatorFile."""
        return SignedTokenAuthenticator(key=files["key"], **values)


class GoogleFile(JwtFile, kw_only=True):
    """Kind google: a private key that stands for Google's."""

    algorithm: str = "RS256"
    issuer: str = "https://accounts.google.com"
    email: str | None = None


class OAuthFile(AuthenticatorFile, kw_only=True):
    """Kind oauth: a client of the token endpoint with a secret."""

    client_id: str
    secret_file: str
    token_url: str | None = None
    send: Literal["basic", "form", "json"] = "basic"
    names: dict[str, str] = {}
    audience: str | None = None
    scope: str | None = None

    def authenticator(self, values: dict[str, Any], files: Mapping[str, str], token_url: str) -> Authenticator:
        """See AuthenticatorFile."""
        return AccessTokenAuthenticator(token_url, secret=files["secret"], **values)


class SmartFile(AuthenticatorFile, kw_only=True):
    """Kind smart: a client of the token endpoint with a private key."""

    client_id: str
    key_file: str
    kid: str | None = None
    algorithm: str = "RS384"
    token_url: str | None = None
    audience: str | None = None
    scope: str | None = None

    def authenticator(self, values: dict[str, Any], files: Mapping[str, str], token_url: str) -> Authenticator:
        """See AuthenticatorFile."""
        assertion = SignedTokenAuthenticator(
            key=files["key"],
            algorithm=values["algorithm"],
            issuer=values["client_id"],
            subject=values["client_id"],
            audience=token_url,
            kid=values["kid"],
        )
        return AccessTokenAuthenticator(
            token_url, values["client_id"], assertion=assertion, audience=values["audience"], scope=values["scope"]
        )


class SigV4File(AuthenticatorFile, kw_only=True):
    """Kind sigv4: an AWS access key."""

    access_key: str
    secret_file: str
    region: str
    service: str
    session_token_file: str | None = None
    unsigned_payload: bool = False

    def authenticator(self, values: dict[str, Any], files: Mapping[str, str], _: str) -> Authenticator:
        """See AuthenticatorFile."""
        return SigV4Authenticator(**values | dict(files))


class MtlsFile(AuthenticatorFile, kw_only=True):
    """Kind mtls: a client certificate in PEM, and the proxy that reports it."""

    proxy: Literal["nginx", "envoy", "aws-alb"]
    certificate_file: str
    secret_file: str
    secret_header: str = "x-proxy-secret"  # noqa: S105 - a header's name

    def authenticator(self, values: dict[str, Any], files: Mapping[str, str], _: str) -> Authenticator:
        """See AuthenticatorFile."""
        return CertificateAuthenticator(pem=files["certificate"], secret=files["secret"], **values)


# The file of each credential kind. The verification token is sent with every request and has none.
FILES: Final[dict[str, type[AuthenticatorFile]]] = {
    "hmac": HmacFile,
    "jwt": JwtFile,
    "google": GoogleFile,
    "oauth": OAuthFile,
    "smart": SmartFile,
    "sigv4": SigV4File,
    "mtls": MtlsFile,
}


def read_authenticator(path: Path, *, base_url: str, destination: str) -> Authenticator:
    """Read an authenticator from a TOML file: its `kind`, and the values that this kind needs.

    `token_url`: default is the token endpoint of `destination` at `base_url`. Raises ConfigurationError.
    """
    try:
        table = tomllib.loads(path.read_text())
        kind = table.pop("kind", None)
        if kind not in FILES:
            raise ConfigurationError(f"{path}: set kind to one of {', '.join(FILES)}")
        described = msgspec.convert(table, FILES[kind])
        files = {
            name.removesuffix("_file"): (path.parent / getattr(described, name)).read_text().rstrip("\r\n")
            for name in described.__struct_fields__
            if name.endswith("_file") and getattr(described, name)
        }
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as exc:
        raise ConfigurationError(f"{path}: {exc}") from exc
    values = {name: value for name, value in msgspec.structs.asdict(described).items() if not name.endswith("_file")}
    token_url = values.pop("token_url", None) or f"{base_url.rstrip('/')}/oauth/{quote(destination)}/token"
    return described.authenticator(values, files, token_url)
