"""The base model and one step of it: packed tokens in, one row of logits for each request that samples out."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.modeling_utils import AttentionInterface

from service.errors import JobFailure
from service.settings import Settings
from service.templates import StoredTemplate
from worker import base_model
from worker.data import base_template
from worker.engine.adapters import BaseInfo, tokenizer_hash
from worker.engine.cache import PagedCache
from worker.engine.cpu.decoder import CpuDecoder
from worker.engine.cpu.linear import CpuLinear
from worker.engine.lora import LoraBank, segments
from worker.engine.request import Request
from worker.engine.sampling import Chosen
from worker.engine.scheduler import Scheduled
from worker.engine.sleep import free_memory, room_left

if TYPE_CHECKING:
    from worker.engine.gpu.steps import GpuSteps

log = logging.getLogger("lorry.engine")
BLOCK_SIZE = 16  # tokens
_runners = itertools.count()


class UnsupportedModel(Exception):
    """The base model is built in a way that packed steps and paged memory do not fit."""


class ModelRunner:
    """Holds the base model, its cache and the adapter sites. `forward` is called from one thread only."""

    def __init__(self, settings: Settings, *, num_blocks: int | None = None, kernels: bool | None = None) -> None:
        """`kernels`: whether to use the GPU's own (worker/engine/gpu); by default, where there is a GPU."""
        if settings.torch_threads:
            torch.set_num_threads(settings.torch_threads)
        self.name = settings.base_model
        self.load_in_4bit = settings.engine_load_in_4bit
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            # cuDNN's attention plans anew for every shape, milliseconds a layer, and here every step has a new one.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.path = base_model.resolve(settings.base_model, settings)
        linear = _cpu_linear() if self.device.type == "cpu" and not kernels else None
        self.dtype = _dtype(settings.engine_dtype, self.device)
        held: torch.dtype | str = self.dtype
        if linear is not None and not self.load_in_4bit:
            # Computed in float32 from weights in any type: without a wish, in that of the files.
            held = "auto" if settings.engine_dtype == "auto" else self.dtype
            self.dtype = torch.float32
        self.model = _load_model(self.path, held, self.device, settings)
        if linear is not None and not self.load_in_4bit:
            linear.widen(self.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=settings.trust_remote_code)
        self.template = _template(self.tokenizer)
        config = self.model.config.get_text_config()
        self.max_model_len = min(
            settings.engine_max_seq_length,
            getattr(config, "max_position_embeddings", None) or settings.engine_max_seq_length,
        )
        self.eos_token_ids = _eos_ids(self.model, self.tokenizer)
        self.vocab_size = int(self.model.get_input_embeddings().weight.shape[0])
        self.bank = LoraBank(
            self.model, self.model.get_output_embeddings(), linear if self.dtype == torch.float32 else None
        )
        self.cache = PagedCache(BLOCK_SIZE, self.device)
        _attend_with(self.model, self.cache)
        self._probe(config.num_hidden_layers)
        # The memory bound: what every place in the batch could need, within the budget.
        wanted = settings.engine_max_batch * -(-self.max_model_len // BLOCK_SIZE)
        per_block = self.cache.bytes_per_block(self.dtype)
        # The rest is for adapters.
        free = min(free_memory(self.device) // 2, room_left(settings.engine_memory_fraction, self.device) * 3 // 4)
        budget = settings.engine_cache_bytes or free
        self.num_blocks = num_blocks or max(1, min(wanted, budget // per_block))
        self.cache.allocate(self.num_blocks, self.dtype)
        self.max_model_len = min(self.max_model_len, self.num_blocks * BLOCK_SIZE)
        self.max_step_tokens = max(self._chunk(), settings.engine_max_batch)
        use = self.device.type == "cuda" if kernels is None else kernels
        self._graphs = self._released = False  # whether steps are captured; whether they have been given up
        self._gpu = self._gpu_steps(settings) if use else None
        self._cpu = self._cpu_decoder() if self.bank.kernel is not None else None
        log.info(
            "base %s in %s on %s: %d cache blocks of %d tokens (%.0f MiB), up to %d tokens a request",
            self.name,
            "nf4" if self.load_in_4bit else self.dtype,
            self.device,
            self.num_blocks,
            BLOCK_SIZE,
            self.num_blocks * per_block / 2**20,
            self.max_model_len,
        )

    def base_info(self) -> BaseInfo:
        names = frozenset({self.name, self.path, str(self.model.config._name_or_path or self.path)})
        folder = Path(self.path)
        return BaseInfo(
            names=names,
            model=self.model,
            head=self.bank.head,
            tokenizer=self.tokenizer,
            tokenizer_hash=tokenizer_hash(folder) if folder.is_dir() else None,
            template=self.template,
            dtype=self.dtype,
            device=self.device,
        )

    def _chunk(self) -> int:
        """Tokens of a step: long enough to use the device, short enough not to be felt by running streams."""
        if self.device.type == "cpu":
            return 256
        # About 30 ms of products at 400 TFLOP/s, which a GPU of 2023 gets; on a smaller one streams feel it.
        tokens = 6_000_000_000_000 // max(1, self.model.num_parameters())
        return int(min(4096, max(2048, tokens)))

    def _gpu_steps(self, settings: Settings) -> GpuSteps | None:
        try:
            from worker.engine.gpu.steps import GpuSteps

            steps = GpuSteps(
                self.model,
                self.bank,
                self.cache,
                max_batch=settings.engine_max_batch,
                max_adapters=settings.engine_max_adapters,
                max_positions=self.max_model_len,
                max_step_tokens=self.max_step_tokens,
            )
        except (ImportError, ValueError) as error:
            log.warning("%s is served without the engine's own kernels, far slower: %s", self.name, error)
            return None
        if self.device.type == "cuda" and settings.engine_cuda_graphs:
            self._graphs = self._capture(steps)
        return steps

    def _cpu_decoder(self) -> CpuDecoder | None:
        try:
            return CpuDecoder(self.model, self.bank, self.cache, self.max_model_len)
        except ValueError as error:
            log.warning("%s is served module by module, slower: %s", self.name, error)
            return None

    def _capture(self, steps: GpuSteps) -> bool:
        try:
            steps.capture()
        except RuntimeError as error:
            log.warning("%s is served without CUDA graphs: %s", self.name, error)
            torch.cuda.synchronize()
        return steps.captured

    def release_graphs(self) -> None:
        """Let weights, adapters and cache move or go: nothing here refers to where they are. The next step takes all back."""
        if self._gpu is not None:
            self._gpu.release()
            self._released = True
        if self._cpu is not None:
            self._cpu.release()

    def _restore_graphs(self, steps: GpuSteps) -> None:
        self._released = False
        steps.prepare()
        if self._graphs:
            self._graphs = self._capture(steps)

    def runs_ahead(self, requests: list[Request]) -> bool:
        """Whether a step of these can be launched from tokens that are still on the device."""
        return self._gpu is not None and all(self._gpu.slots.fits(r.adapter) for r in requests)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def forward(self, step: list[Scheduled], previous: Chosen | None = None) -> tuple[torch.Tensor, list[Scheduled]]:
        """Launch a step. Returns float logits [rows, vocabulary] and the scheduled requests they belong to, row by row.

        `previous`, where `runs_ahead` allows it, has the step's tokens, which the requests do not have yet.
        """
        if self._gpu is not None and self._released:
            self._restore_graphs(self._gpu)
        if self._gpu is not None and self._gpu.accepts(step):
            return self._gpu.run(step, previous)
        if self._cpu is not None and self._cpu.accepts(step):
            return self._cpu.run(step)
        # Decodes first, as the cache wants them; neighbours of the same adapter share a segment.
        order = sorted(step, key=lambda s: (not (s.count == 1 and s.start > 0), id(s.request.adapter)))
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for s in order:
            ids += s.request.tokens(s.start, s.start + s.count)
            positions += range(s.start, s.start + s.count)
            if s.samples:
                rows.append(len(ids) - 1)
        sampling = [s for s in order if s.samples]
        self.bank.token_segments = segments([s.request.adapter for s in order], [s.count for s in order])
        self.bank.row_segments = segments([s.request.adapter for s in sampling], [1] * len(sampling))
        self.cache.step = self.cache.plan(order)
        out = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            logits_to_keep=torch.tensor(rows or [len(ids) - 1], device=self.device),
            use_cache=False,
        )
        return out.logits[0][: len(rows)], sampling

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _probe(self, layers: int) -> None:
        """A pass over a few tokens, which tells the cache each layer's shape and whether the model can be served at all."""
        self.cache.step = None
        try:
            self.model(
                input_ids=torch.arange(4, device=self.device)[None],
                position_ids=torch.arange(4, device=self.device)[None],
                use_cache=False,
            )
        except NotImplementedError as error:
            raise UnsupportedModel(f"{self.name}: {error}") from error
        if set(self.cache.shapes) != set(range(layers)):
            raise UnsupportedModel(
                f"{self.name}: only {len(self.cache.shapes)} of its {layers} layers are attention through "
                "transformers' attention interface"
            )


def _cpu_linear() -> CpuLinear | None:
    try:
        return CpuLinear()
    except OSError as error:
        log.warning("the CPU's kernels are left out, which makes steps slower: %s", error)
        return None


def _load_model(path: str, dtype: torch.dtype | str, device: torch.device, settings: Settings) -> Any:
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "device_map": {"": device},
        "attn_implementation": "sdpa",
        "trust_remote_code": settings.trust_remote_code,
    }
    if settings.engine_load_in_4bit:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


def _attend_with(model: nn.Module, cache: PagedCache) -> None:
    """Route the model's attention to the cache. A name of its own, because the registry is the process's."""
    name = f"lorry_paged_{next(_runners)}"
    AttentionInterface.register(name, cache.attention)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            # Unknown to transformers' mask functions on purpose: they then make no mask, which would be as large as the
            # square of the step.
            config._attn_implementation = name


def _template(tokenizer: Any) -> StoredTemplate | None:
    try:
        return base_template(tokenizer)
    except JobFailure as error:  # no end token, or a chat template that does not compile: raw prompts can be served
        log.warning("the base has no usable template: %s", error.message)
        return None


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"LORRY_ENGINE_DTYPE: {name} is none of auto, bfloat16, float16, float32")
    found: torch.dtype = getattr(torch, name)
    return found


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """End tokens: the generation config's (Llama 3 Instruct has several), the config's and the tokenizer's."""
    ids: set[int] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if value is not None:
            ids.update(value if isinstance(value, list) else [value])
    return frozenset(ids)
