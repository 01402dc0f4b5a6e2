"""The server as its users meet it: a real process, asked by OpenAI's own client, and by those who mean no good."""

import json
import socket
import struct
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from serve.serving import Server, served, start
from small import CPU, perturb_adapters

from afina.artifact import parent, seal, source_digest
from afina.data.conversation import Message
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.model.load import load_model
from afina.model.saved import load_adapter, save_adapter
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Chat, Recipe
from afina.serve.speakers import ModelSpeaker

pytest.importorskip("uvicorn", reason='install "afina[serve]" to serve')
TINY = str(BUNDLED / "tiny")
QUESTIONS = ["¿Qué es una función?", "What is a loop?", "Hola", "Tell me a story about a <|im_end|> dog."]
ROOMS = [40, 24, 12, 30]
SCHEMA = {
    "type": "object",
    "properties": {"bot_name": {"type": "string", "maxLength": 12}, "steps": {"type": "integer"}},
    "required": ["bot_name", "steps"],
    "additionalProperties": False,
}


def asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def sent(server: Server, body: dict) -> socket.socket:
    """A chat request whose answer nobody has read yet."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {TestRefusals.CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Adapters on the bundled base: one in PEFT's format, and a run that sings and answers coldly."""
    place = tmp_path_factory.mktemp("served")
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    for seed, name in enumerate(("pirate", "poet")):
        torch.manual_seed(seed)
        model = perturb_adapters(get_peft_model(load_model(TINY, CPU), config), seed + 5)
        save_adapter(model, place / name / "adapter", base="x")
    said = {"temperature": 0, "system": "You answer in verse.", "max_new_tokens": 9}
    recipe = Recipe.model_validate({"name": "poet", "data": {"train": "x"}, "model": {"base": TINY}, "chat": said})
    load_tokenizer(TINY).save(place / "poet" / "adapter")
    recorded = [parent(TINY, str(source_digest(Path(TINY))), "base")]
    seal(place / "poet", "run", parents=recorded, recipe=recipe.resolved(), recipe_folder=str(place))
    return {"pirate": place / "pirate" / "adapter", "poet": place / "poet"}


@pytest.fixture(scope="module")
def server(folders):
    named = [part for name, folder in folders.items() for part in ("--adapter", f"{name}={folder}")]
    with served(TINY, *named, "--at-once", 8, "--waiting", 56) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def chatted(folders) -> dict[str, list[str]]:
    """What each says in a chat, greedily."""
    renderer = Renderer(load_tokenizer(TINY))
    found = {}
    for name in ("base", "pirate"):
        model = load_model(TINY, CPU)
        model = model if name == "base" else load_adapter(model, folders[name])
        found[name] = [
            ModelSpeaker(name, model, renderer).answer(
                [Message("user", question)], Chat(temperature=0, max_new_tokens=room), 0, lambda _piece: None
            )
            for question, room in zip(QUESTIONS, ROOMS, strict=True)
        ]
    return found


