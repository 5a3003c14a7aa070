from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from receiver import __version__
from receiver.cli import COMMANDS, main
from receiver.cli.options import Reason
from receiver.storage.accept.ledger import MessageLedger
from tests.cli.conftest import Commands
from tests.storage.door import Door
from tests.storage.hand import arrive


def spawn(
    *arguments: str, environment: dict[str, str] | None = None, without_database: bool = False
) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RECEIVER_") and not (without_database and name == "DATABASE_URL")
    }
    return subprocess.run(
        [sys.executable, "-P", "-m", "receiver", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=kept | (environment or {}),
    )


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command with its full name."""
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            found = command.get_command(ctx, name)
            assert found is not None
            yield from leaves(found, (*path, name))
    else:
        yield path, command


EVERY = dict(leaves(main))


class TestStart:
    def test_help_and_version_import_no_command(self) -> None:
        """Help, version and completion do not import SQLAlchemy: a shell runs completion at each TAB."""
        code = (
            "import sys; from receiver.cli import main; main(['--help'], standalone_mode=False); "
            "print([name for name in sys.modules if name.split('.')[0] in ('sqlalchemy', 'rich', 'alembic')])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "[]"

    def test_the_module_is_the_script(self) -> None:
        """`python -m receiver` is `redox-receiver`."""
        done = spawn("--version")
        assert (done.returncode, done.stdout) == (0, f"redox-receiver, version {__version__}\n")
        assert spawn("--help").stdout.startswith("Usage: redox-receiver ")

    def test_every_command_whose_module_is_there_is_listed(self) -> None:
        """Help lists the commands of COMMANDS, each with its line."""
        printed = spawn("--help").stdout
        for name in main.list_commands(click.Context(main)):
            assert COMMANDS[name][1] in printed

    def test_a_command_that_is_not_there(self) -> None:
        """An unknown command ends with status 2, and the error names --help."""
        done = spawn("nonsense")
        assert done.returncode == 2
        assert "--help" in done.stderr
        assert "Traceback" not in done.stderr

    def test_shells_complete_it(self) -> None:
        """Shells complete commands, subcommands and options."""

        def completed(*words: str) -> str:
            return spawn(
                environment={
                    "_REDOX_RECEIVER_COMPLETE": "bash_complete",
                    "COMP_WORDS": " ".join(("redox-receiver", *words)),
                    "COMP_CWORD": str(len(words)),
                }
            ).stdout

        assert "plain,deliveries" in completed("del")
        assert "plain,retry" in completed("deliveries", "re")
        assert "plain,--dry-run" in completed("deliveries", "retry", "--dry")


class TestHelp:
    @pytest.mark.parametrize("path", EVERY, ids=" ".join)
    def test_every_command_has_an_example(self, path: tuple[str, ...]) -> None:
        """Each help text has a description, and an example with the command's own name."""
        command = EVERY[path]
        assert command.help
        assert command.epilog is not None
        assert f"redox-receiver {' '.join(path)}" in command.epilog

    @pytest.mark.parametrize("path", EVERY, ids=" ".join)
    def test_it_fits_100_columns(self, path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        """No line of any help text is wider than 100 columns."""
        monkeypatch.setenv("COLUMNS", "200")
        assert max(map(len, Commands()(*path, "--help").stdout.splitlines())) <= 100

    @pytest.mark.parametrize("group", sorted({path[0] for path in EVERY if len(path) > 1}))
    def test_a_group_lists_whole_sentences(self, group: str) -> None:
        """The list of a group's commands cuts no description."""
        assert "..." not in Commands()(group, "--help").stdout.partition("Commands:")[2]

    @pytest.mark.parametrize("path", [path for path in EVERY if path[-1] in ("list", "show", "add")], ids=" ".join)
    def test_what_lists_shows_or_adds_takes_json(self, path: tuple[str, ...]) -> None:
        """Every command that prints records has --json."""
        assert "--json" in {option for each in EVERY[path].params for option in each.opts}


class TestColumns:
    @pytest.mark.parametrize("path", [path for path in EVERY if path[-1] == "list"], ids=" ".join)
    def test_every_list_lets_them_be_chosen(self, path: tuple[str, ...]) -> None:
        """Every list has --columns."""
        assert "--columns" in {option for each in EVERY[path].params for option in each.opts}


class TestEmpty:
    @pytest.mark.parametrize("path", [path for path in EVERY if path[-1] == "list" and path[0] != "keys"], ids=" ".join)
    def test_an_empty_list_says_how_it_is_filled(self, path: tuple[str, ...], run: Commands) -> None:
        """An empty list names the command or setting that fills it."""
        printed = run(*path).stdout
        assert printed.startswith("no ")
        assert "redox-receiver" in printed or "RECEIVER_HANDLERS" in printed

    @pytest.mark.parametrize(
        "given",
        [
            ("audit", "--actor", "nobody"),
            ("outbox", "--state", "dead"),
            ("messages", "--kind", "No.Such"),
            ("deliveries", "--handler", "none"),
            ("lanes", "--state", "held"),
        ],
        ids=" ".join,
    )
    def test_one_that_was_filtered_says_so(self, given: tuple[str, str, str], door: Door, run: Commands) -> None:
        """A list that is empty because of its filters says so."""
        assert run(given[0], "list", *given[1:]).stdout.startswith("nothing matches")


class TestReasons:
    @pytest.mark.parametrize("path", EVERY, ids=" ".join)
    def test_every_reason_may_come_by_stdin(self, path: tuple[str, ...]) -> None:
        """Each --reason takes - for stdin, and its help says so: `ps` shows command lines to every user."""
        for option in EVERY[path].params:
            if "--reason" in option.opts:
                assert isinstance(option.type, Reason)
                assert isinstance(option, click.Option)
                assert "(-: stdin)" in (option.help or "")

    def test_it_is_what_stdin_says(self, door: Door, ledger: MessageLedger, run: Commands) -> None:
        """The reason is stdin without the end of its line. An empty, too long or undecodable one is refused."""
        (number,) = arrive(door, ledger, b"no json")
        for wrong in ("", " \n", "x" * 10_001):
            run.fails("messages", "discard", str(number), "--reason", "-", stdin=wrong, status=2)
        run("messages", "discard", str(number), "--reason", "-", stdin="ticket 4711\n")
        (row,) = run.json("audit", "list", "--action", "message.discard", "--notes", "--reason", "-", stdin="review\n")
        assert row["note"] == "ticket 4711"

    def test_stdin_is_read_for_one_thing(self, run: Commands, tmp_path: Path) -> None:
        """Only one of the message and the reason can come from stdin."""
        printed = run.fails(
            "outbound", "send", "-", "--out", str(tmp_path / "out"), "--reason", "-", stdin="x", status=2
        )
        assert "stdin" in printed
        assert not (tmp_path / "out").exists()


class TestWhere:
    def test_options_say_where_things_are_on_either_side(self, tmp_path: Path) -> None:
        """--data-dir and --env-file work before a command's name and after it."""
        (tmp_path / "bad.env").write_text("RECEIVER_THREADS=none\n")
        for arguments in (
            ("--env-file", "bad.env", "destination", "list"),
            ("destination", "list", "--env-file", "bad.env"),
        ):
            done = subprocess.run(
                [sys.executable, "-P", "-m", "receiver", *arguments],
                cwd=tmp_path,
                text=True,
                capture_output=True,
                check=False,
                timeout=60,
            )
            assert done.returncode == 1
            assert "RECEIVER_THREADS" in done.stderr

    @pytest.mark.parametrize(
        "command",
        [("destination", "list"), ("status",), ("db", "current"), ("audit", "verify"), ("keys", "list")],
        ids=" ".join,
    )
    def test_a_data_directory_in_which_nothing_is(self, command: tuple[str, ...], tmp_path: Path) -> None:
        """For an empty data directory one line names the command that creates a database. Nothing is created."""
        done = spawn(*command, "--data-dir", str(tmp_path / "data"), without_database=True)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert f"no database exists in {tmp_path / 'data'}: check --data-dir" in done.stderr
        assert "redox-receiver up" in done.stderr
        assert not (tmp_path / "data").exists()

    def test_the_keyring_is_looked_for_in_the_data_directory(
        self, run: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without a keyring a command ends with status 1, and its one line names the command that creates one."""
        monkeypatch.delenv("RECEIVER_KEYRING")
        printed = run.fails("destination", "list", "--data-dir", str(tmp_path / "data"))
        assert "keys init" in printed
        assert str(tmp_path / "data") in printed


class TestErrors:
    def test_all_mistakes_of_the_settings_in_one_line(self, run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
        """One line names every invalid variable."""
        monkeypatch.setenv("RECEIVER_THREADS", "none")
        monkeypatch.setenv("RECEIVER_BIND", "nowhere")
        printed = run.fails("destination", "list")
        assert "RECEIVER_THREADS" in printed
        assert "RECEIVER_BIND" in printed

    def test_what_is_said_is_all_on_stderr(self, run: Commands) -> None:
        """Errors are on stderr, and stdout is empty, also with --json."""
        run.fails("destination", "show", "nowhere", "--json")

    def test_one_document(self, run: Commands) -> None:
        """An empty list is a JSON document too."""
        assert json.loads(run("destination", "list", "--json").stdout) == []
