"""The probability of being safe: monotone, the posterior where that is, and found again where it was planted."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from hf_robust_clip import mixture
from hf_robust_clip.mixture import SimilarityMixture, fit_similarity_mixture

GRID = np.linspace(-1, 1, 20_001)


@st.composite
def mixtures(draw: st.DrawFn) -> SimilarityMixture:
    means = sorted(draw(st.tuples(st.floats(-0.9, 0.9), st.floats(-0.9, 0.9))))
    deviations = draw(st.tuples(st.floats(1e-4, 0.5), st.floats(1e-4, 0.5)))
    share = draw(st.floats(1e-4, 1 - 1e-4))
    return SimilarityMixture(np.array(means), np.square(deviations), np.array([share, 1 - share]))


def planted(
    size: int, risky: tuple[float, float, float], safe: tuple[float, float], seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Similarities from `(share, mean, deviation)` risky and `(mean, deviation)` safe pairs, and which are safe."""
    generator = np.random.default_rng(seed)
    is_safe = generator.random(size) >= risky[0]
    values = np.where(is_safe, generator.normal(*safe, size), generator.normal(*risky[1:], size))
    return values.clip(-1, 1), is_safe


def parabola(fitted: SimilarityMixture) -> tuple[float, float]:
    """`(offset, curve)`, where the log-odds of being safe have the derivative `curve * x - offset`."""
    (risky_mean, safe_mean), (risky_variance, safe_variance) = fitted.means, fitted.variances
    return risky_mean / risky_variance - safe_mean / safe_variance, 1 / risky_variance - 1 / safe_variance


def posterior(fitted: SimilarityMixture, x: np.ndarray) -> np.ndarray:
    """By Bayes' rule, as it stands."""
    risky, safe = fitted.density(x)
    with np.errstate(invalid="ignore"):
        return safe / (risky + safe)


@given(mixtures())
@settings(deadline=None)
def test_probability_is_one_and_never_falls(fitted: SimilarityMixture):
    offset, curve = parabola(fitted)
    vertex = np.clip(offset / curve if curve else 0.0, -1, 1)
    near = vertex + np.arange(-500, 500) * 1e-16  # where rounding could show
    x = np.sort(np.concatenate([GRID, near.clip(-1, 1)]))
    probability = fitted.probability(x)
    assert probability.dtype == np.float64 and probability.shape == x.shape
    assert (probability >= 0).all() and (probability <= 1).all()
    assert (np.diff(probability) >= 0).all()


@given(mixtures())
@settings(deadline=None)
def test_probability_is_the_posterior_where_that_rises_and_level_elsewhere(fitted: SimilarityMixture):
    raw, probability = posterior(fitted, GRID), fitted.probability(GRID)
    # Where one density underflows there is nothing to compare with.
    known = np.isfinite(raw) & (fitted.density(GRID).min(axis=0) > 1e-290)
    offset, curve = parabola(fitted)
    rises = curve * GRID - offset > 0
    np.testing.assert_allclose(probability[known & rises], raw[known & rises], rtol=1e-6)
    falls = np.flatnonzero(~rises)
    if len(falls):
        assert np.ptp(probability[falls]) == 0


def test_a_narrow_safe_component_does_not_make_the_most_similar_pairs_risky():
    fitted = SimilarityMixture(np.array([0.1, 0.3]), np.array([0.2, 0.05]) ** 2, np.array([0.5, 0.5]))
    raw, probability = posterior(fitted, GRID), fitted.probability(GRID)
    assert raw[-1] < 0.01 < 0.8 < raw.max()
    assert probability[-1] == probability.max() == pytest.approx(raw.max(), abs=1e-6)
    assert probability[0] == pytest.approx(raw[0], rel=1e-9)


def test_a_wide_safe_component_does_not_make_the_least_similar_pairs_safe():
    fitted = SimilarityMixture(np.array([0.1, 0.3]), np.array([0.05, 0.2]) ** 2, np.array([0.5, 0.5]))
    raw, probability = posterior(fitted, GRID), fitted.probability(GRID)
    assert raw[0] > 0.99
    assert probability[0] == probability.min() == pytest.approx(raw.min(), abs=1e-6)
    assert probability[-1] == pytest.approx(raw[-1], rel=1e-9)


