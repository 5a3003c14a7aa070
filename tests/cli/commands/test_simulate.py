"""`simulate` simulates Redox, checks the answers, and keeps synthetic messages out of production."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine

from receiver.cli import main
from receiver.protocol.registry import Environment
from receiver.samples.sample import kinds
from receiver.simulator.attacks import AttackTarget
from receiver.storage.operations import queries
from receiver.storage.registry.changes import RegistryChanges
from tests.protocol.made_up import SECRETS, SOURCE, TOKENS, signing, token
from tests.simulator.model_receiver import TEXT, Answer, model_receiver

Simulate = Callable[..., Result]


@pytest.fixture
def target() -> Iterator[AttackTarget]:
    """A model of a receiver, without a database that `simulate` could read."""
    with model_receiver() as made:
        yield made


@pytest.fixture
def simulate(target: AttackTarget, tmp_path: Path) -> Simulate:
    """Run `simulate` against the model, with its token in a file."""
    (tmp_path / "token").write_text(f"{target.token}\n")

    def run(*arguments: str, url: str = target.base_url) -> Result:
        return CliRunner().invoke(
            main,
            ["simulate", "--url", url, "--destination", "main", "--token-file", str(tmp_path / "token"), *arguments],
        )

    return run


def test_a_summary_by_outcome(simulate: Simulate) -> None:
    """The report is a table of outcomes with latencies, and the seed. All answers are correct: exit status 0."""
    done = simulate("--source", SOURCE, "--kind", "PatientAdmin.*", "--seed", "7")
    assert done.exit_code == 0, done.output
    head, _, *lines, last = done.stdout.splitlines()
    assert head.split() == ["outcome", "count", "median_ms", "p95_ms", "max_ms"]
    # Of the 15 event types 13 are notifications, of which every fifth was sent twice.
    assert [line.split("  ")[0] for line in lines] == ["handshake", "accepted", "accepted again", "no responder"]
    assert [int(re.split(" {2,}", line)[1]) for line in lines] == [2, 13, 2, 2]
    assert last == "seed 7; all answers are correct"


def test_as_json(simulate: Simulate) -> None:
    """With --json the report is one document with the columns of the table."""
    done = simulate("--source", SOURCE, "--kind", "Device.New", "--json")
    message = json.loads(done.stdout)
    assert [(each["outcome"], each["count"]) for each in message["summary"]] == [("handshake", 2), ("accepted", 1)]
    assert set(message["summary"][0]) == {"outcome", "count", "median_ms", "p95_ms", "max_ms"}
    assert (message["wrong"], message["retried"]) == ([], 0)
    assert isinstance(message["seed"], int)


def test_not_as_it_should_be(tmp_path: Path) -> None:
    """Each wrong answer has a line, and the exit status is 1."""
    (tmp_path / "token").write_text(TOKENS["first"])
    with model_receiver(lambda body, _count, right: (500, TEXT, b"") if b'"Query"' in body else right) as target:
        done = CliRunner().invoke(
            main,
            [
                "simulate",
                "--url",
                target.base_url,
                "--destination",
                "main",
                "--token-file",
                str(tmp_path / "token"),
                "--source",
                SOURCE,
                "--kind",
                "PatientSearch.Query",
                "--kind",
                "Device.New",
            ],
        )
    assert done.exit_code == 1
    assert "PatientSearch.Query: responded 500, expected 200, and without Meta.Errors\n" in done.stdout
    assert done.stdout.endswith("; 1 wrong answer\n")


def test_the_wrong_token(simulate: Simulate, target: AttackTarget) -> None:
    """With a wrong token the handshake fails, and nothing else is sent."""
    done = CliRunner().invoke(
        main,
        [
            "simulate",
            "--url",
            target.base_url,
            "--destination",
            "main",
            "--token-file",
            "-",
            "--source",
            SOURCE,
            "--json",
        ],
        input=f"{TOKENS['second']}\n",
    )
    assert done.exit_code == 1
    assert [each["what"] for each in json.loads(done.stdout)["wrong"]] == ["by POST", "by GET"]


def test_everything_is_sent_by_default(simulate: Simulate) -> None:
    """Without --kind it sends one message of each of the 111 event types and of the FHIR notifications."""
    message = json.loads(simulate("--source", SOURCE, "--json").stdout)
    counts = {each["outcome"]: each["count"] for each in message["summary"]}
    assert counts["accepted"] + counts["no responder"] == len(kinds())


def test_misbehave(simulate: Simulate) -> None:
    """--misbehave sends requests that must be refused, and this receiver refuses them."""
    done = simulate("--source", SOURCE, "--kind", "Device.New", "--misbehave")
    assert done.exit_code == 0, done.output
    assert "misbehaviour met" in done.stdout


def test_a_file(simulate: Simulate, tmp_path: Path) -> None:
    """--file sends a body unchanged. Without --kind only files are sent."""
    body = {"Meta": {"DataModel": "Device", "EventType": "New", "Source": {"ID": SOURCE}}}
    (tmp_path / "body.json").write_text(json.dumps(body))
    message = json.loads(simulate("--source", SOURCE, "--file", str(tmp_path / "body.json"), "--json").stdout)
    assert [(each["outcome"], each["count"]) for each in message["summary"]] == [("handshake", 2), ("accepted", 1)]


def test_signed(tmp_path: Path) -> None:
    """--signing-secret-file signs every message, and a destination that requires signatures accepts them."""
    (tmp_path / "token").write_text(TOKENS["first"])
    (tmp_path / "secret").write_text(SECRETS["first"])
    with model_receiver(credentials=(token(), signing(id=2)), require=("hmac+token",)) as target:
        arguments = [
            "simulate",
            "--url",
            target.base_url,
            "--destination",
            "main",
            "--token-file",
            str(tmp_path / "token"),
            "--source",
            SOURCE,
            "--kind",
            "Device.New",
            "--patience",
            "0",
        ]
        signed = CliRunner().invoke(main, [*arguments, "--signing-secret-file", str(tmp_path / "secret")])
        assert signed.exit_code == 0, signed.output
        assert "Device.New: responded 401, expected 200" in CliRunner().invoke(main, arguments).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", SOURCE, "--kind", "Nothing.Such"], "no sample matches Nothing.Such"),
        (["--source", SOURCE, "--kind", "no pattern"], "'no pattern' is not a valid pattern"),
        ([], "give a registered source with --source"),
    ],
)
def test_wrong_usage(simulate: Simulate, arguments: list[str], message: str) -> None:
    """Wrong usage is refused, and the error says what is missing."""
    done = simulate(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def registered(registration: RegistryChanges, environment: Environment) -> None:
    """Register the destination in the database, with its source."""
    now = datetime.now(UTC)
    registration.add_destination(
        "main",
        now,
        environment=environment,
        require=["token"],
        sources_policy="registered",
        on_unknown_source="reject",
        test_messages="accept",
        reply_with=None,
        token=TOKENS["first"],
    )
    registration.add_source("main", SOURCE, now, name=None)


@pytest.fixture
def _asked(database_url: str, keyring_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local database that `simulate` can read."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("RECEIVER_KEYRING", str(keyring_path))


@pytest.mark.usefixtures("_asked")
def test_a_production_destination(simulate: Simulate, registration: RegistryChanges) -> None:
    """Nothing is sent to a production destination of the local database without --production."""
    registered(registration, "production")
    done = simulate("--kind", "Device.New")
    assert done.exit_code == 1
    assert "main is a production destination" in done.stderr
    assert "--production" in done.stderr
    assert simulate("--kind", "Device.New", "--production").exit_code == 0


@pytest.mark.usefixtures("_asked")
def test_a_registered_source_is_found(simulate: Simulate, registration: RegistryChanges) -> None:
    """With the local database --source is not needed."""
    registered(registration, "development")
    assert simulate("--kind", "Device.New").exit_code == 0


def test_another_host(simulate: Simulate) -> None:
    """The environment of a destination at another host is not known here: --production is needed."""
    done = simulate("--source", SOURCE, "--kind", "Device.New", url="https://redox.hospital.example")
    assert done.exit_code == 1
    assert "main at https://redox.hospital.example" in done.stderr


@pytest.mark.usefixtures("_asked")
def test_a_destination_without_a_source(simulate: Simulate, registration: RegistryChanges, engine: Engine) -> None:
    """Without a source the error names --register, which registers one. The second time it exists."""
    registered(registration, "development")
    registration.disable_source("main", SOURCE, datetime.now(UTC))
    done = simulate("--kind", "Device.New")
    assert done.exit_code == 2
    assert "--register" in done.stderr
    simulate("--kind", "Device.New", "--register")
    with engine.connect() as connection:
        (made,) = [each for each in queries.sources(connection, destination="main") if each["enabled"]]
    assert made["name"] == "simulate"
    assert "--register" not in simulate("--kind", "Device.New").stderr


@pytest.mark.usefixtures("_asked")
def test_production_gets_no_made_up_source(simulate: Simulate, registration: RegistryChanges, engine: Engine) -> None:
    """--register does not replace --production."""
    registered(registration, "production")
    registration.disable_source("main", SOURCE, datetime.now(UTC))
    assert simulate("--kind", "Device.New", "--register").exit_code == 1
    with engine.connect() as connection:
        assert len(queries.sources(connection, destination="main")) == 1


def test_retries_are_counted(tmp_path: Path) -> None:
    """Attempts that were answered 503 and retried are counted by status. The result is correct."""
    (tmp_path / "token").write_text(TOKENS["first"])
    arguments = [
        "--destination",
        "main",
        "--token-file",
        str(tmp_path / "token"),
        "--source",
        SOURCE,
        "--kind",
        "Device.New",
        "--time-scale",
        "0.001",
    ]

    def refusing(body: bytes, count: int, right: Answer) -> Answer:
        return (503, TEXT, b"") if count < 5 and b"Device" in body else right

    with model_receiver(refusing) as target:
        done = CliRunner().invoke(main, ["simulate", "--url", target.base_url, *arguments])
    assert done.exit_code == 0, done.output
    found = re.search(r"(\d+) attempts were refused and retried \(503 (\d+)\)", done.stdout)
    assert found
    assert found[1] == found[2]
    with model_receiver(refusing) as target:
        message = json.loads(
            CliRunner().invoke(main, ["simulate", "--url", target.base_url, *arguments, "--json"]).stdout
        )
    assert message["retried"] == 1
    assert message["retries"] == {"503": int(found[1])}
