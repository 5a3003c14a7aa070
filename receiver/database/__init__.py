"""PostgreSQL itself: engine, embedded server, migrations, schema compatibility, clock.

Called by every room that stores or reads something.

Must not know what the tables mean: that is `receiver.storage`.
"""
