"""The commands `outbound` and `outbox`, with the fake API over real sockets."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sqlalchemy import Engine, text

from receiver.fault_injection.api_faults import ApiFault
from receiver.keyring import Keyring
from receiver.outbound.outbox import Caller, Clients, OutboundRecorder, Outbox
from receiver.outbound.outbox.sending import LaneSender
from receiver.simulator.api import FakeRedoxApi
from receiver.storage.queue import outbox as stored
from receiver.storage.registry.loader import load_registry
from tests.cli.conftest import ACTOR, Commands
from tests.outbound.conftest import KEY, LEGACY, PRIVATE, jwks_of, message, query

PEM = PRIVATE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.fixture
def api() -> Iterator[FakeRedoxApi]:
    with FakeRedoxApi() as running:
        running.register_oauth(KEY.client_id, jwks_of(KEY))
        running.register_legacy(LEGACY.api_key, LEGACY.secret)
        running.respond("PatientSearch.Query", lambda asked: {"Patient": {"LastName": "Canary"}})
        yield running


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with files for the commands."""
    (tmp_path / "key.pem").write_bytes(PEM)
    (tmp_path / "legacy.json").write_text(json.dumps({"apiKey": LEGACY.api_key, "secret": LEGACY.secret}))
    (tmp_path / "message.json").write_text(json.dumps(message()))
    (tmp_path / "query.json").write_text(json.dumps(query()))
    return tmp_path


@pytest.fixture
def keyed(run: Commands, api: FakeRedoxApi, files: Path) -> Commands:
    """Commands, with the API key `lab` registered."""
    run(
        "outbound",
        "key",
        "add",
        "lab",
        "--environment",
        "development",
        "--base-url",
        api.base_url,
        "--client-id",
        KEY.client_id,
        "--private-key",
        str(files / "key.pem"),
        "--kid",
        KEY.kid,
        "--source",
        "source-1",
    )
    return run


def call(run: Commands, verb: str, file: Path, out: Path, *more: str) -> Any:
    return run.json("outbound", verb, str(file), "--out", str(out), "--reason", "canary reason", *more)


