"""How much ranks idle, by formulas: an HSViT's beside those of other ways to divide a network.

The ratio is that of idle to busy time, without communication, as arXiv 2404.05196 defines it; its equations 1 to 3 are
not in the text that can be read, so these are derived from the words. Ranks are alike; T_sub is the time of one
submodule's passes, T_agg that of what follows the sum over all submodules.
"""

from __future__ import annotations


def model_parallel(ranks: int) -> float:
    """One stage after another: while one computes, all others idle."""
    return ranks - 1.0


def pipeline(ranks: int, micro_batches: int) -> float:
    """The same with micro batches, all forwards before all backwards (GPipe, arXiv 1811.06965)."""
    return (ranks - 1) / micro_batches


def summed(ranks: int, submodule: float, aggregation: float) -> float:
    """Submodules, one rank aggregating while the others idle, whose idle times are summed: it rises with the ranks, to
    T_agg / T_sub at most. The reading of this project, as it is that of the other two formulas."""
    return (ranks - 1) * aggregation / (ranks * submodule + aggregation)


def elapsed(ranks: int, submodule: float, aggregation: float) -> float:
    """Submodules, the time in which ranks idle counted once however many do: it falls with the ranks, as the paper says
    that more of them gain efficiency."""
    return aggregation / (ranks * submodule + aggregation)


def of_submodules(ranks: int, compute: float, head: float, waiting: float = 0.0) -> float:
    """`summed`, of a step that was simulated or measured. Here every rank computes the head itself, and what one of
    them would have to compute alone is idle time of the others.

    Args:
        compute: seconds of a rank, those of the head among them. waiting: seconds of a rank, for others.
    """
    idle = ranks * waiting + (ranks - 1) * head
    return idle / (ranks * (compute - head) + head)
