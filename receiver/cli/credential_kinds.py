"""The options of `credential add`, kind by kind, and what they say as the settings of receiver.storage.registry.credentials.

May not register anything, nor decide what a setting means: what is wrong here is wrong usage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from receiver.cli.options import Span, options


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What `--kind` stands for: in a few words, the options that it needs and takes, and its secret, if it has one.

    `shown`: under which name a secret is printed that was made here; None: it is made elsewhere, and asked for.
    """

    says: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    secret: bool = False
    shown: str | None = None


_KEYS: Final = ("keys", "jwks_url", "max_stale", "algorithm", "leeway")
_CLIENT: Final = ("audience", "scope", "lifetime", "parameter", "grant_type")

KINDS: Final[Mapping[str, Kind]] = {
    "token": Kind(says="the verification token", secret=True, shown="verification_token"),
    "hmac": Kind(
        says="the webhook signing secret",
        secret=True,
        takes=("header", "hash", "encoding", "prefix", "timestamp_header", "tolerance"),
    ),
    "jwt": Kind(
        says="a signed token with each request", needs=("issuer", "audience"), takes=(*_KEYS, "subject", "lifetime")
    ),
    "oauth": Kind(
        says="an access token of ours, for a client secret",
        needs=("client_id",),
        takes=_CLIENT,
        secret=True,
        shown="client_secret",
    ),
    "smart": Kind(
        says="an access token of ours, for a signed assertion",
        needs=("client_id", "token_url"),
        takes=(*_CLIENT, *_KEYS, "other_audiences"),
    ),
    "sigv4": Kind(
        says="AWS Signature Version 4",
        needs=("access_key", "region", "service"),
        secret=True,
        takes=("host", "session_token_file", "unsigned_payload"),
    ),
    "google": Kind(
        says="a token that Google signed", needs=("audience",), takes=(*_KEYS, "issuer", "email", "subject", "lifetime")
    ),
    "mtls": Kind(
        says="a client certificate, as the proxy in front reports it",
        needs=("proxy",),
        secret=True,
        shown="proxy_secret",
        takes=("secret_header", "subject", "san", "fingerprint"),
    ),
}

# Options that say the same under a name of their own, or in several parts.
_RENAMED: Final = {
    "issuer": "issuers",
    "algorithm": "algorithms",
    "scope": "scopes",
    "parameter": "names",
    "token_url": "audiences",
    "host": "hosts",
}
_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


def _of(name: str) -> str:
    """The kinds that an option is of."""
    return ", ".join(kind for kind, each in KINDS.items() if name in (*each.needs, *each.takes))


def _option(name: str, says: str, **how: Any) -> Any:
    return click.option(f"--{name.replace('_', '-')}", name, help=f"{_of(name)}: {says}", **how)


kind_options = options(
    click.option(
        "--kind",
        type=click.Choice(list(KINDS)),
        required=True,
        help="; ".join(f"{name}: {each.says}" for name, each in KINDS.items()) + ".",
    ),
    _option("header", "the header with the signature.  [default: redox-signature]"),
    _option("hash", "the hash.  [default: sha256]", type=click.Choice(["sha256", "sha384", "sha512"])),
    _option("encoding", "how it is written.  [default: base64]", type=click.Choice(["hex", "base64", "base64url"])),
    _option("prefix", "what stands before the signature, such as sha256="),
    _option("timestamp_header", "a header with Unix seconds; signed before the body, with a full stop."),
    _option("tolerance", "seconds that it may differ.  [default: 300]", type=click.IntRange(1, 86_400)),
    _option("issuer", "who signs (iss); may be repeated.", multiple=True),
    _option("audience", "whom it is for (aud), or what Redox asks a token for; may be repeated.", multiple=True),
    _option("subject", "the one it is about (sub), or of the certificate (RFC 4514)."),
    _option("email", "the account's e-mail."),
    _option("keys", "the signer's public keys: a JWKS, or PEM.", type=_FILE, metavar="FILE"),
    _option(
        "jwks_url",
        "where they are published (https); fetched again on a timer.  [default of google: Google's]",
        metavar="URL",
    ),
    _option(
        "max_stale",
        "trust the keys of the URL for TIME after the last fetch that succeeded, such as 72h or 7d; "
        "then requests are answered 503.  [default: 72h]",
        type=Span(),
        metavar="TIME",
    ),
    _option("algorithm", "what may sign, such as RS384; may be repeated.", multiple=True),
    _option("leeway", "seconds that the signer's clock may be wrong.  [default: 30]", type=click.IntRange(0, 300)),
    _option("lifetime", "seconds that a token may live.  [default: 3600; of ours 300]", type=click.IntRange(1, 86_400)),
    _option("client_id", "the client id that is typed into the dashboard."),
    _option("token_url", "our token endpoint as Redox calls it; may be repeated.", multiple=True, metavar="URL"),
    _option("other_audiences", "let an assertion name audiences beyond --token-url.", is_flag=True),
    _option("scope", "a scope that may be asked for; may be repeated.", multiple=True),
    _option("grant_type", "what grant_type says.  [default: client_credentials]"),
    _option(
        "parameter", "Redox sends the parameter NAME as SENT; may be repeated.", multiple=True, metavar="NAME=SENT"
    ),
    _option("access_key", "the access key."),
    _option("region", "the region."),
    _option("service", "the service's name."),
    _option(
        "host",
        "a Host header that a request may be signed for; may be repeated.  [default: any]",
        multiple=True,
        metavar="HOST[:PORT]",
    ),
    _option("session_token_file", "the session token is in FILE.", type=_FILE, metavar="FILE"),
    _option("unsigned_payload", "let the body be left out of the signature.", is_flag=True),
    _option("proxy", "who checks certificates.", type=click.Choice(["nginx", "envoy", "aws-alb"])),
    _option("secret_header", "the header with the proxy's secret.  [default: x-proxy-secret]"),
    _option("san", "a DNS name or URI of the certificate."),
    _option("fingerprint", "SHA-256 of the certificate, in hexadecimal."),
)


def settings(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the options say. Raises UsageError for an option that is not of the kind, or is missing."""
    of = KINDS[kind]
    said = {name: value for name, value in given.items() if value not in (None, (), False)}
    for name in said:
        if name not in (*of.needs, *of.takes):
            raise click.UsageError(f"--{name.replace('_', '-')} is of --kind {_of(name)}")
    for name in of.needs:
        if name not in said:
            raise click.UsageError(f"--kind {kind} needs --{name.replace('_', '-')}")
    said.pop("session_token_file", None)
    return dict(_setting(kind, name, value) for name, value in said.items())


def _setting(kind: str, name: str, value: Any) -> tuple[str, Any]:
    if name == "max_stale":
        return name, int(value.total_seconds())
    if name == "keys":
        return name, value.read_bytes().decode("utf-8", "replace")
    if name == "parameter":
        return "names", _names(value)
    if name == "audience":
        if "client_id" not in KINDS[kind].needs:
            return "audiences", list(value)
        if len(value) > 1:
            raise click.UsageError(f"--kind {kind} takes one --audience")
        return name, value[0]
    return _RENAMED.get(name, name), list(value) if isinstance(value, tuple) else value


def _names(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, sent = pair.partition("=")
        if not equals or not sent:
            raise click.BadParameter(f"{pair!r}: write NAME=SENT, such as client_id=clientId")
        found[name] = sent
    return found
