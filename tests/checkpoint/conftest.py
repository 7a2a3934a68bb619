import pytest

from tests.fixtures import checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return checkpoints.case(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def case(whole, tmp_path):
    """A case of the test's own, which it may change."""
    return whole.copy_to(tmp_path)
