"""The cost of matching, before it starts."""

import pytest

from jobs.match_cost import CategoryCost, Rates, estimate
from jobs.match_rates import lowest_of_a_block


def test_time_is_work_over_rate_bytes_over_rate_and_patches_over_rate_shared_by_workers():
    rates = Rates(1000.0, 500.0, 3.0)
    found = estimate([CategoryCost(10, 100, 2, 4000), CategoryCost(20, 50, 1, 1000)], 4, rates, 2)
    assert found.flop == 2 * 4 * (10 * 100 + 20 * 50)
    assert found.bytes_read == 5000
    assert found.patches == 30
    assert found.seconds == pytest.approx((16000 / 1000 + 5000 / 500 + 30 / 3) / 2)
    assert found.as_json() == {
        **{"flop": 16000.0, "bytes_read": 5000, "patches": 30, "seconds": found.seconds},
        **rates._asdict(),
    }


@pytest.mark.parametrize(
    ("count", "blocks", "expected"), [(84, 1, 84), (84, 0.3, 84), (84, 3, 51), (100, 10, 29), (1, 50, 1)]
)
def test_a_block_brings_fewer_of_the_lowest_the_more_there_are(count, blocks, expected):
    """n (1 + 1/2 + ... + 1/B) / B."""
    assert lowest_of_a_block(count, blocks) == expected
