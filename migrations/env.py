"""Runs the revisions on the connection that receiver.database.migrations hands over, inside its advisory lock.

May not open a connection of its own: there is one way to migrate, `redox-receiver db upgrade`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo

from receiver.database.migrations import include_object, mark
from receiver.storage.schema import metadata

connection = context.config.attributes["connection"]


def leave_word(
    ctx: MigrationContext,  # noqa: ARG001
    step: MigrationInfo,  # noqa: ARG001
    heads: Collection[Any],
    run_args: Mapping[str, Any],  # noqa: ARG001
) -> None:
    """Say in the database which code runs on the schema that a step has made: older code asks before it works."""
    for revision in heads:
        mark(connection, context.script.get_revision(revision).module.oldest_code)


context.configure(
    connection=connection,
    target_metadata=metadata,
    compare_server_default=True,
    include_object=include_object,
    transaction_per_migration=True,
    on_version_apply=leave_word,
)
with context.begin_transaction():
    context.run_migrations()
