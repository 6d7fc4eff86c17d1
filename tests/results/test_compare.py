"""Runs are averaged where they are seeds of one thing, and what stands in a comparison is what they logged."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.errors import RefusedError
from hsvit_ds.results import comparison, history, latency, outcome, page, present, published, records, tables
from hsvit_ds.results.comparison import MISSING, Comparison
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run.summary import FAILED, Cost

from ..ranks import ROOT, environment
from . import folders


def compared(root: Path, by: tuple[str, ...] = (), metrics: tuple[str, ...] = ()) -> Comparison:
    return comparison.compare([outcome.of(record, metrics) for record in records.in_folder(root)], by, metrics)


def hsvit(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def values(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """Two recipes, of three and of two seeds."""
    for seed, top1 in enumerate((91.25, 92.5, 90.0)):
        folders.run(tmp_path, f"a-{seed}", top1, overrides=[f"run.seed={seed}"], said=folders.summary())
    for seed, top1 in enumerate((85.0, 86.5)):
        overrides = [f"run.seed={seed}", "optimizer.lr=0.01", "optimizer.clip=1.0"]
        folders.run(tmp_path, f"b-{seed}", top1, (60.0, 70.0 + seed, 80.0), overrides, said=folders.summary())
    return tmp_path


def test_means_and_deviations_are_those_of_the_metrics(seeds: Path) -> None:
    (section,) = compared(seeds).sections
    assert [len(group.runs) for group in section.groups] == [3, 2]
    for group, letter in zip(section.groups, "ab", strict=True):
        folder_of = [path for path in seeds.iterdir() if path.name.startswith(letter)]
        expected = {
            "test/top1": [values(folder, "test/top1")[-1] for folder in folder_of],
            "best val/top1": [max(values(folder, "val/top1")) for folder in folder_of],
            "after epoch": [1 + int(np.argmax(values(folder, "val/top1"))) for folder in folder_of],
            "images/s": [np.median(values(folder, "perf/images_per_sec")) for folder in folder_of],
            "core hours": [4.0 for _ in folder_of],
        }
        columns = {column.title: column for column in (*tables.results(section), *tables.costs(section))}
        for title, numbers in expected.items():
            found = group.mean(columns[title].value)
            assert found is not None
            np.testing.assert_allclose(found.mean, np.mean(numbers), rtol=1e-12)
            np.testing.assert_allclose(found.std, np.std(numbers, ddof=1), rtol=1e-12, atol=1e-12)
            assert found.n == len(folder_of)
    assert "91.25 ± 1.25" in hsvit("compare", seeds).stdout


def test_a_key_that_one_recipe_lacks_is_shown_as_missing(seeds: Path) -> None:
    found = compared(seeds)
    assert {difference.key: difference.values for difference in found.trained} == {
        "optimizer.lr": ("0.002", "0.01"),
        "optimizer.clip": (MISSING, "1"),
    }
    assert [group.label for group in found.groups] == ["digits/hsvit lr=0.002 clip=–", "digits/hsvit lr=0.01 clip=1"]


def test_where_a_run_was_trained_is_no_difference_of_what_was(tmp_path: Path) -> None:
    folders.run(tmp_path, "a", overrides=["run.root=x", "run.name=y"], said=folders.summary())
    folders.run(tmp_path, "b", overrides=["grid.submodule_ranks=2"], said=folders.summary())
    found = compared(tmp_path)
    assert len(found.groups) == 1
    assert found.trained == ()
    assert [difference.key for difference in compared(tmp_path, by=("submodule_ranks",)).placed] == [
        "grid.submodule_ranks"
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"name": "cifar10"},
        {"fingerprint": "0123"},
        {"test": "val"},
        {"counts": {"train": 1150, "val": 288, "test": 300}},
    ],
    ids=str,
)
def test_runs_of_other_data_are_shown_apart_and_not_averaged(other: dict[str, Any], tmp_path: Path) -> None:
    folders.run(tmp_path, "a", said=folders.summary())
    folders.run(tmp_path, "b", said=folders.summary(data=replace(folders.DATA, **other)))
    found = compared(tmp_path)
    assert [len(section.runs) for section in found.sections] == [1, 1]
    assert len({group.label for group in found.groups}) == 2
    assert len(re.findall("^### .*: result on", tables.markdown(found), re.M)) == 2


def test_what_has_not_finished_is_marked_and_in_no_mean(tmp_path: Path) -> None:
    folders.run(tmp_path, "a-1", 90.0, said=folders.summary())
    folders.run(tmp_path, "a-2", 92.0, said=folders.summary())
    folders.run(tmp_path, "a-3", 10.0, said=folders.summary(state=FAILED, why="rank 1: lost"))
    (section,) = compared(tmp_path).sections
    assert [(group.label, group.mark, len(group.runs)) for group in section.groups] == [
        ("digits/hsvit", "", 2),
        ("a-3", "failed", 1),
    ]
    assert "91.00 ± 1.41" in hsvit("compare", tmp_path).stdout
    assert "a-3 is not finished (failed: rank 1: lost)" in page.html(compared(tmp_path))


def test_a_run_of_an_older_version_is_shown_with_what_is_unknown_missing(tmp_path: Path) -> None:
    folders.run(tmp_path, "old", 90.0)
    (section,) = compared(tmp_path).sections
    line = tables.markdown(compared(tmp_path))
    assert section.groups[0].label == "old"
    assert "90.00" in line
    assert section.groups[0].mean(tables.hours) is None
    assert "numbers of images not known" in line


def test_keys_that_are_asked_for_make_the_groups(seeds: Path) -> None:
    found = compared(seeds, by=("seed",))
    assert {group.label: len(group.runs) for group in found.groups} == {"seed=0": 2, "seed=1": 2, "seed=2": 1}
    assert dict((d.key, d.values) for d in found.trained)["optimizer.lr"] == ("0.002", "0.01, 0.002", "0.01, 0.002")


def test_what_is_the_same_in_every_run_has_no_deviation(tmp_path: Path) -> None:
    costs = (Cost(width="1.00", parameters=630_090, macs=29_758_080),)
    for seed in range(3):
        folders.run(tmp_path, f"a-{seed}", overrides=[f"run.seed={seed}"], said=folders.summary(costs=costs))
    assert "| 0.02976 | 630,090 |" in tables.markdown(compared(tmp_path))


def test_every_run_has_the_expected_epochs_of_its_widths_where_they_are_known(tmp_path: Path) -> None:
    for name, epochs in (("new", 2.5), ("old", None)):
        costs = tuple(Cost(width=width, parameters=1, macs=1, epochs=epochs) for width in ("0.25", "1.00"))
        folders.run(tmp_path, name, said=folders.summary(costs=costs))
    found = {row["run"]: row["expected_epochs_w0.25"] for row in tables.raw(compared(tmp_path))}
    assert found == {"new": 2.5, "old": None}


def test_nothing_is_tested_below_three_runs(seeds: Path) -> None:
    assert "p" not in tables.tested(compared(seeds).sections[0])
    for seed, top1 in enumerate((85.0, 86.5, 84.0), 2):
        overrides = [f"run.seed={seed}", "optimizer.lr=0.01", "optimizer.clip=1.0"]
        folders.run(seeds, f"b-{seed}", top1, overrides=overrides, said=folders.summary())
    from scipy.stats import ttest_ind

    (test,) = compared(seeds).sections[0].tests()
    expected = ttest_ind([91.25, 92.5, 90.0], [85.0, 86.5, 85.0, 86.5, 84.0], equal_var=False).pvalue
    assert test.p == pytest.approx(expected)
    assert tables.tested(compared(seeds).sections[0])["p"] == [MISSING, f"{expected:.2g}"]


def test_runs_without_any_spread_are_not_tested(tmp_path: Path) -> None:
    for number in range(6):
        folders.run(tmp_path, f"a-{number}", overrides=[f"optimizer.lr={number % 2 + 1}.0"], said=folders.summary())
    assert tables.tested(compared(tmp_path).sections[0])["p"] == [MISSING, MISSING]


def test_a_half_written_last_line_is_salvaged_and_said(seeds: Path) -> None:
    with (seeds / "a-0" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "time": 10')
    done = hsvit("compare", seeds, "--format", "md")
    assert "91.25 ± 1.25" in done.stdout
    assert "a-0/metrics.jsonl: 1 line cannot be read (35)" in done.stderr
    assert "a-0: 1 line of its metrics cannot be read (35)" in page.html(compared(seeds))


def test_a_run_without_metrics_is_said_to_have_none(tmp_path: Path) -> None:
    folders.run(tmp_path, "a", said=folders.summary())
    (folders.run(tmp_path, "b") / "metrics.jsonl").write_text("")
    assert history.read(tmp_path / "b").curves == {}
    assert "b has no metrics" in page.html(compared(tmp_path))
    assert hsvit("compare", tmp_path).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--by", "optimiser.lr"], ["--by optimiser.lr", "near: optimizer.lr"]),
        (["--by", "name"], ["--by name", "data.name", "run.name"]),
        (["--metric", "val/top5"], ["--metric val/top5", "near: val/top1"]),
        (["--format", "pdf"], ["--format pdf", "md, csv, json"]),
        (["-o", "report.pdf"], ["report.pdf", ".html"]),
    ],
    ids=" ".join,
)
def test_what_is_unknown_is_refused_with_what_is_near(arguments: list[str], words: list[str], seeds: Path) -> None:
    done = hsvit("compare", seeds, *arguments)
    assert done.exit_code == 2
    assert all(word in done.stderr for word in words), done.stderr


def test_an_unknown_run_is_refused_with_the_nearest(seeds: Path) -> None:
    done = hsvit("compare", "a-o", "--runs", seeds)
    assert done.exit_code == 2
    assert "a-o" in done.stderr
    assert "a-0" in done.stderr


def test_runs_are_found_by_name_and_glob(seeds: Path) -> None:
    done = hsvit("compare", "a-*", "b-1", "--runs", seeds, "--format", "csv")
    assert {row["run"] for row in csv.DictReader(io.StringIO(done.stdout))} == {"a-0", "a-1", "a-2", "b-1"}


def test_csv_has_a_row_a_run_with_every_number(seeds: Path) -> None:
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(hsvit("compare", seeds, "--format", "csv").stdout))}
    assert len(rows) == 5
    for name, row in rows.items():
        lines = [json.loads(line) for line in (seeds / name / "metrics.jsonl").read_text().splitlines()]
        last = {key: value for line in lines for key, value in line.items() if key not in ("step", "time")}
        assert {key: float(row[key]) for key in last} == last
    assert rows["a-0"]["optimizer.clip"] == ""
    assert rows["b-0"]["optimizer.clip"] == "1.0"


def test_json_has_everything_and_is_json(tmp_path: Path) -> None:
    folders.run(tmp_path, "a", more={"test/loss": float("nan")}, said=folders.summary())
    found = json.loads(hsvit("compare", tmp_path, "--format", "json").stdout, parse_constant=pytest.fail)
    assert found["sections"][0]["groups"][0]["means"]["test/top1"] == {"mean": 90.0, "std": None, "n": 1}
    assert found["runs"][0]["test/loss"] is None
    assert found["curves"]["a"]["val/top1"]["values"] == [50.0, 80.0, 70.0]


def test_a_report_is_written_over_another_files_are_not(seeds: Path, tmp_path: Path) -> None:
    for ending in ("html", "md", "csv", "json"):
        out = tmp_path / f"report.{ending}"
        assert hsvit("compare", seeds / "a-0", "-o", out).exit_code == 0
        assert hsvit("compare", seeds / "a-1", "-o", out).exit_code == 0
        assert "92.5" in out.read_text()
        out.write_text("mine")
        done = hsvit("compare", seeds / "a-0", "-o", out)
        assert (done.exit_code, out.read_text()) == (2, "mine")
        assert "is no report of hsvit compare" in done.stderr


def test_spikes_survive_thinning() -> None:
    values = np.zeros(10_000)
    values[[1234, 5678]] = 9.0, -9.0
    values[7777] = np.nan
    steps = np.arange(10_000)
    curve = history.Curve(steps, values, steps.astype(float))
    thinned = outcome.thin(history.History({"x": curve}), curve)
    assert len(thinned.steps) <= 2 * outcome.BUCKETS + 2
    assert thinned.steps == sorted(thinned.steps)
    assert {0, 1234, 5678, 7777, 9999} <= set(thinned.steps)
    assert max(thinned.values[:100]) == 9.0


def test_names_are_no_part_of_the_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)<&\"'"
    folders.run(tmp_path, evil, said=folders.summary(state=FAILED, why=f"{evil}</script>"))
    folders.run(tmp_path, "b", overrides=[f"run.name='{evil[:-1]}</script>'"], said=folders.summary(recipe=evil))
    found = compared(tmp_path)
    text = page.html(found)
    assert "<script>alert" not in text
    assert len(re.findall("</script>", text)) == 4  # the theme, plotly, the data, the page
    assert "<script>" not in tables.markdown(found)


def test_latencies_of_this_machine_are_shown_those_of_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders.run(tmp_path, "a", said=folders.summary())
    monkeypatch.setattr(latency, "devices", lambda: ["mine"])
    latency._keep(folder, latency.Latency("another", 1, {"1.00": 7.0}))
    assert latency.cached(folder) is None
    latency._keep(folder, latency.Latency("mine", 2, {"0.50": 1.0, "1.00": 3.0}))
    (run,) = compared(tmp_path).runs
    assert tables.latency()(run) == 3.0
    assert tables.latency("0.50")(run) == 1.0
    assert "latencies were measured on mine, 2 threads" in page.html(compared(tmp_path))


def test_what_a_sweep_of_submodules_left_is_read(tmp_path: Path) -> None:
    folder = folders.run(tmp_path, "a", said=folders.summary())
    for step, top1 in ((10, 50.0), (30, 80.5)):
        present.write(folder / f"evaluate-present-test-step-{step}.csv", [(0,), (1,), (0, 1)], [top1, 70.0, 90.25])
    rows = present.of_folder(folder)["test"]
    assert [(row.subset, row.top1) for row in rows] == [((0,), 80.5), ((1,), 70.0), ((0, 1), 90.25)]
    assert "By submodules present" in page.html(compared(tmp_path))


def test_widths_stand_beside_what_is_published_of_the_same_model(tmp_path: Path) -> None:
    recipe = json.loads(json.dumps(folders.RECIPE))
    scala = recipes.flat(recipes.read(ROOT / "recipes/imagenet/scala_deit_s.toml", ["data.root=/data"]))
    for key, value in scala.items():
        top, *middle, last = key.split(".")
        inner = recipe.setdefault(top, {})
        for part in middle:
            inner = inner.setdefault(part, {})
        inner[last] = value
    widths = {"val/top1_w0.25": 50.0, "val/top1_w0.50": 60.0, "val/top1_w1.00": 70.0}
    costs = tuple(Cost(width=width, parameters=1, macs=1) for width in ("0.25", "0.50", "1.00"))
    for name in ("imagenet1k", "tiny_imagenet"):
        recipe["data"] |= {"name": name, "val": "val", "test": "val"}
        data = replace(folders.DATA, name=name, test="val")
        folders.run(tmp_path, name, more=widths, recipe=recipe, said=folders.summary(data=data, costs=costs))
    assert page.html(compared(tmp_path)).count('"name":"published: Scala, DeiT-S, 13 networks"') == 1
    for section in compared(tmp_path).sections:
        curves = [curve.name for run in section.runs for curve in published.of(run.recipe)]
        assert curves == (["Scala, DeiT-S, 13 networks"] if section.data.name == "imagenet1k" else [])
        assert len(section.runs[0].widths) == 3
    imagenet = scala | {"data.name": "imagenet1k"}
    assert published.of(imagenet)
    others = {"model.widths.then": [{"epoch": 70, "granularity": 0.125}], "task.pinned": [0.8125]}
    for key, value in {**others, "model.widths.slice": "heads"}.items():
        assert published.of({name: known for name, known in imagenet.items() if name != key})  # of an older version
        assert published.of(imagenet | {key: value}) == []


def test_published_curves_are_those_of_the_documents() -> None:
    """Every row of docs/results.md that names a curve's numbers has them; every curve has such a row."""
    text = (ROOT / "docs/results.md").read_text()
    text = text[text.index("## Scala") :]
    found = []
    head: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            head = []
        elif not head:
            head = cells
        else:
            places = [
                (width, cell) for width, cell in zip(head, cells, strict=True) if re.fullmatch(r"[01]\.\d+", width)
            ]
            found.append({f"{float(w):.2f}" if len(w) < 5 else w: cell for w, cell in places if cell})
    for curve in published.CURVES:
        shown = {w: f"{'~' if w in curve.figure else ''}{value}" for w, value in curve.top1.items()}
        rows = [row for row in found if row and row.items() <= shown.items()]
        told = {width for row in rows for width in row}
        assert told == set(shown), (curve.name, set(shown) - told)


@pytest.mark.heavy
def test_a_comparison_is_made_without_pytorch(seeds: Path) -> None:
    script = f"""
import sys
from hsvit_ds.cli import main
sys.argv = ["hsvit", "compare", {str(seeds)!r}, "-o", {str(seeds / "report.html")!r}]
try:
    main()
finally:
    loaded = sorted({{"torch", "mlflow", "sklearn", "matplotlib", "pandas"}} & set(sys.modules))
    assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_short_end_of_a_key_is_enough_where_it_is_unique() -> None:
    from hsvit_ds.run import table

    keys = ["optimizer.lr", "model.groups", "data.name", "run.name"]
    assert table.find("lr", keys, "--by lr") == "optimizer.lr"
    assert table.find("data.name", keys, "") == "data.name"
    with pytest.raises(RefusedError, match=r"near: model\.groups"):
        table.find("group", keys, "--by group")
