"""What can be asked of Redox's API, whoever carries it out: messages, queries, FHIR, files.

May not send anything: it makes calls ready and hands them on.
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
# Name, content, media type (None: by the name).
FilePart = tuple[str, bytes | BinaryIO, str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiProfile:
    """Who speaks: what an API key and its source make of what is to be said. Raises ConfigurationError.

    `several_keys` (Redox: several OAuth keys and sources in one environment): what ends up without a source is refused.
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
                    "a path on the Redox API begins with a slash and has no query: /endpoint, /query"
                )
        source = self.source
        if source is not None and (not source.isascii() or not source.isprintable() or not source.strip()):
            raise ConfigurationError("the source id is the UUID that the Redox dashboard shows for the source")

    def message(self, message: Outgoing, *, query: bool, onramp: NetworkOnramp | None) -> Call:
        """A Data Model message or query. Raises Unsendable."""
        if onramp is not None and self.legacy:
            raise Unsendable("network onramps take no legacy API key (Redox: their tokens must live less than a day)")
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
        """The FHIR R4 resources of a destination. Raises Unsendable with a legacy key."""
        if self.legacy:
            raise Unsendable("a legacy API key serves the Data Model API only; FHIR takes an OAuth API key")

        def named(call: Call) -> Result:
            return carry_out(replace(call, headers={**self._source_header(), **call.headers}))

        return FhirDestination(carry_out=named, slug=slug, environment=environment)

    def upload(self) -> Call:
        """An upload, whose file travels beside. Raises Unsendable."""
        return Call(
            name="upload", kind="upload", to=(), method="POST", path=self.upload_path, headers=self._source_header()
        )

    def _source_header(self) -> Mapping[str, str]:
        if self.source is not None:
            return {SOURCE_HEADER: self.source}
        if self.several_keys:
            raise Unsendable("several API keys exist here, and no source is named; give the client its source")
        return {}


class RedoxApi(ABC):
    """The calls. All raise the errors of receiver.outbound.errors; `carry_out` says how they are made."""

    def __init__(self, speaker: ApiProfile, limits: Limits) -> None:
        self.speaker: Final = speaker
        self.limits: Final = limits

    @abstractmethod
    def carry_out(self, call: Call, file: FilePart | None = None) -> Answer:
        """Make a call that was made ready; `file` goes with an upload."""

    def send(self, message: Outgoing, *, onramp: NetworkOnramp | None = None) -> Answer:
        """Send a Data Model message; the answer says that Redox accepted it, not that it was delivered."""
        return self.carry_out(self.speaker.message(message, query=False, onramp=onramp))

    def query(self, message: Outgoing, *, onramp: NetworkOnramp | None = None) -> Answer:
        """Ask one destination; `answer.data` is the response message, a dict."""
        answer = self.carry_out(self.speaker.message(message, query=True, onramp=onramp))
        if not isinstance(answer.data, dict):
            raise BadAnswer("the query was answered with no message in it", status=answer.status)
        return answer

    def fhir(self, destination: str, environment: Environment) -> FhirDestination[Answer]:
        """The FHIR R4 resources of a destination, by its slug. Raises Unsendable with a legacy key."""
        return self.speaker.fhir(destination, environment, self.carry_out)

    def upload(
        self,
        file: bytes | str | os.PathLike[str] | BinaryIO,
        *,
        filename: str | None = None,
        media_type: str | None = None,
    ) -> str:
        """Upload a file (a path, bytes, or an open binary file, from its beginning) and return its URI.

        It is streamed, and refused before anything is sent when it is larger than `limits.upload_bytes`.
        """
        if isinstance(file, str | os.PathLike):
            with Path(file).open("rb") as opened:
                return self.upload(opened, filename=filename, media_type=media_type)
        size = len(file) if isinstance(file, bytes) else _size_of(file)
        if size > self.limits.upload_bytes:
            raise Unsendable(f"the file has {size} bytes; Redox takes uploads of {self.limits.upload_bytes} at most")
        name = filename or Path(str(getattr(file, "name", "upload"))).name
        answer = self.carry_out(self.speaker.upload(), (name, file, media_type))
        uri = answer.data.get("URI") if isinstance(answer.data, dict) else None
        if not isinstance(uri, str) or not uri:
            raise BadAnswer("the upload was answered without a URI", status=answer.status)
        return uri


def _size_of(file: object) -> int:
    if isinstance(file, io.TextIOBase):
        raise Unsendable("the file is open as text; open it in binary mode, or pass its path")
    try:
        return int(file.seek(0, io.SEEK_END))  # type: ignore[attr-defined]  # what has no seek is refused just below
    except (AttributeError, OSError, ValueError) as exc:
        raise Unsendable(
            "the size of that stream can't be known beforehand; read it into bytes, or pass a path"
        ) from exc
