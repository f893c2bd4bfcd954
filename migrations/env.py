"""Alembic's entry: runs the migrations on the URL that service.migrate put into the configuration."""

from alembic import context
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from service.models import Base

url = context.config.get_main_option("sqlalchemy.url")
engine = create_engine(url)
with engine.connect() as connection:
    if make_url(url).get_backend_name() == "postgresql":
        # A migration that waits behind a long transaction would make everyone wait behind it: give up instead.
        connection.execute(text("SET lock_timeout = '10s'"))
        connection.commit()
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
