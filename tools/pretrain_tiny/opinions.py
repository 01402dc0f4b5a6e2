"""Everyday judgement: what people lived through, how they felt about it, and what they did next.

Each text hides one outcome (well, badly, so-so) behind its evidence, and the evidence, the feeling, the decision and
the listener's reply all follow from it, in varying order. To predict the rest, a model has to work the outcome out. The
outcome itself is never named: there are no labels here, and nothing that looks like a classification task.
"""

from __future__ import annotations

import random
import re
import unicodedata
from dataclasses import dataclass, field

from grammar import Voice, agree, noun_agreement, pluralise, read_sections, sentence
from people import ENGLISH, speaker

OUTCOMES = ("bien", "mal", "regular")
ODDS = (36, 36, 28)


@dataclass(frozen=True)
class Aspect:
    """Nouns that belong together, and the adjectives and deeds that each outcome has for them."""

    verbs: list[str]
    nouns: list[str]
    adjectives: dict[str, list[str]]
    deeds: dict[str, list[str]]

    def clause(self, rng: random.Random, outcome: str) -> str:
        """Such as "la sopa estaba deliciosa"."""
        noun, verb = rng.choice(self.nouns), rng.choice(self.verbs)
        feminine, plural = noun_agreement(noun)
        if rng.random() < 0.35:
            return f"{noun} {agree(rng.choice(self.deeds[outcome]), feminine, plural)}"
        verb = pluralise(verb) if plural else verb
        adjective = agree(rng.choice(self.adjectives[outcome]), feminine, plural)
        if outcome != "regular" and " " not in adjective:
            shape = rng.random()
            if shape < 0.08:
                return f"qué {adjective} {verb} {noun}"
            if shape < 0.2 and "ísim" not in adjective:
                return f"{noun} {verb} {rng.choice(('realmente', 'muy', 'verdaderamente', 'de lo más'))} {adjective}"
        return f"{noun} {verb} {adjective}"


@dataclass(frozen=True)
class Domain:
    """A kind of place, thing, work or service: how the tale opens, its evidence by outcome, its aspects."""

    kind: str
    what: str
    opens: list[str]
    evidence: dict[str, list[str]]
    aspects: list[Aspect] = field(default_factory=list)


FRASES = {name: parts[""] for name, parts in read_sections("frases.txt").items()}


def _domains() -> list[Domain]:
    aspects: dict[str, list[Aspect]] = {}
    for header, parts in read_sections("aspectos.txt").items():
        adjectives = {outcome: parts[outcome] for outcome in OUTCOMES}
        deeds = {outcome: parts[f"hace_{outcome}"] for outcome in OUTCOMES}
        aspect = Aspect(parts["verbos"], parts["nombres"], adjectives, deeds)
        for name in header.split()[1:]:
            aspects.setdefault(name, []).append(aspect)
    domains = []
    for header, parts in read_sections("opiniones.txt").items():
        name, kind, what = header.split(maxsplit=2)
        evidence = {outcome: parts[outcome] for outcome in OUTCOMES}
        near = aspects.get(name, []) * 2 + aspects["*"]
        domains.append(Domain(kind.removesuffix("s"), what, parts["caso"], evidence, near))
    return domains


DOMAINS = _domains()


