"""Hostile model folders: each is refused in one clear error, before anything opens the weights."""

import json
import os
import shutil
import struct
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small import CPU, llama
from transformers import CONFIG_MAPPING

from afina.errors import ModelError
from afina.model.foreign import INDEX, check_safetensors, check_weights, checked_config
from afina.model.load import load_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A good model folder, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refused(folder: Path, about: str) -> ModelError:
    with pytest.raises(ModelError, match=about) as caught:
        load_model(str(folder), CPU)
    assert str(folder) in str(caught.value) and caught.value.hint
    return caught.value


def config_of(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def sharded(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "..\\model.safetensors", "weights.bin", "a/b.safetensors"]
)
def test_an_index_names_nothing_but_safetensors_of_its_folder(folder, name):
    sharded(folder, {"lm_head.weight": name})
    refused(folder, "no .safetensors file of this folder")


@pytest.mark.parametrize("found", [{}, [], None, {"a": 7}, "model.safetensors"])
def test_an_index_that_is_none(folder, found):
    sharded(folder, found)
    refused(folder, "index of the weights is damaged")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_that_lead_out_of_the_folder_are_not_followed(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(folder, "leads out of the model's folder")


def test_links_within_the_folder_and_into_the_hubs_cache_are_followed(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors").symlink_to("other.safetensors")
    load_model(str(folder), CPU)
    snapshot = tmp_path / "models--someone--small" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    for place in (snapshot, blobs):
        place.mkdir(parents=True)
    for name in ("config.json", "other.safetensors"):
        shutil.copy(folder / name, blobs / name)
    (snapshot / "config.json").symlink_to("../../blobs/config.json")
    (snapshot / "model.safetensors").symlink_to("../../blobs/other.safetensors")
    load_model(str(snapshot), CPU)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pipe_is_no_file_to_wait_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, "no regular file")


def test_links_in_a_circle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    refused(folder, "broken link")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl"])
def test_pickles_are_named_with_the_way_out(folder, suffix):
    (folder / "model.safetensors").rename(folder / f"pytorch_model{suffix}")
    error = refused(folder, "holds no .safetensors")
    assert f"pytorch_model{suffix}" in error.hint and "save_pretrained" in error.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "ll\nama"},
        {"model_type": "x" * 65},
        {"model_type": "../llama"},
        {"num_hidden_layers": 2**40},
        {"num_hidden_layers": 10**6},
        {"hidden_size": 2**40},
        {"quantization_config": {"quant_method": "awq"}},
        {"quantization_config": "mxfp4"},
        {"quantization_config": {}},
        {"rope_parameters": [[[[[[[[[[1]]]]]]]]]]},
    ],
    ids=str,
)
def test_configurations_that_cannot_be(folder, changes):
    config_of(folder, **changes)
    refused(folder, ".")


def test_what_asks_for_code_is_dropped_wherever_it_stands():
    hostile = {
        "auto_map": {"AutoConfig": "evil.Config"},
        "trust_remote_code": True,
        "_attn_implementation": "someone/kernel",
        "_attn_implementation_internal": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "experts_implementation": "someone/kernel",
        "custom_pipelines": {},
    }
    known = {field.name for field in fields(CONFIG_MAPPING["llama"])} | set(hostile)
    inner = {"rope_theta": 1.0, **hostile}
    kept = checked_config({"hidden_size": 32, "rope_parameters": inner, "unheard_of": 1}, known, "x")
    assert kept["hidden_size"] == 32 and "unheard_of" not in kept
    assert kept["rope_parameters"] == {"rope_theta": 1.0, "custom_pipelines": {}}
    assert not [key for key in kept if key.startswith("_") or key.endswith("_implementation")]


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma2", "gpt_oss", "gpt2", "falcon"]
)
def test_what_transformers_writes_of_a_configuration_is_kept(kind):
    """The allow-list drops nothing that a configuration of transformers consists of."""
    cls = CONFIG_MAPPING[kind]
    written = json.loads(cls().to_json_string(use_diff=False))
    known = {field.name for field in fields(cls)} | set(cls.attribute_map)
    again = cls(**checked_config(written, known, "x"))
    skipped = {"_name_or_path", "transformers_version"}
    left, right = again.to_dict(), cls(**written).to_dict()
    assert {key: value for key, value in left.items() if key not in skipped} == {
        key: value for key, value in right.items() if key not in skipped
    }


def test_older_names_of_figures_are_kept(folder):
    config_of(folder, rope_parameters=None, rope_theta=1234.0, rope_scaling={"type": "linear", "factor": 2.0})
    config = load_model(str(folder), CPU).config
    assert config.rope_parameters["rope_theta"] == 1234.0 and config.rope_parameters["factor"] == 2.0


def test_an_adapter_that_lies_beside_a_base_is_not_attached_unasked(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/other"}))
    refused(folder, "a model and an adapter in one")


def head(entries: object, body: int = 8) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 17 * 2**20) + b"{}",
        head(b"["),
        head(b"[]"),
        head(b"[" * 100_000),
        head(b'{"a":' + json.dumps(GOOD).encode() + b',"a":' + json.dumps(GOOD).encode() + b"}"),
        head({"a": GOOD}, body=7),
        head({"a": GOOD}, body=9),
        head({"a": GOOD, "b": GOOD}),
        head({"a": GOOD, "b": GOOD | {"data_offsets": [12, 20]}}, body=20),
        head({"a": GOOD | {"shape": [3]}}),
        head({"a": GOOD | {"shape": [-2]}}),
        head({"a": GOOD | {"shape": [2.0]}}),
        head({"a": GOOD | {"shape": [True, 2]}}),
        head({"a": GOOD | {"shape": [2**40, 2**40]}}),
        head({"a": GOOD | {"dtype": "F33"}}),
        head({"a": GOOD | {"data_offsets": [8, 0]}}),
        head({"a": GOOD | {"data_offsets": [0]}}),
        head({"a": []}),
        head({"a": None}),
    ],
    ids=range(22),
)
def test_hostile_heads_of_safetensors(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        check_safetensors(file)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5),
        st.tuples(
            st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=4,
    )
)
def test_every_file_that_safetensors_writes_passes(tmp_path_factory, made):
    file = tmp_path_factory.mktemp("st") / "x.safetensors"
    save_file({name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in made.items()}, file)
    check_safetensors(file)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_mutated_heads_raise_nothing_but_a_model_error(saved, tmp_path_factory, place, noise):
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[place : place + len(noise)] = noise
    folder = tmp_path_factory.mktemp("m")
    (folder / "model.safetensors").write_bytes(content)
    with suppress(ModelError):
        check_weights(folder)
