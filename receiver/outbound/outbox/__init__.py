"""The outbox and recorded calls: requests to Redox that are stored until sent (`Outbox`), or recorded
(`RecordedClient`).

    with engine.begin() as connection:
        connection.execute(…)
        outbox.send({"Meta": {…}, …}, connection=connection)

A worker sends a request of the outbox after its transaction has committed, in order for each destination at Redox, and
at least once: if a response is lost, the same bytes are sent again. A handler has `context.outbox`, which stores
requests in the transaction of `context.connection`, and `context.redox`, whose calls are recorded.
"""

from receiver.outbound.outbox.clients import Clients
from receiver.outbound.outbox.keeping import Outbox
from receiver.outbound.outbox.recording import Caller, OutboundRecorder, RecordedClient

__all__ = ["Caller", "Clients", "OutboundRecorder", "Outbox", "RecordedClient"]
