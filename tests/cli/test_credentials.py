from __future__ import annotations

import hmac
from datetime import datetime
from pathlib import Path

import pytest

from receiver.pipeline import Admitted
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import TOKEN, Door, body

SECRET = "a signing secret that only tests know"


def signed(content: bytes, secret: str = SECRET) -> str:
    return hmac.digest(secret.encode(), content, "sha512").hex()


def test_a_token_is_made_and_opens(door: Door, run: Commands) -> None:
    """Without a file a token is made, shown once, and lets Redox in beside the one that there is."""
    added = run.json("credential", "add", "clinic", "--kind", "token", "--label", "2026")
    for token in (TOKEN, added["verification_token"]):
        assert isinstance(door.judge(body(), token=token), Admitted)
    assert added["verification_token"] not in run("credential", "list", "--json").output
    assert [each["label"] for each in run.json("credential", "list", "clinic")] == [None, "2026"]


def test_a_token_that_there_is(door: Door, run: Commands, tmp_path: Path) -> None:
    """A token from a file opens and is not shown."""
    (tmp_path / "token").write_text("another token that only tests know\n")
    done = run("credential", "add", "clinic", "--kind", "token", "--secret-file", str(tmp_path / "token"), "--json")
    assert '"verification_token": null' in done.stdout
    assert isinstance(door.judge(body(), token="another token that only tests know"), Admitted)


def test_a_token_to_a_file(door: Door, run: Commands, tmp_path: Path) -> None:
    """With --token-out it is in the file alone."""
    path = tmp_path / "token"
    done = run("credential", "add", "clinic", "--kind", "token", "--token-out", str(path))
    assert path.read_text() not in done.output
    assert isinstance(door.judge(body(), token=path.read_text()), Admitted)


def test_a_signing_secret_with_all_its_settings(door: Door, run: Commands) -> None:
    """Header, hash, encoding, prefix and time stamp are settings, and what they say is what is verified."""
    added = run.json("credential", "add", "clinic", "--kind", "hmac", "--header", "X-Redox-Signature",
                     "--hash", "sha512", "--encoding", "hex", "--prefix", "sha512=", "--tolerance", "60",
                     "--timestamp-header", "X-Time", stdin=SECRET + "\n")
    assert added["settings"] == {"header": "x-redox-signature", "hash": "sha512", "encoding": "hex",
                                 "prefix": "sha512=", "tolerance": 60, "timestamp_header": "x-time"}
    run("destination", "set", "clinic", "--require", "hmac+token")
    stamp = str(int(door.now.timestamp()))
    good = {"x-redox-signature": f"sha512={signed(f'{stamp}.'.encode() + body())}", "x-time": stamp}
    assert isinstance(door.judge(body(), **good), Admitted)
    assert door.refuse(body("2"), **good).reason == "signature_wrong"
    assert SECRET not in run("credential", "list", "--json").output


def test_it_ends_when_it_is_told_to(door: Door, run: Commands) -> None:
    """--expires takes a time, or a span from now, after which it opens nothing."""
    added = run.json("credential", "add", "clinic", "--kind", "token", "--expires", "2020-01-01")
    assert door.refuse(body(), token=added["verification_token"]).reason == "token_expired"
    assert [each["live"] for each in run.json("credential", "list")] == [True, False]
    ends = run.json("credential", "add", "clinic", "--kind", "token", "--expires", "90d")["expires_at"]
    assert datetime.fromisoformat(ends) > door.now


@pytest.mark.parametrize("wrong", [
    ("--kind", "token", "--hash", "sha256"), ("--kind", "token", "--tolerance", "5"),
    ("--kind", "hmac", "--token-out", "x"), ("--kind", "token", "--token-out", "x", "--secret-file", "-"),
    ("--kind", "magic"), ()])
def test_wrong_usage(door: Door, run: Commands, wrong: tuple[str, ...]) -> None:
    """Options that are not of the kind are refused, and nothing is added."""
    run.fails("credential", "add", "clinic", *wrong, status=2, stdin=SECRET)
    assert len(run.json("credential", "list")) == 1


def test_a_secret_that_could_be_guessed(door: Door, run: Commands) -> None:
    """A short one is refused without being repeated."""
    assert "hunter2" not in run.fails("credential", "add", "clinic", "--kind", "hmac", stdin="hunter2")


def test_revoke_closes_for_good(door: Door, run: Commands) -> None:
    """A revoked token opens nothing; when it was the last, that is said with what mends it."""
    number = run.json("credential", "list")[0]["id"]
    done = run("credential", "revoke", str(number), "--json")
    assert "credential add clinic --kind token" in done.stderr
    assert door.refuse(body()).reason == "token_revoked"
    told, *_ = run.json("audit", "list", "--action", "credential.revoke")
    assert (told["actor"], told["subject"]) == (ACTOR, f"credentials:{number}")
    assert "revoked already" in run.fails("credential", "revoke", str(number))


def test_revoke_of_one_of_several_warns_of_nothing(door: Door, run: Commands) -> None:
    """As long as another one opens, there is nothing to mend."""
    run("credential", "add", "clinic", "--kind", "token")
    number = run.json("credential", "list")[0]["id"]
    assert run("credential", "revoke", str(number)).stderr == ""


def test_what_is_not_there(door: Door, run: Commands) -> None:
    """A credential or destination that is not there is said not to be."""
    run.fails("credential", "revoke", "999")
    assert "destination list" in run.fails("credential", "add", "nowhere", "--kind", "token")
    assert "destination list" in run.fails("credential", "list", "nowhere")
