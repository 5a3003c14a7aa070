"""The Message that a handler receives.

Must not read a database: it is made of data that was already read.
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

# Digits. Python refuses to parse longer integers, as a guard against quadratic time.
_LONGEST_INT: Final = 4300


@dataclass(frozen=True, kw_only=True)  # no slots: cached_property stores the parsed body in the instance
class Message:
    """A message from Redox. Ids and times except `received_at` are claims of the sender, or None.

    `kind`: for example "PatientAdmin.Arrival" or "FHIR.PatientAdminCreated". `uuid`: the receiver's id of this message.
    `raw`: the exact bytes received. `test`: the sender marks the message as not about a real patient. Times are aware,
    in UTC.
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
        """The parsed body. Integers of any size are exact. A number that a float cannot represent is a Decimal."""
        try:
            return msgspec.json.decode(self.raw)
        except msgspec.ValidationError:  # a number that a float cannot represent
            return json.loads(self.raw, parse_float=_float, parse_int=_int)

    def model(self) -> EventTypeAbstractModel:
        """Return the body as the typed class of the `redox` package. Fields that the class does not know are ignored.

        The first import of a class takes a second or two per process. Raises NotFound if there is no class for the kind
        (FHIR, Claim.Payment, Claim.Submission, the natural language queries, undocumented kinds), and pydantic's
        ValidationError if the body does not conform to the published schema, which happens in real feeds.
        """
        cls = _model_class(self.kind)
        from redox.abstract_base import lenient_ingest

        with lenient_ingest():
            return cls.model_validate(self.data)


def _model_class(kind: str) -> type[EventTypeAbstractModel]:
    model, _, event = kind.partition(".")
    package, name = model.lower(), "".join(part[:1].upper() + part[1:] for part in event.split("-"))
    # The kind is set by the sender. Import only a package of models that exists, and only the one for this kind.
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
    """Return the packages, one for each Data Model. `redox` itself imports none of them."""
    return frozenset(module.name for module in iter_modules(import_module("redox").__path__) if module.ispkg) - {
        "generic"
    }


def _float(text: str) -> float | Decimal:
    number = float(text)
    return number if math.isfinite(number) else Decimal(text)


def _int(text: str) -> int | Decimal:
    return int(text) if len(text) <= _LONGEST_INT else Decimal(text)
