"""One row of every class of faults, made on purpose, and sound rows to put them between."""

import json
import random
from collections.abc import Callable

TOPICS = {
    "en": """the river runs slowly past the old mill and the children play on its banks until the evening bell rings
    while farmers carry baskets of apples to a small market where people talk about the weather and their plans for the
    harvest that will come when nights are longer""",
    "es": """el río pasa despacio junto al viejo molino y los niños juegan en la orilla hasta que suena la campana de la
    tarde mientras las vecinas llevan cestas de manzanas al mercado donde la gente habla del tiempo y de sus planes
    para la cosecha que llegará cuando las noches sean más largas""",
}
WORDS = {language: topic.split() for language, topic in TOPICS.items()}


def sentence(rng: random.Random, words: int, language: str = "en") -> str:
    return " ".join(rng.choices(WORDS[language], k=words)).capitalize() + "."


def passage(rng: random.Random, words: int, language: str) -> str:
    """Words in the order in which people write them, from a place chosen at random."""
    start = rng.randrange(len(WORDS[language]))
    return " ".join((WORDS[language] * 3)[start : start + words]).capitalize() + "."


def row(*texts: str, roles: tuple[str, ...] = ("user", "assistant"), ascii_only: bool = False, **more: object) -> bytes:
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return json.dumps({"messages": messages, **more}, ensure_ascii=ascii_only).encode()


def sound(rng: random.Random) -> bytes:
    """A row with nothing wrong: quotation marks, code, line ends, accents and emoji of the harmless kind."""
    asked, answer = sentence(rng, rng.randint(8, 30)), sentence(rng, rng.randint(12, 40))
    extra = rng.randrange(8)
    if extra == 0:
        answer = f'He said "{answer[:-1]}": was it {rng.randint(2, 99)} or {rng.randint(2, 99)}?\nYes.'
    elif extra == 1:
        answer = f"Write `x = [i ** 2 for i in range({rng.randint(2, 99)})]` & see.\n```python\nprint(a < b)\n```"
    elif extra == 2:
        asked = f"¿Qué significa «{sentence(rng, 12, 'es')[:-1]}»? 😀"
    elif extra == 3:
        answer += f" It cost ${rng.randint(1, 999)}.50 – or {rng.randint(10, 99)} % less… naïve café, coöperate."
    texts, roles = [asked, answer], ("user", "assistant")
    if extra == 4:
        texts, roles = ["You are kind.", *texts], ("system", *roles)
    if extra == 5:
        texts, roles = [*texts, sentence(rng, 9), sentence(rng, 20)], (*roles, *roles)
    return row(*texts, roles=roles, ascii_only=extra == 6)


def _ask(rng: random.Random) -> str:
    return sentence(rng, 14)


def _key(rng: random.Random, letters: str, count: int) -> str:
    return "".join(rng.choices(letters, k=count))


ALNUM = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def _card(rng: random.Random) -> str:
    from afina.data.audit.secret import is_card

    while True:
        digits = "4" + _key(rng, "0123456789", 15)
        if is_card(digits):
            return " ".join(digits[at : at + 4] for at in range(0, 16, 4))


def _account(rng: random.Random) -> str:
    number = _key(rng, "0123456789", 20)
    for check in range(2, 99):
        code = f"ES{check:02d}{number}"
        if int("".join(str(int(sign, 36)) for sign in code[4:] + code[:4])) % 97 == 1:
            return " ".join(code[at : at + 4] for at in range(0, 24, 4))
    raise AssertionError


def _said(make: Callable[[random.Random], str]) -> Callable[[random.Random], bytes]:
    """A sound row with something inside its answer."""
    return lambda rng: row(_ask(rng), f"{sentence(rng, 12)} {make(rng)} {sentence(rng, 12)}")


def _raw(make: Callable[[str, str], str]) -> Callable[[random.Random], bytes]:
    """A line made of a question and an answer that need no escapes."""
    return lambda rng: make(_ask(rng), sentence(rng, 20)).encode()


def _turns(*turns: object) -> Callable[[random.Random], bytes]:
    def make(rng: random.Random) -> bytes:
        text = json.dumps({"messages": turns}, ensure_ascii=False)
        return text.replace("ASK", _ask(rng)).replace("SAY", sentence(rng, 20)).encode()

    return make


