"""What else the recipe could be: other methods, contexts and micro-batches; what makes it fit, what makes it faster.

Every choice is weighed and timed as the recipe is, and said as KEY=VALUE, to be given to `afina train` as it stands.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from afina.engine.eight import FP8
from afina.errors import AfinaError
from afina.forecast.clock import Time, clock
from afina.forecast.device import Device
from afina.forecast.weigh import Given, Need, weigh
from afina.language import _
from afina.recipe.advice import EIGHT_BIT_FROM
from afina.recipe.schema import Full, Lora, PrefixTuning, PromptTuning, Recipe

Change = tuple[str, ...]
Load = Callable[[Sequence[str]], Recipe]
"""From overrides to the recipe with them. Raises RecipeError."""
GAIN = 0.05
"""Share of the time below which nothing is called faster."""
LEAST_CONTEXT = 64


@dataclass(frozen=True)
class Choice:
    """`change`: the overrides that make it of the recipe; none for the recipe itself. samples: that it learns from."""

    name: str
    change: Change
    need: Need
    time: Time | None
    samples: int


class Weighing:
    """Weighs one recipe with all its changes on one device; `rows` are all samples, also those beyond its context."""

    def __init__(self, given: Given, device: Device, load: Load, held_out: int, rate: float | None) -> None:
        self.given, self.device, self.load = given, device, load
        self.held_out, self.rate = held_out, rate
        self._known: dict[Change, Choice | None] = {}

    def choice(self, change: Change = (), name: str = "") -> Choice | None:
        """The recipe with a change; None where it could not be, for the recipe's rules or for the base."""
        if change not in self._known:
            self._known[change] = self._weighed(change)
        found = self._known[change]
        return None if found is None else replace(found, name=name)

    def of(self, change: Change) -> Given:
        """What is weighed for a change. Raises RecipeError."""
        recipe = self.load(change)
        rows = [row for row in self.given.rows if row.ids.size <= recipe.model.max_length]
        return replace(self.given, recipe=recipe, rows=rows)

    def _weighed(self, change: Change) -> Choice | None:
        try:
            given = self.of(change)
            if not given.rows:
                return None
            need = weigh(given, self.device)
        except AfinaError:
            if not change:
                raise
            return None
        return Choice("", change, need, clock(given, self.device, need, self.held_out, self.rate), len(given.rows))


