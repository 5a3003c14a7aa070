"""Runs the revisions on the connection that receiver.storage.migrations hands over, inside its advisory lock.

May not open a connection of its own: there is one way to migrate, `redox-receiver db upgrade`.
"""

from alembic import context

from receiver.storage.migrations import include_object
from receiver.storage.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, compare_server_default=True,
                  include_object=include_object)
with context.begin_transaction():
    context.run_migrations()
