"""The cost of RedoxClient.send: messages a second compared with bare httpx2 and a fixed header, at 1 and 16 threads.

Run it as `python -m tests.bench.outbound`; it prints the ratio. The fake API runs in a process of its own, so that it
shares no interpreter lock with what is measured. It checks no speed. The machine should be idle.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import httpx2
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from receiver.outbound import OAuthKey, RedoxClient, SlidingWindow
from receiver.simulator.api import FakeRedoxApi

MESSAGE = {
    "Meta": {
        "DataModel": "PatientAdmin",
        "EventType": "Arrival",
        "Destinations": [{"ID": "destination-1"}],
        "Source": {"ID": "source-1"},
    },
    "Patient": {"Notes": ["synthetic " * 8] * 40},
}  # about 4 KB, as an ordinary message has
ROUNDS = 7
SECONDS = 1.5


def serve(jwks: dict[str, Any], pipe: Connection) -> None:
    """The fake API, until the other end of `pipe` speaks."""
    with FakeRedoxApi() as api:
        api.register_oauth("client", jwks)
        pipe.send(api.base_url)
        pipe.recv()


def rate(act: Callable[[], object], threads: int) -> float:
    """How often a second `act` is done by so many threads."""
    start = threading.Barrier(threads + 1)
    end = 0.0

    def work() -> int:
        done = 0
        start.wait()
        while time.perf_counter() < end:
            act()
            done += 1
        return done

    with ThreadPoolExecutor(threads) as pool:
        working = [pool.submit(work) for _ in range(threads)]
        began = time.perf_counter()
        end = began + SECONDS
        start.wait()
        done = sum(one.result() for one in working)
        return done / (time.perf_counter() - began)


def main() -> None:
    """Measure in alternation, so that whatever else the machine does falls on both alike."""
    private = rsa.generate_private_key(65537, 2048)
    jwks = {"keys": [{**RSAAlgorithm.to_jwk(private.public_key(), as_dict=True), "kid": "kid"}]}
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    server = spawn.Process(target=serve, args=(jwks, theirs))
    server.start()
    try:
        base_url = ours.recv()
        client = RedoxClient(
            OAuthKey(client_id="client", kid="kid", private_key=private),
            base_url=base_url,
            rate=SlidingWindow(10_000_000),
        )
        header = {"Authorization": f"Bearer {client.auth.token().value}"}
        with client, httpx2.Client(headers=header, trust_env=False) as bare:

            def bare_send() -> None:
                bare.post(f"{base_url}/endpoint", json=MESSAGE).raise_for_status().json()

            for threads in (1, 16):
                pairs = [(rate(lambda: client.send(MESSAGE), threads), rate(bare_send, threads)) for _ in range(ROUNDS)]
                sent, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
                ratio = statistics.median(a / b for a, b in pairs)
                print(f"{threads:2} threads: send {sent:6.0f}/s, bare httpx2 {plain:6.0f}/s, ratio {ratio:.2f}")
        ours.send("end")
        server.join(30)
    finally:
        server.kill()
        server.join()


if __name__ == "__main__":
    main()
