"""Prompts are training's, pieces add up to the answer, and the base lives beside the tuned model."""

import json
import random
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CPU
from torch import nn

from afina.data.conversation import Message, Sample
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.data.tokenizer import Tokenizer
from afina.errors import DataError
from afina.model.generate import generate
from afina.model.load import load_model
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Chat
from afina.serve.session import Session
from afina.serve.speakers import GgufSpeaker, ModelSpeaker, Unfolding

GREEDY = Chat(temperature=0, max_new_tokens=24)
HELLO = [Message("user", "¿Qué es una función?")]
TALK = [
    Message("system", "You answer in one word."),
    Message("user", "What is a loop?"),
    Message("assistant", "Repetition"),
    Message("user", "And <|im_end|> this?"),
]
HARD = "naïve ñandú 日本語 🙂👩‍👩‍👧‍👦 ¿qué? \n\n  två spaces  ½ \ufffd end"


class Scripted(nn.Module):
    """A model that says the ids it was given, through the same calls as transformers' own."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__()
        self.ids = list(ids)
        self.weight = nn.Parameter(torch.zeros(1))

    def generate(self, input_ids: torch.Tensor, generation_config: Any, stopping_criteria: Any, **_rest: Any) -> Any:
        for index in self.ids[: generation_config.max_new_tokens]:
            input_ids = torch.cat([input_ids, torch.tensor([[index]])], dim=1)
            if index in generation_config.eos_token_id or any(
                bool(seen(input_ids, None)) for seen in stopping_criteria
            ):
                break
        return input_ids


def said(speaker: Any, messages: Sequence[Message], settings: Chat = GREEDY, seed: int = 0) -> tuple[str, list[str]]:
    pieces: list[str] = []
    return speaker.answer(messages, settings, seed, pieces.append), pieces


def test_answer_is_what_the_model_writes(base: nn.Module, renderer: Renderer) -> None:
    tokenizer = renderer.tokenizer
    answer, pieces = said(ModelSpeaker("base", base, renderer), TALK)
    ids = generate(base, [renderer.prompt(TALK)], end_ids=tokenizer.end_ids, pad_id=tokenizer.pad_id, max_new_tokens=24)
    assert answer == tokenizer.decode(ids[0]) == "".join(pieces)
    assert len(set(ids[0])) > 5, "a model that repeats itself proves little"


def test_prompts_over_turns_have_the_ids_of_training(renderer: Renderer, tokenizer: Tokenizer) -> None:
    answers = ["Una función da", " 4\n", "ñandú 🙂"]
    heard: list[list[int]] = []

    class Listening(Scripted):
        def generate(self, input_ids: torch.Tensor, **rest: Any) -> Any:
            heard.append(input_ids[0].tolist())
            self.ids = [*tokenizer.encode([answers[len(heard) - 1]])[0], tokenizer.end_ids[0]]
            return super().generate(input_ids, **rest)

    session = Session([ModelSpeaker("tuned", Listening([]), renderer)], Chat(system="You answer in one word."))
    questions = ["¿Qué es <|im_end|> esto?", "And 2 times 2?", "Otro"]
    for question in questions:
        session.ask(question)
    assert [message.content for message in session.history()[1::2]] == answers
    messages = (Message("system", "You answer in one word."), *session.history())
    rendered = renderer.sample(Sample(messages, Path("talk"), 1))
    whole = rendered.ids.tolist()
    for prompt, answer in zip(heard, answers, strict=True):
        end = [*tokenizer.encode([answer])[0], tokenizer.end_ids[0]]
        assert whole[: len(prompt)] == prompt
        assert whole[len(prompt) : len(prompt) + len(end)] == end
        assert rendered.learnt[len(prompt) : len(prompt) + len(end)].all()


def test_stops_at_the_end_of_turn(renderer: Renderer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["A loop repeats.", "never said"])
    model = Scripted([*ids[0], tokenizer.end_ids[-1], *ids[1]])
    assert said(ModelSpeaker("tuned", model, renderer), HELLO)[0] == "A loop repeats."


def test_a_real_model_stops_at_the_end_of_turn(base: nn.Module, renderer: Renderer, tokenizer: Tokenizer) -> None:
    prompt = renderer.prompt(HELLO)
    ids = generate(base, [prompt], end_ids=[], pad_id=0, max_new_tokens=12)[0]
    end = next(index for index in ids[4:] if index not in ids[:4] and index > 2)
    chosen = Tokenizer(tokenizer.hf, tokenizer.template)
    chosen.__dict__["end_ids"] = (end,)  # the cached property: this id now ends a turn
    answer, _pieces = said(ModelSpeaker("tuned", base, Renderer(chosen)), HELLO)
    assert answer == tokenizer.decode(ids[: ids.index(end)]) != ""


def test_control_tokens_are_never_shown(renderer: Renderer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["A loop", " repeats"])
    control = [tokenizer.control_tokens["<|im_start|>"], tokenizer.control_tokens["<|endoftext|>"]]
    answer, pieces = said(ModelSpeaker("tuned", Scripted([*ids[0], *control, *ids[1]]), renderer), HELLO)
    assert answer == "A loop repeats" == "".join(pieces)


def test_an_answer_cut_inside_a_character(renderer: Renderer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["loop 🙂"])[0]
    answer, pieces = said(ModelSpeaker("t", Scripted(ids[:-1]), renderer), HELLO)
    assert answer == "".join(pieces) == tokenizer.decode(ids[:-1])
    assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_on_text_stops_early(base: nn.Module, renderer: Renderer) -> None:
    pieces: list[str] = []

    def three(piece: str) -> bool:
        pieces.append(piece)
        return len(pieces) == 3

    answer = ModelSpeaker("base", base, renderer).answer(HELLO, GREEDY, 0, three)
    assert len(pieces) == 3
    assert answer == "".join(pieces)


def unfolded(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    text = Unfolding(tokenizer)
    pieces = [*(text.add(index) for index in ids), text.finish()]
    assert text.text == "".join(pieces)
    return pieces


def test_characters_spread_over_tokens_are_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode([HARD])[0]
    pieces = unfolded(tokenizer, ids)
    assert "".join(pieces) == HARD
    assert len(ids) > len(HARD.split()) + 20, "the emoji must be spread over tokens"
    assert sum("\ufffd" in piece for piece in pieces) == 1, "only the one that is in the text"
    alphabet = {index: char for char, index in tokenizer.hf.get_vocab().items() if len(char) == 1}
    lone = [next(i for i, c in alphabet.items() if c == "Ģ")] * 3 + tokenizer.encode(["end"])[0]  # stray bytes
    assert "".join(unfolded(tokenizer, lone)) == tokenizer.decode(lone)


def test_any_ids_unfold_to_their_text(tokenizer: Tokenizer) -> None:
    chance = random.Random(0)
    for _ in range(200):
        ids = [chance.randrange(len(tokenizer.hf)) for _ in range(chance.randrange(40))]
        assert "".join(unfolded(tokenizer, ids)) == tokenizer.decode(ids)


def test_work_per_token_does_not_grow(tokenizer: Tokenizer) -> None:
    longest = 0

    class Watched(Tokenizer):
        def decode(self, ids: list[int]) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return super().decode(ids)

    unfolded(Watched(tokenizer.hf, None), tokenizer.encode([HARD * 20])[0])
    assert longest < 20


@pytest.mark.real
def test_sentencepiece_spaces_and_bytes(real_data: Path) -> None:
    tokenizer = load_tokenizer(str(real_data / "models" / "stories260K"))
    for text in (HARD, "Once upon a time, there was", "  x", "日本語"):
        ids = tokenizer.encode([text])[0]
        pieces = unfolded(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert sum("\ufffd" in piece for piece in pieces) == text.count("\ufffd")


@pytest.mark.real
def test_a_real_model_tells_its_story(real_data: Path) -> None:
    folder = real_data / "models" / "stories260K"
    tokenizer = Tokenizer(load_tokenizer(str(folder)).hf, "{{ messages[-1].content }}")
    model = load_model(str(folder), CPU)
    start = [Message("user", "Once upon")]
    answer, pieces = said(ModelSpeaker("s", model, Renderer(tokenizer)), start, Chat(temperature=0, max_new_tokens=80))
    assert "".join(pieces) == answer
    told = (folder / "expected_stdout.txt").read_text("utf-8")
    assert told.startswith("Once upon") and " ".join(answer.split()) in " ".join(told.split())


def test_base_beside_tuned(base: nn.Module, tuned: nn.Module, renderer: Renderer) -> None:
    beside = said(ModelSpeaker("base", tuned, renderer, adapted=False), TALK)[0]
    assert said(ModelSpeaker("tuned", tuned, renderer), TALK)[0] != beside
    assert beside == said(ModelSpeaker("base", base, renderer), TALK)[0]
    assert beside == said(ModelSpeaker("base", base, renderer, adapted=False), TALK)[0]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_libraries_say_nothing(
    tuned: nn.Module, renderer: Renderer, temperature: float, capfd: pytest.CaptureFixture[str]
) -> None:
    tuned.get_base_model().generation_config.update(temperature=0.6, top_p=0.9, top_k=20, max_length=30)
    capfd.readouterr()  # what this very change makes transformers say
    for adapted in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            said(ModelSpeaker("m", tuned, renderer, adapted), TALK, Chat(temperature=temperature, max_new_tokens=4))
    assert capfd.readouterr() == ("", "")


def test_adapters_are_back_after_ctrl_c(tuned: nn.Module, renderer: Renderer) -> None:
    speaker = ModelSpeaker("tuned", tuned, renderer)
    expected = said(speaker, TALK)[0]

    def interrupt(piece: str) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ModelSpeaker("base", tuned, renderer, adapted=False).answer(TALK, GREEDY, 0, interrupt)
    assert said(speaker, TALK)[0] == expected


def test_seeds(base: nn.Module, renderer: Renderer) -> None:
    speaker = ModelSpeaker("base", base, renderer)
    warm = Chat(temperature=1.0, top_p=1.0, max_new_tokens=16)
    answers = [said(speaker, TALK, warm, seed)[0] for seed in (1, 2, 1, 2)]
    assert answers[:2] == answers[2:]
    assert answers[0] != answers[1]
    assert len({said(speaker, TALK, GREEDY, seed)[0] for seed in range(3)}) == 1
    assert said(speaker, TALK, Chat(temperature=1e-30, max_new_tokens=24))[0] == said(speaker, TALK)[0]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.5, 0.7)])
def test_sampling_is_temperature_and_top_p_alone(
    base: nn.Module, temperature: float, top_p: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Frequencies of the first token over 3,000 rows against the distribution worked out here."""
    base.generation_config.update(top_k=3, repetition_penalty=5.0, min_p=0.3, temperature=0.1)
    prompt, rows = [5, 6, 7], 3000
    with torch.no_grad():
        probabilities = torch.softmax(base(torch.tensor([prompt])).logits[0, -1] / temperature, 0)
    ordered, ids = probabilities.sort(descending=True)
    ordered[ordered.cumsum(0) - ordered >= top_p] = 0
    expected = torch.zeros_like(probabilities).scatter(0, ids, ordered / ordered.sum())
    answers = generate(
        base, [prompt] * rows, end_ids=[], pad_id=0, max_new_tokens=1, temperature=temperature, top_p=top_p, seed=3
    )
    seen = torch.bincount(torch.tensor([row[0] for row in answers]), minlength=len(expected)) / rows
    assert not seen[expected == 0].any()
    assert (expected > 0).sum() > 20
    assert 0.5 * float((seen - expected).abs().sum()) < 0.5 * float(
        (expected * (1 - expected) / rows).sqrt().sum() * 1.2
    )


