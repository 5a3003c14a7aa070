"""The command group `db`: schema migrations, backup and restore.

Must not change stored data, except by a migration or by a restore into an empty database.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click
from pydantic import SecretStr
from sqlalchemy import Engine, func, select

from receiver import keyring as keyrings
from receiver import settings as table
from receiver.cli import output, session
from receiver.cli.checks.result import report
from receiver.cli.checks.run import check_database
from receiver.cli.options import example, json_option
from receiver.database import migrations
from receiver.database.embedded.cluster import Cluster
from receiver.errors import ConfigurationError, IntegrityError
from receiver.findings.formatting import count
from receiver.keyring import Keyring
from receiver.settings import Settings
from receiver.states import DeliveryState
from receiver.storage import schema
from receiver.storage.evidence import verify
from receiver.storage.evidence.audit_log import AuditEvent, write_once
from receiver.storage.operations import backups, queries
from receiver.storage.operations.backups import Backup
from receiver.storage.operations.restore import restore as restore_backup
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.handler_changes import RESTORED
from receiver.storage.registry.key_records import check_keys

_DIRECTORY = click.Path(file_okay=False, resolve_path=True, path_type=Path)


@click.group()
def db() -> None:
    """Migrate, check, back up or restore the database."""


@db.command(epilog=example("db upgrade"))
@json_option
def upgrade(as_json: bool) -> None:
    """Migrate the schema to this release. Safe to run on several hosts at once: one of them migrates."""
    with session.database(table.load_settings(), make=True) as engine:
        with engine.connect() as connection:
            before = migrations.current(connection)
        migrations.upgrade(engine)
    if as_json:
        output.document({"before": before, "revision": migrations.head()})
    elif before == migrations.head():
        click.echo(f"the schema is already at {before}")
    else:
        click.echo(f"migrated the schema from {before or '(none)'} to {migrations.head()}")


@db.command(epilog=example("db current"))
@json_option
def current(as_json: bool) -> None:
    """Show the revision of the schema, and the revision that this release needs."""
    with session.database(table.load_settings()) as engine, engine.connect() as connection:
        found = migrations.current(connection)
    output.row({"revision": found, "wanted": migrations.head()}, as_json=as_json)


@db.command(epilog=example("db check"))
@json_option
def check(as_json: bool) -> None:
    """Check that the database can be reached and written, and does not lose committed messages."""
    report(check_database(table.load_settings()), as_json=as_json)


@db.command(epilog=example("db backup /srv/backup/2026-01-31"))
@click.argument("directory", metavar="DIR", type=_DIRECTORY)
@json_option
def backup(directory: Path, as_json: bool) -> None:
    """Back up the database into DIR, a new directory. The database can be in use.

    The keyring is NOT in the backup, and the backup cannot be restored without it. Store the two in different places:
    together they defeat the encryption.
    """
    now = datetime.now(UTC)
    with session.opened() as opened:
        made = backups.dump(opened.engine, opened.keyring, directory, now)
        _record(opened.engine, opened.keyring, "database.backup", made, now)
    if as_json:
        output.document({"directory": str(directory), **_shown(made)})
        return
    click.echo(f"backed up to {directory}: {made.size:,} bytes, revision {made.revision}")
    click.echo(
        "The keyring is not in the backup. To restore, you also need these keys (keep a copy of "
        f"{opened.settings.keyring_path} in another place):"
    )
    output.rows(made.keys, ["id", "purpose", "fingerprint"], as_json=False, nothing="none")


@db.command(epilog=example("db restore /srv/backup/2026-01-31"))
@click.argument("directory", metavar="DIR", type=_DIRECTORY)
@click.option(
    "--replaces",
    metavar="DATABASE",
    help="The replaced database, if it can still be read: its URL, "
    "or the data directory of an embedded one. Lists the credentials revoked there since the backup. Default: none.",
)
@json_option
def restore(directory: Path, replaces: str | None, as_json: bool) -> None:
    """Restore the backup in DIR into an empty database, and migrate it to this release.

    Install the keyring of the backup first: a backup that this keyring did not sign is refused. Pending deliveries and
    requests are put on hold, because they may have run since the backup: see `deliveries resume` and `outbox retry
    --state held`. Credentials that were revoked after the backup are live again: --replaces lists them; without it,
    all live credentials are listed. Ends with `audit verify`.
    """
    settings = table.load_settings()
    found = backups.read_manifest(directory)
    keyring = _keyring_for(found, settings)
    backups.prove(directory, found, keyring)
    now = datetime.now(UTC)
    revoked = None if replaces is None else _revoked(settings, replaces)
    with _exclusive(settings) as engine:
        held = restore_backup(engine, directory, found)
        migrations.upgrade(engine)
        with engine.connect() as connection:
            check_keys(connection, keyring)
            pending = connection.scalar(
                select(func.count())
                .select_from(schema.deliveries)
                .where(schema.deliveries.c.state == DeliveryState.PENDING)
            )
            live = [
                {name: each[name] for name in ("id", "destination", "kind", "label")}
                for each in queries.credentials(connection)
                if each["live"] and (revoked is None or each["id"] in revoked)
            ]
        changes = RegistryChanges(engine, keyring, actor=session.actor())
        for handler, destination in held.handlers:  # for the audit log: they are on hold already
            changes.pause_handler(handler, now, destination=destination, reason=RESTORED)
        _record(engine, keyring, "database.restore", found, now)
        with engine.connect() as connection:
            proved = verify.verify(connection, keyring)
    if as_json:
        output.document(
            {
                "directory": str(directory),
                "pending": pending,
                "held": held.requests,
                "live_again": live,
                "first_bad": proved.first_bad,
                **_shown(found),
            }
        )
    else:
        _print_restored(found, pending, held.requests, live, known=revoked is not None)
        click.echo(f"audit verify: {proved.rows:,} rows" + (" verified" if proved.first_bad is None else ""))
    if proved.first_bad is not None:
        raise IntegrityError(f"restored, but {proved.first_bad}: use another backup")


def _revoked(settings: Settings, replaced: str) -> set[int]:
    """The ids of the credentials that are revoked in the replaced database."""
    place = Path(replaced)
    old = settings.model_copy(
        update={"database_url": None, "data_dir": place.resolve()}
        if place.is_dir()
        else {"database_url": SecretStr(replaced)}
    )
    with session.database(old) as engine:
        session.check_schema(engine)
        with engine.connect() as connection:
            return {each["id"] for each in queries.credentials(connection) if each["revoked_at"] is not None}


def _print_restored(
    found: Backup, pending: int | None, held: int, live: list[dict[str, object]], *, known: bool
) -> None:
    click.echo(f"restored the backup of {found.made_at:%Y-%m-%d %H:%M:%S} UTC, and migrated it to {migrations.head()}")
    click.echo(
        "Messages that arrived since then are missing: they were answered 200, and Redox does not resend them. "
        "`redox-receiver reconcile` lists them."
    )
    if pending:
        click.echo(
            f"{count(pending, 'delivery', 'deliveries')} on hold, because some may have run since the backup: "
            "see `redox-receiver deliveries list --state pending`, skip those that have run with "
            "`deliveries skip`, and run the others with `deliveries resume`. New messages for the same "
            "handlers wait behind them."
        )
    if held:
        click.echo(
            f"{held:,} requests to Redox are held, because some may have been sent since the backup: see "
            "`redox-receiver outbox list --state held`, and send them with `outbox retry`"
        )
    if known:
        click.echo(
            f"{len(live):,} credentials that were revoked since the backup are live again"
            + (": revoke them with `redox-receiver credential revoke ID`" if live else "")
        )
    else:
        click.echo(
            "These credentials are live, including any that were revoked after the backup: revoke those "
            "with `redox-receiver credential revoke ID`"
        )
    output.rows(live, ["id", "destination", "kind", "label"], as_json=False, nothing="none")


def _keyring_for(backup: Backup, settings: Settings) -> Keyring:
    """Load the keyring if it holds every key of the backup. Raises ConfigurationError that names missing keys."""
    try:
        keyring = keyrings.load_keyring(settings.keyring_path)
    except ConfigurationError as exc:
        names = ", ".join(key["id"] for key in backup.keys)
        raise ConfigurationError(
            f"install the keyring of this backup at {settings.keyring_path} first (keys {names}): {exc}"
        ) from exc
    held = {key.id: key.fingerprint for key in keyring.keys}
    missing = [key["id"] for key in backup.keys if held.get(key["id"]) != key["fingerprint"]]
    if missing:
        raise ConfigurationError(
            f"the keyring {settings.keyring_path} does not match keys of this backup "
            f"({', '.join(missing)}): install the keyring of the backup there"
        )
    return keyring


@contextmanager
def _exclusive(settings: Settings) -> Iterator[Engine]:
    """Open the database. The embedded one is locked, so that `up` cannot start on it."""
    with ExitStack() as stack:
        if settings.database_url is None:
            stack.enter_context(Cluster(settings.data_dir, account=settings.postgres_account).own())
        yield stack.enter_context(session.database(settings))


def _record(engine: Engine, keyring: Keyring, action: str, backup: Backup, now: datetime) -> None:
    event = AuditEvent(
        action=action,
        outcome="done",
        at=now,
        actor=session.actor(),
        detail={"made_at": backup.made_at.isoformat(), "revision": backup.revision, "sha256": backup.sha256},
    )
    with engine.begin() as connection:
        write_once(connection, keyring, [event])


def _shown(backup: Backup) -> dict[str, object]:
    return {name: getattr(backup, name) for name in Backup.__dataclass_fields__}
