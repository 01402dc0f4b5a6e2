"""A forecast on the screen and, for machines and Python, as plain values."""

import shlex
from collections.abc import Sequence
from typing import Any

from afina.console import Console, size
from afina.forecast.choices import Choice, cost_of
from afina.forecast.clock import Time
from afina.forecast.foresee import Forecast, method_of
from afina.forecast.weigh import Need
from afina.language import _


def facts_of(found: Forecast) -> dict[str, Any]:
    """All of it: bytes, seconds, tokens."""
    here = found.here
    return {
        "recipe": found.recipe.name,
        "fits": here.need.fits if here.need.unknown is None else None,
        "device": {
            "kind": found.device.kind,
            "name": found.device.name,
            "memory": found.device.memory,
            "dtype": str(found.device.dtype).removeprefix("torch."),
            "known": found.device.gpu is not None,
        },
        "data": {
            "samples": len(found.figures.lengths),
            "longest": int(found.figures.lengths.max()),
            "tokens_per_epoch": int(sum(length for length in found.figures.lengths if length <= found.figures.context)),
            "learnt_share": found.figures.share,
            "over": found.over,
            "refused": found.refused,
        },
        **_facts(here),
        "disk": found.disk,
        "advice": {"method": found.advice.method, "why": found.advice.why},
        "choices": [{"change": list(one.change), "method": one.name, **_facts(one)} for one in found.table[1:]],
        "to_fit": [{"change": list(one.change), "cost": cost_of(one.change), **_facts(one)} for one in found.fitting],
        "faster": [{"change": list(one.change), "cost": cost_of(one.change), **_facts(one)} for one in found.faster],
        "warnings": found.warnings,
    }


def _facts(choice: Choice) -> dict[str, Any]:
    need, time = choice.need, choice.time
    plan = None
    if need.plan is not None:
        names = ["+".join(sorted(one.away)) + "/" + "+".join(sorted(one.again)) for one in need.plan.placements]
        plan = {
            "layers": {name: names.count(name) for name in dict.fromkeys(names)},
            "host": need.plan.host,
            "rows_at_once": need.plan.rows_at_once,
            "held": need.plan.held,
        }
    return {
        "memory": {
            "peak": need.peak,
            "least": need.least,
            "limit": need.limit,
            "fits": need.fits,
            "parts": need.parts,
            "host": need.host,
            "unknown": need.unknown,
        },
        "parameters": need.parameters,
        "learnt": need.learnt,
        "engine": "fused" if need.reason is None else need.reason,
        "plan": plan,
        "tokens_at_once": need.tokens,
        "samples": choice.samples,
        "steps": time.steps if time else None,
        "seconds": list(time.seconds) if time else None,
        "tokens_per_second": list(time.speed) if time else None,
        "time_from": (("trial" if time.measured else "data sheet") if time else None),
    }


def say(found: Forecast, console: Console) -> None:
    """Print it."""
    here, need, device = found.here, found.here.need, found.device
    console.line(
        _("Device    {name}, {memory}, {precision}").format(
            name=device.name, memory=size(device.memory), precision=str(device.dtype).removeprefix("torch.")
        )
    )
    _say_data(found, console)
    console.line(
        _("Engine    {engine}").format(
            engine=need.reason or _("fused blocks, where they prove themselves on the first batch")
        )
    )
    if (placed := _placed(need)) is not None:
        console.line(_("Layers    {placed}").format(placed=placed))
    console.table(
        (_("memory at the worst moment"), ""),
        [(_named(part), size(taken)) for part, taken in need.parts.items() if taken]
        + [(_("together"), size(need.peak)), (_("may be taken"), size(need.limit))],
    )
    _say_outside(found, console)
    if here.time is not None:
        console.line(_("Time      {time}").format(time=_timed(here.time)))
    else:
        console.line(_("Time      not told: nothing says how fast this device is"))
    console.line(_verdict(found))
    _say_choices(_("To make it fit"), found.fitting, console)
    _say_choices(_("There is room; faster would be"), found.faster, console)
    console.table(
        (_("what"), _("changes"), _("memory"), _("fits"), _("time, estimated"), _("samples")),
        [_row(found, choice) for choice in found.table],
        title=_("What else it could be"),
        left=2,
    )
    console.line(_("Method    {why}").format(why=found.advice.why))
    for warning in found.warnings:
        console.warn(warning)


