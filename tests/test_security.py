"""What is read is not trusted, what is secret is not kept, and the ranks do not meet in public. See SECURITY.md."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.engine.checkpoint import Position
from hsvit_ds.engine.interop import LoadedRun, load_model
from hsvit_ds.errors import RefusedError
from hsvit_ds.models import backbone, timm_models
from hsvit_ds.models.weights import read_foreign
from hsvit_ds.results import saved
from hsvit_ds.run import recipe as recipes
from hsvit_ds.tasks import teacher

from .data.test_untrusted import described, streamed
from .engine.test_interop import scala_weights
from .ranks import ROOT, environment, free_port
from .tars import data_set
from .workers.common import SMALL

PACKAGES = [*(ROOT / "hsvit_ds").rglob("*.py"), *(ROOT / "kernels/hsvit_kernels").rglob("*.py")]


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(a.b.c, the call) of every call of a name in a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_in_the_package_unpickles_but_a_file_that_is_trusted() -> None:
    unpicklers = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    loaders = []
    for path in PACKAGES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not unpicklers & {name.partition(".")[0] for name in names}, path
        for name, call in calls(path):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if name.endswith(("torch.load", "torch.hub.load", "jit.load")):
                loaders.append((path.name, options["weights_only"]))
            if name in ("np.load", "numpy.load"):
                assert options["allow_pickle"] == "False", path
    assert loaders == [("weights.py", "not trust")]


def test_nothing_in_the_package_unpacks_a_tar() -> None:
    names = {name.rpartition(".")[2] for path in PACKAGES for name, _ in calls(path)}
    assert not names & {"extractall", "extract", "unpack_archive"}


class Hostile:
    """Its unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def run_import(file: Path, *more: str) -> Any:
    out = str(file.with_suffix(".safetensors"))
    return CliRunner().invoke(
        app, ["import", str(file), "-o", out, "--smallest", "0.25", "--granularity", "0.25", *more]
    )


def as_import(file: Path) -> None:
    result = run_import(file)
    assert result.exit_code == 2
    raise RefusedError(result.stderr.removeprefix("hsvit: error: ").removesuffix("\n"))


def as_model(file: Path) -> nn.Module:
    config = timm_models.Config(name="test_resnet", weights=str(file))
    return config.build(image_size=32, channels=3, classes=5)


def as_backbone(file: Path) -> nn.Module:
    return backbone.Backbone(backbone.Config(name="test_resnet", weights=str(file)), image_size=32, channels=3)


def as_teacher(file: Path) -> nn.Module:
    from hsvit_ds.data.sets import photographs

    return teacher.load(teacher.Config(name="timm/test_resnet", weights=str(file)), photographs(32, 5))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("read", [as_import, as_model, as_backbone, as_teacher])
