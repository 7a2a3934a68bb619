"""How a search is told."""

import pytest

from safedelta_hf.report.search import percent


@pytest.mark.parametrize(
    ("share", "digits", "expected"),
    [(0.42, 2, "42 %"), (0.996, 2, "100 %"), (0.0012345, 3, "0.123 %"), (1.5, 2, "150 %"), (0.0, 3, "0 %")],
)
def test_a_share_is_set_without_an_exponent(share, digits, expected):
    assert percent(share, digits) == expected
