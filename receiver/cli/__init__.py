"""The command line `redox-receiver`: one group, whose commands' modules are imported when they are run.

May not import anything but click and the errors, so that `--help` and shell completion answer at once. A command of
which the module is not there is not listed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from receiver import __version__
from receiver.errors import ReceiverError

# Command → (module in this package, what the list of commands says of it). The module holds it under the command's
# name, with _ for -.
COMMANDS: Final = {
    "up": ("up.command", "Run everything on one machine."),
    "status": ("commands.status", "Tell whether the feeds flow, and what mends them."),
    "check": ("commands.check", "Check settings, database, keys, plugins: a line each."),
    "destination": ("commands.destination", "The URLs that Redox posts to."),
    "credential": ("commands.credential", "What proves that a request is Redox's."),
    "source": ("commands.source", "The sources whose messages are let in."),
    "registry": ("commands.registry", "Destinations and all that belongs to them, as a file."),
    "handlers": ("commands.handlers", "The plugins that messages are handed to."),
    "messages": ("commands.messages", "What came in: list, show, replay, release, discard."),
    "deliveries": ("commands.deliveries", "What became of it: list, show, retry, skip."),
    "lanes": ("commands.lanes", "The sequences that deliveries run in."),
    "signing-key": ("commands.signing_key", "The keys that we sign with when we speak to Redox."),
    "outbound": ("commands.outbound", "Speak to Redox: API keys, tokens, single calls."),
    "outbox": ("commands.outbox", "What is on its way to Redox."),
    "audit": ("commands.audit", "What happened, and whether its rows were changed."),
    "reconcile": ("commands.reconcile", "Compare what Redox says it has sent with what is recorded."),
    "keys": ("commands.keys", "The keyring."),
    "db": ("commands.db", "The database: migrate, check, back up, restore."),
    "serve": ("commands.serve", "Run the receiver alone."),
    "admin": ("commands.serve", "Run the admin listener alone."),
    "worker": ("commands.serve", "Run a delivery worker alone."),
    "simulate": ("commands.simulate", "Play Redox against a running receiver."),
}


class _Failed(click.ClickException):
    """What one of our errors looks like to an operator: a line, and exit status 1."""

    def __init__(self, exc: ReceiverError) -> None:
        super().__init__("; ".join(str(exc).splitlines()))


class Commands(click.Group):
    """The group of all commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - the signature is click's
        """The commands whose module is there, in the order of COMMANDS."""
        return [name for name, (module, _) in COMMANDS.items() if find_spec(f"{__name__}.{module}") is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module; None when there is no such command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = import_module(f"{__name__}.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        _take_locations(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete command names without importing them."""
        names = [
            CompletionItem(name, help=COMMANDS[name][1])
            for name in self.list_commands(ctx)
            if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of ours is told in a line, never by a traceback."""
        try:
            return super().invoke(ctx)
        except ReceiverError as exc:
            raise _Failed(exc) from exc


def _into_environment(variable: str) -> Callable[[click.Context, click.Parameter, Path | None], None]:
    """The environment is the one truth: every process that a command starts reads the same."""

    def put(_ctx: click.Context, _parameter: click.Parameter, value: Path | None) -> None:
        if value is not None:
            os.environ[variable] = str(value)

    return put


def _locations() -> list[click.Option]:
    return [
        click.Option(
            ["--data-dir"],
            type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
            metavar="DIR",
            expose_value=False,
            is_eager=True,
            callback=_into_environment("RECEIVER_DATA_DIR"),
            help="Keyring, .env file and embedded database.  [env: RECEIVER_DATA_DIR]",
        ),
        click.Option(
            ["--env-file"],
            type=click.Path(dir_okay=False, resolve_path=True, path_type=Path),
            metavar="FILE",
            expose_value=False,
            is_eager=True,
            callback=_into_environment("RECEIVER_ENV_FILE"),
            help="The .env file, if it is not in the data directory.  [env: RECEIVER_ENV_FILE]",
        ),
    ]


def _take_locations(command: click.Command) -> None:
    """Let every command take the options that say where things are, after its name as well as before it."""
    if isinstance(command, click.Group):
        for each in command.commands.values():
            _take_locations(each)
    else:
        names = {parameter.name for parameter in command.params}
        command.params += [option for option in _locations() if option.name not in names]


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=_locations(),
    epilog="""\b
Examples:
  redox-receiver up
  redox-receiver destination add lab --environment production
  redox-receiver status

\b
Shell completion (bash_source, zsh_source or fish_source):
  eval "$(_REDOX_RECEIVER_COMPLETE=bash_source redox-receiver)"
""",
)
@click.version_option(__version__, prog_name="redox-receiver")
def main() -> None:
    """A webhook receiver for Redox destinations: verifies, records, orders and hands over every message.

    Exit status: 0 done, 1 it could not be done (a line says what mends it), 2 wrong usage.
    """