def table(weighing: Weighing, here: Choice) -> list[Choice]:
    """The recipe, each method, contexts half and twice as long, and smaller micro-batches."""
    recipe = weighing.given.recipe
    found = [here]
    for name, change in _methods(recipe):
        found.append(weighing.choice(change, name))  # type: ignore[arg-type]
    context = recipe.model.max_length
    for length in (context // 2, context * 2):
        if length >= LEAST_CONTEXT:
            found.append(weighing.choice((f"model.max_length={length}",), ""))  # type: ignore[arg-type]
    smaller = max(here.need.budget // 4, context)
    if smaller < here.need.budget:
        found.append(weighing.choice((f"training.micro_batch_tokens={smaller}",), ""))  # type: ignore[arg-type]
    return [choice for choice in found if choice is not None]


def _methods(recipe: Recipe) -> Iterator[tuple[str, Change]]:
    """The methods that the recipe is not."""
    plain, four = ("model.quantization=none",), ("model.quantization=nf4",)
    held = recipe.model.quantization != "none"
    lora = isinstance(recipe.method, Lora)
    as_lora: Change = () if lora else ("method={name: lora}",)
    prompt: Change = ("method={name: prompt-tuning}", "export.formats=[]")
    if not isinstance(recipe.method, Full):
        yield "full", ("method={name: full}", *(plain if held else ()), "training.learning_rate=1e-5")
    if not lora or held:
        yield "lora", (*as_lora, *(plain if held else ()))
    if not lora or recipe.model.quantization != "nf4":
        yield "qlora", (*as_lora, *four)
    if not isinstance(recipe.method, PromptTuning):
        yield "prompt-tuning", prompt


def to_fit(weighing: Weighing, here: Choice) -> list[Choice]:
    """The cheapest changes, in quality and time, that make the recipe fit, cheapest first; each alone where that is
    enough, else the first few together that are."""
    alone, together = list[Choice](), tuple[str, ...]()
    for step in _cheaper(weighing, here):
        choice = weighing.choice(step)
        if choice is not None and choice.need.fits:
            alone.append(choice)
            if len(alone) == 3:
                break
        together = _merged(together, step)
        if not alone and len(together) > len(step):
            both = weighing.choice(together)
            if both is not None and both.need.fits:
                return [_fewest(weighing, both)]
    return alone


def _cheaper(weighing: Weighing, here: Choice) -> Iterator[Change]:
    """Changes that save memory, those first that cost least."""
    recipe, need = weighing.given.recipe, here.need
    longest = max(row.ids.size for row in weighing.of(()).rows)
    whole = -(-int(longest) // 64) * 64
    if whole < recipe.model.max_length:
        yield (f"model.max_length={whole}",)
    keeps_all = need.reason is not None and not recipe.training.gradient_checkpointing
    if keeps_all and not isinstance(recipe.method, PrefixTuning):
        yield ("training.gradient_checkpointing=true",)
    if need.parts["moments"] > need.peak / 20 and not recipe.training.optimizer.endswith("8bit"):
        yield ("training.optimizer=adamw-8bit",)
    if isinstance(recipe.method, Full):
        yield ("method={name: lora}", "training.learning_rate=2e-4")
        yield ("method={name: lora}", "training.learning_rate=2e-4", "model.quantization=nf4")
    elif recipe.model.quantization == "none":
        yield ("model.quantization=nf4",)
    context = min(whole, recipe.model.max_length) // 2
    while context >= LEAST_CONTEXT:
        yield (f"model.max_length={context}", "data.too_long=reject")
        context //= 2


def _merged(before: Change, more: Change) -> Change:
    """Both; of a key that stands in both, the later value."""
    keys = {entry.partition("=")[0]: entry for entry in (*before, *more)}
    return tuple(keys.values())


def _fewest(weighing: Weighing, found: Choice) -> Choice:
    """Without the entries that are not needed."""
    for entry in found.change:
        fewer = tuple(other for other in found.change if other != entry)
        choice = weighing.choice(fewer) if fewer else None
        if choice is not None and choice.need.fits:
            found = choice
    return found


def faster(weighing: Weighing, here: Choice) -> list[Choice]:
    """Single changes that fit too and save time, the fastest first."""
    recipe, device = weighing.given.recipe, weighing.device
    training, wanted = recipe.training, list[Change]()
    large = isinstance(recipe.method, Lora) and here.need.parameters >= EIGHT_BIT_FROM
    if large and training.products == "exact" and device.eight_bits("8bit") is FP8:
        wanted.append(("training.products=8bit",))
    if recipe.model.quantization != "none":
        wanted.append(("model.quantization=none",))
    if training.engine != "auto":
        wanted.append(("training.engine=auto",))
    if not training.packing:
        wanted.append(("training.packing=true",))
    if training.gradient_checkpointing:
        wanted.append(("training.gradient_checkpointing=false",))
    if training.micro_batch_tokens is not None:
        wanted.append(("training.micro_batch_tokens=null",))
    found = [choice for change in wanted if (choice := weighing.choice(change)) is not None]
    if here.time is None:
        return []
    limit = here.time.seconds[1] * (1 - GAIN)
    better = [one for one in found if one.need.fits and one.time is not None and one.time.seconds[1] < limit]
    return sorted(better, key=lambda one: one.time.seconds[1] if one.time else 0.0)


def cost_of(change: Change) -> str:
    """What a change costs, in words."""
    keys = {entry.partition("=")[0]: entry.partition("=")[2] for entry in change}
    said = []
    if "training.gradient_checkpointing" in keys and keys["training.gradient_checkpointing"] == "true":
        said.append(_("a third more time"))
    if keys.get("training.optimizer") == "adamw-8bit":
        said.append(_("moments in eight bits, hardly worse"))
    if keys.get("method", "").startswith("{name: lora"):
        said.append(_("an adapter learns instead of every weight"))
    if keys.get("model.quantization") == "nf4":
        said.append(_("the base is rounded to four bits; a little slower"))
    if keys.get("training.products") == "8bit":
        said.append(_("a few percent of noise on every product"))
    if "data.too_long" in keys:
        said.append(_("longer samples are left out"))
    elif set(keys) == {"model.max_length"}:
        said.append(_("nothing: no sample is longer"))
    return "; ".join(said)
