"""${message}.

Revision: ${up_revision}, after ${down_revision | comma,n}.
"""
<%text>
# A release upgrades the database first and its hosts one by one: the code before this revision goes on working on it.
# So a release expands (new tables, new columns that may be left out), and what nothing needs any more is taken away by a
# later one.
#
# oldest_code: the oldest revision whose code runs on what this one makes. Code that does not know that revision refuses
# to work. One that only expands keeps its predecessor's; one that takes away names the first revision whose code does
# without. On tables that the feed writes to, nothing may rewrite or read the whole table under a lock, and an index is
# built `with op.get_context().autocommit_block(): op.create_index(..., postgresql_concurrently=True,
# if_not_exists=True)`, on a partitioned table with receiver.storage.queue.partitions.build_index.
# tests/test_revisions.py holds all this.
</%text>
import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None
oldest_code = ${repr(down_revision)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
