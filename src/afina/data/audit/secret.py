"""What should not be learnt by heart: keys and tokens by the forms their issuers publish, cards and accounts by their
checksums, e-mail addresses. Placeholders of manuals (EXAMPLE, xxxx, 1234, example.com) are none.
"""

import re
from collections.abc import Iterator

from afina.data.audit.letters import Fault

KEYS = {
    "Hugging Face": r"hf_[A-Za-z0-9]{30,}",
    "OpenAI": r"sk-(?:proj-|svcacct-|admin-)?[A-Za-z0-9_-]{20,}",
    "Anthropic": r"sk-ant-[A-Za-z0-9_-]{24,}",
    "GitHub": r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,}",
    "GitLab": r"glpat-[A-Za-z0-9_-]{20,}",
    "AWS": r"(?:AKIA|ASIA)[0-9A-Z]{16}",
    "Google": r"AIza[0-9A-Za-z_-]{35}|ya29\.[0-9A-Za-z_-]{20,}",
    "Slack": r"xox[abeprs]-[0-9A-Za-z-]{20,}",
    "Stripe": r"[sr]k_live_[0-9A-Za-z]{20,}",
    "npm": r"npm_[A-Za-z0-9]{36}",
    "PyPI": r"pypi-AgEI[A-Za-z0-9_-]{40,}",
    "SendGrid": r"SG\.[A-Za-z0-9_-]{20,24}\.[A-Za-z0-9_-]{39,46}",
    "JSON Web Token": r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
}
"""Issuer: the form of its keys."""
_KEY = re.compile(
    r"(?<![A-Za-z0-9_-])(?:" + "|".join(f"(?P<k{at}>{form})" for at, form in enumerate(KEYS.values())) + ")"
)
PRIVATE = re.compile(r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----")
LOGIN = re.compile(r"\b[a-z][a-z0-9+.-]{1,15}://[^\s/:@<>{}$\"'%]{1,64}:([^\s/:@<>{}$\"'%]{4,64})@[^\s/@]{1,200}")
EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,18}(?![\w-])"
)
CARD = re.compile(
    r"(?<![\w.,/$€#-])(?:[3-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7}|3[47]\d{2}[ -]?\d{6}[ -]?\d{5})(?![\w-]|[.,]\d)"
)
ACCOUNT = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?\d[A-Z0-9]{0,2})?\b")
PLACEHOLDER = re.compile(r"example|xxx|your|test|dummy|sample|1234567|abcdef|000000|\.\.\.", re.IGNORECASE)
NOBODY = re.compile(
    r"@(?:[\w-]+\.)*(?:example\.\w+|example|test|invalid|localhost|(?:tu|your|my|mi|el|the)?(?:domain|company|dominio|empresa|email|correo|site|shop|store)\.\w+)$",
    re.IGNORECASE,
)
FILES = ("png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "py", "html")
IBAN_LENGTHS = frozenset(range(15, 33))


def keys(text: str) -> Iterator[Fault]:
    """The first key or token of a known issuer; what is found is never repeated in full."""
    for match in _KEY.finditer(text):
        if _is_random(match.group()):
            issuer = list(KEYS)[int((match.lastgroup or "k0")[1:])]
            yield Fault("secret-key", *match.span(), f"{issuer}: {masked(match.group())}")
            return


def private_keys(text: str) -> Iterator[Fault]:
    """The first line that begins a private key."""
    if (found := PRIVATE.search(text)) is not None:
        yield Fault("secret-key", *found.span(), found.group())


def numbers(text: str) -> Iterator[Fault]:
    """The first number of an account, and the first of a card that is no part of one."""
    accounts = [match for match in ACCOUNT.finditer(text) if is_account(match.group().replace(" ", ""))]
    for match in accounts[:1]:
        yield Fault("bank-account", *match.span(), masked(match.group()))
    for match in CARD.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        inside = any(one.start() < match.end() and match.start() < one.end() for one in accounts)
        if is_card(digits) and not inside:
            yield Fault("card-number", *match.span(), masked(digits))
            return


def addresses(text: str) -> Iterator[Fault]:
    """The first password inside a URL, and the first e-mail address."""
    if "@" not in text:
        return
    for match in LOGIN.finditer(text):
        if not PLACEHOLDER.search(match.group()) and match.group(1).lower() not in ("password", "pass", "secret"):
            yield Fault("password-in-url", *match.span(), masked(match.group()))
            break
    text = LOGIN.sub(lambda match: " " * len(match.group()), text)
    for match in EMAIL.finditer(text):
        address = match.group()
        if not NOBODY.search(address) and not address.lower().endswith(FILES):
            yield Fault("email", *match.span(), masked(address))
            break


def masked(secret: str) -> str:
    """Enough to find it again, too little to use it."""
    return f"{secret[:6]}…{secret[-2:]}" if len(secret) > 12 else f"{secret[:3]}…"


def _is_random(key: str) -> bool:
    words = key.startswith("sk-") and not (any(map(str.isdigit, key)) and any(map(str.isupper, key)))
    return len(set(key)) >= 10 and PLACEHOLDER.search(key) is None and not words


def is_card(digits: str) -> bool:
    """A card's length, first digits and check digit (ISO/IEC 7812), and not one digit over and over."""
    if not 13 <= len(digits) <= 19 or len(set(digits)) < 4:
        return False
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def is_account(code: str) -> bool:
    """An IBAN's check digits (ISO 13616): letters as numbers, the first four moved to the end, modulo 97."""
    if len(code) not in IBAN_LENGTHS or not code.isalnum() or not code.isascii():
        return False
    return int("".join(str(int(character, 36)) for character in code[4:] + code[:4])) % 97 == 1