def test_equal_variances_give_the_logistic_curve():
    fitted = SimilarityMixture(np.array([0.1, 0.3]), np.array([0.01, 0.01]), np.array([0.25, 0.75]))
    expected = 1 / (1 + np.exp(-(np.log(3) + 20 * (GRID - 0.2))))
    np.testing.assert_allclose(fitted.probability(GRID), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("risky", "safe"),
    [
        ((0.3, 0.1, 0.05), (0.3, 0.05)),
        ((0.5, 0.1, 0.02), (0.3, 0.12)),  # the safe component is the wider one
        ((0.03, 0.05, 0.05), (0.3, 0.06)),  # few poisons: with a loose tolerance they are not found
        ((0.95, 0.05, 0.05), (0.3, 0.03)),  # few safe pairs
    ],
)
def test_planted_components_are_found(risky: tuple[float, float, float], safe: tuple[float, float]):
    similarities, is_safe = planted(20_000, risky, safe)
    fitted = SimilarityMixture.fit(similarities)
    np.testing.assert_allclose(fitted.means, [risky[1], safe[0]], atol=0.01)
    np.testing.assert_allclose(np.sqrt(fitted.variances), [risky[2], safe[1]], atol=0.01)
    np.testing.assert_allclose(fitted.weights, [risky[0], 1 - risky[0]], atol=0.015)
    # Calibrated where the paper draws its first line.
    probability = fitted.probability(similarities)
    chosen = probability >= 0.9
    assert is_safe[chosen].mean() == pytest.approx(probability[chosen].mean(), abs=0.01)


def test_the_public_function_is_fit_and_probability():
    similarities, _ = planted(500, (0.3, 0.1, 0.05), (0.3, 0.05))
    expected = SimilarityMixture.fit(similarities, seed=3).probability(similarities)
    np.testing.assert_array_equal(fit_similarity_mixture(similarities, seed=3), expected)
    np.testing.assert_array_equal(fit_similarity_mixture(similarities, seed=3), expected)


@pytest.mark.parametrize("limit", [1_000_000, 200])
def test_the_order_of_the_pairs_does_not_matter(limit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mixture, "MAX_FITTED", limit)
    similarities, _ = planted(600, (0.3, 0.1, 0.1), (0.3, 0.05))
    similarities[::7] = similarities[0]
    expected = fit_similarity_mixture(similarities)
    assert np.ptp(expected[::7]) == 0
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(similarities))
        np.testing.assert_allclose(fit_similarity_mixture(similarities[order]), expected[order], rtol=0, atol=1e-12)


def test_a_fit_to_a_part_is_close_to_one_to_all(monkeypatch: pytest.MonkeyPatch):
    similarities, _ = planted(40_000, (0.3, 0.1, 0.05), (0.3, 0.05))
    full = SimilarityMixture.fit(similarities)
    monkeypatch.setattr(mixture, "MAX_FITTED", 10_000)
    part, other = SimilarityMixture.fit(similarities), SimilarityMixture.fit(similarities, seed=1)
    assert (np.abs(part.means - other.means) > 1e-5).all()
    np.testing.assert_allclose(part.means, full.means, atol=0.005)
    assert np.abs(part.probability(similarities) - full.probability(similarities)).max() < 0.05
    np.testing.assert_array_equal(SimilarityMixture.fit(similarities).means, part.means)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    fitted = SimilarityMixture(np.array([0.1, 0.3]), np.array([0.04, 0.01]), np.array([0.5, 0.5]))
    expected = fitted.probability(GRID)
    monkeypatch.setattr(mixture, "_CHUNK", 1_013)
    np.testing.assert_array_equal(fitted.probability(GRID), expected)


def test_neither_the_fit_nor_the_probability_touches_the_global_generator_or_its_input():
    similarities, _ = planted(300, (0.3, 0.1, 0.05), (0.3, 0.05))
    before, state = similarities.copy(), np.random.get_state()[1].copy()
    fit_similarity_mixture(similarities)
    np.testing.assert_array_equal(similarities, before)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_probabilities_rank_as_similarities_do():
    # Between the peaks and without saturation the probability rises strictly.
    similarities, is_safe = planted(5_000, (0.5, 0.1, 0.1), (0.25, 0.1))
    fitted = SimilarityMixture(np.array([0.1, 0.25]), np.array([0.01, 0.01]), np.array([0.5, 0.5]))
    expected = roc_auc_score(is_safe, similarities)
    assert roc_auc_score(is_safe, fitted.probability(similarities)) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=60))
