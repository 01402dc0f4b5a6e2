"""Figures against scikit-learn and SciPy, which count in other ways than we do."""

import math
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, permutation_test
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn import metrics as sklearn

from afina.evaluate import metrics
from afina.evaluate.metrics import FEW, bootstrap, mcnemar, per_label, shares, sign_flips, wilson

LABELS = ["negativa", "neutra", "positiva", "no sé"]
answers = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=60)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, "", "otra"])), min_size=1, max_size=60))
def test_answers_that_are_no_label_are_wrong_as_in_scikit_learn(pairs):
    """scikit-learn leaves out of recall nothing that was expected, and gives no label the credit."""
    expected, answered = [truth for truth, _ in pairs], [answer for _, answer in pairs]
    ours = per_label(expected, answered, LABELS)
    wanted = sklearn.precision_recall_fscore_support(expected, answered, labels=LABELS, zero_division=0)
    for number, label in enumerate(LABELS):
        found = ours["per_label"][label]
        assert [found[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(
            [part[number] for part in wanted]
        )
    assert sum(map(sum, ours["confusion"])) + sum(ours["other"]) == len(pairs)


@settings(deadline=None)
@given(answers)
def test_figures_of_each_label_are_scikit_learns(pairs):
    expected, answered = [truth for truth, _ in pairs], [answer for _, answer in pairs]
    ours = per_label(expected, answered, LABELS)
    precision, recall, f1, support = sklearn.precision_recall_fscore_support(
        expected, answered, labels=LABELS, zero_division=0
    )
    for number, label in enumerate(LABELS):
        figures = ours["per_label"][label]
        assert figures["precision"] == pytest.approx(precision[number])
        assert figures["recall"] == pytest.approx(recall[number])
        assert figures["f1"] == pytest.approx(f1[number])
        assert figures["support"] == support[number]
    for average in ("macro", "weighted"):
        whole = sklearn.precision_recall_fscore_support(
            expected, answered, labels=LABELS, average=average, zero_division=0
        )
        for name, wanted in zip(("precision", "recall", "f1"), whole, strict=False):
            assert ours[f"{name}_{average}"] == pytest.approx(wanted)
    assert ours["confusion"] == sklearn.confusion_matrix(expected, answered, labels=LABELS).tolist()
    accuracy = shares([truth == answer for truth, answer in pairs])
    assert accuracy["accuracy"] == pytest.approx(sklearn.accuracy_score(expected, answered))


@settings(deadline=None)
@given(st.integers(1, 400).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_is_the_roots_of_its_equation(counts):
    """The interval's ends are where the share p has |p - observed| = z * sqrt(p (1 - p) / n): a quadratic in p."""
    correct, total = counts
    low, high = wilson(correct, total)
    share, z2 = correct / total, 1.959963984540054**2
    a, b, c = 1 + z2 / total, -(2 * share + z2 / total), share**2
    reach = math.sqrt(max(0.0, b * b - 4 * a * c))
    assert low == pytest.approx(max(0.0, (-b - reach) / (2 * a)), abs=1e-12)
    assert high == pytest.approx(min(1.0, (-b + reach) / (2 * a)), abs=1e-12)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1


def test_wilson_at_the_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611252), abs=1e-6)
    assert wilson(20, 20) == pytest.approx((0.8388748, 1.0), abs=1e-6)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-4)  # Newcombe (1998), table I


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_exact_binomial_test(fixed, broken):
    exact = 1.0 if fixed + broken == 0 else binomtest(fixed, fixed + broken, 0.5).pvalue
    assert mcnemar(fixed, broken) == pytest.approx(exact, rel=1e-9)
    assert mcnemar(fixed, broken) == mcnemar(broken, fixed)


