"""`simulate --api` simulates both directions of Redox, against everything that `up` starts."""

from __future__ import annotations

from tests.support.machine import SOURCE, machine
from tests.support.ports import free_port


def test_a_handler_answers_a_message_by_sending_one() -> None:
    """The example's handler answers an order with a result. The simulated API checks its signature with the key that
    the receiver publishes, and the request is linked to the message that it answers."""
    api = f"127.0.0.1:{free_port()}"
    with machine() as made:
        made.environment["RECEIVER_HANDLERS"] = "receiver.testing.example"
        made.up("--workers", "1")
        token = made.register("lab")
        made.run("signing-key", "new", "--algorithm", "ES384")
        made.run(
            "outbound",
            "key",
            "add",
            "ours",
            "--environment",
            "development",
            "--client-id",
            "client-1",
            "--source",
            SOURCE,
            "--base-url",
            f"http://{api}",
        )
        made.run("destination", "set", "lab", "--reply-with", "ours")
        message = made.json(
            "simulate",
            "--url",
            made.url,
            "--destination",
            "lab",
            "--token-file",
            str(token),
            "--source",
            SOURCE,
            "--kind",
            "Order.New",
            "--count",
            "3",
            "--api",
            api,
        )

        assert (message["wrong"], message["came"]) == ([], {"Results.New": 3})
        sent = made.json("outbox", "list")
        assert [each["state"] for each in sent] == ["sent"] * 3
        received = {each["uuid"] for each in made.json("messages", "list") if each["kind"] == "Order.New"}
        assert {each["message_uuid"] for each in sent} == received
        assert made.findings() == {}
