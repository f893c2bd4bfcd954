"""How much memory a training run will take at its peak, by part, from its spec and the model's config.json. No torch.

On a GPU a figure is what torch.cuda.max_memory_allocated() would say; the CUDA context comes on top. The formulas follow
what Unsloth 2026.10 and bitsandbytes 0.50 do; each constant below says where it comes from. What they were compared with
is in docs/hardware.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from service.specs import CptSpec, IftSpec
from worker.shape import NoEstimate, Shape

__all__ = ["Estimate", "NoEstimate", "Plan", "Shape", "estimate", "largest_batch", "plan", "rows_per_step"]

GIB = 2**30
Device = Literal["cuda", "cpu"]

# bitsandbytes NF4 with double quantisation: half a byte, a byte of scale for each 64 weights, and for each 256 of those
# a float32. (bitsandbytes.functional.quantize_4bit, compress_statistics)
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Trained weights and their gradients are float32 (docs/decisions/0003). Of embeddings the GPU holds 16 bits where a run is
# checkpointed and its optimiser is one of these, whose update goes weight by weight or block by block with two states
# each (worker/split_weights.py, docs/decisions/0019). A GPU that cannot compute in bfloat16 has no such halves.
TRAINED_BYTES, SPLIT_BYTES = 4, 2
SPLIT_OPTIMIZERS = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
# Bytes of optimiser state a trained weight. 8-bit states have two float32 scales for each 256 weights
# (bitsandbytes.optim.optimizer, init_state). Paged states lie in unified memory, which the host lends when the GPU is
# full. Adafactor keeps a row and a column for a matrix.
STATE_BYTES = {
    "adamw_8bit": 2 + 8 / 256, "adamw_bnb_8bit": 2 + 8 / 256, "lion_8bit": 1 + 4 / 256, "ademamix_8bit": 3 + 12 / 256,
    "adamw_torch": 8, "adamw_torch_fused": 8, "lion_32bit": 4, "ademamix": 12, "adagrad": 4, "rmsprop": 4, "sgd": 0,
    "adafactor": 0.01, "paged_adamw_32bit": 0, "paged_adamw_8bit": 0, "paged_lion_32bit": 0, "paged_lion_8bit": 0,
    "paged_ademamix_32bit": 0, "paged_ademamix_8bit": 0,
}  # fmt: skip
# With an 8-bit optimiser embed_tokens keeps 32-bit states (transformers' create_optimizer and Unsloth's
# _create_unsloth_optimizer, register_module_override for every nn.Embedding); lm_head, a linear layer, does not.
EMBED_STATE_BYTES = {"adamw_8bit": 8, "adamw_bnb_8bit": 8, "lion_8bit": 4, "ademamix_8bit": 12}
# On a machine without a GPU Unsloth takes adamw_torch_fused for the 8-bit and the paged ones.
CPU_STATE_BYTES = 8

# Vectors of a pass's tokens that stand throughout the backward pass of a checkpointed model (unsloth_zoo.
# gradient_checkpointing): two staging buffers for inputs that come back from the host, the last layer's input (which is
# not offloaded), the final norm's output, and the gradient on its way down.
KEPT_HIDDEN = 5
# Vectors of one layer while it is computed again and its gradients are: of the hidden size its input, two norms' outputs,
# the outputs of o_proj and down_proj, two residuals and gradients of three; of the size of q the projection, its rotation,
# the attention's output and its copy, keys and values repeated for all heads, and five gradients of these; k, v and their
# gradients; in the MLP gate, up and their product, whose gradients take their places (unsloth.kernels.fast_lora, in place).
LAYER_HIDDEN, LAYER_QUERY, LAYER_KEY, LAYER_MLP = 9, 11, 4, 3
# Without checkpointing, on a CPU: vectors a layer in float32, inputs of the projections, of the norms and of the LoRA branches.
CPU_HIDDEN, CPU_MLP = 14, 6
# The same on a GPU, where Unsloth's fused LoRA layers keep, for each token and layer: of the hidden size the layer's input,
# the two norms' outputs and the residual; queries and the attention's output; keys and values; gate and up.
KEEPS_HIDDEN, KEEPS_QUERY, KEEPS_KEY, KEEPS_MLP = 4, 2, 2, 2
# Rows of logits at a time in Unsloth's fused loss (unsloth_zoo.fused_losses.fused_linear, fused_linear_rows): a power of
# two near tokens × hidden / vocabulary, at least what fills 512 rows of a vocabulary of 151,936, in float32.
CHUNK_FLOOR, CHUNK_ROWS = 512 * 151_936, (512, 4096)
# What lorry makes of the least where memory is not short (worker.model.widen_loss_chunks): larger products are faster.
WIDE_CHUNK_ROWS = 2048

CONTEXT_BYTES = {"cuda": GIB // 2, "cpu": GIB}  # CUDA's own memory and kernels; Python and its libraries
# What is left free: the estimate's own error (docs/hardware.md), and what the allocator loses between its blocks.
MARGIN = 0.15
# Without checkpointing, tokens: of the smallest pass (below, the GPU is not filled, and the weights are dequantised too
# often), and the step in which sizes are tried; and how much of the free memory is used.
SMALLEST_PASS, PASS_STEP, ROOM = 4096, 1024, 0.85
CPU_BATCH = 8  # the most that "auto" takes on a CPU, where a larger pass is no faster
STEP_ROWS = 8  # rows of a pass that "auto" stands for when rows a step are counted: the field's default


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak. `parts` add up to `bytes`; `phase` is when the peak is, `phases` what each would take at its own."""

    device: Device
    tokens: int  # of the largest pass, padding included
    bytes: int
    parts: dict[str, int]
    phase: str
    phases: dict[str, int]
    trainable: int
    context_bytes: int = field(default=0)

    def fits(self, free: int) -> bool:
        """Whether a device with `free` bytes, the context already made, has room for it with a margin."""
        return self.bytes * (1 + MARGIN) <= free


