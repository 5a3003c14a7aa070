"""Parsing of bodies: the Data Model envelope and the FHIR message Bundle."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import pytest

from receiver.errors import Unreadable
from receiver.protocol.message import QUERIES, ParsedMessage, response_event
from receiver.protocol.reading import read
from receiver.protocol.sources import normalize_source
from receiver.samples.kinds import DATA_MODELS, FHIR_CODED_EVENTS, FHIR_EVENTS, KINDS
from tests.protocol.made_up import SOURCE

_META = {"DataModel": "PatientAdmin", "EventType": "Arrival"}


def _body(meta: dict[str, Any], **extra: Any) -> bytes:
    return json.dumps({"Meta": {**_META, **meta}, **extra}).encode()


def _fhir(header: dict[str, Any], *others: dict[str, Any]) -> bytes:
    entries = [{"resource": {"resourceType": "MessageHeader", **header}}, *others]
    return json.dumps({"resourceType": "Bundle", "type": "message", "entry": entries}).encode()


def _reason(body: bytes) -> str:
    with pytest.raises(Unreadable) as refused:
        read(body)
    return refused.value.reason


class TestKinds:
    """The kinds of messages."""

    def test_all_of_them(self) -> None:
        """Redox can send 24 models with 111 event types."""
        assert (len(DATA_MODELS), len(KINDS)) == (24, 111)

    @pytest.mark.parametrize(("model", "event"), KINDS)
    def test_every_name_with_and_without_spaces(self, model: str, event: str) -> None:
        """A model's name with or without spaces is the same kind; it is a query if Redox waits for an answer."""
        spaced, compact = (
            read(_body({"DataModel": name, "EventType": event})) for name in (model, model.replace(" ", ""))
        )
        assert spaced.kind == compact.kind == f"{model.replace(' ', '')}.{event}"
        assert spaced.query is compact.query is (spaced.kind in QUERIES)
        assert spaced.fhir is False

    def test_queries_are_kinds_and_have_answers(self) -> None:
        """Every query and its answer are event types of Redox; the answer to SSO has the query's name."""
        compact = {(model.replace(" ", ""), event) for model, event in KINDS}
        for kind in QUERIES:
            model, event = kind.split(".")
            assert (model, event) in compact
            assert (model, response_event(model, event)) in compact

    def test_kinds_with_an_answer_are_queries(self) -> None:
        """A kind with an answer among the event types is a query, and three with answers of other names."""
        compact = {(model.replace(" ", ""), event) for model, event in KINDS}
        answered = {f"{model}.{event}" for model, event in compact if (model, f"{event}Response") in compact}
        others = {"PatientSearch.Query", "ClinicalDecisions.Request", "SSO.Sign-on"}
        assert QUERIES.keys() == answered | others

    @pytest.mark.parametrize("name", ["PatientAdminTwo", "X", "A_b-9", "a" * 100])
    def test_unknown_kinds_are_read(self, name: str) -> None:
        """An unknown model or event is a message like any other."""
        assert read(_body({"DataModel": name, "EventType": name})).kind == f"{name}.{name}"

    @pytest.mark.parametrize(
        ("meta", "reason"),
        [
            ({"DataModel": None}, "kind_missing"),
            ({"EventType": None}, "kind_missing"),
            ({"DataModel": 5}, "kind_malformed"),
            ({"DataModel": ""}, "kind_malformed"),
            ({"DataModel": " "}, "kind_malformed"),
            ({"DataModel": "x" * 10_000}, "kind_malformed"),
            ({"EventType": ["New"]}, "kind_malformed"),
            ({"EventType": "New\n"}, "kind_malformed"),
            ({"EventType": "a.b"}, "kind_malformed"),
            ({"DataModel": "*"}, "kind_malformed"),
            ({"DataModel": "é"}, "kind_malformed"),
            ({"EventType": "\u202eweN"}, "kind_malformed"),
            ({"EventType": "a" * 101}, "kind_malformed"),
        ],
    )
    def test_names_that_are_not_valid_in_labels_and_patterns(self, meta: dict[str, Any], reason: str) -> None:
        """A name of another shape is refused: it would be in metric labels, log lines and patterns."""
        assert _reason(_body(meta)) == reason

    @pytest.mark.parametrize("name", ["DataModel", "EventType"])
    def test_both_names_are_needed(self, name: str) -> None:
        """A message without a model or an event cannot be dispatched."""
        assert _reason(json.dumps({"Meta": {key: "New" for key in _META if key != name}}).encode()) == "kind_missing"