@settings(deadline=None, max_examples=50)
@pytest.mark.filterwarnings("ignore:all")
def test_ranking_by_probability_then_similarity_is_ranking_by_similarity(values: list[float]):
    similarities = np.array(values)
    probability = fit_similarity_mixture(similarities)
    assert np.isfinite(probability).all()
    order = np.lexsort((similarities, probability))
    np.testing.assert_array_equal(similarities[order], np.sort(similarities))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_float_will_do(dtype: type):
    similarities = planted(400, (0.3, 0.1, 0.05), (0.3, 0.05))[0].astype(dtype)
    expected = fit_similarity_mixture(similarities.astype(np.float64))
    probability = fit_similarity_mixture(similarities)
    assert probability.dtype == np.float64
    np.testing.assert_allclose(probability, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fit_similarity_mixture(similarities.tolist()), expected, rtol=0, atol=1e-12)


def test_a_torch_tensor_will_do():
    torch = pytest.importorskip("torch")
    similarities = planted(400, (0.3, 0.1, 0.05), (0.3, 0.05))[0].astype(np.float32)
    expected = fit_similarity_mixture(similarities)
    np.testing.assert_array_equal(fit_similarity_mixture(torch.from_numpy(similarities)), expected)


@pytest.mark.parametrize("similarities", [[0.25] * 5, [1.0, 1.0], [0.25, 0.25 + 1e-8, 0.25 - 1e-8]])
def test_equal_similarities_are_neither_safe_nor_risky_and_say_so(similarities: list[float]):
    with pytest.warns(UserWarning, match=r"similarities are .* every probability of being safe is 0\.5"):
        fitted = SimilarityMixture.fit(similarities)
    assert (fitted.probability(similarities) == 0.5).all()
    assert (fitted.probability(GRID) == 0.5).all()
    assert np.isfinite(fitted.density(GRID)).all()


def test_two_distinct_similarities_are_two_components():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probability = fit_similarity_mixture([0.1, 0.4])
    assert probability[0] < 1e-6 and probability[1] > 1 - 1e-6


def test_the_densities_of_the_components_sum_to_that_of_the_mixture():
    fitted = SimilarityMixture(np.array([0.1, 0.3]), np.array([0.04, 0.01]), np.array([0.3, 0.7]))
    x = np.linspace(-3, 3, 10_001)
    assert fitted.density(x).shape == (2, len(x))
    np.testing.assert_allclose(fitted.density(x).sum(axis=1) * (x[1] - x[0]), fitted.weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("similarities", "message"),
    [
        ([], r"similarities has 0 value\(s\); a mixture of two needs at least 2"),
        ([0.5], r"similarities has 1 value\(s\)"),
        ([[0.1, 0.2]], r"similarities must be numbers of shape \(N,\), but has shape \(1, 2\)"),
        (0.5, r"shape \(\)"),
        ([True, False], "type bool"),
        (["0.1", "0.2"], "type <U3"),
        ([0.1, float("nan"), 0.2, float("nan")], r"similarities\[1\] is nan, the first of 2"),
        ([0.1, 0.2, float("-inf")], r"similarities\[2\] is -inf"),
        ([0.1, 0.2, 1.01], r"in \[-1, 1\], but similarities\[2\] is 1\.01"),
        ([-20, 1], r"similarities\[0\] is -20"),
    ],
)
def test_other_input_is_refused(similarities: object, message: str):
    with pytest.raises(ValueError, match=message):
        fit_similarity_mixture(similarities)


def test_rounding_beyond_one_is_accepted():
    assert len(fit_similarity_mixture(np.array([1.0009, 0.2, -1.0009]))) == 3


@pytest.mark.parametrize(
    ("means", "variances", "weights", "message"),
    [
        ([0.3, 0.1], [1, 1], [0.5, 0.5], r"means must have the larger one, .* last"),
        ([0.1, 0.2, 0.3], [1, 1], [0.5, 0.5], "means must be two finite numbers"),
        ([0.1, 0.3], [1, 0], [0.5, 0.5], "variances must be two finite and positive"),
        ([0.1, 0.3], [1, float("nan")], [0.5, 0.5], "variances must be two finite and positive"),
        ([0.1, 0.3], [1, 1], [0.5, 0.6], "weights must sum to 1"),
        ([0.1, 0.3], [1, 1], [1.0, 0.0], "weights must be two finite and positive"),
    ],
)
def test_what_is_no_mixture_is_refused(means: list, variances: list, weights: list, message: str):
    with pytest.raises(ValueError, match=message):
        SimilarityMixture(np.array(means), np.array(variances), np.array(weights))
