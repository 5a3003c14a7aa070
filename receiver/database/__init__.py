"""PostgreSQL access: engine, embedded server, migrations, schema compatibility, clock.

Must not know what the tables mean: that is `receiver.storage`.
"""
