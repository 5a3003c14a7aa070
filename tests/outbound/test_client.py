"""Facts about RedoxClient, against the fake API: what it sends, what it refuses, and what it tries again."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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
    """What Redox takes is the message with its source, as JSON, and the answer gives the id of its log."""
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
    """An answer of 200 that is no message is none."""
    for body in (b"", b"[]", b"null"):
        api.fail("/endpoint", SimulatedApiAnswer(body=body))
        with pytest.raises(BadAnswer, match="contains no message"):
            connect().query(query())


def test_meta_errors_raise(api: FakeRedoxApi, connect: Connect) -> None:
    """A message that is refused with 200 and Meta.Errors is not taken for accepted."""
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
def test_what_redox_would_refuse_is_not_sent(api: FakeRedoxApi, connect: Connect, act: Any) -> None:
    """Refused before sending means just that: not even a token was asked for."""
    client = connect(limits=Limits(request_bytes=2_000, upload_bytes=3_000))
    with pytest.raises(Unsendable):
        act(client)

    assert api.requests == []
    assert client.send(message()).status == 200


def test_several_keys_want_a_source(api: FakeRedoxApi, connect: Connect) -> None:
    """Where several keys exist a message without a source is not sent, and Redox would not have taken it."""
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


def test_the_onramp_goes_along_and_takes_no_legacy_key(api: FakeRedoxApi, connect: Connect) -> None:
    """Network-onramp extensions reach Redox under an OAuth key, and are refused under a legacy one."""
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
def test_what_was_not_processed_is_tried_again(api: FakeRedoxApi, connect: Connect, fault: ApiFault) -> None:
    """A 503 or 429 is tried again with the same bytes, and the call succeeds."""
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
    """After the last attempt the error stands, and says that trying later may help."""
    api.fail("/endpoint", fault, times=9)

    with pytest.raises(kind) as caught:
        connect().send(message())
    assert caught.value.retryable
    assert len(api.received("/endpoint")) == 3


def test_no_pause_outlasts_the_deadline(api: FakeRedoxApi, connect: Connect) -> None:
    """When the next pause would not fit into the total, the error stands at once."""
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
def test_what_may_have_been_processed_is_not(api: FakeRedoxApi, connect: Connect, fault: ApiFault) -> None:
    """Where Redox may have acted, a direct call does not send again; it says that its caller may."""
    api.fail("/endpoint", fault)

    with pytest.raises(OutboundError) as caught:
        connect().send(message())
    assert (caught.value.retryable, caught.value.not_processed) == (True, False)
    assert len(api.received("/endpoint")) == 1


def test_a_lost_answer_sent_again_is_the_same_message_twice(api: FakeRedoxApi, connect: Connect) -> None:
    """At least once: when the answer is lost after Redox took the message, the repeat carries the very same bytes."""
    client, body = connect(), json.dumps(message(Logs=[{"ID": "same"}])).encode()
    api.fail("/endpoint", ApiFault.DROP_AFTER)
    with pytest.raises(AnswerLost):
        client.send(body)
    assert client.send(body).status == 200

    assert [one.body for one in api.received("/endpoint")] == [body, body]
    assert api.processed == [json.loads(body)] * 2


def test_a_file_is_uploaded(api: FakeRedoxApi, connect: Connect, tmp_path: Path) -> None:
    """A path, bytes or an open file, read to any point, arrive whole under the field `file`; the URI names them."""
    path = tmp_path / "scan.pdf"
    path.write_bytes(os.urandom(300_000))
    client = connect(source="source-1")
    with path.open("rb") as opened:
        opened.read(7)
        uris = [
            client.upload(path),
            client.upload(str(path)),
            client.upload(path.read_bytes(), filename="scan.pdf"),
            client.upload(opened, media_type="application/pdf"),
            client.upload(io.BytesIO(path.read_bytes())),
        ]

    assert len({*uris}) == 5
    assert all(api.uploads[uri] == path.read_bytes() for uri in uris)
    sent = api.received("/uploads")
    assert all(b'name="file"; filename="scan.pdf"\r\nContent-Type: application/pdf' in one.body for one in sent[:4])
    assert {one.headers["redox-source-id"] for one in sent} == {"source-1"}


def test_an_upload_survives_a_refused_token_and_a_503(api: FakeRedoxApi, connect: Connect, tmp_path: Path) -> None:
    """The file is read from its beginning for every attempt."""
    path = tmp_path / "scan.pdf"
    path.write_bytes(os.urandom(300_000))
    client = connect()
    client.send(message())
    api.refuse_tokens()
    api.fail("/uploads", ApiFault.UNAVAILABLE)

    assert api.uploads[client.upload(path)] == path.read_bytes()
    assert len(api.received("/uploads")) == 3


def test_what_can_not_be_measured_is_not_uploaded(api: FakeRedoxApi, connect: Connect, tmp_path: Path) -> None:
    """A text file and a pipe are refused with what to do instead; a file that is missing is Python's own error."""
    client: Any = connect()
    with pytest.raises(Unsendable, match="binary mode"):
        client.upload(io.StringIO("text"))
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe, os.fdopen(writing, "wb"), pytest.raises(Unsendable, match="into bytes"):
        client.upload(pipe)
    with pytest.raises(FileNotFoundError):
        client.upload(tmp_path / "missing")
    assert api.requests == []


@pytest.mark.parametrize("options", [{"filename": "\ud800.pdf"}, {"media_type": "a/b\r\nX: y"}], ids=["name", "type"])
def test_a_file_with_an_impossible_name(api: FakeRedoxApi, connect: Connect, options: dict[str, str]) -> None:
    """A name or media type that no header can hold is refused before anything is sent."""
    with pytest.raises(Unsendable, match="name or media type"):
        connect().upload(b"x", **options)
    assert api.requests == []


@pytest.mark.parametrize("change", [b"and more", b""], ids=["grows", "shrinks"])
def test_a_file_that_changes_while_it_is_read(api: FakeRedoxApi, connect: Connect, change: bytes) -> None:
    """A file that grows or shrinks under our hands is not passed off as a whole one."""

    class Changing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(size) + change if change else b""

    client = connect()
    with pytest.raises(Unsendable, match="size of the file changed"):
        client.upload(Changing(b"synthetic"))
    assert api.uploads == {}
    assert client.upload(b"synthetic") in api.uploads


def test_a_file_that_comes_slowly(api: FakeRedoxApi, connect: Connect) -> None:
    """The total holds for the reading of the file too: what comes after it is not sent any more."""

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            threading.Event().wait(0.6)
            return super().read(size)

    client = connect(limits=Limits(total=0.5))
    client.send(message())
    with pytest.raises(AnswerLost):
        client.upload(Slow(b"synthetic"))
    assert api.uploads == {}


def test_an_upload_without_a_uri_is_an_error(api: FakeRedoxApi, connect: Connect) -> None:
    """An answer to an upload that names no URI is none."""
    for body in ({}, {"URI": 7}, {"URI": ""}, b"[]"):
        api.fail("/uploads", SimulatedApiAnswer(body=body))
        with pytest.raises(BadAnswer, match="contains no URI"):
            connect().upload(b"x")


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
    """Each of many messages sent at once arrives once, and one token serves them all."""
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
