"""Kernels in CUDA C++ on a CPU: their source as C++, where a value holds the numbers of all lanes (lanes_host.h)."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
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
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(str(_built(entry, Path(folder, "kernel.so"), "", "-shared", "-fPIC")))


def races(entry: Entry, grid: tuple[int, int], near: Tensor, tensors: Sequence[Tensor | None], *numbers: float) -> str:
    """What ThreadSanitizer says of a launch, whose warps are threads: empty, unless two of them touch a place and no
    barrier is between. Nothing is written to the tensors."""
    arguments = attention_cuda.arguments(entry, tensors, numbers)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}") for number in range(len(tensors) + 1)]
        for file, tensor in zip(files, tensors, strict=False):
            file.write_bytes(b"" if tensor is None else _bytes(tensor))
        files[-1].write_bytes(bytes(arguments))
        program = _built(entry, Path(folder, "program"), PROGRAM, "-fsanitize=thread", "-g")
        command = [str(program), *map(str, grid), *map(str, files)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stderr + (f"exit code {found.returncode}" if found.returncode else "")


def _bytes(tensor: Tensor) -> bytes:
    """From a tensor's first number to its last one, with what lies between."""
    size = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    whole = tensor.detach().as_strided((size if tensor.numel() else 0,), (1,))
    return bytes(whole.contiguous().view(torch.uint8).numpy().tobytes())


PROGRAM = """
#include <fstream>
#include <iterator>
#include <string>

std::vector<char> read(const char* name) {
    std::ifstream file(name, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}
int main(int count, char** words) {
    std::vector<std::vector<char>> data;
    for (int i = 3; i < count; ++i) data.push_back(read(words[i]));
    std::vector<char> a = std::move(data.back());
    for (int i = 0; i + 4 < count; ++i) {
        char* at = data[i].empty() ? nullptr : data[i].data();
        std::memcpy(a.data() + i * sizeof at, &at, sizeof at);
    }
    run(a.data(), std::stoi(words[1]), std::stoi(words[2]));
}
"""
"""A launch in a process of its own. Its words: the grid, files of the tensors, and of the arguments, which begin with
them."""


def _built(entry: Entry, file: Path, more: str, *options: str) -> Path:
    of, kernel = f"{entry.namespace}::Arguments", f"{entry.namespace}::{entry.function}"
    source = f"""{entry.checks}
    extern "C" void run(const void* of, int x, int y) {{
        const {of}& a = *static_cast<const {of}*>(of);
        every_block(x, y, {WARPS}, [=] {{ {kernel}(a); }});
    }}
    {more}"""
    headers = [f"-I{attention_cuda.headers()[0].parent}", f"-I{HERE}"]
    command = ["g++", "-std=c++20", "-O1", "-pthread", *options, *headers, "-x", "c++", "-", "-o", str(file)]
    found = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return file