def _say_data(found: Forecast, console: Console) -> None:
    lengths, time = found.figures.lengths, found.here.time
    console.line(
        _(
            "Samples   {count:,} to learn from, {tokens:,} tokens, {share:.0%} learnt; the longest has {longest:,}"
        ).format(
            count=len(lengths),
            tokens=found.figures.tokens,
            share=found.figures.share,
            longest=int(lengths.max()),
        )
    )
    if found.over:
        told = (
            _("          {over} are longer than model.max_length ({limit}): training refuses them")
            if found.refused
            else _("          {over} are longer than model.max_length ({limit}): training leaves them out")
        )
        console.line(told.format(over=found.over, limit=found.figures.context))
    if time is not None:
        console.line(
            _("Steps     {steps:,}, in micro-batches of {tokens:,} tokens at the most").format(
                steps=time.steps, tokens=found.here.need.tokens
            )
        )


def _say_outside(found: Forecast, console: Console) -> None:
    """The computer's memory, and the disk."""
    need, disk = found.here.need, found.disk
    if found.device.kind == "cuda":
        console.line(_("Computer  {memory} of memory, pages of the base's files apart").format(memory=size(need.host)))
    exports = disk["exports"]
    console.line(
        _("Disk      {checkpoints} while it trains, {kept} kept, {exports} for what is exported").format(
            checkpoints=size(disk["checkpoints"] or 0),
            kept=size(disk["kept"] or 0),
            exports=_("not known") if exports is None else size(exports),
        )
    )


def _placed(need: Need) -> str | None:
    """What the engine keeps, sends away and computes again."""
    if need.plan is None:
        return None
    again = sum(bool(one.again) for one in need.plan.placements)
    away = sum(bool(one.away) for one in need.plan.placements)
    whole = sum(not one.again and not one.away for one in need.plan.placements)
    said = [_("{count} keep all they save").format(count=whole)] if whole else []
    if away:
        said.append(_("{count} send a part to the computer's memory").format(count=away))
    if again:
        said.append(_("{count} compute a part again").format(count=again))
    if need.plan.host != "neither":
        said.append(
            _("the embedding waits in the computer's memory")
            if need.plan.host == "embedding"
            else _("embedding and head wait in the computer's memory")
        )
    if need.plan.held:
        said.append(_("{count} keep their weights unpacked").format(count=need.plan.held))
    return ", ".join(said)


def _verdict(found: Forecast) -> str:
    need = found.here.need
    if need.unknown is not None:
        return _("Fits      not known, at least {least}: {reason}").format(least=size(need.least), reason=need.unknown)
    facts = {"least": size(need.least), "limit": size(need.limit)}
    if need.fits:
        return _("Fits      yes: it needs {least} of the {limit} that may be taken").format(**facts)
    return _("Fits      no: it needs {least}, and {limit} may be taken").format(**facts)


def _say_choices(title: str, choices: Sequence[Choice], console: Console) -> None:
    if not choices:
        return
    console.heading(title)
    for choice in choices:
        cost = cost_of(choice.change)
        told = _timed(choice.time) if choice.time is not None else ""
        facts = "; ".join(part for part in (size(choice.need.least), told, cost) if part)
        console.line(f"  {shlex.join(choice.change)}")
        console.line(f"      {facts}")


def _row(found: Forecast, choice: Choice) -> tuple[str, ...]:
    need = choice.need
    name = choice.name or (method_of(found.recipe) if not choice.change else "")
    what = _("this recipe: {method}").format(method=name) if not choice.change else name
    fits = _("yes") if need.fits else _("no")
    return (
        what,
        shlex.join(choice.change),
        size(need.least),
        "?" if need.unknown is not None else fits,
        _range(choice.time) if choice.time is not None else "?",
        f"{choice.samples:,}",
    )


def _range(time: Time) -> str:
    return _("{least} to {most}").format(least=_about(time.seconds[0]), most=_about(time.seconds[1]))


def _about(seconds: float) -> str:
    """No more exact than an estimate is."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36_000 else f"{seconds / 3600:.0f} h"


def _timed(time: Time) -> str:
    source = _("by a trial of the first layers here") if time.measured else _("by the maker's data sheet")
    least, most = (float(f"{speed:.2g}") for speed in time.speed)
    return _("{range} of steps, {least:,.0f} to {most:,.0f} tokens/s: an estimate {source}").format(
        range=_range(time), least=least, most=most, source=source
    )


def _named(part: str) -> str:
    return {
        "weights": _("weights"),
        "adapters": _("what learns"),
        "gradients": _("gradients"),
        "moments": _("the optimiser's moments"),
        "saved": _("saved for the backward pass"),
        "head": _("head and logits"),
        "working": _("at work, and workspace"),
        "unpacked": _("weights kept unpacked, as there is room"),
    }[part]
