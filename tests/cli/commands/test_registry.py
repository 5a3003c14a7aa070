from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from receiver.database.engine import open_engine
from receiver.keyring import Keyring
from receiver.pipeline import Admitted
from receiver.storage.registry.key_records import record_keys
from tests.cli.commands.test_handlers import CODE
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import SOURCE, TOKEN, Door, body
from tests.support.postgres import drop_database, new_database

STRANGER = "22222222-2222-4222-8222-222222222222"
SECRET = "a signing secret that only tests know"

# The destination of the fixture `door`, as a file.
CLINIC = f"""
[destinations.clinic]
environment = "production"
credentials = [{{ kind = "token", file = "token" }}]
sources = [{{ id = "{SOURCE}" }}]
"""

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the file, with the secrets in its directory."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "secret").write_text(SECRET + "\n")

    def written(text: str) -> str:
        path = tmp_path / "registry.toml"
        path.write_text(text)
        return str(path)

    return written


def summary(changes: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(each["change"], each["what"], each["name"]) for each in changes]


def everything(run: Commands) -> list[Any]:
    return [run.json("destination", "show", each["name"]) for each in run.json("destination", "list")]


def test_a_matching_file_changes_nothing(door: Door, run: Commands, write: Write) -> None:
    """A file that matches the registry makes no change, no audit row and no new version."""
    before = door.value("SELECT version FROM registry_version"), everything(run)
    assert run.json("registry", "apply", write(CLINIC), "--prune") == []
    assert "nothing to change" in run("registry", "apply", write(CLINIC)).stdout
    assert (door.value("SELECT version FROM registry_version"), everything(run)) == before


END = "2999-01-01T00:00:00Z"
WHOLE = f"""
[destinations.lab]
environment = "staging"
enabled = false
require = ["hmac+token", "token"]
sources_policy = "any"
on_unknown_source = "quarantine"
test_messages = "reject"
expect_every = 7200
handlers = ["admissions"]
credentials = [
  {{ kind = "token", file = "token" }},
  {{ kind = "hmac", file = "secret", label = "redox", encoding = "hex", header = "X-Sig", expires_at = {END} }},
]
sources = [{{ id = "{STRANGER.upper()}", name = "North Clinic" }}, {{ name = "nameless" }}]
"""


def test_a_whole_destination(run: Commands, write: Write, plugin: Callable[..., None]) -> None:
    """Everything in the file is added, with the operator as the actor; applied again, the file changes nothing."""
    plugin("clinic_code", CODE, "admissions")
    path = write(WHOLE)
    changes = run.json("registry", "apply", path)
    assert summary(changes) == [
        ("+", "destination", "lab"),
        ("+", "credential", "redox"),
        ("+", "source", STRANGER),
        ("+", "source", "(none)"),
        ("+", "handler", "admissions"),
        ("-", "destination", "enabled"),
    ]
    (lab,) = everything(run)
    assert (lab["environment"], lab["enabled"], lab["require"], lab["test_messages"]) == (
        "staging",
        False,
        ["hmac+token", "token"],
        "reject",
    )
    assert lab["expect_every"] == 7200
    assert [(each["kind"], each["settings"]) for each in lab["credentials"]] == [
        ("token", {}),
        ("hmac", {"encoding": "hex", "header": "x-sig"}),
    ]
    assert [(each["source_id"], each["name"]) for each in lab["sources"]] == [
        (STRANGER, "North Clinic"),
        (None, "nameless"),
    ]
    assert [each["handler"] for each in lab["subscriptions"]] == ["admissions"]
    assert {each["actor"] for each in run.json("audit", "list")} == {ACTOR}
    assert run.json("registry", "apply", path, "--prune") == []


