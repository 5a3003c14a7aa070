"""Facts about authentication, against the fake API: one renewal for all, early, unharmed by clocks, never a loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from receiver.errors import ConfigurationError
from receiver.fault_injection.api_faults import ApiFault
from receiver.outbound import (
    AuthenticationFailed,
    BadAnswer,
    Limits,
    OAuthKey,
    OutboundError,
    RateLimited,
    RedoxAuth,
    RedoxUnavailable,
    Unsendable,
    UnusableAnswer,
)
from receiver.protocol.credentials import ApiKey
from receiver.simulator.api import FakeRedoxApi
from receiver.simulator.api_exchange import SimulatedApiAnswer
from tests.outbound.conftest import KEY, LEGACY, Connect, jwks_of, message, until

MakeAuth = Callable[..., RedoxAuth]


class Clock:
    """A monotonic clock that stands until it is moved."""

    def __init__(self) -> None:
        self.reading = 1_000.0

    def __call__(self) -> float:
        return self.reading


@pytest.fixture
def make_auth(api: FakeRedoxApi) -> Iterator[MakeAuth]:
    with ExitStack() as stack:

        def make(key: Any = KEY, **options: Any) -> RedoxAuth:
            auth = RedoxAuth(key, **{"base_url": api.base_url, **options})
            stack.callback(auth.close)
            return auth

        yield make


def asked(api: FakeRedoxApi) -> list[str]:
    """The paths at which tokens were asked for."""
    return [one.path for one in api.requests if one.path.startswith(("/v2/auth", "/auth"))]


def all_at_once(count: int, act: Callable[[], object]) -> list[object]:
    """What `act` gave or raised in each of `count` threads that began together."""
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
    """However many need a new token at once, one asks and all have the same."""
    clock = Clock()
    auth = make_auth(monotonic=clock)
    old = auth.token()
    clock.reading += 301

    tokens = all_at_once(50, auth.token)

    assert len(asked(api)) == 2
    assert all(token is tokens[0] for token in tokens)
    assert tokens[0] is not old


def test_fifty_threads_with_a_token_refused_early_make_one_request(api: FakeRedoxApi, connect: Connect) -> None:
    """When Redox drops a token before its time, all who are answered 401 share one renewal, and all succeed."""
    client = connect()
    client.send(message())
    api.refuse_tokens()

    answers = all_at_once(50, lambda: client.send(message()).status)

    assert answers == [200] * 50
    assert len(asked(api)) == 2
    assert len(api.processed) == 51


def test_a_failure_is_shared_too(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """When the one request for a token fails, all who waited fail with it, and the next call asks again."""
    auth = make_auth(limits=Limits(token=2.0))
    api.fail("/v2/auth/token", ApiFault.SILENCE)

    outcomes = all_at_once(50, auth.token)

    assert all(isinstance(outcome, RedoxUnavailable) and outcome.not_processed for outcome in outcomes)
    assert len(asked(api)) == 1
    assert auth.token().lifetime == 300.0


def test_a_token_is_renewed_before_it_ends(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """A token serves until 30 s before its end, and is then exchanged."""
    clock = Clock()
    auth = make_auth(monotonic=clock)
    first = auth.token()
    clock.reading += 269
    assert auth.token() is first
    clock.reading += 1
    assert auth.token() is not first
    assert len(asked(api)) == 2


def test_a_failed_early_renewal_harms_nobody(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """While the old token lives, a renewal that fails is not noticed, and not repeated with every call."""
    clock = Clock()
    auth = make_auth(monotonic=clock)
    first = auth.token()
    clock.reading += 280
    api.fail("/v2/auth/token", ApiFault.SERVER_ERROR, times=2)

    assert [auth.token() is first for _ in range(5)] == [True] * 5
    assert len(asked(api)) == 2
    clock.reading += 6
    assert auth.token() is first
    assert len(asked(api)) == 3
    clock.reading += 15
    assert auth.token() is not first


def test_others_do_not_wait_for_an_early_renewal(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """While one thread renews early, the others go on with the token that still lives."""
    clock = Clock()
    auth = make_auth(monotonic=clock, limits=Limits(token=60.0))
    first = auth.token()
    clock.reading += 280
    api.fail("/v2/auth/token", ApiFault.SILENCE)
    renewing = threading.Thread(target=auth.token)
    renewing.start()
    try:
        until(lambda: len(asked(api)) == 2)
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
    """Somebody sets the time: the token in hand is neither thrown away nor kept beyond its end."""
    clock, wall = Clock(), [datetime.now(UTC)]
    auth = make_auth(key, monotonic=clock, now=lambda: wall[0])
    first = auth.token()
    wall[0] += jump
    clock.reading += 200
    assert auth.token() is first
    wall[0] -= jump
    clock.reading += 100
    assert auth.token() is not first
    assert len(asked(api)) == 2


@pytest.mark.parametrize("off", [-400.0, 60.0])
def test_a_wrong_clock_is_named(make_auth: MakeAuth, off: float) -> None:
    """When Redox refuses an assertion for its iat, the error says how far this host's clock is off."""
    auth = make_auth(now=lambda: datetime.now(UTC) + timedelta(seconds=off))
    with pytest.raises(AuthenticationFailed, match="this host's clock differs from Redox's by") as caught:
        auth.token()
    assert caught.value.not_processed