class TestKeys:
    def test_add_and_list(self, keyed: Commands, files: Path) -> None:
        """A key of each kind is added from files, and listed without its secret."""
        keyed(
            "outbound",
            "key",
            "add",
            "old",
            "--environment",
            "production",
            "--region",
            "canada",
            "--legacy-file",
            "-",
            stdin=(files / "legacy.json").read_text(),
        )
        found = keyed.json("outbound", "key", "list")

        assert [(each["name"], each["kind"], each["kid"]) for each in found] == [
            ("lab", "oauth", KEY.kid),
            ("old", "legacy", None),
        ]
        assert found[1]["base_url"] == "https://api.ca.redoxengine.com"
        printed = keyed("outbound", "key", "list").stdout + json.dumps(found)
        assert "canary" not in printed
        assert "PRIVATE" not in printed

    def test_a_name_is_taken_once(self, keyed: Commands, files: Path) -> None:
        """A name that exists is an error; --replace replaces the key."""
        arguments = (
            "outbound",
            "key",
            "add",
            "lab",
            "--environment",
            "development",
            "--legacy-file",
            str(files / "legacy.json"),
        )
        assert "--replace" in keyed.fails(*arguments)
        assert keyed.json(*arguments, "--replace")["kind"] == "legacy"

    @pytest.mark.parametrize(
        ("given", "status"),
        [
            (["--client-id", "c", "--legacy-file", "f"], 2),
            ([], 2),
            (["--legacy-file", "legacy.json", "--kid", "k"], 2),
            (["--client-id", "c", "--region", "us", "--base-url", "https://x"], 2),
            (["--client-id", "c", "--kid", "k"], 2),
            (["--client-id", "c", "--private-key", "nothing"], 2),
            (["--legacy-file", "message.json"], 2),
            (["--client-id", "c", "--base-url", "http://api.invalid"], 1),
            (["--client-id", "c", "--query-path", "query"], 1),
            (["--client-id", "c", "--private-key", "message.json"], 1),
        ],
    )
    def test_invalid_keys(
        self, run: Commands, files: Path, given: list[str], status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Wrong usage has exit status 2; an invalid key has 1, with one line that quotes nothing of it."""
        monkeypatch.chdir(files)
        printed = run.fails("outbound", "key", "add", "x", "--environment", "development", *given, status=status)

        assert "Canary" not in printed
        assert run.json("outbound", "key", "list") == []

    def test_a_destination_replies_with_it(self, keyed: Commands) -> None:
        """A destination names a key of its environment, or none."""
        keyed("destination", "add", "clinic", "--reply-with", "lab")
        assert keyed.json("destination", "show", "clinic")["reply_with"] == "lab"
        assert "outbound key list" in keyed.fails("destination", "set", "clinic", "--reply-with", "unheard-of")
        assert keyed.json("destination", "set", "clinic", "--reply-with", "")["reply_with"] is None

    def test_a_key_that_signs_with_ours(
        self, run: Commands, api: FakeRedoxApi, engine: Engine, keyring: Keyring
    ) -> None:
        """A key without its own private key requires a signing key, whose public half Redox finds in our JWKS."""

        def published() -> dict[str, Any]:
            with engine.connect() as connection:
                return {"keys": [dict(key) for key in load_registry(connection, keyring).public_keys]}

        api.register_oauth("ours", published)
        run(
            "outbound",
            "key",
            "add",
            "lab",
            "--environment",
            "development",
            "--base-url",
            api.base_url,
            "--client-id",
            "ours",
        )
        assert "signing-key new" in run.fails("outbound", "token")
        run("signing-key", "new", "--algorithm", "ES384")
        assert run.json("outbound", "token")["api_key"] == "lab"


class TestCalls:
    def test_token_tells_its_end_alone(self, keyed: Commands, api: FakeRedoxApi) -> None:
        """The end of a token is shown, the token never."""
        printed = keyed("outbound", "token").stdout + json.dumps(keyed.json("outbound", "token"))
        assert "expires_at" in printed
        assert not any(token in printed for token in api._tokens._grants)
        api.register_oauth(KEY.client_id, {"keys": []})
        assert "kid" in keyed.fails("outbound", "token")

    def test_send(self, keyed: Commands, api: FakeRedoxApi, files: Path) -> None:
        """The bytes of the file are sent unchanged, with the source; the answer is written to a new file, mode 0600."""
        out = files / "answer.json"
        outcome = call(keyed, "send", files / "message.json", out)
        [request] = api.received("/endpoint")

        assert request.body == (files / "message.json").read_bytes()
        assert request.headers["redox-source-id"] == "source-1"
        assert stat.S_IMODE(out.stat().st_mode) == 0o600
        assert outcome["log_ids"] == [json.loads(out.read_bytes())["Meta"]["Logs"][0]["ID"]]

    def test_query(self, keyed: Commands, files: Path) -> None:
        """The answer is written to the file, and not to the terminal."""
        out = files / "found.json"
        done = keyed("outbound", "query", str(files / "query.json"), "--out", str(out), "--reason", "r")

        assert json.loads(out.read_bytes())["Patient"] == {"LastName": "Canary"}
        assert "Canary" not in done.output

    def test_fhir(self, keyed: Commands, api: FakeRedoxApi, files: Path) -> None:
        """Search, read and operations use the environment of the key, unless another is given; ids come from a file."""
        api.resources["Patient", "p-1"] = {"resourceType": "Patient", "id": "p-1"}
        (files / "parameters.json").write_text('{"family": "Canary", "given": ["A", "B"]}')
        (files / "id").write_text("p-1\n")
        (files / "bundle.json").write_text('{"resourceType": "Bundle"}')
        common = ("--to", "our-ehr", "--resource", "Patient")
        call(keyed, "fhir", files / "parameters.json", files / "1", *common, "--search")
        call(keyed, "fhir", files / "id", files / "2", *common, "--read", "--environment", "Staging")
        call(keyed, "fhir", files / "bundle.json", files / "3", *common, "--operation", "$patient-update")

        assert [each.path for each in api.received("/fhir/")] == [
            "/fhir/R4/our-ehr/Development/Patient/_search",
            "/fhir/R4/our-ehr/Staging/Patient/p-1",
            "/fhir/R4/our-ehr/Development/Patient/$patient-update",
        ]
        assert api.received("/fhir/")[0].body == b"family=Canary&given=A&given=B"
        assert json.loads((files / "2").read_bytes())["id"] == "p-1"
        keyed.fails("outbound", "fhir", str(files / "id"), "--out", "x", "--reason", "r", *common, status=2)
        (files / "parameters.json").write_text("[]")
        keyed.fails(
            "outbound",
            "fhir",
            str(files / "parameters.json"),
            "--out",
            str(files / "4"),
            "--reason",
            "r",
            *common,
            "--search",
            status=2,
        )
        assert not (files / "4").exists()

    def test_a_call_is_audited_with_its_reason(self, keyed: Commands, files: Path, engine: Engine) -> None:
        """The audit log has the actor, the kind of call, and the sealed reason."""
        call(keyed, "send", files / "message.json", files / "answer.json")
        ended, begun = keyed.json("audit", "list", "--action", "outbound.send")

        assert (begun["actor"], begun["outcome"], begun["noted"]) == (ACTOR, "begun", True)
        assert (ended["outcome"], ended["noted"]) == ("sent", False)
        assert begun["detail"]["kind"] == "PatientAdmin.Arrival"
        with engine.connect() as connection:
            everything = str(
                [
                    list(connection.execute(text(f"SELECT * FROM {table}")))
                    for table in ("audit_events", "outbound_requests")
                ]
            )
        assert "canary reason" not in everything
        assert "Canary" not in everything

    def test_what_fails_leaves_no_file(self, keyed: Commands, api: FakeRedoxApi, files: Path) -> None:
        """An error is one line without patient data, and the file for the answer is deleted."""
        api.refuse_next({"ID": 4711, "Text": "no Canary", "Type": "client", "Module": "Router"})
        out = files / "answer.json"
        printed = keyed.fails("outbound", "send", str(files / "message.json"), "--out", str(out), "--reason", "r")

        assert "4711" in printed
        assert "Canary" not in printed
        assert not out.exists()
        assert keyed.json("outbox", "list")[0]["error_class"] == "Rejected"

    def test_an_existing_file_is_not_written_over(self, keyed: Commands, api: FakeRedoxApi, files: Path) -> None:
        """Nothing is sent if the file for the answer exists."""
        keyed.fails(
            "outbound", "send", str(files / "message.json"), "--out", str(files / "key.pem"), "--reason", "r", status=2
        )
        assert (files / "key.pem").read_bytes() == PEM
        assert api.received("/endpoint") == []

    def test_a_reason_is_wanted(self, keyed: Commands, files: Path) -> None:
        """Without a reason, or with an empty one, nothing is sent."""
        arguments = ("outbound", "send", str(files / "message.json"), "--out", str(files / "x"))
        keyed.fails(*arguments, status=2)
        keyed.fails(*arguments, "--reason", " ", status=2)

    def test_of_several_keys_one_is_named(self, keyed: Commands, api: FakeRedoxApi, files: Path) -> None:
        """With several keys, --key is required, and the error names them."""
        keyed(
            "outbound",
            "key",
            "add",
            "old",
            "--environment",
            "production",
            "--base-url",
            api.base_url,
            "--legacy-file",
            str(files / "legacy.json"),
        )
        assert "lab, old" in keyed.fails("outbound", "token")
        assert keyed.json("outbound", "token", "--key", "old")["api_key"] == "old"
        assert "outbound key list" in keyed.fails("outbound", "token", "--key", "unheard-of")


class TestOutbox:
    @pytest.fixture
    def dead(self, keyed: Commands, api: FakeRedoxApi, engine: Engine, keyring: Keyring) -> int:
        """Return the id of a request that Redox has refused, after one that it has accepted."""
        outbox = Outbox(engine, keyring, caller=Caller(name="tester@test"))
        outbox.send(message())
        outbox.send(message("Discharge"))
        self.send(engine, keyring)
        outbox.send(message("Transfer"))
        api.refuse_next({"ID": 4711, "Text": "no Canary", "Type": "client", "Module": "Router"})
        self.send(engine, keyring)
        return int(keyed.json("outbox", "list", "--state", "dead")[0]["id"])

    @staticmethod
    def send(engine: Engine, keyring: Keyring) -> None:
        with Clients(engine, keyring) as clients:
            with engine.begin() as connection:
                fence = stored.claim(connection, "@outbox/lab/destination-1", "w", 60)
            assert fence is not None
            LaneSender(engine, clients, OutboundRecorder(engine, keyring), name="w").run(fence, lambda: True)
            with engine.begin() as connection:
                connection.execute(text("UPDATE lanes SET owner = NULL"))

    def test_list(self, keyed: Commands, dead: int) -> None:
        """Requests are listed newest first, by page and filters, without bodies."""
        found = keyed.json("outbox", "list")
        assert [each["kind"] for each in found] == [
            "PatientAdmin.Transfer",
            "PatientAdmin.Discharge",
            "PatientAdmin.Arrival",
        ]
        assert not {"request", "answer"} & found[0].keys()
        assert [each["id"] for each in keyed.json("outbox", "list", "--error-class", "Rejected")] == [dead]
        assert [each["state"] for each in keyed.json("outbox", "list", "--before", str(dead))] == ["sent", "sent"]
        assert keyed.json("outbox", "list", "--key", "lab", "--call", "query") == []
        assert "Rejected" in keyed("outbox", "list", "--kind", "PatientAdmin.Transfer").stdout
        assert f"--before {dead}" in keyed("outbox", "list", "--limit", "1").stderr

    def test_show_writes_bodies_to_files(self, keyed: Commands, dead: int, files: Path) -> None:
        """Bodies are written to files with mode 0600, after an audit row with the reason."""
        outcome = keyed.json(
            "outbox",
            "show",
            str(dead),
            "--request-out",
            str(files / "sent"),
            "--answer-out",
            str(files / "said"),
            "--reason",
            "ticket 4711",
        )

        assert (outcome["id"], outcome["error_class"]) == (dead, "Rejected")
        assert json.loads((files / "sent").read_bytes())["Meta"]["EventType"] == "Transfer"
        assert json.loads((files / "said").read_bytes())["Errors"][0]["text"] == "no Canary"
        assert {stat.S_IMODE((files / name).stat().st_mode) for name in ("sent", "said")} == {0o600}
        [outcome] = keyed.json("audit", "list", "--action", "outbound.disclose")
        assert (outcome["actor"], outcome["noted"]) == (ACTOR, True)
        keyed.fails("outbox", "show", str(dead), "--request-out", str(files / "x"), status=2)
        keyed.fails("outbox", "show", str(dead), "--reason", "r", status=2)
        assert "outbox list" in keyed.fails("outbox", "show", "4711")

    def test_retry(self, keyed: Commands, dead: int, api: FakeRedoxApi, engine: Engine, keyring: Keyring) -> None:
        """A dead request is sent again with all its attempts; a dry run reports it and changes nothing."""
        arguments = ("outbox", "retry", "--error-class", "Rejected", "--reason", "route opened")
        assert keyed.json(*arguments, "--dry-run") == {"dry_run": True, "done": [dead], "left": []}
        assert keyed.json("outbox", "show", str(dead))["state"] == "dead"
        assert keyed.json(*arguments)["done"] == [dead]
        shown = keyed.json("outbox", "show", str(dead))
        assert (shown["state"], shown["attempts"], shown["unanswered"]) == ("pending", 0, 0)
        self.send(engine, keyring)
        assert keyed.json("outbox", "show", str(dead))["state"] == "sent"
        assert [each["Meta"]["EventType"] for each in api.processed] == ["Arrival", "Discharge", "Transfer"]
        [outcome] = keyed.json("audit", "list", "--action", "outbound.retry")
        assert (outcome["actor"], outcome["noted"], outcome["detail"]) == (
            ACTOR,
            True,
            {"was": "dead", "error_class": "Rejected"},
        )

    def test_what_cannot_be_sent_again_is_left(self, keyed: Commands, dead: int, files: Path) -> None:
        """A sent request, a direct call and one that does not exist are reported, and the exit status is 1."""
        call(keyed, "send", files / "message.json", files / "answer.json")
        direct = keyed.json("outbox", "list")[0]["id"]
        outcome = keyed.json("outbox", "retry", "1", str(direct), "999", "--reason", "r", status=1)

        assert outcome["done"] == []
        assert {each["id"] for each in outcome["left"]} == {1, direct, 999}
        keyed.fails("outbox", "retry", "--reason", "r", status=2)

    def test_what_waits_goes_at_once(
        self, keyed: Commands, api: FakeRedoxApi, engine: Engine, keyring: Keyring
    ) -> None:
        """A pending request named by id is sent without its pause, and keeps its attempts."""
        Outbox(engine, keyring, caller=Caller(name="tester@test")).send(message())
        api.fail("/endpoint", ApiFault.SERVER_ERROR)
        self.send(engine, keyring)
        [waiting] = keyed.json("outbox", "list", "--state", "pending")
        assert waiting["ready_at"] is not None
        keyed("outbox", "retry", str(waiting["id"]), "--reason", "r")
        shown = keyed.json("outbox", "show", str(waiting["id"]))
        assert (shown["ready_at"], shown["attempts"]) == (None, 1)

    def test_status_names_what_does_not_go_out(self, keyed: Commands, dead: int) -> None:
        """`status` has a finding with the command that lists the requests."""
        findings = {each["code"]: each for each in keyed.json("status", status=1)["findings"]}
        assert findings["outbox_dead"]["fix"] == "redox-receiver outbox list --key lab --state dead"
        assert "Rejected" in findings["outbox_dead"]["text"]

    def test_the_audit_holds(self, keyed: Commands, dead: int, files: Path) -> None:
        """After calls, retries and changes of keys, every audit row holds."""
        call(keyed, "send", files / "message.json", files / "answer.json")
        keyed("outbox", "retry", str(dead), "--reason", "r")
        keyed("signing-key", "new", "--algorithm", "ES384")
        keyed("audit", "verify")
