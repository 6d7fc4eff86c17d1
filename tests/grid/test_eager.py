"""torch.compile breaks its graph at such a function and runs it as it is, without the compiler being loaded for it."""

from __future__ import annotations

import torch
from torch import Tensor

from hsvit_ds.grid.eager import eager

seen: list[bool] = []


@eager
def add_one(x: Tensor) -> Tensor:
    """Adds one."""
    seen.append(torch.compiler.is_compiling())
    return x.add(1).mul(1)


def test_compiled_code_calls_it_as_it_is() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: add_one(x * 2) * 3, backend=backend)
    for _ in range(3):
        assert compiled(torch.ones(2)).tolist() == [9, 9]
    assert seen == [False] * 3
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")]
    assert len(targets) == 2, targets  # the two products; nothing of add_one
    assert all("mul" in target for target in targets)
    assert add_one.__doc__ == "Adds one."
