"""A decoder's numbers from its config.json: what its weights and activations follow from. Plain arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Architectures whose layers are Llama's: attention of four projections, a gated MLP of three, RMS norms.
# Value: norm weights a layer beside Llama's two of the hidden size, as (of the hidden size, of the head's).
_LIKE_LLAMA = {
    "llama": (0, 0),
    "mistral": (0, 0),
    "qwen2": (0, 0),
    "granite": (0, 0),
    "smollm3": (0, 0),
    "gemma": (0, 0),
    "qwen3": (0, 2),
    "gemma2": (2, 0),
    "gemma3_text": (2, 2),
}


class NoEstimate(Exception):
    """The config is of a model that this arithmetic does not know; str() says which."""


@dataclass(frozen=True)
class Shape:
    """Sizes in elements. `biases`: output sizes of the linear layers of one layer that have a bias."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    norms: int  # norm weights of one layer
    biases: int  # bias elements of one layer

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers config, or a config.json as a dict. Raises NoEstimate."""

        def get(name: str, default: Any = None) -> Any:
            return config.get(name, default) if isinstance(config, dict) else getattr(config, name, default)

        kind = get("model_type")
        if kind not in _LIKE_LLAMA:
            raise NoEstimate(
                f"no estimate for the architecture {kind!r}; there is one for {', '.join(sorted(_LIKE_LLAMA))}"
            )
        hidden, heads = get("hidden_size"), get("num_attention_heads")
        head_dim = get("head_dim") or hidden // heads
        kv_heads = get("num_key_value_heads") or heads
        more_hidden, more_head = _LIKE_LLAMA[kind]
        q, kv = heads * head_dim, kv_heads * head_dim
        biases = q + 2 * kv if kind == "qwen2" else 0
        if get("attention_bias"):
            biases = q + 2 * kv + hidden
        if get("mlp_bias"):
            biases += 2 * get("intermediate_size") + hidden
        return cls(
            model_type=kind,
            hidden=hidden,
            intermediate=get("intermediate_size"),
            layers=get("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=get("vocab_size"),
            tied=bool(get("tie_word_embeddings", False)),
            norms=(2 + more_hidden) * hidden + more_head * head_dim,
            biases=biases,
        )

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer of one layer, by its name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear(self) -> int:
        """Weights of all linear layers but the output embedding: what NF4 quantises."""
        return self.layers * sum(a * b for a, b in self.projections.values())

    @property
    def matrix(self) -> int:
        """Weights of one embedding matrix, [vocabulary, hidden]."""
        return self.vocab * self.hidden

    @property
    def small(self) -> int:
        """Norms and biases."""
        return self.layers * (self.norms + self.biases) + self.hidden

    @property
    def parameters(self) -> int:
        """Weights of the base model; a tied matrix counts once."""
        return self.linear + self.matrix * (1 if self.tied else 2) + self.small

    def lora(self, targets: Iterable[str], r: int) -> int:
        """Weights of LoRA matrices of rank r on the named projections: r × (in + out) each."""
        sizes = self.projections
        return self.layers * sum(r * sum(sizes[name]) for name in targets)

    def missing(self, targets: Iterable[str]) -> list[str]:
        """Names that no linear layer of this model has."""
        return [name for name in targets if name not in self.projections]
