"""Every credential kind on the command line: `credential add`, `registry apply` and `simulate --present`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from receiver.protocol.verification import KINDS
from tests.cli.conftest import Commands
from tests.protocol.verification.issuers import P384, RSA_FIRST, jwk, pem
from tests.storage.door import TOKEN, Door
from tests.support.scripted_endpoint import ScriptedEndpoint, answer
from tests.support.server import Server, serving
from tests.support.waiting import until
from tests.web.test_authentication import certificate, private

SECRET = "a made-up secret of some length"
KEYS = json.dumps({"keys": [jwk(RSA_FIRST, kid="a"), jwk(P384, kid="e")]})
CERTIFICATE = certificate("client.redox.example")
FINGERPRINT = CERTIFICATE.fingerprint(SHA256()).hex(":").upper()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that options and TOML files name."""
    for name, text in {
        "keys.json": KEYS,
        "rsa.pem": pem(RSA_FIRST).decode(),
        "secret": SECRET + "\n",
        "session": "made-up-session\n",
        "private.pem": private(RSA_FIRST),
        "p384.pem": private(P384),
        "client.pem": CERTIFICATE.public_bytes(Encoding.PEM).decode(),
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def options(folder: Path) -> dict[str, list[str]]:
    """Return the options of each kind."""
    return {
        "hmac": ["--secret-file", f"{folder}/secret"],
        "jwt": [
            "--issuer",
            "i",
            "--issuer",
            "j",
            "--audience",
            "us",
            "--keys",
            f"{folder}/keys.json",
            "--algorithm",
            "RS256",
            "--lifetime",
            "600",
            "--leeway",
            "10",
            "--subject",
            "redox",
        ],
        "google": ["--audience", "us", "--email", "redox@project.example", "--keys", f"{folder}/rsa.pem"],
        "oauth": [
            "--client-id",
            "redox",
            "--secret-file",
            f"{folder}/secret",
            "--scope",
            "a",
            "--scope",
            "b",
            "--audience",
            "us",
            "--lifetime",
            "60",
            "--parameter",
            "client_id=clientId",
        ],
        "smart": [
            "--client-id",
            "redox",
            "--token-url",
            "https://receiver.example/oauth/clinic/token",
            "--keys",
            f"{folder}/keys.json",
            "--other-audiences",
        ],
        "sigv4": [
            "--access-key",
            "AKID",
            "--region",
            "us-east-1",
            "--service",
            "execute-api",
            "--secret-file",
            f"{folder}/secret",
            "--session-token-file",
            f"{folder}/session",
            "--unsigned-payload",
            "--host",
            "Receiver.example:8443",
        ],
        "mtls": [
            "--proxy",
            "nginx",
            "--san",
            "client.redox.example",
            "--subject",
            "CN=client.redox.example",
            "--fingerprint",
            FINGERPRINT,
            "--secret-header",
            "X-Proxy",
            "--secret-file",
            f"{folder}/secret",
        ],
    }


SETTINGS: Mapping[str, dict[str, Any]] = {
    "hmac": {},
    "jwt": {
        "issuers": ["i", "j"],
        "audiences": ["us"],
        "algorithms": ["RS256"],
        "lifetime": 600,
        "leeway": 10,
        "subject": "redox",
        "keys": KEYS,
    },
    "google": {
        "audiences": ["us"],
        "email": "redox@project.example",
        "keys": pem(RSA_FIRST).decode(),
        "issuers": ["https://accounts.google.com", "accounts.google.com"],
        "algorithms": ["RS256"],
    },
    "oauth": {
        "client_id": "redox",
        "scopes": ["a", "b"],
        "audience": "us",
        "lifetime": 60,
        "names": {"client_id": "clientId"},
    },
    "smart": {
        "client_id": "redox",
        "audiences": ["https://receiver.example/oauth/clinic/token"],
        "keys": KEYS,
        "algorithms": ["RS384", "ES384"],
        "other_audiences": True,
    },
    "sigv4": {
        "access_key": "AKID",
        "region": "us-east-1",
        "service": "execute-api",
        "unsigned_payload": True,
        "hosts": ["receiver.example:8443"],
    },
    "mtls": {
        "proxy": "nginx",
        "san": "client.redox.example",
        "subject": "CN=client.redox.example",
        "fingerprint": FINGERPRINT.replace(":", "").lower(),
        "secret_header": "x-proxy",
    },
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_added(door: Door, run: Commands, folder: Path, kind: str) -> None:
    """Options become settings; no secret is shown; a kind that is not required yet is reported."""
    done = run("credential", "add", "clinic", "--kind", kind, "--label", "2026", *options(folder)[kind], "--json")
    added = json.loads(done.stdout)
    assert added["settings"] == SETTINGS[kind]
    assert (added["kind"], added["label"]) == (kind, "2026")
    assert f"does not require {kind} yet" in done.stderr
    assert added.get("token_path") == ("/oauth/clinic/token" if kind in ("oauth", "smart") else None)
    (row,) = [each for each in run.json("credential", "list", "clinic") if each["kind"] == kind]
    assert (row["id"], row["live"], row["last_used_at"]) == (added["id"], True, None)
    for shown in (
        done.output,
        *(run(*each).output for each in (("credential", "list", "--json"), ("destination", "show", "clinic"))),
    ):
        assert SECRET not in shown
    run("destination", "set", "clinic", "--require", kind)
    assert "yet" not in run("credential", "add", "clinic", "--kind", kind, *options(folder)[kind]).stderr


def test_help_describes_every_kind(door: Door, run: Commands) -> None:
    """Help has each kind with its description."""
    text = " ".join(run("credential", "add", "--help").stdout.split())
    assert all(f"{name}: {kind.text}" in text for name, kind in KINDS.items())
    assert {"token", *SETTINGS} == set(KINDS)


@pytest.mark.parametrize(("kind", "shown"), [("oauth", "client_secret"), ("mtls", "proxy_secret")])
def test_a_secret_is_generated(door: Door, run: Commands, folder: Path, kind: str, shown: str) -> None:
    """A secret is generated, shown once or written to a file, and differs each time."""
    needed = {"oauth": ["--client-id", "redox"], "mtls": ["--proxy", "envoy", "--san", "x"]}[kind]
    first, second = (run.json("credential", "add", "clinic", "--kind", kind, *needed)[shown] for _ in range(2))
    assert len(first) > 40
    assert first != second
    path = folder / "made"
    done = run("credential", "add", "clinic", "--kind", kind, *needed, "--secret-out", str(path), "--json")
    assert json.loads(done.stdout)[shown] is None
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() not in done.output


@pytest.mark.parametrize(
    "wrong",
    [
        ("jwt",),
        ("jwt", "--issuer", "i"),
        ("oauth",),
        ("smart", "--client-id", "a"),
        ("sigv4", "--access-key", "a"),
        ("mtls",),
        ("google",),
        ("oauth", "--client-id", "a", "--region", "r"),
        ("token", "--issuer", "i"),
        ("jwt", "--issuer", "i", "--audience", "a", "--keys", "/nowhere"),
        ("oauth", "--client-id", "a", "--lifetime", "0"),
        ("jwt", "--issuer", "i", "--audience", "a", "--secret-file", "-"),
        ("oauth", "--client-id", "a", "--parameter", "x"),
        ("oauth", "--client-id", "a", "--audience", "a", "--audience", "b"),
        ("mtls", "--proxy", "apache"),
        ("jwt", "--issuer", "i", "--audience", "a", "--secret-out", "x"),
    ],
)
def test_wrong_usage(door: Door, run: Commands, wrong: tuple[str, ...]) -> None:
    """A missing option, and an option of another kind, are refused, and nothing is added."""
    run.fails("credential", "add", "clinic", "--kind", *wrong, status=2, stdin=SECRET)
    assert len(run.json("credential", "list")) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("jwt", "--issuer", "i", "--audience", "a"), "--jwks-url"),
        (("google", "--audience", "a"), "e-mail"),
        (("mtls", "--proxy", "nginx"), "fingerprint"),
        (("oauth", "--client-id", "a", "--lifetime", "7200"), "3600"),
        (("jwt", "--issuer", "i", "--audience", "a", "--jwks-url", "http://issuer.example/keys"), "https://"),
        (("jwt", "--issuer", "i", "--audience", "a", "--jwks-url", "http://127.0.0.1:9/keys"), "127.0.0.1"),
    ],
)
def test_invalid_settings(door: Door, run: Commands, wrong: tuple[str, ...], message: str) -> None:
    """One line says how to fix it, and nothing is added."""
    assert message in run.fails("credential", "add", "clinic", "--kind", *wrong)
    assert len(run.json("credential", "list")) == 1


