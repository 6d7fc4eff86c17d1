"""Without a GPU Triton's kernels run in its interpreter, which has to be chosen before they are defined."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _kernels_as_before() -> Iterator[None]:
    from hsvit_kernels import force

    yield
    force("auto")
