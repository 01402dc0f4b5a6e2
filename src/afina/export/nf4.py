"""The merged model quantised again, to NF4 in bitsandbytes' format: a folder that plain transformers loads in 4 bits.

What training saw was a base in NF4 and an adapter beside it in full. Merged and quantised again, the sum is rounded
anew, the training with it: further from the model than a merged folder of 16 bits, which is why that one is recommended
(docs/export.md has the figures). This one is for programs that hold four bits and know bitsandbytes only.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afina import durable
from afina.export.certificate import certify_folder
from afina.language import _
from afina.model.attach import save_whole
from afina.model.load import Hardware, load_model
from afina.recipe.schema import Model

if TYPE_CHECKING:
    from afina.export.run import Export

NAME = "nf4"


def write_nf4(export: "Export") -> Path:
    """Write the folder `nf4` of an export from its merged model; returns it."""
    tuned, folder = export.tuned, export.folder / NAME
    wanted = Model(quantization="nf4", double_quantization=tuned.recipe.model.double_quantization)
    with durable.new_folder(folder) as new:
        save_whole(load_model(str(export.whole), Hardware(tuned.hardware.device, torch.bfloat16), wanted), new)
        tuned.renderer.tokenizer.save(new)
    return folder


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