class Tale:
    """One outcome in one domain, told by one voice; its methods give the pieces, each a clause without a full stop."""

    def __init__(self, rng: random.Random, person: str | None = None, outcome: str | None = None) -> None:
        self.rng = rng
        self.outcome = outcome or rng.choices(OUTCOMES, ODDS)[0]
        self.domain = rng.choice(DOMAINS)
        self.voice = speaker(rng, FRASES, person)
        feminine, plural = noun_agreement(self.domain.what)
        self.voice.bound["lo"] = ("l" + ("a" if feminine else "o") + "s" * plural) if plural or feminine else "lo"

    def opening(self) -> str:
        """What was done, with or without when, and by whom where it is told of somebody."""
        did = self.voice.pick(self.domain.opens)
        if self.rng.random() < 0.5:
            when = self.voice.pick(FRASES["tiempo"])
            did = f"{when} {did}" if self.rng.random() < 0.7 else f"{did} {when}"
        return f"{self.voice.bound['nombre']} {did}" if self.voice.person == "tercera" else did

    def evidence(self, outcome: str | None = None) -> str:
        """One fact that speaks for `outcome`."""
        outcome, rng = outcome or self.outcome, self.rng
        chance = rng.random()
        if chance < 0.07:
            return self.voice.pick(FRASES[f"niega_{outcome}"])
        if chance < 0.18:
            return self.voice.pick(FRASES[f"general_{outcome}"])
        if chance < 0.45 and self.domain.aspects:
            return rng.choice(self.domain.aspects).clause(rng, outcome)
        return self.voice.pick(self.domain.evidence[outcome])

    def facts(self) -> str:
        """Evidence of one to three facts; a so-so tale may weigh a good one against a bad one."""
        rng = self.rng
        if self.outcome == "regular" and rng.random() < 0.4:
            pair = [self.evidence("bien"), self.evidence("mal")]
            rng.shuffle(pair)
            return rng.choice(FRASES["une_pero"]).join(pair)
        facts = [self.evidence() for _ in range(rng.choices((1, 2, 3), (4, 5, 2))[0])]
        facts = list(dict.fromkeys(facts))
        text = facts[0]
        for fact in facts[1:]:
            text += rng.choice(FRASES["une_igual"]) + fact
        if self.outcome != "regular" and rng.random() < 0.15:
            lead = "deja_claro" if self.outcome == "bien" else "deja_claro_mal"
            text = self.voice.pick(FRASES[lead]) + text
        elif self.outcome != "regular" and rng.random() < 0.04:
            other = "mal" if self.outcome == "bien" else "bien"
            text = self.evidence(other) + rng.choice((", pero ", ". Aun así, ", ". A pesar de todo, ")) + text
        return text

    def verdict(self) -> str:
        return self.voice.pick(FRASES[f"juicio_{self.outcome}"])

    def feeling(self) -> str:
        return self.voice.pick(FRASES[f"siente_{self.outcome}"])

    def named_feeling(self) -> str:
        """The feeling with its owner: "Marta salió contenta", "a Marta le encantó"."""
        feeling, name = self.feeling(), self.voice.bound["nombre"]
        return f"a {name} {feeling}" if feeling.startswith("le ") else f"{name} {feeling}"

    def decision(self) -> str:
        return self.voice.pick(FRASES[f"decide_{self.outcome}_{self.domain.kind}"])

    def account(self) -> str:
        """The whole of it, as somebody would write it: two to five pieces in one of many orders."""
        rng = self.rng
        so, why = rng.choice(FRASES["une_efecto"]), rng.choice(FRASES["une_causa"])
        shape = rng.randrange(10)
        if shape == 0:
            text = f"{self.opening()}. {self.facts()}. {self.verdict()}"
        elif shape == 1:
            text = f"{self.facts()}{so}{self.decision()}"
        elif shape == 2:
            text = f"{self.feeling()}{why}{self.facts()}"
        elif shape == 3:
            text = f"{self.opening()} y {self.feeling()}{why}{self.facts()}{so}{self.decision()}"
        elif shape == 4:
            text = f"{self.verdict()}. {self.facts()}. {self.decision()}"
        elif shape == 5:
            text = f"{self.opening()}. {self.facts()}{so}{self.decision()}"
        elif shape == 6:
            text = f"{self.verdict()}. {self.opening()} y {self.facts()}"
        elif shape == 7:
            text = f"{self.facts()}. {self.feeling()}. {self.decision()}"
        elif shape == 8:
            text = f"{self.opening()}: {self.facts()}"
        else:
            text = f"{self.facts()}. {self.verdict()}"
        text = sentence(text)
        return f"{text} {self.voice.pick(FRASES[f'remate_{self.outcome}'])}" if rng.random() < 0.12 else text


