"""What `signing-key` does, on a fresh database."""

from __future__ import annotations

import json

from sqlalchemy import Engine, text

from tests.cli.conftest import ACTOR, Commands


def test_new_rotate_retire(run: Commands) -> None:
    """Keys are made, rotated and retired; what is published is printed as a JWKS, of public halves alone."""
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
    told = run.json("audit", "list", "--action", "signing_key")
    assert {each["actor"] for each in told} == {ACTOR}


def test_a_kid_may_begin_with_a_hyphen(run: Commands, engine: Engine) -> None:
    """It is base64url: that is a name all the same, and no option."""
    assert "there is no signing key -abc" in run.fails("signing-key", "retire", "-abc")


def test_the_list_shows_no_secret(run: Commands, engine: Engine) -> None:
    """Of a key that is RSA by default neither table nor document shows what is sealed."""
    made = run.json("signing-key", "new")
    assert made["algorithm"] == "RS384"
    with engine.connect() as connection:
        sealed: bytes = connection.execute(text("SELECT secret FROM signing_keys")).scalar_one()
    for said in (run("signing-key", "list").stdout, json.dumps(run.json("signing-key", "list")), json.dumps(made)):
        assert sealed.hex() not in said
        assert "secret" not in said
