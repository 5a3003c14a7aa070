"""`signing-key` creates, rotates and retires the keys that sign requests to Redox."""

from __future__ import annotations

import json

from sqlalchemy import Engine, text

from tests.cli.conftest import ACTOR, Commands


def test_new_rotate_retire(run: Commands) -> None:
    """Keys are created, rotated and retired. The published JWKS has only public keys."""
    first = run.json("signing-key", "new", "--algorithm", "ES384")
    second = run.json("signing-key", "new", "--algorithm", "ES384")
    assert (first["state"], second["state"]) == ("active", "published")
    assert run.json("signing-key", "rotate")["kid"] == second["kid"]
    published = json.loads(run("signing-key", "jwks").stdout)["keys"]
    assert [key["kid"] for key in published] == [second["kid"], first["kid"]]
    assert all(key.keys() == {"kty", "crv", "x", "y", "kid", "alg", "use"} for key in published)
    assert run.json("signing-key", "jwks")["keys"] == published
    run("signing-key", "retire", first["kid"])

    assert {each["kid"]: each["state"] for each in run.json("signing-key", "list")} == {
        second["kid"]: "active",
        first["kid"]: "retired",
    }
    assert [key["kid"] for key in run.json("signing-key", "jwks")["keys"]] == [second["kid"]]
    assert "rotate" in run.fails("signing-key", "retire", second["kid"])
    message = run.json("audit", "list", "--action", "signing_key")
    assert {each["actor"] for each in message} == {ACTOR}


def test_a_kid_may_begin_with_a_hyphen(run: Commands, engine: Engine) -> None:
    """A key id is base64url. One that begins with a hyphen is taken as a name, not as an option."""
    assert "there is no signing key -abc" in run.fails("signing-key", "retire", "-abc")


def test_the_list_shows_no_secret(run: Commands, engine: Engine) -> None:
    """Neither table nor JSON shows the private key. The default type is RSA."""
    made = run.json("signing-key", "new")
    assert made["algorithm"] == "RS384"
    with engine.connect() as connection:
        sealed: bytes = connection.execute(text("SELECT secret FROM signing_keys")).scalar_one()
    for printed in (run("signing-key", "list").stdout, json.dumps(run.json("signing-key", "list")), json.dumps(made)):
        assert sealed.hex() not in printed
        assert "secret" not in printed
