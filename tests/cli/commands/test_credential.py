from __future__ import annotations

import hmac
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from receiver.cli.commands import credential as credentials
from receiver.pipeline import Admitted
from receiver.protocol.registry import live
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import TOKEN, Door, body
from tests.support.waiting import until

SECRET = "a signing secret that only tests know"


def signed(content: bytes, secret: str = SECRET) -> str:
    return hmac.digest(secret.encode(), content, "sha512").hex()


def test_a_token_is_generated(door: Door, run: Commands) -> None:
    """Without a file, a token is generated, shown once, and accepted in addition to the existing one."""
    added = run.json("credential", "add", "clinic", "--kind", "token", "--label", "2026")
    for token in (TOKEN, added["verification_token"]):
        assert isinstance(door.judge(body(), token=token), Admitted)
    assert added["verification_token"] not in run("credential", "list", "--json").output
    assert [each["label"] for each in run.json("credential", "list", "clinic")] == [None, "2026"]


def test_an_existing_token(door: Door, run: Commands, tmp_path: Path) -> None:
    """A token from a file is accepted and not shown."""
    (tmp_path / "token").write_text("another token that only tests know\n")
    done = run("credential", "add", "clinic", "--kind", "token", "--secret-file", str(tmp_path / "token"), "--json")
    assert '"verification_token": null' in done.stdout
    assert isinstance(door.judge(body(), token="another token that only tests know"), Admitted)


def test_a_token_to_a_file(door: Door, run: Commands, tmp_path: Path) -> None:
    """With --token-out it is only in the file."""
    path = tmp_path / "token"
    done = run("credential", "add", "clinic", "--kind", "token", "--token-out", str(path))
    assert path.read_text() not in done.output
    assert isinstance(door.judge(body(), token=path.read_text()), Admitted)


def test_a_signing_secret_with_all_its_settings(door: Door, run: Commands) -> None:
    """Header, hash, encoding, prefix and timestamp are settings, and verification uses them."""
    added = run.json(
        "credential",
        "add",
        "clinic",
        "--kind",
        "hmac",
        "--header",
        "X-Redox-Signature",
        "--hash",
        "sha512",
        "--encoding",
        "hex",
        "--prefix",
        "sha512=",
        "--tolerance",
        "60",
        "--timestamp-header",
        "X-Time",
        stdin=SECRET + "\n",
    )
    assert added["settings"] == {
        "header": "x-redox-signature",
        "hash": "sha512",
        "encoding": "hex",
        "prefix": "sha512=",
        "tolerance": 60,
        "timestamp_header": "x-time",
    }
    run("destination", "set", "clinic", "--require", "hmac+token")
    stamp = str(int(door.now.timestamp()))
    good = {"x-redox-signature": f"sha512={signed(f'{stamp}.'.encode() + body())}", "x-time": stamp}
    assert isinstance(door.judge(body(), **good), Admitted)
    assert door.refuse(body("2"), **good).reason == "signature_wrong"
    assert SECRET not in run("credential", "list", "--json").output


def test_it_expires(door: Door, run: Commands) -> None:
    """--expires takes a time, or a duration from now, after which the credential is refused."""
    added = run.json("credential", "add", "clinic", "--kind", "token", "--expires", "2020-01-01")
    assert door.refuse(body(), token=added["verification_token"]).reason == "token_expired"
    assert [each["live"] for each in run.json("credential", "list")] == [True, False]
    ends = run.json("credential", "add", "clinic", "--kind", "token", "--expires", "90d")["expires_at"]
    assert datetime.fromisoformat(ends) > door.now


@pytest.mark.parametrize(
    "wrong",
    [
        ("--kind", "token", "--hash", "sha256"),
        ("--kind", "token", "--tolerance", "5"),
        ("--kind", "hmac", "--token-out", "x"),
        ("--kind", "token", "--token-out", "x", "--secret-file", "-"),
        ("--kind", "magic"),
        (),
    ],
)
def test_wrong_usage(door: Door, run: Commands, wrong: tuple[str, ...]) -> None:
    """Options of another kind are refused, and nothing is added."""
    run.fails("credential", "add", "clinic", *wrong, status=2, stdin=SECRET)
    assert len(run.json("credential", "list")) == 1


def test_a_secret_that_could_be_guessed(door: Door, run: Commands) -> None:
    """A short secret is refused, and the error does not quote it."""
    assert "hunter2" not in run.fails("credential", "add", "clinic", "--kind", "hmac", stdin="hunter2")