def test_keys_of_a_url_are_fetched_at_once(door: Door, run: Commands) -> None:
    """The keys of a URL are fetched when it is registered, so that the first token verifies; an invalid key set is
    refused.
    """
    with ScriptedEndpoint(answer(200, KEYS.encode()), answer(200, b"<html>")) as site:
        given = ["credential", "add", "clinic", "--kind", "jwt", "--issuer", "i", "--audience", "a", "--jwks-url"]
        run(*given, f"{site.url}/keys")
        assert "JWKS" in run.fails(*given, f"{site.url}/other")
        assert [each.target for each in site.received] == ["/keys", "/other"]
    assert [key.kid for each in door.destination.credentials if hasattr(each, "rules") for key in each.rules.keys] == [
        "a",
        "e",
    ]


def test_registry_file(door: Door, run: Commands, folder: Path) -> None:
    """The registry file accepts every kind, with the names that a list shows; applied again, it changes nothing."""
    (folder / "token").write_text(TOKEN)
    (folder / "registry.toml").write_text("""
[destinations.clinic]
environment = "production"
sources = [{ id = "11111111-1111-4111-8111-111111111111" }]
require = ["oauth", "smart", "jwt+token"]
credentials = [
  { kind = "token", file = "token" },
  { kind = "hmac", file = "secret", header = "X-Sig" },
  { kind = "jwt", issuers = ["i"], audiences = ["us"], keys_file = "keys.json" },
  { kind = "google", audiences = ["us"], email = "redox@project.example", keys_file = "rsa.pem" },
  { kind = "oauth", client_id = "redox", file = "secret", names = { client_id = "clientId" } },
  { kind = "smart", client_id = "redox", audiences = ["https://receiver.example/t"], keys_file = "keys.json" },
  { kind = "sigv4", access_key = "AKID", region = "r", service = "s", file = "secret", session_token_file = "session" },
  { kind = "mtls", proxy = "nginx", san = "x", file = "secret" },
]
""")
    path = str(folder / "registry.toml")
    changes = run.json("registry", "apply", path)
    assert [each["name"] for each in changes if each["what"] == "credential"] == [
        "hmac",
        "jwt",
        "google",
        "oauth",
        "smart",
        "sigv4",
        "mtls",
    ]
    assert SECRET not in json.dumps(changes)
    assert run.json("registry", "apply", path, "--prune") == []
    (folder / "secret").write_text(SECRET[::-1])
    changed = run.json("registry", "apply", path, "--prune")
    assert sorted((each["change"], each["what"]) for each in changed) == [
        *[("+", "credential")] * 4,
        *[("-", "credential")] * 4,
    ]
    assert run.json("registry", "apply", path, "--prune") == []


