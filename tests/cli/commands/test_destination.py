from __future__ import annotations

from pathlib import Path

import pytest

from receiver.protocol.verification.kind import MIN_SECRET_LENGTH
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import TOKEN, Door


def test_add_shows_the_token_once(run: Commands) -> None:
    """The output has name, path and token, which a script registers with Redox; the token is not shown again."""
    added = run.json("destination", "add", "lab")
    assert (added["name"], added["path"]) == ("lab", "/redox/lab")
    assert len(added["verification_token"]) >= MIN_SECRET_LENGTH
    assert added["verification_token"] not in run("destination", "show", "lab", "--json").output


def test_defaults(run: Commands) -> None:
    """A token is required, unknown sources are refused, and a development destination accepts test messages."""
    run("destination", "add", "lab")
    run("destination", "add", "ward", "--environment", "production")
    lab, ward = run.json("destination", "list")
    assert (
        lab["environment"],
        lab["require"],
        lab["sources_policy"],
        lab["on_unknown_source"],
        lab["test_messages"],
        lab["enabled"],
    ) == ("development", ["token"], "registered", "reject", "accept", True)
    assert ward["test_messages"] == "quarantine"


def test_all_options(run: Commands) -> None:
    """Each option sets a column."""
    run(
        "destination",
        "add",
        "lab",
        "--environment",
        "staging",
        "--require",
        "hmac+token",
        "--require",
        "token",
        "--sources",
        "any",
        "--on-unknown-source",
        "quarantine",
        "--test-messages",
        "reject",
    )
    found = run.json("destination", "show", "lab")
    assert {
        name: found[name] for name in ("environment", "require", "sources_policy", "on_unknown_source", "test_messages")
    } == {
        "environment": "staging",
        "require": ["hmac+token", "token"],
        "sources_policy": "any",
        "on_unknown_source": "quarantine",
        "test_messages": "reject",
    }


def test_a_token_to_a_file(run: Commands, tmp_path: Path) -> None:
    """With --token-out the token is in a file that only its owner can read, and not in the output."""
    path = tmp_path / "lab.token"
    done = run("destination", "add", "lab", "--token-out", str(path), "--json")
    assert '"verification_token": null' in done.stdout
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() not in done.output
    run("source", "add", "lab", "--none")


def test_a_file_that_cannot_be_written_adds_nothing(run: Commands, tmp_path: Path) -> None:
    """No destination is added; a failed command leaves no file."""
    run.fails("destination", "add", "lab", "--token-out", str(tmp_path / "no" / "file"), status=2)
    assert run.json("destination", "list") == []
    run.fails("destination", "add", "No Name", "--token-out", str(tmp_path / "file"))
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("place", ["file", "stdin"])
def test_an_existing_token(door: Door, run: Commands, tmp_path: Path, place: str) -> None:
    """A token is read from a file or stdin, and not shown."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    where = "-" if place == "stdin" else str(tmp_path / "token")
    done = run("destination", "add", "lab", "--token-file", where, "--json", stdin=TOKEN + "\n")
    assert '"verification_token": null' in done.stdout
    assert TOKEN not in done.output


def test_a_token_that_could_be_guessed(run: Commands) -> None:
    """A short token is refused, and the error does not quote it."""
    assert "hunter2" not in run.fails("destination", "add", "lab", "--token-file", "-", stdin="hunter2")
    assert run.json("destination", "list") == []


def test_a_taken_name(door: Door, run: Commands) -> None:
    """A second destination with the same name is refused; the error names the command that shows the first."""
    assert "destination show clinic" in run.fails("destination", "add", "clinic")


@pytest.mark.parametrize("wrong", [("--require", "nothing"), ("--require", "token+magic")])
def test_an_unknown_kind(run: Commands, wrong: tuple[str, str]) -> None:
    """The error names the option and the kinds."""
    assert "--require" in run.fails("destination", "add", "lab", *wrong)


def test_set_changes_what_is_given(door: Door, run: Commands) -> None:
    """Other columns stay; the audit log has the change and its actor."""
    before = run.json("destination", "show", "clinic")
    run("destination", "set", "clinic", "--test-messages", "accept", "--require", "token", "--require", "hmac+token")
    after = run.json("destination", "show", "clinic")
    assert after == before | {"test_messages": "accept", "require": ["token", "hmac+token"]}
    event, *_ = run.json("audit", "list", "--action", "destination.set")
    assert event["actor"] == ACTOR
    assert event["detail"] == {"test_messages": "accept", "require": ["token", "hmac+token"]}


def test_set_removes_a_key(door: Door, run: Commands) -> None:
    """An API key that does not exist is refused; an empty name removes it."""
    assert "no-such-key" in run.fails("destination", "set", "clinic", "--reply-with", "no-such-key")
    assert run.json("destination", "set", "clinic", "--reply-with", "")["reply_with"] is None


def test_set_without_options(door: Door, run: Commands) -> None:
    """It is wrong usage."""
    assert "--help" in run.fails("destination", "set", "clinic", status=2)


def test_disable_and_enable(door: Door, run: Commands) -> None:
    """A disabled destination refuses every request; an enabled one accepts messages again."""
    assert run.json("destination", "disable", "clinic")["enabled"] is False
    assert door.destination.enabled is False
    assert run.json("destination", "enable", "clinic")["enabled"] is True
    assert door.destination.enabled is True


@pytest.mark.parametrize("verb", ["show", "disable", "enable"])
def test_a_missing_destination(run: Commands, verb: str) -> None:
    """The error names the command that lists destinations."""
    assert "destination list" in run.fails("destination", verb, "nowhere")


def test_tables(door: Door, run: Commands) -> None:
    """Without --json the output is a table with credentials, sources and handlers."""
    door.enable()
    text = run("destination", "show", "clinic").stdout
    for shown in ("/redox/clinic", "production", "token", "register", "11111111-1111-4111-8111-111111111111"):
        assert shown in text
    assert "clinic" in run("destination", "list").stdout


def test_empty_lists(run: Commands) -> None:
    """An empty list names the command that adds an entry."""
    assert "destination add" in run("destination", "list").stdout
    run("destination", "add", "lab")
    assert "source list --refused" in run("destination", "show", "lab").stdout


def test_the_file_of_the_token(run: Commands, tmp_path: Path) -> None:
    """A token that is not printed is reported with its file; in JSON it is null."""
    at = tmp_path / "lab.token"
    assert f"verification_token  (in {at})" in run("destination", "add", "lab", "--token-out", str(at)).stdout
    assert f"(in {at})" in run("destination", "add", "two", "--token-file", str(at)).stdout
    other = tmp_path / "other.token"
    assert (
        f"verification_token  (in {other})"
        in run("credential", "add", "lab", "--kind", "token", "--token-out", str(other)).stdout
    )
    assert run.json("destination", "add", "three", "--token-file", str(at))["verification_token"] is None
