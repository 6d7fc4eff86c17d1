"""`hsvit new`: what is in a folder of images is said, shards of it are made elsewhere, and the recipe is accepted."""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.data import splits
from hsvit_ds.data.index import open_index
from hsvit_ds.new.goals import Goal
from hsvit_ds.new.proposal import EPOCHS, Proposal
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run.recipe import Recipe
from hsvit_ds.run.timing import Timed

from .. import photographs

NAMES = sorted(photographs.CLASSES)


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No trial run: as if 50 images a second were trained here."""
    monkeypatch.setattr("hsvit_ds.run.timing.first_steps", lambda recipe: Timed(50.0, 5.0))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def new(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["new", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def content(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def resolved(path: str | Path) -> Recipe:
    return recipes.resolve(recipes.read(Path(path), []), 1)[0]


def held(recipe: Recipe) -> dict[str, Counter[str]]:
    """Images by class name, of each split that a run reads."""
    found = {}
    for split in ("train", recipe.data.val, recipe.data.test):
        index: Any = splits.open_split(recipe.data, split)
        found[split] = Counter({index.classes[label]: count for label, count in index.label_counts().items()})
    return found


@pytest.mark.parametrize("goal", Goal)
def test_class_folders_become_shards_in_three_splits_and_a_recipe(goal: Goal, tmp_path: Path) -> None:
    source = photographs.folder(tmp_path / "Meine Blümchen", 20)
    before = content(source)
    code, output = new(source, "--goal", goal)
    assert code == 0, output
    assert f"{source}: 80 images of 4 classes" in output
    assert "80 JPG RGB" in output
    assert "drawn from train, by seed, the same share of each class: val and test" in output
    for name in NAMES:
        assert f"│ {name:<18} │ 14    │ 3   │ 3    │" in output
    assert "python -m hsvit_ds.train meine-blumchen.toml" in output
    recipe = resolved("meine-blumchen.toml")
    assert held(recipe) == {
        split: Counter(dict.fromkeys(NAMES, n)) for split, n in (("train", 14), ("val", 3), ("test", 3))
    }
    assert list(splits.class_names(recipe.data)) == NAMES
    assert recipe.data.image_size == 64
    assert len(recipe.model.widths.all) == (4 if goal == Goal.elastic else 1)
    assert content(source) == before, "the source is left as it is"


def test_a_second_call_changes_nothing_that_the_first_made(tmp_path: Path) -> None:
    source = photographs.folder(tmp_path / "photos", 8)
    assert new(source)[0] == 0
    before = content(Path.cwd())
    code, output = new(source)
    assert code == 2
    assert "photos.toml: is there already; train it, or name another with -o" in output
    assert new(source, "-o", "other.toml")[0] == 0
    after = content(Path.cwd())
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"other.toml"}, "the same shards serve both"
    assert resolved("other.toml").data == resolved("photos.toml").data


def test_splits_that_are_there_stay(tmp_path: Path) -> None:
    for split, each in (("train", 10), ("valid", 3), ("test", 2)):
        photographs.folder(tmp_path / "set" / split, each)
        for name in NAMES:  # pictures of their own
            for number, path in enumerate(sorted((tmp_path / "set" / split / name).iterdir())):
                photographs.draw(path, *photographs.CLASSES[name], 1000 * each + number)
    code, output = new(tmp_path / "set")
    assert code == 0, output
    assert "drawn from train" not in output
    counts = {split: sum(counter.values()) for split, counter in held(resolved("set.toml")).items()}
    assert counts == {"train": 40, "val": 12, "test": 8}
    shutil.rmtree(tmp_path / "set/test")
    shutil.rmtree(tmp_path / "set/valid")
    Path("again").mkdir()
    code, output = new(tmp_path / "set", "-o", "again/set.toml")
    assert (code, "val and test" in output) == (0, True), output


def test_what_cannot_be_trained_on_is_left_out_and_said(tmp_path: Path) -> None:
    source = photographs.folder(tmp_path / "photos", 10)
    (rose, sky) = (source / "rote Rose", source / "blue sky [noon]")
    (rose / "leer.jpg").touch()
    (rose / "text.jpg").write_text("no image")
    (rose / "cut.jpg").write_bytes((rose / "Foto 003.jpg").read_bytes()[:900])
    (rose / "notes.txt").write_text("notes")
    shutil.copy(rose / "Foto 000.jpg", rose / "copy.jpg")
    shutil.copy(rose / "Foto 001.jpg", sky / "wrong place.jpg")
    Image.new("L", (90, 90)).save(sky / "grey.png")
    code, output = new(source)
    assert code == 0, output
    assert "photos: 40 images of 4 classes" in output  # one is in two classes, one grey is new
    assert "left out, damaged: 3 images" in output
    assert "left out, copies of others: 3 images" in output
    assert "rote Rose/leer.jpg: 0 bytes" in output
    assert "rote Rose/text.jpg: not an image" in output
    assert "rote Rose/copy.jpg: the same image as rote Rose/Foto 000.jpg" in output
    assert "blue sky [noon]/wrong place.jpg: the same image is in blue sky [noon], rote Rose" in output
    assert "left alone, no images: 1 .txt" in output
    assert "1 PNG L" in output
    assert sum(sum(counter.values()) for counter in held(resolved("photos.toml")).values()) == 40


def test_a_table_of_files_and_labels(tmp_path: Path) -> None:
    source = photographs.folder(tmp_path / "photos", 6)
    rows = [(path.relative_to(tmp_path), path.parent.name) for path in sorted(source.rglob("*.jpg"))]
    for head, columns in ((("label", "file"), (1, 0)), (None, (0, 1))):
        table = tmp_path / "table.csv"
        with table.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows(([head] if head else []) + [[row[i] for i in columns] for row in rows])
        name = "named.toml" if head else "plain.toml"
        code, output = new(table, "-o", name)
        assert code == 0, output
        assert {
            name: counter[name] for counter in [held(resolved(name))["train"]] for name in counter
        } == dict.fromkeys(NAMES, 4)
    (tmp_path / "odd.csv").write_text("picture,kind\na.jpg,b\n")
    code, output = new(tmp_path / "odd.csv")
    assert (code, "its first line has no columns file and label, but picture, kind" in output) == (2, True)
    (tmp_path / "gone.csv").write_text("gone.jpg,b\n")
    code, output = new(tmp_path / "gone.csv")
    assert (code, "gone.jpg, No such file or directory" in output) == (2, True)


def test_shards_stay_where_they_are_or_are_split_anew(tmp_path: Path) -> None:
    source = photographs.folder(tmp_path / "photos", 12)
    assert new(source)[0] == 0
    tars = Path("photos-shards").rename(tmp_path / "tars")
    for path in [*tars.glob("*.npz"), *tars.glob("*-test-*")]:
        path.unlink()
    for path in tars.glob("*-val-*"):
        path.rename(tars / path.name.replace("-val-", "-validation-"))
    before = content(tars)
    code, output = new(tars, "-o", "tars.toml")
    assert code == 0, output
    recipe = resolved("tars.toml")
    assert (recipe.data.root, recipe.data.val, recipe.data.test) == (str(tars), "validation", "validation")
    assert held(recipe).keys() == {"train", "validation"}
    assert content(tars) == before
    for path in tars.glob("*-validation-*"):
        path.unlink()
    code, output = new(tars, "-o", "split.toml")
    assert code == 0, output
    assert "val and test" in output
    recipe = resolved("split.toml")
    assert recipe.data.root == str(Path("tars-shards").resolve())
    assert sum(held(recipe)["test"].values()) > 0


def one_class(root: Path) -> Path:
    return photographs.folder(root / "photos", 4, (NAMES[0],))


def one_image(root: Path) -> Path:
    source = photographs.folder(root / "photos", 4)
    for path in sorted((source / NAMES[1]).iterdir())[1:]:
        path.unlink()
    return source


def empty(root: Path) -> Path:
    (root / "photos").mkdir()
    return root / "photos"


def flat(root: Path) -> Path:
    source = photographs.folder(root / "photos", 2, (NAMES[0],))
    for path in list((source / NAMES[0]).iterdir()):
        path.rename(source / path.name)
    (source / NAMES[0]).rmdir()
    return source


def damaged(root: Path) -> Path:
    source = photographs.folder(root / "photos", 2)
    for path in source.rglob("*.jpg"):
        path.write_bytes(b"")
    return source


def twins(root: Path) -> Path:
    source = photographs.folder(root / "photos", 2)
    shutil.copytree(source / "rote Rose", source / "Rote rose")
    return source


def other_classes(root: Path) -> Path:
    photographs.folder(root / "photos/train", 4, tuple(NAMES[:2]))
    photographs.folder(root / "photos/val", 4, tuple(NAMES[:3]))
    return root / "photos"


def no_train(root: Path) -> Path:
    photographs.folder(root / "photos/val", 4)
    return root / "photos"


def two_vals(root: Path) -> Path:
    for name in ("train", "val", "valid"):
        photographs.folder(root / "photos" / name, 2)
    return root / "photos"


def no_folder(root: Path) -> Path:
    return root / "photos"


def a_file(root: Path) -> Path:
    (root / "photos").write_text("no folder")
    return root / "photos"


REFUSED = {
    one_class: "photos: one class, Gänseblümchen weiß, with 4 images: nothing to tell it from",
    one_image: "photos: class Sonnenblume has 1 readable image: train and val and test need one each, 3 in all; add",
    empty: "photos: empty, and no sub-folder; put the images of each class in one",
    flat: "photos: 2 images, and no sub-folder; put the images of each class in one",
    damaged: "photos: none of its 8 images can be read",
    twins: "Rote rose and rote Rose differ in case only, and are one folder on other systems",
    other_classes: "photos: val and train have other classes: blue sky [noon] is in val alone",
    no_train: "photos: has val and no train; call the images to learn from train",
    two_vals: "photos: val and valid are one split; keep one of them",
    no_folder: "photos: no such folder",
    a_file: "photos: a file; give a folder with a sub-folder of images for each class, or a CSV of file, label",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_nothing_can_be_learned_from_is_refused_with_what_was_found(make: Any, tmp_path: Path) -> None:
    code, output = new(make(tmp_path))
    assert code == 2
    assert REFUSED[make] in output.replace("\n", " ")
    assert not list(Path.cwd().iterdir()), "nothing was written"


def test_nothing_is_written_into_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = photographs.folder(tmp_path / "photos", 4)
    before = content(source)
    monkeypatch.chdir(source)
    code, output = new(".")
    assert (code, "is inside ., which is left as it is; name a recipe elsewhere" in output) == (2, True)
    code, output = new(source, "-o", source / "deep.toml")
    assert (code, "which is left as it is" in output) == (2, True)
    code, output = new(source, "-o", tmp_path / "no/recipe.toml")
    assert (code, f"no folder {tmp_path / 'no'}" in output) == (2, True)
    assert content(source) == before


@pytest.mark.parametrize("rate", [0.1, 10.0, 1000.0, 1e6])
def test_epochs_are_as_many_as_the_minutes_allow(rate: float, tmp_path: Path) -> None:
    from hsvit_ds.new.proposal import MINUTES
    from hsvit_ds.new.survey import survey

    source = photographs.folder(tmp_path / "photos", 6)
    found = survey(source, 0, 1, lambda done, total: None)
    first = Proposal.of(Goal.small, "photos", tmp_path, None, found, False)
    timed = first.within(rate)
    assert timed.epochs in EPOCHS
    assert timed.minutes <= MINUTES[Goal.small] or timed.epochs == EPOCHS[0]
    more = EPOCHS.index(timed.epochs) + 1
    if more < len(EPOCHS):
        assert timed.minutes / timed.epochs * EPOCHS[more] > MINUTES[Goal.small]
    assert f"epochs = {timed.epochs} " in timed.text()


def test_a_large_set_on_a_gpu_gets_a_larger_network_and_batch(tmp_path: Path) -> None:
    from hsvit_ds.new.survey import survey

    found = survey(photographs.folder(tmp_path / "photos", 6), 0, 1, lambda done, total: None)
    here = Proposal.of(Goal.accurate, "photos", tmp_path, None, found, False)
    there = Proposal.of(Goal.accurate, "photos", tmp_path, None, found, True)
    assert (here.variant, there.variant) == ("C3A4", "C4A8")
    assert here.batch == 8, "some steps an epoch, of 16 images"


def test_indexes_of_tars_fit_them(tmp_path: Path) -> None:
    source = photographs.folder(tmp_path / "photos", 6)
    assert new(source)[0] == 0
    index = open_index(Path("photos-shards"), "train")
    assert list(index.classes) == NAMES
