"""Classes of faults of bytes, JSON, shape and conversation: most of them make a row unusable."""

from afina.data.audit.kind import Kind, Severity
from afina.language import _

ERROR, WARNING, NOTE = Severity


def groups() -> dict[str, list[Kind]]:
    """The groups of this file, by their names."""
    return {
        _("Encoding"): _encoding(),
        _("JSON syntax"): _syntax(),
        _("JSON values"): _json(),
        _("Shape"): _shape(),
        _("Conversation"): _chat(),
    }


def _encoding() -> list[Kind]:
    return [
        Kind(
            "utf8-bom", NOTE, _("the file begins with a byte order mark"), _("It is skipped; write UTF-8 without one.")
        ),
        Kind(
            "utf16",
            ERROR,
            _("the file is UTF-16"),
            _("Convert the file to UTF-8, or name its encoding in data.encoding."),
        ),
        Kind(
            "utf32",
            ERROR,
            _("the file is UTF-32"),
            _("Convert the file to UTF-8, or name its encoding in data.encoding."),
        ),
        Kind(
            "old-encoding",
            NOTE,
            _("the file is not UTF-8 and was read in another encoding"),
            _("Convert the file to UTF-8, or name its encoding in data.encoding."),
        ),
        Kind(
            "not-utf8",
            ERROR,
            _("a byte that is not UTF-8"),
            _("Convert the file to UTF-8, or name its encoding in data.encoding."),
        ),
        Kind(
            "overlong", ERROR, _("a character written in more bytes than it needs"), _("Mend the row, or take it out.")
        ),
        Kind("cesu-surrogate", ERROR, _("half a character written as bytes"), _("Mend the row, or take it out.")),
        Kind("cut-character", ERROR, _("the line ends inside a character"), _("Mend the row, or take it out.")),
        Kind("lone-surrogate", ERROR, _("half a character, written as an escape"), _("Mend the row, or take it out.")),
        Kind("raw-nul", ERROR, _("a zero byte"), _("Mend the row, or take it out.")),
        Kind(
            "inner-bom",
            ERROR,
            _("a byte order mark inside the file"),
            _("Files were joined end to end: take the mark out."),
        ),
        Kind("compressed", NOTE, _("the file is compressed, whatever its name says"), _("It is read as it is.")),
        Kind("mixed-line-ends", NOTE, _("lines end in LF and in CR LF"), _("Both are read; write one of them.")),
    ]


def _syntax() -> list[Kind]:
    return [
        Kind(
            "cut-row",
            ERROR,
            _("the row breaks off"),
            _("The file was cut while it was written or copied: make it again."),
        ),
        Kind(
            "two-values",
            ERROR,
            _("two values on one line"),
            _("Write the row with a JSON library, one object to a line."),
        ),
        Kind(
            "text-after",
            ERROR,
            _("text after the end of the value"),
            _("Write the row with a JSON library, one object to a line."),
        ),
        Kind(
            "trailing-comma",
            ERROR,
            _("a comma with nothing after it"),
            _("Write the row with a JSON library, one object to a line."),
        ),
        Kind(
            "single-quotes",
            ERROR,
            _("single quotation marks"),
            _("Write the row with a JSON library, one object to a line."),
        ),
        Kind(
            "bare-key",
            ERROR,
            _("a key without quotation marks"),
            _("Write the row with a JSON library, one object to a line."),
        ),
        Kind(
            "foreign-literal",
            ERROR,
            _("a word of another language, such as True or None"),
            _("Write the row with a JSON library, one object to a line."),
        ),
        Kind("comment", ERROR, _("a comment"), _("Write the row with a JSON library, one object to a line.")),
        Kind(
            "bad-escape",
            ERROR,
            _("an escape that JSON does not have"),
            _("Write the row with a JSON library, one object to a line."),
        ),
        Kind(
            "raw-control",
            ERROR,
            _("a control character not written as an escape"),
            _("Write the row with a JSON library, one object to a line."),
        ),
        Kind("not-json", ERROR, _("no valid JSON"), _("Write the row with a JSON library, one object to a line.")),
    ]


def _json() -> list[Kind]:
    return [
        Kind(
            "duplicate-key",
            ERROR,
            _("a key given twice"),
            _("Keep one of them: programs disagree on which one counts."),
        ),
        Kind("nan", ERROR, _("NaN, which is not JSON"), _("Write a number that every program reads alike, or a text.")),
        Kind(
            "infinity",
            ERROR,
            _("Infinity, which is not JSON"),
            _("Write a number that every program reads alike, or a text."),
        ),
        Kind(
            "number-overflow",
            ERROR,
            _("a number too large for any program"),
            _("Write a number that every program reads alike, or a text."),
        ),
        Kind(
            "huge-integer",
            ERROR,
            _("a whole number of thousands of digits"),
            _("Write a number that every program reads alike, or a text."),
        ),
        Kind(
            "big-integer",
            WARNING,
            _("a whole number beyond 64 bits, which others round"),
            _("Write a number that every program reads alike, or a text."),
        ),
        Kind(
            "negative-zero",
            NOTE,
            _("minus zero, which others read as zero"),
            _("Write a number that every program reads alike, or a text."),
        ),
        Kind(
            "bad-number",
            ERROR,
            _("a number not written as JSON writes it"),
            _("Write a number that every program reads alike, or a text."),
        ),
        Kind("deep", ERROR, _("nested too deeply"), _("Mend the row, or take it out.")),
        Kind(
            "huge-row",
            ERROR,
            _("a row too long to read; nothing after it was read"),
            _("Look whether the file lacks its line ends."),
        ),
    ]


