"""The command group `signing-key`: manages the keys that sign this host's requests to Redox.

Must not show a private key.
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
    """Manage the keys that sign requests to Redox. They are generated here and stored encrypted.

    Give Redox the public URL that ends with /.well-known/jwks.json. Redox reads the public keys there, so that you can
    rotate keys without the dashboard.
    """


_algorithm = click.option(
    "--algorithm",
    type=click.Choice(["RS384", "ES384"]),
    help="RS384 (RSA, 3072 bits), which Redox recommends, or ES384 (P-384).  [default: RS384]",
)


@signing_key.command(epilog=example("signing-key new", "signing-key new --algorithm ES384 --json"))
@_algorithm
@json_option
def new(*, algorithm: Algorithm | None, as_json: bool) -> None:
    """Generate a key. The first key becomes active at once; a later one is published and waits for `rotate`."""
    with opened() as session:
        made = _signing_keys(session).new(datetime.now(UTC), algorithm or "RS384")
    output.row(made, as_json=as_json)
    if made["state"] == "active":
        output.say(f"give Redox the public URL that ends with {PATH}, or this public key")


@signing_key.command(epilog=example("signing-key rotate"))
@_algorithm
@json_option
def rotate(*, algorithm: Algorithm | None, as_json: bool) -> None:
    """Activate another key: the newest waiting key, or else a new one. The previous key stays published.

    If Redox has the URL, it reads the new key there. Retire the previous key some minutes later.
    """
    with opened() as session:
        output.row(_signing_keys(session).rotate(datetime.now(UTC), algorithm), as_json=as_json)


# A kid is base64url, and may begin with a hyphen.
@signing_key.command(context_settings={"ignore_unknown_options": True}, epilog=example("signing-key retire KID"))
@click.argument("kid")
@json_option
def retire(kid: str, *, as_json: bool) -> None:
    """Stop publishing key KID, and delete its private key."""
    with opened() as session:
        output.row(_signing_keys(session).retire(kid, datetime.now(UTC)), as_json=as_json)


@signing_key.command("list", epilog=example("signing-key list"))
@output.columns_option
@json_option
def list_(*, as_json: bool) -> None:
    """List the keys, newest first."""
    with opened() as session, session.engine.connect() as connection:
        found = rows(connection)
    output.rows(found, COLUMNS, as_json=as_json, nothing="no signing key yet: `redox-receiver signing-key new`")


@signing_key.command(epilog=example("signing-key jwks > jwks.json"))
@click.option("--json", is_flag=True, expose_value=False, help="No effect: the output is always JSON.")
def jwks() -> None:
    """Print the JWKS that the public listener serves: the public keys that are not retired."""
    with opened() as session, session.engine.connect() as connection:
        output.document({"keys": loader.load_registry(connection, session.keyring).public_keys})


def _signing_keys(session: Session) -> SigningKeys:
    return SigningKeys(session.engine, session.keyring, actor=session.actor)
