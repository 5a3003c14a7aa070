"""A plugin of responders and handlers that do what can go wrong."""

from __future__ import annotations

import os
import time
from typing import Any

from receiver.handlers import Context, Message, handler, responder


@responder("PatientSearch.Query", name="found", timeout=20)
def found(message: Message, context: Context) -> dict[str, Any]:
    return {"Meta": {"DataModel": "PatientSearch", "EventType": "Response"}, "Patient": {"Asked": message.uuid}}


@responder("Results.Query", name="raises", timeout=20)
def raises(message: Message, context: Context) -> dict[str, Any]:
    raise ValueError("CANARY")


@responder("Order.Query", name="endless", timeout=1)
def endless(message: Message, context: Context) -> dict[str, Any]:
    while True:
        pass


@responder("Media.Query", name="ends", timeout=20)
def ends(message: Message, context: Context) -> dict[str, Any]:
    os._exit(0)


@responder("Notes.Query", name="slow", timeout=20)
def slow(message: Message, context: Context) -> dict[str, Any]:
    time.sleep(4)
    return {"Meta": {"DataModel": "PatientSearch", "EventType": "LocationQueryResponse"}}


@handler("PatientAdmin.*", name="at-once", acknowledge="after_handling", max_attempts=5, timeout=20)
def at_once(message: Message, context: Context) -> None:
    if context.attempt == 1 and message.facility == "fails once":
        raise ValueError("CANARY")
