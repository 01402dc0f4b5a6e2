"""Fine-tuning starts from GGUF: every family and type gives the same model and tokenizer as the folder it came from."""

from pathlib import Path

import gguf as package
import numpy as np
import pytest
import torch
from families import FAMILIES, build
from small import CPU
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from afina.data.load_tokenizer import load_tokenizer
from afina.data.splits import LLAMA3_SPLIT, QWEN2_SPLIT
from afina.errors import ModelError
from afina.export.gguf import write_gguf
from afina.gguf_file import GgufFile
from afina.model.attach import attach, merged
from afina.model.gguf_start import read_tensors
from afina.model.load import load_model
from afina.model.mxfp4 import packed_experts
from afina.model.saved import save_whole
from afina.recipe.schema import Lora, Model

TEXTS = ["hello world, what is a loop? 1234", "¿Qué es una función? Un bucle\n\n  repite.", "it's o'clock"]
NAMES = ["llama2", "llama3", "llama3.2", "mistral", "qwen2", "qwen3", "phi2", "phi3", "gemma2", "smollm", "gpt-oss"]
IDS = torch.tensor([[5, 9, 33, 80, 7, 64, 3, 11, 90, 4, 5, 6]])
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"


def byte_level(split: str | None, *, compose: bool = False) -> Backend:
    backend = Backend(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    cut = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, level]) if cut else level
    backend.decoder = decoders.ByteLevel()
    if compose:
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


def sentencepiece() -> Backend:
    """Llama 2's kind: bytes as a fallback, a space before every text."""
    pieces = ["lo", "▁l", "▁lo", "loo", "▁loo", "is", "▁i", "▁is", "he", "wh", "▁wh"]
    letters = sorted({*"helo wrd,atisp?1234▁".replace(" ", "")})
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    vocab: dict[str, int] = {}
    for text in [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pieces]:
        vocab.setdefault(text, len(vocab))
    ways = [(piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece))]
    merges = [way for way in ways if set(way) <= set(vocab)]  # llama.cpp merges whatever is a token
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return backend


def save_tokenizer(backend: Backend, folder: Path, **more: str) -> int:
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **SPECIAL, **more)
    hf.save_pretrained(folder)
    return backend.get_vocab_size()


