"""The message as a plugin sees it.

May not read a database: it is made of what was read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import cached_property
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Final

import msgspec

from receiver.errors import NotFound

if TYPE_CHECKING:
    from redox.abstract_base import EventTypeAbstractModel

# Python refuses to read a longer integer (its guard against quadratic time).
_LONGEST_INT: Final = 4300


@dataclass(frozen=True, kw_only=True)  # not slotted: what is parsed is kept beside the fields
class Message:
    """A message from Redox. Ids and times but `received_at` are the sender's claims; None where it made none.

    `kind`: such as "PatientAdmin.Arrival" or "FHIR.PatientAdminCreated". `uuid`: ours, for this message alone. `raw`:
    exactly the bytes that came. `test`: the sender's mark that no real patient is meant. Times are aware, in UTC.
    """

    uuid: str
    kind: str
    source_id: str | None
    log_id: str | None
    message_id: str | None
    transmission_id: str | None
    facility: str | None
    event_time: datetime | None
    received_at: datetime
    test: bool
    raw: bytes = field(repr=False)

    @cached_property
    def data(self) -> Any:
        """The parsed body. Integers of any size are exact; a number that a float cannot hold is a Decimal."""
        try:
            return msgspec.json.decode(self.raw)
        except msgspec.ValidationError:  # such a number
            return json.loads(self.raw, parse_float=_float, parse_int=_int)

    def model(self) -> EventTypeAbstractModel:
        """The body as the typed class of the `redox` package; members that the class does not know are left out.

        Importing that class takes a second or two, once a process. Raises NotFound where there is no class for the
        kind (FHIR, Claim.Payment, Claim.Submission, the natural language queries, kinds that Redox does not document),
        and pydantic's ValidationError where the body does not obey the published schema, as real feeds do.
        """
        cls = _model_class(self.kind)
        from redox.abstract_base import lenient_ingest

        with lenient_ingest():
            return cls.model_validate(self.data)


def _model_class(kind: str) -> type[EventTypeAbstractModel]:
    model, _, event = kind.partition(".")
    package, name = model.lower(), "".join(part[:1].upper() + part[1:] for part in event.split("-"))
    # A kind is the sender's word: nothing but a package of models that is there is imported, and of them only that one.
    found = None
    if package in _packages():
        found = getattr(import_module(f"redox.{package}"), name, None)
    if isinstance(found, type):
        cls: type[EventTypeAbstractModel] = found
        return cls
    if model == "FHIR":
        raise NotFound(f"{kind}: the `redox` package has no class for FHIR: use message.data, or fhir.resources")
    raise NotFound(f"{kind}: the `redox` package has no class for it: use message.data")


def _packages() -> frozenset[str]:
    """One for each Data Model; `redox` itself imports none of them."""
    return frozenset(module.name for module in iter_modules(import_module("redox").__path__) if module.ispkg) - {
        "generic"
    }


def _float(text: str) -> float | Decimal:
    number = float(text)
    return number if math.isfinite(number) else Decimal(text)


def _int(text: str) -> int | Decimal:
    return int(text) if len(text) <= _LONGEST_INT else Decimal(text)
