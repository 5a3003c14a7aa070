"""The codes of findings, with a line each. They are a contract: monitoring selects by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CODES: Final[Mapping[str, str]] = {
    "registry_key_missing": "Rows of the registry are signed with a key that the keyring of this host lacks.",
    "registry_row_changed": "Rows of the registry were changed by something else, and are not in force.",
    "key_set_stale": "Public keys of a URL are too old to be trusted: their kind is answered 503.",
    "key_set_failing": "Public keys of a URL could not be fetched; the old ones are still in use.",
    "clock": "The clocks of this host and of the database differ.",
    "no_receiver": "No receiver is running anywhere.",
    "receiver_stopped": "The receiver of a host has stopped; a warning when it was stopped in order.",
    "admin_stopped": "The admin listener of a host has stopped (warning).",
    "no_worker": "Deliveries or outbound requests need a worker, and none is running.",
    "outbox_pending": "Outbound requests fail and are tried again.",
    "outbox_held": "Outbound requests are held since a restore.",
    "outbox_dead": "Redox refused outbound requests for good.",
    "no_credential": "A destination has no live credential of a kind that it requires, so it refuses everything.",
    "no_source": "A destination that lets in registered sources alone has none.",
    "no_handler": "A destination has no handler (warning).",
    "credential_expires": "A credential ends within 30 days (warning).",
    "feed_silent": "No message came for longer than is expected, or than is usual.",
    "requests_refused": "Recent requests to a destination are mostly refused, for one reason; 503 counts as refused.",
    "requests_unavailable": "Requests were answered 503 before a registry was loaded, or for an internal error.",
    "destination_unknown": "Requests came for a destination that does not exist (warning).",
    "probably_paused": "Redox was refused and has probably paused the feed.",
    "sources_refused": "Messages named a source that is not registered.",
    "lane_held": "A lane is held after its first delivery used up its attempts.",
    "handler_paused": "A handler is paused.",
    "deliveries_held": "Deliveries are on hold since a restore.",
    "handler_not_loaded": "Deliveries wait for a handler that no running worker has loaded.",
    "plugin_not_loaded": "A worker could not load a plugin.",
    "handler_not_started": "A worker has loaded a handler, but the processes that run it do not start.",
    "handler_failing": "Pending deliveries of a handler have failed twice or more, or are put off for long.",
    "responder_missing": "Queries were answered 501: no responder for them is enabled, or it cannot be loaded.",
    "responder_failed": "Queries were answered 500: the responder failed.",
    "responder_late": "Queries were answered 504: the responder took longer than its timeout.",
    "dead": "Deliveries are dead.",
    "backlog": "The oldest delivery waits for longer than --max-age.",
    "deliveries_never_tried": "Deliveries wait for longer than --max-age and were never tried, with a worker running.",
    "unhandled": "Recent messages at a production destination matched no handler.",
    "quarantine": "Messages are in quarantine.",
}
