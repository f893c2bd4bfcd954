#!/usr/bin/env python3
"""The training script a user would write without lorry: Unsloth's own notebook recipe, given a job's spec.

    python benchmarks/training/bare.py --spec spec.json --rows rows.jsonl --output FOLDER

No service, no database, no checks. Rows are {"text": …}. `--library-defaults` leaves the loss to TRL and the gradient
checkpointing to Unsloth, as a script that names neither would.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--spec", required=True, type=Path, help="a cpt spec, as POST /v1/jobs takes it, defaults filled in"
)
parser.add_argument("--rows", required=True, type=Path, help=".jsonl with a text in each row")
parser.add_argument("--output", required=True, type=Path, help="folder for the checkpoints and the adapter")
parser.add_argument("--checkpointing", action="store_true", help="recompute activations (Unsloth's way)")
parser.add_argument("--library-defaults", action="store_true", help="TRL's default loss, Unsloth's checkpointing")
parser.add_argument(
    "--keep-activations", action="store_true", help="no gradient checkpointing, whatever the defaults are"
)
parser.add_argument("--float32", action="store_true", help="keep what is trained in float32: TRL casts it to bfloat16")
arguments = parser.parse_args()

from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, is_bfloat16_supported  # noqa: E402, I001

import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402

clock = None
if "BENCH_OUT" in os.environ:  # under overhead.py, which times both sides with the same callback
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from benchmarks.training.clock import install

    clock = install()

spec = json.loads(arguments.spec.read_text())
lora, data, training = spec["lora"], spec["dataset"], spec["training"]
length = spec["model"]["max_seq_length"]
checkpointing = "unsloth" if arguments.checkpointing or arguments.library_defaults else False
if arguments.keep_activations:
    checkpointing = False

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=spec["model"]["name"],
    max_seq_length=length,
    dtype=None,
    load_in_4bit=spec["model"]["load_in_4bit"],
    use_gradient_checkpointing=checkpointing,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=lora["r"],
    lora_alpha=lora["lora_alpha"],
    lora_dropout=lora["lora_dropout"],
    bias=lora["bias"],
    use_rslora=lora["use_rslora"],
    target_modules=lora["target_modules"] + (["embed_tokens", "lm_head"] if lora["train_embeddings"] else []),
    use_gradient_checkpointing=checkpointing,
    random_state=training["seed"],
    ensure_weight_tying=False,  # as the job does; left out, Unsloth ties the two matrices of a tied base on a GPU
)

rows = load_dataset("json", data_files=str(arguments.rows), split="train", cache_dir=str(arguments.output / "cache"))
rows = rows.map(
    lambda batch: {"input_ids": tokenizer([text + tokenizer.eos_token for text in batch["text"]])["input_ids"]},
    batched=True,
    remove_columns=rows.column_names,
)
size = data["test_size"]
parts = rows.train_test_split(test_size=size if size < 1 else int(size), seed=data["seed"])

bf16 = is_bfloat16_supported()
trainer = UnslothTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=parts["train"],
    eval_dataset=parts["test"],
    args=UnslothTrainingArguments(
        output_dir=str(arguments.output),
        embedding_learning_rate=training["embedding_learning_rate"] if lora["train_embeddings"] else None,
        **{
            name: training[name]
            for name in (
                "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps",
                "num_train_epochs", "learning_rate", "optim", "weight_decay", "max_grad_norm", "lr_scheduler_type",
                "logging_steps", "eval_steps", "save_steps", "save_total_limit", "seed",
            )
        },
        warmup_steps=training["warmup_ratio"],
        eval_strategy="steps",
        eval_on_start=True,
        bf16=bf16,
        fp16=torch.cuda.is_available() and not bf16,
        gradient_checkpointing=bool(checkpointing),
        report_to="none",
        max_length=length,
        **({} if arguments.library_defaults else {"loss_type": "nll", "prediction_loss_only": True}),
    ),
)  # fmt: skip
if arguments.float32:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
trainer.train()
trainer.evaluate()
model.save_pretrained(str(arguments.output / "adapter"))
tokenizer.save_pretrained(str(arguments.output / "adapter"))
if clock:
    clock.write()
