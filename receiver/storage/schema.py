"""The table schema. Names of tables and columns are a contract: operators query them, audits cite them.

Alembic compares this with the migrations. Must not hold queries.

`messages`, `payloads`, `deliveries`, `delivery_attempts` and `audit_events` are partitioned by time (see
receiver.storage.queue.partitions). PostgreSQL wants the partition's column in every unique index: `received_at` is the
message's in all of a message's rows, so that a number is unique all the same.

Times are timestamptz; digests and MACs are bytea of 32 bytes. `mac` columns are HMAC-SHA256
(receiver.storage.evidence.macs) over the columns listed there, under the key `mac_key`.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

from receiver.states import DeliveryState, LaneState, MessageState, OutboxState

metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id() -> Column[int]:
    return Column("id", BigInteger, Identity(always=True), primary_key=True)


def _time(name: str, *, nullable: bool = True, **options: Any) -> Column[Any]:
    return Column(name, DateTime(timezone=True), nullable=nullable, **options)


def _received(**options: Any) -> Column[Any]:
    # When the message was received: by this its rows are partitioned.
    return _time("received_at", nullable=False, **options)


def _created() -> Column[Any]:
    return _time("created_at", nullable=False, server_default=func.now())


def _text(name: str, *, nullable: bool = False, **options: Any) -> Column[Any]:
    return Column(name, Text, nullable=nullable, **options)


def _flag(name: str, *, default: bool) -> Column[Any]:
    return Column(name, Boolean, nullable=False, server_default=text("true" if default else "false"))


def _mac() -> tuple[Column[Any], Column[Any]]:
    return Column("mac", LargeBinary, nullable=False), _text("mac_key")


def _held_keys() -> Column[Any]:
    # The ids of the keys that the process holds: `keys activate` waits until every live process holds the key.
    return Column("keys", ARRAY(Text), nullable=False, server_default=text("'{}'::text[]"))


def _one_of(column: str, *values: str) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


def _destination(**options: Any) -> Column[Any]:
    return Column("destination_id", BigInteger, ForeignKey("destinations.id"), nullable=False, **options)


def _recorded_at() -> Column[Any]:
    # No foreign keys on tables of the accept path: each would cost a lookup and a shared row lock for each message, to
    # check what the registry has just established. Destinations are never deleted.
    return Column("destination_id", BigInteger, nullable=False)


# --- the registry: destinations, credentials, sources, handlers. Every change increments registry_version and is
# audited.

registry_version = Table(
    "registry_version",
    metadata,
    Column("one", Boolean, primary_key=True, server_default=text("true")),
    Column("version", BigInteger, nullable=False),
    CheckConstraint("one", name="one"),
)

destinations = Table(
    "destinations",
    metadata,
    _id(),
    _text("name", unique=True),
    _text("environment"),
    _flag("enabled", default=True),
    Column("require", ARRAY(Text), nullable=False),  # alternatives: each a list of kinds joined by +
    _text("sources_policy"),
    _text("on_unknown_source"),
    _text("test_messages"),
    _text("reply_with", nullable=True),
    Column("expect_every", Integer),  # seconds; not under the MAC: it admits nothing
    _created(),
    *_mac(),
    _one_of("environment", "development", "staging", "production"),
    _one_of("sources_policy", "registered", "any"),
    _one_of("on_unknown_source", "reject", "quarantine"),
    _one_of("test_messages", "accept", "quarantine", "reject"),
)

credentials = Table(
    "credentials",
    metadata,
    _id(),
    _destination(index=True),
    _text("kind"),
    _text("label", nullable=True),
    Column("digest", LargeBinary),  # token: HMAC under the index key
    Column("secret", LargeBinary),  # sealed, if it must be recoverable
    _text("secret_key", nullable=True),  # id of the key that sealed it, or that keyed the digest
    Column("settings", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    _created(),
    _time("expires_at"),
    _time("revoked_at"),
    _time("last_used_at"),  # not under the MAC: written at most once a minute
    *_mac(),
)

key_sets = Table(
    "key_sets",
    metadata,  # public keys of token issuers for Redox, as last fetched, for every host
    _id(),
    _text("url", unique=True),
    Column("document", LargeBinary, nullable=False),
    _created(),
    _time("changed_at", nullable=False),
    _time("fetched_at", nullable=False),  # these three are not under the MAC
    _time("tried_at", nullable=False),
    _text("failure", nullable=True),  # why the last fetch failed; null when it succeeded
    *_mac(),
)

seen_once = Table(
    "seen_once",
    metadata,  # nonces: assertions, and the signatures of queries
    Column("key", LargeBinary, primary_key=True),
    _time("until", nullable=False, index=True),  # after this time it is expired anyway
)

sources = Table(
    "sources",
    metadata,
    _id(),
    _destination(),
    _text("source_id", nullable=True),  # null: messages that name no source
    _text("name", nullable=True),
    _flag("enabled", default=True),
    _created(),
    *_mac(),
    Index("uq_sources_destination_id_source_id", "destination_id", text("coalesce(source_id, '')"), unique=True),
)

subscriptions = Table(
    "subscriptions",
    metadata,
    _id(),
    _destination(),
    _text("handler"),
    _text("role"),
    Column("patterns", ARRAY(Text), nullable=False),
    _text("ordering"),
    _text("patient_key", nullable=True),
    _text("acknowledge"),
    _text("on_failure"),
    Column("max_attempts", Integer, nullable=False),
    Column("timeout", REAL, nullable=False),
    _flag("enabled", default=True),
    _time("paused_at"),  # not under the MAC: workers change it
    _text("pause_reason", nullable=True),
    _created(),
    *_mac(),
    UniqueConstraint("destination_id", "handler"),
    _one_of("role", "handler", "responder"),
    _one_of("ordering", "source", "patient", "none"),
    _one_of("acknowledge", "after_commit", "after_handling"),
    _one_of("on_failure", "dead", "hold"),
)

signing_keys = Table(
    "signing_keys",
    metadata,  # the keys that sign our client assertions; the public halves are served
    _id(),
    _text("kid", unique=True),  # RFC 7638: the thumbprint of the public half
    _text("algorithm"),
    Column("public_jwk", JSONB, nullable=False),
    _text("state"),  # published: visible to Redox, but does not sign (not yet, or no longer)
    Column("secret", LargeBinary),  # sealed: the private key, PKCS #8
    _text("secret_key", nullable=True),
    _created(),
    _time("activated_at"),
    _time("retired_at"),
    *_mac(),
    _one_of("algorithm", "RS384", "ES384"),
    _one_of("state", "published", "active", "retired"),
    Index("uq_signing_keys_active", "state", unique=True, postgresql_where=text("state = 'active'")),
)

api_keys = Table(
    "api_keys",
    metadata,  # the keys with which the receiver calls Redox
    _id(),
    _text("name", unique=True),
    _text("environment"),
    _text("kind"),
    _text("base_url"),
    _text("source_id", nullable=True),
    _text("client_id", nullable=True),
    _text("kid", nullable=True),  # of its own private key; null: the active signing key
    _text("scope", nullable=True),
    _text("query_path"),
    Column("secret", LargeBinary),  # sealed: its own private key, or a legacy key with its secret
    _text("secret_key", nullable=True),
    _created(),
    *_mac(),
    _one_of("environment", "development", "staging", "production"),
    _one_of("kind", "oauth", "legacy"),
)

keys = Table(
    "keys",
    metadata,  # fingerprints only; the keys are in the keyring file
    Column("id", Text, primary_key=True),
    _text("purpose"),
    _text("fingerprint"),
    _created(),
    _time("activated_at"),  # null: pending; no process writes with it, and a host may still lack it
    _time("retired_at"),  # nothing that is stored needs it any longer; a host may lack it again
)

# --- received messages

messages = Table(
    "messages",
    metadata,
    _id(),
    Column("uuid", UUID, nullable=False),
    _recorded_at(),
    Column("credential_ids", ARRAY(BigInteger), nullable=False),
    _text("source_id", nullable=True),
    _text("kind", nullable=True),  # null: unreadable
    Column("query", Boolean, nullable=False),
    Column("test", Boolean, nullable=False),
    _text("log_id", nullable=True),
    _text("attempt_id", nullable=True),
    _text("message_id", nullable=True),  # Redox's Meta.Message.ID
    _text("transmission_id", nullable=True),
    _text("facility", nullable=True),
    _time("event_time"),
    _received(primary_key=True),
    _text("peer"),
    Column("digest", LargeBinary, nullable=False),  # of the body: HMAC under the index key, as all digests of content
    Column("size", Integer, nullable=False),
    _text("content_type", nullable=True),
    _text("state"),
    _text("quarantine_reason", nullable=True),
    Column("id_conflict", Boolean, nullable=False),
    _time("patients_indexed_at"),  # when the worker filled patient_digests
    *_mac(),
    UniqueConstraint("uuid", "received_at"),
    _one_of("state", *MessageState),
    Index(
        "ix_messages_quarantined",
        "destination_id",
        "id",
        postgresql_where=text(f"state = '{MessageState.QUARANTINED}'"),
    ),
    Index("ix_messages_patients_unindexed", "id", postgresql_where=text("patients_indexed_at IS NULL")),
    Index("ix_messages_received_at", "received_at", postgresql_using="brin"),
    postgresql_partition_by="RANGE (received_at)",
)

message_keys = Table(
    "message_keys",
    metadata,
    Column("destination_id", BigInteger, primary_key=True),
    Column("key", LargeBinary, primary_key=True),
    Column("outside", LargeBinary, primary_key=True),  # digest of the bytes outside Meta, kind, source, test
    Column("message_id", BigInteger, nullable=False),
    _received(),
    _time("expires_at"),
    Index("ix_message_keys_expires_at", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
)

payloads = Table(
    "payloads",
    metadata,  # purged by partition
    Column("message_id", BigInteger, primary_key=True, autoincrement=False),
    _received(primary_key=True),
    _text("payload_key"),
    Column("sealed", LargeBinary, nullable=False),
    postgresql_partition_by="RANGE (received_at)",
)

patient_digests = Table(
    "patient_digests",
    metadata,  # of (source or assigning authority, type, identifier)
    Column("digest", LargeBinary, primary_key=True),
    Column("message_id", BigInteger, primary_key=True, autoincrement=False),
    _received(),
)

patient_index_attempts = Table(
    "patient_index_attempts",
    metadata,  # begun and not ended; committed before the message is read
    Column("message_id", BigInteger, primary_key=True, autoincrement=False),
    Column("attempts", Integer, nullable=False, server_default=text("1")),
    _time("attempted_at", nullable=False, server_default=func.now()),
)

# --- deliveries to handlers

deliveries = Table(
    "deliveries",
    metadata,  # in one lane, ids give the order of running
    _id(),
    Column("message_id", BigInteger, nullable=False),
    _received(primary_key=True),
    _recorded_at(),
    _text("handler"),
    Column("generation", Integer, nullable=False, server_default=text("1")),
    _text("lane"),
    Column("inline", Boolean, nullable=False),  # acknowledge="after_handling": run in the request, not by a worker
    _text("state", server_default=text(f"'{DeliveryState.PENDING}'")),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    _time("ready_at"),  # not before; null: at once
    _time("deferred_since"),  # since when the handler raises RetryLater
    _text("error_class", nullable=True),
    Column("error_frames", ARRAY(Text)),  # module:line:function, outermost first
    Column("error_sealed", LargeBinary),  # the text, which may quote a patient
    _text("error_key", nullable=True),
    _text("error_shown", nullable=True),  # the text, if the receiver itself wrote it: settings, commands
    Column("epoch", BigInteger),  # of the lease that last ran it
    _created(),
    _time("started_at"),  # of the current attempt, or one lost with its process
    _time("finished_at"),
    UniqueConstraint("message_id", "handler", "generation", "received_at"),
    _one_of("state", *DeliveryState),
    Index("ix_deliveries_pending", "lane", "id", postgresql_where=text(f"state = '{DeliveryState.PENDING}'")),
    # Unordered lanes: finds what may run now without reading what may not.
    Index(
        "ix_deliveries_unordered",
        "lane",
        "ready_at",
        "id",
        postgresql_where=text(f"state = '{DeliveryState.PENDING}' AND lane ~ '^[^/]+/[^/]+/any:'"),
    ),
    Index("ix_deliveries_dead", "handler", "finished_at", postgresql_where=text(f"state = '{DeliveryState.DEAD}'")),
    Index("ix_deliveries_dead_by_id", "id", postgresql_where=text(f"state = '{DeliveryState.DEAD}'")),
    postgresql_partition_by="RANGE (received_at)",
)

delivery_attempts = Table(
    "delivery_attempts",
    metadata,
    _id(),
    Column("delivery_id", BigInteger, nullable=False, index=True),
    _received(primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    _text("worker"),
    _time("started_at", nullable=False),
    _time("ended_at", nullable=False, server_default=func.now()),
    _text("outcome"),  # succeeded, failed, timed_out, crashed, retry_later, gave_up
    _text("error_class", nullable=True),
    Column("error_frames", ARRAY(Text)),
    postgresql_partition_by="RANGE (received_at)",
)

lanes = Table(
    "lanes",
    metadata,  # created when a lane is first claimed; no row means ready
    Column("lane", Text, primary_key=True),
    _text("handler"),
    _recorded_at(),
    _text("state", server_default=text(f"'{LaneState.READY}'")),
    _time("ready_at"),  # waiting: not before
    _text("owner", nullable=True),
    Column("epoch", BigInteger, nullable=False, server_default=text("0")),
    _time("lease_until"),
    _one_of("state", *LaneState),
    Index("ix_lanes_leased", "lease_until", postgresql_where=text("owner IS NOT NULL")),
)

workers = Table(
    "workers",
    metadata,  # live workers: for `status`, `check` and taking over leases
    Column("name", Text, primary_key=True),
    _text("host"),
    Column("pid", Integer, nullable=False),
    Column("handlers", ARRAY(Text), nullable=False),
    _time("started_at", nullable=False, server_default=func.now()),
    _time("seen_at", nullable=False, server_default=func.now()),
    _held_keys(),
)

handler_problems = Table(
    "handler_problems",
    metadata,  # reported by worker and receiver processes: see receiver.storage.queue.handler_problems
    Column("process", Text, primary_key=True),
    Column("handler", Text, primary_key=True),  # '': no responder is bound to the query
    Column("destination", Text, primary_key=True),  # '': all destinations
    Column("kind", Text, primary_key=True),
    _text("host"),
    _text("error_class", nullable=True),
    _text("place", nullable=True),  # module:line or file:line
    _text("detail", nullable=True),  # a sentence that the receiver wrote
    Column("count", BigInteger, nullable=False),
    Column("message_uuid", UUID),  # the last message with this problem
    _time("first_at", nullable=False, server_default=func.now()),
    _time("last_at", nullable=False),
    _time("reported_at", nullable=False, server_default=func.now()),
)

listeners = Table(
    "listeners",
    metadata,  # receiver processes and their addresses: for `status` and `check`
    Column("name", Text, primary_key=True),
    _text("role"),
    _text("host"),
    Column("pid", Integer, nullable=False),
    _text("address"),
    _time("started_at", nullable=False, server_default=func.now()),
    _time("seen_at", nullable=False, server_default=func.now()),
    _time("stopped_at"),  # time of an orderly stop; null: running, or killed
    _held_keys(),
    _one_of("role", "receiver", "admin"),
)

feed_activity = Table(
    "feed_activity",
    metadata,  # five-minute slots in which messages came: how long a feed is usually silent
    Column("destination_id", BigInteger, primary_key=True, autoincrement=False),
    _time("slot", primary_key=True, nullable=False),
)

# --- requests to Redox

outbound_requests = Table(
    "outbound_requests",
    metadata,  # in one lane, ids give the order of sending
    _id(),
    Column("uuid", UUID, nullable=False, unique=True),
    _text("api_key"),
    _text("lane", nullable=True),  # null: a call made at once, recorded here
    _text("call"),
    _text("kind"),  # PatientAdmin.NewPatient, FHIR.Patient/$patient-update
    Column("message_uuid", UUID, index=True),  # the message that it answers
    Column("destination_id", BigInteger),  # the destination of that message
    _text("state"),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("unanswered", Integer, nullable=False, server_default=text("0")),  # attempts on which Redox may have acted
    _time("ready_at"),  # not before; null: at once
    Column("status", Integer),  # HTTP status of the last answer
    _text("error_class", nullable=True),
    Column("log_ids", ARRAY(Text), nullable=False, server_default=text("'{}'::text[]")),  # Redox's log ids
    Column("request", LargeBinary),  # sealed; null: purged
    _text("request_key", nullable=True),
    Column("answer", LargeBinary),  # sealed: the answer of Redox, or the errors of a refusal
    _text("answer_key", nullable=True),
    Column("epoch", BigInteger),  # of the lease that last sent it
    _text("created_by"),
    _created(),
    _time("started_at"),  # of the current attempt, or one lost with its process
    _time("finished_at"),
    _one_of("call", "send", "query", "fhir", "upload"),
    _one_of("state", *OutboxState),
    Index("ix_outbound_requests_pending", "lane", "id", postgresql_where=text(f"state = '{OutboxState.PENDING}'")),
    Index(
        "ix_outbound_requests_unsent",
        "state",
        "id",
        postgresql_where=text(f"state IN ('{OutboxState.DEAD}', '{OutboxState.HELD}')"),
    ),
)

# --- evidence. The audit and its seals are append-only: triggers refuse UPDATE, DELETE and TRUNCATE.

audit_events = Table(
    "audit_events",
    metadata,
    _id(),
    Column("writer", UUID, nullable=False),  # one process; it numbers and chains its rows
    Column("n", BigInteger, nullable=False),
    _time("at", nullable=False, primary_key=True),
    _text("action"),  # subject.verb, such as message.accept
    _text("outcome"),
    _text("reason", nullable=True),  # a fixed word
    _text("actor"),  # redox, worker:<name>, or user@host uid=<n> …
    _text("peer", nullable=True),
    _text("destination", nullable=True),
    Column("message_uuid", UUID),
    _text("subject", nullable=True),  # another row: table:id
    Column("count", Integer, nullable=False, server_default=text("1")),  # more than one: a summed-up flood
    _text("detail", nullable=True),  # JSON with fixed keys, without patient data
    Column("note", LargeBinary),  # sealed: the reason, in an operator's words
    _text("note_key", nullable=True),
    Column("mac", LargeBinary, nullable=False),  # over this row and the previous MAC, or that of `follows`
    _text("mac_key"),
    Column("follows", BigInteger),  # of a writer's first row: the id of the newest row that it saw
    UniqueConstraint("writer", "n", "at"),
    Index("ix_audit_events_at", "at", postgresql_using="brin"),
    Index("ix_audit_events_message_uuid", "message_uuid"),
    Index("ix_audit_events_destination_id", "destination", "id"),
    Index("ix_audit_events_outcomes", "id", postgresql_where=text("action = 'delivery.outcomes'")),
    Index("ix_audit_events_refused", "destination", "id", postgresql_where=text("action = 'message.refuse'")),
    postgresql_partition_by="RANGE (at)",
)

audit_seals = Table(
    "audit_seals",
    metadata,  # see receiver.storage.evidence.seals
    Column("n", BigInteger, primary_key=True, autoincrement=False),
    _time("at", nullable=False),
    Column("size", BigInteger, nullable=False),  # leaves of the Merkle tree
    Column("root", LargeBinary, nullable=False),
    _text("body"),  # JSON: what the checkpoint holds the digest of
    _text("checkpoint"),  # signed note (c2sp.org/tlog-checkpoint)
    _text("seal_key"),
)

audit_seal_writers = Table(
    "audit_seal_writers",
    metadata,  # the rows that a seal added, of each writer without a gap: where a row is in the tree
    Column("writer", UUID, primary_key=True),
    Column("last_n", BigInteger, primary_key=True, autoincrement=False),
    Column("first_n", BigInteger, nullable=False),
    Column("first_leaf", BigInteger, nullable=False),
    Column("seal", BigInteger, nullable=False, index=True),
)

audit_tiles = Table(
    "audit_tiles",
    metadata,  # the tree's hashes (c2sp.org/tlog-tiles); the last tile of a level grows
    Column("level", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("hashes", LargeBinary, nullable=False),
)
