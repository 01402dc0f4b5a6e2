"""The last lines of a verb: what came out, where it lies, what to try next."""

import shlex
from pathlib import Path
from typing import Any

from afina.artifact import MANIFEST, open_artifact
from afina.console import console, duration, size
from afina.language import _


def say_trained(facts: dict[str, Any], place: Path) -> None:
    """What came of a training, in one line."""
    training = facts["training"]
    console.line(
        _("Trained   {steps} steps in {time}, loss {first:.3f} → {last:.3f}, {speed:,.0f} tokens/s, {memory}").format(
            steps=training["steps"],
            time=duration(training["seconds"]),
            first=training["first_loss"],
            last=training["final_loss"],
            speed=training["tokens_per_second"],
            memory=size(training["peak_memory_bytes"]),
        )
    )
    console.event("trained", run=str(place), **training)


def say_done(place: Path, seconds: float) -> None:
    """The last screen: what came out, where it lies, what to try next."""
    from afina.evaluate.run import said as told

    manifest = open_artifact(place, "run").manifest
    exports = open_artifact(place / "export").manifest["exports"] if (place / "export" / MANIFEST).is_file() else []
    rows: list[tuple[str, str]] = []
    for task in tasks_of(place):
        measured = [(name, figures) for name, figures in task["systems"].items() if figures["value"] is not None]
        shown = " → ".join(f"{name} {told(figures['value'], task['measure'])}" for name, figures in measured)
        rows.append((task["name"], shown))
        rows += [("", pair["verdict"]) for pair in task["comparisons"][:1]]
    for entry in exports:
        equal = sum(check["equal"] for check in entry["checks"])
        asked = len(entry["checks"])
        said = _("{equal} of {asked} answers the same in llama.cpp").format(equal=equal, asked=asked) if asked else ""
        rows.append((entry["format"], f"{place / 'export' / entry['file']}  {size(entry['bytes'])}  {said}"))
    training = manifest["training"]
    rows.append((_("time"), f"{duration(seconds)} ({_('training')} {duration(training['seconds'])})"))
    rows.append((_("memory"), size(training["peak_memory_bytes"])))
    rows.append((_("run folder"), str(place)))
    rows.append((_("report"), str(place / "report.html")))
    console.line()
    console.heading(_("Done: {name}").format(name=manifest["recipe"]["name"]))
    width = max(len(name) for name, _value in rows)
    for name, value in rows:
        console.line(f"  {name:<{width}}  {value}")
    console.line()
    console.heading(_("Try next"))
    for command in [command for _purpose, command in next_commands(place, place)] + [
        "afina init support-chat my-project"
    ]:
        console.line(f"  {command}")
    console.event("done", run=str(place), seconds=seconds, exports=exports)


def next_commands(run: Path, named: Path) -> list[tuple[str, str]]:
    """What a user may want after this training, and the command, each of which works; none where it is not finished.

    `named` is what the commands call the run.
    """
    from afina.export.beforehand import why_no_gguf
    from afina.train.reopen import recipe_of

    if not (run / MANIFEST).is_file():
        return []
    recipe, start = recipe_of(open_artifact(run, "run"))
    place, export = shlex.quote(str(named)), run / "export"
    if recipe.method.name == "full":  # there is no base beside it in memory
        commands = [(_("Talk to it"), f"afina chat {place}")]
    else:
        commands = [(_("Talk to it, beside the base model"), f"afina chat {place} --beside-base")]
    if recipe.tasks and not (run / "evaluation" / "evaluation.json").is_file():
        commands.append((_("Measure it on held-out samples"), f"afina eval {place}"))
    if files := [*sorted(export.glob("*.gguf")), *export.glob("merged")]:
        file = shlex.quote(str(named / files[0].relative_to(run)))
        commands.append((_("Talk to what was exported"), f"afina chat {file}"))
    elif recipe.method.name in ("lora", "full") and not export.exists():  # learnt prompts lie outside the weights
        as_gguf = recipe.model_copy(update={"export": recipe.export.model_copy(update={"formats": ["q8_0"]})})
        if why_no_gguf(as_gguf, start) is None:
            command = f"afina export {place} --format q8_0"
            commands.append((_("Make a file for llama.cpp, Ollama and LM Studio"), command))
    return commands


def tasks_of(place: Path) -> list[dict[str, Any]]:
    """The measured tasks of a run, none where it was not evaluated."""
    import json

    file = place / "evaluation" / "evaluation.json"
    tasks: list[dict[str, Any]] = json.loads(file.read_bytes())["tasks"] if file.is_file() else []
    return tasks


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines that training wrote."""
    import json

    return [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().split(b"\n") if line]
