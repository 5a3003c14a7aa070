"""Add requests to Redox: signing keys, API keys, and the outbox.

Revision: 0002, after 0001.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None
oldest_code = "0001"


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("environment", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("base_url", sa.Text(), nullable=False),
        sa.Column("source_id", sa.Text(), nullable=True),
        sa.Column("client_id", sa.Text(), nullable=True),
        sa.Column("kid", sa.Text(), nullable=True),
        sa.Column("scope", sa.Text(), nullable=True),
        sa.Column("query_path", sa.Text(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=True),
        sa.Column("secret_key", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("mac", sa.LargeBinary(), nullable=False),
        sa.Column("mac_key", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "environment IN ('development', 'staging', 'production')", name=op.f("ck_api_keys_environment")
        ),
        sa.CheckConstraint("kind IN ('oauth', 'legacy')", name=op.f("ck_api_keys_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("name", name=op.f("uq_api_keys_name")),
    )
    op.create_table(
        "signing_keys",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("kid", sa.Text(), nullable=False),
        sa.Column("algorithm", sa.Text(), nullable=False),
        sa.Column("public_jwk", postgresql.JSONB(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=True),
        sa.Column("secret_key", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("activated_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("retired_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("mac", sa.LargeBinary(), nullable=False),
        sa.Column("mac_key", sa.Text(), nullable=False),
        sa.CheckConstraint("algorithm IN ('RS384', 'ES384')", name=op.f("ck_signing_keys_algorithm")),
        sa.CheckConstraint("state IN ('published', 'active', 'retired')", name=op.f("ck_signing_keys_state")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_signing_keys")),
        sa.UniqueConstraint("kid", name=op.f("uq_signing_keys_kid")),
    )
    op.create_index(
        "uq_signing_keys_active", "signing_keys", ["state"], unique=True, postgresql_where=sa.text("state = 'active'")
    )
    op.create_table(
        "outbound_requests",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("uuid", sa.UUID(), nullable=False),
        sa.Column("api_key", sa.Text(), nullable=False),
        sa.Column("lane", sa.Text(), nullable=True),
        sa.Column("call", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("message_uuid", sa.UUID(), nullable=True),
        sa.Column("destination_id", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("unanswered", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("ready_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("error_class", sa.Text(), nullable=True),
        sa.Column("log_ids", sa.ARRAY(sa.Text()), server_default=sa.text("'{}'::text[]"), nullable=False),
        sa.Column("request", sa.LargeBinary(), nullable=True),
        sa.Column("request_key", sa.Text(), nullable=True),
        sa.Column("answer", sa.LargeBinary(), nullable=True),
        sa.Column("answer_key", sa.Text(), nullable=True),
        sa.Column("epoch", sa.BigInteger(), nullable=True),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("call IN ('send', 'query', 'fhir', 'upload')", name=op.f("ck_outbound_requests_call")),
        sa.CheckConstraint("state IN ('pending', 'sent', 'dead', 'held')", name=op.f("ck_outbound_requests_state")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbound_requests")),
        sa.UniqueConstraint("uuid", name=op.f("uq_outbound_requests_uuid")),
    )
    op.create_index(op.f("ix_outbound_requests_message_uuid"), "outbound_requests", ["message_uuid"], unique=False)
    op.create_index(
        "ix_outbound_requests_pending",
        "outbound_requests",
        ["lane", "id"],
        unique=False,
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_index(
        "ix_outbound_requests_unsent",
        "outbound_requests",
        ["state", "id"],
        unique=False,
        postgresql_where=sa.text("state IN ('dead', 'held')"),
    )


def downgrade() -> None:
    op.drop_index(
        "ix_outbound_requests_unsent",
        table_name="outbound_requests",
        postgresql_where=sa.text("state IN ('dead', 'held')"),
    )
    op.drop_index(
        "ix_outbound_requests_pending", table_name="outbound_requests", postgresql_where=sa.text("state = 'pending'")
    )
    op.drop_index(op.f("ix_outbound_requests_message_uuid"), table_name="outbound_requests")
    op.drop_table("outbound_requests")
    op.drop_index("uq_signing_keys_active", table_name="signing_keys", postgresql_where=sa.text("state = 'active'"))
    op.drop_table("signing_keys")
    op.drop_table("api_keys")
