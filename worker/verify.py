"""The last step of a training: reload the adapter from its files on a fresh base, and see that it is the one trained."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from service.errors import JobFailure
from service.specs import ModelSpec
from worker import model as models
from worker.verify_math import mean_kl, next_token_logprobs

# Mean KL divergence (nats) between the next-token distributions of the trained model in memory and of the reloaded
# files. The same weights in the same type give rounding noise: below 1e-6 in float32; bfloat16 and NF4 compute in
# 8-bit mantissas, and a merged base differs from base + LoRA by one rounding per weight.
LIMIT_FLOAT32, LIMIT_LOW = 1e-4, 2e-2


def reload_and_compare(
    folder: Path,
    spec: ModelSpec,
    base: str,
    ids: list[int],
    expected: torch.Tensor,
    tokenizer: Any,
    *,
    token: str | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Load `folder` on a fresh base, compare with `expected` (log-probabilities [positions, vocabulary] for `ids`), generate.

    Returns the measurements and the sample. Raises JobFailure("verification_failed").
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    fresh = models.load_base(spec, base, checkpointing=False, token=token, trust_remote_code=trust_remote_code)
    reloaded = PeftModel.from_pretrained(fresh, folder)
    if models.on_gpu():
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(reloaded)
    kl = mean_kl(expected, next_token_logprobs(reloaded, ids))
    limit = LIMIT_FLOAT32 if fresh.dtype == torch.float32 and not spec.load_in_4bit else LIMIT_LOW
    if not kl <= limit:  # also true for NaN
        raise JobFailure(
            "verification_failed",
            f"the saved adapter does not answer as the trained model did: mean KL {kl:.3g} over the limit {limit:g}",
        )
    prompt = torch.tensor([ids[: max(1, min(32, len(ids) // 2))]], device=reloaded.device)
    with torch.no_grad():
        out = reloaded.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    answer = out[0, prompt.shape[1] :].tolist()
    if not answer:
        raise JobFailure("verification_failed", "the saved adapter gave no token")
    sample = {"prompt": tokenizer.decode(prompt[0].tolist()), "text": tokenizer.decode(answer)}
    return {"mean_kl": kl, "limit": limit, "positions": len(ids), "sample": sample}
