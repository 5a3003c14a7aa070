"""The FHIR API of the simulated Redox: read, search and messages."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from receiver.simulator.api_exchange import Received, SimulatedApiAnswer


def answer(request: Received, path: str, resources: Mapping[tuple[str, str], dict[str, Any]]) -> SimulatedApiAnswer:
    """Return the response to a FHIR request. `resources`: by (type, id)."""
    parts = path.removeprefix("/fhir/R4/").split("/")
    if len(parts) != 4 or parts[1] not in ("Development", "Staging", "Production"):
        return _outcome(404, "not-found")
    resource, rest = parts[2], parts[3]
    if request.method == "GET":
        one = resources.get((resource, rest))
        return _outcome(404, "not-found") if one is None else _fhir_answer(one)
    media = request.headers.get("content-type", "").partition(";")[0]
    if rest == "_search":
        if media != "application/x-www-form-urlencoded":
            return _outcome(415, "not-supported")
        found = [{"resource": one} for (kind, _), one in resources.items() if kind == resource]
        return _fhir_answer({"resourceType": "Bundle", "type": "searchset", "total": len(found), "entry": found})
    if not rest.startswith("$"):
        return _outcome(404, "not-found")
    if media != "application/fhir+json":
        return _outcome(415, "not-supported")
    if not isinstance(request.json_object().get("resourceType"), str):
        return _outcome(400, "structure")
    reply = {"resourceType": "MessageHeader", "response": {"code": "ok", "identifier": str(uuid.uuid4())}}
    return _fhir_answer({"resourceType": "Bundle", "type": "message", "entry": [{"resource": reply}]})


def _outcome(status: int, code: str) -> SimulatedApiAnswer:
    issue = {"severity": "error", "code": code, "diagnostics": "the fake Redox API rejects this request"}
    return _fhir_answer({"resourceType": "OperationOutcome", "issue": [issue]}, status)


def _fhir_answer(resource: dict[str, Any], status: int = 200) -> SimulatedApiAnswer:
    return SimulatedApiAnswer(status=status, body=resource, headers={"Content-Type": "application/fhir+json"})
