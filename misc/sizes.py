"""Numbers and names that the data, the model and the flags must agree on."""

from misc.command import UserError

PATCH_SIZE = 32  # voxels of 1 mm; the encoder's five halvings take it to 1
HU_MIN, HU_MAX = -1024, 240  # Hounsfield units; what patches are clipped to
PUBLISHED_GROUPS = 4  # GPUs of the publication, each with BatchNorm statistics of its own
SMALLEST_GROUP = 2  # samples; one has no variance
OPTIMIZERS = ("sgd", "adamw")


def bn_groups(given: int | None, batch_size: int, ranks: int) -> int:
    """Groups of consecutive samples, each with its own BatchNorm statistics, that the global batch is dealt to.

    A rank holds whole groups, so that 1, 2 or 4 ranks compute the same run.

    Args:
        given: what the user asked for; None takes 4, or the ranks where these are more, or the largest number
            below that fits.

    Raises:
        UserError: the number asked for does not fit.
    """

    def complaint(groups: int) -> str:
        if groups % ranks:
            return f"a multiple of the {ranks} ranks"
        if batch_size % groups:
            return f"a divisor of --batch-size {batch_size}"
        return "" if batch_size // groups >= SMALLEST_GROUP else f"at most half of --batch-size {batch_size}"

    if given is not None:
        if complaint(given):
            raise UserError(f"--bn-groups {given} must be {complaint(given)}, so that groups are whole on every rank")
        return given
    most = max(PUBLISHED_GROUPS, ranks)
    return next((groups for groups in range(most, 0, -1) if not complaint(groups)), ranks)


def groups_of_rank(groups: int, rank: int, ranks: int) -> range:
    """The groups that one rank holds, numbered over all ranks."""
    share = max(1, groups // ranks)
    return range(rank * share, (rank + 1) * share)