def test_a_file_that_would_run_code_is_refused_and_does_not(
    read: Callable[[Path], object], zipped: bool, tmp_path: Path
) -> None:
    file, made = tmp_path / "weights.pth", tmp_path / "made"
    torch.save({"model": {}, "more": Hostile(made)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(RefusedError) as caught:
        read(file)
    assert not made.exists()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{file}: is not unpickled, as it calls posix.mkdir and could run any code here; if you")
    assert ("add --trust" in message) == (read is as_import)


def test_weights_that_timm_downloads_are_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm.models._hub as hub

    file, made = tmp_path / "pytorch_model.bin", tmp_path / "made"
    torch.save({"model": Hostile(made)}, file)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(file))
    monkeypatch.setattr(hub, "_get_safe_alternatives", lambda _: [])
    with pytest.raises(RefusedError, match=r"timm cannot get the weights .* \(weights_only=True blocked loading"):
        timm_models.create("model.name", "test_resnet", weights="default", classes=5, channels=3, image_size=32)
    assert not made.exists()


def test_trust_unpickles_with_one_warning(tmp_path: Path) -> None:
    file, made = tmp_path / "scala.pth", tmp_path / "made"
    torch.save({**scala_weights()[1], "more": Hostile(made)}, file)
    result = run_import(file, "--trust")
    assert result.exit_code == 0, result.output
    assert made.exists()
    assert result.stderr == f"hsvit: warning: {file}: unpickled by --trust, with any code in it\n"
    assert load_model(file.with_suffix(".safetensors")).config.embedding == 128


@pytest.mark.heavy
@pytest.mark.parametrize("whole", [True, False])
def test_the_command_in_the_refusal_keeps_the_tensors(whole: bool, tmp_path: Path) -> None:
    import timm

    theirs = timm.create_model("test_resnet", num_classes=5)
    file = tmp_path / "the weights.pth"
    torch.save(theirs if whole else {"model": theirs.state_dict(), "scaler": theirs.bn1}, file)
    with pytest.raises(RefusedError, match=r"as it calls (timm|torch)\.") as caught:
        as_backbone(file)
    found = re.search(r"keep its tensors alone \((.*)\) and take (.*)$", str(caught.value))
    assert found is not None
    command = found[1].replace("python", sys.executable, 1)
    assert subprocess.run(command, shell=True, cwd=tmp_path, check=False).returncode == 0
    net = as_backbone(Path(found[2])).net
    assert torch.equal(net.state_dict()["conv1.0.weight"], theirs.state_dict()["conv1.0.weight"])


def test_the_arguments_in_a_deits_checkpoint_need_no_trust(tmp_path: Path) -> None:
    torch.save({**scala_weights()[1], "args": Namespace(lr=1e-3, opt=["adamw"])}, tmp_path / "deit.pth")
    assert run_import(tmp_path / "deit.pth").exit_code == 0


# Elsewhere: what other tests do with torch breaks its saving in their process.
TORCHSCRIPT = "import sys, torch; torch.jit.script(torch.nn.Linear(2, 2)).save(sys.argv[1])"


@pytest.mark.parametrize(
    "write",
    [
        lambda file: subprocess.run([sys.executable, "-c", TORCHSCRIPT, str(file)], check=True),
        lambda file: file.write_text("<html>not found</html>"),
        lambda file: file.write_bytes(b""),
    ],
    ids=["TorchScript", "a page", "empty"],
)
def test_a_file_without_weights_is_one_line_that_does_not_recommend_to_unpickle(
    write: Callable[[Path], object], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    file = tmp_path / "weights.pth"
    write(file)
    recwarn.clear()
    with pytest.raises(RefusedError, match="not a readable weights file") as caught:
        read_foreign(file)
    assert "\n" not in str(caught.value)
    assert "False" not in str(caught.value)
    assert not recwarn


def of_data(root: str, **shards: str) -> dict[str, Any]:
    data = {"name": "tiny", "classes": 10, "image_size": 32, "root": root, "shards": shards}
    return {"model": {"kind": "hsvit", "variant": "C2A2"}, "data": data}


@pytest.mark.parametrize(
    ("root", "shards"),
    [
        ("pipe:touch MADE; cat", {}),
        ("", {"val": "pipe:touch MADE; cat /x/{0..3}.tar"}),
        ("/x", {"train": "a.tar", "val": "https://host/a.tar::pipe:touch MADE; cat /x/a.tar"}),
        ("https://host", {"val": "{https://host/x/a.tar,pipe:touch MADE; cat /x/a.tar}"}),
        ("pipe:touch MADE; cat", {"val": "a.tar"}),
    ],
)
def test_a_checkpoint_does_not_bring_a_command(
    root: str, shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, *patterns = (text.replace("MADE", f"{tmp_path}/made") for text in (root, *shards.values()))
    table = of_data(root, **dict(zip(shards, patterns, strict=True)))
    run = LoadedRun(nn.Identity(), table, Position(0, 0, 0), ())  # type: ignore[arg-type]
    monkeypatch.setattr(saved, "load_run", lambda folder, ema, checkpoint: run)
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path)])
    assert result.exit_code == 2
    assert "which is not run because a checkpoint says so: 'pipe:touch" in result.stderr
    moved = saved.open_run(tmp_path, root="pipe:cat https://here/x").recipe.data
    assert moved.root == "pipe:cat https://here/x"
    assert all(url.startswith("pipe:cat https://here/x/a.tar") for urls in moved.urls.values() for url in urls)
    assert saved.open_run(tmp_path, root="/x").recipe.data.commands == []
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_brings_no_part_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root is a person's, the names of the shards are not."""
    run = LoadedRun(nn.Identity(), of_data("/x", val=f"a.tar; touch {tmp_path.name}"), Position(0, 0, 0), ())  # type: ignore[arg-type]
    monkeypatch.setattr(saved, "load_run", lambda folder, ema, checkpoint: run)
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--root", "pipe:cat /x"])
    assert result.exit_code == 2
    assert "is not the plain name of a tar" in result.stderr