class TestDataModel:
    """The members of Meta."""

    def test_everything_that_is_read(self) -> None:
        """Each member of a complete Meta is parsed."""
        body = _body(
            {
                "EventDateTime": "2026-01-01T01:00:00.000+01:00",
                "Test": True,
                "Source": {"ID": SOURCE.upper(), "Name": "An EHR"},
                "Destinations": [{"ID": "x", "Name": "y"}],
                "Logs": [
                    {"ID": "d9f5d293-7110-461e-a875-3beb089e79f3", "AttemptID": "925d1617-2fe0-468c-a14c-f8c04b572c54"},
                    {"ID": "another"},
                ],
                "Message": {"ID": 5565},
                "Transmission": {"ID": 12414},
                "FacilityCode": "FAC",
            },
            Patient={"Notes": ["[{"]},
        )
        message = read(body)
        assert (message.kind, message.fhir, message.query, message.test) == ("PatientAdmin.Arrival", False, False, True)
        assert (message.source_id, message.source_name) == (SOURCE, "An EHR")
        assert message.log_id == "d9f5d293-7110-461e-a875-3beb089e79f3"
        assert message.attempt_id == "925d1617-2fe0-468c-a14c-f8c04b572c54"
        assert (message.message_id, message.transmission_id, message.facility) == ("5565", "12414", "FAC")
        assert message.event_time == datetime(2026, 1, 1, tzinfo=UTC)
        assert message.raw is body

    def test_the_smallest_meta(self) -> None:
        """A Meta with only the two names is a message without source, ids, time and test flag."""
        message = read(_body({}))
        assert (
            message.source_id,
            message.source_name,
            message.log_id,
            message.attempt_id,
            message.message_id,
            message.transmission_id,
            message.facility,
            message.event_time,
        ) == (None,) * 8
        assert message.test is False

    @pytest.mark.parametrize("value", [None, 5, 1.5, True, "x", [], {}, [[]], [5], [None], {"ID": []}, {"ID": True}])
    def test_members_of_any_type(self, value: Any) -> None:
        """A member of another type than Redox documents counts as missing, and is not refused."""
        for name in ("Source", "Message", "Transmission", "Logs"):
            message = read(_body({name: value}))
            assert (message.source_id, message.message_id, message.transmission_id, message.log_id) == (None,) * 4

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("x", "x"),
            (7, "7"),
            (123456789012345678901234567890, "123456789012345678901234567890"),
            ("a\0b\0", "ab"),
            ("\0", None),
            ("", None),
            (None, None),
            (1.5, None),
            (True, None),
            ({}, None),
            ("y" * 500, "y" * 200),
            ("new\nline \x1b[31m \u202e", "new\nline \x1b[31m \u202e"),
        ],
    )
    def test_ids_fit_their_columns(self, value: Any, expected: str | None) -> None:
        """Ids are text without NUL and of at most 200 characters, numbers in the digits they came in."""
        message = read(
            _body(
                {
                    "Message": {"ID": value},
                    "Transmission": {"ID": value},
                    "FacilityCode": value,
                    "Logs": [{"ID": value, "AttemptID": value}],
                    "Source": {"ID": value, "Name": value},
                }
            )
        )
        assert {
            message.message_id,
            message.transmission_id,
            message.facility,
            message.log_id,
            message.attempt_id,
            message.source_id,
            message.source_name,
        } == {expected}

    @pytest.mark.parametrize("number", ["1e400", "-1E+999", "9" * 5_000])
    def test_numbers_that_python_cannot_represent(self, number: str) -> None:
        """In Meta they count as missing; elsewhere they are not parsed."""
        body = f'{{"Meta":{{"DataModel":"A","EventType":"B","FacilityCode":{number}}},"x":[{number}]}}'
        assert read(body.encode()).facility is None

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("2026-01-01T00:00:00Z", datetime(2026, 1, 1, tzinfo=UTC)),
            ("2026-01-01T00:00:00.123Z", datetime(2026, 1, 1, 0, 0, 0, 123_000, tzinfo=UTC)),
            ("2026-01-01T00:00:00", datetime(2026, 1, 1, tzinfo=UTC)),
            ("2025-12-31T19:00:00-05:00", datetime(2026, 1, 1, tzinfo=UTC)),
            ("0000-01-01T00:00:00Z", None),
            ("99999-01-01T00:00:00Z", None),
            ("0001-01-01T00:00:00+01:00", None),
            ("9999-12-31T23:59:59-01:00", None),
            ("soon", None),
            ("", None),
            ("2026-02-30", None),
            (5, None),
            (None, None),
        ],
    )
    def test_times(self, text: Any, expected: datetime | None) -> None:
        """EventDateTime in UTC; None if it is not a time between the years 1 and 9999."""
        assert read(_body({"EventDateTime": text})).event_time == expected

    @pytest.mark.parametrize(
        "value",
        [
            "true",
            "[true]",
            '"true"',
            '"yes"',
            '"false"',
            '""',
            "1",
            "0",
            "0.0",
            "[]",
            "{}",
            "1e999",
            "9" * 5_000,
            f'"{"x" * 70_000}"',
        ],
    )
    def test_test_messages(self, value: str) -> None:
        """Every value of Meta.Test but null and false marks a test: a test must never run as live."""
        body = f'{{"Meta":{{"DataModel":"A","EventType":"B","Test": {value} }}}}'
        assert read(body.encode()).test is True
        large = f'{{"Meta":{{"DataModel":"A","EventType":"B","Test": {value} ,"x":"{"x" * 70_000}"}}}}'
        assert read(large.encode()).test is True

    @pytest.mark.parametrize("member", ["", ',"Test":null', ',"Test":false', ',"Test" : false '])
    @pytest.mark.parametrize("other", ["", ',"FacilityCode":1e999'])
    def test_live_messages(self, member: str, other: str) -> None:
        """Without Meta.Test, or with null or false, a message is live."""
        assert read(f'{{"Meta":{{"DataModel":"A","EventType":"B"{member}{other}}}}}'.encode()).test is False


