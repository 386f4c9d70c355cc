"""The items of `python -m trainer.check`, as the command runs them: `pytest -m gpu` on a machine that has a GPU."""

import pytest

from trainer.check.cli import run_item
from trainer.check.names import ITEMS
from trainer.check.results import FAIL, SKIPPED
from trainer.distributed import gpu_count

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu_count(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("name", ITEMS)
def test_an_item(name: str) -> None:
    found = run_item(name, ITEMS[name].limit_s)
    assert found.state != FAIL, found.told
    if found.state == SKIPPED:
        pytest.skip(found.told)