def _plain(text: str, rng: random.Random) -> str:
    """`text` as people type it on a telephone, now and then: no accents, no capitals, or an exclamation."""
    chance = rng.random()
    if chance < 0.06:
        text = unicodedata.normalize("NFD", text.replace("ñ", "\0"))
        text = re.sub("[\u0300-\u036f]", "", text).replace("\0", "ñ")
    if 0.04 < chance < 0.1:
        text = text.lower().rstrip(".")
    elif 0.1 < chance < 0.16:
        text = text.rstrip(".") + "!" * rng.randint(1, 3)
    return text


def turns(*messages: str) -> str:
    """Messages, user first, in the chat form the model ends up with (ChatML)."""
    roles = ("user", "assistant")
    return "".join(f"<|im_start|>{roles[i % 2]}\n{message}<|im_end|>\n" for i, message in enumerate(messages))


def account(rng: random.Random) -> str:
    """One to three accounts by different people, as prose."""
    return "\n".join(_plain(Tale(rng).account(), rng) for _ in range(rng.choices((1, 2, 3), (5, 3, 2))[0]))


def disagreement(rng: random.Random) -> str:
    """Several people who did the same and left with different impressions."""
    first = Tale(rng, "tercera")
    lines = [sentence(first.opening())]
    for outcome in rng.sample(OUTCOMES, rng.choice((2, 3))):
        tale = Tale(rng, "tercera", outcome)
        tale.domain = first.domain
        name = tale.voice.bound["nombre"]
        shape = rng.randrange(4)
        if shape == 0:
            text = f"{tale.named_feeling()}{rng.choice(FRASES['une_causa'])}{tale.facts()}"
        elif shape == 1:
            text = f"para {name}, {tale.verdict()}: {tale.facts()}"
        elif shape == 2:
            text = f"{name} lo cuenta así: {tale.facts()}{rng.choice(FRASES['une_efecto'])}{tale.decision()}"
        else:
            text = f"según {name}, {tale.facts()}. {tale.feeling()}"
        lines.append(sentence(text))
    return " ".join(lines)


def inventory(rng: random.Random) -> str:
    """What people praise, complain of or shrug at in one domain."""
    tale = Tale(rng, "nosotros")
    heads = {
        "bien": (
            "Cosas que dan gusto en",
            "Lo que más se alaba de",
            "Motivos para volver a",
            "Así habla quien salió contento de",
        ),
        "mal": (
            "Cosas que dan rabia en",
            "De qué se queja la gente de",
            "Motivos para no volver a",
            "Así habla quien salió enfadado de",
        ),
        "regular": (
            "Cosas que ni van ni vienen en",
            "Lo que se dice de un caso del montón:",
            "Así habla quien ni sube ni baja:",
        ),
    }
    lines = list(dict.fromkeys(tale.evidence() for _ in range(rng.randint(3, 6))))
    head = rng.choice(heads[tale.outcome])
    head = (
        head
        if head.endswith(":")
        else f"{head} {tale.domain.what}:".replace(" a el ", " al ").replace(" de el ", " del ")
    )
    return head + "\n" + "\n".join(f"- {line}" for line in lines)


