"""The simulated Redox API of `simulate --api`: it accepts the API keys that are registered for its address.

Must not listen on an address other than loopback. Must not read an API key for another address.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_address
from typing import Any, Final

import click
import httpx2
import msgspec

from receiver.cli import session
from receiver.errors import ConfigurationError
from receiver.protocol.api_keys import LegacyKey
from receiver.protocol.jwk import public_jwk
from receiver.simulator.api import FakeRedoxApi
from receiver.storage.operations import outbound_requests
from receiver.storage.registry import api_keys
from receiver.web.jwks import PATH

_POLL_INTERVAL: Final = 0.2


def loopback(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, int] | None:
    """Parse HOST:PORT, which must be on loopback. Raises click.BadParameter."""
    if value is None:
        return None
    host, _, port = value.rpartition(":")
    try:
        if not ip_address(host).is_loopback:
            raise click.BadParameter(f"{host} is not a loopback address: use 127.0.0.1:PORT")
        return host, int(port)
    except ValueError:
        raise click.BadParameter("use HOST:PORT, such as 127.0.0.1:8090") from None


@contextmanager
def serve_api(
    bind: tuple[str, int] | None, receiver: str, destination: str, timeout: float
) -> Iterator[Callable[[], Mapping[str, int] | None]]:
    """Serve the API while the block runs. Yields a function that waits for the handlers and counts what they sent.

    The wait ends when the destination has no pending delivery and its keys no pending request, or when no call arrives
    for `timeout` seconds. `receiver`: the URL at which our signing keys are published. The API fetches them there, as
    Redox does. Without `bind` nothing is served. Raises ConfigurationError.
    """
    if bind is None:
        yield lambda: None
        return
    host, port = bind
    try:
        api = FakeRedoxApi(host=host, port=port)
    except OSError as exc:
        raise ConfigurationError(f"cannot listen at {host}:{port} ({exc.strerror}): choose another with --api") from exc
    with api:
        keys = _register_keys(api, receiver)
        yield lambda: _count_sent(api, destination, keys, timeout)


def _register_keys(api: FakeRedoxApi, receiver: str) -> list[str]:
    """Register the API keys for its address with the simulated API. Returns their names."""
    with session.opened() as opened, opened.engine.connect() as connection:
        rows = [row for row in api_keys.rows(connection) if row["base_url"] == api.base_url]
        for row in rows:
            if row["kind"] == "oauth" and row["kid"] is None:
                api.register_oauth(row["client_id"], partial(_look_up, f"{receiver}{PATH}"))
                continue
            key = api_keys.open_key(connection, opened.keyring, row["name"])
            if isinstance(key, LegacyKey):
                api.register_legacy(key.api_key, key.secret)
            else:
                api.register_oauth(key.client_id, {"keys": [public_jwk(key.private_key) | {"kid": key.kid}]})
    if not rows:
        raise ConfigurationError(
            f"no API key has the base URL {api.base_url}: run `redox-receiver outbound key add NAME "
            f"--base-url {api.base_url} …`, and `destination set D --reply-with NAME`"
        )
    return [row["name"] for row in rows]


def _look_up(url: str) -> dict[str, Any]:
    """The keys that the receiver publishes; no keys while it does not answer."""
    try:
        with httpx2.Client(trust_env=False, timeout=5) as client:
            return msgspec.json.decode(client.get(url).raise_for_status().content, type=dict[str, Any])
    except (httpx2.HTTPError, msgspec.MsgspecError):
        return {"keys": []}


def _count_sent(api: FakeRedoxApi, destination: str, keys: Sequence[str], timeout: float) -> Mapping[str, int]:
    seen, since = -1, time.monotonic()
    with session.opened() as opened:
        while time.monotonic() - since < timeout:
            with opened.engine.connect() as connection:
                if not outbound_requests.waiting(connection, destination, keys):
                    break
            if len(api.requests) != seen:
                seen, since = len(api.requests), time.monotonic()
            time.sleep(_POLL_INTERVAL)
    kinds = Counter(f"{message['Meta']['DataModel']}.{message['Meta']['EventType']}" for message in api.processed)
    return dict(sorted(kinds.items()))
