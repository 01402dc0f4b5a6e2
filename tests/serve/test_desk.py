"""Wishes at a desk: who is there for a run, a model and a GGUF file, what is told, and what being stopped means."""

import queue
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import CPU, loud_llama, perturb_adapters

from afina.artifact import parent, seal, source_digest
from afina.data.conversation import Message
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.errors import DataError
from afina.model.continuous import Writing
from afina.model.load import load_model
from afina.model.saved import save_adapter
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Chat, Recipe
from afina.serve.desk import Until
from afina.serve.serving import open_desk
from afina.serve.speakers import GgufSpeaker, ModelSpeaker
from afina.serve.wish import Desk, Over, Piece, Refusal, Wish
from afina.train.reopen import reopen

HELLO = (Message("user", "What is a loop?"),)


def run_folder(place: Path, tokenizer, method: str) -> Path:
    """A run of the small Llama, and its base beside it."""
    loud_llama().save_pretrained(place / "base")
    tokenizer.save(place / "base")
    run = place / method
    if method == "full":
        perturb_all(loud_llama()).save_pretrained(run / "adapter")
    else:
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        save_adapter(perturb_adapters(get_peft_model(loud_llama(), config)), run / "adapter", base="x")
    tokenizer.save(run / "adapter")
    said = {"name": "tutor", "data": {"train": "x"}, "model": {"base": "base"}, "method": {"name": method}}
    recipe = Recipe.model_validate({**said, "chat": {"temperature": 0, "max_new_tokens": 8}})
    base = parent("base", str(source_digest(place / "base")), "base")
    seal(run, "run", parents=[base], recipe=recipe.resolved(), recipe_folder=str(place))
    return run


def perturb_all(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.05)
    return model


def told(desk: Desk, wish: Wish) -> list[tuple[str, object]]:
    """Text and end of each answer."""
    events: queue.Queue = queue.Queue()
    desk.take(wish, lambda number, event: events.put((number, event)))
    texts, ends = [""] * wish.answers, [None] * wish.answers
    while None in ends:
        number, event = events.get(timeout=60)
        if isinstance(event, Piece):
            texts[number] += event.text
        else:
            ends[number] = event
    return list(zip(texts, ends, strict=True))


def answer(desk: Desk, model: str, **more: object) -> str:
    ((text, end),) = told(desk, Wish(model, HELLO, **more))
    assert isinstance(end, Over)
    return text


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_answers_as_in_a_chat_with_its_base_beside(tmp_path, tokenizer, method):
    run = run_folder(tmp_path, tokenizer, method)
    with ExitStack() as stack:
        desk = open_desk(str(run), [], 4, stack)
        tuned = reopen(run)
        cold = tuned.recipe.chat
        said = ModelSpeaker("tuned", tuned.model, tuned.renderer).answer(HELLO, cold, 0, lambda _piece: None)
        assert answer(desk, "tutor") == said
        assert desk.models == (("tutor", "base") if method == "lora" else ("tutor",))
        if method == "lora":
            base = ModelSpeaker("base", tuned.model, tuned.renderer, adapted=False)
            assert answer(desk, "base") == base.answer(HELLO, cold, 0, lambda _piece: None) != said
        assert desk.limit == tuned.recipe.model.max_length
        with pytest.raises(DataError, match="no reasoning effort"):
            desk.take(Wish("tutor", HELLO, effort="low"), lambda _number, _event: None)


def test_what_is_stopped_says_so(tmp_path, tokenizer):
    """Who waits at once, who is being answered when the time is over, who comes later at the door."""
    run = run_folder(tmp_path, tokenizer, "lora")
    with ExitStack() as stack:
        desk = open_desk(str(run / ".." / "base"), [], 1, stack)
        events: queue.Queue = queue.Queue()
        long = Wish("base", HELLO, room=400, bias=dict.fromkeys(tokenizer.end_ids, -100.0), temperature=0.0)
        desk.take(long, lambda _number, event: events.put(("long", event)))
        assert isinstance(events.get(timeout=60)[1], Piece)
        desk.take(long, lambda _number, event: events.put(("waits", event)))
        desk.stop(0.3)
        ends = {}
        while len(ends) < 2:
            who, event = events.get(timeout=60)
            if not isinstance(event, Piece):
                ends[who] = event
                assert isinstance(event, Refusal) and event.status == 503 and "being stopped" in event.message
        assert list(ends) == ["waits", "long"]
        with pytest.raises(Refusal, match="being stopped"):
            desk.take(long, lambda _number, _event: None)