def test_a_dry_run(door: Door, run: Commands, write: Write) -> None:
    """It prints the changes without making them; then exactly these changes are made."""
    path = write(CLINIC.replace('"production"', '"staging"') + 'test_messages = "reject"\n')
    before = everything(run)
    printed = run("registry", "apply", path, "--dry-run").stdout
    assert printed.splitlines() == [
        "~ destination clinic environment: production -> staging",
        "~ destination clinic test_messages: quarantine -> reject",
    ]
    assert everything(run) == before
    assert run("registry", "apply", path).stdout == printed
    assert "nothing to change" in run("registry", "apply", path, "--dry-run").stdout


def test_prune(door: Door, run: Commands, write: Write) -> None:
    """Without --prune, rows that the file does not name stay; with it, they are disabled or revoked, never deleted."""
    door.enable()
    run("credential", "add", "clinic", "--kind", "token")
    run("source", "add", "clinic", "--none")
    run("destination", "add", "other")
    path = write(CLINIC)
    assert run.json("registry", "apply", path) == []
    changes = run.json("registry", "apply", path, "--prune")
    assert sorted(summary(changes)) == [
        ("-", "credential", "2"),
        ("-", "destination", "enabled"),
        ("-", "handler", "register"),
        ("-", "source", "(none)"),
    ]
    clinic, other = everything(run)
    assert [each["live"] for each in clinic["credentials"]] == [True, False]
    assert [each["enabled"] for each in clinic["sources"]] == [True, False]
    assert [each["enabled"] for each in clinic["subscriptions"]] == [False]
    assert (clinic["enabled"], other["enabled"]) == (True, False)
    assert isinstance(door.judge(body()), Admitted)
    assert run.json("registry", "apply", path, "--prune") == []


def test_a_token_is_changed_without_a_gap(door: Door, run: Commands, write: Write, tmp_path: Path) -> None:
    """The new token is live before the old one is revoked."""
    (tmp_path / "new").write_text("another token that only tests know")
    changes = run.json("registry", "apply", write(CLINIC.replace('file = "token"', 'file = "new"')), "--prune")
    assert summary(changes) == [("+", "credential", "token"), ("-", "credential", "1")]
    assert isinstance(door.judge(body(), token="another token that only tests know"), Admitted)
    assert door.refuse(body()).reason == "token_revoked"


def test_an_expiry_is_set_for_a_token(door: Door, run: Commands, write: Write) -> None:
    """The token is added again with its expiry, and the one without is revoked."""
    path = write(CLINIC.replace('file = "token"', 'file = "token", expires_at = 2999-01-01T00:00:00'))
    assert summary(run.json("registry", "apply", path)) == [("+", "credential", "token"), ("-", "credential", "1")]
    assert run.json("credential", "list")[1]["expires_at"] == "2999-01-01T00:00:00.000000Z"
    assert isinstance(door.judge(body()), Admitted)
    assert run.json("registry", "apply", path) == []


def test_a_pending_revocation_is_left_alone(door: Door, run: Commands, write: Write, tmp_path: Path) -> None:
    """Until the grace is over, a credential in the file is not added again, and --prune does not end the grace."""
    run("credential", "revoke", "1", "--grace", "1h")
    before = everything(run)
    assert run.json("registry", "apply", write(CLINIC), "--prune") == []
    assert everything(run) == before
    (tmp_path / "new").write_text("another token that only tests know")
    path = write(CLINIC.replace('file = "token"', 'file = "new"'))
    assert summary(run.json("registry", "apply", path, "--prune")) == [("+", "credential", "token")]
    assert isinstance(door.judge(body()), Admitted)


def test_an_equal_credential_that_stays_is_kept(door: Door, run: Commands, write: Write) -> None:
    """Of two equal credentials, --prune keeps the one that is not to be revoked."""
    run("credential", "add", "clinic", "--kind", "token", "--secret-file", "-", stdin=TOKEN)
    run("credential", "revoke", "1", "--grace", "1h")
    assert run.json("registry", "apply", write(CLINIC), "--prune") == []
    assert [each["revoked_at"] is None for each in run.json("credential", "list")] == [False, True]