class TestKeys:
    """The key of duplicates."""

    def test_the_key_of_a_log_id(self) -> None:
        """Bodies with the same log id, which may be a number, have the same key, which does not expire."""
        keys = {
            read(_body({"Logs": [{"ID": value, "AttemptID": attempt}], "Message": {"ID": attempt}})).key
            for value, attempt in (("7", 1), (7, 2))
        }
        assert len(keys) == 1
        assert read(_body({"Logs": [{"ID": "7"}]})).key_expires is False
        assert read(_body({"Logs": [{"ID": "8"}]})).key not in keys

    def test_the_key_of_a_message_id(self) -> None:
        """Without a log id, the legacy Message.ID is the key within its source, in any spelling. It does not expire."""
        one, same, other, none = (
            read(_body({"Message": {"ID": 7}, **source}))
            for source in (
                {"Source": {"ID": SOURCE}},
                {"Source": {"ID": SOURCE.upper()}},
                {"Source": {"ID": "other"}},
                {},
            )
        )
        assert one.key == same.key
        assert len({one.key, other.key, none.key}) == 3
        assert one.key_expires is False

    def test_the_key_of_the_bytes(self) -> None:
        """Without an id, only equal bytes are a duplicate, and the key expires: they may be sent again."""
        body = _body({})
        assert read(body).key == sha256(body).digest()
        assert read(body).key_expires is True
        assert read(body + b" ").key != read(body).key

    def test_keys_of_different_ids_differ(self) -> None:
        """The key of a log id never equals that of a Message.ID, for any source and ids."""
        legacy = read(_body({"Message": {"ID": "y"}, "Source": {"ID": "x"}}))
        assert read(_body({"Logs": [{"ID": "x\0y"}]})).key != legacy.key

    def test_outside_is_everything_but_the_attempt(self) -> None:
        """`outside` covers the bytes before and after Meta's value, and of Meta the kind, the source and the test flag:
        it is the same for another attempt.
        """
        before, after = b' {"Patient":{"Meta":{"a":1}}, "Meta" : ', b' , "Visit":["}"]}\n'
        metas = (
            b'{"DataModel":"A","EventType":"B"}',
            b'{ "DataModel":"A","EventType":"B","Logs":[{"ID":"}"}] }',
            b'{"DataModel":"A ","EventType":"B","Source":null,"Test":false}',
        )
        for meta in metas:
            assert read(before + meta + after).outside == sha256(before + after + b"\0A.B\0\0" + b"0").digest()
        assert read(before + metas[0] + after + b" ").outside != read(before + metas[0] + after).outside

    def test_messages_that_differ_in_kind_source_or_test(self) -> None:
        """Bodies that differ in kind, source or test flag are different messages; the spelling of the source makes no
        difference.
        """
        metas: list[dict[str, Any]] = [
            {},
            {"EventType": "Discharge"},
            {"Source": {"ID": SOURCE}},
            {"Source": {"ID": "other"}},
            {"Test": True},
        ]
        assert len({read(_body({"Logs": [{"ID": "7"}], **meta})).outside for meta in metas}) == len(metas)
        assert read(_body({"Source": {"ID": SOURCE.upper()}})).outside == read(_body(metas[2])).outside


