"""Vacuum long-lived tables before a fifth of their rows is dead.

Revision: 0004, after 0003.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
oldest_code = "0001"

# Each row of these tables is updated soon after it was written, and then stays unchanged for years: dead rows are at
# the end, in pages that the visibility map names. By default a vacuum starts at a fifth of all rows. Until then, every
# search for pending rows steps over the index entries of finished ones.
_TABLES = ("messages", "deliveries", "outbound_requests")
_SETTINGS = {
    "autovacuum_vacuum_scale_factor": "0.01",
    "autovacuum_vacuum_threshold": "200",
    "autovacuum_analyze_scale_factor": "0.02",
}


def upgrade() -> None:
    settings = ", ".join(f"{name} = {value}" for name, value in _SETTINGS.items())
    for table in _TABLES:
        op.execute(f"ALTER TABLE {table} SET ({settings})")


def downgrade() -> None:
    for table in reversed(_TABLES):
        op.execute(f"ALTER TABLE {table} RESET ({', '.join(_SETTINGS)})")