def test_the_end_of_a_credential_with_a_pending_revocation(door: Door, run: Commands, write: Write) -> None:
    """With another end in the file it is added with that end, and the grace of the old one goes on."""
    run("credential", "revoke", "1", "--grace", "1h")
    path = write(CLINIC.replace('file = "token"', f'file = "token", expires_at = {END}'))
    assert summary(run.json("registry", "apply", path, "--prune")) == [("+", "credential", "token")]
    assert run.json("registry", "apply", path, "--prune") == []
    assert isinstance(door.judge(body()), Admitted)


def test_the_expected_interval_follows_the_file(door: Door, run: Commands, write: Write) -> None:
    """`expect_every` is set and exported in seconds; a file without it returns to the default."""
    path = write(CLINIC + "expect_every = 600\n")
    assert summary(run.json("registry", "apply", path)) == [("~", "destination", "expect_every")]
    assert run.json("registry", "export", "clinic")["destinations"]["clinic"]["expect_every"] == 600
    assert run.json("registry", "apply", path) == []
    assert "expect_every: 600 -> (none)" in run("registry", "apply", write(CLINIC)).stdout


def test_an_existing_signing_secret(door: Door, run: Commands, write: Write) -> None:
    """The same secret with the same settings is the same credential; with other settings it is another."""
    path = write(CLINIC.replace(" }]", ' }, { kind = "hmac", file = "secret", encoding = "hex" }]', 1))
    assert summary(run.json("registry", "apply", path)) == [("+", "credential", "hmac")]
    assert run.json("registry", "apply", path) == []
    path = write(CLINIC.replace(" }]", ' }, { kind = "hmac", file = "secret", encoding = "base64" }]', 1))
    assert summary(run.json("registry", "apply", path, "--prune")) == [
        ("+", "credential", "hmac"),
        ("-", "credential", "2"),
    ]


def test_a_source_is_named_and_enabled_again(door: Door, run: Commands, write: Write) -> None:
    """Its name follows the file; a disabled source is enabled again."""
    run("source", "disable", "clinic", SOURCE)
    path = write(CLINIC.replace(f'"{SOURCE}"', f'"{SOURCE}", name = "North"'))
    assert summary(run.json("registry", "apply", path)) == [("~", "source", SOURCE)]
    assert isinstance(door.judge(body()), Admitted)
    assert run.json("registry", "apply", path) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("nonsense", "registry.toml"),
        ('[destinations.clinic]\ncolour = "red"', "colour"),
        ('[destinations.clinic]\nenvironment = "home"', "environment"),
        ("[destinations.clinic]\nexpect_every = 0", "expect_every"),
        ('[destinations.clinic]\ncredentials = [{ kind = "token", file = "missing" }]', "missing"),
        ('[destinations.clinic]\nhandlers = ["nobody"]', "nobody"),
        ("[destinations.lab]\n", "token"),
        (f'[destinations.lab]\ncredentials = [{{ kind = "token", file = "token", expires_at = {END} }}]', "token"),
    ],
)
def test_an_invalid_file_changes_nothing(door: Door, run: Commands, write: Write, wrong: str, message: str) -> None:
    """The error explains the problem, and nothing else of the file is applied."""
    before = everything(run)
    assert message in run.fails(
        "registry",
        "apply",
        write('[destinations.another]\ncredentials = [{ kind = "token", file = "token" }]\n' + wrong),
    )
    assert everything(run) == before


def test_no_secret_is_shown(run: Commands, write: Write, plugin: Callable[..., None]) -> None:
    """Neither the printed changes nor the JSON document contains a secret."""
    plugin("clinic_code", CODE, "admissions")
    for done in (run("registry", "apply", write(WHOLE), "--dry-run"), run("registry", "apply", write(WHOLE), "--json")):
        assert TOKEN not in done.output
        assert SECRET not in done.output


