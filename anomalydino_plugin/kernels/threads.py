"""Work in parts on as many threads as torch may use; compiled code that holds no lock runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def run_chunks(work: Callable[[T], None], parts: Sequence[T]) -> None:
    """This thread and as many others as torch may use take the parts one by one."""
    left = iter(parts)

    def take() -> None:
        while (part := next(left, None)) is not None:  # iterators of lists are safe to share
            work(part)

    others = min(torch.get_num_threads(), len(parts)) - 1
    if others < 1:
        take()
        return
    with ThreadPoolExecutor(others) as pool:
        waiting = [pool.submit(take) for _ in range(others)]
        take()
        for other in waiting:
            other.result()
