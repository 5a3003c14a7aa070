"""The command line `redox-receiver`: a click group that imports a command's module when the command runs.

A command whose module is missing is not listed.

Must not import anything but click and the errors, so that `--help` and shell completion are fast.
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

# Command → (module in this package, short help). The module defines the command under its name, with _ instead of -.
COMMANDS: Final = {
    "up": ("up.command", "Run all parts on one machine."),
    "status": ("commands.status", "Show whether messages arrive, and how to fix problems."),
    "check": ("commands.check", "Check settings, database, keys and plugins."),
    "destination": ("commands.destination", "Manage the URLs that Redox posts to."),
    "credential": ("commands.credential", "Manage the credentials that authenticate Redox."),
    "source": ("commands.source", "Manage the sources whose messages are accepted."),
    "registry": ("commands.registry", "Apply or export the configuration as a file."),
    "handlers": ("commands.handlers", "Manage the plugins that process messages."),
    "messages": ("commands.messages", "Received messages: list, show, replay, release, discard."),
    "deliveries": ("commands.deliveries", "Deliveries to handlers: list, show, retry, skip."),
    "lanes": ("commands.lanes", "List or release the lanes that order deliveries."),
    "signing-key": ("commands.signing_key", "Manage the keys that sign requests to Redox."),
    "outbound": ("commands.outbound", "Call Redox: API keys, tokens, single calls."),
    "outbox": ("commands.outbox", "Requests to Redox: list, show, retry."),
    "audit": ("commands.audit", "List the audit log, or verify it."),
    "reconcile": ("commands.reconcile", "Compare Redox's delivery log with the database."),
    "keys": ("commands.keys", "Manage the keyring."),
    "db": ("commands.db", "Database: migrate, check, back up, restore."),
    "serve": ("commands.serve", "Run only the receiver."),
    "admin": ("commands.serve", "Run only the admin listener."),
    "worker": ("commands.serve", "Run only a delivery worker."),
    "simulate": ("commands.simulate", "Simulate Redox against a running receiver."),
}


class _CommandFailed(click.ClickException):
    """A ReceiverError as the operator sees it: one line, and exit status 1."""

    def __init__(self, exc: ReceiverError) -> None:
        super().__init__("; ".join(str(exc).splitlines()))


class Commands(click.Group):
    """The group of all commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - the signature is click's
        """The commands whose module exists, in the order of COMMANDS."""
        return [name for name, (module, _) in COMMANDS.items() if find_spec(f"{__name__}.{module}") is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module. Returns None if the command does not exist."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = import_module(f"{__name__}.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        _add_location_options(command)
        _show_whole_sentences(command)
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
        """Run the command. Print a ReceiverError as one line, without a traceback."""
        try:
            return super().invoke(ctx)
        except ReceiverError as exc:
            raise _CommandFailed(exc) from exc


def _set_environment(variable: str) -> Callable[[click.Context, click.Parameter, Path | None], None]:
    """A callback that writes the option to the environment, so that child processes read the same value."""

    def put(_ctx: click.Context, _parameter: click.Parameter, value: Path | None) -> None:
        if value is not None:
            os.environ[variable] = str(value)

    return put


def _location_options() -> list[click.Option]:
    return [
        click.Option(
            ["--data-dir"],
            type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
            metavar="DIR",
            expose_value=False,
            is_eager=True,
            callback=_set_environment("RECEIVER_DATA_DIR"),
            help="Directory of the keyring, .env file and embedded database.  "
            "[env: RECEIVER_DATA_DIR; default: ~/.local/share/redox-receiver]",
        ),
        click.Option(
            ["--env-file"],
            type=click.Path(dir_okay=False, resolve_path=True, path_type=Path),
            metavar="FILE",
            expose_value=False,
            is_eager=True,
            callback=_set_environment("RECEIVER_ENV_FILE"),
            help="Settings file.  [env: RECEIVER_ENV_FILE; default: .env in the data directory]",
        ),
    ]


def _add_location_options(command: click.Command) -> None:
    """Add --data-dir and --env-file to every command, so that they work before and after its name."""
    if isinstance(command, click.Group):
        for each in command.commands.values():
            _add_location_options(each)
    else:
        names = {parameter.name for parameter in command.params}
        command.params += [option for option in _location_options() if option.name not in names]


def _show_whole_sentences(command: click.Command) -> None:
    """List each subcommand of a group with its whole first sentence. By default click cuts it to one line."""
    if isinstance(command, click.Group):
        for each in command.commands.values():
            first_paragraph = " ".join((each.help or "").split("\n\n")[0].split())
            each.short_help = first_paragraph.partition(". ")[0].removesuffix(".") + "."
            _show_whole_sentences(each)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=_location_options(),
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
    """A webhook receiver for Redox destinations: verifies and records messages, and delivers them in order to handlers.

    Exit status: 0 success, 1 failure (one line says how to fix it), 2 wrong usage.
    """
