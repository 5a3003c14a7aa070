from __future__ import annotations

from pathlib import Path

import pytest

from receiver.protocol.verification.kind import MIN_SECRET_LENGTH
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import TOKEN, Door


def test_add_shows_the_token_this_once(run: Commands) -> None:
    """What a script needs to register it with Redox: its name, path and token; the token is never seen again."""
    added = run.json("destination", "add", "lab")
    assert (added["name"], added["path"]) == ("lab", "/redox/lab")
    assert len(added["verification_token"]) >= MIN_SECRET_LENGTH
    assert added["verification_token"] not in run("destination", "show", "lab", "--json").output


def test_defaults_are_the_careful_ones(run: Commands) -> None:
    """A token is required, unknown sources are refused, and tests are for development."""
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
    """Each option is a column."""
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
    """With --token-out the token is in a file for its owner alone, and not on the screen."""
    path = tmp_path / "lab.token"
    done = run("destination", "add", "lab", "--token-out", str(path), "--json")
    assert '"verification_token": null' in done.stdout
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() not in done.output
    run("source", "add", "lab", "--none")


def test_a_file_that_cannot_be_written_adds_nothing(run: Commands, tmp_path: Path) -> None:
    """A token that nobody could have read is not registered; one of a failed command leaves no file."""
    run.fails("destination", "add", "lab", "--token-out", str(tmp_path / "no" / "file"), status=2)
    assert run.json("destination", "list") == []
    run.fails("destination", "add", "No Name", "--token-out", str(tmp_path / "file"))
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("place", ["file", "stdin"])
def test_a_token_that_there_is(door: Door, run: Commands, tmp_path: Path, place: str) -> None:
    """A token is taken from a file or stdin, and is not shown: who gave it has it."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    where = "-" if place == "stdin" else str(tmp_path / "token")
    told = run("destination", "add", "lab", "--token-file", where, "--json", stdin=TOKEN + "\n")
    assert '"verification_token": null' in told.stdout
    assert TOKEN not in told.output


def test_a_token_that_could_be_guessed(run: Commands) -> None:
    """A short token is refused, without being repeated."""
    assert "hunter2" not in run.fails("destination", "add", "lab", "--token-file", "-", stdin="hunter2")
    assert run.json("destination", "list") == []


def test_a_name_that_is_taken(door: Door, run: Commands) -> None:
    """The second of a name is refused, and where the first is shown is said."""
    assert "destination show clinic" in run.fails("destination", "add", "clinic")


@pytest.mark.parametrize("wrong", [("--require", "nothing"), ("--require", "token+magic")])
def test_a_kind_that_is_none(run: Commands, wrong: tuple[str, str]) -> None:
    """An unknown kind of credential is named with the option."""
    assert "--require" in run.fails("destination", "add", "lab", *wrong)


def test_set_changes_what_is_given(door: Door, run: Commands) -> None:
    """All else stays; the change is in the audit, with who made it."""
    before = run.json("destination", "show", "clinic")
    run("destination", "set", "clinic", "--test-messages", "accept", "--require", "token", "--require", "hmac+token")
    after = run.json("destination", "show", "clinic")
    assert after == before | {"test_messages": "accept", "require": ["token", "hmac+token"]}
    told, *_ = run.json("audit", "list", "--action", "destination.set")
    assert told["actor"] == ACTOR
    assert told["detail"] == {"test_messages": "accept", "require": ["token", "hmac+token"]}


def test_set_takes_a_key_away(door: Door, run: Commands) -> None:
    """A key that is not there is refused by its name; an empty one means none."""
    assert "no-such-key" in run.fails("destination", "set", "clinic", "--reply-with", "no-such-key")
    assert run.json("destination", "set", "clinic", "--reply-with", "")["reply_with"] is None


def test_set_wants_something_to_set(door: Door, run: Commands) -> None:
    """Nothing given is wrong usage."""
    assert "--help" in run.fails("destination", "set", "clinic", status=2)


def test_disable_and_enable(door: Door, run: Commands) -> None:
    """A disabled destination refuses everything, and an enabled one takes it again."""
    assert run.json("destination", "disable", "clinic")["enabled"] is False
    assert door.destination.enabled is False
    assert run.json("destination", "enable", "clinic")["enabled"] is True
    assert door.destination.enabled is True


@pytest.mark.parametrize("verb", ["show", "disable", "enable"])
def test_one_that_is_not_there(run: Commands, verb: str) -> None:
    """Where the names are is said."""
    assert "destination list" in run.fails("destination", verb, "nowhere")


def test_tables_are_for_people(door: Door, run: Commands) -> None:
    """Without --json there is a table with everything that belongs to it."""
    door.enable()
    said = run("destination", "show", "clinic").stdout
    for shown in ("/redox/clinic", "production", "token", "register", "11111111-1111-4111-8111-111111111111"):
        assert shown in said
    assert "clinic" in run("destination", "list").stdout


def test_what_is_missing_is_said(run: Commands) -> None:
    """Where there is nothing yet, the command that adds it is named."""
    assert "destination add" in run("destination", "list").stdout
    run("destination", "add", "lab")
    assert "source list --refused" in run("destination", "show", "lab").stdout


def test_where_the_token_is(run: Commands, tmp_path: Path) -> None:
    """A token that is not printed is said to be in its file; in JSON it is null."""
    at = tmp_path / "lab.token"
    assert f"verification_token  (in {at})" in run("destination", "add", "lab", "--token-out", str(at)).stdout
    assert f"(in {at})" in run("destination", "add", "two", "--token-file", str(at)).stdout
    other = tmp_path / "other.token"
    assert (
        f"verification_token  (in {other})"
        in run("credential", "add", "lab", "--kind", "token", "--token-out", str(other)).stdout
    )
    assert run.json("destination", "add", "three", "--token-file", str(at))["verification_token"] is None
