"""Record when keys are activated and retired, and which keys each live process holds.

Revision: 0010, after 0009.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None
oldest_code = "0001"


def upgrade() -> None:
    op.add_column("keys", sa.Column("activated_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("keys", sa.Column("retired_at", sa.DateTime(timezone=True), nullable=True))
    # Every key of an earlier release was used from the moment when it was recorded.
    op.execute("UPDATE keys SET activated_at = created_at")
    for table in ("listeners", "workers"):
        op.add_column(
            table, sa.Column("keys", sa.ARRAY(sa.Text()), server_default=sa.text("'{}'::text[]"), nullable=False)
        )


def downgrade() -> None:
    for table in ("listeners", "workers"):
        op.drop_column(table, "keys")
    op.drop_column("keys", "retired_at")
    op.drop_column("keys", "activated_at")
