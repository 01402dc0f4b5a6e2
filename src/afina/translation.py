"""The verb `afina data translate`: who translates, what it will cost, and the folder that comes of it."""

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from afina import durable
from afina.console import console
from afina.data.conversation import row_of
from afina.data.problem import SHOWN
from afina.data.read import read
from afina.data.translate import Ask, Cache, Estimate, Job, Reply, estimate
from afina.data.translate import translate as run_translation
from afina.errors import Interrupted, OutputError, RecipeError
from afina.language import _
from afina.model.endpoint import Endpoint, EndpointError
from afina.recipe.load import load_or_default

PATIENCE = (0.5, 2.0, 8.0, 20.0)
"""Seconds before each further try of a translator that is busy; together with its answers half a minute."""


def translate(
    source: str,
    out: str | Path,
    job: Job,
    by: tuple[str | None, str, str],
    changes: Sequence[str] = (),
    *,
    parallel: int = 4,
    prices: tuple[float, float] = (0.0, 0.0),
    only_estimate: bool = False,
) -> Path:
    """The rows of `data.train` in another language, as chat messages in a new file. Raises AfinaError.

    by: an endpoint's address (or None for a model on this machine), the model's name, and the environment variable that
    holds the endpoint's key (or ""). What is translated lies in OUT.cache.jsonl at once; rows that are kept back are
    named in OUT.kept-back.jsonl.
    """
    place = Path(out)
    if place.exists():
        raise OutputError(
            _("{path} exists already.").format(path=place), hint=_("Choose another file with --out, or remove it.")
        )
    recipe, folder = load_or_default(source, changes)
    samples = read(recipe.data.train, recipe.data, folder).samples
    cache = Cache(place.with_suffix(".cache.jsonl"))
    try:
        left = estimate(samples, job, cache)
        _say_estimate(left, job, prices)
        if only_estimate:
            return place
        ask, at_once = _translator(job, by, parallel)
        with console.progress(_("Translating"), left.characters) as progress:
            outcome = run_translation(samples, job, cache, ask, parallel=at_once, on_progress=progress.advance)
    except (KeyboardInterrupt, Interrupted) as stopped:
        raise Interrupted(
            _("Stopped; what is translated so far is kept."),
            signal_number=stopped.exit_status - 128 if isinstance(stopped, Interrupted) else signal.SIGINT,
            hint=_("The same command goes on from there."),
        ) from stopped
    except EndpointError as gone:
        raise EndpointError(
            gone.message, hint=_("What is translated so far is kept: the same command goes on from there.")
        ) from gone
    finally:
        cache.close()
    durable.write_text(place, "".join(json.dumps(row_of(one), ensure_ascii=False) + "\n" for one in outcome.samples))
    kept = [{"file": str(one.file), "line": one.line, "reason": one.reason} for one in outcome.kept_back]
    if kept:
        beside = place.with_suffix(".kept-back.jsonl")
        durable.write_text(beside, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in kept))
        for one in outcome.kept_back[:SHOWN]:
            console.warn(str(one))
    console.line(
        _(
            "{path}: {rows} rows = {made} translated + {kept} kept back; {asked:,} tokens read, {answered:,} written"
        ).format(
            path=place,
            rows=len(samples),
            made=len(outcome.samples),
            kept=len(kept),
            asked=outcome.tokens[0],
            answered=outcome.tokens[1],
        )
    )
    console.event("translated", file=str(place), rows=len(samples), kept_back=kept, tokens=list(outcome.tokens))
    return place


def _say_estimate(left: Estimate, job: Job, prices: tuple[float, float]) -> None:
    console.line(
        _(
            "{rows} rows from {source} to {target}: {units} paragraphs to translate, {cached} known; "
            "about {read:,} tokens to read and {write:,} to write"
        ).format(
            rows=left.rows,
            source=job.source,
            target=job.target,
            units=left.units,
            cached=left.cached,
            read=left.tokens[0],
            write=left.tokens[1],
        )
    )
    if any(prices):
        console.line(_("That costs about {price:.2f}.").format(price=left.price(prices)))
    console.event("estimate", **vars(left), price=left.price(prices))


def _asking(url: str, model: str, variable: str) -> Ask:
    """An OpenAI-compatible endpoint as a translator. Raises RecipeError for an address that is none, or not safe."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RecipeError(
            _("{url} is not the address of an endpoint.").format(url=url),
            hint=_("Write it as its clients do, such as http://127.0.0.1:8080/v1."),
        )
    if variable and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise RecipeError(
            _("The key would go to {host} in the clear.").format(host=parts.hostname), hint=_("Use https.")
        )
    endpoint = Endpoint(url, model, variable or None, PATIENCE)

    def ask(instruction: str, text: str, attempt: int) -> Reply:
        """A later attempt is asked with a little temperature."""
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": text}]
        answer = endpoint.chat(
            messages, max_tokens=64 + 2 * len(text), temperature=0.3 if attempt else 0.0, seed=attempt
        )
        return Reply(answer.text, answer.asked, answer.answered)

    return ask


def _translator(job: Job, by: tuple[str | None, str, str], parallel: int) -> tuple[Ask, int]:
    """Who translates, and how many things may be asked at once: a model here is asked one at a time."""
    url, model, variable = by
    if not model:
        raise RecipeError(_("Nobody is named who translates."), hint=_("Write --model NAME, with --endpoint or alone."))
    if url is not None:
        return _asking(url, model, variable), parallel
    from afina.model.load import choose_hardware
    from afina.model.translator import Translator
    from afina.recipe.schema import Model

    here = Translator(model, choose_hardware(Model()), job.source, job.target)

    def ask(_instruction: str, text: str, _attempt: int) -> Reply:
        """Between marks, as such a model knows nothing of them; what it is given twice it would translate alike."""
        pieces = re.split("(⟦[0-9]+⟧)", text)
        words = [place for place, piece in enumerate(pieces) if place % 2 == 0 and piece.strip()]
        for place, made in zip(words, here([pieces[place].strip() for place in words]), strict=True):
            if made is None:  # too long: the row is kept back
                return Reply("")
            bare = pieces[place].strip()
            pieces[place] = pieces[place].replace(bare, made.strip(), 1)
        return Reply("".join(pieces))

    return ask, 1
