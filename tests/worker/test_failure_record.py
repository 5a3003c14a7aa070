"""What is stored of a failed attempt."""

from __future__ import annotations

from receiver.retry_policy import RetryDecision, RetryPolicy
from receiver.states import DeliveryState
from receiver.worker.failure_record import failure_record
from tests.test_retry_policy import FAILED, HOLDING, POLICY


def test_what_is_written_down() -> None:
    """A lane with an order waits with its delivery; one without does not; a held one is held."""

    def written(verdict: RetryDecision, policy: RetryPolicy) -> tuple[str, float | None, str | None]:
        failure = failure_record(FAILED, verdict, policy, key="k", sealed=b"s")
        assert (failure.outcome, failure.error_class, failure.error_key, failure.error_sealed, failure.release) == (
            "failed",
            "ValueError",
            "k",
            b"s",
            False,
        )
        return failure.state, failure.pause, failure.lane_state

    unordered = RetryPolicy(max_attempts=3, on_failure="dead", unordered=True)
    assert written(RetryDecision(state=DeliveryState.PENDING, pause=2.0), POLICY) == ("pending", 2.0, "waiting")
    assert written(RetryDecision(state=DeliveryState.PENDING, pause=2.0), unordered) == ("pending", 2.0, None)
    assert written(RetryDecision(state=DeliveryState.PENDING, hold=True), HOLDING) == ("pending", None, "held")
    assert written(RetryDecision(state=DeliveryState.DEAD), POLICY) == ("dead", None, None)
