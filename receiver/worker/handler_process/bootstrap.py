"""Process names and the Init message: what each process that has handler processes needs to start them.

Must not start anything.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

from receiver.settings import PREFIX, Settings
from receiver.worker import discovery
from receiver.worker.handler_process.ipc import Init


def process_name() -> str:
    """Make a unique name for this process as an owner of leases. It is never reused."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


def init_message(
    settings: Settings, url: str, *, handlers: tuple[str, ...] = (), modules: tuple[str, ...] | None = None
) -> Init:
    """Make the first message to a handler process. The process imports `handlers` before it reports Ready.

    `modules`: those of RECEIVER_HANDLERS that can be imported. Default: all.
    """
    env_file = Path(os.environ.get(f"{PREFIX}ENV_FILE") or settings.data_dir / ".env")
    return Init(
        database_url=url,
        keyring=str(settings.keyring_path.resolve()),
        modules=settings.handlers if modules is None else modules,
        handlers=handlers,
        path=discovery.search_path(),
        memory=settings.handler_memory,
        env_file=str(env_file.resolve()) if env_file.is_file() else None,
    )
