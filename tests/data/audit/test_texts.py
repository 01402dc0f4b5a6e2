"""What can be wrong with one text: mojibake with its proof, secrets by their forms and checksums, markup."""

import random
import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from afina.data.audit.fix import text_mended
from afina.data.audit.letters import letters
from afina.data.audit.mojibake import ENCODINGS, repair
from afina.data.audit.secret import is_account, is_card
from afina.data.audit.text import CONTROL, faults

SENTENCES = {
    "hu": [
        "Szép időnk van ma, menjünk ki a kertbe",
        "A fűszeres tésztát tányérra öntötték",
        "Az őrült író nyúlszőrt gyűjt",
    ],
    "de": ["Die Bücher liegen größtenteils auf den Stühlen", "Fröhliche Grüße aus München", "Ärger über schöne Öfen"],
    "cs": [
        "Kočka leží na střeše a dívá se na ptáky",
        "Zítra přijede můj přítel z Plzně",
        "Učitel píše na černou tabuli",
    ],
    "ru": ["Мы завтра поедем на дачу", "Книга лежит на столе", "Он читает новую газету"],
    "ja": ["猫が窓のそばで寝ています", "明日は友達と映画を見に行きます"],
    "es": ["El niño comió una piña en la montaña", "¿Dónde está mi corazón? ¡Aquí!", "Según él, la acción será rápida"],
    "fr": ["Le garçon a mangé des pâtes à la crème", "Où êtes-vous allés l’été passé ?", "Ça coûte très cher à Noël"],
    "pl": ["Źrebię biegnie przez łąkę", "Mój brat mieszka w Łodzi", "Książka leży pod łóżkiem"],
    "pt": ["O avô não comeu o pão de manhã", "A estação é à direita", "Três irmãos vão à praça"],
    "el": ["Το βιβλίο είναι πάνω στο τραπέζι", "Πού είναι ο σταθμός;"],
    "emoji": ["Well done 🎉 and thanks 😀", "“quoted” — and it’s 20 € only…"],
}
MISREAD = ("latin-1", "cp1252", "latin-2", "cp1250")


def misread(text: str, encoding: str, layers: int) -> str | None:
    for _layer in range(layers):
        try:
            text = text.encode("utf-8").decode(ENCODINGS[encoding])
        except UnicodeError:
            return None
    return text


@pytest.mark.parametrize("layers", [1, 2])
def test_mojibake_of_ten_languages_is_found_and_undone(layers: int):
    """reliability: at least 99% of damaged texts found, 95% put right; each proved by the way back."""
    asked = found = right = 0
    for sentences in SENTENCES.values():
        for sentence in sentences:
            for encoding in MISREAD:
                if (damaged := misread(sentence, encoding, layers)) is not None:
                    asked += 1
                    repaired = repair(damaged)
                    found += repaired is not None
                    right += repaired is not None and repaired.text == sentence
    assert asked > 90
    assert found >= 0.99 * asked and right >= 0.95 * asked, (asked, found, right)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([s for group in SENTENCES.values() for s in group]),
    st.sampled_from([*ENCODINGS]),
    st.integers(1, 2),
)
def test_the_proof_of_a_repair_is_its_way_back(sentence: str, encoding: str, layers: int):
    damaged = misread(sentence, encoding, layers)
    repaired = repair(damaged) if damaged is not None else None
    if repaired is not None and repaired.text == sentence and set(repaired.encodings) == {encoding}:
        assert repaired.damage() == damaged


@pytest.mark.parametrize(
    "text", [*(s for group in SENTENCES.values() for s in group), "MANHÃ“", "CAFÉ…", "všё»", "RÉSUMÉ™"]
)
def test_sound_text_is_left_alone(text: str):
    assert repair(text) is None


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=60))
@example("\u0301 \u0301")
def test_a_mended_text_stays_mended(text: str):
    once = text_mended(text)
    assert text_mended(once) == once
    assert not {"nul", "invisible", "direction", "control-character"} & {fault.kind for fault in letters(once)}


def test_cards_and_accounts_are_told_by_their_checksums():
    rng = random.Random(8)
    numbers = ["4" + "".join(rng.choices(string.digits, k=15)) for _ in range(3000)]
    assert 0.08 < sum(map(is_card, numbers)) / len(numbers) < 0.12
    assert is_card("4012888888881881") and not is_card("4012888888881882")
    assert is_account("DE89370400440532013000") and not is_account("DE89370400440532013001")


@pytest.mark.parametrize(
    "text",
    [
        "write to info@example.com or root@localhost",
        "logo@2x.png @property user@ ab@c",
        "export HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "key = 'sk-your-key-goes-here-please'; id = 'AKIAIOSFODNN7EXAMPLE'",
        "0.4111111111111111 and 1234567890123456 and 4111-2222",
        "https://user:password@host/path https://host/a:b@c",
        "sk-learn-extra-long-dashed-name-of-a-thing",
        "x" * 50,
    ],
)
def test_placeholders_and_look_alikes_are_no_secrets(text: str):
    assert not {fault.kind for fault in faults(text)} & {"secret-key", "card-number", "email", "password-in-url"}


@pytest.mark.parametrize(
    "text",
    [
        "<div>a</div>",
        "a < b | c > d",
        "<<3*4=12>>",
        "[1] [a]",
        "<s>struck</s>",
        "x <- y",
        "List<String>",
        "<think>",
        "R&D",
    ],
)
def test_ordinary_signs_are_no_control_tokens(text: str):
    assert not {fault.kind for fault in faults(text)}


def test_every_family_has_its_control_tokens():
    tokens = [
        "<|im_start|>",
        "<|eot_id|>",
        "<｜end▁of▁sentence｜>",
        "<end_of_turn>",
        "[INST]",
        "<<SYS>>",
        "</s>",
        "<bos>",
    ]
    for token in tokens:
        assert CONTROL.search(f"a {token} b"), token


@pytest.mark.parametrize(
    "text",
    ["می‌خواهم", "👩‍👩‍👧 family", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "عربي\u200f و English", "naïve café", "हिन्दी क्‍ष", "한국어", "…—“”«»", "❤️"],
)
def test_characters_that_scripts_need_are_no_faults(text: str):
    assert not list(letters(text))
