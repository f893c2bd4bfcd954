"""Every LORRY_ variable, with its default and meaning. `lorry settings` prints this list."""

from __future__ import annotations

import ipaddress
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SecretsSettingsSource, SettingsConfigDict

from service.gpus import check_gpus
from service.queue_names import needs_of

_SECRETS_DIR = "/run/secrets"


class Settings(BaseSettings):
    """Settings read once per process from LORRY_… environment variables, then from files in LORRY_SECRETS_DIR."""

    model_config = SettingsConfigDict(env_prefix="LORRY_", extra="ignore")

    host: str = Field(
        "127.0.0.1", description="Address the API listens on. Without LORRY_API_KEY only loopback is allowed."
    )
    port: int = Field(8321, ge=0, le=65535, description="Port the API listens on.")
    data_dir: Path = Field(
        Path("data"),
        description="Folder for uploads, checkpoints, adapters, exports and the SQLite file. An fsspec URL that several hosts share (s3://bucket/lorry) takes its place with Postgres; LORRY_CACHE_DIR is this machine's part then.",
    )
    storage_url: str | None = Field(
        None, description="The URL in LORRY_DATA_DIR, if it is one; not to be set by itself."
    )
    storage_options: dict[str, Any] = Field(
        {}, description="fsspec's options for that URL, as JSON. What the AWS_… variables say need not be in it."
    )
    cache_dir: Path = Field(
        Path("cache"),
        description="If LORRY_DATA_DIR is a URL: folder for what a run is making and for what was fetched.",
    )
    cache_bytes: int = Field(
        50 * 1024**3,
        ge=0,
        description="What was fetched from LORRY_DATA_DIR and is not in use stays in LORRY_CACHE_DIR up to this many bytes, the last used longest.",
    )
    token_cache_bytes: int = Field(
        10 * 1024**3,
        ge=0,
        description="Data that jobs and dry runs have tokenised stay in the data folder up to this many bytes, the last used longest, and are read there the next time; 0: every run tokenises for itself.",
    )
    database_url: str | None = Field(
        None,
        description="SQLAlchemy URL, e.g. postgresql+psycopg://user:password@host/db. Default: lorry.db in the data folder.",
    )
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Redis-protocol server that carries the queue.")
    queue: str = Field(
        "lorry",
        pattern=r"^[^\s:,]+$",
        description="Name of the queue, without colon or comma; those by need and priority add to it. Installations that share a server need one each.",
    )
    worker_queues: str = Field(
        "auto",
        description="Jobs that a worker takes, by need: any, cpu, gpu, pool:NAME, separated by commas, the first ones first; auto: any and cpu, and before them gpu where there is an NVIDIA GPU.",
    )
    gpus: str = Field(
        "auto",
        description="GPUs that a worker owns, as CUDA_VISIBLE_DEVICES names them, separated by commas: a job takes the first ones, as many as its resources.gpus says. auto: all there are. cpu,cpu: as many processes without a GPU, to try jobs of several on a machine that has none.",
    )
    engine_url: str = Field(
        "http://127.0.0.1:8322",
        description="Generation engine (lorry engine, or a vLLM server); several, of one base or of different ones, separated by commas.",
    )
    engine_host: str = Field("127.0.0.1", description="Address `lorry engine` listens on.")
    engine_port: int = Field(8322, ge=0, le=65535, description="Port `lorry engine` listens on.")
    engine_dtype: str = Field(
        "auto",
        description="Engine weights: auto (bfloat16 on a GPU; on a CPU the files' own type, computed in float32), bfloat16, float16, float32.",
    )
    engine_load_in_4bit: bool = Field(False, description="Load the engine's base model in NF4.")
    engine_max_seq_length: int = Field(2048, ge=16, description="Longest prompt plus completion, in tokens.")
    engine_max_queue: int = Field(64, ge=1, description="Requests waiting for the engine before it answers 503.")
    engine_max_batch: int = Field(16, ge=1, description="Requests the engine runs at once.")
    engine_max_adapters: int = Field(
        16, ge=1, description="Adapters kept loaded in the engine; the least recently used leaves first."
    )
    engine_adapter_bytes: int = Field(
        0,
        ge=0,
        description="Memory of the adapters kept loaded, in bytes of the engine's device; 0: half of what a GPU has free once the engine has started, all of what a CPU's host has.",
    )
    engine_adapter_host_bytes: int | None = Field(
        None,
        ge=0,
        description="Host memory, in bytes, for copies of an engine's adapters on a GPU, from where one that left comes back in milliseconds; unset: a quarter of what is free.",
    )
    engine_cuda_graphs: bool = Field(
        True,
        description="Capture the engine's decode steps as CUDA graphs: a start some seconds longer, then faster steps.",
    )
    engine_cache_bytes: int = Field(
        0,
        ge=0,
        description="Key-value memory of the engine, in bytes; 0 takes what a full batch of longest requests needs, within half of what is free.",
    )
    engine_memory_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Most of a GPU's memory that the engine takes, as a fraction of all of it; its key-value memory is made to fit.",
    )
    train_memory_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Most of a GPU's memory that a job takes, as a fraction of all of it; beyond that it is out of memory, whatever is free. Estimates and dry runs count it.",
    )
    gpu_policy: Literal["shared", "exclusive"] = Field(
        "shared",
        description="What a worker and the engine on its GPU do while a job runs: shared, both within their memory; exclusive, the engine gives its memory up and answers 503.",
    )
    gpu_engines: str | None = Field(
        None,
        description="With exclusive: URLs of the engines on this worker's GPU, separated by commas. Default: those of LORRY_ENGINE_URL with a loopback address.",
    )
    gpu_grace_seconds: float = Field(
        10.0,
        ge=0,
        le=600,
        description="With exclusive: how long the engine's requests may take to end before they are paused for the job.",
    )
    gpu_lease_seconds: float = Field(
        60.0,
        ge=2,
        le=600,
        description="With exclusive: the engine wakes up by itself after this long without a word from the job.",
    )
    base_model: str = Field(
        "smollm2-135m-instruct",
        description="Base model of the engine and of specs that name none: built-in name, hub id or folder.",
    )
    api_key: str | None = Field(None, description="If set, every call but health needs it as a bearer token.")
    secrets_dir: Path = Field(
        Path(_SECRETS_DIR),
        description="Folder of secrets as files, each named like its variable in small letters (lorry_api_key, lorry_database_url), and hf_token. A variable goes before its file.",
    )
    allow_public: bool = Field(False, description="Allow a non-loopback LORRY_HOST without LORRY_API_KEY.")
    max_upload_bytes: int = Field(2 * 1024**3, ge=1, description="Largest upload, in bytes.")
    trust_remote_code: bool = Field(False, description="Let model repositories run their own code while loading.")
    llama_cpp_dir: Path | None = Field(
        None,
        description="llama.cpp checkout with a built llama-quantize, for GGUF exports, instead of the packaged converter and quantiser.",
    )
    max_attempts: int = Field(3, ge=1, description="Attempts at a job before it fails for good.")
    dry_runs: int = Field(
        2, ge=0, description="Dry runs that an API process carries out at once, each in a process of its own; 0: none."
    )
    dry_run_seconds: float = Field(300.0, gt=0, description="How long a dry run may take before it is ended.")
    heartbeat_seconds: float = Field(2.0, gt=0, description="How often a running job says it is alive.")
    heartbeat_timeout_seconds: float = Field(
        20.0, gt=0, description="A running job silent for this long is taken for dead."
    )
    reconcile_seconds: float = Field(
        5.0, gt=0, description="How often SQL is compared with the queue and the heartbeats."
    )
    shutdown_seconds: float = Field(
        60.0, gt=0, description="How long a worker may take to checkpoint its job when told to stop."
    )
    torch_threads: int = Field(
        0, ge=0, description="CPU threads of training, of tokenising and of the engine; 0 leaves the libraries' choice."
    )
    sse_ping_seconds: float = Field(15.0, gt=0, description="Interval of SSE comments that keep idle connections open.")
    slow_reader_seconds: float = Field(
        30.0,
        gt=0,
        description="A client that takes nothing of its answer, or sends nothing of its upload, for this long is cut off.",
    )
    reuse_port: bool = Field(
        False, description="Let several `lorry api` share LORRY_PORT: for a restart without a gap, old beside new."
    )
    log_level: str = Field("INFO", description="Log level of every process.")
    log_format: Literal["text", "json"] = Field(
        "text", description="text, or json: one JSON object a line, with job, attempt, run and request ids."
    )
    access_log: bool = Field(True, description="A log line for each request to the API and to the engine.")

    prune_seconds: float = Field(
        3600.0,
        ge=0,
        description="How often an API process looks for what the settings below let go; 0: only `lorry prune` does.",
    )
    keep_optimizer_days: float = Field(
        1.0,
        ge=0,
        description="Days after a job's end that its checkpoints keep optimizer states, which nothing reads any more; inf: for good.",
    )
    keep_checkpoints_days: float = Field(
        float("inf"),
        ge=0,
        description="Days after a succeeded job's end that its checkpoints can be served; inf: until its adapter is deleted.",
    )
    keep_failed_days: float = Field(
        30.0,
        ge=0,
        description="Days after a failed or cancelled job's end that its checkpoints and a refused export stay; inf: for good.",
    )
    keep_uploads_days: float = Field(
        float("inf"),
        ge=0,
        description="Days that an upload stays after it came or the last job that reads it ended; inf: until it is deleted.",
    )
    keep_events_days: float = Field(
        30.0,
        ge=0,
        description="Days after a job's end that its progress, metrics and log events can be replayed; its status events and its series stay. inf: for good.",
    )
    keep_logs_days: float = Field(
        90.0, ge=0, description="Days after a job's end that its log and TensorBoard files stay; inf: for good."
    )

    @model_validator(mode="before")
    @classmethod
    def _url_or_folder(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = str(values.get("data_dir") or "")
        if "://" in given:
            values = {**values, "storage_url": given, "data_dir": values.get("cache_dir") or Path("cache")}
        return values

    @model_validator(mode="after")
    def _several_hosts_need_postgres(self) -> Settings:
        if self.storage_url and not self.database_url:
            raise ValueError("LORRY_DATA_DIR is a URL, which several hosts share: set LORRY_DATABASE_URL to Postgres")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        folder = Path(os.environ.get("LORRY_SECRETS_DIR") or _SECRETS_DIR)
        files = (SecretsSettingsSource(settings_cls, folder),) if folder.is_dir() else ()
        return (init_settings, env_settings, *files)

    @field_validator("engine_url")
    @classmethod
    def _check_engine_url(cls, text: str) -> str:
        if not _checked(text):
            raise ValueError("names no engine")
        return text

    @field_validator("gpu_engines")
    @classmethod
    def _check_gpu_engines(cls, text: str | None) -> str | None:
        _checked(text or "")
        return text

    @property
    def engine_urls(self) -> list[str]:
        """The engines' URLs, in the order in which they are named."""
        return _listed(self.engine_url)

    @property
    def gpu_engine_urls(self) -> list[str]:
        """URLs of the engines that share this host's GPU with its workers."""
        if self.gpu_engines is not None:
            return _listed(self.gpu_engines)
        return [url for url in self.engine_urls if _is_loopback(urlsplit(url).hostname or "")]

    @field_validator("worker_queues")
    @classmethod
    def _check_worker_queues(cls, text: str) -> str:
        needs_of(text, gpu=False)
        return text

    @field_validator("gpus")
    @classmethod
    def _check_gpus(cls, text: str) -> str:
        return check_gpus(text)

    @property
    def sqlalchemy_url(self) -> str:
        """The database URL in force."""
        if self.database_url:
            return self.database_url
        return f"sqlite:///{self.data_dir.absolute() / 'lorry.db'}"

    @property
    def models_dir(self) -> Path:
        return self.data_dir / "models"

    @property
    def tokens_dir(self) -> Path:
        """Where tokenised data are kept; nothing but a cache, and this machine's also if the data root is a URL."""
        return self.data_dir / "tokens"

    def job_dir(self, job_id: str) -> Path:
        """Run folder of a job: checkpoints, TensorBoard files, log."""
        return self.data_dir / "jobs" / job_id

    @property
    def files_dir(self) -> Path:
        return self.data_dir / "files"

    @property
    def adapters_dir(self) -> Path:
        return self.data_dir / "adapters"

    @property
    def exports_dir(self) -> Path:
        return self.data_dir / "exports"


def _listed(text: str) -> list[str]:
    return [part.strip().rstrip("/") for part in text.split(",") if part.strip()]


def _checked(text: str) -> list[str]:
    """A list of engines' URLs. Raises ValueError for what is none, and for one that is there twice."""
    seen: set[str] = set()
    for url in _listed(text):
        parts = urlsplit(url)
        where = parts.netloc.rpartition("@")[2] + parts.path
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(
                f"{where or url!r} is no engine's URL; give e.g. http://engine:8322, several with commas between"
            )
        if where in seen:
            raise ValueError(f"{where} is named twice")
        seen.add(where)
    return _listed(text)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The process's settings, read on first use."""
    return Settings()
