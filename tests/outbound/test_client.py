"""RedoxClient against the fake API: what it sends, what it refuses, and what it retries."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from receiver.errors import ConfigurationError
from receiver.fault_injection.api_faults import ApiFault
from receiver.outbound import (
    AnswerLost,
    BadAnswer,
    Limits,
    NetworkOnramp,
    OutboundError,
    RateLimited,
    RedoxClient,
    RedoxUnavailable,
    Rejected,
    Unsendable,
)
from receiver.simulator.api import FakeRedoxApi
from receiver.simulator.api_exchange import SimulatedApiAnswer
from tests.outbound.conftest import KEY, LEGACY, QUICK, Connect, message, query

ONRAMP = NetworkOnramp(organization="1.2.3", user="user-7", role="112247003")


@pytest.mark.parametrize("key", [KEY, LEGACY], ids=["oauth", "legacy"])
def test_a_message_arrives(api: FakeRedoxApi, connect: Connect, key: Any) -> None:
    """Redox receives the message with its source, as JSON. The answer has the id of its log."""
    answer = connect(key, source="source-1").send(message())

    whole = message(Source={"ID": "source-1"})
    assert api.processed == [whole]
    (sent,) = api.received("/endpoint")
    assert sent.headers["content-type"] == "application/json"
    assert sent.headers["user-agent"].startswith("redox-receiver/")
    assert answer.log_ids == (answer.data["Meta"]["Logs"][0]["ID"],)


def test_bytes_arrive_as_they_were(api: FakeRedoxApi, connect: Connect) -> None:
    """Bytes are sent unchanged, with the source in the header."""
    body = json.dumps(message(), indent=2).encode()
    connect(source="source-1").send(body)

    (sent,) = api.received("/endpoint")
    assert sent.body == body
    assert sent.headers["redox-source-id"] == "source-1"


def test_a_query_is_answered(api: FakeRedoxApi, connect: Connect) -> None:
    """A query returns the response message, from /endpoint or, as a setting, from /query."""
    api.respond("PatientSearch.Query", lambda asked: {"Patient": asked["Patient"], "N": 2**80})

    for path in ("/endpoint", "/query"):
        answer = connect(query_path=path).query(query())
        assert answer.data["Meta"]["EventType"] == "Response"
        assert answer.data["Patient"] == query()["Patient"]
        assert answer.data["N"] == 2**80
        assert api.requests[-1].path == path


def test_a_query_without_an_answer_is_an_error(api: FakeRedoxApi, connect: Connect) -> None:
    """A 200 without a message is BadAnswer."""
    for body in (b"", b"[]", b"null"):
        api.fail("/endpoint", SimulatedApiAnswer(body=body))
        with pytest.raises(BadAnswer, match="contains no message"):
            connect().query(query())


def test_meta_errors_raise(api: FakeRedoxApi, connect: Connect) -> None:
    """A message that is answered 200 with Meta.Errors is not taken as accepted."""
    api.refuse_next({"ID": 4098, "Text": "Canary has no MRN", "Type": "transmission", "Module": "Send"})
    with pytest.raises(Rejected, match="4098/transmission/Send") as caught:
        connect().send(message())

    assert caught.value.log_ids
    assert "Canary" not in str(caught.value)
    assert api.processed == []


@pytest.mark.parametrize(
    "act",
    [
        lambda client: client.send({"Patient": {}}),
        lambda client: client.send(message(Destinations=[])),
        lambda client: client.query(query(Destinations=[{"ID": "a"}, {"ID": "b"}])),
        lambda client: client.send({**message(), "Filler": "x" * 2_000}),
        lambda client: client.upload(b"x" * 3_001),
        lambda client: client.send({**message(), "N": float("nan")}),
    ],
    ids=["no meta", "no destination", "two destinations", "too large", "upload too large", "nan"],
)
def test_invalid_requests_are_not_sent(api: FakeRedoxApi, connect: Connect, act: Any) -> None:
    """An invalid or too large request is refused before anything is sent, even a token request."""
    client = connect(limits=Limits(request_bytes=2_000, upload_bytes=3_000))
    with pytest.raises(Unsendable):
        act(client)

    assert api.requests == []
    assert client.send(message()).status == 200


def test_several_keys_want_a_source(api: FakeRedoxApi, connect: Connect) -> None:
    """Where several keys exist, a message without a source is not sent; Redox would reject it."""
    api.register_oauth("client-2", {"keys": []})

    with pytest.raises(Rejected) as caught:
        connect().send(message())
    assert caught.value.details[0].text == "Meta.Source.ID is required"
    with pytest.raises(Unsendable, match="has no source"):
        connect(several_keys=True).send(message())
    with pytest.raises(Unsendable, match="the request has no source"):
        connect(several_keys=True).upload(b"x")
    assert connect(several_keys=True, source="s").send(message()).status == 200
    assert connect(several_keys=True).send(message(Source={"ID": "s"})).status == 200


def test_network_onramp(api: FakeRedoxApi, connect: Connect) -> None:
    """Network-onramp extensions are sent with an OAuth key, and refused with a legacy key."""
    connect().query(query(), onramp=ONRAMP)
    assert api.processed[0]["Meta"]["Extensions"].keys() == {
        "sender-organization-id",
        "user-id",
        "user-role",
        "purpose-of-use",
    }

    legacy = connect(LEGACY)
    with pytest.raises(Unsendable, match="legacy"):
        legacy.send(message(), onramp=ONRAMP)
    with pytest.raises(Unsendable, match="legacy"):
        legacy.query(query(), onramp=ONRAMP)
    assert len(api.processed) == 1


@pytest.mark.parametrize("fault", [ApiFault.UNAVAILABLE, ApiFault.RATE_LIMITED], ids=lambda fault: fault.name)
def test_unprocessed_requests_are_retried(api: FakeRedoxApi, connect: Connect, fault: ApiFault) -> None:
    """A 503 or 429 is retried with the same bytes, and the call succeeds."""
    api.fail("/endpoint", fault, times=2)

    assert connect().send(message()).status == 200
    tried = api.received("/endpoint")
    assert len(tried) == 3
    assert len({one.body for one in tried}) == 1
    assert len(api.processed) == 1


@pytest.mark.parametrize(
    ("fault", "kind"), [(ApiFault.UNAVAILABLE, RedoxUnavailable), (ApiFault.RATE_LIMITED, RateLimited)]
)
def test_attempts_are_bounded(api: FakeRedoxApi, connect: Connect, fault: ApiFault, kind: type[OutboundError]) -> None:
    """After the last attempt the error is raised, and is marked as retryable."""
    api.fail("/endpoint", fault, times=9)

    with pytest.raises(kind) as caught:
        connect().send(message())
    assert caught.value.retryable
    assert len(api.received("/endpoint")) == 3


def test_no_pause_outlasts_the_deadline(api: FakeRedoxApi, connect: Connect) -> None:
    """If the next pause does not fit into the total, the error is raised at once."""
    api.fail("/endpoint", ApiFault.UNAVAILABLE, times=9)

    with pytest.raises(RedoxUnavailable):
        connect(limits=Limits(total=30.0, pause=100.0)).send(message())
    assert len(api.received("/endpoint")) == 1


@pytest.mark.parametrize(
    "fault",
    [
        ApiFault.SERVER_ERROR,
        ApiFault.BAD_GATEWAY,
        ApiFault.GATEWAY_TIMEOUT,
        ApiFault.DROP_BEFORE,
        ApiFault.DROP_AFTER,
        ApiFault.CUT_SHORT,
        ApiFault.GARBAGE,
    ],
    ids=lambda fault: fault.name,
)
def test_possibly_processed_requests_are_not_retried(api: FakeRedoxApi, connect: Connect, fault: ApiFault) -> None:
    """If Redox may have processed the request, a direct call does not retry; its caller may."""
    api.fail("/endpoint", fault)

    with pytest.raises(OutboundError) as caught:
        connect().send(message())
    assert (caught.value.retryable, caught.value.not_processed) == (True, False)
    assert len(api.received("/endpoint")) == 1


def test_repeat_after_a_lost_answer(api: FakeRedoxApi, connect: Connect) -> None:
    """After a lost answer, a repeat by the caller has the same bytes."""
    client, body = connect(), json.dumps(message(Logs=[{"ID": "same"}])).encode()
    api.fail("/endpoint", ApiFault.DROP_AFTER)
    with pytest.raises(AnswerLost):
        client.send(body)
    assert client.send(body).status == 200

    assert [one.body for one in api.received("/endpoint")] == [body, body]
    assert api.processed == [json.loads(body)] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"query_path": "query"},
        {"upload_path": "/up?x"},
        {"query_path": "/a b"},
        {"source": ""},
        {"source": "a\r\nb"},
        {"source": "é"},
    ],
    ids=str,
)
def test_a_wrong_setting_is_found_at_once(options: dict[str, Any]) -> None:
    """A path or a source that could break a request is refused when the client is made."""
    with pytest.raises(ConfigurationError):
        RedoxClient(KEY, **options)


def test_many_threads_share_a_client(api: FakeRedoxApi, connect: Connect) -> None:
    """Each of many messages that are sent at the same time arrives once, with one token for all."""
    client = connect(limits=QUICK)
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda n: client.send({**message(), "Number": n}).status, range(200)))

    assert statuses == [200] * 200
    assert sorted(one["Number"] for one in api.processed) == list(range(200))
    assert len(api.received("/v2/auth/token")) == 1


def test_a_script_needs_no_database() -> None:
    """Importing the client loads neither SQLAlchemy nor Flask, nor the slow models of the redox package."""
    program = (
        "import sys; from receiver.outbound import RedoxClient; "
        "print(sorted({'sqlalchemy', 'flask', 'procrastinate', 'psycopg', 'redox'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"
