"""`credential`: what proves that a request is Redox's.

May not show a secret but one that was made here, once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import click

from receiver.cli import credential_kinds, output
from receiver.cli.options import SECRET_FILE, Span, When, example, json_option, new_file, read_secret
from receiver.cli.session import Session, opened
from receiver.errors import NotFound
from receiver.outbound.jwks import fetch
from receiver.protocol.verification import KINDS
from receiver.protocol.verification.kind import Secret
from receiver.storage.operations import queries
from receiver.storage.registry.changes import new_token
from receiver.storage.registry.credentials import CredentialFactory

COLUMNS: Final = ("id", "destination", "kind", "label", "live", "expires_at", "last_used_at", "revoked_at")


@click.group()
def credential() -> None:
    """What proves that a request is Redox's. Several may be live at once, so that one can be changed for another."""


@credential.command(
    epilog=example(
        "credential add lab --kind token --label 2026 --expires 90d",
        "credential add lab --kind hmac --secret-file - --header x-redox-signature --encoding hex --prefix sha256=",
        "credential add lab --kind oauth --client-id redox",
        "credential add lab --kind smart --client-id redox --token-url https://HOST/oauth/lab/token --keys jwks.json",
        "credential add lab --kind jwt --issuer ISSUER --audience https://HOST/redox/lab --jwks-url https://KEYS",
        "credential add lab --kind google --audience https://HOST/redox/lab --email NAME@PROJECT.iam.gserviceaccount.com",
        "credential add lab --kind sigv4 --access-key KEY --region us-east-1 --service execute-api --secret-file -",
        "credential add lab --kind mtls --proxy nginx --fingerprint HEX",
    )
)
@click.argument("destination")
@click.option(
    "--secret-file",
    type=SECRET_FILE,
    metavar="FILE",
    help="The secret is in FILE (-: stdin). Without it one is made, if that is for us to do, or asked for.",
)
@click.option(
    "--token-out",
    "--secret-out",
    "secret_out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the secret that is made here to FILE (0600) instead of printing it.",
)
@click.option("--label", metavar="TEXT", help="What people call it.")
@click.option(
    "--expires",
    "expires_at",
    type=When(ahead=True),
    metavar="TIME",
    help="From when on it opens nothing: an ISO 8601 time, or 90d from now.",
)
@credential_kinds.kind_options
@json_option
def add(
    destination: str,
    *,
    kind: str,
    secret_file: Path | None,
    secret_out: Path | None,
    label: str | None,
    expires_at: datetime | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Add a credential to DESTINATION. `destination set --require` says what a request must prove.

    Redox publishes no wire form of its signatures, and no claims of its tokens: look at what arrives, and set the
    options by it.
    """
    settings = credential_kinds.settings(kind, given)
    secret, made = _secret(kind, secret_file, secret_out)
    second = credential_kinds.second_secret(kind, given)
    content = secret if second is None else f"{secret}\n{second}"
    now = datetime.now(UTC)
    with opened() as session, new_file(secret_out, (secret or "").encode()):
        kept = None if content is None else content.encode("utf-8", "surrogateescape")
        settings = CredentialFactory(session.keyring).resolve(kind, settings, kept)
        fetched = fetch(settings["jwks_url"]) if "jwks_url" in settings else None
        number = session.registration.add_credential(
            destination, now, kind, settings, kept, label=label, expires_at=expires_at, fetched=fetched
        )
        with session.engine.connect() as connection:
            added = next(
                each for each in queries.credentials(connection, destination=destination) if each["id"] == number
            )
            require = queries.destination_named(connection, destination)["require"]
    shown = KINDS[kind].made
    row = {name: added[name] for name in ("id", "destination", "kind", "label", "expires_at", "settings")}
    if KINDS[kind].token_endpoint:
        row["token_path"] = f"/oauth/{destination}/token"
    if shown is not None:
        row[shown] = secret if made and secret_out is None else None if as_json else f"(in {secret_out or secret_file})"
    output.row(row, as_json=as_json)
    if not any(kind in alternative.split("+") for alternative in require):
        output.say(f"{destination} does not require {kind} yet ({', '.join(require)}): see `destination set --help`")


def _secret(kind: str, file: Path | None, out: Path | None) -> tuple[str | None, bool]:
    """The credential's secret, None where it has none, and whether it was made here."""
    of = KINDS[kind]
    if of.secret is Secret.NONE and file is not None:
        raise click.UsageError(f"--kind {kind} has no secret: --secret-file is of those that have one")
    if of.made is None and out is not None:
        raise click.UsageError(f"--secret-out writes a secret that is made here, and that of --kind {kind} is not")
    if file is not None and out is not None:
        raise click.UsageError("--secret-file takes a secret that there is, --secret-out writes a new one: choose one")
    if of.secret is Secret.NONE:
        return None, False
    if of.made is not None and file is None:
        return new_token(), True
    if file is None and sys.stdin.isatty():
        return str(click.prompt(f"Secret of {of.says}", hide_input=True, err=True)), False
    return read_secret(file or Path("-")), False


@credential.command("list", epilog=example("credential list lab"))
@click.argument("destination", required=False)
@output.columns_option
@json_option
def list_(destination: str | None, *, as_json: bool) -> None:
    """List credentials, of DESTINATION alone if named: until when each is live, and when it was last used."""
    with opened() as session, session.engine.connect() as connection:
        found = queries.credentials(connection, destination=destination)
    output.rows(
        found,
        COLUMNS,
        as_json=as_json,
        nothing=("no credential, so everything is refused: `redox-receiver credential add DESTINATION --kind token`"),
    )


@credential.command("set", epilog=example("credential set 7 --expires 90d", "credential set 7 --expires never"))
@click.argument("number", metavar="ID", type=int)
@click.option(
    "--expires",
    "expires_at",
    metavar="TIME",
    help="Expire at TIME (ISO 8601, or a duration from now such as 90d); `never`: not at all.",
)
@click.option("--label", metavar="TEXT", help="What people call it; empty: nothing.")
@json_option
def change(number: int, *, expires_at: str | None, label: str | None, as_json: bool) -> None:
    """Change when credential ID expires, also after it has, or its label. Redox needs no change for it."""
    values: dict[str, Any] = {}
    if expires_at is not None:
        values["expires_at"] = None if expires_at == "never" else When(ahead=True)(expires_at)
    if label is not None:
        values["label"] = label or None
    if not values:
        raise click.UsageError("say what to change: --expires or --label")
    with opened() as session:
        session.registration.set_credential(number, datetime.now(UTC), values)
        found, _ = _shown(session, number)
    output.row(found, as_json=as_json)


@credential.command(
    epilog=example("credential revoke 7", "credential revoke 7 --grace 1h", "credential revoke 7 --undo")
)
@click.argument("number", metavar="ID", type=int)
@click.option("--grace", type=Span(), metavar="DURATION", help="Let it work for so long, such as 1h; then close it.")
@click.option("--undo", is_flag=True, help="Take a revocation with --grace back, before its time has come.")
@click.option("--yes", is_flag=True, help="On a terminal, do not ask about one that may be in use.")
@json_option
def revoke(number: int, *, grace: timedelta | None, undo: bool, yes: bool, as_json: bool) -> None:
    """Close credential ID for good, within a second; with --grace after a while, which --undo can take back.

    Warns when no other credential that could take its place was used in the last day: Redox may still send this one,
    and would be refused.
    """
    if undo and grace is not None:
        raise click.UsageError("--grace revokes and --undo takes that back: give one")
    with opened() as session:
        found, others = _shown(session, number)
        if undo:
            session.registration.restore_credential(number, datetime.now(UTC))
        else:
            if found["live"] and (warning := _in_use(session, found, others)):
                output.say(warning)
                if grace is None and not yes and _asks():
                    click.confirm("Revoke it at once?", abort=True, err=True)
            session.registration.revoke_credential(number, datetime.now(UTC), grace=grace)
        found, others = _shown(session, number)
        with session.engine.connect() as connection:
            require = queries.destination_named(connection, found["destination"])["require"]
    output.row(found, as_json=as_json)
    name, live = found["destination"], {each["kind"] for each in others if each["live"]}
    if grace is not None:
        output.say(
            f"it works until {output.cell(found['revoked_at'])}: `redox-receiver credential revoke {number} "
            "--undo` takes that back"
        )
    elif not undo and not any(live.issuperset(alternative.split("+")) for alternative in require):
        output.say(
            f"{name} has no live credential of what it requires ({', '.join(require)}), and so refuses "
            f"everything: `redox-receiver credential add {name} --kind {found['kind']}`"
        )


def _asks() -> bool:
    """Whether somebody is there to answer."""
    return sys.stdin.isatty()


def _shown(session: Session, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Credential `number`, and the others of its destination. Raises NotFound."""
    with session.engine.connect() as connection:
        rows = queries.credentials(connection)
    found = next((each for each in rows if each["id"] == number), None)
    if found is None:
        raise NotFound(f"there is no credential {number}: see `redox-receiver credential list`")
    return found, [each for each in rows if each["destination"] == found["destination"] and each["id"] != number]


def _in_use(session: Session, found: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str | None:
    """The warning that Redox may still prove itself by this credential alone; None where another took its place."""
    name, kind = found["destination"], found["kind"]
    with session.engine.connect() as connection:
        require = queries.destination_named(connection, name)["require"]
    since = datetime.now(UTC) - timedelta(days=1)
    if not any(kind in alternative.split("+") for alternative in require) or any(
        each["kind"] == kind and each["live"] and each["last_used_at"] and each["last_used_at"] > since
        for each in others
    ):
        return None
    used = f"was last used at {output.cell(found['last_used_at'])}" if found["last_used_at"] else "was never used"
    return (
        f"warning: no other live {kind} credential of {name} was used in the last day (this one {used}). If Redox "
        "still sends this one, everything is refused: change it at Redox first, or use --grace 1h"
    )
