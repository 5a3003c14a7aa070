"""The notifier: a thread that looks at the findings once a minute and sends the notices that are due.

Must not end, whatever a look or a notice does. A notice that cannot be sent is tried again at the next look.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from receiver.errors import ReceiverError
from receiver.notices.plan import Condition, Notice, NoticePlan

log: Final = structlog.get_logger(__name__)

# Seconds between two looks.
LOOK_INTERVAL: Final = 60.0
# Notices that wait for a receiver that does not answer. The oldest are dropped first.
_MOST_WAITING: Final = 50


class Notifier:
    """Looks and sends from `start` to `stop`.

    `look` returns the conditions that hold; None: another host looks. `send` raises ReceiverError when the notice did
    not arrive.
    """

    def __init__(
        self,
        look: Callable[[], Iterable[Condition] | None],
        send: Callable[[Notice], None],
        *,
        repeat: float,
        interval: float = LOOK_INTERVAL,
    ) -> None:
        self._look = look
        self._send = send
        self._plan = NoticePlan(repeat=repeat)
        self._waiting: deque[Notice] = deque(maxlen=_MOST_WAITING)
        self._interval = interval
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking. A notice that is being sent is not waited for."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            try:
                self._once()
            except Exception as exc:  # noqa: BLE001 - a thread that ends would send no notice any more
                log.error("notice.failed", error=type(exc).__name__)

    def _once(self) -> None:
        conditions = self._look()
        if conditions is None:
            self._plan.forget()
        else:
            self._waiting += self._plan.due(conditions, time.monotonic())
        while self._waiting and not self._stopping.is_set():
            notice = self._waiting[0]
            try:
                self._send(notice)
            except ReceiverError as exc:
                log.error("notice.not_sent", error=str(exc), waiting=len(self._waiting))
                return
            self._waiting.popleft()
            log.info("notice.sent", notice=notice.event, code=notice.condition.code)
