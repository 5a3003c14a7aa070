"""A receiver as it is usually written: Flask and SQLAlchemy's ORM, a session and a commit a request, one table."""

from __future__ import annotations

import hmac
import os
from datetime import UTC, datetime

from flask import Flask, abort, request
from sqlalchemy import Text, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

TOKEN = os.environ["BENCH_TOKEN"].encode()

app = Flask(__name__, static_folder=None)
engine = create_engine(os.environ["BENCH_DATABASE"], pool_size=16, max_overflow=0)


class Base(DeclarativeBase):
    """The tables."""


class Received(Base):
    """A message, as it came; the columns are what people search by."""

    __tablename__ = "inbox"

    id: Mapped[int] = mapped_column(primary_key=True)
    log_id: Mapped[str | None] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(Text)
    received_at: Mapped[datetime]
    body: Mapped[str] = mapped_column(Text)


@app.post("/redox")
def receive() -> tuple[str, int]:
    """Check the token, parse, keep."""
    if not hmac.compare_digest(request.headers.get("verification-token", "").encode(), TOKEN):
        abort(401)
    meta = request.get_json()["Meta"]
    with Session(engine) as session:
        session.add(
            Received(
                log_id=meta["Logs"][0]["ID"],
                kind=f"{meta['DataModel']}.{meta['EventType']}",
                received_at=datetime.now(UTC),
                body=request.get_data(as_text=True),
            )
        )
        session.commit()
    return "", 200
