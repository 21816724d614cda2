"""Survival analysis: Cox regression with a ridge penalty, C-index, and Kaplan-Meier curves by predicted risk."""

import numpy as np

PENALTIES = tuple(np.logspace(-3, 2, 11))  # ridge penalties, relative to the mean log partial likelihood
STEPS, TOLERANCE = 50, 1e-7


def log_partial_likelihood(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> float:
    """Return Breslow's log partial likelihood, averaged over events; risk (n,) is the linear predictor."""
    order = np.argsort(-time, kind="stable")
    risk, time, event = risk[order], time[order], event[order]
    at_risk = np.logaddexp.accumulate(risk)[_find_last_ties(time)]  # log of the sum of exp(risk) over the risk set
    return float(((risk - at_risk) * event).sum() / max(1, event.sum()))


def _find_last_ties(time: np.ndarray) -> np.ndarray:
    """Return the index of the last equal time for each time; times are sorted in descending order."""
    return np.searchsorted(-time, -time, side="right") - 1


def fit_cox(features: np.ndarray, time: np.ndarray, event: np.ndarray, penalty: float) -> np.ndarray:
    """Fit a Cox regression: maximise the mean log partial likelihood (Breslow) minus penalty / 2 |beta|^2.

    The fit uses Newton's method with step halving.

    Args:
        features: (n, d), centred and scaled by the caller.
        time: (n,) follow-up times.
        event: (n,), 1 if the event was observed, else 0.
        penalty: strength of the ridge penalty; 0 turns it off.

    Returns:
        Coefficients, (d,).
    """
    if features.shape[1] > len(features) and penalty > 0:  # the coefficients lie in the row space of the features
        basis, rows = np.linalg.qr(features.T)  # (d, n), (n, n)
        return basis @ fit_cox(rows.T, time, event, penalty)
    order = np.argsort(-time, kind="stable")
    x, event = features[order].astype(np.float64), event[order].astype(np.float64)
    last = _find_last_ties(time[order])
    events = max(1.0, event.sum())
    # With descending times, every risk set is a prefix of the subjects, so sums over risk sets are cumulative sums.
    # A subject is in the risk sets of all events up to its own time, so sums over these events are cumulative sums too.
    beta = np.zeros(x.shape[1])

    def evaluate_objective(beta: np.ndarray) -> float:
        risk = x @ beta
        at_risk = np.logaddexp.accumulate(risk)[last]
        return float(((risk - at_risk) * event).sum() / events - 0.5 * penalty * beta @ beta)

    current = evaluate_objective(beta)
    for _ in range(STEPS):
        risk = x @ beta
        weight = np.exp(risk - risk.max())
        total = np.cumsum(weight)[last]  # (n,) sum of the weights over the risk set of each subject
        means = np.cumsum(weight[:, None] * x, axis=0)[last] / total[:, None]  # (n, d)
        per_event = np.zeros(len(x))
        np.add.at(per_event, last, event / total)
        share = weight * np.cumsum(per_event[::-1])[::-1]  # (n,) summed weight of each subject over all risk sets
        gradient = (event[:, None] * (x - means)).sum(0) / events - penalty * beta
        hessian = (x.T * share) @ x - (means.T * event) @ means
        hessian = hessian / events + (penalty + 1e-9) * np.eye(len(beta))
        step = np.linalg.solve(hessian, gradient)
        scale = 1.0
        while scale > 1e-6 and evaluate_objective(beta + scale * step) < current:
            scale /= 2
        beta = beta + scale * step
        before, current = current, evaluate_objective(beta)
        if abs(current - before) < TOLERANCE:
            break
    return beta


def choose_penalty(features: np.ndarray, time: np.ndarray, event: np.ndarray, folds: int, seed: int) -> float:
    """Choose the penalty with the highest cross-validated partial likelihood (Verweij and van Houwelingen, 1993)."""
    rng = np.random.default_rng(seed)
    fold = np.empty(len(time), dtype=int)
    for rows in (np.flatnonzero(event == 1), np.flatnonzero(event == 0)):  # spread the events over all folds
        fold[rng.permutation(rows)] = np.arange(len(rows)) % folds
    scores = []
    for penalty in PENALTIES:
        total = 0.0
        for number in range(folds):
            rest = fold != number
            beta = fit_cox(features[rest], time[rest], event[rest], penalty)
            whole = log_partial_likelihood(features @ beta, time, event) * event.sum()
            total += whole - log_partial_likelihood(features[rest] @ beta, time[rest], event[rest]) * event[rest].sum()
        scores.append(total)
    return PENALTIES[int(np.argmax(scores))]


def c_index(truth: np.ndarray, risk: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return Harrell's C-index: among comparable pairs, the share in which the earlier event had the higher risk.

    A pair with equal risks counts as one half. A pair is comparable if it is known which subject had the event first.

    Args:
        truth: (n, 2) time and event.
        risk: (n,) predicted risk.
        weights: (n, b), how often each subject occurs in each resample.

    Returns:
        (b,), NaN if a resample has no comparable pair.
    """
    time, event = truth[:, 0], truth[:, 1]
    weights = weights.astype(np.float32)
    won, known = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    for rows in np.array_split(np.flatnonzero(event == 1), max(1, len(time) // 1000)):
        later = (time[rows, None] < time) | ((time[rows, None] == time) & (event == 0))  # (r, n)
        higher = (risk[rows, None] > risk) + 0.5 * (risk[rows, None] == risk)
        own = weights[rows]
        known += (own * (later.astype(np.float32) @ weights)).sum(0)
        won += (own * ((later * higher).astype(np.float32) @ weights)).sum(0)
    return np.divide(won, known, out=np.full(len(won), np.nan), where=known > 0)


def kaplan_meier(time: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return event times and the share of subjects that survive past each event time, computed by statsmodels."""
    from statsmodels.duration.survfunc import SurvfuncRight

    curve = SurvfuncRight(time, event)
    return np.concatenate([[0.0], curve.surv_times]), np.concatenate([[1.0], curve.surv_prob])


def compute_log_rank(time: np.ndarray, event: np.ndarray, group: np.ndarray) -> float:
    """Return the p-value of the log-rank test of equal survival in all groups, computed by statsmodels."""
    from statsmodels.duration.survfunc import survdiff

    return float(survdiff(time, event, group)[1])


def split_by_risk(risk: np.ndarray, number: int = 3) -> np.ndarray:
    """Split subjects into groups of equal size by risk; the result (n,) is 0 for the lowest risk."""
    return np.searchsorted(np.quantile(risk, np.arange(1, number) / number), risk, side="right")