def test_a_model_that_fails_ends_those_it_answers_and_goes_on(tmp_path, tokenizer, monkeypatch):
    run = run_folder(tmp_path, tokenizer, "lora")
    turn = Writing.turn

    def fail(self: Writing) -> None:
        monkeypatch.setattr(Writing, "turn", turn)
        self._admit()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with ExitStack() as stack:
        desk = open_desk(str(run), [], 4, stack)
        right = answer(desk, "tutor")
        monkeypatch.setattr(Writing, "turn", fail)
        ((text, end),) = told(desk, Wish("tutor", HELLO))
        assert (text, end.status) == ("", 503) and "memory of the GPU" in end.message
        assert answer(desk, "tutor") == right


@pytest.mark.parametrize(
    ("pieces", "stops", "want"),
    [
        (["ab", "cd"], (), "abcd"),
        (["ab", "cd", "ef"], ("cde",), "ab"),
        (["ab", "cd", "xe"], ("cde",), "abcdxe"),
        (["a", "a", "a", "b"], ("aab",), "a"),
        (["ab"], ("b", "ab"), ""),
        (["end", "en"], ("endx",), "enden"),
        (["¿qué", " tal?"], ("é t",), "¿qu"),
    ],
)
def test_a_stop_text_that_comes_in_pieces(pieces, stops, want):
    """What may become one is held back, and told where it becomes none."""
    until, said = Until(stops), ""
    for piece in pieces:
        said += until.add(piece)
        assert not any(stop in said for stop in stops)
    assert said + until.rest() == want and until.over == (want != "".join(pieces))


class TestGguf:
    @pytest.fixture
    def file(self, tmp_path) -> Path:
        pytest.importorskip("xllamacpp", reason='install "afina[gguf-run]" to talk to a GGUF file')
        from afina.export.gguf import write_gguf

        file = tmp_path / "tiny-f32.gguf"
        write_gguf(BUNDLED / "tiny", file, "f32")
        return file

    def test_in_llama_cpp_it_answers_as_in_a_chat(self, file):
        """Several at once, and as the model does of which the file was made."""
        from afina.model.llamacpp import LlamaCpp

        cold = Chat(temperature=0, max_new_tokens=24)
        with LlamaCpp(file) as llama:
            want = GgufSpeaker("x", llama).answer(HELLO, cold, 0, lambda _piece: None)
        renderer = Renderer(load_tokenizer(str(BUNDLED / "tiny")))
        model = ModelSpeaker("x", load_model(str(BUNDLED / "tiny"), CPU), renderer)
        assert model.answer(HELLO, cold, 0, lambda _piece: None) == want
        with ExitStack() as stack:
            desk = open_desk(str(file), [], 3, stack)
            found = told(desk, Wish("tiny-f32", HELLO, count=7, temperature=0.0, room=24))
            assert [text for text, _end in found] == [want] * 7
            cut = told(desk, Wish("tiny-f32", HELLO, temperature=0.0, room=2))[0][1]
            assert cut == Over(True, 2)
            stop = want[3:6]
            assert answer(desk, "tiny-f32", temperature=0.0, stop=(stop,)) == want[: want.index(stop)]
            seeds = [answer(desk, "tiny-f32", temperature=1.5, seed=seed, room=12) for seed in (1, 1, 2)]
            assert seeds[0] == seeds[1] != seeds[2]
            ids = renderer.prompt(HELLO)
            text = told(desk, Wish("tiny-f32", texts=(tuple(ids), "Once upon"), temperature=0.0, room=24))
            assert text[0][0] == want and text[1][0]

    def test_what_llama_cpp_means_otherwise_is_refused(self, file):
        with ExitStack() as stack:
            desk = open_desk(str(file), [], 1, stack)
            for more in ({"presence": 1.0}, {"frequency": 1.0}, {"top": 0}, {"schema": "{}"}):
                with pytest.raises(Refusal, match="not supported for a GGUF"):
                    desk.take(Wish("tiny-f32", HELLO, **more), lambda _number, _event: None)
            for bad in ((), (-1,), (10**9,)):
                with pytest.raises(Refusal):
                    desk.take(Wish("tiny-f32", texts=(bad,)), lambda _number, _event: None)
            events: queue.Queue = queue.Queue()
            for who in ("long", "waits"):
                desk.take(
                    Wish("tiny-f32", HELLO, room=4000, bias={3: -100.0}),
                    lambda _number, event, who=who: events.put((who, event)),
                )
            assert events.get(timeout=60)[0] == "long"
            began = time.monotonic()
            desk.stop(0.2)
            ends = {}
            while len(ends) < 2:
                who, event = events.get(timeout=60)
                if isinstance(event, Refusal):
                    ends[who] = event.status
            assert ends == {"long": 503, "waits": 503} and time.monotonic() - began < 20