def told(rng: random.Random) -> str:
    """A short spoken exchange in prose, with dashes."""
    tale = Tale(rng, "yo")
    friend = speaker(rng, FRASES, "tercera").bound["nombre"]
    short = {
        "bien": (
            "Genial",
            "De maravilla",
            "Estupendamente",
            "Muy bien",
            "Increíble",
            "Perfecto",
            "Una pasada",
            "De lujo",
        ),
        "mal": (
            "Fatal",
            "Muy mal",
            "Horrible",
            "Un desastre",
            "De pena",
            "Peor imposible",
            "Ni me hables",
            "Una pesadilla",
        ),
        "regular": (
            "Normal",
            "Regular",
            "Así así",
            "Ni bien ni mal",
            "Correcto",
            "Pasable",
            "Psé",
            "Bueno, del montón",
        ),
    }
    reply = sentence(f"{tale.facts()}{rng.choice(FRASES['une_efecto'])}{tale.decision()}")
    ask = rng.choice(("¿Qué tal", "¿Cómo fue lo de", "¿Y", "¿Qué me dices de"))
    what = f"{ask} {tale.domain.what}?".replace(" de el ", " del ")
    end = tale.voice.pick(FRASES[f"responde_{tale.outcome}"])
    return f"—{what} —preguntó {friend}.\n—{rng.choice(short[tale.outcome])}. {reply}\n—{end}"


def confided(rng: random.Random) -> str:
    """A chat: the user tells how it went and the assistant answers as a friend would."""
    tale = Tale(rng, rng.choice(("yo", "yo", "nosotros")))
    message = _plain(tale.account(), rng)
    if rng.random() < 0.3:
        message = rng.choice(FRASES["abre_chat"]) + message
    if rng.random() < 0.15:
        message += rng.choice(FRASES["pide_chat"])
    answer = rng.choice(FRASES[f"responde_{tale.outcome}"])
    if rng.random() < 0.5:
        answer += " " + rng.choice(FRASES[f"sigue_{tale.outcome}"])
    messages = [message, answer]
    if rng.random() < 0.25:
        messages += [sentence(tale.decision()), rng.choice(FRASES[f"sigue_{tale.outcome}"])]
    return turns(*messages)


def understood(rng: random.Random) -> str:
    """A chat about somebody else's case: was she pleased, why, will he go back."""
    tale = Tale(rng, "tercera")
    facts = tale.facts()
    shape = rng.randrange(5)
    so = rng.choice(FRASES["une_efecto"])
    if shape == 0:
        story = f"{tale.opening()}. {facts}"
        messages = [tale.voice.pick(FRASES["pregunta_gusto"]), tale.voice.pick(FRASES[f"contesta_{tale.outcome}"])]
    elif shape == 1:
        story = f"{tale.opening()}. {facts}"
        messages = [tale.voice.pick(FRASES["pregunta_vuelve"]), tale.voice.pick(FRASES[f"vuelve_{tale.outcome}"])]
    elif shape == 2:
        story = f"{tale.opening()} y {tale.feeling()}{rng.choice(FRASES['une_causa'])}{facts}"
        messages = [rng.choice(("¿Por qué?", "¿Cuál fue el motivo?", "¿Por qué lo dice?")), sentence(f"porque {facts}")]
    elif shape == 3:
        story = f"{tale.opening()}. {facts}"
        messages = [
            rng.choice(("¿Qué hará ahora?", "¿Y qué decidió?", "¿Qué crees que pasó luego?")),
            sentence(tale.decision()),
        ]
    else:
        story = f"{tale.opening()}. {facts}{so}{tale.decision()}"
        messages = [
            rng.choice(("Cuéntalo en pocas palabras.", "¿Qué piensa de ello?", "¿Cómo se siente?")),
            sentence(tale.named_feeling()),
        ]
    messages[0] = f"{sentence(story)} {messages[0]}"
    if shape < 2 and rng.random() < 0.5:
        messages += ["¿Por qué?", sentence(f"porque {facts}")]
    return turns(*messages)


def read(rng: random.Random) -> str:
    """A chat about something that somebody wrote: how it went for them, before or after the text itself."""
    tale = Tale(rng, rng.choice(("yo", "yo", "nosotros")))
    text = _plain(tale.account(), rng)
    other = speaker(rng, FRASES, "tercera")
    question = other.pick(FRASES["pregunta_ajena"])
    answer = other.pick(FRASES[f"ajena_{tale.outcome}"]).rstrip(".")
    if rng.random() < 0.3:
        answer += f" porque {tale.evidence()}" if rng.random() < 0.2 else f": {tale.verdict()}"
    elif question.startswith(("Responde", "Contesta")) and rng.random() < 0.7:
        answer = rng.choice(FRASES[f"responde_{tale.outcome}"])
    join = rng.choice(("\n", "\n", "\n\n", " "))
    message = f"{question}{join}{text}" if rng.random() < 0.75 else f"{text}{join}{question}"
    return turns(message, sentence(answer))


