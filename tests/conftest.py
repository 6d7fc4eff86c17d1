"""Without a GPU Triton's kernels run in its interpreter, which has to be chosen before they are defined."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small run that nothing happened to, on two submodule ranks."""
    from .engine.test_checkpoint import train_arguments
    from .ranks import finish, fork

    root = tmp_path_factory.mktemp("uninterrupted")
    finish(fork("hsvit_ds.train", train_arguments(root), 2))
    return root


@pytest.fixture(autouse=True)
def _kernels_as_before() -> Iterator[None]:
    from hsvit_kernels import force

    yield
    force("auto")
