"""The engine's own Prometheus numbers.

An adapter's name, "" being the base, is a label of counters and sums only: a histogram each would be too many series.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class EngineMetrics:
    """One registry an engine, so that several in one process (tests) do not meet."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.queue_seconds = Histogram(
            "lorry_engine_queue_seconds", "Arrival to first step.", buckets=_SECONDS, registry=r
        )
        self.first_token_seconds = Histogram(
            "lorry_engine_first_token_seconds", "Arrival to first token.", buckets=_SECONDS, registry=r
        )
        self.adapter_first_token_seconds = Summary(
            "lorry_engine_adapter_first_token_seconds",
            "Arrival to first token, by adapter: sum and count.",
            ["adapter"],
            registry=r,
        )
        self.token_seconds = Histogram(
            "lorry_engine_token_seconds",
            "Mean time of a request's tokens after its first.",
            buckets=_SECONDS,
            registry=r,
        )
        self.step_seconds = Histogram("lorry_engine_step_seconds", "Duration of a step.", buckets=_SECONDS, registry=r)
        self.batch_size = Histogram(
            "lorry_engine_batch_size", "Requests in a step.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), registry=r
        )
        self.prompt_tokens = Counter("lorry_engine_prompt_tokens", "Prompt tokens taken in.", ["adapter"], registry=r)
        self.completion_tokens = Counter("lorry_engine_completion_tokens", "Tokens generated.", ["adapter"], registry=r)
        self.requests = Counter(
            "lorry_engine_requests", "Requests ended, by reason.", ["adapter", "finish_reason"], registry=r
        )
        self.refused = Counter("lorry_engine_refused", "Requests turned away because the queue was full.", registry=r)
        self.running = Gauge("lorry_engine_running", "Requests in the batch.", registry=r)
        self.waiting = Gauge("lorry_engine_waiting", "Requests waiting for a place.", registry=r)
        self.adapters_loaded = Gauge("lorry_engine_adapters_loaded", "Adapters in memory.", registry=r)
        self.evictions = Counter("lorry_engine_adapter_evictions", "Adapters that left memory for others.", registry=r)
        self.adapter_reads = Counter(
            "lorry_engine_adapter_reads",
            "Adapters brought into memory, from the disk or the host.",
            ["source"],
            registry=r,
        )
        self.preemptions = Counter(
            "lorry_engine_preemptions", "Requests put back because cache blocks ran out.", registry=r
        )
        self.cache_blocks = Gauge("lorry_engine_cache_blocks", "Cache blocks the engine has.", registry=r)
        self.cache_blocks_used = Gauge("lorry_engine_cache_blocks_used", "Cache blocks in use.", registry=r)
        self.sleeping = Gauge("lorry_engine_sleeping", "1 while the engine has given its memory up.", registry=r)
        self.sleeps = Counter("lorry_engine_sleeps", "Times the engine has given its memory up.", registry=r)
        self.paused = Counter("lorry_engine_paused", "Requests put back because the engine went to sleep.", registry=r)
