"""A tuned model whose base is in NF4: merged in full, and merged and quantised again. Which is nearer to the tuned one?

    python benchmarks/merge_quantised.py RUN [--samples 300]

RUN is a finished run. Held-out samples are asked of base and adapter, of the merged model in fp32 and bf16, and of the
merged model quantised to NF4 again: KL in nats a token over the whole vocabulary, how often both think the same
token likeliest, answers that are right, bytes on the disk. Of a base in NF4 the adapter is added, before it is
quantised again, to what the base's blocks say and to the plain base they were made of. Printed, and appended to
results/quantize.jsonl.
"""

import argparse
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import torch
from quantize import note

from afina.export import certificate
from afina.export.certificate import certify_folder, pose
from afina.export.folding import can_fold, fold, read_adapter
from afina.export.run import held_out
from afina.export.weights import Held, Source
from afina.model.hub import weights_of
from afina.model.load import Hardware, load_model
from afina.model.quantize import is_quantised, quantisation
from afina.model.saved import save_configuration, save_whole
from afina.recipe.place import model_source
from afina.recipe.schema import Model
from afina.train.reopen import reopen

CPU = torch.device("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=300)
    options = parser.parse_args()
    certificate.LIMITS.update(dict.fromkeys(("fp32", "bf16", "nf4"), certificate.Limits(1e9, 0.0)))
    tuned = reopen(options.run, "fp32")
    recipe = tuned.recipe
    questions = pose(tuned.model, tuned.renderer, held_out(tuned)[: options.samples])
    adapter = read_adapter(options.run / "adapter")
    base = weights_of(model_source(recipe.model.base, tuned.folder), recipe.model.revision)
    source = Held(tuned.model) if is_quantised(tuned.model) or base is None else Source(base)
    assert adapter is not None and can_fold(source, adapter)
    with tempfile.TemporaryDirectory() as place:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            folder = Path(place) / name
            folder.mkdir()
            fold(source, adapter, folder, dtype)
            save_configuration(tuned.model, folder, dtype)
        wanted = Model(quantization="nf4", double_quantization=recipe.model.double_quantization)
        sums = {"nf4": Path(place) / "fp32"}
        if is_quantised(tuned.model) and base is not None:
            sums["nf4 of the plain base"] = Path(place) / "plain"
            sums["nf4 of the plain base"].mkdir()
            with closing(Source(base)) as plain:
                fold(plain, adapter, sums["nf4 of the plain base"], torch.float32)
            save_configuration(tuned.model, sums["nf4 of the plain base"], torch.float32)
        for name, folder in sums.items():
            save_whole(load_model(str(folder), Hardware(CPU, torch.bfloat16), wanted), Path(place) / name)
        for name in ("fp32", "bf16", *sums):
            folder = Path(place) / name
            model = load_model(str(folder), Hardware(CPU, torch.float32), held=True)
            found = certify_folder(folder, name.split()[0], model, questions, tuned.renderer)
            note(
                what="merge",
                model=f"{recipe.model.base} tuned on {recipe.name}",
                base_in=quantisation(tuned.model) or "full",
                merged=name,
                kl=round(found["divergence"], 8),
                agreement=round(found["agreement"], 4),
                right={"tuned": found["right_answers"]["model"], "merged": found["right_answers"]["gguf"]},
                samples=len(questions),
                positions=found["positions"],
                bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