def exported(folder: Path, kind: str, build_model) -> Path:
    """A model folder and, beside its files, the GGUF file made of it."""
    size = save_tokenizer(byte_level(QWEN2_SPLIT), folder)
    model = build_model()
    model.resize_token_embeddings(size + 7)  # rows that no token uses, as Phi-2 and Qwen have them
    model.save_pretrained(folder)
    write_gguf(folder, folder / "model.gguf", kind)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_the_same_model_again(tmp_path, name):
    folder = exported(tmp_path, "f32", lambda: build(name))
    model, origin = load_model(str(folder / "model.gguf"), CPU), load_model(str(folder), CPU)
    assert torch.equal(logits(model), logits(origin))
    tied = FAMILIES[name]().tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.config.max_position_embeddings in (256, FAMILIES[name]().sliding_window if name == "mistral" else 256)
    long = torch.arange(5, 205)[None]
    with torch.inference_mode():  # beyond the original context: positions turn as they did
        if name != "mistral":  # llama.cpp has no window there, so the file's context ends with it
            torch.testing.assert_close(model(input_ids=long).logits, origin(input_ids=long).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama3", "gemma2", "phi3", "gpt-oss"])
def test_tuned_exported_and_started_from_again(tmp_path, name):
    """GGUF to adapter to merged folder to GGUF: what is loaded at the end is what was merged."""
    first = exported(tmp_path / "first", "f32", lambda: build(name)) / "model.gguf"
    model = attach(load_model(str(first), CPU), Lora(rank=2), seed=0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(key)))
    expected = logits(model.eval())
    save_whole(merged(model), tmp_path / "second")
    load_tokenizer(str(first)).save(tmp_path / "second")
    write_gguf(tmp_path / "second", tmp_path / "second.gguf", "f32")
    again = load_model(str(tmp_path / "second.gguf"), CPU)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(str(tmp_path / "second.gguf")).template == TEMPLATE


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"])
def test_quantised_files_hold_what_transformers_reads_in_them(tmp_path, kind):
    """Beside transformers' own reader of GGUF: the same model, q and k, blocks and all."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}

    def make() -> nn.Module:
        config = FAMILIES["llama3"]()
        for key, value in wide.items():
            setattr(config, key, value)
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)

    folder = exported(tmp_path, kind, make)
    kinds = {tensor.kind for tensor in GgufFile(folder / "model.gguf").tensors.values()}
    assert kind.removesuffix("_m") in kinds
    model = load_model(str(folder / "model.gguf"), CPU)
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    apart = (logits(model) - logits(load_model(str(folder), CPU))).abs().mean() / logits(model).abs().mean()
    assert 0 < apart < (0.3 if kind[:2] == "q4" else 0.1)


def test_experts_in_mxfp4_stay_packed(tmp_path):
    folder = exported(tmp_path, "mxfp4", lambda: build("gpt-oss"))
    file = folder / "model.gguf"
    packed, unpacked = load_model(str(file), CPU), load_model(str(file), CPU, Model(experts="unpacked"))
    assert len(packed_experts(packed)) == 2 and not packed_experts(unpacked)
    torch.testing.assert_close(logits(packed), logits(unpacked), rtol=1e-5, atol=1e-5)
    plain = read_tensors(GgufFile(file), torch.float32, packed=False)
    for number, (_name, experts) in enumerate(packed_experts(packed)):
        for matrix in ("gate_up_proj", "down_proj"):
            expected = plain[f"model.layers.{number}.mlp.experts.{matrix}"]
            assert torch.equal(experts.matrix(matrix, torch.float32), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: byte_level(None),
        lambda: byte_level(LLAMA3_SPLIT),
        lambda: byte_level(QWEN2_SPLIT, compose=True),
        sentencepiece,
    ],
    ids=["gpt-2", "llama 3", "qwen 2", "sentencepiece"],
)
def test_the_tokenizer_is_the_same_again(tmp_path, make):
    backend = make()
    unknown = {"unk_token": "<unk>"} if backend.token_to_id("<unk>") == 0 else {}
    size = save_tokenizer(backend, tmp_path, **unknown)
    model = build("llama3")
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", "f32")
    ours, origin = load_tokenizer(str(tmp_path / "model.gguf")), load_tokenizer(str(tmp_path))
    for text in [*TEXTS, "", " ", "  two", "loop looo", "ümläut 🙂", "a</s>b<pad>"]:
        assert ours.encode([text]) == origin.encode([text]), text
        ids = origin.hf(text)["input_ids"]
        assert ours.hf(text)["input_ids"] == ids
        assert ours.hf.decode(ids) == origin.hf.decode(ids)
    assert (ours.end_ids, ours.pad_id, ours.bos_id) == (origin.end_ids, origin.pad_id, origin.bos_id)
    assert ours.template == origin.template and ours.control_tokens == origin.control_tokens
    assert ours.render([{"role": "user", "content": "hi"}]) == "<s>user\nhi</s>"


def written(path: Path, architecture: str, metadata: dict, tensors: dict[str, np.ndarray]) -> Path:
    """A GGUF file by the package, as others write them."""
    writer = package.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](
            key.replace("ARCH", architecture), value
        )
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_phi2_with_its_projections_in_one(tmp_path):
    """Older files of Phi-2, LM Studio's among them, have q, k and v in one tensor."""
    folder = exported(tmp_path, "f32", lambda: build("phi2"))
    split = GgufFile(folder / "model.gguf")
    tensors = {}
    for name in split.tensors:
        if ".attn_q." in name:
            parts = [split.values(name.replace("attn_q", f"attn_{part}")) for part in "qkv"]
            tensors[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
        elif ".attn_k." not in name and ".attn_v." not in name:
            tensors[name] = split.values(name)
    kept = {key: value for key, value in split.metadata.items() if key.startswith("phi2.")}
    fused = written(tmp_path / "fused.gguf", "phi2", kept, tensors)
    assert torch.equal(logits(load_model(str(fused), CPU)), logits(load_model(str(folder / "model.gguf"), CPU)))


GOOD = {
    "ARCH.embedding_length": 32,
    "ARCH.feed_forward_length": 48,
    "ARCH.block_count": 1,
    "ARCH.attention.head_count": 4,
    "ARCH.context_length": 64,
    "ARCH.attention.layer_norm_rms_epsilon": 1e-5,
}
EMBEDDED = {"token_embd.weight": np.zeros((9, 32), np.float32)}


@pytest.mark.parametrize(
    "architecture, changes, tensors, about",
    [
        ("bert", {}, EMBEDDED, "architecture bert"),
        ("llama", {"ARCH.attention.head_count": 0}, EMBEDDED, "0 heads"),
        ("llama", {"ARCH.block_count": 2**31}, EMBEDDED, "num_hidden_layers"),
        ("llama", {"ARCH.block_count": "two"}, EMBEDDED, "block_count"),
        ("llama", {"ARCH.embedding_length": None}, EMBEDDED, "embedding_length"),
        ("llama", {}, {}, "token_embd.weight"),
        ("llama", {}, EMBEDDED, "are missing"),
        ("llama", {}, EMBEDDED | {"blk.0.evil.weight": np.zeros(3, np.float32)}, r"blk\.0\.evil"),
        ("llama", {}, {"token_embd.weight": np.zeros((9, 16), np.float32)}, "cannot be loaded|are missing"),
        ("llama", {}, EMBEDDED | {"rope_freqs.weight": np.full(4, 7, np.float32)}, "not Llama 3"),
    ],
    ids=range(10),
)
def test_a_file_that_cannot_be_started_from(tmp_path, architecture, changes, tensors, about):
    metadata = {key: value for key, value in (GOOD | changes).items() if value is not None}
    file = written(tmp_path / "x.gguf", architecture, metadata, tensors)
    with pytest.raises(ModelError, match=about):
        load_model(str(file), CPU)


def test_no_file_and_no_gguf(tmp_path):
    for content in (None, b"", b"GGUF", b"not at all"):
        if content is not None:
            (tmp_path / "x.gguf").write_bytes(content)
        for open_it in (
            lambda: load_model(str(tmp_path / "x.gguf"), CPU),
            lambda: load_tokenizer(str(tmp_path / "x.gguf")),
        ):
            with pytest.raises(ModelError):
                open_it()
