"""Authentication against the fake API: its errors, its users, and what it must not disclose."""

from __future__ import annotations

import asyncio
import logging
import traceback
from datetime import UTC, datetime, timedelta

import httpx2
import pytest

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
from receiver.protocol.api_keys import ApiKey
from receiver.simulator.api import FakeRedoxApi
from tests.outbound.conftest import KEY, LEGACY, Connect, MakeAuth, message, token_requests


@pytest.mark.parametrize("off", [-400.0, 60.0])
def test_a_wrong_clock_is_named(make_auth: MakeAuth, off: float) -> None:
    """When Redox rejects an assertion for its iat, the error says by how much the local clock differs."""
    auth = make_auth(now=lambda: datetime.now(UTC) + timedelta(seconds=off))
    with pytest.raises(AuthenticationFailed, match="this host's clock differs from Redox's by") as caught:
        auth.token()
    assert caught.value.not_processed


@pytest.mark.parametrize("key", [KEY, LEGACY], ids=["oauth", "legacy"])
def test_a_second_401_stands(api: FakeRedoxApi, connect: Connect, key: ApiKey) -> None:
    """After a 401 there is one new token and one retry, but no loop."""
    api.fail("/endpoint", ApiFault.UNAUTHORIZED, times=9)

    with pytest.raises(AuthenticationFailed) as caught:
        connect(key).send(message())
    assert (caught.value.status, caught.value.retryable) == (401, False)
    assert len(api.received("/endpoint")) == 2
    assert len(token_requests(api)) == 2
    assert api.processed == []


def test_a_rejected_token_is_not_used_again(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """When no other token can be had, a rejected token is not used again."""
    auth = make_auth()
    refused = auth.token()
    api.fail("/v2/auth/token", ApiFault.SERVER_ERROR)

    with pytest.raises(RedoxUnavailable):
        auth.token(refused=refused)
    assert auth.token(refused=refused) is not refused


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
def test_failures_of_the_token_endpoint(api: FakeRedoxApi, make_auth: MakeAuth, key: ApiKey, fault: ApiFault) -> None:
    """Each failure of the token endpoint becomes an error of its type, in bounded time, and the next call succeeds."""
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


def test_token_requests_are_retried(api: FakeRedoxApi, connect: Connect) -> None:
    """A call succeeds if the token endpoint recovers within the attempts of the call."""
    api.fail("/v2/auth/token", ApiFault.DROP_AFTER)
    api.fail("/v2/auth/token", ApiFault.UNAVAILABLE)

    assert connect().send(message()).status == 200
    assert len(api.processed) == 1


def test_rejections_are_explained(make_auth: MakeAuth) -> None:
    """The error has Redox's description of the rejection, and says what to check."""
    unknown = OAuthKey(client_id=KEY.client_id, kid="kid-9", private_key=KEY.private_key)
    with pytest.raises(AuthenticationFailed) as caught:
        make_auth(unknown).token()

    assert "Public key not found, check client_id, kid and Redox dashboard settings" in str(caught.value)
    assert "HTTP 400" in str(caught.value)
    assert "check the client id, the kid and the private key" in str(caught.value)


def test_a_wrong_legacy_secret_is_explained(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """The error for a wrong legacy key says what to check, and contains neither half of the key."""
    api.register_legacy(LEGACY.api_key, "another")
    with pytest.raises(AuthenticationFailed, match="check the legacy API key and its secret") as caught:
        make_auth(LEGACY).token()
    assert "canary" not in str(caught.value)


def test_a_key_that_cannot_be_read(api: FakeRedoxApi, connect: Connect) -> None:
    """A key that cannot be read at a renewal is a ConfigurationError. Once it is back, the next call succeeds."""
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
    """With all loggers at DEBUG, no token, assertion, secret or patient's name is written anywhere."""
    texts: list[str] = []
    with caplog.at_level(logging.DEBUG):
        for key in (KEY, LEGACY):
            client = connect(key, limits=Limits(total=2.0, attempts=1))
            client.send(message())
            texts += [repr(client), repr(client.auth), repr(client.auth.token())]
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
                texts += traceback.format_exception(caught.value)
        texts += [record.getMessage() for record in caplog.records]
    text = "\n".join(texts)

    given = [one.headers["authorization"].removeprefix("Bearer ") for one in api.received("/endpoint")]
    assert given
    for secret in {*given, *api._tokens._refresh_tokens, "canary", "Canary", "eyJ", "PRIVATE KEY"}:
        assert secret not in text


def test_a_plain_httpx2_client_is_authenticated(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """RedoxAuth works with any httpx2 client, also after a token was rejected early."""
    with httpx2.Client(auth=make_auth(), trust_env=False) as client:
        assert client.post(f"{api.base_url}/endpoint", json=message()).status_code == 200
        api.refuse_tokens()
        assert client.post(f"{api.base_url}/endpoint", json=message()).status_code == 200
    assert len(token_requests(api)) == 2


def test_an_async_client_is_authenticated(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """RedoxAuth works in asyncio: twenty tasks share one renewal, which does not block the event loop."""
    auth = make_auth(limits=Limits(token=60.0))

    async def main() -> list[int]:
        async with httpx2.AsyncClient(auth=auth, trust_env=False) as client:

            async def post() -> int:
                return (await client.post(f"{api.base_url}/endpoint", json=message())).status_code

            first = await asyncio.gather(*(post() for _ in range(20)))
            api.refuse_tokens()
            return first + await asyncio.gather(*(post() for _ in range(20)))

    assert asyncio.run(main()) == [200] * 40
    assert len(token_requests(api)) == 2


def test_closing_the_auth_of_a_client(connect: Connect) -> None:
    """Closing the authentication of a client does not close the client's connections."""
    client = connect()
    client.auth.close()

    assert client.send(message()).status == 200


def test_a_token_goes_nowhere_else(api: FakeRedoxApi, make_auth: MakeAuth) -> None:
    """A request to another origin is refused before a token is added to it."""
    with FakeRedoxApi() as elsewhere, httpx2.Client(auth=make_auth(), trust_env=False) as client:
        with pytest.raises(Unsendable, match="another origin"):
            client.get(f"{elsewhere.base_url}/endpoint")
        assert elsewhere.requests == []
    assert api.requests == []


def test_an_unreadable_key_is_found_at_once() -> None:
    """A key that cannot be read is an error when the client is made, not at its first call."""

    def key() -> ApiKey:
        raise ConfigurationError("no key")

    with pytest.raises(ConfigurationError, match="no key"):
        RedoxAuth(key)
