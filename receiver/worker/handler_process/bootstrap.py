"""Process names and the Init message: what each process that has handler processes needs to start them.

Must not start anything.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from pathlib import Path

from receiver.settings import PREFIX, Settings
from receiver.worker.handler_process.ipc import Init


def process_name() -> str:
    """Make a unique name for this process as an owner of leases. It is never reused."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


def init_message(settings: Settings, url: str, handlers: tuple[str, ...] = ()) -> Init:
    """Make the first message to a handler process. The process imports `handlers` before it reports Ready."""
    env_file = Path(os.environ.get(f"{PREFIX}ENV_FILE") or settings.data_dir / ".env")
    return Init(
        database_url=url,
        keyring=str(settings.keyring_path.resolve()),
        modules=settings.handlers,
        handlers=handlers,
        path=tuple(str(Path(entry).resolve()) for entry in sys.path),
        memory=settings.handler_memory,
        env_file=str(env_file.resolve()) if env_file.is_file() else None,
    )
