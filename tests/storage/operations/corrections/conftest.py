"""Fixtures of the tests of corrections."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from receiver.keyring import Keyring
from receiver.storage.operations.corrections.delivery_corrections import DeliveryCorrections
from receiver.storage.operations.corrections.lane_corrections import LaneCorrections
from receiver.storage.operations.corrections.message_corrections import MessageCorrections
from receiver.storage.operations.corrections.request_corrections import RequestCorrections
from tests.storage.hand import Hand
from tests.storage.operations.corrections.helpers import ACTOR


@pytest.fixture
def delivery_corrections(engine: Engine, keyring: Keyring) -> DeliveryCorrections:
    return DeliveryCorrections(engine, keyring, actor=ACTOR)


@pytest.fixture
def message_corrections(engine: Engine, keyring: Keyring) -> MessageCorrections:
    return MessageCorrections(engine, keyring, actor=ACTOR)


@pytest.fixture
def lane_corrections(engine: Engine, keyring: Keyring) -> LaneCorrections:
    return LaneCorrections(engine, keyring, actor=ACTOR)


@pytest.fixture
def request_corrections(engine: Engine, keyring: Keyring) -> RequestCorrections:
    return RequestCorrections(engine, keyring, actor=ACTOR)


@pytest.fixture
def hand(engine: Engine) -> Hand:
    """Runs deliveries of the lane of the registered source."""
    return Hand(engine)
