"""Discovery in a process of its own: a plugin that ends the process during its import, or hangs, is a LoadFailure.

Must not import a plugin into the calling process. What plugins print is discarded.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, NoReturn

import msgspec

from receiver.errors import ConfigurationError
from receiver.worker import discovery
from receiver.worker.discovery import DeclaredHandler, Plugins
from receiver.worker.load_failure import LoadFailure, failure_of

# Seconds for one plugin to be imported: as many as a handler process has to start.
IMPORT_TIMEOUT: Final = 60.0
# Seconds for the process to start.
_START_TIMEOUT: Final = 60.0
_PIECE: Final = 1 << 16


class _DiscoveryRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is to import. `path`: Python's module search path. `skip`: see `discovery.load_handlers`."""

    names: tuple[str, ...]
    modules: tuple[str, ...]
    path: tuple[str, ...]
    skip: tuple[str, ...]


class _Importing(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A plugin is about to be imported."""

    handler: str | None
    origin: str


class _Discovered(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The result."""

    handlers: dict[str, DeclaredHandler]
    failures: tuple[LoadFailure, ...]


def declared_handlers(
    names: Iterable[str], modules: Sequence[str], *, timeout: float = IMPORT_TIMEOUT
) -> Plugins[DeclaredHandler]:
    """As `discovery.load_handlers`, without the functions. `timeout`: seconds for the import of each plugin.

    These are failures too: an import that ends the process, and one that exceeds the timeout.
    """
    ended: list[LoadFailure] = []
    wanted = tuple(sorted(set(names)))
    while True:
        found = _discover(wanted, tuple(modules), [each.origin for each in ended], timeout)
        if isinstance(found, Plugins):
            return replace(found, failures=(*ended, *found.failures))
        ended.append(found)


def declared_handler(name: str, modules: Sequence[str]) -> DeclaredHandler:
    """As `discovery.load_handler`, without the function."""
    return discovery.require(name, declared_handlers([name], modules))


def _discover(
    names: tuple[str, ...], modules: tuple[str, ...], skip: Collection[str], timeout: float
) -> Plugins[DeclaredHandler] | LoadFailure:
    request = _DiscoveryRequest(names=names, modules=modules, path=discovery.search_path(), skip=tuple(skip))
    results, theirs = os.pipe()
    try:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "receiver.worker.discovery_process", str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs],
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(msgspec.json.encode(request))
            importing, discovered, late = _read(results, timeout)
        finally:
            # It also ends what the plugins have started. The process is not reaped yet, so its id cannot be reused.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
    finally:
        os.close(results)
    if discovered is not None:
        return Plugins(loaded=discovered.handlers, failures=discovered.failures)
    if importing is None:
        raise ConfigurationError("the process that imports the plugins did not start: check the installation")
    return _ended_failure(importing, None if late else status, timeout)


def _read(results: int, timeout: float) -> tuple[_Importing | None, _Discovered | None, bool]:
    """Read messages until the result or the end. Returns the last import, the result, and whether the time is over."""
    importing, buffer, deadline = None, b"", time.monotonic() + _START_TIMEOUT
    decoder = msgspec.json.Decoder(_Importing | _Discovered)
    while True:
        if not select.select([results], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return importing, None, True
        piece = os.read(results, _PIECE)
        if not piece:
            return importing, None, False
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            message: Any = decoder.decode(line)
            if isinstance(message, _Discovered):
                return importing, message, False
            importing, deadline = message, time.monotonic() + timeout


def _ended_failure(importing: _Importing, status: int | None, timeout: float) -> LoadFailure:
    """`status`: the exit status, or minus the signal; None: the import was not finished in time."""
    if status is None:
        kind, how = "TimedOut", f"its import takes more than {timeout:g} seconds"
    elif status < 0:
        kind = signal.Signals(-status).name
        how = f"its import ended the process with {kind}"
    else:
        kind, how = f"Exit{status}", f"its import ended the process with exit status {status}"
    return failure_of(
        importing.handler, importing.origin, kind, f"{importing.origin} cannot be imported: {how}", ended=True
    )


def _main(descriptor: int) -> NoReturn:
    """In the process: import the plugins, and write the result to the descriptor."""

    def send(message: _Importing | _Discovered) -> None:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(msgspec.json.encode(message) + b"\n")

    request = msgspec.json.decode(sys.stdin.buffer.read(), type=_DiscoveryRequest)
    sys.path[:] = request.path
    plugins = discovery.load_handlers(
        request.names,
        request.modules,
        skip=request.skip,
        before=lambda name, origin: send(_Importing(handler=name, origin=origin)),
    )
    handlers = {
        name: DeclaredHandler(declaration=each.declaration, origin=each.origin, development=each.development)
        for name, each in plugins.loaded.items()
    }
    send(_Discovered(handlers=handlers, failures=plugins.failures))
    os._exit(0)  # plugins may have started threads that never end


if __name__ == "__main__":
    _main(int(sys.argv[1]))
