"""One training by TRL's SFTTrainer + PEFT, in its own environment; prints one JSON line. Called by train_cpu.py."""

import json
import resource
import sys
import time
from pathlib import Path

started = time.perf_counter()
import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from peft import LoraConfig  # noqa: E402

case = json.loads(sys.argv[1])
torch.set_num_threads(case["threads"])
tokenizer = transformers.AutoTokenizer.from_pretrained(case["model"])
if case.get("template"):
    tokenizer.chat_template = Path(case["template"]).read_text("utf-8")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
rows = [json.loads(line) for line in Path(case["data"]).read_text("utf-8").split("\n") if line]
arguments = trl.SFTConfig(
    output_dir=case["out"],
    report_to="none",
    save_strategy="no",
    logging_steps=1,
    disable_tqdm=True,
    num_train_epochs=case["epochs"],
    learning_rate=1e-3,
    max_length=case["max_length"],
    seed=42,
    dataset_num_proc=None,
    use_cpu=True,
    **case["settings"],
)
trainer = trl.SFTTrainer(
    model=case["model"],
    args=arguments,
    train_dataset=datasets.Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
tokens = sum(len(row) for row in trainer.train_dataset["input_ids"])
ready = time.perf_counter()
result = trainer.train()
seconds = time.perf_counter() - ready
history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(
    json.dumps(
        {
            "tokens": int(tokens * case["epochs"]),
            "loop_s": seconds,
            "start_s": ready - started,
            "steps": trainer.state.global_step,
            "first_loss": history[0],
            "last_loss": history[-1],
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "versions": {m.__name__: m.__version__ for m in (trl, transformers, torch)},
        }
    )
)
