"""`credential`: what proves that a request is Redox's.

May not show a secret but a verification token that was made here, once.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click

from receiver.cli import output
from receiver.cli.options import SECRET_FILE, When, example, json_option, new_file, read_secret
from receiver.cli.session import opened
from receiver.storage import reading
from receiver.storage.registration import new_token

COLUMNS: Final = ("id", "destination", "kind", "label", "live", "expires_at", "last_used_at", "revoked_at")


@click.group()
def credential() -> None:
    """What proves that a request is Redox's. Several may be live at once, so that one can be changed for another."""


@credential.command(epilog=example(
    "credential add lab --kind token --label 2026 --expires 90d",
    "credential add lab --kind hmac --secret-file - --header x-redox-signature --encoding hex --prefix sha256="))
@click.argument("destination")
@click.option("--kind", type=click.Choice(["token", "hmac"]), required=True,
              help="token: the verification token; hmac: the webhook signing secret.")
@click.option("--secret-file", type=SECRET_FILE, metavar="FILE",
              help="The secret is in FILE (-: stdin). Without it a token is made, and a signing secret is asked for.")
@click.option("--token-out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write the new verification token to FILE (0600) instead of printing it.")
@click.option("--label", metavar="TEXT", help="What people call it.")
@click.option("--expires", "expires_at", type=When(ahead=True), metavar="TIME",
              help="From when on it opens nothing: an ISO 8601 time, or 90d from now.")
@click.option("--header", help="hmac: the header with the signature.  [default: redox-signature]")
@click.option("--hash", "hash_", type=click.Choice(["sha256", "sha384", "sha512"]), help="hmac.  [default: sha256]")
@click.option("--encoding", type=click.Choice(["hex", "base64", "base64url"]), help="hmac.  [default: base64]")
@click.option("--prefix", help="hmac: what stands before the signature, such as sha256=")
@click.option("--timestamp-header", help="hmac: a header with Unix seconds; signed before the body, with a full stop.")
@click.option("--tolerance", type=click.IntRange(1, 86_400), help="hmac: seconds that it may differ.  [default: 300]")
@json_option
def add(destination: str, *, kind: str, secret_file: Path | None, token_out: Path | None, label: str | None,
        expires_at: datetime | None, hash_: str | None, as_json: bool, **settings: Any) -> None:
    """Add a credential to DESTINATION.

    Redox publishes no wire form of its signatures: look at what arrives, and set the options of hmac by it.
    """
    settings = {name: value for name, value in (settings | {"hash": hash_}).items() if value is not None}
    if kind == "hmac":
        if token_out is not None:
            raise click.UsageError("--token-out is of --kind token: Redox makes the signing secret")
        settings |= {name: settings[name].lower() for name in ("header", "timestamp_header") if name in settings}
        token, made = _signing_secret(secret_file), False
    else:
        if settings:
            raise click.UsageError(f"--{min(settings).replace('_', '-')} is of --kind hmac")
        if secret_file is not None and token_out is not None:
            raise click.UsageError("--secret-file takes a token that there is, --token-out writes a new one: choose")
        token, made = (new_token(), True) if secret_file is None else (read_secret(secret_file), False)
    now = datetime.now(UTC)
    with opened() as session, new_file(token_out, token.encode()):
        if kind == "hmac":
            number = session.registration.add_hmac(destination, now, token.encode(), settings, label=label,
                                                   expires_at=expires_at)
        else:
            number = session.registration.add_token(destination, now, token, label=label, expires_at=expires_at)
    output.row({"id": number, "destination": destination, "kind": kind, "label": label, "expires_at": expires_at,
                "settings": settings, "verification_token": token if made and token_out is None else None},
               as_json=as_json)


def _signing_secret(file: Path | None) -> str:
    if file is None and sys.stdin.isatty():
        return str(click.prompt("Signing secret", hide_input=True, err=True))
    return read_secret(file or Path("-"))


@credential.command("list", epilog=example("credential list lab"))
@click.argument("destination", required=False)
@json_option
def list_(destination: str | None, *, as_json: bool) -> None:
    """List credentials, of DESTINATION alone if named: until when each is live, and when it was last used."""
    with opened() as session, session.engine.connect() as connection:
        found = reading.credentials(connection, destination=destination)
    output.rows(found, COLUMNS, as_json=as_json, nothing="no credential: `redox-receiver credential add DESTINATION`")


@credential.command(epilog=example("credential revoke 7"))
@click.argument("number", metavar="ID", type=int)
@json_option
def revoke(number: int, *, as_json: bool) -> None:
    """Close credential ID for good, within a second."""
    with opened() as session:
        session.registration.revoke_credential(number, datetime.now(UTC))
        with session.engine.connect() as connection:
            found = reading.credentials(connection)
            gone = next(each for each in found if each["id"] == number)
            require = reading.destination_named(connection, gone["destination"])["require"]
    output.row(gone, as_json=as_json)
    live = {each["kind"] for each in found if each["destination"] == gone["destination"] and each["live"]}
    if not any(live.issuperset(alternative.split("+")) for alternative in require):
        output.say(f"{gone['destination']} has no live credential of what it requires ({', '.join(require)}), and so "
                   f"refuses everything: `redox-receiver credential add {gone['destination']} --kind {gone['kind']}`")