@dataclass(frozen=True)
class Plan:
    """How a step's rows go through the device: `accumulation` passes of `batch` rows."""

    batch: int
    accumulation: int
    estimate: Estimate
    free_bytes: int
    fits: bool


def estimate(
    spec: CptSpec | IftSpec,
    shape: Shape,
    tokens: int,
    *,
    device: Device = "cuda",
    checkpointing: bool = True,
    frozen_adapter_bytes: int = 0,
    embedding_bytes: int | None = None,
    keeps_tied: bool = False,
) -> Estimate:
    """The peak of a run whose largest pass has `tokens` tokens (rows × longest row, padding included).

    It stands in a pass that is not its step's first, when all gradients are there. `frozen_adapter_bytes`: a parent that
    init.mode 'stack' keeps beside the new LoRA. `embedding_bytes` (None: as a run holds them) and `keeps_tied` describe
    scripts that train the embeddings in another type, or a tied pair as one matrix, as measurements of such scripts need.
    Raises NoEstimate for a target module that the shape does not have.
    """
    if missing := shape.missing(spec.lora.target_modules):
        raise NoEstimate(f"no estimate for LoRA on {', '.join(missing)}")
    gpu, embeds = device == "cuda", spec.lora.train_embeddings
    held = 4 if spec.model.dtype == "float32" or (spec.model.dtype == "auto" and not gpu) else 2
    if embedding_bytes is None:
        embedding_bytes = SPLIT_BYTES if gpu and splits_embeddings(spec, checkpointing) else TRAINED_BYTES
    one = keeps_tied and shape.tied
    matrices = 0 if not embeds else 1 if one else 2
    lora = shape.lora(spec.lora.target_modules, spec.lora.r)
    per_state, per_embed_state = _states(spec.training.optim, gpu)
    states = per_state * lora
    if embeds:
        states += shape.matrix * (per_embed_state + (0 if one else per_state))
    # Unsloth moves the originals of trained embeddings to the host where it checkpoints with offloading: on a GPU.
    originals = 0 if gpu and embeds else shape.matrix * (1 if shape.tied else 2) * held
    quantised = shape.linear * (NF4_BYTES if spec.model.load_in_4bit else held)
    trained = embedding_bytes * matrices * shape.matrix
    parts = {
        "base_weights": int(quantised + originals + shape.small * held + frozen_adapter_bytes),
        "lora": TRAINED_BYTES * lora,
        "embeddings": trained,
        "gradients": TRAINED_BYTES * lora + trained,
        "optimizer": int(states),
    }

    vector = tokens * held  # bytes of one element of each token
    activations, layer = _activations(spec, shape, vector, tokens, gpu=gpu, checkpointing=checkpointing)
    head_gradient = embedding_bytes * shape.matrix if embeds else 0
    # A tied matrix has its gradient from the loss kept until the one from the input arrives.
    waits = head_gradient if one else 0
    phases = {
        "loss": _loss(shape, tokens, vector, head_gradient, copies=embedding_bytes != held, wide=not checkpointing),
        "layer": layer + waits,
        "embeddings": head_gradient + 2 * waits,  # a dense gradient of embed_tokens, before it is added up
    }
    phase = max(phases, key=lambda name: phases[name])
    total = sum(parts.values()) + activations
    parts |= {"activations": activations, "recomputed_layer": 0, "loss": 0, "embedding_gradient": 0}
    parts[{"loss": "loss", "layer": "recomputed_layer", "embeddings": "embedding_gradient"}[phase]] = phases[phase]
    return Estimate(
        device=device,
        tokens=tokens,
        bytes=total + phases[phase],
        parts=parts,
        phase=phase,
        phases={name: total + more for name, more in phases.items()},
        trainable=lora + matrices * shape.matrix,
        context_bytes=CONTEXT_BYTES[device],
    )


