"""Real llama.cpp on a real file: what it answers, how it ends, and that it leaves nothing behind."""

import builtins
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from small import llama
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from afina.errors import ModelError, ResourceError
from afina.export.gguf import write_gguf
from afina.model.llamacpp import LlamaCpp, default_threads

pytest.importorskip("xllamacpp", reason='install "afina[gguf-run]" to run GGUF files')

TEMPLATE = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a byte-level tokenizer: ids 0 to 2 control, then the 256 bytes, then "ab"."""
    folder = tmp_path_factory.mktemp("model")
    llama(vocab_size=260, tie_word_embeddings=True).save_pretrained(folder)
    pieces = ["<pad>", "<u>", "</u>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(pieces)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<u>", "</u>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</u>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    write_gguf(folder, folder / "model.gguf", "f32")
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def model(file: Path) -> Any:
    with LlamaCpp(file, threads=1) as model:
        yield model


def test_text_to_ids_and_back(model: LlamaCpp) -> None:
    ids = model.tokenize("<u>abc é</u>", True)
    assert ids[0] == 1 and ids[-1] == 2 and ids[1] == 259
    assert model.detokenize(ids) == "<u>abc é</u>"
    assert 1 not in model.tokenize("<u>", False)
    assert model.tokenize("", True) == []


def test_completion_depends_on_its_arguments_alone(model: LlamaCpp) -> None:
    prompt = model.tokenize("Hello", False)
    first = model.complete(prompt, max_new_tokens=20)
    model.complete(model.tokenize("Hell is another prompt", False), max_new_tokens=5)
    assert model.complete(prompt, max_new_tokens=20) == first
    assert len(first.ids) == 20 and first.ended == "limit"
    sampled = {seed: model.complete(prompt, max_new_tokens=20, temperature=2.0, seed=seed).ids for seed in (1, 2)}
    assert sampled[1] != sampled[2]
    assert model.complete(prompt, max_new_tokens=20, temperature=2.0, seed=1).ids == sampled[1]
    assert model.complete(prompt, max_new_tokens=20, temperature=2.0, top_p=1e-6, seed=1).ids == first.ids


def test_a_text_prompt_is_tokenised_by_llamacpp(model: LlamaCpp) -> None:
    text = "<u>ab"
    assert model.complete(text, max_new_tokens=8) == model.complete(model.tokenize(text, True), max_new_tokens=8)


def test_stop_text_ends_the_answer(model: LlamaCpp) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 30, "temperature": 2.0, "seed": 3}
    whole = model.complete(model.tokenize("Hello", False), **asked).text
    stop = next(letter for letter in whole[3:] if letter.isascii() and letter not in whole[:3])
    cut = model.complete(model.tokenize("Hello", False), **asked, stop=[stop])
    assert cut.ended == "stop" and cut.text == whole[: whole.index(stop)] != ""


def test_pieces_are_the_whole(model: LlamaCpp) -> None:
    prompt = model.tokenize("Hello there", False)
    pieces = list(model.stream(prompt, max_new_tokens=40))
    assert len(pieces) > 5
    assert "".join(pieces) == model.complete(prompt, max_new_tokens=40).text


def test_a_stream_left_early_frees_llamacpp(model: LlamaCpp) -> None:
    stream = model.stream(model.tokenize("Hello", False), max_new_tokens=200)
    next(stream)
    stream.close()
    assert model.complete([5, 6], max_new_tokens=2).ids


def test_logprobs_are_those_of_the_choice(model: LlamaCpp) -> None:
    ids = [1, *model.tokenize("ab é 日", False)]
    found = model.logprobs(ids, top=260)
    assert [len(entry) for entry in found] == [260] * len(ids)
    for end, entry in enumerate(found, 1):
        assert model.complete(ids[:end], max_new_tokens=1).ids == [next(iter(entry))]
        assert list(entry.values()) == sorted(entry.values(), reverse=True)
    assert [list(entry)[:3] for entry in found] == [list(entry) for entry in model.logprobs(ids, top=3)]


def test_template(model: LlamaCpp) -> None:
    assert model.apply_template([{"role": "user", "content": "hi"}]) == "<u>hi</u>"


def test_no_template_is_not_chatml(file: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.gguf"
    bare.write_bytes(file.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_templatX"))
    with LlamaCpp(bare, threads=1) as model, pytest.raises(ModelError, match="no chat template"):
        model.apply_template([{"role": "user", "content": "hi"}])


def test_refusals_are_model_errors(model: LlamaCpp) -> None:
    for prompt in ([999_999], [5] * 1000):
        with pytest.raises(ModelError, match="refuses"):
            model.complete(prompt, max_new_tokens=1)
        with pytest.raises(ModelError, match="refuses"):
            list(model.stream(prompt, max_new_tokens=1))


def test_files_that_are_no_models(file: Path, tmp_path: Path) -> None:
    other, empty, cut = (tmp_path / name for name in ("other", "empty", "cut"))
    other.write_bytes(b"PK\3\4" * 100)
    empty.write_bytes(b"")
    cut.write_bytes(file.read_bytes()[:5000])
    for path in (tmp_path / "absent", tmp_path, other, empty, cut):
        with pytest.raises(ModelError) as caught:
            LlamaCpp(path)
        assert caught.value.file == str(path)


def test_a_missing_package_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "xllamacpp":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ResourceError, match=r"afina\[gguf-run\]"):
        LlamaCpp(file)


def test_closing_frees_port_and_threads(file: Path) -> None:
    before = threads_of_this_process()
    for _ in range(10):  # at once, without a request
        with LlamaCpp(file, threads=1) as model:
            host, port = model._host.split(":")
            assert host == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=5).close()
        with pytest.raises(ModelError, match="closed"):
            model.tokenize("a", True)
    deadline = time.monotonic() + 10
    while threads_of_this_process() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threads_of_this_process() <= before


def threads_of_this_process() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()


def test_only_the_key_opens_the_port(model: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_key", "wrong")
    with pytest.raises(ModelError, match="API Key"):
        model.tokenize("a", True)


def test_two_models_at_once(file: Path, model: LlamaCpp) -> None:
    with LlamaCpp(file, threads=1) as other:
        assert other.complete([1, 5], max_new_tokens=9) == model.complete([1, 5], max_new_tokens=9)
    assert model.complete([1, 5], max_new_tokens=1).ids


def test_threads_are_those_this_process_may_use() -> None:
    assert default_threads(2**20) == 1
    assert 1 <= default_threads(2**40) <= (os.cpu_count() or 1)


SCRIPT = """
import os, signal, sys, time
import torch
from afina.model.llamacpp import LlamaCpp
torch.ones(300, 300) @ torch.ones(300, 300)
with LlamaCpp(sys.argv[1]) as model:
    assert model.complete([1, 5], max_new_tokens=5).ids
    torch.ones(300, 300) @ torch.ones(300, 300)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        assert model.complete([1, 5], max_new_tokens=5).ids
        print("interrupted")
left = LlamaCpp(sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_silent_beside_torch_and_ctrl_c_is_still_pythons(file: Path) -> None:
    """In a fresh process with torch at work: nothing printed, KeyboardInterrupt raised, and exit with one left open."""
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file)],
        env=os.environ | {"PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_a_signal_handler_is_kept(file: Path) -> None:
    seen = []
    kept = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with LlamaCpp(file, threads=1):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, kept)
