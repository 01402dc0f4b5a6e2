"""Message and Sample: the one shape all inputs become, with the place each came from."""

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

ROLES = ("system", "user", "assistant")
DOCUMENT, PASSAGE = "document", "passage"
"""The one message of a sample of plain text, all of it learnt: a whole text, or a part that others follow."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation to learn from or to be asked about; `line` (from 1) is where it starts in `file`."""

    messages: tuple[Message, ...]
    file: Path
    line: int

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.messages[-1].content

    @property
    def is_text(self) -> bool:
        """Whether this is plain text to be learnt whole, with nobody asking."""
        return self.messages[0].role in (DOCUMENT, PASSAGE)

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"

    def digest(self, salt: str = "") -> bytes:
        """16 bytes that depend on the content alone (and the salt), never on file or order."""
        digest = blake2b(salt.encode(), digest_size=16)
        for message in self.messages:
            for text in (message.role, message.content):
                encoded = text.encode("utf-8", "surrogatepass")
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.digest()
