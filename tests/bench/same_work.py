"""A receiver with our guarantees in the usual style of Flask and SQLAlchemy's ORM: one session for each request.

Before its 200 it checks the token and the source, finds a duplicate by its log id, and commits in one transaction: the
message, its compressed and sealed payload, a delivery, and a chained audit row. Each thread has an audit chain of its
own, so no request waits for the commit of another.
"""

from __future__ import annotations

import hmac
import json
import os
import threading
from datetime import UTC, datetime
from hashlib import sha256
from uuid import UUID, uuid4

import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from flask import Flask, abort, request
from sqlalchemy import ForeignKey, create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

TOKEN = os.environ["BENCH_TOKEN"].encode()
PAYLOAD_KEY, MAC_KEY = bytes.fromhex(os.environ["BENCH_PAYLOAD_KEY"]), bytes.fromhex(os.environ["BENCH_MAC_KEY"])

app = Flask(__name__, static_folder=None)
engine = create_engine(os.environ["BENCH_DATABASE"], pool_size=16, max_overflow=0)
cipher = AESGCM(PAYLOAD_KEY)


class Base(DeclarativeBase):
    """The tables: same_work.sql."""


class Source(Base):
    """A sending system."""

    __tablename__ = "sources"

    source_id: Mapped[str] = mapped_column(primary_key=True)
    enabled: Mapped[bool]


class Payload(Base):
    """The exact bytes of a message: 12 bytes nonce, then compressed and sealed."""

    __tablename__ = "payloads"

    message_id: Mapped[int] = mapped_column(ForeignKey("messages.id"), primary_key=True)
    sealed: Mapped[bytes]


class Delivery(Base):
    """A message for a handler."""

    __tablename__ = "deliveries"

    id: Mapped[int] = mapped_column(primary_key=True)
    message_id: Mapped[int] = mapped_column(ForeignKey("messages.id"))
    handler: Mapped[str]
    lane: Mapped[str]
    state: Mapped[str] = mapped_column(default="pending")


class Message(Base):
    """The columns by which people search."""

    __tablename__ = "messages"

    id: Mapped[int] = mapped_column(primary_key=True)
    uuid: Mapped[UUID]
    log_id: Mapped[str]
    source_id: Mapped[str]
    kind: Mapped[str]
    received_at: Mapped[datetime]
    sha256: Mapped[bytes]
    size: Mapped[int]
    payload: Mapped[Payload] = relationship()
    deliveries: Mapped[list[Delivery]] = relationship()


class AuditEvent(Base):
    """An audit row. `mac` is an HMAC over the row and the previous `mac`."""

    __tablename__ = "audit_events"

    writer: Mapped[UUID] = mapped_column(primary_key=True)
    n: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    action: Mapped[str]
    outcome: Mapped[str]
    message_uuid: Mapped[UUID]
    mac: Mapped[bytes]


class Chain(threading.local):
    """The audit chain of one thread, and its compressor."""

    def __init__(self) -> None:
        self.writer, self.n, self.mac = uuid4(), 0, b""
        self.compressor = zstandard.ZstdCompressor(level=1)

    def event(self, outcome: str, message_uuid: UUID, at: datetime) -> AuditEvent:
        """Return the next row. Call `committed` after its commit."""
        values = [
            str(self.writer),
            self.n + 1,
            int(at.timestamp() * 1000),
            "message.receive",
            outcome,
            str(message_uuid),
        ]
        mac = hmac.digest(MAC_KEY, self.mac + json.dumps(values, separators=(",", ":")).encode(), "sha256")
        return AuditEvent(
            writer=self.writer,
            n=self.n + 1,
            at=at,
            action="message.receive",
            outcome=outcome,
            message_uuid=message_uuid,
            mac=mac,
        )

    def committed(self, n: int, mac: bytes) -> None:
        """Continue the chain after that row."""
        self.n, self.mac = n, mac


chain = Chain()


def seal(body: bytes, uuid: UUID) -> bytes:
    """Compress and seal, bound to the message."""
    nonce = os.urandom(12)
    return nonce + cipher.encrypt(nonce, chain.compressor.compress(body), uuid.bytes)


@app.post("/redox")
def receive() -> tuple[str, int]:
    """Check, record, answer."""
    if not hmac.compare_digest(request.headers.get("verification-token", "").encode(), TOKEN):
        abort(401)
    body, meta, now = request.get_data(), request.get_json()["Meta"], datetime.now(UTC)
    with Session(engine) as session:
        source = session.get(Source, meta["Source"]["ID"])
        if source is None or not source.enabled:
            abort(403)
        uuid = uuid4()
        event = chain.event("accepted", uuid, now)
        session.add_all(
            [
                event,
                Message(
                    uuid=uuid,
                    log_id=meta["Logs"][0]["ID"],
                    source_id=source.source_id,
                    received_at=now,
                    kind=f"{meta['DataModel']}.{meta['EventType']}",
                    sha256=sha256(body).digest(),
                    size=len(body),
                    payload=Payload(sealed=seal(body, uuid)),
                    deliveries=[Delivery(handler="idle", lane=f"idle/{source.source_id}")],
                ),
            ]
        )
        n, mac = event.n, event.mac
        try:
            session.commit()
        except IntegrityError:
            session.rollback()
            n, mac = record_duplicate(session, meta["Logs"][0]["ID"], now)
    chain.committed(n, mac)
    return "", 200


def record_duplicate(session: Session, log_id: str, now: datetime) -> tuple[int, bytes]:
    """Record the audit row of a duplicate. Returns its number and MAC."""
    first = session.query(Message).filter_by(log_id=log_id).one()
    event = chain.event("duplicate", first.uuid, now)
    session.add(event)
    n, mac = event.n, event.mac
    session.commit()
    return n, mac
