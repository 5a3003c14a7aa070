"""The command group `credential`: manages the credentials that authenticate Redox's requests.

Must not show a secret, except once the one that the command has generated.
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
from receiver.protocol.verification.kind import SecretStorage
from receiver.storage.operations import queries
from receiver.storage.registry.credentials import CredentialFactory, new_token

COLUMNS: Final = ("id", "destination", "kind", "label", "live", "expires_at", "last_used_at", "revoked_at")


@click.group()
def credential() -> None:
    """Manage the credentials that authenticate Redox's requests. Several can be live at once, for rotation."""


@credential.command(
    epilog=example(
        "credential add lab --kind token --label 2026 --expires 90d",
        "credential add lab --kind hmac --secret-file - --header x-redox-signature --encoding hex --prefix sha256=",
        "credential add lab --kind oauth --client-id redox",
        "credential add lab --kind smart --client-id redox --token-url https://HOST/oauth/lab/token --keys jwks.json",
        "credential add lab --kind jwt --issuer ISSUER --audience https://HOST/redox/lab --jwks-url https://KEYS",
        "credential add lab --kind google --audience https://HOST/redox/lab --email ME@PROJECT.iam.gserviceaccount.com",
        "credential add lab --kind sigv4 --access-key KEY --region us-east-1 --service execute-api --secret-file -",
        "credential add lab --kind mtls --proxy nginx --fingerprint HEX",
    )
)
@click.argument("destination")
@click.option(
    "--secret-file",
    type=SECRET_FILE,
    metavar="FILE",
    help="Read the secret from FILE (-: stdin). Default: generate one (token, oauth, mtls), otherwise prompt.",
)
@click.option(
    "--token-out",
    "--secret-out",
    "secret_out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the generated secret to the new FILE (mode 0600) instead of printing it.",
)
@click.option("--label", metavar="TEXT", help="A name for operators. Default: none.")
@click.option(
    "--expires",
    "expires_at",
    type=When(ahead=True),
    metavar="TIME",
    help="Expire at TIME (ISO 8601, or a duration from now such as 90d). Default: never.",
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
    """Add a credential to DESTINATION. `destination set --require` sets which kinds a request must present.

    Redox does not document the format of its signatures or the claims of its tokens: look at the requests that arrive,
    and set the options accordingly.
    """
    settings = credential_kinds.settings(kind, given)
    secret, made = _secret(kind, secret_file, secret_out)
    second = credential_kinds.second_secret(kind, given)
    content = secret if second is None else f"{secret}\n{second}"
    now = datetime.now(UTC)
    with opened() as session, new_file(secret_out, (secret or "").encode()):
        encoded = None if content is None else content.encode("utf-8", "surrogateescape")
        settings = CredentialFactory(session.keyring).resolve(kind, settings, encoded)
        fetched = fetch(settings["jwks_url"]) if "jwks_url" in settings else None
        number = session.registration.add_credential(
            destination, now, kind, settings, encoded, label=label, expires_at=expires_at, fetched=fetched
        )
        with session.engine.connect() as connection:
            added = next(
                each for each in queries.credentials(connection, destination=destination) if each["id"] == number
            )
            require = queries.destination_named(connection, destination)["require"]
    shown = KINDS[kind].generated_secret
    row = {name: added[name] for name in ("id", "destination", "kind", "label", "expires_at", "settings")}
    if KINDS[kind].token_endpoint:
        row["token_path"] = f"/oauth/{destination}/token"
    if shown is not None:
        row[shown] = secret if made and secret_out is None else None if as_json else f"(in {secret_out or secret_file})"
    output.row(row, as_json=as_json)
    if not any(kind in alternative.split("+") for alternative in require):
        output.say(f"{destination} does not require {kind} yet ({', '.join(require)}): see `destination set --help`")


def _secret(kind: str, file: Path | None, out: Path | None) -> tuple[str | None, bool]:
    """Return the secret of the credential (None for a kind without one), and whether it was generated here."""
    described = KINDS[kind]
    has_secret = described.secret is not SecretStorage.NONE
    if not has_secret and file is not None:
        raise click.UsageError(f"--kind {kind} has no secret: omit --secret-file")
    if described.generated_secret is None and out is not None:
        raise click.UsageError(f"--secret-out is not valid for --kind {kind}: its secret is not generated here")
    if file is not None and out is not None:
        raise click.UsageError("--secret-file reads an existing secret, --secret-out writes a new one: use one of them")
    if not has_secret:
        return None, False
    if described.generated_secret is not None and file is None:
        return new_token(), True
    if file is None and sys.stdin.isatty():
        return str(click.prompt(f"Secret of {described.text}", hide_input=True, err=True)), False
    return read_secret(file or Path("-")), False


@credential.command("list", epilog=example("credential list lab"))
@click.argument("destination", required=False)
@output.columns_option
@json_option
def list_(destination: str | None, *, as_json: bool) -> None:
    """List credentials (only those of DESTINATION if given), with their expiry and last use."""
    with opened() as session, session.engine.connect() as connection:
        found = queries.credentials(connection, destination=destination)
    output.rows(
        found,
        COLUMNS,
        as_json=as_json,
        nothing=(
            "no credential, so every request is refused: `redox-receiver credential add DESTINATION --kind token`"
        ),
    )


@credential.command("set", epilog=example("credential set 7 --expires 90d", "credential set 7 --expires never"))
@click.argument("number", metavar="ID", type=int)
@click.option(
    "--expires",
    "expires_at",
    metavar="TIME",
    help="Expire at TIME (ISO 8601, or a duration from now such as 90d), or `never`. Default: unchanged.",
)
@click.option("--label", metavar="TEXT", help="A name for operators; an empty TEXT removes it. Default: unchanged.")
@json_option
def change(number: int, *, expires_at: str | None, label: str | None, as_json: bool) -> None:
    """Change the expiry or the label of credential ID, even if it has expired. Redox needs no change."""
    values: dict[str, Any] = {}
    if expires_at is not None:
        values["expires_at"] = None if expires_at == "never" else When(ahead=True)(expires_at)
    if label is not None:
        values["label"] = label or None
    if not values:
        raise click.UsageError("nothing to change: give --expires or --label")
    with opened() as session:
        session.registration.set_credential(number, datetime.now(UTC), values)
        found, _ = _shown(session, number)
    output.row(found, as_json=as_json)


@credential.command(
    epilog=example("credential revoke 7", "credential revoke 7 --grace 1h", "credential revoke 7 --undo")
)
@click.argument("number", metavar="ID", type=int)
@click.option(
    "--grace", type=Span(), metavar="DURATION", help="Revoke only after DURATION, such as 1h. Default: at once."
)
@click.option("--undo", is_flag=True, help="Cancel a revocation with --grace before it takes effect.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation on a terminal if the credential may be in use.")
@json_option
def revoke(number: int, *, grace: timedelta | None, undo: bool, yes: bool, as_json: bool) -> None:
    """Revoke credential ID permanently, within a second, or after --grace. --undo cancels a revocation with --grace.

    Warns if no other credential of its kind was used in the last day: Redox may still use this one, and its requests
    would then be refused.
    """
    if undo and grace is not None:
        raise click.UsageError("--grace revokes and --undo cancels a revocation: use one of them")
    with opened() as session:
        found, others = _shown(session, number)
        if undo:
            session.registration.restore_credential(number, datetime.now(UTC))
        else:
            if found["live"] and (warning := _in_use(session, found, others)):
                output.say(warning)
                if grace is None and not yes and _interactive():
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
            "--undo` cancels the revocation"
        )
    elif not undo and not any(live.issuperset(alternative.split("+")) for alternative in require):
        output.say(
            f"{name} has no live credential of the kinds it requires ({', '.join(require)}), so every "
            f"request is refused: `redox-receiver credential add {name} --kind {found['kind']}`"
        )


def _interactive() -> bool:
    """Return whether a person can answer a prompt."""
    return sys.stdin.isatty()


def _shown(session: Session, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return credential `number` and the other credentials of its destination. Raises NotFound."""
    with session.engine.connect() as connection:
        rows = queries.credentials(connection)
    found = next((each for each in rows if each["id"] == number), None)
    if found is None:
        raise NotFound(f"credential {number} does not exist: see `redox-receiver credential list`")
    return found, [each for each in rows if each["destination"] == found["destination"] and each["id"] != number]


def _in_use(session: Session, found: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a warning if Redox may still use only this credential; None if another one has replaced it."""
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
        "still uses it, every request is refused: change it at Redox first, or use --grace 1h"
    )
