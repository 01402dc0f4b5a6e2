"""Answers do not depend on their neighbours; they stop where they should; chance is repeatable."""

import pytest
import torch
from small import llama

from afina.errors import ModelError
from afina.model.generate import generate

PROMPTS = [[5, 9, 33], [80, 7, 64, 21, 3, 14, 15, 92, 6], [40], [11, 12]]


def lively(**changes) -> torch.nn.Module:
    """Weights so large that no answer repeats one token."""
    model = llama(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def ask(model, prompts, **changes) -> list[list[int]]:
    return generate(model, prompts, **{"end_ids": (), "pad_id": 0, "max_new_tokens": 20, **changes})


def greedy(model, prompt, count) -> list[int]:
    """One token after the other, without cache, batch or padding."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_batch_padded_on_the_left_is_answered_as_one_by_one():
    model = lively()
    together = ask(model, PROMPTS)
    assert together == [greedy(model, prompt, 20) for prompt in PROMPTS]
    assert together == [ask(model, [prompt])[0] for prompt in PROMPTS]
    assert len({tuple(answer) for answer in together}) == len(PROMPTS)


def test_the_padding_token_may_be_any_even_one_of_the_prompt():
    model = lively()
    assert ask(model, PROMPTS, pad_id=5) == ask(model, PROMPTS, pad_id=0)


def test_an_answer_ends_before_the_first_end_token():
    model = lively()
    whole = ask(model, PROMPTS)
    end = whole[0][7]
    cut = [answer[: answer.index(end)] if end in answer else answer for answer in whole]
    assert ask(model, PROMPTS, end_ids=(end,)) == cut
    assert len(cut[0]) <= 7
    several = (end, whole[1][3])
    assert all(not set(several) & set(answer) for answer in ask(model, PROMPTS, end_ids=several))


def test_an_answer_may_be_empty():
    model = lively()
    assert ask(model, [PROMPTS[0]], end_ids=(greedy(model, PROMPTS[0], 1)[0],)) == [[]]


def test_the_models_own_generation_settings_decide_nothing():
    """A base's generation_config.json may ask for sampling, beams or penalties: greedy is greedy."""
    model = lively()
    wanted, sampled = ask(model, PROMPTS), ask(model, PROMPTS, temperature=1.0, seed=3)
    for key, value in dict(do_sample=True, temperature=3.0, top_k=2, repetition_penalty=9.0, min_new_tokens=3).items():
        setattr(model.generation_config, key, value)
    assert ask(model, PROMPTS) == wanted
    assert ask(model, PROMPTS, temperature=1.0, seed=3) == sampled


def test_the_seed_decides_what_is_sampled_and_leaves_no_trace():
    model = lively()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    answers = [ask(model, PROMPTS, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_cold_is_greedy_and_hot_is_not():
    model = lively()
    wanted = ask(model, PROMPTS)
    assert ask(model, PROMPTS, temperature=0.0, seed=9) == wanted
    assert ask(model, PROMPTS, temperature=1e-6, seed=9) == wanted
    assert ask(model, PROMPTS, temperature=5.0, seed=9) != wanted
    assert ask(model, PROMPTS, temperature=5.0, top_p=1e-6, seed=9) == wanted  # only the likeliest is left


def test_temperature_shapes_the_frequencies():
    """Shares of the next token against softmax(logits / T), over 600 seeds."""
    model = llama()
    prompt = PROMPTS[0]
    for temperature in (0.5, 2.0):
        shares = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature, -1)
        rows = generate(model, [prompt] * 600, end_ids=(), pad_id=0, max_new_tokens=1, temperature=temperature, seed=1)
        likeliest = int(shares.argmax())
        seen = sum(row == [likeliest] for row in rows) / 600
        spread = (shares[likeliest] * (1 - shares[likeliest]) / 600) ** 0.5
        assert abs(seen - shares[likeliest]) < 4 * spread + 0.002


def test_each_token_is_handed_on_and_a_true_answer_stops():
    model = lively()
    whole = ask(model, [PROMPTS[1]])[0]
    seen: list[int] = []
    assert ask(model, [PROMPTS[1]], on_token=lambda index: seen.append(index)) == [whole]
    assert seen == whole
    seen.clear()

    def stop(index: int) -> bool:
        seen.append(index)
        return len(seen) == 5

    assert ask(model, [PROMPTS[1]], on_token=stop) == [whole[:5]]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ModelError, match="empty prompt"):
        ask(llama(), [[3], []])