def _shape() -> list[Kind]:
    return [
        Kind("unreadable", ERROR, _("the file cannot be read to its end"), _("Mend the row, or take it out.")),
        Kind("no-rows", ERROR, _("the file holds no rows"), _("Name another file, or fill this one.")),
        Kind("html-page", ERROR, _("a web page saved as data"), _("Fetch the file again.")),
        Kind(
            "pointer-file", ERROR, _("a pointer of Git LFS in place of the data"), _("`git lfs pull` fetches the data.")
        ),
        Kind("blank-lines", NOTE, _("blank lines"), _("They are passed over.")),
        Kind("row-null", ERROR, _("the row is null"), _("Mend the row, or take it out.")),
        Kind(
            "row-list",
            ERROR,
            _("the row is a list"),
            _("Write each of its elements on a line of its own, or name the file .json."),
        ),
        Kind("row-scalar", ERROR, _("the row is a single value"), _("Mend the row, or take it out.")),
        Kind("row-empty", ERROR, _("the row is empty"), _("Mend the row, or take it out.")),
        Kind(
            "mixed-shapes",
            ERROR,
            _("the row has another shape than the first one"),
            _("Put rows of different shapes into different files."),
        ),
        Kind(
            "unknown-shape",
            ERROR,
            _("the row has none of the known shapes"),
            _("Say with data.mapping how to read it."),
        ),
        Kind("key-missing", ERROR, _("a key is missing"), _("Mend the row, or take it out.")),
        Kind("mapping-misfit", ERROR, _("data.mapping does not fit the row"), _("Mend the mapping or the row.")),
        Kind("history", ERROR, _("a history, which is not read"), _("Write the conversation as messages.")),
        Kind(
            "unread-keys",
            NOTE,
            _("keys that are not read"),
            _("Nothing of them is learnt; data.mapping can read them."),
        ),
        Kind("row-refused", ERROR, _("the row cannot be used"), _("Mend the row, or take it out.")),
    ]


def _chat() -> list[Kind]:
    return [
        Kind("turns-no-list", ERROR, _("the messages are no list"), _("Mend the row, or take it out.")),
        Kind("turns-none", ERROR, _("no messages"), _("Mend the row, or take it out.")),
        Kind("turn-no-object", ERROR, _("a message is no object"), _("Mend the row, or take it out.")),
        Kind("content-missing", ERROR, _("a message without content"), _("Write the content as one text.")),
        Kind("content-null", ERROR, _("a content that is null"), _("Write the content as one text.")),
        Kind("content-number", ERROR, _("a content that is a number"), _("Write the content as one text.")),
        Kind("content-parts", ERROR, _("a content in parts"), _("Write the content as one text.")),
        Kind("content-empty", ERROR, _("an empty content"), _("Mend the row, or take it out.")),
        Kind("content-blank", ERROR, _("a content of white space"), _("Mend the row, or take it out.")),
        Kind("role-missing", ERROR, _("a message without a role"), _("Write the role as system, user or assistant.")),
        Kind(
            "role-case",
            ERROR,
            _("a role in other letters or with spaces"),
            _("Write the role as system, user or assistant."),
        ),
        Kind("role-foreign", ERROR, _("a role of another dialect"), _("Write the role as system, user or assistant.")),
        Kind("role-unknown", ERROR, _("an unknown role"), _("Write the role as system, user or assistant.")),
        Kind(
            "tool-role",
            ERROR,
            _("a message of a tool, which is not learnt yet"),
            _("Take the conversation out, or its tools."),
        ),
        Kind(
            "tool-unanswered",
            ERROR,
            _("a tool is called and does not answer"),
            _("Add its answer, or take the call out."),
        ),
        Kind(
            "unlearnt-part",
            ERROR,
            _("a part of a message that is not learnt yet"),
            _("Take it out, so that nothing else is taught than what the file says."),
        ),
        Kind("no-assistant", ERROR, _("nothing that the assistant says"), _("Give the row an answer, or take it out.")),
        Kind(
            "ends-unanswered",
            ERROR,
            _("the last message is not the assistant's"),
            _("Give the row an answer, or take it out."),
        ),
        Kind(
            "late-system",
            ERROR,
            _("a system message after the first message"),
            _("Put it first, or make it the user's."),
        ),
        Kind(
            "assistant-first", WARNING, _("the assistant speaks first"), _("Say what it answers, or take its turn out.")
        ),
        Kind("users-in-a-row", WARNING, _("two messages of the user in a row"), _("Join them.")),
        Kind("answers-in-a-row", WARNING, _("two answers in a row"), _("Join them.")),
        Kind("echo", WARNING, _("the answer repeats the question"), _("Give the row an answer, or take it out.")),
        Kind("chosen-is-rejected", WARNING, _("chosen and rejected are equal"), _("Mend the row, or take it out.")),
    ]
