"""gunicorn's logger, which writes lines as receiver.logs does."""

from __future__ import annotations

from typing import Any

from gunicorn.glogging import Logger  # type: ignore[import-untyped]  # gunicorn ships no types

from receiver import logs


class JsonLogger(Logger):  # type: ignore[misc]  # gunicorn ships no types
    """gunicorn's logger."""

    def setup(self, cfg: Any) -> None:
        """Configure logging with gunicorn's `loglevel`."""
        self.cfg = cfg
        logs.configure(cfg.loglevel)
        for name in ("critical", "error", "warning", "info", "debug", "exception"):
            # Called directly, because a log line shows where it was written.
            setattr(self, name, getattr(self.error_log, name))

    def reopen_files(self) -> None:
        """Do nothing: lines go to standard error."""

    def close_on_exec(self) -> None:
        """Do nothing: there is no file."""
