"""Test Cox regression and the C-index against loops, a library, and data simulated with known coefficients."""

import numpy as np
import pytest

from tools.evaluation.survival import (
    c_index,
    choose_penalty,
    compute_log_rank,
    fit_cox,
    kaplan_meier,
    log_partial_likelihood,
    split_by_risk,
)


def simulate(n, beta, seed=0, censored=0.3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, len(beta)))
    death = rng.exponential(1 / (0.1 * np.exp(x @ beta)))
    end = rng.exponential(np.quantile(death, 1 - censored), size=n) + 0.5
    return x, np.minimum(death, end), (death <= end).astype(float)


def literal_likelihood(risk, time, event):
    total = 0.0
    for i in np.flatnonzero(event):
        total += risk[i] - np.log(np.exp(risk[time >= time[i]]).sum())
    return total / event.sum()


def test_likelihood_with_ties_equals_a_loop():
    x, time, event = simulate(60, np.array([0.5, -0.3]))
    time = np.ceil(time)
    risk = x @ np.array([0.4, 0.1])
    assert log_partial_likelihood(risk, time, event) == pytest.approx(literal_likelihood(risk, time, event))


@pytest.mark.parametrize("ties", [False, True])
def test_unpenalised_coefficients_equal_the_librarys(ties):
    from statsmodels.duration.hazard_regression import PHReg

    x, time, event = simulate(150, np.array([0.8, -0.5, 0.0]), seed=1)
    time = np.ceil(3 * time) if ties else time
    wanted = PHReg(time, x, status=event, ties="breslow").fit().params
    np.testing.assert_allclose(fit_cox(x, time, event, 0.0), wanted, rtol=1e-4, atol=1e-5)


def test_known_coefficients_are_recovered_and_shrunk_by_a_penalty():
    beta = np.array([1.0, -0.7, 0.0, 0.3])
    x, time, event = simulate(4000, beta, seed=2)
    np.testing.assert_allclose(fit_cox(x, time, event, 0.0), beta, atol=0.08)
    small, large = (np.linalg.norm(fit_cox(x, time, event, penalty)) for penalty in (0.01, 1.0))
    assert small > 1.5 * large > 0

    # The result is a maximum: the penalised likelihood falls in every direction.
    found, rng = fit_cox(x, time, event, 0.1), np.random.default_rng(0)

    def value(b):
        return log_partial_likelihood(x @ b, time, event) - 0.05 * b @ b

    for _ in range(5):
        assert value(found + 1e-2 * rng.normal(size=4)) < value(found)


def test_noise_selects_the_larger_penalty():
    x, time, event = simulate(120, np.zeros(30), seed=3)
    y, later, seen = simulate(120, np.array([1.5, -1.5]), seed=3)
    assert choose_penalty(x, time, event, 3, 0) > 10 * choose_penalty(y, later, seen, 3, 0)


def test_c_index_equals_a_loop():
    x, time, event = simulate(70, np.array([0.7]), seed=4)
    time, risk = np.ceil(time), np.round(x[:, 0], 1)
    won = known = 0.0
    for i in range(70):
        for j in range(70):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                known += 1
                won += 1 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0
    truth = np.stack([time, event], axis=1)
    weights = np.ones((70, 1), dtype=int)
    assert c_index(truth, risk, weights)[0] == pytest.approx(won / known)
    assert c_index(truth, -time, weights)[0] > 0.95 and c_index(truth, np.zeros(70), weights)[0] == 0.5
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 3, (70, 2))
    for column in range(2):
        rows = np.repeat(np.arange(70), weights[:, column])
        wanted = c_index(truth[rows], risk[rows], np.ones((len(rows), 1), dtype=int))[0]
        assert c_index(truth, risk, weights)[column] == pytest.approx(wanted, rel=1e-5)
    assert np.isnan(c_index(np.array([[1.0, 0], [2, 0]]), np.zeros(2), np.ones((2, 1), dtype=int))[0])


def test_c_index_of_simulated_hazards_equals_the_closed_form():
    """Of two exponential survival times with rates a and b, the first is shorter with probability a / (a + b)."""
    x, _time, event = simulate(3000, np.array([1.0]), seed=5, censored=0.0)
    event[:] = 1
    rng = np.random.default_rng(1)
    pairs = np.abs(rng.choice(x[:, 0], 20000) - rng.choice(x[:, 0], 20000))
    truth = np.stack([rng.exponential(1 / np.exp(x[:, 0])), event], axis=1)
    found = c_index(truth, x[:, 0], np.ones((3000, 1), dtype=int))[0]
    assert found == pytest.approx((1 / (1 + np.exp(-pairs))).mean(), abs=0.01)


def test_curves_by_predicted_risk():
    times, share = kaplan_meier(np.array([1.0, 2, 3, 4]), np.array([1.0, 0, 1, 1]))
    np.testing.assert_allclose(times, [0, 1, 3, 4])
    np.testing.assert_allclose(share, [1, 0.75, 0.375, 0])
    x, time, event = simulate(300, np.array([1.2]), seed=6)
    group = split_by_risk(x[:, 0])
    assert np.bincount(group).tolist() == [100, 100, 100]
    assert (
        compute_log_rank(time, event, group)
        < 1e-6
        < compute_log_rank(time, event, np.random.default_rng(0).permutation(group))
    )
