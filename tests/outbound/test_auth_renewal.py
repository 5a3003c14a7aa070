"""Renewal of tokens, against the fake API: one request for all threads, early, and independent of clocks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from receiver.fault_injection.api_faults import ApiFault
from receiver.outbound import Limits, OAuthKey, OutboundError, RedoxUnavailable
from receiver.protocol.api_keys import ApiKey
from receiver.simulator.api import FakeRedoxApi
from receiver.simulator.api_exchange import SimulatedApiAnswer
from tests.outbound.conftest import KEY, LEGACY, Connect, MakeAuth, jwks_of, message, token_requests
from tests.support.waiting import until


class Clock:
    """A monotonic clock that tests move."""

    def __init__(self) -> None:
        self.reading = 1_000.0

    def __call__(self) -> float:
        return self.reading


def all_at_once(count: int, act: Callable[[], object]) -> list[object]:
    """Return what `act` returned or raised in each of `count` threads that start at the same time."""
    barrier = threading.Barrier(count)

    def begin() -> object:
        barrier.wait(60)
        try:
            return act()
        except OutboundError as exc:
            return exc

    with ThreadPoolExecutor(count) as pool:
        return [future.result(60) for future in [pool.submit(begin) for _ in range(count)]]


def test_fifty_threads_with_an_expired_token_make_one_request(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """Threads that need a new token at the same time share one request and one token."""
    clock = Clock()
    auth = make_auth(monotonic=clock)
    old = auth.token()
    clock.reading += 301

    tokens = all_at_once(50, auth.token)

    assert len(token_requests(api)) == 2
    assert all(token is tokens[0] for token in tokens)
    assert tokens[0] is not old


def test_fifty_threads_with_a_token_refused_early_make_one_request(api: FakeRedoxApi, connect: Connect) -> None:
    """When Redox rejects a token early, all calls that are answered 401 share one renewal, and succeed."""
    client = connect()
    client.send(message())
    api.refuse_tokens()

    answers = all_at_once(50, lambda: client.send(message()).status)

    assert answers == [200] * 50
    assert len(token_requests(api)) == 2
    assert len(api.processed) == 51


def test_a_failure_is_shared_too(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """When the request for a token fails, every waiting thread gets the error, and the next call tries again."""
    auth = make_auth(limits=Limits(token=2.0))
    api.fail("/v2/auth/token", ApiFault.SILENCE)

    outcomes = all_at_once(50, auth.token)

    assert all(isinstance(outcome, RedoxUnavailable) and outcome.not_processed for outcome in outcomes)
    assert len(token_requests(api)) == 1
    assert auth.token().lifetime == 300.0


def test_a_token_is_renewed_before_it_ends(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """A token is used until 30 s before its end, and then replaced."""
    clock = Clock()
    auth = make_auth(monotonic=clock)
    first = auth.token()
    clock.reading += 269
    assert auth.token() is first
    clock.reading += 1
    assert auth.token() is not first
    assert len(token_requests(api)) == 2


def test_a_failed_early_renewal(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """A failed early renewal raises no error while the old token is valid, and is not repeated with every call."""
    clock = Clock()
    auth = make_auth(monotonic=clock)
    first = auth.token()
    clock.reading += 280
    api.fail("/v2/auth/token", ApiFault.SERVER_ERROR, times=2)

    assert [auth.token() is first for _ in range(5)] == [True] * 5
    assert len(token_requests(api)) == 2
    clock.reading += 6
    assert auth.token() is first
    assert len(token_requests(api)) == 3
    clock.reading += 15
    assert auth.token() is not first


def test_others_do_not_wait_for_an_early_renewal(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """While one thread renews early, other threads use the token that is still valid."""
    clock = Clock()
    auth = make_auth(monotonic=clock, limits=Limits(token=60.0))
    first = auth.token()
    clock.reading += 280
    api.fail("/v2/auth/token", ApiFault.SILENCE)
    renewing = threading.Thread(target=auth.token)
    renewing.start()
    try:
        until(lambda: len(token_requests(api)) == 2)
        assert auth.token() is first
        assert renewing.is_alive()
    finally:
        api.__exit__(None, None, None)
        renewing.join()


@pytest.mark.parametrize("jump", [timedelta(days=-3650), timedelta(days=3650)], ids=["back", "ahead"])
@pytest.mark.parametrize("key", [KEY, LEGACY], ids=["oauth", "legacy"])
def test_a_jump_of_the_wall_clock_changes_nothing(
    api: FakeRedoxApi, make_auth: MakeAuth, key: ApiKey, jump: timedelta
) -> None:
    """After a jump of the real-time clock, a token is neither dropped nor used beyond its end."""
    clock, wall = Clock(), [datetime.now(UTC)]
    auth = make_auth(key, monotonic=clock, now=lambda: wall[0])
    first = auth.token()
    wall[0] += jump
    clock.reading += 200
    assert auth.token() is first
    wall[0] -= jump
    clock.reading += 100
    assert auth.token() is not first
    assert len(token_requests(api)) == 2


def test_legacy_tokens_use_redoxs_clock(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """`expires` is compared with the Date of the reply, so a wrong local clock does no harm."""
    auth = make_auth(LEGACY, now=lambda: datetime.now(UTC) + timedelta(hours=9))

    assert 297.0 <= auth.token().lifetime <= 302.0
    assert token_requests(api) == ["/auth/authenticate"]


def test_a_legacy_key_refreshes_and_authenticates_when_it_must(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """A refresh token is used once. If another process has used it, the client authenticates again."""
    clock = Clock()
    auth = make_auth(LEGACY, monotonic=clock)
    for _ in range(3):
        auth.token()
        clock.reading += 301
    assert token_requests(api) == ["/auth/authenticate", "/auth/refreshToken", "/auth/refreshToken"]

    api.forget_refresh_tokens()
    auth.token()
    assert token_requests(api)[3:] == ["/auth/refreshToken", "/auth/authenticate"]


def test_two_holders_share_a_legacy_key(api: FakeRedoxApi, connect: Connect) -> None:
    """Two clients can share a legacy key: neither stops the other."""
    one, other = connect(LEGACY), connect(LEGACY)
    for client in (one, other, one, other):
        api.refuse_tokens()
        assert client.send(message()).status == 200
    assert len(api.processed) == 4


def test_a_refresh_that_fails(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """Only a rejected refresh token makes the client authenticate again; a server error does not."""
    clock = Clock()
    auth = make_auth(LEGACY, monotonic=clock)
    auth.token()
    clock.reading += 301
    api.fail("/auth/refreshToken", ApiFault.SERVER_ERROR)

    with pytest.raises(RedoxUnavailable):
        auth.token()
    assert token_requests(api) == ["/auth/authenticate", "/auth/refreshToken"]


def test_joining_a_renewal_that_fails(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """A call whose token was rejected joins an early renewal. If that fails, only this call fails."""
    clock = Clock()
    auth = make_auth(monotonic=clock, limits=Limits(token=2.0))
    refused = auth.token()
    clock.reading += 280
    api.fail("/v2/auth/token", ApiFault.SILENCE)
    leading: list[object] = []
    leader = threading.Thread(target=lambda: leading.append(auth.token()))
    leader.start()
    until(lambda: len(token_requests(api)) == 2)
    with pytest.raises(RedoxUnavailable):
        auth.token(refused=refused)
    leader.join()

    assert leading == [refused]


@pytest.mark.parametrize("date", ["never", "", "Mon, 99 Foo 2026 99:99:99 GMT"])
def test_a_reply_without_a_good_date_is_read_by_our_clock(api: FakeRedoxApi, make_auth: MakeAuth, date: str) -> None:
    """Without a valid Date header, `expires` is compared with the local clock."""
    now = datetime(2026, 3, 1, tzinfo=UTC)
    reply = {"accessToken": "synthetic", "expires": "2026-03-01T00:02:00Z", "refreshToken": "r"}
    api.fail("/auth/authenticate", SimulatedApiAnswer(body=reply, headers={"Date": date}))

    assert make_auth(LEGACY, now=lambda: now).token().lifetime == 120.0


def test_a_key_is_exchanged_while_running(api: FakeRedoxApi, connect: Connect) -> None:
    """A key that is rotated, here and at Redox, is used from the next renewal on, without a restart."""
    new = OAuthKey(client_id=KEY.client_id, kid="kid-2", private_key=rsa.generate_private_key(65537, 2048))
    current, published = [KEY], [jwks_of(KEY)]
    api.register_oauth(KEY.client_id, lambda: published[0])
    client = connect(lambda: current[0])
    client.send(message())

    current[0], published[0] = new, jwks_of(new)
    client.send(message())
    api.refuse_tokens()
    client.send(message())

    assert len(api.processed) == 3