@pytest.mark.parametrize(
    "wrong",
    [
        '{ kind = "jwt", issuers = ["i"], audiences = ["us"] }',
        '{ kind = "magic", file = "secret" }',
        '{ kind = "oauth", client_id = "redox" }',
        '{ kind = "oauth", client_id = "redox", file = "nowhere" }',
        '{ kind = "oauth", client_id = "redox", file = "secret", region = "r" }',
        '{ kind = "mtls", file = "secret" }',
    ],
)
def test_an_invalid_registry_file(door: Door, run: Commands, folder: Path, wrong: str) -> None:
    """The error names the destination, and nothing of the file is applied."""
    (folder / "token").write_text(TOKEN)
    (folder / "registry.toml").write_text(
        f'[destinations.clinic]\ncredentials = [{{ kind = "token", file = "token" }}, {wrong}]\n'
    )
    assert "clinic" in run.fails("registry", "apply", str(folder / "registry.toml"))
    assert len(run.json("credential", "list")) == 1


@pytest.fixture
def server(door: Door, run: Commands, folder: Path, database_url: str, keyring_path: Path) -> Iterator[Server]:
    """A receiver on the same database that trusts a proxy on this machine."""
    with serving(
        folder,
        {
            "DATABASE_URL": database_url,
            "RECEIVER_KEYRING": str(keyring_path),
            "RECEIVER_RECEIVERS": "1",
            "RECEIVER_DATA_DIR": str(folder),
            "RECEIVER_TRUSTED_PROXIES": "127.0.0.1",
        },
    ) as server:
        yield server