def test_a_row_that_was_tampered_with(door: Door, run: Commands, write: Write) -> None:
    """If the MAC of a destination fails, the file is not compared with it."""
    door.rows("UPDATE destinations SET environment = 'development'")
    assert "audit verify" in run.fails("registry", "apply", write(CLINIC))


class TestExport:
    @pytest.fixture
    def registered(self, door: Door, run: Commands, plugin: Callable[..., None], tmp_path: Path) -> None:
        """A registry with every way to store a secret, a source without a name, and a handler."""
        plugin("clinic_plugin", CODE, "admissions")
        run("handlers", "enable", "admissions", "--destination", "clinic")
        run("source", "add", "clinic", "--none")
        run("source", "add", "clinic", STRANGER, "--name", 'A "quoted" \\ näme\U0001f3e5')
        run("source", "disable", "clinic", SOURCE)
        run("destination", "set", "clinic", "--expect-every", "2h")
        run(
            "credential",
            "add",
            "clinic",
            "--kind",
            "hmac",
            "--label",
            "2027",
            "--expires",
            "2999-01-01T00:00:00Z",
            stdin=SECRET,
        )
        (tmp_path / "session").write_text("a session token")
        run(
            "credential",
            "add",
            "clinic",
            "--kind",
            "sigv4",
            "--access-key",
            "K",
            "--region",
            "r",
            "--service",
            "s",
            "--session-token-file",
            str(tmp_path / "session"),
            stdin=SECRET,
        )
        run(
            "credential",
            "add",
            "clinic",
            "--kind",
            "oauth",
            "--client-id",
            "redox",
            "--scope",
            "a b",
            "--secret-file",
            "-",
            stdin=SECRET,
        )
        gone = run.json("credential", "add", "clinic", "--kind", "token")["id"]
        run("credential", "revoke", str(gone))
        run("destination", "add", "off", "--token-file", "-", "--require", "token", stdin=TOKEN)
        run("destination", "disable", "off")

    def secrets(self, folder: Path) -> None:
        """Write the secrets into the files that the export names."""
        for name in ("clinic-token-1", "off-token-1"):
            (folder / f"{name}.secret").write_text(TOKEN)
        for name in ("hmac", "sigv4", "oauth"):
            (folder / f"clinic-{name}-1.secret").write_text(SECRET)
        (folder / "clinic-sigv4-1.session-token").write_text("a session token")

    @pytest.mark.usefixtures("registered")
    def test_apply_accepts_it(self, run: Commands, tmp_path: Path) -> None:
        """Applied to its own registry with --prune, it changes nothing; without the secrets it fails and changes
        nothing.
        """
        file = tmp_path / "registry.toml"
        file.write_text(run("registry", "export").stdout)
        assert "clinic-token-1.secret" in run.fails("registry", "apply", str(file), "--prune")
        self.secrets(tmp_path)
        assert run.json("registry", "apply", str(file), "--prune") == []

    @pytest.mark.usefixtures("registered")
    def test_it_makes_the_same_registry_elsewhere(
        self, run: Commands, tmp_path: Path, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Applied to an empty registry, it makes a registry with the same export."""
        file = tmp_path / "registry.toml"
        file.write_text(run("registry", "export").stdout)
        self.secrets(tmp_path)
        url = new_database()
        try:
            monkeypatch.setenv("DATABASE_URL", url)
            run("db", "upgrade")
            with open_engine(url, pooled=False).begin() as connection:
                record_keys(connection, keyring)
            run("registry", "apply", str(file))
            assert run("registry", "export").stdout == file.read_text()
        finally:
            drop_database(url)

    @pytest.mark.usefixtures("registered")
    def test_no_secret_is_in_it(self, run: Commands) -> None:
        """Neither the TOML nor the JSON has a secret; named destinations are exported alone."""
        for text in (run("registry", "export").stdout, run("registry", "export", "--json").stdout):
            assert SECRET not in text
            assert TOKEN not in text
        assert list(run.json("registry", "export", "off")["destinations"]) == ["off"]
        run.fails("registry", "export", "nowhere")
