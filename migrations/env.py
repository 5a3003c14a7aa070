"""Alembic environment: runs the revisions on the connection of receiver.database.migrations, inside its advisory lock.

Must not open its own connection: the only way to migrate is `redox-receiver db upgrade`.
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
    """Store which code runs on the schema of a step: older code checks this before it works."""
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
