"""The pipeline: bodies that can be parsed, and bodies that are quarantined."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from threading import Thread, stack_size

import pytest

from receiver.pipeline import Admitted
from tests.protocol.made_up import BODY, SOURCE, inbound
from tests.support.verdicts import META, TOKEN, described, receive


def message(members: bytes) -> bytes:
    """A message with these members in addition to Meta."""
    return b"{%b,%b}" % (META, members)


def nested(levels: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    """A message of this depth."""
    return message(b'"x":' + opening * levels + b"0" + closing * levels)


# Bodies, and the reason why they are quarantined.
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "HTML": (b"<!doctype html><title>502</title>", "not_json"),
    "truncated JSON": (BODY[:-5], "not_json"),
    "trailing data": (BODY + b"x", "not_json"),
    "two documents": (BODY + BODY, "not_json"),
    "100,000 nested arrays": (nested(100_000), "too_deep"),
    "100,000 arrays that never close": (b'{"Meta":' + b"[" * 100_000, "too_deep"),
    "5,000 nested arrays": (nested(5_000), "too_deep"),
    "5,000 nested objects": (nested(5_000, b'{"a":', b"}"), "too_deep"),
    "5,000 levels behind an escape": (message(b'"a":"\\n","x":' + b"[" * 5_000 + b"]" * 5_000 + b',"b":1'), "too_deep"),
    "5,000 levels in Meta": (b'{"Meta":{"x":' + b"[" * 5_000 + b"]" * 5_000 + b"}}", "too_deep"),
    "NaN": (message(b'"x":NaN'), "not_json"),
    "Infinity": (message(b'"x":[-Infinity]'), "not_json"),
    "duplicate keys at the top": (message(b'"x":1,"x":2'), "top_duplicate_key"),
    "Meta twice": (b"{%b,%b}" % (META, META), "top_duplicate_key"),
    "Meta twice, once escaped": (b'{%b,"M\\u0065ta":{}}' % META, "top_duplicate_key"),
    "duplicate keys in Meta": (BODY.replace(b'"Source"', b'"Source":{"ID":"x"},"Source"'), "meta_duplicate_key"),
    "bad UTF-8": (message(b'"x":"\xff"'), "not_utf8"),
    "bad UTF-8 in a key": (message(b'"\xc3(":1'), "not_utf8"),
    "UTF-8 of a surrogate": (message(b'"x":"\xed\xa0\x80"'), "not_utf8"),
    "UTF-16": (BODY.decode().encode("utf-16"), "not_utf8"),
    "UTF-16 without a mark": ("{}".encode("utf-16-be"), "not_json"),
    "a byte order mark": (b"\xef\xbb\xbf" + BODY, "not_json"),
    "a lone surrogate": (message(b'"x":"\\ud800"'), "not_json"),
    "a lone surrogate in a key": (message(b'"\\udc00":[]'), "not_json"),
    "a raw line feed in a string": (message(b'"x":"\n"'), "not_json"),
    "a raw NUL": (message(b'"x":"\0"'), "not_json"),
    "a list": (b"[%b]" % BODY, "top_not_object"),
    "a string": (b'"Meta"', "top_not_object"),
    "null": (b"null", "top_not_object"),
    "no Meta": (b'{"Patient":{}}', "no_meta"),
    "Meta a list": (b'{"Meta":[{"DataModel":"A","EventType":"B"}]}', "meta_not_object"),
    "DataModel a number": (BODY.replace(b'"PatientAdmin"', b"7"), "kind_malformed"),
    "DataModel of 10 KB": (BODY.replace(b"PatientAdmin", b"x" * 10_240), "kind_malformed"),
    "EventType null": (BODY.replace(b'"Arrival"', b"null"), "kind_missing"),
    "gzip": (gzip.compress(BODY), "not_utf8"),
    "a form": (b"&".join(b"k%d=v" % n for n in range(100_000)), "not_json"),
    "XML": (b'<?xml version="1.0"?><ClinicalDocument/>', "not_json"),
    "a FHIR resource": (b'{"resourceType":"Patient"}', "fhir_not_message"),
}
READABLE: dict[str, bytes] = {
    "200 levels": nested(199),
    "an integer of 30 digits": message(b'"x":' + b"1" * 30),
    "an integer of 5,000 digits": message(b'"x":' + b"1" * 5_000),
    "1e400": message(b'"x":[1e400,-1E999]'),
    "duplicate keys deeper down": message(b'"x":{"a":1,"a":2}'),
    "NUL in values, keys and ids": BODY.replace(b'"Source"', b'"FacilityCode":"a\\u0000b","Source"')
    .replace(b"Note", b"No\\u0000te")
    .replace(b"\xc3\xa9", b"\\u0000"),
    "an unknown DataModel": BODY.replace(b"PatientAdmin", b"NeverHeardOf"),
    "a URL to a metadata service": message(b'"x":"http://169.254.169.254/latest/meta-data/"'),
    "injections": message(
        json.dumps(
            {"x": ["' OR 1=1 --", "{{7*7}}", "${jndi:ldap://x}", "=cmd|' /C calc'!A0", "<script>", "\n\x1b[31m\u202e"]}
        ).encode()[1:-1]
    ),
    "a year of five digits": BODY.replace(b'"Source"', b'"EventDateTime":"99999-01-01T00:00:00Z","Source"'),
    "the year 0": BODY.replace(b'"Source"', b'"EventDateTime":"0000-01-01T00:00:00Z","Source"'),
    "space all around": b"\r\n\t " + BODY + b" \n",
}


class TestBody:
    """Bad inputs: the body, with the right token."""

    @pytest.mark.parametrize(("body", "reason"), UNREADABLE.values(), ids=UNREADABLE)
    def test_unreadable(self, body: bytes, reason: str) -> None:
        """An authentic body that cannot be parsed is quarantined with its reason and its exact bytes."""
        request = inbound(body, TOKEN)
        verdict = receive(request)
        assert isinstance(verdict, Admitted)
        assert (verdict.quarantine, verdict.message, verdict.query) == (reason, None, None)
        assert verdict.inbound.body is body

    @pytest.mark.parametrize("body", READABLE.values(), ids=READABLE)
    def test_readable(self, body: bytes) -> None:
        """An unusual message is admitted with its exact bytes."""
        verdict = receive(inbound(body, TOKEN))
        assert isinstance(verdict, Admitted)
        assert verdict.quarantine is None
        assert verdict.message is not None
        assert verdict.message.raw is body

    def test_ten_thousand_kinds(self) -> None:
        """10,000 event types are 10,000 kinds, each a short name."""
        kinds = set()
        for n in range(10_000):
            verdict = receive(inbound(BODY.replace(b"Arrival", b"Arrival%d" % n), TOKEN))
            assert isinstance(verdict, Admitted)
            assert verdict.message is not None
            kinds.add(verdict.message.kind)
        assert len(kinds) == 10_000
        assert max(map(len, kinds)) < 202

    @pytest.mark.parametrize(
        ("make", "bound"),
        [
            (lambda: message(b'"x":"' + b"A" * 40_000_000 + b'"'), 1),
            (lambda: message(b'"x":{' + b",".join(b'"k%d":%d' % (n, n) for n in range(1_000_000)) + b"}"), 4),
            (lambda: message(b",".join(b'"k%d":%d' % (n, n) for n in range(200_000))), 4),
            (
                lambda: (
                    b'{"Meta":{"DataModel":"A","EventType":"B",%b,"Source":{"ID":"%b"}}}'
                    % (b",".join(b'"k%d":%d' % (n, n) for n in range(200_000)), SOURCE.encode())
                ),
                4,
            ),
            *(
                (
                    lambda text=text: text.replace(b"~", b"{}" + b",{}" * 1_000_000).replace(
                        b"SOURCE", SOURCE.encode()
                    ),
                    4,
                )
                for text in (
                    (
                        b'{"Meta":{"DataModel":"A","EventType":"B","Source":{"ID":"SOURCE","x":[~]},'
                        b'"Logs":[{"ID":"1","x":[~]},~]}}'
                    ),
                    (
                        b'{"Meta":{"DataModel":"A","EventType":"B","Source":{"ID":"SOURCE"},"Test":false,'
                        b'"FacilityCode":[~]}}'
                    ),
                    (
                        b'{"resourceType":"Bundle","type":"message","entry":['
                        b'{"resource":{"resourceType":"MessageHeader","eventUri":"a/B",'
                        b'"source":{"endpoint":"SOURCE"}}},~]}'
                    ),
                    (
                        b'{"resourceType":"Bundle","type":"message","entry":['
                        b'{"x":[~],"resource":{"eventUri":"a/B","x":[~],"resourceType":"MessageHeader",'
                        b'"source":{"x":[~],"endpoint":"SOURCE"},"eventCoding":[~]}}]}'
                    ),
                )
            ),
        ],
        ids=[
            "one string of 40 MB",
            "a million keys",
            "200,000 keys at the top",
            "200,000 keys in Meta",
            "lists in Meta",
            "a list for a name",
            "entries",
            "lists in a MessageHeader",
        ],
    )
    def test_memory(self, make: Callable[[], bytes], bound: float) -> None:
        """40 MB in one string, a million keys, and lists of millions are admitted; judging takes a few times the body's
        memory at most."""
        body = make()
        tracemalloc.start()
        verdict = receive(inbound(body, TOKEN))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert described(verdict) == "admitted"
        assert peak < bound * len(body)

    def test_a_million_keys_at_the_top(self) -> None:
        """A million keys of the outermost object are admitted too, though each is checked."""
        body = message(b",".join(b'"k%d":%d' % (n, n) for n in range(1_000_000)))
        assert described(receive(inbound(body, TOKEN))) == "admitted"

    def test_in_a_thread_of_a_small_stack(self) -> None:
        """Depth takes no stack: in a thread with 256 KB each body gets the same verdict as in the main thread."""
        verdicts: list[str] = []
        bodies = [
            nested(100_000),
            nested(5_000, b'{"a":', b"}"),
            nested(199),
            b'{"challenge":' + b"[" * 4_000 + b"]" * 4_000,
        ]

        def work() -> None:
            verdicts.extend(described(receive(inbound(body, headers))) for body in bodies for headers in (TOKEN, {}))

        before = stack_size(256 * 1024)
        try:
            thread = Thread(target=work)
            thread.start()
        finally:
            stack_size(before)
        thread.join()
        missing = "refused 401 credential_missing"
        assert verdicts == [
            "quarantined too_deep",
            missing,
            "quarantined too_deep",
            missing,
            "admitted",
            missing,
            "quarantined too_deep",
            missing,
        ]
