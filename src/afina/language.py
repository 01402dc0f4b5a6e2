"""The language of messages: English, or Spanish where the user's locale is Spanish.

Every sentence a user may read is written in English in the source, inside `_()`. The catalogues in `locale/` hold
its translation; a test fails on a message that has none. This module knows nothing of what the messages say.
"""

import gettext
import os
from functools import cache
from pathlib import Path

CATALOGUES = Path(__file__).parent / "locale"


def chosen() -> str:
    """The language code of this process: `AFINA_LANG`, or the first locale variable that is set, as POSIX orders them."""
    for variable in ("AFINA_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        if value := os.environ.get(variable):
            return "es" if value.lower().startswith("es") else "en"
    return "en"


@cache
def _catalogue(language: str) -> gettext.NullTranslations:
    return gettext.translation("afina", CATALOGUES, languages=[language], fallback=True)


def _(message: str) -> str:
    """Translate one message. Placeholders stay as `{name}`: format after translating, never before."""
    return _catalogue(chosen()).gettext(message)
