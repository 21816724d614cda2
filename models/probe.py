"""Statistics that monitor a training step, computed without gradients.

accuracy_fresh, alignment and uniformity use only the current step's keys, so old keys in the queue do not affect them.
"""

import torch

STATISTICS = ("accuracy_fresh", "alignment", "uniformity", "queue_own", "queue_age")


@torch.no_grad()
def compute_step_statistics(
    query: torch.Tensor,
    keys: torch.Tensor,
    own_key_rows: torch.Tensor,
    subjects: torch.Tensor | None,
    queue_subject: torch.Tensor,
    queue_age: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Compute the statistics of one step, each as a tensor of shape () on the device.

    Args:
        query: (B, dim), normalised.
        keys: (world * B, dim), the keys of this step, normalised.
        own_key_rows: (B,) row of each query's own key in ``keys``.
        subjects: (B,) subjects of the queries, or None.
        queue_subject, queue_age: (K,) subject and age of each key in the location's queue; -1 if unknown.

    Returns:
        accuracy_fresh: % of queries for which the nearest of this step's keys is their own key. Unlike the keys in the
            queue, all keys of a step have the same age.
        alignment: mean squared distance between query and key.
        uniformity: log of the mean Gaussian potential over pairs of keys (Wang and Isola, 2020).
        queue_own: % of keys in the location's queue that belong to the query's own subject, averaged over queries.
        queue_age: mean age, in steps, of the keys of known age in the location's queue.
    """
    total = keys.shape[0]
    nearest = (query @ keys.t()).argmax(dim=1)  # (B,)
    squared = 2 - 2 * (keys @ keys.t())  # (total, total)
    potential = torch.exp(-2 * squared)  # (total, total)
    pairs = (potential.sum() - potential.diagonal().sum()) / max(1, total * (total - 1))  # ()
    known = queue_age >= 0  # (K,)
    age = (queue_age * known).sum() / known.sum().clamp(min=1)  # ()
    shared = query.new_zeros(())
    if subjects is not None:
        shared = 100 * (queue_subject == subjects[:, None]).float().mean()  # (B, K) -> ()
    return {
        "accuracy_fresh": 100 * (nearest == own_key_rows).float().mean(),
        "alignment": (query - keys[own_key_rows]).square().sum(dim=1).mean(),
        "uniformity": pairs.log(),
        "queue_own": shared,
        "queue_age": age.float(),
    }


def effective_rank(representations: torch.Tensor) -> float:
    """Return the effective number of dimensions of representations (n, rep_dim).

    The result is the effective rank of Roy and Vetterli (2007), computed from the covariance: the exponential of the
    entropy of the normalised variances along the principal axes. The effective rank is 1 if all points lie on a line,
    and at most n - 1 for n points.
    """
    centred = representations.detach().float().cpu()
    if not torch.isfinite(centred).all():
        return float("nan")  # an SVD would fail on NaN or infinity; the check of the loss reports such values
    centred = centred - centred.mean(dim=0)
    variances = torch.linalg.svdvals(centred).square()
    share = variances / variances.sum().clamp(min=1e-30)
    return float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum()))
