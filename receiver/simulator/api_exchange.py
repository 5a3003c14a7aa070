"""Requests to the simulated Redox API and its responses, as values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """A received request. `headers` has lower-case names."""

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    def json_object(self) -> dict[str, Any]:
        """The body as a JSON object; an empty one if it is anything else."""
        try:
            body = self.json()
        except ValueError:
            return {}
        return body if isinstance(body, dict) else {}

    def form(self) -> dict[str, str]:
        """The body as a form. For a repeated field, the first value."""
        return {name: values[0] for name, values in parse_qs(self.body.decode()).items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedApiAnswer:
    """A response: a status, a body (a dict becomes JSON) and additional headers."""

    status: int = 200
    body: dict[str, Any] | str | bytes = field(default=b"", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)
