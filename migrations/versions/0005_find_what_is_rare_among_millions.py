"""Index the last refusal and the newest dead deliveries, which are rare among millions of rows.

Revision: 0005, after 0004.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
oldest_code = "0001"

# Name and columns. They get no entries when all goes well, so that accepting and handling cost no more.
_INDEXES = (
    ("ix_audit_events_refused", "audit_events (destination, id) WHERE action = 'message.refuse'"),
    ("ix_deliveries_dead_by_id", "deliveries (id) WHERE state = 'dead'"),
)


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for name, what in _INDEXES:
            # An index left invalid by an interrupted step cannot be used.
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY {name} ON {what}")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        for name, _ in reversed(_INDEXES):
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