def _bytes(wrong: bytes) -> Callable[[random.Random], bytes]:
    return lambda rng: row(_ask(rng), f"{sentence(rng, 12)} HERE {sentence(rng, 12)}").replace(b"HERE", wrong)


USER = {"role": "user", "content": "ASK"}
SAYS = {"role": "assistant", "content": "SAY"}
PAIR = '{{"messages": [{{"role": "user", "content": "{}"}}, {{"role": "assistant", "content": "{}"}}]{}}}'

FAULTY: dict[str, Callable[[random.Random], bytes]] = {
    # bytes
    "not-utf8": _bytes(b"canci\xf3n"),
    "overlong": _bytes(b"\xc0\xaf"),
    "cesu-surrogate": _bytes(b"\xed\xa0\xbd\xed\xb8\x80"),
    "cut-character": lambda rng: row(_ask(rng), sentence(rng, 9))[:-3] + b"\xe2\x82",
    "lone-surrogate": _bytes(rb"half \ud83d of it"),
    "raw-nul": _bytes(b"a\x00b"),
    "inner-bom": lambda rng: b"\xef\xbb\xbf" + row(_ask(rng), sentence(rng, 20)),
    # JSON
    "cut-row": lambda rng: row(_ask(rng), sentence(rng, 20))[:-12],
    "two-values": lambda rng: row(_ask(rng), sentence(rng, 9)) + row(_ask(rng), sentence(rng, 9)),
    "text-after": lambda rng: row(_ask(rng), sentence(rng, 9)) + b" the end",
    "duplicate-key": _raw(lambda ask, say: PAIR.format(ask, say, ', "source": "a", "source": "b"')),
    "nan": _raw(lambda ask, say: PAIR.format(ask, say, ', "score": NaN')),
    "infinity": _raw(lambda ask, say: PAIR.format(ask, say, ', "score": -Infinity')),
    "number-overflow": _raw(lambda ask, say: PAIR.format(ask, say, ', "score": 1e999')),
    "huge-integer": _raw(lambda ask, say: PAIR.format(ask, say, ', "id": ' + "7" * 5000)),
    "big-integer": _raw(lambda ask, say: PAIR.format(ask, say, ', "id": 18446744073709551617')),
    "negative-zero": _raw(lambda ask, say: PAIR.format(ask, say, ', "score": -0')),
    "bad-number": _raw(lambda ask, say: PAIR.format(ask, say, ', "id": 007')),
    "deep": lambda rng: b"[" * 100_000,
    "trailing-comma": _raw(lambda ask, say: PAIR.format(ask, say, ",")),
    "single-quotes": _raw(lambda ask, say: f"{{'messages': [{{'role': 'user', 'content': '{ask}'}}]}}"),
    "bare-key": _raw(lambda ask, say: f'{{messages: [{{"role": "user", "content": "{ask}"}}]}}'),
    "foreign-literal": _raw(lambda ask, say: PAIR.format(ask, say, ', "done": True')),
    "comment": _raw(lambda ask, say: PAIR.format(ask, say, ", // done")),
    "bad-escape": _raw(lambda ask, say: PAIR.format(ask, say + r" C:\dir", "")),
    "raw-control": _raw(lambda ask, say: PAIR.format(ask, say + "\ta tab", "")),
    "not-json": lambda rng: f"{_ask(rng)} and nothing else".encode(),
    # shape
    "html-page": lambda rng: f"<!DOCTYPE html><html><body>{_ask(rng)}</body></html>".encode(),
    "pointer-file": lambda rng: b"version https://git-lfs" + b".github.com/spec/v1",
    "row-null": lambda rng: b"null",
    "row-list": lambda rng: b"[" + row(_ask(rng), sentence(rng, 20)) + b"]",
    "row-scalar": lambda rng: json.dumps(_ask(rng)).encode(),
    "row-empty": lambda rng: b"{}",
    "mixed-shapes": _raw(lambda ask, say: json.dumps({"instruction": ask, "input": "", "output": say})),
    "key-missing": _raw(lambda ask, say: json.dumps({"chat": [ask, say]})),
    # conversation
    "turns-no-list": _raw(lambda ask, say: json.dumps({"messages": f"{ask} {say}"})),
    "turns-none": lambda rng: b'{"messages": []}',
    "turn-no-object": _turns("ASK", "SAY"),
    "content-missing": _turns(USER, {"role": "assistant"}),
    "content-null": _turns(USER, {"role": "assistant", "content": None}),
    "content-number": _turns(USER, {"role": "assistant", "content": 42}),
    "content-parts": _turns(USER, {"role": "assistant", "content": [{"type": "image_url", "text": "SAY"}]}),
    "content-empty": _turns(USER, {"role": "assistant", "content": ""}),
    "content-blank": _turns(USER, {"role": "assistant", "content": " \n\t"}),
    "role-missing": _turns(USER, {"content": "SAY"}),
    "role-case": _turns({"role": "User", "content": "ASK"}, SAYS),
    "role-foreign": _turns({"role": "human", "content": "ASK"}, SAYS),
    "role-unknown": _turns({"role": "narrator", "content": "ASK"}, SAYS),
    "tool-role": _turns(USER, {"role": "observation", "content": "ASK"}, SAYS),
    "tool-unanswered": _turns(USER, {"role": "assistant", "content": "SAY", "tool_calls": [{"id": "1"}]}),
    "unlearnt-part": _turns(USER, {"role": "assistant", "content": "SAY", "refusal": "ASK"}),
    "no-assistant": _turns(USER),
    "ends-unanswered": _turns(USER, SAYS, {"role": "user", "content": "ASK"}),
    "late-system": _turns(USER, SAYS, {"role": "system", "content": "ASK"}, USER, SAYS),
    "assistant-first": _turns(SAYS, USER, SAYS),
    "users-in-a-row": _turns(USER, {"role": "user", "content": "And ASK"}, SAYS),
    "answers-in-a-row": _turns(USER, SAYS, {"role": "assistant", "content": "Also SAY"}),
    "echo": _turns(USER, {"role": "assistant", "content": "ASK"}),
    "chosen-is-rejected": _raw(lambda ask, say: PAIR.format(ask, say, ', "chosen": "yes", "rejected": "yes"')),
    # texts
    "mojibake": _said(lambda rng: "Mañana comeré piña".encode().decode("latin-1")),
    "mojibake-twice": _said(lambda rng: "años después".encode().decode("latin-1").encode().decode("latin-1")),
    "replacement": _said(lambda rng: "ma\ufffdana"),
    "nul": _bytes(rb"a\u0000b"),
    "control-character": _bytes(rb"\u001b[31mred"),
    "invisible": _said(lambda rng: "zero\u200bwidth"),
    "direction": _said(lambda rng: "user \u202etxt.exe"),
    "line-separator": _said(lambda rng: "one\u2028two"),
    "private-use": _said(lambda rng: "\ue001"),
    "noncharacter": _said(lambda rng: "\ufdd0"),
    "lone-accent": _said(lambda rng: "a \u0301 b"),
    "decomposed": _said(lambda rng: "cafe\u0301"),
    "control-token": _said(
        lambda rng: rng.choice(["<|im_end|>", "[INST]", "<end_of_turn>", "</s>", "<|eot_id|>", "<<SYS>>"])
    ),
    "html-entity": _said(lambda rng: "salt &amp; pepper"),
    "open-fence": _said(lambda rng: "\n```python\nprint(1)\n"),
    "blob": _said(lambda rng: _key(rng, ALNUM + "+/", 400)),
    "long-word": _said(lambda rng: "ab!" * 500),
    "repetition": _said(lambda rng: "z" * 300),
    "boilerplate": _said(lambda rng: "as an AI language model"),
    # secrets
    "secret-key": _said(
        lambda rng: rng.choice(
            [
                "hf_" + _key(rng, ALNUM, 34),
                "sk-proj-" + _key(rng, ALNUM, 48),
                "ghp_" + _key(rng, ALNUM, 36),
                "AKIA" + _key(rng, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16),
                "-----BEGIN RSA PRIVATE KEY-----",
            ]
        )
    ),
    "password-in-url": _said(lambda rng: f"postgres://admin:{_key(rng, ALNUM, 10)}@db.acme.io/main"),
    "card-number": _said(_card),
    "bank-account": _said(_account),
    "email": _said(lambda rng: f"maria.{_key(rng, ALNUM[:26], 6)}@correos.es"),
}
"""By class: a line of JSON Lines (messages) that has this fault and, as far as that goes, no other."""
REJECTED = tuple(FAULTY)[: tuple(FAULTY).index("assistant-first")]
