"""Without a GPU Triton's kernels run in its interpreter, which has to be chosen before they are defined."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

from . import ranks


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small run that nothing happened to, on two submodule ranks."""
    from .engine.test_checkpoint import train_arguments

    root = tmp_path_factory.mktemp("uninterrupted")
    ranks.finish(ranks.fork("hsvit_ds.train", train_arguments(root), 2))
    return root


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """`make check` has no ranks: a test that starts some and is not marked fails."""
    ranks.allowed = any(item.get_closest_marker(name) for name in ("heavy", "gpu", "cluster"))


@pytest.fixture(scope="session", autouse=True)
def _process_group_stays() -> Iterator[None]:
    """A command that a test runs in this process would end the group that the tests after it compute with."""
    end = dist.destroy_process_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", lambda group=None: None if group is None else end(group))
        yield


@pytest.fixture(autouse=True)
def _groups_end_with_their_test() -> Iterator[None]:
    """Each gloo group has threads that wake a hundred times a second; after hundreds of tests that is half a core."""
    groups = dist.distributed_c10d._world.pg_names
    before = set(groups)
    yield
    if dist.is_initialized():
        from .workers import common  # here, as the kernels' tests run where the project's libraries are not

        kept = {dist.group.WORLD, *before}
        kept |= {
            value
            for grid in common._grids.values()
            for value in vars(grid).values()
            if isinstance(value, dist.ProcessGroup)
        }
        for group in set(groups) - kept:
            dist.destroy_process_group(group)


@pytest.fixture(autouse=True)
def _kernels_as_before() -> Iterator[None]:
    from hsvit_kernels import force

    yield
    force("auto")
