"""`simulate` plays Redox from the command line, judges, and keeps made-up messages out of production."""

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
    """A receiver that answers as the table says, without a database that could be asked about it."""
    with model_receiver() as made:
        yield made


@pytest.fixture
def simulate(target: AttackTarget, tmp_path: Path) -> Simulate:
    """Runs `simulate` against it, with its token in a file."""
    (tmp_path / "token").write_text(f"{target.token}\n")

    def run(*arguments: str, url: str = target.base_url) -> Result:
        return CliRunner().invoke(
            main,
            ["simulate", "--url", url, "--destination", "main", "--token-file", str(tmp_path / "token"), *arguments],
        )

    return run


def test_a_summary_by_outcome(simulate: Simulate) -> None:
    """At the end stands a table by outcome with latencies, and the seed; all was well, so the exit status is 0."""
    done = simulate("--source", SOURCE, "--kind", "PatientAdmin.*", "--seed", "7")
    assert done.exit_code == 0, done.output
    head, _, *lines, last = done.stdout.splitlines()
    assert head.split() == ["outcome", "count", "median_ms", "p95_ms", "max_ms"]
    # Of the 15 event types 13 are notifications, of which every fifth was sent twice.
    assert [line.split("  ")[0] for line in lines] == ["handshake", "accepted", "accepted again", "no responder"]
    assert [int(re.split(" {2,}", line)[1]) for line in lines] == [2, 13, 2, 2]
    assert last == "seed 7; all answers are correct"


def test_as_json(simulate: Simulate) -> None:
    """With --json the summary is one document, and its columns are the table's."""
    done = simulate("--source", SOURCE, "--kind", "Device.New", "--json")
    told = json.loads(done.stdout)
    assert [(each["outcome"], each["count"]) for each in told["summary"]] == [("handshake", 2), ("accepted", 1)]
    assert set(told["summary"][0]) == {"outcome", "count", "median_ms", "p95_ms", "max_ms"}
    assert (told["wrong"], told["retried"]) == ([], 0)
    assert isinstance(told["seed"], int)


def test_not_as_it_should_be(tmp_path: Path) -> None:
    """What is wrong is told line by line, and the exit status is 1."""
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
    """A token that is not the destination's fails at the handshake, and nothing else is sent."""
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
    """Without --kind there is one of each of the 111 event types and of the FHIR notifications."""
    told = json.loads(simulate("--source", SOURCE, "--json").stdout)
    counts = {each["outcome"]: each["count"] for each in told["summary"]}
    assert counts["accepted"] + counts["no responder"] == len(kinds())


def test_misbehave(simulate: Simulate) -> None:
    """--misbehave sends what must be refused, and this receiver refuses it."""
    done = simulate("--source", SOURCE, "--kind", "Device.New", "--misbehave")
    assert done.exit_code == 0, done.output
    assert "misbehaviour met" in done.stdout


def test_a_file(simulate: Simulate, tmp_path: Path) -> None:
    """--file sends a body as it is, and alone when no kind is named."""
    body = {"Meta": {"DataModel": "Device", "EventType": "New", "Source": {"ID": SOURCE}}}
    (tmp_path / "body.json").write_text(json.dumps(body))
    told = json.loads(simulate("--source", SOURCE, "--file", str(tmp_path / "body.json"), "--json").stdout)
    assert [(each["outcome"], each["count"]) for each in told["summary"]] == [("handshake", 2), ("accepted", 1)]


def test_signed(tmp_path: Path) -> None:
    """--signing-secret-file signs every message, for a destination that wants that; without it none passes."""
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
    ("arguments", "told"),
    [
        (["--source", SOURCE, "--kind", "Nothing.Such"], "no sample matches Nothing.Such"),
        (["--source", SOURCE, "--kind", "no pattern"], "'no pattern' is not a valid pattern"),
        ([], "give a registered source with --source"),
    ],
)
def test_wrong_usage(simulate: Simulate, arguments: list[str], told: str) -> None:
    """What cannot be simulated is wrong usage, and says what is missing."""
    done = simulate(*arguments)
    assert done.exit_code == 2
    assert told in done.stderr


def registered(registration: RegistryChanges, environment: Environment) -> None:
    """The destination in the database, with its source."""
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
    """A database that can be asked."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("RECEIVER_KEYRING", str(keyring_path))


@pytest.mark.usefixtures("_asked")
def test_a_production_destination(simulate: Simulate, registration: RegistryChanges) -> None:
    """A destination that the database knows as production is sent nothing, unless one says that it is meant."""
    registered(registration, "production")
    done = simulate("--kind", "Device.New")
    assert done.exit_code == 1
    assert "main is a production destination" in done.stderr
    assert "--production" in done.stderr
    assert simulate("--kind", "Device.New", "--production").exit_code == 0


@pytest.mark.usefixtures("_asked")
def test_a_registered_source_is_found(simulate: Simulate, registration: RegistryChanges) -> None:
    """Where the database can be asked, --source need not be given."""
    registered(registration, "development")
    assert simulate("--kind", "Device.New").exit_code == 0


def test_another_host(simulate: Simulate) -> None:
    """At another host nobody here knows what a destination is: it takes --production."""
    done = simulate("--source", SOURCE, "--kind", "Device.New", url="https://redox.hospital.example")
    assert done.exit_code == 1
    assert "main at https://redox.hospital.example" in done.stderr


@pytest.mark.usefixtures("_asked")
def test_a_destination_without_a_source(simulate: Simulate, registration: RegistryChanges, engine: Engine) -> None:
    """It says that --register registers one, and with that it does; a second time there is one."""
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
    """--register is no way around --production."""
    registered(registration, "production")
    registration.disable_source("main", SOURCE, datetime.now(UTC))
    assert simulate("--kind", "Device.New", "--register").exit_code == 1
    with engine.connect() as connection:
        assert len(queries.sources(connection, destination="main")) == 1


def test_retries_are_counted(tmp_path: Path) -> None:
    """Attempts that were answered 503 and made again are told, by status; the end is as it should be."""
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
        told = json.loads(CliRunner().invoke(main, ["simulate", "--url", target.base_url, *arguments, "--json"]).stdout)
    assert told["retried"] == 1
    assert told["retries"] == {"503": int(found[1])}
