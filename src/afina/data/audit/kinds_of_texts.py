"""Classes of faults inside texts, between rows, and of labels."""

from afina.data.audit.kind import Kind, Severity
from afina.language import _

ERROR, WARNING, NOTE = Severity


def groups() -> dict[str, list[Kind]]:
    """The groups of this file, by their names."""
    return {
        _("Text"): _text(),
        _("Secrets"): _secrets(),
        _("Across rows"): _across(),
        _("Labels"): _labels(),
    }


def _text() -> list[Kind]:
    return [
        Kind("mojibake", WARNING, _("UTF-8 that was read in another encoding"), _("`--fix` repairs it in a copy.")),
        Kind(
            "mojibake-twice",
            WARNING,
            _("UTF-8 that was read in another encoding more than once"),
            _("`--fix` repairs it in a copy."),
        ),
        Kind(
            "replacement",
            WARNING,
            _("a sign for characters that were lost"),
            _("What stood there is gone: take the text from its source again."),
        ),
        Kind("nul", WARNING, _("a zero character"), _("`--fix` takes it out of a copy.")),
        Kind("control-character", WARNING, _("a control character"), _("`--fix` takes it out of a copy.")),
        Kind("invisible", WARNING, _("an invisible character"), _("`--fix` takes it out of a copy.")),
        Kind(
            "direction",
            WARNING,
            _("a character that turns the direction of text"),
            _("`--fix` takes it out of a copy."),
        ),
        Kind(
            "line-separator",
            WARNING,
            _("a line end that many programs do not know"),
            _("`--fix` writes plain line ends in a copy."),
        ),
        Kind("private-use", WARNING, _("a character that only one font knows"), _("Look whether it is meant.")),
        Kind("noncharacter", WARNING, _("a code that is no character"), _("`--fix` takes it out of a copy.")),
        Kind("lone-accent", WARNING, _("an accent without its letter"), _("Look whether it is meant.")),
        Kind("decomposed", NOTE, _("letters and accents apart (not NFC)"), _("`--fix` joins them in a copy.")),
        Kind(
            "control-token",
            WARNING,
            _("a control token of a model inside a text"),
            _("It is learnt as plain text, never as a token; take it out unless it is meant."),
        ),
        Kind("html-entity", NOTE, _("an HTML entity"), _("Write the character itself, unless the text is about HTML.")),
        Kind(
            "open-fence",
            WARNING,
            _("a code block that is not closed"),
            _("Close it: the model would learn to leave it open."),
        ),
        Kind("blob", WARNING, _("a long run of encoded data"), _("Take it out: nothing can be learnt from it.")),
        Kind("long-word", WARNING, _("a word of a thousand characters or more"), _("Look whether it is meant.")),
        Kind("repetition", WARNING, _("one character over and over"), _("Look whether it is meant.")),
        Kind(
            "boilerplate",
            NOTE,
            _("a phrase by which models speak of themselves"),
            _("Take it out unless the model shall say it."),
        ),
    ]


def _secrets() -> list[Kind]:
    return [
        Kind(
            "secret-key",
            WARNING,
            _("a key or token"),
            _("Take it out or replace it; a model may repeat it word for word."),
        ),
        Kind(
            "password-in-url",
            WARNING,
            _("a password inside a URL"),
            _("Take it out or replace it; a model may repeat it word for word."),
        ),
        Kind(
            "card-number",
            WARNING,
            _("the number of a payment card"),
            _("Take it out or replace it; a model may repeat it word for word."),
        ),
        Kind(
            "bank-account",
            WARNING,
            _("the number of a bank account"),
            _("Take it out or replace it; a model may repeat it word for word."),
        ),
        Kind(
            "email", NOTE, _("an e-mail address"), _("Take it out or replace it; a model may repeat it word for word.")
        ),
    ]


def _across() -> list[Kind]:
    return [
        Kind(
            "duplicate",
            WARNING,
            _("the same row again"),
            _("`--fix` keeps the first in a copy; learnt twice it counts twice."),
        ),
        Kind(
            "near-duplicate",
            NOTE,
            _("almost the same row again"),
            _("Keep one of them, unless the difference is the lesson."),
        ),
        Kind(
            "leak",
            WARNING,
            _("a row of the validation that is also learnt"),
            _("Take it out of one side: the validation would praise memory."),
        ),
        Kind(
            "near-leak",
            WARNING,
            _("a row of the validation that is almost learnt"),
            _("Take it out of one side: the validation would praise memory."),
        ),
        Kind(
            "contradiction",
            WARNING,
            _("the same question with another answer"),
            _("Keep the right answer, unless both are."),
        ),
        Kind(
            "short-answer",
            WARNING,
            _("an answer far shorter than the others"),
            _("Give the row an answer, or take it out."),
        ),
        Kind(
            "no-json", WARNING, _("an answer that is no JSON where the others are"), _("Mend the row, or take it out.")
        ),
        Kind(
            "abrupt-end",
            NOTE,
            _("an answer that breaks off where the others end"),
            _("Complete it: the model would learn to stop in mid-sentence."),
        ),
        Kind(
            "other-language",
            WARNING,
            _("an answer in another language than the others"),
            _("Translate it or take it out, unless it is meant."),
        ),
        Kind(
            "imbalance",
            WARNING,
            _("classes that are given far more often than others"),
            _("Add rows of the rare ones, or measure each class by itself."),
        ),
        Kind(
            "one-answer",
            WARNING,
            _("every answer is the same"),
            _("Add rows with other answers: nothing else can be learnt."),
        ),
    ]


def _labels() -> list[Kind]:
    return [
        Kind(
            "schema-misfit",
            ERROR,
            _("an answer breaks the recipe's schema"),
            _("Mend these answers, or the schema (data.schema_file)."),
        ),
        Kind("nothing-learnt", ERROR, _("nothing is learnt"), _("Give the row an answer, or take it out.")),
        Kind(
            "end-not-learnt",
            ERROR,
            _("the end of turn is not learnt, so the model would never stop"),
            _("Use another chat template (model.chat_template), or write the messages as this one wants them."),
        ),
        Kind(
            "over-context",
            ERROR,
            _("longer than model.max_length, which cuts the answer"),
            _("Raise model.max_length or shorten the row; data.too_long: reject trains without it."),
        ),
        Kind(
            "double-bos",
            ERROR,
            _("more than one beginning-of-sequence token"),
            _("Use another chat template (model.chat_template), or write the messages as this one wants them."),
        ),
        Kind(
            "template-refuses",
            ERROR,
            _("the chat template drops, changes or refuses a message"),
            _("Use another chat template (model.chat_template), or write the messages as this one wants them."),
        ),
        Kind(
            "pad-is-end",
            NOTE,
            _("the padding token is the end of turn"),
            _("Afina never learns padding; other programs may hide the end of turn too."),
        ),
        Kind(
            "unknown-characters",
            WARNING,
            _("characters that the tokenizer does not know"),
            _("Write them otherwise, or use a base that knows them."),
        ),
        Kind(
            "unknown-splitter",
            WARNING,
            _("llama.cpp would not run this base as it is trained, or cut texts into other tokens"),
            _("A GGUF file could not be written: choose another base if you need one."),
        ),
    ]