class TestFhir:
    """FHIR notifications."""

    @pytest.mark.parametrize("event", FHIR_EVENTS)
    @pytest.mark.parametrize("endpoint", [f"urn:uuid:{SOURCE}", SOURCE, SOURCE.upper(), f"URN:UUID:{SOURCE.upper()}"])
    def test_the_current_form(self, event: str, endpoint: str) -> None:
        """The event is the end of `eventUri`, the source is `source.endpoint`, with or without `urn:uuid:`."""
        body = _fhir(
            {
                "eventUri": f"https://fhir.redoxengine.com/EventDefinition/{event}",
                "source": {"name": "An EHR", "endpoint": endpoint},
            },
            {"resource": {"resourceType": "Patient"}},
        )
        message = read(body)
        assert (message.kind, message.fhir, message.query) == (f"FHIR.{event}", True, False)
        assert (message.source_id, message.source_name) == (SOURCE, "An EHR")
        assert message.key == sha256(body).digest()
        assert message.outside == sha256(body + f"\0FHIR.{event}\0{SOURCE}\0".encode() + b"0").digest()
        assert message.key_expires is True
        assert message.test is False

    def test_the_key_of_the_ids(self) -> None:
        """The ids of Bundle and MessageHeader are the key, and do not expire. `outside` differs with other bytes."""

        def message(bundle: str, header: str, more: str = "") -> ParsedMessage:
            return read(
                (
                    f'{{"resourceType":"Bundle",{bundle}"type":"message","entry":[{{"resource":{{{header}'
                    f'"resourceType":"MessageHeader","eventUri":"a/B"}}}}{more}]}}'
                ).encode()
            )

        both = message('"id":"b",', '"id":"h",')
        others = [
            message('"id":"b",', ""),
            message("", '"id":"h",'),
            message('"id":"b2",', '"id":"h",'),
            message('"id":"b",', '"id":"h2",'),
            message('"id":"bh",', ""),
            message("", '"id":"bh",'),
        ]
        assert not any(each.key_expires for each in (both, *others))
        assert len({each.key for each in (both, *others)}) == 1 + len(others)
        changed = message('"id":"b",', '"id":"h",', ',{"resource":{}}')
        assert changed.key == both.key
        assert changed.outside != both.outside
        assert message('"id":null,', '"id":[],').key_expires is True

    @pytest.mark.parametrize("event", FHIR_CODED_EVENTS)
    def test_the_form_until_2024(self, event: str) -> None:
        """The event is the code of `eventCoding`."""
        message = read(_fhir({"eventCoding": {"system": "urn:redox:event-type", "code": event}}))
        assert message.kind == f"FHIR.{event}"
        assert message.source_id is None

    def test_unknown_events(self) -> None:
        """Event names have changed before: any is accepted, with or without a slash at the end."""
        assert read(_fhir({"eventUri": "urn:x/never-heard-of/"})).kind == "FHIR.never-heard-of"
        assert read(_fhir({"eventUri": "NeverHeardOf"})).kind == "FHIR.NeverHeardOf"

    def test_members_in_any_order(self) -> None:
        """The order of the Bundle's members is not significant."""
        assert (
            read(
                b'{"entry":[{"fullUrl":"x","resource":{"eventUri":"a/B","resourceType":"MessageHeader"}}],'
                b'"type":"message","resourceType":"Bundle"}'
            ).kind
            == "FHIR.B"
        )

    @pytest.mark.parametrize(
        "body",
        [
            b'{"resourceType":"Patient"}',
            b'{"resourceType":"Bundle"}',
            b'{"resourceType":"Bundle","type":"message"}',
            b'{"resourceType":"Bundle","type":"message","entry":[]}',
            b'{"resourceType":"Bundle","type":"message","entry":{}}',
            b'{"resourceType":"Bundle","type":"message","entry":null}',
            b'{"resourceType":"Bundle","type":"message","entry":[{}]}',
            b'{"resourceType":"Bundle","type":"collection","entry":[{"resource":{"resourceType":"MessageHeader"}}]}',
            b'{"resourceType":"Bundle","type":["message"],"entry":[{"resource":{"resourceType":"MessageHeader"}}]}',
            b'{"resourceType":"Bundle","type":"message","entry":[{"resource":{"resourceType":"Patient"}}]}',
            b'{"resourceType":5,"type":"message","entry":[{"resource":{"resourceType":"MessageHeader"}}]}',
        ],
    )
    def test_other_fhir(self, body: bytes) -> None:
        """A FHIR resource other than a message Bundle whose first entry is a MessageHeader is refused."""
        assert _reason(body) == "fhir_not_message"

    @pytest.mark.parametrize(
        ("entry", "reason"),
        [
            ("null", "entry_not_object"),
            ('{"resource":[]}', "header_not_object"),
            ('{"resource":{},"resource":{"resourceType":"MessageHeader"}}', "entry_duplicate_key"),
            ('{"resource":{"resourceType":"MessageHeader","source":{},"source":{}}}', "header_duplicate_key"),
            ('{"resource":{"resourceType":"MessageHeader"}}', "kind_missing"),
            ('{"resource":{"resourceType":"MessageHeader","eventUri":"/"}}', "kind_malformed"),
            ('{"resource":{"resourceType":"MessageHeader","eventCoding":{"code":5}}}', "kind_malformed"),
            ('{"resource":{"resourceType":"MessageHeader","eventCoding":[]}}', "kind_missing"),
        ],
    )
    def test_the_header_is_its_meta(self, entry: str, reason: str) -> None:
        """Duplicate members are refused in the MessageHeader as in Meta, two sources for example."""
        assert _reason(f'{{"resourceType":"Bundle","type":"message","entry":[{entry}]}}'.encode()) == reason


