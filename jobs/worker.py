"""What every worker process does, whatever its work."""

from __future__ import annotations

import resource

from jobs.cluster import Resources, check_jobs_package


def start_worker(layout: Resources) -> None:
    """Make sure of our ``jobs``, and set torch's threads against Ray's OMP_NUM_THREADS=1.

    Raises:
        ConfigError: another package called ``jobs`` hides ours.
    """
    check_jobs_package()
    import torch

    torch.set_num_threads(layout.threads)


def peak_bytes() -> int:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
