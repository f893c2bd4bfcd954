"""torch's variable-length attention with grouped keys and values, for builds of torch that lack the argument.

Unsloth sends packed rows to torch.nn.attention.varlen where it takes `enable_gqa` (torch 2.12 and later). Before that it
launches one kernel a row, which on short rows costs more than padding does. FlashAttention-2 itself (Dao 2023, arXiv
2307.08691), which torch has built in, takes grouped heads and any number of rows in one launch: here it is called with
the signature that later versions of torch have.
"""

from __future__ import annotations

from typing import Any

import torch

from worker.model import on_gpu


def provide_varlen_attention() -> None:
    """Give Unsloth this module's varlen_attn where torch has none that it takes. Does nothing elsewhere."""
    from unsloth.utils import attention_dispatch as dispatch

    if not on_gpu() or torch.version.hip is not None or getattr(dispatch, "_TORCH_VARLEN_ATTN", None) is not None:
        return
    dispatch._TORCH_VARLEN_ATTN = varlen_attn


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As torch.nn.attention.varlen.varlen_attn of torch 2.12.

    query [tokens, heads, width], key and value [tokens, kv heads, width], in float16 or bfloat16 on a GPU; cu_seq_q and
    cu_seq_k [rows + 1], int32, where each row begins. window_size counts tokens to the left and right, -1 for all; (n,
    0) is causal. Returns [tokens, heads, width].
    """
    del enable_gqa  # the kernel sees it from the shapes
    out: torch.Tensor = _FlashVarlen.apply(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)
    return out


class _FlashVarlen(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
        scale: float | None,
        window: tuple[int, int],
    ) -> torch.Tensor:
        ctx.causal, ctx.most, ctx.scale = window[1] == 0, (max_q, max_k), scale
        # All of the left side and nothing of the right is what `is_causal` says already.
        ctx.window = {} if window[0] < 0 else {"window_size_left": window[0], "window_size_right": window[1]}
        out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, cu_q, cu_k, max_q, max_k, 0.0, ctx.causal, False, scale=scale, **ctx.window
        )
        ctx.save_for_backward(query, key, value, cu_q, cu_k, out, lse, seed, offset)
        result: torch.Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, cu_q, cu_k, out, lse, seed, offset = ctx.saved_tensors
        gradients = torch.ops.aten._flash_attention_backward(
            grads[0].contiguous(), query, key, value, out, lse, cu_q, cu_k, *ctx.most, 0.0, ctx.causal, seed, offset,
            scale=ctx.scale, **ctx.window,
        )  # fmt: skip
        return (*gradients, None, None, None, None, None, None)
