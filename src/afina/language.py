"""The language of messages: English, or Spanish where the user's locale is Spanish.

Every sentence a user may read is written in English in the source, inside `_()`. The catalogues in `locale/` hold
its translation; a test fails on a message that has none. This module knows nothing of what the messages say.
"""

import gettext
import os
import re
from functools import cache
from pathlib import Path

CATALOGUES = Path(__file__).parent / "locale"
LOCALE = ("LC_ALL", "LC_MESSAGES", "LANG")
SPANISH = re.compile(r"es(?![a-z])|spanish", re.IGNORECASE)
"""es, es_MX.UTF-8, es-419, Spanish_Spain.1252; neither est nor eo."""


def chosen() -> str:
    """The language code of this process: `AFINA_LANG`, or what the locale variables say, as GNU gettext reads them.

    The first of `LC_ALL`, `LC_MESSAGES` and `LANG` that is set names the locale; unless that is C, the first language
    of `LANGUAGE` goes before it.
    """
    asked = os.environ.get("AFINA_LANG")
    if not asked:
        asked = next((value for name in LOCALE if (value := os.environ.get(name))), "C")
        if asked.partition(".")[0] not in ("C", "POSIX"):
            asked = os.environ.get("LANGUAGE", "").partition(":")[0] or asked
    return "es" if SPANISH.match(asked) else "en"


@cache
def _catalogue(language: str) -> gettext.NullTranslations:
    return gettext.translation("afina", CATALOGUES, languages=[language], fallback=True)


def _(message: str) -> str:
    """Translate one message. Placeholders stay as `{name}`: format after translating, never before."""
    return _catalogue(chosen()).gettext(message)


def lend() -> None:
    """Packages that ask gettext, as typer does, find our catalogue, in the language of this process."""
    gettext.bindtextdomain("afina", str(CATALOGUES))
    gettext.textdomain("afina")
    if os.environ.get("AFINA_LANG"):  # else gettext reads the same variables
        os.environ["LANGUAGE"] = chosen()
