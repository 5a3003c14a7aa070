"""The options of `credential add` for each kind, and their conversion to the credential's settings.

Must not register a credential or interpret its settings (receiver.storage.registry.credentials does): an error here is
wrong usage.
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
    """A kind of credential: its description, its required and optional options, and whether it has a secret.

    `shown`: the name under which a secret that the command generates is printed; None if it is not generated here.
    """

    text: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    secret: bool = False
    shown: str | None = None


_KEYS: Final = ("keys", "jwks_url", "max_stale", "algorithm", "leeway")
_CLIENT: Final = ("audience", "scope", "lifetime", "parameter", "grant_type")

KINDS: Final[Mapping[str, Kind]] = {
    "token": Kind(text="the verification token", secret=True, shown="verification_token"),
    "hmac": Kind(
        text="the webhook signing secret",
        secret=True,
        takes=("header", "hash", "encoding", "prefix", "timestamp_header", "tolerance"),
    ),
    "jwt": Kind(
        text="a signed JWT with each request", needs=("issuer", "audience"), takes=(*_KEYS, "subject", "lifetime")
    ),
    "oauth": Kind(
        text="an access token that this receiver issues for a client secret",
        needs=("client_id",),
        takes=_CLIENT,
        secret=True,
        shown="client_secret",
    ),
    "smart": Kind(
        text="an access token that this receiver issues for a signed assertion",
        needs=("client_id", "token_url"),
        takes=(*_CLIENT, *_KEYS, "other_audiences"),
    ),
    "sigv4": Kind(
        text="AWS Signature Version 4",
        needs=("access_key", "region", "service"),
        secret=True,
        takes=("host", "session_token_file", "unsigned_payload"),
    ),
    "google": Kind(
        text="a JWT that Google signs", needs=("audience",), takes=(*_KEYS, "issuer", "email", "subject", "lifetime")
    ),
    "mtls": Kind(
        text="a client certificate that your TLS proxy reports",
        needs=("proxy",),
        secret=True,
        shown="proxy_secret",
        takes=("secret_header", "subject", "san", "fingerprint"),
    ),
}

# Option → setting, where their names differ.
_RENAMED: Final = {
    "issuer": "issuers",
    "algorithm": "algorithms",
    "scope": "scopes",
    "parameter": "names",
    "token_url": "audiences",
    "host": "hosts",
}
_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


def _kinds_with(name: str) -> str:
    """The kinds that take an option."""
    return ", ".join(kind for kind, each in KINDS.items() if name in (*each.needs, *each.takes))


def _option(name: str, text: str, **how: Any) -> Any:
    return click.option(f"--{name.replace('_', '-')}", name, help=f"{_kinds_with(name)}: {text}", **how)


kind_options = options(
    click.option(
        "--kind",
        type=click.Choice(list(KINDS)),
        required=True,
        help="; ".join(f"{name}: {each.text}" for name, each in KINDS.items()) + ".",
    ),
    _option("header", "header with the signature.  [default: redox-signature]"),
    _option("hash", "hash function.  [default: sha256]", type=click.Choice(["sha256", "sha384", "sha512"])),
    _option(
        "encoding", "encoding of the signature.  [default: base64]", type=click.Choice(["hex", "base64", "base64url"])
    ),
    _option("prefix", "text before the signature, such as sha256=.  [default: none]"),
    _option("timestamp_header", "header with Unix seconds; TIMESTAMP.BODY is signed.  [default: none]"),
    _option(
        "tolerance", "largest difference of the timestamp, in seconds.  [default: 300]", type=click.IntRange(1, 86_400)
    ),
    _option("issuer", "accepted issuer (iss); may be repeated.", multiple=True),
    _option(
        "audience", "accepted audience (aud), or the audience that Redox requests; may be repeated.", multiple=True
    ),
    _option("subject", "required subject (sub), or subject of the certificate (RFC 4514)."),
    _option("email", "e-mail address of the service account."),
    _option("keys", "public keys of the signer, as JWKS or PEM.", type=_FILE, metavar="FILE"),
    _option(
        "jwks_url", "URL (https) of the JWKS, fetched periodically.  [default for google: Google's]", metavar="URL"
    ),
    _option(
        "max_stale",
        "trust fetched keys for TIME (such as 72h or 7d) after the last successful fetch; "
        "after that, requests get 503.  [default: 72h]",
        type=Span(),
        metavar="TIME",
    ),
    _option("algorithm", "accepted algorithm, such as RS384; may be repeated.", multiple=True),
    _option("leeway", "tolerated clock difference, in seconds.  [default: 30]", type=click.IntRange(0, 300)),
    _option(
        "lifetime",
        "longest lifetime of a token, in seconds.  [default: 3600; for oauth and smart 300]",
        type=click.IntRange(1, 86_400),
    ),
    _option("client_id", "client id, as entered in the Redox dashboard."),
    _option(
        "token_url", "public URL of this receiver's token endpoint; may be repeated.", multiple=True, metavar="URL"
    ),
    _option("other_audiences", "accept assertions that name audiences other than --token-url too.", is_flag=True),
    _option("scope", "scope that Redox may request; may be repeated.", multiple=True),
    _option("grant_type", "required grant_type.  [default: client_credentials]"),
    _option(
        "parameter",
        "read the parameter NAME from the form field SENT; may be repeated.",
        multiple=True,
        metavar="NAME=SENT",
    ),
    _option("access_key", "AWS access key id."),
    _option("region", "AWS region."),
    _option("service", "AWS service name."),
    _option("host", "accepted Host header; may be repeated.  [default: any]", multiple=True, metavar="HOST[:PORT]"),
    _option("session_token_file", "file with the session token.", type=_FILE, metavar="FILE"),
    _option("unsigned_payload", "accept signatures that do not cover the body.", is_flag=True),
    _option("proxy", "proxy that verifies the certificates.", type=click.Choice(["nginx", "envoy", "aws-alb"])),
    _option("secret_header", "header with the proxy's secret.  [default: x-proxy-secret]"),
    _option("san", "required DNS name or URI of the certificate."),
    _option("fingerprint", "required SHA-256 fingerprint of the certificate, in hexadecimal."),
)


def settings(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert options to settings. Raises UsageError for an option that the kind does not take, or lacks."""
    of = KINDS[kind]
    chosen = {name: value for name, value in given.items() if value not in (None, (), False)}
    for name in chosen:
        if name not in (*of.needs, *of.takes):
            raise click.UsageError(
                f"--{name.replace('_', '-')} is not valid for --kind {kind}: it belongs to {_kinds_with(name)}"
            )
    for name in of.needs:
        if name not in chosen:
            raise click.UsageError(f"--kind {kind} requires --{name.replace('_', '-')}")
    chosen.pop("session_token_file", None)
    return dict(_setting(kind, name, value) for name, value in chosen.items())


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
            raise click.UsageError(f"--kind {kind} takes only one --audience")
        return name, value[0]
    return _RENAMED.get(name, name), list(value) if isinstance(value, tuple) else value


def _names(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, sent = pair.partition("=")
        if not equals or not sent:
            raise click.BadParameter(f"{pair!r} is not valid: use NAME=SENT, such as client_id=clientId")
        found[name] = sent
    return found
