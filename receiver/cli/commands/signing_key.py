"""`signing-key`: the keys that we sign with when we speak to Redox.

May not show a private key: those never leave the database but to sign.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import click

from receiver.cli import output
from receiver.cli.options import example, json_option
from receiver.cli.session import Session, opened
from receiver.storage.registry import loader
from receiver.storage.registry.signing_keys import Algorithm, SigningKeys, rows
from receiver.web.jwks import PATH

COLUMNS: Final = ("kid", "algorithm", "state", "created_at", "activated_at", "retired_at")


@click.group("signing-key")
def signing_key() -> None:
    """The keys that we sign with when we speak to Redox, made here and kept sealed.

    Give Redox the URL of the public listener that ends with /.well-known/jwks.json: it looks the public halves up
    there, so that keys can be rotated without the dashboard.
    """


_algorithm = click.option(
    "--algorithm",
    type=click.Choice(["RS384", "ES384"]),
    help="RS384 (RSA, 3072 bits) is what Redox recommends; ES384 is on P-384.",
)


@signing_key.command(epilog=example("signing-key new", "signing-key new --algorithm ES384 --json"))
@_algorithm
@json_option
def new(*, algorithm: Algorithm | None, as_json: bool) -> None:
    """Make a key. The first one signs at once; another is published, and waits for `rotate`."""
    with opened() as session:
        made = _verbs(session).new(datetime.now(UTC), algorithm or "RS384")
    output.row(made, as_json=as_json)
    if made["state"] == "active":
        output.say(f"Redox is to be given the URL that ends with {PATH}, or this public key")


@signing_key.command(epilog=example("signing-key rotate"))
@_algorithm
@json_option
def rotate(*, algorithm: Algorithm | None, as_json: bool) -> None:
    """Have another key sign: the newest that waits, else one made now. The one before stays published.

    Where Redox was given the URL, it finds the new key there. Retire the old one some minutes later.
    """
    with opened() as session:
        output.row(_verbs(session).rotate(datetime.now(UTC), algorithm), as_json=as_json)


# A kid is base64url, and may begin with a hyphen.
@signing_key.command(context_settings={"ignore_unknown_options": True}, epilog=example("signing-key retire KID"))
@click.argument("kid")
@json_option
def retire(kid: str, *, as_json: bool) -> None:
    """Publish key KID no longer, and forget its private half."""
    with opened() as session:
        output.row(_verbs(session).retire(kid, datetime.now(UTC)), as_json=as_json)


@signing_key.command("list", epilog=example("signing-key list"))
@output.columns_option
@json_option
def list_(*, as_json: bool) -> None:
    """List the keys, newest first."""
    with opened() as session, session.engine.connect() as connection:
        found = rows(connection)
    output.rows(found, COLUMNS, as_json=as_json, nothing="no signing key yet: `redox-receiver signing-key new`")


@signing_key.command(epilog=example("signing-key jwks > jwks.json"))
@click.option("--json", is_flag=True, expose_value=False, help="Nothing but JSON is printed in any case.")
def jwks() -> None:
    """Print what the public listener serves: the public halves of all keys that are not retired."""
    with opened() as session, session.engine.connect() as connection:
        output.document({"keys": loader.load_registry(connection, session.keyring).public_keys})


def _verbs(session: Session) -> SigningKeys:
    return SigningKeys(session.engine, session.keyring, actor=session.actor)