class TestAnswers:
    def test_whom_one_can_ask(self, client):
        assert [model.id for model in client.models.list()] == ["base", "pirate", "poet"]
        assert client.models.retrieve("pirate").object == "model"
        with pytest.raises(openai.NotFoundError, match="no model called"):
            client.models.retrieve("parrot")

    def test_alone_and_among_others_each_answers_as_in_a_chat(self, client, chatted):
        """Greedy text, to the letter; personalities are mixed, some answers stream."""
        assert len({str(chatted[name]) for name in chatted}) == 2

        def ask(job: tuple[str, int, bool]) -> str:
            name, place, stream = job
            given = {"model": name, "messages": asked(QUESTIONS[place]), "temperature": 0, "max_tokens": ROOMS[place]}
            if not stream:
                return client.chat.completions.create(**given).choices[0].message.content
            return "".join(
                chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**given, stream=True)
            )

        jobs = [(name, place, stream) for place in range(4) for name in chatted for stream in (False, True)]
        want = [chatted[name][place] for name, place, _stream in jobs]
        assert [ask(job) for job in jobs] == want
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(ask, jobs)) == want

    def test_what_is_not_said_is_as_the_recipe_says(self, client, folders):
        """Temperature, length and the system message are the run's own."""
        renderer, model = (
            Renderer(load_tokenizer(TINY)),
            load_adapter(load_model(TINY, CPU), folders["poet"] / "adapter"),
        )
        system = Message("system", "You answer in verse.")
        want = ModelSpeaker("poet", model, renderer).answer(
            [system, Message("user", "Hola")], Chat(temperature=0, max_new_tokens=9), 0, lambda _piece: None
        )
        found = [client.chat.completions.create(model="poet", messages=asked("Hola")) for _time in range(2)]
        assert [one.choices[0].message.content for one in found] == [want, want]
        prompt = renderer.prompt([system, Message("user", "Hola")])
        assert found[0].usage.prompt_tokens == len(prompt)
        own = [{"role": "system", "content": "Be brief."}, *asked("Hola")]
        other = client.chat.completions.create(model="poet", messages=own)
        assert other.usage.prompt_tokens == len(
            renderer.prompt([Message("system", "Be brief."), Message("user", "Hola")])
        )

    def test_why_it_ended_and_what_it_cost(self, client, chatted):
        create = client.chat.completions.create
        cut = create(model="base", messages=asked(QUESTIONS[0]), temperature=0, max_completion_tokens=3)
        assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
        whole = create(model="base", messages=asked(QUESTIONS[0]), temperature=0, max_tokens=200)
        tokenizer = load_tokenizer(TINY)
        written = tokenizer.encode([whole.choices[0].message.content])[0]
        assert whole.choices[0].finish_reason == "stop" and whole.usage.completion_tokens == len(written) + 1
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        text = chatted["base"][0]
        stop = text[4:7]
        for stream in (False, True):
            given = {"model": "base", "messages": asked(QUESTIONS[0]), "temperature": 0, "stop": ["zz", stop]}
            if stream:
                chunks = list(create(**given, stream=True, stream_options={"include_usage": True}))
                assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
                said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
                assert chunks[-2].choices[0].finish_reason == "stop" and chunks[0].choices[0].delta.role == "assistant"
            else:
                said = create(**given).choices[0].message.content
            assert said == text[: text.index(stop)]

    def test_several_answers_and_a_seed(self, client):
        def drawn(seed: int, count: int = 3) -> list[str]:
            found = client.chat.completions.create(
                model="base", messages=asked("Hola"), temperature=1.4, top_p=0.95, n=count, seed=seed, max_tokens=12
            )
            assert [choice.index for choice in found.choices] == list(range(count))
            return [choice.message.content for choice in found.choices]

        assert drawn(3) == drawn(3) and len(set(drawn(3))) > 1 and drawn(3) != drawn(9)
        assert drawn(4, 1) == drawn(3)[1:2]

    def test_likelihoods(self, client):
        found = client.chat.completions.create(
            model="base", messages=asked("Hola"), temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
        ).choices[0]
        told = found.logprobs.content
        assert "".join(one.token for one in told) == found.message.content and len(told) == 6
        for one in told:
            assert one.top_logprobs[0].token == one.token and one.top_logprobs[0].logprob == one.logprob <= 0
            assert len(one.top_logprobs) == 3 and bytes(one.bytes).decode() == one.token
        old = client.completions.create(model="base", prompt="Once upon", temperature=0, max_tokens=5, logprobs=2)
        assert "".join(old.choices[0].logprobs.tokens) == old.choices[0].text
        assert old.choices[0].logprobs.text_offset[0] == 0 and len(old.choices[0].logprobs.top_logprobs[0]) == 2

    def test_bare_texts(self, client):
        """As text is learnt: no template; ids are taken as they are, control tokens too, texts never become any."""
        tokenizer = load_tokenizer(TINY)
        ids = Renderer(tokenizer).prompt([Message("user", QUESTIONS[0])])
        chat = client.chat.completions.create(model="base", messages=asked(QUESTIONS[0]), temperature=0, max_tokens=40)
        given = {"model": "base", "temperature": 0, "max_tokens": 40}
        assert client.completions.create(prompt=ids, **given).choices[0].text == chat.choices[0].message.content
        spelled = client.completions.create(prompt="<|im_end|>", **given | {"max_tokens": 1})
        assert spelled.usage.prompt_tokens > 1
        several = client.completions.create(prompt=["Once upon", "Hola"], n=2, **given | {"max_tokens": 4})
        assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
        assert several.choices[0].text == several.choices[1].text != several.choices[2].text
        streamed = client.completions.create(prompt="Once upon", stream=True, **given | {"max_tokens": 4})
        assert "".join(chunk.choices[0].text for chunk in streamed) == several.choices[0].text

    def test_json_of_a_schema(self, client):
        for seed in range(4):
            found = client.chat.completions.create(
                model="pirate",
                messages=asked("Make me a bot."),
                temperature=1.2,
                seed=seed,
                max_tokens=200,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "bot", "strict": True, "schema": SCHEMA},
                },
            ).choices[0]
            bot = json.loads(found.message.content)
            assert set(bot) == {"bot_name", "steps"} and isinstance(bot["steps"], int) and found.finish_reason == "stop"
        whole = client.chat.completions.create(
            model="base", messages=asked("Hola"), temperature=0, max_tokens=120, response_format={"type": "json_object"}
        ).choices[0]
        assert whole.finish_reason == "length" or isinstance(json.loads(whole.message.content), dict)

    def test_penalties_and_biases(self, client):
        (index,) = load_tokenizer(TINY).encode(["Hola"])[0]
        given = {"model": "base", "messages": asked("Hola"), "temperature": 0, "max_tokens": 4}
        create = client.chat.completions.create
        assert create(**given, logit_bias={str(index): 100}).choices[0].message.content == "HolaHolaHolaHola"
        said = create(**given, logit_bias={str(index): 40}, frequency_penalty=2, presence_penalty=2).choices[0]
        assert said.message.content != create(**given).choices[0].message.content


