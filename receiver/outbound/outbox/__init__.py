"""Requests to Redox with a database behind them: kept until they are sent (`Outbox`), or on record (`RecordedClient`).

    with engine.begin() as connection:
        connection.execute(…)
        outbox.send({"Meta": {…}, …}, connection=connection)

What is in the outbox leaves after that transaction has committed, in order for each destination at Redox, and at least
once: where an answer is lost, the same bytes are sent again. A handler has `context.outbox`, which keeps what it is
given in the transaction of `context.connection`, and `context.redox`, whose calls are on record.
"""

from receiver.outbound.outbox.clients import Clients
from receiver.outbound.outbox.keeping import Outbox
from receiver.outbound.outbox.recording import Caller, OutboundRecorder, RecordedClient

__all__ = ["Caller", "Clients", "OutboundRecorder", "Outbox", "RecordedClient"]
