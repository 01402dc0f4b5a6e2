"""Steps over fixed memory as CUDA graphs, against transformers' generate: every family, method and base."""

import pytest
import torch
from families import NAMED, build
from model.test_decode import written
from small import llama, perturb_adapters, spread
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from afina.model import fixed
from afina.model.attach import attach
from afina.model.fixed import can_be_fixed
from afina.model.generate import generate
from afina.model.load import Hardware, load_model
from afina.recipe.schema import Lora, Model

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
EARLY, NEVER = tuple(range(20, 40)), (1,)


def prompts_of(count: int, vocabulary: int = 64, longest: int = 40) -> list[list[int]]:
    """Of 1 to `longest` tokens each, so that all but the longest are padded on the left."""
    dice = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest + 1, (count,), generator=dice).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=dice).tolist() for length in lengths]


def plainly(model, prompts, ends, new) -> list[list[int]]:
    """Whom test_generate holds to one prompt at a time; on a GPU that would be most of these tests' time."""
    return generate(model, prompts, end_ids=ends, pad_id=0, max_new_tokens=new)


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs were made."""
    made = []
    capture = fixed._Steps._captured

    def counted(steps):
        made.append(len(steps.ids))
        return capture(steps)

    monkeypatch.setattr(fixed._Steps, "_captured", counted)
    return made


@GPU
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "head_dim": 16}])
def test_rows_that_end_apart_write_the_same(changes, graphs, monkeypatch):
    """Graphs made anew for those that are left, prompts read in several parts."""
    monkeypatch.setitem(fixed.READ_AT_ONCE, "cuda", 200)
    model = llama(4, vocab_size=64, **changes).cuda().double()
    prompts = prompts_of(60)
    for ends in (NEVER, (2, 31), EARLY):
        found = [one.ids for one in written(model, prompts, end_ids=ends, max_new_tokens=40)]
        assert found == plainly(model, prompts, ends, 40)
    assert len(graphs) > 3 and len(set(graphs)) > 2


@GPU
@pytest.mark.parametrize("family", [name for name in NAMED if name not in ("mistral", "gemma2", "gpt-oss")])
@pytest.mark.parametrize("count", [1, 3, 17])
def test_every_family_in_fp32_with_its_adapter(family, count, graphs):
    model = perturb_adapters(attach(build(family), Lora(rank=3, targets="all-linear"), seed=0)).cuda().eval()
    assert can_be_fixed(model)
    prompts = prompts_of(count, 97)
    for ends in (NEVER, EARLY):
        found = [one.ids for one in written(model, prompts, end_ids=ends, max_new_tokens=21)]
        assert found == plainly(model, prompts, ends, 21)
    assert graphs or family == "phi3"  # whose long turns ask how far the longest row is


@GPU
def test_weights_of_fp32_under_autocast(graphs, monkeypatch):
    """As a full fine-tuning holds them: keys come out in another precision than values."""
    model, prompts = llama(4, vocab_size=64).cuda(), prompts_of(33)
    with torch.autocast("cuda", torch.bfloat16):
        replayed = [one.ids for one in written(model, prompts, end_ids=EARLY, max_new_tokens=30)]
        monkeypatch.setattr(fixed._Steps, "_one", fixed._Steps._compute)
        assert [one.ids for one in written(model, prompts, end_ids=EARLY, max_new_tokens=30)] == replayed
    assert graphs


@GPU
@pytest.mark.parametrize("kind", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("method", [Lora(rank=4), Lora(rank=4, dora=True)])
def test_a_replay_is_the_step_itself(kind, method, tmp_path, graphs, monkeypatch):
    """In bf16 under autocast, where another batch rounds otherwise: the same batch, with its graph and without."""
    llama(5, hidden_size=128, intermediate_size=256, vocab_size=128).save_pretrained(tmp_path)
    cuda = Hardware(torch.device("cuda"), torch.bfloat16)
    model = load_model(str(tmp_path), cuda, Model(quantization=kind))
    model = perturb_adapters(attach(model, method, seed=0)).eval()
    prompts = prompts_of(33, 128)
    with cuda.autocast():
        replayed = [one.ids for one in written(model, prompts, end_ids=EARLY, max_new_tokens=30)]
        assert graphs if kind != "int8" else not graphs  # 8-bit layers look for outliers at every step
        monkeypatch.setattr(fixed._Steps, "_one", fixed._Steps._compute)
        assert [one.ids for one in written(model, prompts, end_ids=EARLY, max_new_tokens=30)] == replayed
    assert len({tuple(ids) for ids in replayed}) > 10


@GPU
def test_a_mixture_writes_the_same_whether_or_not_it_can_be_a_graph():
    config = Qwen3MoeConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        **{"num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    model = spread(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")).cuda()
    prompts = prompts_of(9)
    for ends in (NEVER, EARLY):
        found = [one.ids for one in written(model, prompts, end_ids=ends, max_new_tokens=20)]
        assert found == plainly(model, prompts, ends, 20)
    torch.rand(3, device="cuda")  # a capture that failed would leave chance unusable


@GPU
def test_more_than_the_memory_holds_is_written_in_parts(monkeypatch):
    """Memory that runs out while prompts are read: half as many rows, the same answers."""
    model, prompts = llama(6, vocab_size=64).cuda(), prompts_of(40)
    whole = [one.ids for one in written(model, prompts)]
    read, asked = fixed._read, []

    def tight(model, rows, settings):
        asked.append(len(rows))
        if len(rows) > 11:
            torch.empty(2**50, device="cuda")  # raises what torch raises
        return read(model, rows, settings)

    monkeypatch.setattr(fixed, "_read", tight)
    assert [one.ids for one in written(model, prompts)] == whole
    assert asked[:2] == [40, 20] and max(asked[2:]) <= 11