def splits_embeddings(spec: CptSpec | IftSpec, checkpointing: bool) -> bool:
    """Whether a run on a GPU that computes in bfloat16 holds 16 bits of each trained embedding (worker/split_weights.py)."""
    short = spec.lora.train_embeddings and checkpointing
    return short and spec.model.dtype in ("auto", "bfloat16") and spec.training.optim in SPLIT_OPTIMIZERS


def _states(optim: str, gpu: bool) -> tuple[float, float]:
    """Bytes of state of a weight, and of one of embed_tokens."""
    if not gpu and (optim.endswith("8bit") or optim.startswith("paged_")):
        return CPU_STATE_BYTES, CPU_STATE_BYTES
    return STATE_BYTES[optim], EMBED_STATE_BYTES.get(optim, STATE_BYTES[optim])


def _activations(
    spec: CptSpec | IftSpec, shape: Shape, vector: int, tokens: int, *, gpu: bool, checkpointing: bool
) -> tuple[int, int]:
    """Bytes that stand throughout the backward pass, and those of one layer while it is computed again."""
    if not gpu and not checkpointing:
        per_layer = CPU_HIDDEN * shape.hidden + CPU_MLP * shape.intermediate
        return 4 * tokens * shape.layers * per_layer, 0
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept_width = KEEPS_HIDDEN * shape.hidden + KEEPS_QUERY * q + KEEPS_KEY * kv + KEEPS_MLP * shape.intermediate
    width = LAYER_HIDDEN * shape.hidden + LAYER_QUERY * q + LAYER_KEY * kv + LAYER_MLP * shape.intermediate
    dequantised = 2 * max(a * b for a, b in shape.projections.values()) if spec.model.load_in_4bit else 0
    if not checkpointing:
        return vector * (KEPT_HIDDEN * shape.hidden + shape.layers * kept_width), vector * (
            width - kept_width
        ) + dequantised
    # On a CPU nothing is offloaded: each layer keeps its input.
    kept = KEPT_HIDDEN if gpu else KEPT_HIDDEN + shape.layers
    return vector * kept * shape.hidden, vector * width + dequantised