class TestRefusals:
    """Each in OpenAI's form, by name, with the right status; and never a silent one."""

    CHAT = "/v1/chat/completions"

    @pytest.mark.parametrize(
        ("changes", "status", "said", "param"),
        [
            ({"model": "gpt-9"}, 404, "no model called 'gpt-9'. There are base, pirate, poet.", "model"),
            ({"temperature": 3}, 400, "temperature", "temperature"),
            ({"temperature": "hot"}, 400, "temperature", "temperature"),
            ({"n": 0}, 400, "n:", "n"),
            ({"n": True}, 400, "n:", "n"),
            ({"top_k": 5}, 400, "top_k is not supported. Did you mean top_p?", "top_k"),
            ({"tools": [{"type": "function"}]}, 400, "tools is not supported", "tools"),
            ({"reasoning_effort": "low"}, 400, "knows no reasoning effort", None),
            ({"reasoning_effort": "much"}, 400, "reasoning_effort", "reasoning_effort"),
            ({"stop": ["x"] * 40}, 400, "stop", "stop"),
            ({"max_tokens": 1, "max_completion_tokens": 2}, 400, "say two things", "max_tokens"),
            ({"top_logprobs": 2}, 400, "needs logprobs", "top_logprobs"),
            ({"messages": []}, 400, "messages", "messages"),
            ({"messages": [{"role": "user"}]}, 400, "message 1 has no text content", "messages.0"),
            ({"messages": [{"role": "{number.real}", "content": "x"}]}, 400, "{number.real}", "messages.0"),
            ({"messages": [{"role": "user", "content": "x", "cache": 1}]}, 400, "not supported", "messages.0.cache"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text content", "messages.0"),
            ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half a character", "messages.0"),
            ({"messages": asked("word " * 5000)}, 400, "context", "messages"),
            ({"response_format": {"type": "xml"}}, 400, "response_format is", "response_format"),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
                400,
                "Nothing can be written",
                None,
            ),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 2**16]}}}},
                400,
                "characters",
                "response_format",
            ),
            ({"logit_bias": {"x": 1}}, 400, "logit_bias", "logit_bias"),
            ({"stream_options": {"obfuscate": True}}, 400, "stream_options.obfuscate", "stream_options.obfuscate"),
            ({"chat_template": "{{ 1 }}"}, 400, "chat_template is not supported", "chat_template"),
            ({"seed": 2**80}, 400, "seed", "seed"),
        ],
    )
    def test_in_a_sentence(self, server, changes, status, said, param):
        body = {"model": "base", "messages": asked("Hola"), "max_tokens": 2, **changes}
        found, _headers, answer = server.raw("POST", self.CHAT, json.dumps(body).encode())
        assert (found, answer["error"]["param"]) == (status, param), answer
        assert said in answer["error"]["message"] and answer["error"]["type"].endswith("_error")

    @pytest.mark.parametrize(
        ("body", "status", "said"),
        [
            (b"{", 400, "not valid JSON"),
            (b"", 400, "not a JSON object"),
            (b"[1]", 400, "not a JSON object"),
            (b'{"model": NaN}', 400, "model"),
            (b'{"model": "base", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, ""),
            (b'{"model": "base", "messages": ' + b"[" * 90 + b"]" * 90 + b"}", 400, "levels deep"),
            (b'{"seed": ' + b"9" * 10_000 + b"}", 400, ""),
            (b"\xff\xfe", 400, ""),
            (b" " * (2**21 + 1), 413, "larger than 2 MiB"),
        ],
        ids=["half", "empty", "list", "nan", "deepest", "deep", "number", "bytes", "large"],
    )
    def test_of_bodies(self, server, body, status, said):
        found, _headers, answer = server.raw("POST", self.CHAT, body)
        assert found == status and said in answer["error"]["message"]

    def test_of_texts(self, server):
        for more, said in (
            ({"prompt": ""}, "not empty"),
            ({"prompt": [10**9]}, "below"),
            ({"prompt": [[]]}, "not empty"),
        ):
            found, _headers, answer = server.raw(
                "POST", "/v1/completions", json.dumps({"model": "base", **more}).encode()
            )
            assert found == 400 and said in answer["error"]["message"]
        for more in ({"echo": True}, {"suffix": "x"}, {"best_of": 3}):
            body = json.dumps({"model": "base", "prompt": "x", **more}).encode()
            found, _headers, answer = server.raw("POST", "/v1/completions", body)
            assert found == 400 and next(iter(more)) in answer["error"]["message"]

    def test_of_other_places_and_sites(self, server):
        assert server.raw("GET", "/v2/models")[0] == 404 and server.raw("GET", self.CHAT)[0] == 405
        for host in ("evil.com", "127.0.0.1.nip.io", "localhost.evil.com:80", "a/?", "[::1]evil", "0.0.0.0", ""):
            assert server.raw("GET", "/v1/models", Host=host)[0] == 403, host
        here = f"localhost:{server.port}"
        assert server.raw("GET", "/v1/models", Host=here, Origin=f"http://{here}")[0] == 200
        for origin in ("https://elsewhere", "null", f"http://{here}.elsewhere"):
            assert server.raw("POST", self.CHAT, b"{}", Host=here, Origin=origin)[0] == 403, origin
        body = json.dumps({"model": "base", "messages": asked("Hola"), "max_tokens": 1}).encode()
        assert server.raw("POST", self.CHAT, body, Content_Type="text/plain")[0] == 400


class TestManyAtOnce:
    def test_fifty_clients_get_their_answers(self, server, chatted):
        """More than are written together: they wait, and each gets its own."""

        def ask(number: int) -> bool:
            name, place = ("base", "pirate")[number % 2], number % 4
            given = {"messages": asked(QUESTIONS[place]), "temperature": 0, "max_tokens": ROOMS[place]}
            found = server.client().chat.completions.create(model=name, **given)
            return found.choices[0].message.content == chatted[name][place]

        with ThreadPoolExecutor(50) as pool:
            assert all(pool.map(ask, range(50)))
        assert server.calms()

    def test_who_hangs_up_frees_its_place(self, server, client):
        """In the middle of a stream, while waiting for a whole answer, and at once after asking."""
        given = {"model": "base", "messages": asked("Hola"), "max_tokens": 400, "logit_bias": {"3": -100}}
        for _time in range(3):
            streams = [client.chat.completions.create(**given, stream=True) for _stream in range(6)]
            for stream in streams:
                next(iter(stream))
            assert server.answers() >= 6
            for stream in streams:
                stream.close()
            for patience in (0.0, 0.05, 0.2):
                connection = sent(server, given)
                time.sleep(patience)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()  # a reset
            assert server.calms()
        left = [event for event in server.events("request") if event.get("left") == "the client left"]
        assert len(left) >= 18 and sum(event.get("tokens", 0) for event in left) < 18 * 400

    def test_who_does_not_read_holds_nobody_up(self, server, client, chatted):
        body = {"model": "base", "messages": asked("Hola"), "max_tokens": 400, "stream": True, "n": 4}
        lazy = sent(server, {**body, "logprobs": True, "top_logprobs": 20, "logit_bias": {"3": -100}})
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _time in range(3):
            found = client.chat.completions.create(
                model="base", messages=asked(QUESTIONS[0]), temperature=0, max_tokens=ROOMS[0]
            )
            assert found.choices[0].message.content == chatted["base"][0]
        lazy.close()
        assert server.calms()

    def test_where_all_places_are_taken_it_says_so(self, server, client):
        given = {"model": "base", "messages": asked("Hola"), "max_tokens": 400, "logit_bias": {"3": -100}}
        holding = [sent(server, {**given, "n": 16, "stream": True}) for _four in range(4)]
        while server.answers() < 64:
            time.sleep(0.01)
        status, headers, answer = server.raw("POST", TestRefusals.CHAT, json.dumps(given).encode())
        assert status == 503 and int(headers["retry-after"]) > 0 and answer["error"]["code"] == "overloaded"
        for connection in holding:
            connection.close()
        assert server.calms()
        many = json.dumps({"model": "base", "prompt": ["x"] * 64, "n": 2}).encode()
        status, _headers, answer = server.raw("POST", "/v1/completions", many)
        assert status == 400 and "64 places" in answer["error"]["message"]


class TestItsLife:
    def test_stopped_while_it_answers(self, folders):
        """Behind a key. What is short is finished, what is long is ended in a sentence, who waits is told so."""
        with served(TINY, "--at-once", 2, AFINA_API_KEY="s3cret") as server:
            for key in ("wrong", "", "s3cret "):
                status, headers, _answer = server.raw("GET", "/v1/models", Authorization=f"Bearer {key}x")
                assert status == 401 and headers["www-authenticate"] == "Bearer"
            assert server.raw("GET", "/v1/models", Host="anything", Authorization="Bearer s3cret")[0] == 200
            assert server.raw("GET", "/health")[2]["status"] == "ok"
            client = server.client("s3cret")
            given = {"model": "tiny", "messages": asked("Hola"), "logit_bias": {"3": -100}, "stream": True}
            short = client.chat.completions.create(**given, max_tokens=150)
            endless = client.chat.completions.create(**given, max_tokens=450)
            heard = [next(iter(short)), next(iter(endless))]
            with ThreadPoolExecutor(1) as pool:
                waits = pool.submit(lambda: list(client.chat.completions.create(**given, max_tokens=9)))
                while server.answers() < 3:
                    time.sleep(0.01)
                began = time.monotonic()
                server.process.terminate()
                heard += list(short)
                with pytest.raises(openai.InternalServerError, match="being stopped"):
                    waits.result()
            try:
                heard += list(endless)
            except openai.APIError as error:  # on a slow machine
                assert "being stopped" in str(error)
            assert heard[-1].choices[0].finish_reason in ("length", None)
            assert server.process.wait(timeout=30) == 143 and time.monotonic() - began < 15
            assert "s3cret" not in server.log.read_text() + server.log.with_suffix(".err").read_text()
            assert server.events("error")[0]["exit_status"] == 143

    def test_what_cannot_be_served_is_told_at_once(self, tmp_path, server):
        """A port that is taken before the model is loaded, a model that is not there."""
        for number, (arguments, status, said) in enumerate(
            (
                ([TINY, "--port", server.port], 6, "cannot be listened on"),
                ([tmp_path / "nothing"], 4, "nothing"),
                ([tmp_path / "x.gguf", "--adapter", "a=b"], 2, "takes no adapters"),
            )
        ):
            log = tmp_path / f"{number}.log"
            process = start(*arguments, log=log) if number else self._with_port(arguments, log)
            assert process.wait(timeout=60) == status
            assert said in log.read_text() and "Traceback" not in log.with_suffix(".err").read_text()

    @staticmethod
    def _with_port(arguments: list[object], log: Path) -> subprocess.Popen:
        """The last --port counts; the helper's own comes last."""
        import sys

        with log.open("wb") as out, log.with_suffix(".err").open("wb") as err:
            command = [sys.executable, "-m", "afina", "serve", *map(str, arguments), "--json"]
            return subprocess.Popen(command, stdout=out, stderr=err)

    def test_every_request_is_written_down(self, server: Server, client):
        before = len(server.events("request"))
        client.chat.completions.create(model="pirate", messages=asked("Hola"), max_tokens=3, temperature=0)
        server.raw("GET", "/nix")
        told = server.events("request")[before:]
        assert [event["status"] for event in told] == [200, 404]
        assert told[0]["tokens"] == 3 and told[0]["asked"] > 3 and told[0]["model"] == "pirate"
