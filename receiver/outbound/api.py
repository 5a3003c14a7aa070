"""The operations of Redox's API (messages, queries, FHIR, files), independent of how calls are sent.

Must not send anything: it prepares calls and passes them on.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from receiver.errors import ConfigurationError
from receiver.outbound.answers import Answer
from receiver.outbound.calls import Call
from receiver.outbound.errors import BadAnswer, Unsendable
from receiver.outbound.fhir import Environment, FhirDestination
from receiver.outbound.limits import Limits
from receiver.outbound.messages import SOURCE_HEADER, NetworkOnramp, Outgoing, prepare

Result = TypeVar("Result")
# File name, content, media type (None: derived from the name).
FilePart = tuple[str, bytes | BinaryIO, str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiProfile:
    """An API key's settings that requests depend on. Raises ConfigurationError.

    `several_keys` (Redox: several OAuth keys and sources in one environment): a message without a source is refused.
    """

    legacy: bool
    source: str | None
    several_keys: bool
    query_path: str
    upload_path: str

    def __post_init__(self) -> None:
        for path in (self.query_path, self.upload_path):
            if not path.startswith("/") or any(c in path for c in "?# \\"):
                raise ConfigurationError(
                    "the path is not valid: use a path on the Redox API that begins with a slash and has no query, "
                    "such as /endpoint or /query"
                )
        source = self.source
        if source is not None and (not source.isascii() or not source.isprintable() or not source.strip()):
            raise ConfigurationError(
                "the source id is not valid: use the UUID that the Redox dashboard shows for the source"
            )

    def message(self, message: Outgoing, *, query: bool, onramp: NetworkOnramp | None) -> Call:
        """Prepare a Data Model message or query. Raises Unsendable."""
        if onramp is not None and self.legacy:
            raise Unsendable(
                "network onramps do not accept a legacy API key (Redox: tokens must be valid for less than a day)"
            )
        prepared = prepare(message, query=query, source=self.source, source_required=self.several_keys, onramp=onramp)
        return Call(
            name="query" if query else "send",
            kind=prepared.kind,
            to=prepared.destinations,
            method="POST",
            path=self.query_path if query else "/endpoint",
            body=prepared.body,
            headers={"Content-Type": "application/json", **prepared.headers},
        )

    def fhir(self, slug: str, environment: Environment, carry_out: Callable[[Call], Result]) -> FhirDestination[Result]:
        """Return the FHIR R4 resources of a destination. Raises Unsendable for a legacy key."""
        if self.legacy:
            raise Unsendable("a legacy API key works with the Data Model API only: use an OAuth API key for FHIR")

        def named(call: Call) -> Result:
            return carry_out(replace(call, headers={**self._source_header(), **call.headers}))

        return FhirDestination(carry_out=named, slug=slug, environment=environment)

    def upload(self) -> Call:
        """Prepare an upload. The file is passed separately. Raises Unsendable."""
        return Call(
            name="upload", kind="upload", to=(), method="POST", path=self.upload_path, headers=self._source_header()
        )

    def _source_header(self) -> Mapping[str, str]:
        if self.source is not None:
            return {SOURCE_HEADER: self.source}
        if self.several_keys:
            raise Unsendable("several API keys exist, and the request has no source: set the client's source")
        return {}


class RedoxApi(ABC):
    """The operations. All raise the errors of receiver.outbound.errors. Subclasses implement `carry_out`, which sends a
    call.
    """

    def __init__(self, profile: ApiProfile, limits: Limits) -> None:
        self.profile: Final = profile
        self.limits: Final = limits

    @abstractmethod
    def carry_out(self, call: Call, file: FilePart | None = None) -> Answer:
        """Send a prepared call. `file`: the content of an upload."""

    def send(self, message: Outgoing, *, onramp: NetworkOnramp | None = None) -> Answer:
        """Send a Data Model message. The answer means that Redox accepted it, not that it was delivered."""
        return self.carry_out(self.profile.message(message, query=False, onramp=onramp))

    def query(self, message: Outgoing, *, onramp: NetworkOnramp | None = None) -> Answer:
        """Query one destination. `answer.data` is the response message, a dict."""
        answer = self.carry_out(self.profile.message(message, query=True, onramp=onramp))
        if not isinstance(answer.data, dict):
            raise BadAnswer("the response to the query contains no message", status=answer.status)
        return answer

    def fhir(self, destination: str, environment: Environment) -> FhirDestination[Answer]:
        """Return the FHIR R4 resources of a destination, named by its slug. Raises Unsendable for a legacy key."""
        return self.profile.fhir(destination, environment, self.carry_out)

    def upload(
        self,
        file: bytes | str | os.PathLike[str] | BinaryIO,
        *,
        filename: str | None = None,
        media_type: str | None = None,
    ) -> str:
        """Upload a file (a path, bytes, or a binary file open at its start). Returns its URI.

        The file is streamed. If it is larger than `limits.upload_bytes`, it is refused before anything is sent.
        """
        if isinstance(file, str | os.PathLike):
            with Path(file).open("rb") as opened:
                return self.upload(opened, filename=filename, media_type=media_type)
        size = len(file) if isinstance(file, bytes) else _size_of(file)
        if size > self.limits.upload_bytes:
            raise Unsendable(f"the file has {size} bytes: the maximum for an upload is {self.limits.upload_bytes}")
        name = filename or Path(str(getattr(file, "name", "upload"))).name
        answer = self.carry_out(self.profile.upload(), (name, file, media_type))
        uri = answer.data.get("URI") if isinstance(answer.data, dict) else None
        if not isinstance(uri, str) or not uri:
            raise BadAnswer("the response to the upload contains no URI", status=answer.status)
        return uri


def _size_of(file: object) -> int:
    if isinstance(file, io.TextIOBase):
        raise Unsendable("the file is open in text mode: open it in binary mode, or pass its path")
    try:
        return int(file.seek(0, io.SEEK_END))  # type: ignore[attr-defined]  # what has no seek is refused just below
    except (AttributeError, OSError, ValueError) as exc:
        raise Unsendable("the size of the stream is unknown: read it into bytes, or pass a path") from exc
