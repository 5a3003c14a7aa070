"""A feed that is refused is a finding, with the reason, counts, times and the command that fixes it."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import uuid4

from click.testing import CliRunner
from sqlalchemy import text

from receiver.cli import main
from receiver.storage.registry.credentials import new_token
from tests.findings.conftest import Findings
from tests.support.server import Server
from tests.support.site import Site, message, sent
from tests.support.waiting import until


def refuse(server: Server, requests: list[bytes], status: int) -> None:
    """Have these requests refused."""
    assert {server.ask(each).status for each in requests} == {status}


def test_a_wrong_token(site: Site, server: Server, found: Findings) -> None:
    """After three accepted messages 21 have a wrong token: `status` shows it until two are accepted again."""
    for _ in range(3):
        assert server.ask(sent(site)).status == 200
    until(lambda: site.rows("SELECT FROM audit_events WHERE action = 'message.receive'"))
    assert "requests_refused" not in found()
    refuse(server, [sent(site, verification_token=new_token()) for _ in range(21)], 401)
    # Ten have rows of their own; the others are summed up when the minute ends.
    until(lambda: "requests_refused" in found() and found()["requests_refused"]["details"]["count"] == 21)
    finding = found()["requests_refused"]
    assert finding["details"]["reason"] == "token_wrong"
    assert finding["details"]["first_at"] < finding["details"]["last_at"]
    assert finding["fix"] == "redox-receiver credential add lab --kind token"
    shown = CliRunner().invoke(main, ["status"], env=site.environment)
    assert shown.exit_code == 1
    assert "lab: 21 requests were refused (token_wrong) from " in shown.stdout
    assert {server.ask(sent(site)).status for _ in range(2)} == {200}
    until(lambda: "requests_refused" not in found())


def test_a_revoked_token(site: Site, server: Server, found: Findings) -> None:
    """Redox goes on with the token that was revoked."""
    site.add("revoked")
    [(number,)] = site.rows(
        "SELECT c.id FROM credentials c JOIN destinations d ON d.id = c.destination_id WHERE d.name = 'revoked'"
    )
    until(lambda: server.ask(sent(site, to="revoked")).status == 200)
    site.registration.revoke_credential(number, datetime.now(UTC))
    until(lambda: server.ask(sent(site, to="revoked")).status == 401)
    refuse(server, [sent(site, to="revoked")] * 3, 401)
    until(lambda: "requests_refused" in found("revoked"))
    assert found("revoked")["requests_refused"]["details"]["reason"] == "token_revoked"
    assert found("revoked")["requests_refused"]["fix"] == "redox-receiver credential add revoked --kind token"


def test_an_unknown_source(site: Site, server: Server, found: Findings) -> None:
    """Every message names a source that is not registered."""
    site.add("stranger")
    until(lambda: server.ask(sent(site, to="stranger")).status == 200)
    refuse(server, [sent(site, message(Source={"ID": str(uuid4())}), to="stranger") for _ in range(3)], 403)
    until(lambda: "requests_refused" in found("stranger"))
    assert "probably_paused" in found("stranger")
    assert found("stranger")["requests_refused"]["fix"] == "redox-receiver source list stranger --refused"


def test_credentials_that_do_not_suffice(site: Site, server: Server, found: Findings) -> None:
    """More is required than Redox is set to send."""
    token = site.add("strict")
    until(lambda: server.ask(sent(site, to="strict")).status == 200)
    site.registration.set_destination("strict", datetime.now(UTC), {"require": ["token+mtls"]})
    until(lambda: server.ask(sent(site, to="strict", verification_token=token)).status == 401)
    refuse(server, [sent(site, to="strict")] * 3, 401)
    until(lambda: "requests_refused" in found("strict"))
    assert found("strict")["requests_refused"]["details"]["reason"] == "credential_insufficient"
    assert found("strict")["requests_refused"]["fix"] == "redox-receiver destination show strict"


def test_bodies_that_are_too_large(site: Site, server: Server, found: Findings) -> None:
    """413 names the setting."""
    site.add("large")
    until(lambda: server.ask(sent(site, to="large")).status == 200)
    refuse(server, [sent(site, to="large", content_length=str(1 << 40))] * 3, 413)
    until(lambda: "requests_refused" in found("large"))
    assert "RECEIVER_MAX_BODY" in found("large")["requests_refused"]["text"]


def test_503(site: Site, server: Server, found: Findings) -> None:
    """While the disk is full every message is answered 503; the audit has that as soon as it can be written."""
    site.add("full")
    until(lambda: server.ask(sent(site, to="full")).status == 200)
    with site.engine.begin() as connection:
        connection.execute(
            text("""
            CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                RAISE EXCEPTION 'full' USING ERRCODE = '53100'; END $$""")
        )
        connection.execute(text("CREATE TRIGGER full_disk BEFORE INSERT ON messages EXECUTE FUNCTION full_disk()"))
    try:
        refuse(server, [sent(site, to="full")] * 3, 503)
    finally:
        with site.engine.begin() as connection:
            connection.execute(text("DROP TRIGGER full_disk ON messages"))
            connection.execute(text("DROP FUNCTION full_disk"))
    until(lambda: "requests_refused" in found("full"))
    assert found("full")["requests_refused"]["details"]["status"] == 503
    assert found("full")["requests_refused"]["fix"] == "redox-receiver check"
    until(lambda: server.ask(sent(site, to="full")).status == 200)


def test_mostly_refused(site: Site, server: Server, found: Findings) -> None:
    """Some requests are accepted, and more are refused in between; when the refusals end, so does the finding."""
    site.add("mixed")
    wrong, right = sent(site, to="mixed", verification_token=new_token()), sent(site, to="mixed")
    until(lambda: server.ask(right).status == 200)
    refuse(server, [wrong] * 2, 401)
    assert server.ask(right).status == 200
    refuse(server, [wrong] * 2, 401)
    until(lambda: "requests_refused" in found("mixed"))
    until(lambda: found("mixed")["requests_refused"]["details"]["count"] == 4)
    for _ in range(2):
        assert server.ask(right).status == 200
    until(lambda: "requests_refused" not in found("mixed"))


def test_a_destination_that_does_not_exist(site: Site, server: Server, found: Findings) -> None:
    """A URL that names no destination is a warning, without the name that was made up."""
    refuse(server, [sent(site).replace(b"/redox/lab", b"/redox/lob")] * 3, 401)
    until(lambda: "destination_unknown" in found(None))
    assert "lob" not in found(None)["destination_unknown"]["text"]
