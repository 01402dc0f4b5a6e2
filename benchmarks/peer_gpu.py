"""The peers on the same GPU workloads: plain transformers + PEFT, Liger's kernels, Unsloth. Each as its makers advise.

`gpu.py` calls `peer_step`; what a tool cannot load is an error of its own process. Unsloth reads models from a folder,
so weights are written once for each shape (`write`), with a tokenizer of a few words, because it insists on one. Of
gpt-oss's 42 GB only the names and shapes are written (`write_hollow`), and the numbers drawn once they are on the GPU.
"""

import json
from pathlib import Path
from typing import Any

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
CHECKPOINTING = {"W4": "unsloth", "W5": "unsloth", "W6": "unsloth", "W8": "unsloth", "W9": "unsloth"}
"""Where a peer needs it for the memory: its own way of keeping less; elsewhere nothing is made again."""


def write(model: Any, folder: Path) -> None:
    """Save a model and a tokenizer where every peer reads them."""
    model.save_pretrained(folder)
    write_tokenizer(folder)


def write_hollow(model: Any, folder: Path) -> None:
    """The same with a file of weights that is a hole: it reads as zeros, and takes no room and no time."""
    model.config.save_pretrained(folder)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    write_tokenizer(folder)


def draw_weights(model: Any) -> None:
    """In the place of zeros what gpu.random_model draws."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                value.fill_(1.0)
            elif not name.endswith("bias"):
                value.normal_(0, 0.02, generator=generator)


def write_tokenizer(folder: Path) -> None:
    """Of five words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "word": 4}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=131072, chat_template="{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
    ).save_pretrained(folder)  # fmt: skip


def peer_step(workload: str, work: dict[str, Any], tool: str, folder: Path) -> tuple[Any, list[Any], dict[str, Any]]:
    """A function from token ids to the loss, what learns, and what is to be said about the tool."""
    load = unsloth_model if tool == "unsloth" else plain_model
    checkpointing = CHECKPOINTING.get(workload)
    model = load(work, tool, folder, checkpointing)
    import torch

    def step(ids: Any) -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    about = {"engine": tool, "checkpointing": checkpointing or "none"}
    mixed = bool(work["shape"].get("num_local_experts"))
    return step, parameters, about | ({"weights": "drawn on the GPU, not read from a disk"} if mixed else {})


def unsloth_model(work: dict[str, Any], _tool: str, folder: Path, checkpointing: str | None) -> Any:
    """Through FastLanguageModel."""
    from unsloth import FastLanguageModel

    import torch  # isort: skip - after Unsloth, which patches it

    model, _tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=work["length"], dtype=torch.bfloat16, load_in_4bit=bool(work.get("four_bits")),
        full_finetuning=bool(work.get("full")), **({"load_in_fp8": True} if work.get("eight") == "fp8" else {}),
    )  # fmt: skip
    if work["shape"].get("num_local_experts"):
        draw_weights(model)
    if not work.get("full"):
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=TARGETS[model.config.model_type],
            use_gradient_checkpointing=checkpointing or False, random_state=3407, max_seq_length=work["length"],
        )  # fmt: skip
    FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing or False)
    return model


def plain_model(work: dict[str, Any], tool: str, folder: Path, checkpointing: str | None) -> Any:
    """transformers + PEFT, with Liger's kernels or without."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    loader: Any = AutoModelForCausalLM
    if tool == "liger":
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as loader
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = loader.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0},
        attn_implementation="eager" if work["shape"].get("num_local_experts") else "sdpa",
        **({"quantization_config": four_bits} if work.get("four_bits") else {}),
    )  # fmt: skip
    if work["shape"].get("num_local_experts"):
        draw_weights(model)
    if not work.get("full"):
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        if work.get("four_bits"):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        targets = TARGETS[model.config.model_type]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()
