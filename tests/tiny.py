"""A real, random, tiny Llama with a real tokenizer, made in about a second. A pytest plugin: fixtures `tiny_base` and
`tiny_base_tied`.

The tokenizer is a byte-level BPE trained on the standard library's own text. Like Llama 3's it puts BOS in front by
itself (so a second BOS is easy to get wrong), and its chat template writes the BOS too. It also has Llama 3's header
tokens, so that templates named "llama-3…" can be used with it; `<|im_start|>` is not among its tokens.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import pytest

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def stdlib_text(limit: int) -> list[str]:
    """Source files of the standard library, in a fixed order, about `limit` characters in all."""
    texts: list[str] = []
    left = limit
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text("utf-8", errors="replace")[:left]
        texts.append(text)
        left -= len(text)
        if left <= 0:
            break
    return texts


def make_tiny_tokenizer(folder: Path, *, vocab: int = 1000) -> Any:
    """Train and save a tokenizer of at most `vocab` tokens; returns the PreTrainedTokenizerFast."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, PAD, *HEADERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(stdlib_text(300_000), trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tok.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=HEADERS,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
    return fast


def make_tiny_base(
    folder: Path | str,
    *,
    tie: bool = False,
    vocab: int = 1000,
    hidden: int = 64,
    intermediate: int = 128,
    layers: int = 2,
    seed: int = 0,
) -> Path:
    """Write a random Llama (float32 safetensors) and its tokenizer into `folder`; same arguments, same bytes.

    `hidden` should be a multiple of 64, NF4's block size, so that bitsandbytes can quantise every matrix.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(path, vocab=vocab)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.float32)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(str(path))
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with separate embed_tokens and lm_head."""
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "tiny-base")


@pytest.fixture(scope="session")
def tiny_base_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose lm_head is embed_tokens."""
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "tiny-base-tied", tie=True)