def test_a_legacy_token_is_believed_by_redoxs_clock(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """`expires` is measured against the Date of the reply, so a host that is hours off still counts right."""
    auth = make_auth(LEGACY, now=lambda: datetime.now(UTC) + timedelta(hours=9))

    assert 297.0 <= auth.token().lifetime <= 302.0
    assert asked(api) == ["/auth/authenticate"]


def test_a_legacy_key_refreshes_and_authenticates_when_it_must(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """A refresh token is used once; one that another process used up leads to authenticating, not to an error."""
    clock = Clock()
    auth = make_auth(LEGACY, monotonic=clock)
    for _ in range(3):
        auth.token()
        clock.reading += 301
    assert asked(api) == ["/auth/authenticate", "/auth/refreshToken", "/auth/refreshToken"]

    api.forget_refresh_tokens()
    auth.token()
    assert asked(api)[3:] == ["/auth/refreshToken", "/auth/authenticate"]


def test_two_holders_share_a_legacy_key(api: FakeRedoxApi, connect: Connect) -> None:
    """Whatever one holder of a legacy key does with its tokens, the other goes on."""
    one, other = connect(LEGACY), connect(LEGACY)
    for client in (one, other, one, other):
        api.refuse_tokens()
        assert client.send(message()).status == 200
    assert len(api.processed) == 4


def test_a_refresh_that_fails_is_no_reason_to_authenticate(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """Only a refusal leads to authentication; an endpoint in trouble is left in peace."""
    clock = Clock()
    auth = make_auth(LEGACY, monotonic=clock)
    auth.token()
    clock.reading += 301
    api.fail("/auth/refreshToken", ApiFault.SERVER_ERROR)

    with pytest.raises(RedoxUnavailable):
        auth.token()
    assert asked(api) == ["/auth/authenticate", "/auth/refreshToken"]


@pytest.mark.parametrize("key", [KEY, LEGACY], ids=["oauth", "legacy"])
def test_a_second_401_stands(api: FakeRedoxApi, connect: Connect, key: ApiKey) -> None:
    """After a 401 there is one new token and one more try, never a loop."""
    api.fail("/endpoint", ApiFault.UNAUTHORIZED, times=9)

    with pytest.raises(AuthenticationFailed) as caught:
        connect(key).send(message())
    assert (caught.value.status, caught.value.retryable) == (401, False)
    assert len(api.received("/endpoint")) == 2
    assert len(asked(api)) == 2
    assert api.processed == []


def test_a_refused_token_is_not_handed_out_again(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """When the token was refused and no other is to be had, that is an error; the refused one is not tried again."""
    auth = make_auth()
    refused = auth.token()
    api.fail("/v2/auth/token", ApiFault.SERVER_ERROR)

    with pytest.raises(RedoxUnavailable):
        auth.token(refused=refused)
    assert auth.token(refused=refused) is not refused


def test_a_renewal_led_by_another_may_not_help(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """Who was refused a token joins an early renewal; when it fails, others keep the old token, but he has none."""
    clock = Clock()
    auth = make_auth(monotonic=clock, limits=Limits(token=2.0))
    refused = auth.token()
    clock.reading += 280
    api.fail("/v2/auth/token", ApiFault.SILENCE)
    leading: list[object] = []
    leader = threading.Thread(target=lambda: leading.append(auth.token()))
    leader.start()
    until(lambda: len(asked(api)) == 2)
    with pytest.raises(RedoxUnavailable):
        auth.token(refused=refused)
    leader.join()

    assert leading == [refused]


@pytest.mark.parametrize("date", ["never", "", "Mon, 99 Foo 2026 99:99:99 GMT"])
def test_a_reply_without_a_good_date_is_read_by_our_clock(api: FakeRedoxApi, make_auth: MakeAuth, date: str) -> None:
    """A missing or wrong Date header does not keep a legacy token from being used."""
    now = datetime(2026, 3, 1, tzinfo=UTC)
    reply = {"accessToken": "synthetic", "expires": "2026-03-01T00:02:00Z", "refreshToken": "r"}
    api.fail("/auth/authenticate", SimulatedApiAnswer(body=reply, headers={"Date": date}))

    assert make_auth(LEGACY, now=lambda: now).token().lifetime == 120.0


FAULTS = {
    ApiFault.SERVER_ERROR: RedoxUnavailable,
    ApiFault.BAD_GATEWAY: RedoxUnavailable,
    ApiFault.UNAVAILABLE: RedoxUnavailable,
    ApiFault.RATE_LIMITED: RateLimited,
    ApiFault.UNAUTHORIZED: AuthenticationFailed,
    ApiFault.GARBAGE: BadAnswer,
    ApiFault.NOT_HTTP: RedoxUnavailable,
    ApiFault.HUGE: UnusableAnswer,
    ApiFault.REDIRECT: UnusableAnswer,
    ApiFault.GZIP_BOMB: UnusableAnswer,
    ApiFault.DRIP: RedoxUnavailable,
    ApiFault.SILENCE: RedoxUnavailable,
    ApiFault.DROP_BEFORE: RedoxUnavailable,
    ApiFault.DROP_AFTER: RedoxUnavailable,
    ApiFault.CUT_SHORT: RedoxUnavailable,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("key", [KEY, LEGACY], ids=["oauth", "legacy"])
def test_a_token_endpoint_in_trouble(api: FakeRedoxApi, make_auth: MakeAuth, key: ApiKey, fault: ApiFault) -> None:
    """Whatever the token endpoint does becomes an error of its type, in bounded time, and the next call recovers."""
    with FakeRedoxApi() as elsewhere:
        api.redirect_to = elsewhere.base_url
        path = "/v2/auth/token" if key is KEY else "/auth/authenticate"
        api.fail(path, fault)
        auth = make_auth(key, limits=Limits(token=1.0 if fault in (ApiFault.DRIP, ApiFault.SILENCE) else 60.0))

        with pytest.raises(OutboundError) as caught:
            auth.token()
        assert type(caught.value) is FAULTS[fault]
        assert caught.value.not_processed
        assert auth.token().lifetime >= 298.0
        assert elsewhere.requests == []


def test_what_was_not_sent_for_want_of_a_token_is_tried_again(api: FakeRedoxApi, connect: Connect) -> None:
    """A token endpoint that recovers within the attempts of a call costs that call nothing."""
    api.fail("/v2/auth/token", ApiFault.DROP_AFTER)
    api.fail("/v2/auth/token", ApiFault.UNAVAILABLE)

    assert connect().send(message()).status == 200
    assert len(api.processed) == 1


def test_redoxs_words_reach_the_operator(make_auth: MakeAuth) -> None:
    """The documented description of a refusal stands in the error, with what to check."""
    unknown = OAuthKey(client_id=KEY.client_id, kid="kid-9", private_key=KEY.private_key)
    with pytest.raises(AuthenticationFailed) as caught:
        make_auth(unknown).token()

    assert "Public key not found, check client_id, kid and Redox dashboard settings" in str(caught.value)
    assert "HTTP 400" in str(caught.value)
    assert "check the client id, the kid and the private key" in str(caught.value)


def test_a_wrong_legacy_secret_is_explained(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """A refused legacy key says what to check, and shows neither half of it."""
    api.register_legacy(LEGACY.api_key, "another")
    with pytest.raises(AuthenticationFailed, match="check the legacy API key and its secret") as caught:
        make_auth(LEGACY).token()
    assert "canary" not in str(caught.value)


def test_a_key_is_exchanged_while_running(api: FakeRedoxApi, connect: Connect) -> None:
    """A key that is rotated, here and at Redox, is taken up at the next renewal, without a restart."""
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


def test_a_key_that_vanished_is_named(api: FakeRedoxApi, connect: Connect) -> None:
    """A key that can't be read at a renewal is an error of configuration; once it is back, the next call succeeds."""
    gone = [False]

    def key() -> ApiKey:
        if gone[0]:
            raise ConfigurationError("the key is not there")
        return KEY

    client = connect(key)
    client.send(message())
    api.refuse_tokens()
    gone[0] = True
    with pytest.raises(ConfigurationError, match="not there"):
        client.send(message())
    gone[0] = False
    assert client.send(message()).status == 200


def test_no_secret_in_log_repr_or_error(api: FakeRedoxApi, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """With every logger at its loudest, no token, assertion, secret or name of a patient is written anywhere."""
    said: list[str] = []
    with caplog.at_level(logging.DEBUG):
        for key in (KEY, LEGACY):
            client = connect(key, limits=Limits(total=2.0, attempts=1))
            client.send(message())
            said += [repr(client), repr(client.auth), repr(client.auth.token())]
            for faults in (
                [ApiFault.UNAUTHORIZED] * 2,
                [ApiFault.SERVER_ERROR],
                [ApiFault.DROP_AFTER],
                [ApiFault.GARBAGE],
            ):
                for fault in faults:
                    api.fail("/endpoint", fault)
                with pytest.raises(OutboundError) as caught:
                    client.send(message())
                said += traceback.format_exception(caught.value)
        said += [record.getMessage() for record in caplog.records]
    text = "\n".join(said)

    given = [one.headers["authorization"].removeprefix("Bearer ") for one in api.received("/endpoint")]
    assert given
    for secret in {*given, *api._refresh_tokens, "canary", "Canary", "eyJ", "PRIVATE KEY"}:
        assert secret not in text


def test_a_plain_httpx2_client_is_authenticated(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """RedoxAuth serves any httpx2 client, also after a token was refused early."""
    with httpx2.Client(auth=make_auth(), trust_env=False) as client:
        assert client.post(f"{api.base_url}/endpoint", json=message()).status_code == 200
        api.refuse_tokens()
        assert client.post(f"{api.base_url}/endpoint", json=message()).status_code == 200
    assert len(asked(api)) == 2


def test_an_async_client_is_authenticated(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """So it does in asyncio: twenty tasks share one renewal, and the event loop is not held up by it."""
    auth = make_auth(limits=Limits(token=60.0))

    async def main() -> list[int]:
        async with httpx2.AsyncClient(auth=auth, trust_env=False) as client:

            async def post() -> int:
                return (await client.post(f"{api.base_url}/endpoint", json=message())).status_code

            first = await asyncio.gather(*(post() for _ in range(20)))
            api.refuse_tokens()
            return first + await asyncio.gather(*(post() for _ in range(20)))

    assert asyncio.run(main()) == [200] * 40
    assert len(asked(api)) == 2


def test_a_clients_auth_is_the_clients(connect: Connect) -> None:
    """Closing the authentication that a client made leaves the client its connections."""
    client = connect()
    client.auth.close()

    assert client.send(message()).status == 200


def test_a_token_goes_nowhere_else(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """A request to any other origin is refused before a token is put on it."""
    with FakeRedoxApi() as elsewhere, httpx2.Client(auth=make_auth(), trust_env=False) as client:
        with pytest.raises(Unsendable, match="another origin"):
            client.get(f"{elsewhere.base_url}/endpoint")
        assert elsewhere.requests == []
    assert api.requests == []


def test_a_useless_key_function_is_found_at_once() -> None:
    """A key that can't be had is an error when the client is made, not at its first call."""

    def key() -> ApiKey:
        raise ConfigurationError("no key")

    with pytest.raises(ConfigurationError, match="no key"):
        RedoxAuth(key)