def _loss(shape: Shape, tokens: int, vector: int, head_gradient: int, *, copies: bool, wide: bool) -> int:
    """Bytes of the fused loss: its forward makes the gradients, its backward scales them into new tensors."""
    least, most = CHUNK_ROWS
    floor = max(_power_below(CHUNK_FLOOR // shape.vocab), WIDE_CHUNK_ROWS if wide else least)
    rows = min(max(_power_below(tokens * shape.hidden // shape.vocab), min(floor, most)), most, max(tokens, 1))
    hidden = vector * shape.hidden
    copy = 2 * shape.matrix if head_gradient and copies else 0  # lm_head in the type that it is multiplied in
    return max(hidden + head_gradient + copy + 4 * rows * shape.vocab, 2 * (hidden + head_gradient))


def _power_below(n: int) -> int:
    """The largest power of two that is not above n; 1 for less than 2."""
    return 1 << (max(n, 1).bit_length() - 1)


def keeps_activations(hidden: int, intermediate: int, layers: int, tokens: int, free_bytes: int) -> bool:
    """On a CPU: whether a pass keeps its activations instead of computing them again, at a third of the speed."""
    per_layer = CPU_HIDDEN * hidden + CPU_MLP * intermediate
    return 4 * per_layer * layers * tokens <= free_bytes / 4


def without_checkpointing(
    spec: CptSpec | IftSpec,
    shape: Shape,
    most: int,
    longest_row: int,
    free_bytes: int,
    *,
    frozen_adapter_bytes: int = 0,
) -> tuple[Estimate, bool]:
    """On a GPU: the largest pass of at most `most` tokens that fits `free_bytes`, and True; else the smallest, and False.

    The smallest is SMALLEST_PASS, or the longest row if that is longer. Raises NoEstimate.
    """
    least = max(longest_row, min(most, SMALLEST_PASS))
    for tokens in (most, *range((most - 1) // PASS_STEP * PASS_STEP, least, -PASS_STEP), least):
        found = estimate(spec, shape, tokens, checkpointing=False, frozen_adapter_bytes=frozen_adapter_bytes)
        if found.bytes + CONTEXT_BYTES["cuda"] <= ROOM * free_bytes:
            return found, True
    return found, False


def rows_per_step(spec: CptSpec | IftSpec) -> int:
    """Rows of one optimiser step, as asked: with a batch of "auto", 8 × gradient_accumulation_steps."""
    batch = spec.training.per_device_train_batch_size
    return (STEP_ROWS if batch == "auto" else batch) * spec.training.gradient_accumulation_steps


def largest_batch(
    spec: CptSpec | IftSpec,
    shape: Shape,
    free_bytes: int,
    longest_row: int,
    *,
    device: Device = "cuda",
    frozen_adapter_bytes: int = 0,
) -> int:
    """The largest power of two that divides the rows of a step and whose pass fits into `free_bytes`; 1 if none does.

    On a CPU at most 8: there a larger pass is no faster. Raises NoEstimate.
    """
    rows, best = rows_per_step(spec), 1
    batch = 2
    while rows % batch == 0 and (device == "cuda" or batch <= CPU_BATCH):
        found = _of_batch(spec, shape, batch, free_bytes, longest_row, device, frozen_adapter_bytes)
        if not found.fits(free_bytes):
            break
        best, batch = batch, 2 * batch
    return best


def plan(
    spec: CptSpec | IftSpec,
    shape: Shape,
    device_free_bytes: int,
    longest_row: int,
    *,
    device: Device = "cuda",
    frozen_adapter_bytes: int = 0,
) -> Plan:
    """The batch of a run, chosen if the spec says "auto", with its estimate. `longest_row` is in tokens.

    Raises NoEstimate.
    """
    longest_row = min(longest_row, spec.model.max_seq_length)
    batch = spec.training.per_device_train_batch_size
    accumulation = spec.training.gradient_accumulation_steps
    if batch == "auto":
        batch = largest_batch(
            spec, shape, device_free_bytes, longest_row, device=device, frozen_adapter_bytes=frozen_adapter_bytes
        )
        accumulation = rows_per_step(spec) // batch
    found = _of_batch(spec, shape, batch, device_free_bytes, longest_row, device, frozen_adapter_bytes)
    return Plan(batch, accumulation, found, device_free_bytes, found.fits(device_free_bytes))


def _of_batch(
    spec: CptSpec | IftSpec, shape: Shape, batch: int, free: int, longest_row: int, device: Device, frozen: int
) -> Estimate:
    tokens = batch * longest_row
    asked = spec.training.gradient_checkpointing
    if device == "cuda" and asked is not True:
        found, fits = without_checkpointing(spec, shape, tokens, longest_row, free, frozen_adapter_bytes=frozen)
        if fits or asked is False:
            return found
    checkpointing = device == "cuda" or not keeps_activations(
        shape.hidden, shape.intermediate, shape.layers, tokens, free
    )
    return estimate(spec, shape, tokens, device=device, checkpointing=checkpointing, frozen_adapter_bytes=frozen)