class TestUnreadable:
    """Bodies that are not messages."""

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (b"", "empty"),
            (b"\xff", "not_utf8"),
            ("{}".encode("utf-16"), "not_utf8"),
            ("{}".encode("utf-16-le"), "not_json"),
            (b'{"Meta":{"DataModel":"A","EventType":"B"},"x":"\xc3"}', "not_utf8"),
            (b"[" * 201 + b"]" * 201, "too_deep"),
            (b"{", "not_json"),
            (b"[]", "top_not_object"),
            (b"{}", "no_meta"),
            (b'{"meta":{}}', "no_meta"),
            (b'{"Meta":[]}', "meta_not_object"),
            (b'{"Meta":null}', "meta_not_object"),
            (b'{"Meta":{},"Meta":{}}', "top_duplicate_key"),
            (b'{"Meta":{"Test":1,"T\\u0065st":1}}', "meta_duplicate_key"),
            (b'{"resourceType":"Bundle","resourceType":"Bundle"}', "top_duplicate_key"),
        ],
    )
    def test_reasons(self, body: bytes, reason: str) -> None:
        """Each kind of unreadable body has the reason that quarantine shows."""
        assert _reason(body) == reason

    @pytest.mark.parametrize(
        ("meta", "query"),
        [
            ('"DataModel":"PatientSearch","EventType":"Query"', "PatientSearch.Query"),
            ('"DataModel":"Clinical Summary","EventType":"PatientQuery"', "ClinicalSummary.PatientQuery"),
            ('"DataModel":"PatientAdmin","EventType":"Arrival"', None),
            ('"DataModel":5,"EventType":"Query"', None),
            ('"DataModel":1e400,"EventType":"Query"', None),
            ('"EventType":"Query"', None),
        ],
    )
    def test_a_query_with_duplicate_keys(self, meta: str, query: str | None) -> None:
        """The error has the query's kind, because its sender waits for an answer."""
        for body in (f'{{"Meta":{{{meta}}},"x":1,"x":2}}', f'{{"Meta":{{{meta},"Test":true,"Test":true}}}}'):
            with pytest.raises(Unreadable) as refused:
                read(body.encode())
            assert refused.value.query == query

    def test_without_meta_there_is_no_query(self) -> None:
        """Duplicate keys in a body without a Meta object are not a query."""
        for body in (b'{"x":1,"x":2}', b'{"Meta":5,"x":1,"x":2}'):
            with pytest.raises(Unreadable) as refused:
                read(body)
            assert refused.value.query is None

    def test_duplicates_below_meta_are_accepted(self) -> None:
        """Elsewhere duplicate names are accepted: the exact bytes are stored, and handlers see the last one."""
        message = read(b'{"Meta":{"DataModel":"A","EventType":"B","Source":{"ID":"x","ID":"y"}},"P":{"a":1,"a":2}}')
        assert message.source_id == "y"


@pytest.mark.parametrize(
    ("identity", "normal"),
    [
        (SOURCE, SOURCE),
        (SOURCE.upper(), SOURCE),
        (f"urn:uuid:{SOURCE}", SOURCE),
        (f"Urn:Uuid:{SOURCE.upper()}", SOURCE),
        ("Epic-Prod", "Epic-Prod"),
        ("urn:uuid:Epic", "Epic"),
        ("urn:oid:1.2", "urn:oid:1.2"),
        ("", ""),
        (f"{SOURCE.upper()} ", f"{SOURCE.upper()} "),
    ],
)
def test_sources_are_compared_normalized(identity: str, normal: str) -> None:
    """A UUID's case and `urn:uuid:` are not significant; any other id is compared exactly."""
    assert normalize_source(identity) == normal


def test_an_empty_source() -> None:
    """`urn:uuid:` alone is not a source."""
    assert read(_fhir({"eventUri": "a/B", "source": {"endpoint": "urn:uuid:"}})).source_id is None
