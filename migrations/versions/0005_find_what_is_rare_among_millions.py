"""Find the last refusal and the newest dead deliveries without reading what is not: there are millions of those.

Revision: 0005, after 0004.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
oldest_code = "0001"

# Name, and on what. Nothing of them is written when all goes well: neither accepting nor handling costs more.
_INDEXES = (
    ("ix_audit_events_refused", "audit_events (destination, id) WHERE action = 'message.refuse'"),
    ("ix_deliveries_dead_by_id", "deliveries (id) WHERE state = 'dead'"),
)


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for name, what in _INDEXES:
            # One that was left half built by a step that was interrupted is good for nothing.
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY {name} ON {what}")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        for name, _ in reversed(_INDEXES):
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