@pytest.mark.parametrize(
    "table",
    [
        of_data("https://me:s3cret@host/set"),
        of_data("https://s3cret@host/set"),
        of_data("pipe:curl https://me:s3cret@host/set"),
        of_data("https://host/set?X-Amz-Signature=s3cret"),
        of_data("", train="https://me:s3cret@host/{0..3}.tar"),
        of_data("", train="https://host/a.tar::https://s3cret@host/b.tar"),
        of_data("", train="{https://host/a.tar,pipe:curl https://me:s3cret@host/b.tar}"),
        of_data("", train="pipe:cat /x/a.tar::https://host/b.tar?X-Amz-Signature=s3cret"),
        of_data("/set", train="a{.tar::https://host/b.tar?X-Amz-Signature=s3cret"),
        of_data("/set") | {"tracking": {"uri": "https://me:s3cret@host"}},
        of_data("/set") | {"tracking": {"uri": "postgresql://host/db?user=me&password=s3cret"}},
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(table: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match="would be saved with the run") as caught:
        recipes.from_table(table, "here")
    assert "s3cret" not in str(caught.value)


class Private(SimpleHTTPRequestHandler):
    """Files for who knows the password."""

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        if self.headers["Authorization"] == f"Basic {base64.b64encode(b'me:s3cret').decode()}":
            super().do_GET()
        else:
            self.send_error(401)


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture
def private(tmp_path: Path) -> Iterator[str]:
    """URL of a set that asks for a password."""
    folder = data_set(tmp_path / "set", train=24, val=4, shards=1)
    described(folder, ["tiny-train-0000.tar"], [24])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Private, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@needs_curl
def test_a_password_can_stay_in_netrc(private: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = next(islice(iter(streamed(f"pipe:curl -sSfn {private}")), 1))
    assert (found.labels >= 0).all()


@pytest.mark.heavy
@needs_curl
def test_a_secret_of_the_environment_is_not_kept_with_a_run(private: str, tmp_path: Path) -> None:
    secrets = {"KEY": "me:s3cret", "MLFLOW_TRACKING_PASSWORD": "s3cret"}
    arguments = ["recipes/digits/hsvit.toml", *SMALL, "data.name=tiny", "data.classes=10", "data.image_size=32"]
    arguments += [f'data.root=pipe:curl -sSfu "$KEY" {private}', "data.workers=0", "augment.shift=0", "run.epochs=1"]
    arguments += [
        "data.test=val",
        "run.global_batch=8",
        "grid.submodule_ranks=1",
        f"run.root={tmp_path}/runs",
        "tracking.mlflow=true",
    ]
    command = [sys.executable, "-m", "hsvit_ds.train", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(**secrets), capture_output=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"recipe.toml", "metrics.jsonl", "mlflow.db", "manifest.json"} <= {path.name for path in files}
    assert any(b"$KEY" in path.read_bytes() for path in files)
    for path in files:
        assert b"s3cret" not in path.read_bytes(), path
    assert b"s3cret" not in done.stdout + done.stderr


LISTENING = """
import json, os
from pathlib import Path
from hsvit_ds.grid.grid import Config, Grid

grid = Grid(Config(submodule_ranks=2), 2)
mine = set()
for entry in os.listdir("/proc/self/fd"):
    try:
        mine.add(os.readlink(f"/proc/self/fd/{entry}"))
    except FileNotFoundError:  # that of the folder itself
        pass
found = []
for table in ("tcp", "tcp6"):
    for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
            found.append(fields[1])
print("listening", json.dumps(found), flush=True)
grid.close()
"""


@pytest.mark.heavy
def test_the_ranks_meet_on_one_interface_alone() -> None:
    port, ranks = free_port(), []
    for rank in range(2):
        launcher = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place = {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(port)}
        command, env = [sys.executable, "-c", LISTENING], environment(**launcher, **place)
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    found = [json.loads(re.search(r"listening (.*)", output)[1]) for output in outputs]  # type: ignore[index]
    assert f"0200007F:{port:04X}" in found[0]
    for socket in [*found[0], *found[1]]:
        assert set(socket.partition(":")[0]) != {"0"}, f"{socket} is open on every interface"
