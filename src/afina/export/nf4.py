"""The merged model quantised again, to NF4 in bitsandbytes' format: a folder that plain transformers loads in 4 bits.

Where training held its base in NF4, the weights it saw stand exactly on the steps of their blocks' scales, and what the
adapter adds is mostly less than half a step: quantising that sum again rounds the training away. So the adapter is
added to the plain base that the blocks were made of, where it is at hand; its weights lie anywhere between two steps,
and the sum's error is that of quantising once (docs/export.md has the figures).
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afina import durable
from afina.export.certificate import certify_folder
from afina.export.folding import can_fold, fold, read_adapter
from afina.export.weights import Source
from afina.language import _
from afina.model.hub import weights_of
from afina.model.load import Hardware, load_model
from afina.model.saved import save_whole
from afina.recipe.place import model_source
from afina.recipe.schema import Model

if TYPE_CHECKING:
    from afina.export.run import Export

NAME, PLAIN = "nf4", "nf4-plain"
"""The folder, and one that is there while it is made."""


def write_nf4(export: "Export") -> Path:
    """Write the folder `nf4` of an export; returns it."""
    tuned, folder = export.tuned, export.folder / NAME
    wanted = Model(quantization="nf4", double_quantization=tuned.recipe.model.double_quantization)
    with _sum(export) as whole, durable.new_folder(folder) as new:
        save_whole(load_model(str(whole), Hardware(tuned.hardware.device, torch.bfloat16), wanted), new)
        tuned.renderer.tokenizer.save(new)
    return folder


@contextmanager
def _sum(export: "Export") -> Iterator[Path]:
    """The folder that is to be quantised: the merged model, or the plain base of a quantised one with the adapter."""
    tuned, adapter = export.tuned, export.tuned.run.folder / "adapter"
    model = tuned.recipe.model
    base = weights_of(model_source(model.base, tuned.folder), model.revision)
    terms = None if model.quantization == "none" or base is None else read_adapter(adapter)
    if base is None or terms is None:
        yield export.whole
        return
    with closing(Source(base)) as source:
        if not can_fold(source, terms):
            yield export.whole
            return
        with durable.new_folder(export.folder / PLAIN) as place:
            fold(source, terms, place, export.precision)
            for name in ("config.json", "generation_config.json"):
                if (export.whole / name).is_file():
                    durable.write_bytes(place / name, (export.whole / name).read_bytes())
    try:
        yield export.folder / PLAIN
    finally:
        durable.remove(export.folder / PLAIN)


def certify_nf4(export: "Export") -> dict[str, Any]:
    """Compare that folder with the model. Raises NotTheModel when it is too far away."""
    folder = export.folder / NAME
    model = load_model(str(folder), Hardware(export.tuned.hardware.device, torch.float32), held=True)
    return certify_folder(folder, NAME, model, export.questions, export.tuned.renderer, export.right)


def recommendation(export: "Export", away: float) -> str:
    """Which to take, by what both were measured to be."""
    merged = (export.merge or {}).get("divergence", 0.0)
    return _(
        "Quantised again to NF4, the model is {nf4:.2g} nats a token away from base and adapter; merged in {precision} "
        "it is {merged:.2g}. Take the merged folder or a GGUF unless a program must have NF4."
    ).format(nf4=away, precision=export.tuned.recipe.export.precision, merged=merged)
