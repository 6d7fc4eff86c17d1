"""Kernels in CUDA C++ on a CPU: their source as C++, where a value holds the numbers of all lanes (lanes_host.h)."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hsvit_kernels import attention_cuda
from hsvit_kernels.attention_cuda import WARPS, Entry

HERE = Path(__file__).parent


def launch(
    entry: Entry, grid: tuple[int, int], near: Tensor, tensors: Sequence[Tensor | None], *numbers: float
) -> None:
    """Stands for `attention_cuda.launch`, for tensors of the CPU."""
    arguments = attention_cuda.arguments(entry, tensors, numbers)
    _library(entry).run(ctypes.byref(arguments), *grid)


@functools.cache
def _library(entry: Entry) -> Any:
    of, kernel = f"{entry.namespace}::Arguments", f"{entry.namespace}::{entry.function}"
    source = f"""{entry.checks}
    extern "C" void run(const {of}* a, int x, int y) {{ every_block(x, y, {WARPS}, [=] {{ {kernel}(*a); }}); }}
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.so")
        headers = [f"-I{attention_cuda.headers()[0].parent}", f"-I{HERE}"]
        options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", *headers]
        command = ["g++", *options, "-x", "c++", "-", "-o", str(file)]
        found = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        return ctypes.CDLL(str(file))
