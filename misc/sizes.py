"""Numbers and names that the data, the model and the flags share."""

from misc.command import UserError

PATCH_SIZE = 32  # voxels of 1 mm; the encoder halves the size five times, down to 1
HU_MIN, HU_MAX = -1024, 240  # patches are clipped to this range of Hounsfield units
PUBLISHED_GROUPS = 4  # the publication used 4 GPUs, each with separate BatchNorm statistics
SMALLEST_GROUP = 2  # minimum number of samples per BatchNorm group; a single sample has no variance
OPTIMIZERS = ("sgd", "adamw")


def choose_bn_groups(given: int | None, batch_size: int, ranks: int) -> int:
    """Choose the number of BatchNorm groups. The global batch is split into groups of consecutive samples.

    Each group has separate BatchNorm statistics. Every rank holds whole BatchNorm groups, so a run gives the same
    results on 1, 2 or 4 ranks.

    Args:
        given: number of BatchNorm groups that the user chose. None selects the largest valid number of groups up to 4,
            or up to the number of ranks if there are more than 4 ranks.
        batch_size: samples per step over all ranks.
        ranks: number of ranks.

    Raises:
        UserError: ``given`` does not suit the batch size and the number of ranks.
    """

    def explain_invalid_group_count(group_count: int) -> str:
        if group_count % ranks:
            return f"a multiple of the {ranks} ranks"
        if batch_size % group_count:
            return f"a divisor of --batch-size {batch_size}"
        return "" if batch_size // group_count >= SMALLEST_GROUP else f"at most half of --batch-size {batch_size}"

    if given is not None:
        if explain_invalid_group_count(given):
            raise UserError(
                f"--bn-groups {given} must be {explain_invalid_group_count(given)}; "
                "all groups must have the same size, at least 2, and no group may be split between ranks"
            )
        return given
    most = max(PUBLISHED_GROUPS, ranks)
    return next((groups for groups in range(most, 0, -1) if not explain_invalid_group_count(groups)), ranks)


def list_rank_groups(groups: int, rank: int, ranks: int) -> range:
    """Return the indices of the BatchNorm groups of one rank, among the groups of all ranks."""
    share = max(1, groups // ranks)
    return range(rank * share, (rank + 1) * share)
