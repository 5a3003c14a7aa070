"""The command group `registry`: applies and exports the registry as a TOML file.

Must not read a secret from that file: secrets are in separate files that it names.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from receiver.cli import output
from receiver.cli.options import dry_run_option, example, json_option
from receiver.cli.registry_export import exported, to_toml
from receiver.cli.registry_file import read
from receiver.cli.registry_plan import RegistryChange, RegistryPlan
from receiver.cli.session import opened


@click.group()
def registry() -> None:
    """Apply or export destinations, with their credentials, sources and handlers, as a TOML file."""


@registry.command(
    epilog=example("registry apply registry.toml --dry-run", "registry apply registry.toml --prune")
    + """

\b
Example of a file:
  [destinations.lab]
  environment = "production"
  require = ["hmac+token"]
  handlers = ["register"]
  credentials = [
    { kind = "token", file = "lab.token" },
    { kind = "hmac", file = "lab.secret", encoding = "hex", prefix = "sha256=" },
  ]
  sources = [{ id = "7ce6f387-c33c-417d-8682-81e83628cbd9", name = "North Clinic" }]"""
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@dry_run_option
@click.option("--prune", is_flag=True, help="Also disable or revoke everything that is registered but not in the file.")
@json_option
def apply(file: Path, *, dry_run: bool, prune: bool, as_json: bool) -> None:
    """Change the registry to match FILE (TOML). A second run changes nothing.

    Settings that a destination omits get their default. Handlers must be installed on this host. A credential that
    `credential revoke --grace` revokes later counts as registered until then: remove it from FILE in that time.
    """
    wanted = read(file)
    now = datetime.now(UTC)
    done: list[RegistryChange] = []
    with opened() as session:
        with session.engine.connect() as connection:
            changes = RegistryPlan(session, connection, file.parent).changes(wanted, prune=prune)
        registration = session.registration
        for change in changes:
            if not dry_run:
                change.carry_out(registration, now=now)
            done.append(change)
            if not as_json:
                click.echo(_line(change))
    if as_json:
        output.document(
            [
                {
                    "change": each.sign,
                    "what": each.what,
                    "destination": each.destination,
                    "name": each.name,
                    "was": each.was,
                    "becomes": each.becomes,
                }
                for each in done
            ]
        )
    elif not done:
        click.echo("nothing to change")


@registry.command(epilog=example("registry export > registry.toml", "registry export lab clinic"))
@click.argument("names", metavar="[DESTINATION]...", nargs=-1)
@json_option
def export(names: tuple[str, ...], *, as_json: bool) -> None:
    """Print the registry in the format of `registry apply`: all destinations, or the named ones.

    Secrets are not included. The output names a file for each, which you must create in the directory of the TOML
    file. `registry apply` changes nothing until it can read all of them.
    """
    with opened() as session, session.engine.connect() as connection:
        found = exported(session, connection, names)
    if as_json:
        output.document({"destinations": found})
    else:
        click.echo(to_toml(found), nl=False)


def _line(change: RegistryChange) -> str:
    text = f"{change.sign} {change.what} {change.destination}"
    if change.name != change.destination:
        text += f" {output.escaped(change.name)}"
    if change.was is not None or change.sign == "~":
        text += f": {output.cell(change.was) or '(none)'} -> {output.cell(change.becomes) or '(none)'}"
    elif change.becomes is not None:
        text += f": {output.cell(change.becomes)}"
    return text
