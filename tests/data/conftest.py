from collections.abc import Callable

import pytest
from data.byte_level import tokenizer_for

from afina.data.tokenizer import Tokenizer


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Callable[[str], Tokenizer]:
    """The small tokenizer of a family with its template; published templates need the real inputs, ours do not."""

    def found(name: str) -> Tokenizer:
        folder = None if name.startswith("afina/") else request.getfixturevalue("real_data") / "templates"
        return tokenizer_for(name, folder)

    return found
