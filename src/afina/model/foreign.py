"""A model folder that somebody else made, looked at before anything opens it. Runs nothing, follows nothing out of it.

What may be opened: config.json, of which known fields are kept and all others dropped; safetensors files that lie
inside the folder, whose heads are checked here first. Pickled weights are never opened. A folder on this disk is
trusted no more than one of the hub. Knows nothing of transformers.
"""

import json
import math
import re
import stat
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from afina.errors import ModelError
from afina.language import _

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".pt2", ".mdl", ".npy", ".npz")
"""Formats that can run code when they are opened."""

MAX_CONFIG_BYTES = 4 * 2**20
"""The largest real config.json has some 100 KB: lists of experts or layers."""
MAX_INDEX_BYTES = 64 * 2**20
"""The largest real index names 150,000 tensors in 20 MB."""
MAX_HEAD_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_COUNT = 2**31
"""No figure of a model is larger; those that make modules are bounded closer below."""
MAKES_MODULES = {"num_hidden_layers": 4096, "num_local_experts": 8192, "num_experts": 8192, "n_layer": 4096}
"""Figures that say how many modules are built before a weight is read: a hostile one would never end."""

WIDTHS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
WIDTHS |= {"U64": 64, "U32": 32, "U16": 16, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
"""Bits of a number, by safetensors' name of its type."""

READ_QUANTISED = ("bitsandbytes", "mxfp4")
"""The methods, as quantization_config names them, of checkpoints that are read."""
MODEL_TYPE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OLDER = """
    model_type rope_theta rope_scaling rope_parameters rotary_pct rotary_emb_base partial_rotary_factor
    rope_local_base_freq original_max_position_embeddings head_dim num_key_value_heads num_attention_heads
    num_hidden_layers intermediate_size sliding_window use_sliding_window sliding_window_pattern layer_types
    max_window_layers tie_word_embeddings torch_dtype dtype hidden_act hidden_activation attention_bias
    query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping moe_layer_freq first_k_dense_replace
    num_experts num_local_experts num_nextn_predict_layers num_expert_group num_experts_per_token num_shared_experts
    moe_renormalize model_max_length qk_head_dim qk_rope_head_dim kv_channels num_query_groups attention_head_dim
    attention_hidden_size mamba_headdim hybrid_layer_ids linear_head_dim linear_num_heads linear_conv_kernel_dim
    linear_attn_config full_attention_interval no_rope_layer_interval n_embed use_bias qkv_bias per_layer_config
    final_w_init_variance_scale attention_layers image_token_id number_of_conv_states index_topk_freq
    index_topk_pattern index_skip_topk_offset local_rope_theta global_rope_theta swa_rope_theta
    num_global_key_value_heads global_head_dim initial_context_length experts_per_token swiglu_limit
    """
OLDER = frozenset(_OLDER.split())
"""Names that older files use, or that a configuration of transformers takes without having a field for them."""


def checked_config(config: Any, known: Iterable[str], where: str | Path) -> dict[str, Any]:
    """The figures of a config.json, nothing but fields that are `known` or of older files. Raises ModelError.

    What asks for code (auto_map, trust_remote_code, implementations of attention) is in no list, so it is dropped.
    """
    allowed = OLDER.union(known)
    kept = {
        key: _plain(value, key, where)
        for key, value in config.items()
        if key in allowed and not key.startswith("_") and not key.endswith("_implementation")
    }
    for key, most in MAKES_MODULES.items():
        if isinstance(value := kept.get(key), int) and value > most:
            raise _impossible(key, value, where)
    return kept


def quantised_as(config: Mapping[str, Any], where: str | Path) -> dict[str, Any] | None:
    """What config.json says of how the checkpoint is quantised, `quant_method` first; None where it is not.

    Raises ModelError for a method that is not read here.
    """
    said = config.get("quantization_config")
    if said is None:
        return None
    plain = _plain(said, "quantization_config", where)
    method = plain.get("quant_method") if isinstance(plain, dict) else None
    if method not in READ_QUANTISED:
        raise ModelError(
            _("quantization_config: checkpoints quantised by {method} are not read.").format(method=repr(method)[:40]),
            hint=_("These are: {names}. Start from the model as it was before it was quantised.").format(
                names=", ".join(READ_QUANTISED)
            ),
            file=Path(where) / "config.json",
        )
    return {"quant_method": method, **plain}


def _plain(value: Any, key: str, where: str | Path, depth: int = 0) -> Any:
    """A value of numbers, texts and collections of these, private names left out of mappings."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        if abs(value) > MAX_COUNT:
            raise _impossible(key, value, where)
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _impossible(key, value, where)
        return value
    if depth > 8:
        raise _impossible(key, "...", where)
    if isinstance(value, list):
        return [_plain(item, key, where, depth + 1) for item in value]
    dropped = {"auto_map", "trust_remote_code", "quantization_config"}
    return {
        name: _plain(item, str(name), where, depth + 1)
        for name, item in value.items()
        if not name.startswith("_") and name not in dropped and not name.endswith("_implementation")
    }


def _impossible(key: str, value: object, where: str | Path) -> ModelError:
    return ModelError(
        _("{key} in config.json cannot be {value}.").format(key=key, value=str(value)[:40]),
        hint=_("No model is like that: the file is damaged or hostile."),
        file=Path(where) / "config.json",
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder as it is, with a `model_type`. Raises ModelError for one that is none."""
    path = folder / "config.json"
    if not path.exists() and not path.is_symlink():
        raise ModelError(
            _("{folder} is no model folder: it has no config.json.").format(folder=folder),
            hint=_("Name a folder saved by transformers, a GGUF file, a hub name, or afina/tiny."),
        )
    config = read_object(inside(folder, "config.json"), MAX_CONFIG_BYTES)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not MODEL_TYPE.fullmatch(kind):
        raise ModelError(
            _("config.json names no architecture: model_type is {value}.").format(value=repr(kind)[:40]),
            hint=_("Name a folder saved by transformers."),
            file=path,
        )
    return config


def check_weights(folder: Path) -> None:
    """Look at every weight file of a folder before it is opened. Raises ModelError with the way out."""
    if (folder / "adapter_config.json").exists():  # transformers would attach it to the base unasked
        raise ModelError(
            _("{folder} holds a model and an adapter in one.").format(folder=folder),
            hint=_("Move adapter_config.json and adapter_model.safetensors into a folder of their own."),
        )
    names = _indexed(folder) if (folder / INDEX).exists() else [WEIGHTS]
    if names == [WEIGHTS] and not (folder / WEIGHTS).exists() and not (folder / WEIGHTS).is_symlink():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        raise ModelError(
            _("{folder} holds no .safetensors weights.").format(folder=folder),
            hint=(
                _("{name} can run code when it is opened, so it is not.").format(name=pickled[0]) + " "
                if pickled
                else ""
            )
            + _(
                "Other formats can run code, so they are not read. Where you trust it, convert it once with "
                "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(another)."
            ),
        )
    for name in names:
        check_safetensors(inside(folder, name))


def _indexed(folder: Path) -> list[str]:
    path = inside(folder, INDEX)
    found = read_object(path, MAX_INDEX_BYTES).get("weight_map")
    names = sorted(set(found.values())) if found is not None and _all_texts(found) else []
    if not names:
        raise ModelError(_("The index of the weights is damaged."), hint=_again(), file=path)
    for name in names:
        if Path(name).name != name or "\\" in name or Path(name).suffix != ".safetensors":
            raise ModelError(
                _("The index of the weights names {name}, which is no .safetensors file of this folder.").format(
                    name=repr(name)[:80]
                ),
                hint=_("Take the model from a source you trust."),
                file=path,
            )
    return names


def _all_texts(found: Any) -> bool:
    return isinstance(found, dict) and bool(found) and all(isinstance(name, str) for name in found.values())


def inside(folder: Path, name: str) -> Path:
    """The path of a regular file that lies in the folder, or in the hub's cache where the folder is a snapshot of it.

    Raises ModelError for a link that leads elsewhere and for what is no file (a pipe would wait forever).
    """
    path = folder / name
    rooms = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":  # the hub's cache: snapshots/REVISION/file links to blobs/HASH
        rooms.append(folder.resolve().parent.parent / "blobs")
    try:
        real = path.resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, up to Python 3.12
        raise ModelError(_("The file is missing or a broken link."), hint=_again(), file=path) from error
    if not any(real.is_relative_to(room) for room in rooms):
        raise ModelError(
            _("The file is a link that leads out of the model's folder, to {place}.").format(place=real),
            hint=_("Copy the file into the folder if it belongs there."),
            file=path,
        )
    if not regular:
        raise ModelError(_("This is no regular file."), hint=_again(), file=path)
    return path


def check_safetensors(path: Path) -> None:
    """Hold a safetensors file's head against its length: no overlap, no hole, no tensor beyond the end, no name twice.

    Raises ModelError. The layout: 8 bytes of length, that much JSON, the tensors one after another.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(MAX_HEAD_BYTES, size - 8):
            raise _damaged(path, _("its head is longer than the file, or than any real one"))
        text = file.read(length)
    try:
        head = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, _("its head is no JSON")) from error
    if not isinstance(head, dict):
        raise _damaged(path, _("its head is no JSON"))
    tensors = {name: entry for name, entry in head.items() if name != "__metadata__"}
    if len(tensors) > MAX_TENSORS:
        raise _damaged(path, _("it names more tensors than any real one"))
    spans = sorted(_span(path, name, entry) for name, entry in tensors.items())
    place = 0
    for begin, end in spans:
        if begin != place:
            raise _damaged(path, _("its tensors overlap or leave holes"))
        place = end
    if place != size - 8 - length:
        raise _damaged(
            path, _("its tensors take {told} bytes, the file has {there}").format(told=place, there=size - 8 - length)
        )


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where one tensor begins and ends, its shape agreeing with both."""
    shape, offsets, kind = (
        entry.get(key) if isinstance(entry, dict) else None for key in ("shape", "data_offsets", "dtype")
    )
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= 16):
        raise _damaged(path, _("it says nothing usable of {name}").format(name=repr(name)[:80]))
    if any(type(number) is not int or number < 0 for number in (*shape, *offsets)) or kind not in WIDTHS:
        raise _damaged(path, _("it says nothing usable of {name}").format(name=repr(name)[:80]))
    if math.prod(shape) * WIDTHS[kind] != 8 * (offsets[1] - offsets[0]):
        raise _damaged(path, _("the shape of {name} does not fit its bytes").format(name=repr(name)[:80]))
    return offsets[0], offsets[1]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _damaged(path: Path, reason: str) -> ModelError:
    return ModelError(
        _("The weights cannot be read: {reason}.").format(reason=reason),
        hint=_again(),
        file=path,
    )


def _again() -> str:
    return _("Copy or download the file again.")


def read_object(path: Path, most: int) -> dict[str, Any]:
    """A JSON object of bounded size. Raises ModelError."""
    with path.open("rb") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ModelError(_("The file is larger than any real one of its kind."), hint=_again(), file=path)
    try:
        value: Mapping[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(
            _("The file is not valid JSON: {reason}.").format(reason=reason), hint=_again(), file=path
        ) from error
    if not isinstance(value, dict):
        raise ModelError(_("The file is not a JSON object."), hint=_again(), file=path)
    return value
