"""How many processor cores there are to use."""


def usable_cores() -> int:
    """Cores that this process may run on, which Slurm and containers keep below the machine's."""
    from dask.system import CPU_COUNT  # knows a container's quota too

    return CPU_COUNT