@pytest.mark.parametrize("fixed, broken", [(0, 0), (1, 0), (3, 2), (7, 1), (5, 5)])
def test_mcnemar_counts_the_ways(fixed, broken):
    """Brute force: of all ways the disagreements could have fallen, those at least as uneven."""
    total = fixed + broken
    ways = uneven = 0
    for size in range(total + 1):
        for _chosen in combinations(range(total), size):
            ways += 1
            uneven += abs(2 * size - total) >= abs(fixed - broken)
    assert mcnemar(fixed, broken) == pytest.approx(uneven / ways)


def test_mcnemar_of_many_does_not_overflow():
    assert mcnemar(3000, 3000) == 1.0
    assert 0 < mcnemar(3100, 2900) < 0.02
    assert mcnemar(6000, 0) == 0.0  # less than the smallest float


def test_nothing_asked_is_nothing_right():
    assert shares([]) == {"correct": 0, "accuracy": 0.0, "interval": [0.0, 1.0]}


@pytest.mark.parametrize("seed", range(4))
def test_the_bootstrap_is_scipys_to_the_noise_of_its_draws(seed):
    values = np.random.default_rng(seed).beta(2, 1, 60)
    wanted = scipy_bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=seed).confidence_interval
    assert bootstrap(list(values)) == pytest.approx(tuple(wanted), abs=0.006)


@settings(deadline=None)
@given(st.lists(st.sampled_from([1.0, 2.0, 4.5, 5.0]), min_size=1, max_size=30))
def test_no_interval_is_a_point(values):
    """A single sample, and any number that are all the same, had one of zero width."""
    low, high = bootstrap(values, (1, 5))
    assert 1 <= low < high <= 5 and low <= np.mean(values) <= high
    unbounded = bootstrap(values, None)
    if len(values) < FEW or len(set(values)) == 1:
        assert unbounded is None
        assert (np.array([low, high]) - 1) / 4 == pytest.approx(wilson(sum(values) / 4 - len(values) / 4, len(values)))
    else:
        assert unbounded == [low, high]


def test_nothing_spreads_nowhere():
    assert bootstrap([]) is None
    assert bootstrap([1.0]) == list(wilson(1, 1)) and bootstrap([0.3], None) is None


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 20])
def test_intervals_hold_what_they_promise(count):
    """By trial: of few values resampling held the truth half of the time. Never certain, so at least 80% of 300."""
    dice = np.random.default_rng(count)
    drawn = [dice.choice(5, count, p=[0.05, 0.05, 0.1, 0.3, 0.5]) + 1 for _turn in range(300)]
    held = [low <= 4.15 <= high for low, high in (bootstrap(list(map(float, one)), (1, 5)) for one in drawn)]
    assert np.mean(held) > 0.8


def test_a_bootstrap_drawn_in_parts_is_the_same(monkeypatch):
    values = list(np.random.default_rng(5).beta(2, 1, 61))
    whole = bootstrap(values)
    for at_once in (1, 61 * 7, 61 * 1999):
        monkeypatch.setattr(metrics, "AT_ONCE", at_once)
        assert bootstrap(values) == whole


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=9))
def test_sign_flips_are_the_exact_permutation_test_to_the_noise_of_their_draws(pairs):
    before, after = [one for one, _ in pairs], [two for _, two in pairs]
    gaps = np.array(after) - np.array(before)
    exact = permutation_test((gaps,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flips(before, after) == pytest.approx(min(1.0, exact), abs=0.03)


def test_signs_of_many_samples_are_drawn_in_parts(monkeypatch):
    before = np.random.default_rng(1).normal(size=5000)
    after = before + np.random.default_rng(2).normal(size=5000) + 0.02
    tracemalloc.start()
    found = sign_flips(before, after)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e8  # all together 8e8, of 50,000 samples ten times that
    monkeypatch.setattr(metrics, "AT_ONCE", 12_345)
    assert sign_flips(before, after) == found


def test_equal_scores_differ_by_nothing_but_chance():
    assert sign_flips([0.3, 0.7, 0.1], [0.3, 0.7, 0.1]) == 1.0
