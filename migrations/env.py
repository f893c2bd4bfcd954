"""Alembic's entry: runs the migrations on the URL that service.migrate put into the configuration.

All of them in one transaction, on both databases: a migration that fails leaves the database as it was.
"""

from typing import Any

from alembic import context
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import make_url

from service.models import Base

url = context.config.get_main_option("sqlalchemy.url")
engine = create_engine(url)
if make_url(url).get_backend_name() == "sqlite":
    # The driver commits before each change of a table. Foreign keys stay off, as SQLite has them: a table that is made
    # anew by copying must not take the rows that refer to it along when the old one is dropped.
    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys=OFF")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


with engine.connect() as connection:
    if engine.dialect.name == "postgresql":
        # A migration that waits behind a long transaction would make everyone wait behind it: give up instead.
        connection.execute(text("SET lock_timeout = '10s'"))
        connection.commit()
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        compare_type=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()
        if engine.dialect.name == "sqlite" and (broken := connection.execute(text("PRAGMA foreign_key_check")).all()):
            raise RuntimeError(f"the migration would leave rows that refer to nothing: {broken[:5]}")
engine.dispose()
