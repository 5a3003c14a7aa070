"""The bodies that are sent: valid messages of about 2, 4 and 50 KB, 1 MB, and Redox's largest size."""

from __future__ import annotations

import base64
import hmac
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

from receiver.samples import sample
from tests.support.machine import SOURCE

# The placeholder for the id, of the same length.
HOLE: Final = "@" * 36


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """A message without its id (`Logs[].ID`)."""

    name: str
    template: bytes = field(repr=False)

    def with_id(self, identifier: str) -> bytes:
        """Return the message with that id."""
        return self.template.replace(HOLE.encode(), identifier.encode(), 1)


class Ids:
    """Ids like Redox's, each used once in this run: `prefix` and a running number."""

    def __init__(self) -> None:
        self.prefix: Final = str(uuid4())[:24]

    def __iter__(self) -> Iterator[str]:
        number = 0
        while True:
            number += 1
            yield f"{self.prefix}{number:012x}"


def signatures(body: Body, secret: bytes, ids: Ids, count: int) -> Iterator[str]:
    """Return the signature (HMAC-SHA-256, base64) of the body with each of the first ids."""
    before, _, after = body.template.partition(HOLE.encode())
    begun = hmac.new(secret, before, "sha256")
    for _, identifier in zip(range(count), ids, strict=False):
        mac = begun.copy()
        mac.update(identifier.encode() + after)
        yield base64.b64encode(mac.digest()).decode()


def of_size(name: str) -> Body:
    """Return the body with that name (SIZES). Raises KeyError."""
    return Body(name=name, template=SIZES[name]())


def media(size: int) -> bytes:
    """Return a document of `size` bytes: mostly base64 that does not compress."""
    message = _sample("Media.New")
    message["Media"]["FileContents"] = ""
    room = size - len(sample.encode(message))
    message["Media"]["FileContents"] = base64.b64encode(random.Random(0).randbytes(room * 3 // 4 - 2)).decode()
    return sample.encode(message)


def entries(size: int) -> bytes:
    """Return a FHIR notification of `size` bytes: mostly empty entries."""
    header = {
        "resource": {
            "resourceType": "MessageHeader",
            "eventUri": "https://example.org/PatientAdminCreated",
            "source": {"endpoint": SOURCE},
        }
    }
    before, after = sample.encode(
        {"resourceType": "Bundle", "id": HOLE, "type": "message", "entry": [header, "~"]}
    ).split(b'"~"')
    return before + b"{}," * ((size - len(before) - len(after)) // 3) + b"{}" + after


def _results(size: int) -> bytes:
    """Return a laboratory report of at least `size` bytes, with as many orders as that takes."""
    message = _sample("Results.New")
    seed = 0
    while len(sample.encode(message)) < size:
        seed += 1
        message["Orders"] += _sample("Results.New", seed)["Orders"]
    return sample.encode(message)


def _sample(kind: str, seed: int = 0) -> dict[str, Any]:
    return sample.sample(kind, seed=seed, source_id=SOURCE, log_id=HOLE)


SIZES: Final = {
    "2 KB": lambda: sample.encode(_sample("Flowsheet.New")),
    "4 KB": lambda: sample.encode(_sample("Results.New")),
    "50 KB": lambda: _results(50_000),
    "1 MB": lambda: media(1_000_000),
}