class TestRevoke:
    @pytest.fixture
    def second(self, door: Door, run: Commands) -> dict[str, Any]:
        """A second token of the destination."""
        added: dict[str, Any] = run.json("credential", "add", "clinic", "--kind", "token")
        return added

    def test_it_is_permanent(self, door: Door, run: Commands) -> None:
        """A revoked token is refused; if it was the last one, the output has the command that adds another."""
        number = run.json("credential", "list")[0]["id"]
        done = run("credential", "revoke", str(number), "--json")
        assert "credential add clinic --kind token" in done.stderr
        assert door.refuse(body()).reason == "token_revoked"
        event, *_ = run.json("audit", "list", "--action", "credential.revoke")
        assert (event["actor"], event["subject"]) == (ACTOR, f"credentials:{number}")
        for again in ((), ("--undo",), ("--grace", "1h")):
            assert "revoked already" in run.fails("credential", "revoke", str(number), *again)
        assert "revoked already" in run.fails("credential", "set", str(number), "--expires", "never")

    def test_a_warning_if_no_other_is_used(self, door: Door, second: dict[str, Any], run: Commands) -> None:
        """There is no warning if another live credential of its kind was used in the last day."""
        number = run.json("credential", "list")[0]["id"]
        assert (
            "warning: no other live token credential of clinic was used"
            in run("credential", "revoke", str(number)).stderr
        )
        third = run.json("credential", "add", "clinic", "--kind", "token")
        for used, warned in (("2 days", True), ("1 hour", False)):
            door.rows(f"UPDATE credentials SET last_used_at = now() - interval '{used}' WHERE id = :id", id=third["id"])
            done = run("credential", "revoke", str(second["id"]), "--grace", "1h")
            assert ("warning" in done.stderr) is warned

    def test_no_warning_if_the_kind_is_not_required(self, door: Door, run: Commands) -> None:
        """Revoking a credential of a kind that is not required refuses no request."""
        number = run.json("credential", "add", "clinic", "--kind", "hmac", stdin=SECRET)["id"]
        assert run("credential", "revoke", str(number)).stderr == ""

    def test_on_a_terminal_it_asks(self, door: Door, run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
        """It asks for confirmation, unless --yes or --grace is given; without confirmation nothing is revoked."""
        monkeypatch.setattr(credentials, "_interactive", lambda: True)
        number = run.json("credential", "list")[0]["id"]
        run("credential", "revoke", str(number), stdin="n\n", status=1)
        assert isinstance(door.judge(body()), Admitted)
        run("credential", "revoke", str(number), "--yes")
        assert door.refuse(body("2")).reason == "token_revoked"

    def test_during_the_grace_it_works(self, door: Door, run: Commands) -> None:
        """It is live until then, by the database's clock, and revoked from then on."""
        number = run.json("credential", "list")[0]["id"]
        done = run("credential", "revoke", str(number), "--grace", "1h")
        assert "--undo" in done.stderr
        assert isinstance(door.judge(body()), Admitted)
        (found,) = run.json("credential", "list")
        assert found["live"]
        assert timedelta(minutes=59) < datetime.fromisoformat(found["revoked_at"]) - door.now < timedelta(minutes=61)
        run("credential", "revoke", str(number), "--grace", "1s")
        until(lambda: not run.json("credential", "list")[0]["live"])
        assert door.refuse(body("3")).reason == "token_revoked"
        run.fails("credential", "revoke", str(number), "--undo")

    def test_a_process_that_loaded_it_before_revokes_it_in_time(self, door: Door, run: Commands) -> None:
        """No host has to load the registry again at that moment."""
        run("credential", "revoke", str(run.json("credential", "list")[0]["id"]), "--grace", "1h")
        (credential,) = door.destination.credentials
        assert live(credential, door.now + timedelta(minutes=59))
        assert not live(credential, door.now + timedelta(minutes=61))

    def test_it_can_be_undone_within_the_grace(self, door: Door, run: Commands) -> None:
        """It has its expiry again. Both changes are in the audit log; without a revocation --undo fails."""
        number = run.json("credential", "add", "clinic", "--kind", "token", "--expires", "90d")["id"]
        (before,) = (each for each in run.json("credential", "list") if each["id"] == number)
        run("credential", "revoke", str(number), "--grace", "1h")
        assert run.json("credential", "revoke", str(number), "--undo") == before
        assert len(run.json("audit", "list", "--action", "credential.restore")) == 1
        assert "not revoked" in run.fails("credential", "revoke", str(number), "--undo")
        run.fails("credential", "revoke", str(number), "--undo", "--grace", "1h", status=2)
        assert run.json("audit", "verify")["first_bad"] is None


class TestSet:
    def test_expiry_is_extended(self, door: Door, run: Commands) -> None:
        """An expired credential is accepted again, without a change at Redox."""
        number = run.json("credential", "list")[0]["id"]
        run("credential", "set", str(number), "--expires", "2020-01-01")
        assert door.refuse(body()).reason == "token_expired"
        assert run.json("credential", "set", str(number), "--expires", "30d")["live"]
        assert isinstance(door.judge(body("2")), Admitted)
        assert run.json("credential", "set", str(number), "--expires", "never")["expires_at"] is None
        events = run.json("audit", "list", "--action", "credential.set")
        assert [each["detail"]["expires_at"] is None for each in events] == [True, False, False]
        assert events[1]["detail"]["was"].startswith("2020-01-01")

    def test_the_label(self, door: Door, run: Commands) -> None:
        """It can be changed and removed."""
        number = str(run.json("credential", "list")[0]["id"])
        assert run.json("credential", "set", number, "--label", "2027")["label"] == "2027"
        assert run.json("credential", "set", number, "--label", "")["label"] is None
        run.fails("credential", "set", number, status=2)
        run.fails("credential", "set", number, "--expires", "soon", status=2)


def test_a_missing_row(door: Door, run: Commands) -> None:
    """The error says that the credential or destination does not exist."""
    run.fails("credential", "revoke", "999")
    assert "destination list" in run.fails("credential", "add", "nowhere", "--kind", "token")
    assert "destination list" in run.fails("credential", "list", "nowhere")
