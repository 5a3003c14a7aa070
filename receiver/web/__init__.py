"""The doors: HTTP in, a verdict out.

`door` and `transfer` know no framework; `public` and `admin` put Flask before them. May not see SQLAlchemy or the
database: what a door needs of those comes in as a Protocol.
"""
