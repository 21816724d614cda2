"""Statistics of a training step that the queue cannot flatter. Monitoring only: no gradient depends on them."""

import torch

STATISTICS = ("accuracy_fresh", "alignment", "uniformity", "queue_own", "queue_age")


@torch.no_grad()
def observe(
    query: torch.Tensor,
    keys: torch.Tensor,
    own: torch.Tensor,
    subjects: torch.Tensor | None,
    queue_subject: torch.Tensor,
    queue_age: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The statistics of one step, each () on the device.

    Args:
        query: (B, dim), normalised.
        keys: (world * B, dim), the step's, normalised.
        own: (B,) row of each query's key in ``keys``.
        subjects: (B,) of the queries, or None.
        queue_subject, queue_age: (K,) of the location's queue, -1 where unknown.

    Returns:
        accuracy_fresh: % of queries whose own key is the nearest of this step's keys, which are all equally old.
        alignment: mean squared distance of query and key.
        uniformity: log of the mean Gaussian potential of pairs of keys (Wang and Isola, 2020).
        queue_own: % of the location's queue that is keys of the query's own subject.
        queue_age: mean age of the location's keys whose age is known, in steps.
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
        "accuracy_fresh": 100 * (nearest == own).float().mean(),
        "alignment": (query - keys[own]).square().sum(dim=1).mean(),
        "uniformity": pairs.log(),
        "queue_own": shared,
        "queue_age": age.float(),
    }


def effective_rank(representations: torch.Tensor) -> float:
    """How many directions representations (n, rep_dim) spread over: exp of the entropy of their variances.

    After Roy and Vetterli (2007), of the covariance; 1 where they lie on a line, at most n - 1.
    """
    centred = representations.detach().float().cpu()
    if not torch.isfinite(centred).all():
        return float("nan")  # which no decomposition takes; the loss tells
    centred = centred - centred.mean(dim=0)
    variances = torch.linalg.svdvals(centred).square()
    share = variances / variances.sum().clamp(min=1e-30)
    return float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum()))
