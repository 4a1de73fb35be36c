"""BatchNorm over several processes."""

from __future__ import annotations

import pytest
from conftest import run_ranks


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_are_one_process_with_the_whole_batch(world: int) -> None:
    for ended in run_ranks("tests/sync_bn_ranks.py", world=world):
        assert ended.returncode == 0, ended.stderr
