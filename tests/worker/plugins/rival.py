"""A responder for a query that another one answers already."""

from __future__ import annotations

from typing import Any

from receiver.handlers import Context, Message, responder


@responder("PatientSearch.Query", name="rival")
def rival(message: Message, context: Context) -> dict[str, Any]:
    """Never asked."""
    return {}
