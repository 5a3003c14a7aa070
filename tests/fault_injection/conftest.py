"""The fixtures of the fake Redox API."""

from __future__ import annotations

from tests.simulator.conftest import api, http

__all__ = ["api", "http"]
