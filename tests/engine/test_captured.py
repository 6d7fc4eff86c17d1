"""Captured steps equal eager ones, bit for bit: PyTorch's own capturing, over graphs that record operations on a CPU.

Such a graph is as blind as a CUDA graph: a replay repeats the operations on the same memory, and whatever was a number
on the host when it was recorded stays that number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hsvit_ds.engine import captured
from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.run import opening
from hsvit_ds.run.evaluation import evaluate

from ..workers.common import state, steps, trainer

ALONE = ["grid.submodule_ranks=1", "ema.decay=0.9"]


class Graph:
    """Operations and the tensors that they read and wrote."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.written: list[tuple[Tensor, Tensor]] = []

    def undo(self) -> None:
        """Put back what recording has written over: a CUDA graph computes nothing then."""
        with torch.no_grad():
            for tensor, before in reversed(self.written):
                tensor.copy_(before)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.operations:
                made = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(made), strict=True):
                    # Views, and what was written in place, lie in the old memory anyway.
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.graph.written += [(t.detach(), t.detach().clone()) for t in tree_leaves(value)]
        out = func(*args, **(kwargs or {}))
        # Without their history, which a replay is not to walk.
        kept = tree_map_only(Tensor, lambda t: t.detach(), (args, kwargs or {}, out))
        self.graph.operations.append((func, *kept))
        return out


graphs: list[Graph] = []


@contextmanager
def recording(graph: Graph, pool: Any = None, capture_error_mode: str = "") -> Iterator[None]:
    assert capture_error_mode == "thread_local"
    graphs.append(graph)
    with Recording(graph):
        yield
    graph.undo()


@pytest.fixture(autouse=True)
def graphs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs.clear()
    # DeepSpeed's ZeRO-3, once asked for in a process, leaves one of its own there, which rounds otherwise.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())


CASES = {
    "HSViT": ("hsvit", ["run.bn_batch=4"], 1),
    "HSViT, bf16, accumulated": ("hsvit", ["run.micro_batch=8", "run.bn_batch=4", "engine.precision=bf16"], 1),
    "HSViT, ZeRO-0": ("hsvit", ["engine.zero_stage=0"], 1),
    "HSViT, ZeRO-0, SGD, accumulated": (
        "hsvit",
        [
            "engine.zero_stage=0",
            "run.micro_batch=8",
            "run.bn_batch=8",
            "optimizer.name=sgd",
            "optimizer.warmup_epochs=1",
        ],
        1,
    ),
    "HSViT, ZeRO-2": ("hsvit", ["engine.zero_stage=2"], 1),
    "Scala": ("scala", ["engine.zero_stage=0", "model.widths.granularity=0.25"], 4),
    "Scala, bf16": ("scala", ["engine.zero_stage=1", "model.widths.granularity=0.25", "engine.precision=bf16"], 4),
    "Scala, accumulated": ("scala", ["run.micro_batch=8", "model.widths.granularity=0.25"], 4),
    "slimmable HSViT": ("hsvit", ["model.widths.smallest=0.5", "model.widths.granularity=0.5", "task.kind=scala"], 2),
}


@pytest.mark.parametrize(("base", "keys", "widths"), CASES.values(), ids=CASES)
def test_captured_steps_equal_eager_ones(base: str, keys: list[str], widths: int, tmp_path: Path) -> None:
    found = {}
    for capture in ("true", "false"):
        run = trainer(tmp_path / capture, [*ALONE, *keys, f"engine.capture={capture}"], base=base)
        norms = steps(run, 5)
        scores = evaluate(run.engine, run.engine.module, run.reader, "val", run.task.trained(5))
        found[capture] = norms, scores, state(run)
        if capture == "true":
            assert run.engine.not_captured == ""
            # Forward, backward and stage 0's update, however many steps and micro batches.
            assert len(graphs) == 2 * widths + ("engine.zero_stage=0" in keys)
            graphs.clear()
        else:
            assert run.engine.not_captured == "engine.capture = false"
            assert graphs == []
    (norms, scores, tensors), (expected_norms, expected_scores, expected) = found["true"], found["false"]
    if base == "scala":  # eager slices are gathered in another order
        assert norms == pytest.approx(expected_norms, rel=1e-6 if "bf16" not in str(keys) else 1e-2)
        return
    assert norms == expected_norms
    assert scores == expected_scores
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_captured_updates_leave_out_what_is_not_finite_and_follow_a_checkpoint(optimizer: str, tmp_path: Path) -> None:
    found = {}
    for capture in ("true", "false"):
        keys = [*ALONE, "engine.zero_stage=0", f"optimizer.name={optimizer}", f"engine.capture={capture}"]
        run = trainer(tmp_path / capture, keys)
        norms = steps(run, 3)
        run.checkpoints.save(Position(0, 3, 3))
        run.checkpoints.wait()
        before = state(run)
        weight: Any = run.engine.module.get_parameter("submodules.qkv_weight")
        finite = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(float("inf"))
        (batches,) = islice(run.reader.train(0, 3), 1)
        assert not run._step(batches, 3).applied
        with torch.no_grad():
            weight.copy_(finite)
        for name, tensor in state(run).items():
            assert torch.equal(tensor, before[name]), name
        run.start = Position(0, 3, 3)
        norms += steps(run, 6)
        assert run.checkpoints.load() == run.start  # into memory of its own
        norms += steps(run, 6)
        assert norms[3:6] == norms[6:]
        found[capture] = norms, state(run)
    assert found["true"][0] == found["false"][0]
    for name, tensor in found["true"][1].items():
        assert torch.equal(tensor, found["false"][1][name]), name


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["engine.zero_stage=3"], "engine.zero_stage = 3 gathers parameters in the forward"),
        (["engine.capture=false"], "engine.capture = false"),
    ],
)
def test_what_cannot_be_captured_is_said(overrides: list[str], why: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, [*ALONE, *overrides])
    assert run.engine.not_captured == why
    steps(run, 2)
    assert graphs == []


def test_models_of_timm_are_not_captured(tmp_path: Path) -> None:
    run = trainer(tmp_path, ["grid.submodule_ranks=1"], base="hybrid")
    assert run.engine.not_captured == "a model of timm draws from PyTorch's generator"


def test_what_torch_compile_made_of_the_model_is_said() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()

    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch.compile(broken, backend="eager")(torch.ones(2))
    said = captured.compiled()
    assert said.startswith("engine.compile: 2 graphs, 1 break; 1 x ")
    assert len(said.splitlines()) == 1


def test_a_run_says_at_its_beginning_what_compiling_costs_on_a_cpu(tmp_path: Path) -> None:
    run = trainer(tmp_path, ["grid.submodule_ranks=1", "engine.capture=false", "engine.compile=true"])
    said = opening.lines(run.recipe, run.plan, run.grid, run.engine, run.reader, tmp_path, run.start)
    assert "warning: engine.compile = true: on a CPU compiling takes minutes, and HSViT is slower for it" in said