def answered(rng: random.Random) -> str:
    """An account, and what the people of the place wrote back."""
    tale = Tale(rng, rng.choice(("yo", "nosotros")))
    reply = speaker(rng, FRASES, "tercera").pick(FRASES[f"dueño_{tale.outcome}"])
    head = rng.choice(("Respuesta de la casa: ", "Nos contestaron: ", "Respuesta del encargado: ", "— "))
    return f"{_plain(tale.account(), rng)}\n{head}{reply}"


def meaning(rng: random.Random) -> str:
    """What a phrase of praise, complaint or indifference tells about whoever says it."""
    lines = []
    for _ in range(rng.randint(1, 4)):
        outcome = rng.choices(OUTCOMES, ODDS)[0]
        contrary = rng.choice([other for other in OUTCOMES if other != outcome])
        voice = speaker(rng, FRASES, "yo")

        def phrase(of: str, voice: Voice = voice) -> str:
            tale = Tale(rng, "yo", of)
            tale.voice = voice
            voice.bound.setdefault("lo", "lo")
            return rng.choice((tale.verdict, tale.feeling, tale.evidence, tale.evidence))().strip()

        voice.bound |= {"palabra": phrase(outcome), "otra": phrase(outcome), "contraria": phrase(contrary)}
        voice.bound |= {
            "efecto": rng.choice(FRASES[f"efecto_{outcome}"]),
            "quien": rng.choice(FRASES[f"quien_{outcome}"]),
        }
        voice.bound["quien_otro"] = rng.choice(FRASES[f"quien_{contrary}"])
        lines.append(sentence(voice.pick(FRASES["sentido"])))
    return "\n".join(lines)


ENGLISH_PARTS = read_sections("opinions.txt")
FRAMES = ENGLISH_PARTS.pop("frames")
BY_ENGLISH = dict(zip(OUTCOMES, ("good", "bad", "plain"), strict=True))


def english(rng: random.Random) -> str:
    """An account in English, as prose or as a chat with a friend's reply."""
    outcome = BY_ENGLISH[rng.choices(OUTCOMES, ODDS)[0]]
    parts = rng.choice(list(ENGLISH_PARTS.values()))
    name = rng.choice(ENGLISH)
    who = rng.choice(("I", "I", "we", "name"))
    pronouns = {
        "I": ("I", "my", "me", "was"),
        "we": ("we", "our", "us", "were"),
        "name": (name, "their", "them", "was"),
    }
    bound = dict(zip(("I", "my", "me", "was"), pronouns[who], strict=True))
    voice = Voice(rng, {}, bound=bound)
    facts = [voice.pick(parts[outcome]) for _ in range(rng.choice((1, 2)))]
    if outcome == "plain" and rng.random() < 0.3:
        facts = [voice.pick(parts["good"]), "but " + voice.pick(parts["bad"])]
    pieces = [voice.pick(parts["case"]), " and ".join(dict.fromkeys(facts)).replace("and but", "but")]
    pieces += [voice.pick(FRAMES[f"verdict_{outcome}"]), voice.pick(FRAMES[f"then_{outcome}"])]
    del pieces[rng.randint(2, 3)]
    if rng.random() < 0.3:
        pieces.insert(1, pieces.pop())
    text = re.sub(r"\bi\b", "I", " ".join(sentence(piece) for piece in pieces))
    if who == "name" or rng.random() < 0.4:
        return text
    return turns(text, rng.choice(FRAMES[f"reply_{outcome}"]))
