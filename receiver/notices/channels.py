"""The two ways of a notice: a signed webhook, and a command that reads it on stdin.

The webhook follows Standard Webhooks 1.0 (github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md):
headers webhook-id, webhook-timestamp and webhook-signature. Must not decide what is sent.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final
from uuid import uuid4

import msgspec

from receiver.errors import ReceiverError
from receiver.notices.plan import Notice

# Seconds for a command.
COMMAND_TIMEOUT: Final = 30.0
_SUBJECTS: Final = {"opened": "needs you", "reminder": "still needs you", "resolved": "is resolved"}

# (url, secret, id, timestamp, body): posts it, signed. See receiver.outbound.standard_webhooks.post.
Post = Callable[[str, str, str, int, bytes], None]


class NoticeNotSent(ReceiverError):
    """A notice did not arrive. The text names the cause, and nothing of an answer."""


def document(notice: Notice, host: str, at: datetime) -> bytes:
    """Return the JSON body of a webhook: type, timestamp, data (code, destination, text, fix, host, left_out)."""
    condition = notice.condition
    return msgspec.json.encode(
        {
            "type": f"redox_receiver.finding.{notice.event}",
            "timestamp": at.isoformat(),
            "data": {
                "code": condition.code,
                "destination": condition.destination,
                "text": condition.text,
                "fix": condition.fix,
                "host": host,
                "left_out": notice.left_out,
            },
        }
    )


def text(notice: Notice, host: str) -> str:
    """Return the notice as a mail: a subject line, an empty line, and the text with the command that fixes it."""
    condition = notice.condition
    about = condition.destination or host
    lines = [f"Subject: [redox-receiver] {about}: {condition.code} {_SUBJECTS[notice.event]}", "", condition.text]
    if notice.event != "resolved":
        lines += ["", f"To fix it: {condition.fix}"]
    if notice.left_out:
        lines += ["", f"{notice.left_out} other notices were left out in the last hour: run `redox-receiver status`."]
    return "\n".join([*lines, "", f"Sent by the admin listener on {host}.", ""])


def webhook(url: str, secret: str, host: str, post: Post) -> Callable[[Notice], None]:
    """Return a channel that posts notices to `url`. It raises what `post` raises."""

    def send(notice: Notice) -> None:
        now = time.time()
        body = document(notice, host, datetime.fromtimestamp(now, UTC))
        post(url, secret, f"msg_{uuid4().hex}", int(now), body)

    return send


def command(line: str, host: str) -> Callable[[Notice], None]:
    """Return a channel that runs a command without a shell, with the notice on stdin. It raises NoticeNotSent."""
    words = shlex.split(line)

    def send(notice: Notice) -> None:
        try:
            done = subprocess.run(
                words,
                input=text(notice, host).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=COMMAND_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise NoticeNotSent(f"the command for notices did not run ({type(exc).__name__})") from None
        if done.returncode != 0:
            raise NoticeNotSent(f"the command for notices failed with exit status {done.returncode}")

    return send


def each_of(channels: list[Callable[[Notice], None]]) -> Callable[[Notice], None]:
    """Return a channel that sends by all of them: it fails when one does, and then all of them send again."""

    def send(notice: Notice) -> None:
        for channel in channels:
            channel(notice)

    return send