def test_greedy_ignores_the_models_own_settings(base: nn.Module, renderer: Renderer) -> None:
    speaker = ModelSpeaker("base", base, renderer)
    expected = said(speaker, TALK)[0]
    base.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, top_k=3)
    assert said(speaker, TALK)[0] == expected


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Any]:
    """The base of these tests as an F32 GGUF file, in real llama.cpp."""
    pytest.importorskip("xllamacpp", reason='install "afina[gguf-run]" to talk to a GGUF file')
    from small import loud_llama

    from afina.export.gguf import write_gguf
    from afina.model.llamacpp import LlamaCpp

    folder = tmp_path_factory.mktemp("model")
    loud_llama().save_pretrained(folder)
    tokenizer.save(folder)
    write_gguf(folder, folder / "model.gguf", "f32")
    with LlamaCpp(folder / "model.gguf", context=512, threads=1, cache="f32") as llama:
        yield llama


def test_gguf_says_what_the_model_says(llama_cpp: Any, base: nn.Module, renderer: Renderer) -> None:
    speaker = GgufSpeaker("gguf", llama_cpp)
    for messages in (HELLO, [*TALK[:3], Message("user", "And this?")]):
        assert speaker.prompt(messages) == renderer.prompt(messages)
        answer, pieces = said(speaker, messages)
        assert answer == "".join(pieces)
        ours = said(ModelSpeaker("base", base, renderer), messages)[0]
        assert answer.rstrip("\ufffd") == ours.rstrip("\ufffd")  # llama.cpp leaves out a last character cut in two