PRESENT_FILES: Mapping[str, str] = {
    "hmac": 'secret_file = "secret"\ntimestamp_header = "x-time"\n',
    "jwt": 'key_file = "private.pem"\nalgorithm = "RS256"\nissuer = "i"\naudience = "us"\nkid = "a"\n',
    "google": 'key_file = "private.pem"\naudience = "us"\nemail = "redox@project.example"\n',
    "oauth": 'client_id = "redox"\nsecret_file = "secret"\nsend = "json"\n',
    "smart": 'client_id = "redox"\nkey_file = "p384.pem"\nalgorithm = "ES384"\nkid = "e"\n',
    "sigv4": 'access_key = "AKID"\nregion = "r"\nservice = "s"\nsecret_file = "secret"\n',
    "mtls": 'proxy = "envoy"\ncertificate_file = "client.pem"\nsecret_file = "secret"\n',
}


@pytest.mark.parametrize("kind", PRESENT_FILES)
def test_simulated(door: Door, run: Commands, folder: Path, server: Server, kind: str) -> None:
    """`simulate` presents each kind and is accepted; without it, it is refused."""
    url = f"http://127.0.0.1:{server.port}"
    given = {
        "hmac": ["--timestamp-header", "x-time", "--secret-file", f"{folder}/secret"],
        "jwt": ["--issuer", "i", "--audience", "us", "--keys", f"{folder}/keys.json"],
        "google": ["--audience", "us", "--email", "redox@project.example", "--keys", f"{folder}/rsa.pem"],
        "oauth": ["--client-id", "redox", "--secret-file", f"{folder}/secret"],
        "smart": ["--client-id", "redox", "--token-url", f"{url}/oauth/clinic/token", "--keys", f"{folder}/keys.json"],
        "sigv4": ["--access-key", "AKID", "--region", "r", "--service", "s", "--secret-file", f"{folder}/secret"],
        "mtls": ["--proxy", "envoy", "--fingerprint", FINGERPRINT, "--secret-file", f"{folder}/secret"],
    }
    run("credential", "add", "clinic", "--kind", kind, *given[kind])
    version = door.value("SELECT version FROM registry_version")
    run("destination", "set", "clinic", "--require", f"{kind}+token", "--test-messages", "accept")
    _until_loaded(server, version + 1)
    (folder / "token").write_text(TOKEN)
    (folder / "how.toml").write_text(f'kind = "{kind}"\n{PRESENT_FILES[kind]}')
    simulate = [
        "simulate",
        "--url",
        url,
        "--destination",
        "clinic",
        "--token-file",
        f"{folder}/token",
        "--production",
        "--kind",
        "PatientAdmin.Arrival",
        "--count",
        "2",
    ]
    done = run.json(*simulate, "--present", f"{folder}/how.toml", "--misbehave", "--time-scale", "0.01")
    assert done["wrong"] == []
    number = next(each["id"] for each in run.json("credential", "list", "clinic") if each["kind"] == kind)
    assert {number} <= set(door.rows("SELECT credential_ids FROM messages LIMIT 1")[0][0])
    refused = run.json(*simulate, "--patience", "0.1", "--time-scale", "0.01", status=1)
    assert refused["wrong"]


def _until_loaded(server: Server, version: int) -> None:
    until(lambda: any(line["version"] >= version for line in server.lines("registry.loaded")))


@pytest.mark.parametrize(
    "text",
    [
        "",
        'kind = "magic"',
        'kind = "oauth"',
        "kind = [",
        'kind = "hmac"\nsecret_file = "no"',
        'kind = "hmac"\nsecret_file = "secret"\nunknown = 1',
    ],
)
def test_an_invalid_present_file(door: Door, run: Commands, folder: Path, text: str) -> None:
    """The error names the file."""
    (folder / "token").write_text(TOKEN)
    (folder / "how.toml").write_text(text)
    assert "how.toml" in run.fails(
        "simulate",
        "--url",
        "http://127.0.0.1:9",
        "--destination",
        "clinic",
        "--production",
        "--token-file",
        f"{folder}/token",
        "--present",
        f"{folder}/how.toml",
    )
