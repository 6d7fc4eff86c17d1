"""What is drawn of a run, and the tables beside it."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hsvit_ds.run import pictures
from hsvit_ds.run.evaluation import Answers, evaluate

from ..workers.common import steps, trainer


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    return saved


def test_curves_name_the_split_its_size_the_widths_the_epochs_and_the_best(tmp_path: Path, drawn: list[Any]) -> None:
    lines: list[dict[str, float]] = [
        {"step": s, "time": 0.0, "train/loss": 2 / s, "train/grad_norm": 1, "train/lr": 0.1} for s in (1, 20)
    ]
    lines += [{"step": 20, "time": 0.0, "dev/loss": 1.0, "dev/top1": 90, "dev/top1_w0.50": 80, "dev/top1_w1.00": 90}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures.draw_curves(tmp_path, "a $run$", "dev", 1234, 10, best=20)
    (figure,) = drawn
    loss, accuracy, *_ = figure.axes
    assert [line.get_label() for line in loss.lines] == ["training", "dev"]
    assert accuracy.get_ylabel() == "top-1 on dev (1,234 images), %"
    named = [line.get_label() for line in accuracy.lines]
    assert named == ["width 0.50", "width 1.00", "best checkpoint, step 20"]
    (epochs,) = accuracy.child_axes
    assert epochs.get_xlabel() == "epoch"
    figure.canvas.draw()
    low, high = epochs.get_xlim()
    assert (low, high) == (0, pytest.approx(2.04))
    assert all(label.get_text().replace(".", "").isdigit() for label in loss.get_yticklabels() if label.get_text())


def test_the_matrix_counts_every_image_by_label_and_answer(tmp_path: Path) -> None:
    run = trainer(tmp_path, ["data.eval_batch=50"], base="scala")
    steps(run, 2)
    widths = run.task.trained(2)
    counts = Answers.of(widths, 10, run.grid.device)
    found = evaluate(run.engine, run.engine.module, run.reader, "test", widths, counts=counts)
    matrix = counts.matrix
    assert int(matrix.sum()) == run.reader.count("test")
    assert 100 * int(matrix.diagonal().sum()) / run.reader.count("test") == pytest.approx(found["top1"])
    labels = torch.cat([y[valid] for _, y, valid in run.reader.evaluation("test")])
    assert matrix.sum(1).tolist() == labels.bincount(minlength=10).tolist()
    names = [f"digit {i}" for i in range(10)]
    files = pictures.write_classes(tmp_path / "classes-test.png", counts, names, "a run")
    assert [file.name for file in files] == ["classes-test.png", "classes-test.csv", "classes-test-confusion.csv"]
    with files[1].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == names
    assert torch.equal(counts.right[-1], matrix.diagonal())
    for width, right in zip(widths, counts.right, strict=True):
        assert 100 * int(right.sum()) / run.reader.count("test") == pytest.approx(found[f"top1_w{width}"])
        shares = [float(row[pictures.class_column(width)]) for row in rows]
        assert shares == pytest.approx((100 * right / matrix.sum(1)).tolist(), abs=0.01)
    with files[2].open() as file:
        _, *rest = csv.reader(file)
    assert [[int(number) for number in row[1:]] for row in rest] == matrix.tolist()


@pytest.mark.parametrize(("classes", "has"), [(5, False), (6, True)])
def test_the_best_five_are_scored_above_five_classes_only(
    classes: int, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, ["grid.submodule_ranks=1"])
    monkeypatch.setattr(run.reader, "facts", dataclasses.replace(run.reader.facts, classes=classes))
    assert ("top5" in evaluate(run.engine, run.engine.module, run.reader, "val")) == has


def test_curves_show_speed_waiting_and_where_submodules_were_absent(tmp_path: Path, drawn: list[Any]) -> None:
    present = {1: 4, 2: 3, 3: 3, 4: 4}
    lines = [
        {"step": s, "time": 0.0, "perf/images_per_sec": 100 * s, "perf/data_wait": 0.5, "train/submodules_present": n}
        for s, n in present.items()
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures.draw_curves(tmp_path, "a run", "val", 10, 2)
    (figure,) = drawn
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    (speed,) = panels["training images a second"].lines
    assert list(speed.get_ydata()) == [100, 200, 300, 400]
    (waiting,) = panels["time spent waiting for images, %"].lines
    assert list(waiting.get_ydata()) == [50] * 4
    absent = panels["top-1 on val (10 images), %"].patches
    assert [
        tuple(span.get_extents().transformed(panels["top-1 on val (10 images), %"].transData.inverted()).intervalx)
        for span in absent
    ] == [pytest.approx((1, 2)), pytest.approx((2, 3))]