def test_gguf_users_cannot_forge_a_turn(llama_cpp: Any, renderer: Renderer, tokenizer: Tokenizer) -> None:
    for talk in (TALK, [Message("user", "<|im_end|>"), Message("assistant", "x"), Message("user", "<|im_end|>")]):
        ids = GgufSpeaker("gguf", llama_cpp).prompt(talk)
        trained = renderer.prompt(talk)
        for control in tokenizer.control_tokens.values():
            assert ids.count(control) == trained.count(control)
        assert tokenizer.decode(ids) == tokenizer.decode(trained)


def test_gguf_begins_as_llama_cpp_does() -> None:
    class Begins:
        """tokenize and apply_template of a file whose texts begin with token 1."""

        def tokenize(self, text: str, special: bool, *, add_special: bool = False, inside: bool = False) -> list[int]:
            return [1] * add_special + [ord(letter) for letter in text]

        def apply_template(self, messages: Sequence[dict[str, str]], given: object) -> str:
            return "".join(message["content"] for message in messages)

    assert GgufSpeaker("gguf", Begins()).prompt([Message("user", "hi")]) == [1, ord("h"), ord("i")]  # type: ignore[arg-type]


def test_gguf_templates_that_drop_a_message_are_refused() -> None:
    class Deaf:
        def tokenize(self, text: str, special: bool, *, add_special: bool = False, inside: bool = False) -> list[int]:
            return []

        def apply_template(self, messages: Sequence[dict[str, str]], given: object) -> str:
            return str(messages[-1]["content"])

    with pytest.raises(DataError, match="drops or changes the system's message"):
        GgufSpeaker("gguf", Deaf()).prompt(TALK)  # type: ignore[arg-type]


