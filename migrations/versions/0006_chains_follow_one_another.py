"""Link each audit chain to the newest row that its writer saw, so that a chain of one row cannot vanish unseen.

Revision: 0006, after 0005.
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
oldest_code = "0001"


def upgrade() -> None:
    op.execute("ALTER TABLE audit_events ADD COLUMN follows bigint")


def downgrade() -> None:
    op.execute("ALTER TABLE audit_events DROP COLUMN follows")
