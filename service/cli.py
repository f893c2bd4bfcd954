"""lorry up | api | worker | engine | migrate | backup | restore | prune | settings"""

from __future__ import annotations

import argparse
import gc
import importlib
import ipaddress
import os
import sys

from pydantic import ValidationError

from service import __version__, operations
from service.gpus import check_gpus
from service.logs import configure
from service.queue_names import needs_of
from service.settings import Settings, get_settings


def main(argv: list[str] | None = None) -> None:
    """The `lorry` command."""
    parser = argparse.ArgumentParser(
        prog="lorry", description="Trains LoRA adapters over HTTP and serves them the moment they are trained."
    )
    parser.add_argument("--version", action="version", version=f"lorry {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("api", help="serve the HTTP API")
    worker = commands.add_parser("worker", help="run jobs from the queues, one at a time")
    worker.add_argument(
        "--queues",
        type=_queues,
        metavar="LIST",
        help="which ones: auto, any, cpu, gpu, pool:NAME, separated by commas (default: LORRY_WORKER_QUEUES)",
    )
    worker.add_argument(
        "--gpus",
        type=_gpus,
        metavar="LIST",
        help="GPUs that this worker owns, as CUDA_VISIBLE_DEVICES names them, e.g. 0,1 (default: LORRY_GPUS)",
    )
    commands.add_parser("engine", help="serve the generation engine")
    migrating = commands.add_parser("migrate", help="bring the database to the newest revision")
    migrating.add_argument("--to", metavar="REVISION", default="head", help="another revision, older ones too")
    operations.add_parsers(commands)
    commands.add_parser("settings", help="print every LORRY_ variable: default, current value, meaning")
    up = commands.add_parser("up", help="all of it on this machine: migrate, queue server, api, worker, engine")
    up.add_argument("--workers", type=_workers, default=1, metavar="N", help="worker processes (default: 1)")
    up.add_argument("--no-engine", action="store_true", help="start no generation engine")
    queue = commands.add_parser("queue-server")  # part of `up`: not for users, so without help
    queue.add_argument("port", type=int)
    arguments = parser.parse_args(argv)
    try:
        settings = get_settings()
    except ValidationError as error:
        problems = "; ".join(
            "".join(f"LORRY_{str(part).upper()}: " for part in e["loc"][:1]) + e["msg"].removeprefix("Value error, ")
            for e in error.errors()
        )
        raise SystemExit(f"lorry: {problems}") from None
    token = settings.secrets_dir / "hf_token"
    if token.is_file():  # where Hugging Face's libraries look for it
        os.environ.setdefault("HF_TOKEN", token.read_text("utf-8").strip())
    match arguments.command:
        case "api":
            api(settings)
        # service never imports worker: `lorry api` must not bring torch in, and a static import would let it. These two
        # commands are the worker's, and hand over to it by name.
        case "worker":
            importlib.import_module("worker.run").main(arguments.queues, arguments.gpus)
        case "engine":
            importlib.import_module("worker.engine.server").main()
        case "migrate":
            operations.migrate(settings, arguments.to)
        case "backup":
            operations.backup(settings, arguments)
        case "restore":
            operations.restore(settings, arguments)
        case "prune":
            operations.prune(settings, arguments)
        case "settings":
            print_settings(settings)
        case "up":
            from service.up import up as start

            check_host(settings)
            sys.exit(start(settings, workers=arguments.workers, engine=not arguments.no_engine))
        case "queue-server":
            from service.up import queue_server

            queue_server(settings, arguments.port)


def api(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, see Server; exit status 0 then."""
    gc.disable()  # imports make much and drop next to nothing: passes of the collector would be a tenth of the start
    from service.app import create_app
    from service.server import api_server, serve

    check_host(settings)
    configure(settings, "api")
    check_database(settings)
    app = create_app(settings)
    # What is loaded by now stays: without this, each full pass of the collector walks all of it and holds up requests
    # for tens of milliseconds.
    gc.freeze()
    gc.enable()
    serve(api_server(app, settings), settings.host, settings.port, reuse_port=settings.reuse_port)


def check_host(settings: Settings) -> None:
    """An open port without a key is everyone's. Raises SystemExit."""
    if settings.api_key or settings.allow_public or _loopback(settings.host):
        return
    raise SystemExit(
        f"lorry: LORRY_HOST is {settings.host}, which others can reach, and LORRY_API_KEY is not set: "
        "set a key, or LORRY_ALLOW_PUBLIC=1 if something in front of it guards the API"
    )


def check_database(settings: Settings) -> None:
    """Raises SystemExit if the database is out of reach or not at the newest revision."""
    from sqlalchemy.exc import SQLAlchemyError

    from service.migrate import is_current

    try:
        current = is_current(settings.sqlalchemy_url)
    except SQLAlchemyError as error:
        raise SystemExit(f"lorry: the database is out of reach: {error}") from None
    if not current:
        raise SystemExit("lorry: the database is not at the newest revision: run `lorry migrate`")


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may stand for any address
        return False


def print_settings(settings: Settings) -> None:
    """Every variable with its default, its value where that differs, and its meaning."""
    lines = []
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        lines += [f"LORRY_{name.upper()}", f"    {field.description}", f"    default: {_shown(name, field.default)}"]
        if value != field.default:
            lines.append(f"    current: {_shown(name, value)}")
    print("\n".join(lines))


def _shown(name: str, value: object) -> str:
    if value is None:
        return "(unset)"
    if name == "api_key":
        return "********"
    if name == "storage_options" and isinstance(value, dict):  # each store has names of its own for its secrets
        return str({key: "********" for key in value})
    if name in ("database_url", "redis_url") and "@" in str(value):
        scheme, _, rest = str(value).partition("://")
        return f"{scheme}://********@{rest.rpartition('@')[2]}"
    return str(value)


def _queues(text: str) -> str:
    try:
        needs_of(text, gpu=False)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _gpus(text: str) -> str:
    try:
        return check_gpus(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _workers(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 64:
        raise argparse.ArgumentTypeError("1 to 64")
    return number


if __name__ == "__main__":
    main()