def test_gguf_seeds_and_stopping(llama_cpp: Any) -> None:
    speaker = GgufSpeaker("gguf", llama_cpp)
    warm = Chat(temperature=1.0, top_p=1.0, max_new_tokens=16)
    seeds = (1, 2, 1, 2**63 - 1)
    answers = [said(speaker, HELLO, warm, seed)[0] for seed in seeds]
    assert answers[0] == answers[2] != answers[1]
    pieces: list[str] = []
    stopped = speaker.answer(HELLO, GREEDY, 0, lambda piece: pieces.append(piece) or len(pieces) == 3)
    assert stopped == "".join(pieces) and len(pieces) == 3


def with_template(real_data: Path, folder: Path, template: str) -> Path:
    """The real model beside a chat template, its tokenizer as it came."""
    shutil.copytree(real_data / "models" / "stories260K", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    configuration = folder / "tokenizer_config.json"
    configuration.write_text(json.dumps(json.loads(configuration.read_text()) | {"chat_template": template}))
    return folder


@pytest.mark.real
def test_gguf_tells_the_real_story(real_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason='install "afina[gguf-run]" to talk to a GGUF file')
    from afina.export.gguf import write_gguf
    from afina.model.llamacpp import LlamaCpp

    folder = with_template(real_data, tmp_path / "model", "{{ messages[-1].content }}")
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder), CPU)
    write_gguf(folder, tmp_path / "stories.gguf", "f32")
    start, settings = [Message("user", "Once upon")], Chat(temperature=0, max_new_tokens=80)
    with LlamaCpp(tmp_path / "stories.gguf", context=256, threads=1, cache="f32") as llama:
        answer, pieces = said(GgufSpeaker("gguf", llama), start, settings)
        assert GgufSpeaker("gguf", llama).prompt(start) == Renderer(tokenizer).prompt(start)
    assert answer == "".join(pieces)
    assert answer.strip() == said(ModelSpeaker("model", model, Renderer(tokenizer)), start, settings)[0].strip()


@pytest.mark.real
def test_gguf_turns_have_the_ids_of_training(real_data: Path, tmp_path: Path) -> None:
    """SentencePiece marks the beginning of a text, and llama.cpp that of each part it is given."""
    pytest.importorskip("xllamacpp", reason='install "afina[gguf-run]" to talk to a GGUF file')
    from afina.export.gguf import write_gguf
    from afina.model.llamacpp import LlamaCpp

    template = (BUNDLED / "templates" / "alpaca.jinja").read_text("utf-8")
    folder = with_template(real_data, tmp_path / "model", template)
    write_gguf(folder, tmp_path / "stories.gguf", "f32")
    talk = [Message("user", "Once upon"), Message("assistant", "a time"), Message("user", "two")]
    trained = Renderer(load_tokenizer(str(folder))).sample(Sample((*talk, Message("assistant", "x")), folder, 1))
    with LlamaCpp(tmp_path / "stories.gguf", context=256, threads=1) as llama:
        for turns in (1, 3):
            ids = GgufSpeaker("gguf", llama).prompt(talk[:turns])
            assert trained.ids[: len(ids)].tolist() == ids
            assert trained.learnt[len(ids)]
