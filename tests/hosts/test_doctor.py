"""Hosts looked at before a run, through an ssh that runs commands here and lets a host answer what a test wants."""

from __future__ import annotations

import http.server
import json
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hsvit_ds.cli import app
from hsvit_ds.errors import RefusedError
from hsvit_ds.hosts import checks, doctor, probe
from hsvit_ds.hosts.checks import HERE
from hsvit_ds.hosts.cluster import Answer, Host
from hsvit_ds.hosts.doctor import Examination
from hsvit_ds.run import recipe

from ..ranks import ROOT, environment, finish, fork
from ..tars import data_set

DIGITS = ROOT / "recipes/digits/hsvit.toml"
SSH = """#!{python}
# Takes ssh's arguments. answers/HOST.json: "fails" [code, message], or what is changed in what the probe says there.
import json, pathlib, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[2:]
host, command = words[0], " ".join(words[1:])
path = pathlib.Path("{answers}") / (host + ".json")
changes = json.loads(path.read_text()) if path.exists() else {{}}
if "fails" in changes:
    code, message = changes["fails"]
    sys.exit(print(message, file=sys.stderr) or code)
done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True)
if "hsvit_ds.hosts.probe" not in command or done.returncode:
    sys.exit(print(done.stdout, end="") or done.returncode)
said = json.loads(done.stdout)
for key, value in changes.items():
    if key in said and isinstance(value, dict):
        said[key].update(value)
    elif key in said:
        said[key] = said[key] + value if key == "time" else value
print("Welcome to", host)
print(json.dumps(said))
"""


class Hosts:
    """Stand-ins: `answers` changes what a host says."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.answers = folder / "bin", folder / "answers"
        self.bin.mkdir()
        self.answers.mkdir()
        self.program("ssh", SSH.format(python=sys.executable, answers=self.answers))
        failing = 'echo "$@"; env; echo "b: hsvit: error: no meeting at 127.0.0.1:1; give up"; exit 1'
        self.program("pdsh", f"#!/bin/sh\n{failing}\n")

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def answer(self, host: str, **changes: Any) -> None:
        (self.answers / f"{host}.json").write_text(json.dumps(changes))


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    made = Hosts(tmp_path)
    (tmp_path / "work").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{made.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return made


def look(*names: str, path: Path | None = None, overrides: tuple[str, ...] = (), slots: int = 1) -> Examination:
    return doctor.examine([Host(name, slots) for name in names], path, list(overrides), quick=True)


def wrong(found: Examination) -> dict[tuple[str, str], str]:
    """{(host, check): what was found} of the hosts' red cells."""
    return {(cell.host, cell.check): cell.value for cell in found.cells if cell.remedy and cell.host != HERE}


def test_hosts_that_are_alike_are_right_and_meet_at_the_first(hosts: Hosts) -> None:
    found = look("a", "b", path=DIGITS)
    assert found.failures == []
    assert {cell.check for cell in found.cells if cell.host == "b"} == {
        *("ssh", "python", "packages", "code", "GPUs", "clock", "disk", "recipe", "run.root", "network")
    }
    assert found.master == "127.0.0.1"
    assert found.interface == "lo"
    with socket.socket() as server:
        server.bind(("", found.port))
    assert list(Path("runs").iterdir()) == []


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "password": ({"fails": [255, "me@b: Permission denied (publickey,password)."]}, "ssh", "asks for a password"),
    "off": ({"fails": [255, "ssh: connect to host off port 22: No route to host"]}, "ssh", "No route to host"),
    "stranger": ({"fails": [255, "Host key verification failed."]}, "ssh", "unknown host key"),
    "typo": ({"fails": [255, "ssh: Could not resolve hostname typo: Name not known"]}, "ssh", "no such name"),
    "no-folder": ({"fails": [97, "sh: cd: no such directory"]}, "python", "no folder"),
    "no-python": ({"fails": [98, ""]}, "python", f"no {sys.executable}"),
    "no-package": ({"fails": [1, "python: No module named hsvit_ds"]}, "python", "No module named hsvit_ds"),
    "broken": ({"fails": [1, "SyntaxError: invalid syntax"]}, "python", "SyntaxError"),
    "old-python": ({"python": "3.10.2"}, "python", f"3.10.2, not {platform.python_version()}"),
    "old-torch": ({"packages": {"torch": "2.10.0"}}, "packages", f"torch 2.10.0, not {version('torch')}"),
    "no-mlflow": ({"packages": {"mlflow": "missing"}}, "packages", "mlflow missing, not"),
    "old-code": ({"code": "0123456789abcdef"}, "code", "0123456789ab, not"),
    "other-gpu": ({"gpus": ["A100, 40960 MiB, 550"]}, "GPUs", "1 x A100, 40960 MiB, 550, not none"),
    "broken-gpu": ({"gpu_error": "NVIDIA-SMI has failed"}, "GPUs", "NVIDIA-SMI has failed"),
    "ahead": ({"time": 75}, "clock", "+"),
    "behind": ({"time": -3600}, "clock", "-3"),
    "full": ({"free": 2**20}, "disk", "0.00098 GiB free, 0.0"),
    "no-recipe": ({"files": {str(DIGITS): {}}}, "recipe", f"{DIGITS} is missing"),
    "old-recipe": ({"files": {str(DIGITS): {str(DIGITS): "0"}}}, "recipe", f"{DIGITS} is not the same"),
    "own-disk": ({"met": {"error": "No such file or directory"}}, "run.root", "No such file"),
    "one-way": ({"met": {"wrote": "elsewhere"}}, "run.root", "does not come here"),
    "other-card": ({"interface": "ens3", "named": "127.0.1.1"}, "network", "ens3, elsewhere lo"),
}


def test_what_is_wrong_on_a_host_is_told_of_that_host_alone(hosts: Hosts) -> None:
    for host, (changes, _, _) in FAULTS.items():
        hosts.answer(host, **changes)
    found = look("right", *FAULTS, path=DIGITS)
    assert set(wrong(found)) == {(host, check) for host, (_, check, _) in FAULTS.items()}
    for host, (_, check, value) in FAULTS.items():
        assert value in wrong(found)[host, check]
        (line,) = [line for line in found.failures if line.startswith(f"{host}: {check}: ")]
        assert "; " in line
    assert not Path(doctor.ENVIRONMENT).exists()


def test_clocks_are_measured_against_this_machine(hosts: Hosts) -> None:
    hosts.answer("a", time=500)
    (value,) = wrong(look("a")).values()
    assert 490 < int(value.removesuffix(" s")) < 510
    offsets = {"a": checks.CLOCKS - 1, "b": 1 - checks.CLOCKS, "c": checks.CLOCKS + 1}
    assert [cell.host for cell in checks.clocks(offsets) if cell.remedy] == ["c"]


def test_a_first_host_with_another_version_is_the_odd_one_among_three(hosts: Hosts) -> None:
    hosts.answer("a", packages={"torch": "2.10.0"})
    assert list(wrong(look("a", "b", "c"))) == [("a", "packages")]


def test_slots_are_compared_with_the_gpus_that_nvidia_smi_lists(hosts: Hosts) -> None:
    hosts.program("nvidia-smi", "#!/bin/sh\nyes 'NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15' | head -n 2\n")
    found = look("a", slots=2)
    assert "2 x NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15" in {cell.value for cell in found.cells}
    assert not found.failures
    (line,) = look("a", slots=3).failures
    assert line.startswith("a: GPUs: 2 x NVIDIA H100")
    assert line.endswith("but slots=3; write slots=2 in the hostfile")
    hosts.program("nvidia-smi", "#!/bin/sh\necho 'Failed to initialize NVML'\nexit 18\n")
    assert wrong(look("a")) == {("a", "GPUs"): "Failed to initialize NVML"}


def test_weights_of_every_form_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/latest").write_text("step-00000001")
    (tmp_path / "export").mkdir()
    (tmp_path / "export/model.safetensors").write_bytes(b"weights")
    for kind in ("hsvit", "scala"):
        for weights, looked_at in {
            "deit.pth": "deit.pth",
            "run": "run/checkpoints/latest",
            "export": "export/model.safetensors",
            "nowhere": "nowhere",
        }.items():
            given = recipe.read(ROOT / f"recipes/digits/{kind}.toml", [f"model.weights={tmp_path / weights}"])
            assert checks.weight_files(given) == [str(tmp_path / looked_at)]


def test_shards_indexes_and_weights_must_be_there_and_alike(hosts: Hosts, tmp_path: Path) -> None:
    data, student = tmp_path / "data", tmp_path / "model.pth"
    data.mkdir()
    task = f'task={{kind="scala", teacher={{name="timm/resnet18", weights="{student}"}}}}'
    overrides = (f"data.root={data}", "data.name=cifar10", "model.widths.smallest=0.25", task)
    path = ROOT / "recipes/digits/scala.toml"
    found = wrong(look("a", path=path, overrides=overrides))
    assert found == {
        ("a", "data"): f"{data}/*.index.safetensors is missing",
        ("a", "weights"): f"{student} is missing",
    }
    for split in ("train", "test"):
        (data / f"{split}.index.safetensors").write_bytes(b"index")
    student.write_bytes(b"weights")
    train, test = (str(data / f"{split}.index.safetensors") for split in ("train", "test"))
    hosts.answer("b", files={f"{data}/*.index.safetensors": {train: "other"}})
    assert wrong(look("a", "b", path=path, overrides=overrides)) == {
        ("b", "data"): f"{test} is missing, {train} is not the same"
    }
    data.rename(tmp_path / "elsewhere")
    found = wrong(look("a", path=path, overrides=overrides))
    assert found["a", "data"].startswith(f"{data} is missing")


def test_folders_of_named_shards_must_be_there_too(hosts: Hosts, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    patterns = f'{{train="train/{{0..3}}.tar::more/{{4..5}}.tar", val="{tmp_path}/held out/*/a.tar", test="v.tar"}}'
    overrides = ("data.name=cifar10", f"data.root={data}", f"data.shards={patterns}")
    (data / "train.index.safetensors").write_bytes(b"index")
    missing = f"{data}/more is missing, {tmp_path}/held out is missing"
    assert wrong(look("a", path=DIGITS, overrides=overrides)) == {("a", "data"): missing}
    (data / "more").mkdir()
    (tmp_path / "held out").mkdir()
    assert wrong(look("a", path=DIGITS, overrides=overrides)) == {}
    urls = 'data.shards={train="https://host/a.tar", val="pipe:cat /x/b.tar", test="https://host/c.tar"}'
    assert checks.data_files(recipe.read(DIGITS, ["data.name=cifar10", urls])) == []
    told = recipe.read(DIGITS, ["data.name=cifar10", urls, f"data.root={data}"])
    assert checks.data_files(told) == [f"{data}/_info.json"]


def test_an_mlflow_server_must_answer(hosts: Hosts) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response({"/health": 200}.get(self.path, 404))
            self.end_headers()

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    assert look("a", path=DIGITS, overrides=(f"tracking.uri={uri}",), slots=2).failures == []
    server.shutdown()
    server.server_close()
    (line,) = look("a", path=DIGITS, overrides=(f"tracking.uri={uri}/",), slots=2).failures
    assert line.startswith(f"a: MLflow: {uri}/: ")
    assert "Connection refused" in line


def test_the_disk_must_take_the_checkpoints_of_the_recipe() -> None:
    read = recipe.read(DIGITS, ["checkpoint.keep_last=5"])
    _, plan = recipe.resolve(read, 2)
    assert checks.checkpoint_bytes(read) == 7 * 12 * plan.parameters


def test_hosts_without_a_way_to_the_first_are_told() -> None:
    there = {"address": "10.0.0.1", "interface": "eth0", "port": 1, "named": "127.0.1.1"}
    cells = checks.ways({"a": there, "b": {"error": "no way to 10.0.0.1 (Network is unreachable)"}})
    assert [cell.host for cell in cells if cell.remedy] == ["b"]
    cells = checks.ways({"a": there, "b": there | {"interface": "eth1", "named": "10.0.0.1"}})
    assert [cell.host for cell in cells if cell.remedy] == ["a"]  # gloo would announce 127.0.1.1 there


def test_a_first_host_that_is_this_machine_is_met_at_an_address_that_others_reach(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str] = {}

    def answers(there: list[Host], command: list[str], given: str = "", timeout: float = 60) -> dict[str, Answer]:
        asked.update({host.name: json.loads(given)["towards"] for host in there})
        way = {"address": "10.0.0.1", "interface": "eth0", "port": 5, "named": ""}
        return {host.name: Answer(0, json.dumps(way), "") for host in there}

    monkeypatch.setattr(doctor, "on_all", answers)
    found = Examination()
    here, there = Host("here", 1), Host("there", 1)
    doctor._find_ways(found, [here, there], {"here": "127.0.1.1", "there": "10.0.0.2"})
    assert asked == {"here": "10.0.0.2", "there": "10.0.0.1"}
    assert (found.master, found.port, found.interface) == ("10.0.0.1", 5, "eth0")


def test_the_environment_of_the_ranks_is_one_that_the_launcher_can_read(hosts: Hosts, tmp_path: Path) -> None:
    path, home = Path(doctor.ENVIRONMENT).absolute(), tmp_path / "home" / doctor.ENVIRONMENT
    home.write_text("A=b\n# mine\n")
    path.write_text("# mine\n\nNCCL_DEBUG=INFO\nexport A=b\nNCCL_SOCKET_IFNAME=eth9\nEMPTY=\nX=a=b c")
    found = look("a")
    cores = len(os.sched_getaffinity(0))
    assert path.read_text().splitlines() == [
        *("NCCL_DEBUG=INFO", "EMPTY=", "X=a=b c"),
        *(f"OMP_NUM_THREADS={cores}", "NCCL_SOCKET_IFNAME=lo", "GLOO_SOCKET_IFNAME=lo"),
    ]
    wrong_lines = [*(f"{path}, line {n}" for n in (1, 2, 4)), f"{home}, line 2"]
    assert [warning.split(":")[0] for warning in found.warnings] == wrong_lines
    before = path.read_text()
    assert len(look("a").warnings) == 1
    assert (path.read_text(), home.read_text()) == (before, "A=b\n# mine\n")


def test_interfaces_of_different_names_leave_the_variables_to_the_user(hosts: Hosts) -> None:
    hosts.answer("b", interface="ens3")
    found = look("a", "b")
    assert (found.failures, found.interface) == ([], "")
    assert "IFNAME" not in Path(doctor.ENVIRONMENT).read_text()


def test_the_probe_imports_nothing_heavy_and_what_a_shell_prints_before_it_is_passed_over() -> None:
    request = {"files": [], "root": ".", "shared": "", "mlflow": ""}
    script = (
        "import sys; from hsvit_ds.hosts import probe; probe.main(); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(request), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["packages"]) == set(probe.PACKAGES)


@pytest.mark.heavy
def test_the_all_reduce_checks_its_sum_and_the_first_rank_tells_what_it_took() -> None:
    printed = finish(fork("hsvit_ds.hosts.bandwidth", [], 2))
    (found,) = re.findall(r"^\{.*\}$", printed, re.M)
    assert json.loads(found).keys() == {"backend", "ranks", "bandwidth", "latency"}
    assert json.loads(found)["ranks"] == 2
    script = "from hsvit_ds.grid import grid; from hsvit_ds.hosts import bandwidth; "
    script += "grid.Grid.sum_over_replicas = lambda _, x: x.mul_(2); "
    done = subprocess.run(
        [sys.executable, "-c", f"{script} bandwidth.main()"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "the sum of 1 to 1 over the ranks came out as 2" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("# nothing\n", "names no host"),
        ("a slots=2\nb\n", "line 2: `b` is not `NAME slots=N`"),
        ("a slots=x\n", "line 1"),
        ("a slots=0\n", "a has slots=0"),
        ("a slots=2\n\na slots=1 # again\n", "line 3: a is listed twice"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_its_line(hosts: Hosts, text: str | None, words: str) -> None:
    if text is not None:
        Path("hostfile").write_text(text)
    done = CliRunner().invoke(app, ["doctor", "hostfile"])
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_would_stop_the_launcher_here_is_refused(hosts: Hosts) -> None:
    with pytest.raises(RefusedError, match=r"run.root = /proc/no: cannot be written here"):
        look("a", path=DIGITS, overrides=("run.root=/proc/no",))
    with pytest.raises(RefusedError, match=r"data.root is not set"):
        look("a", path=DIGITS, overrides=("data.name=cifar10",))


def test_the_command_prints_a_table_and_a_remedy_for_each_fault(hosts: Hosts) -> None:
    names = [f"n{number}" for number in range(6)]
    Path("hostfile").write_text("".join(f"{name} slots=1\n" for name in names))
    for name in names:
        hosts.answer(name, free=0 if name == "n3" else 2**40)
    done = CliRunner().invoke(app, ["doctor", "hostfile"])
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert "6 hosts, 6 ranks, rank 0 at 127.0.0.1" in lines[0]
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in lines]
    assert ["clock", "within 60 s", "all hosts"] in rows
    assert ["disk", "1,000 GiB free", "5 hosts"] in rows
    assert ["disk", "WRONG: 0 GiB free, 1 GiB needed", "n3"] in rows
    assert lines[-1].startswith("n3: disk: 0 GiB free, 1 GiB needed; make room on the file system of ")
    assert "all-reduce" not in done.stdout


@pytest.mark.heavy
def test_a_failed_all_reduce_is_told_with_what_a_rank_said_and_no_secret(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    Path(doctor.ENVIRONMENT).write_text("WANDB_API_KEY=hunter3\nNCCL_IB_DISABLE=1\n")
    Path("hostfile").write_text("a slots=1\nb slots=1\n")
    done = CliRunner().invoke(app, ["doctor", "hostfile", "--debug"])
    assert done.exit_code == 1, done.output
    last = done.stdout.splitlines()[-1]
    assert last.startswith("all hosts: all-reduce: b: no meeting at 127.0.0.1:1; open all TCP ports")
    assert " hsvit_ds.hosts.bandwidth" in done.stderr
    for variable in ("NCCL_IB_DISABLE=1", "GLOO_SOCKET_IFNAME=lo"):
        assert f"export {variable};" in done.stderr
    assert "hunter" not in done.output


def test_without_pdsh_the_hosts_are_looked_at_all_the_same(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("hostfile").write_text("a slots=1\nb slots=1\n")
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "pdsh" else which(name))
    done = CliRunner().invoke(app, ["doctor", "hostfile"])
    assert done.exit_code == 1
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in done.stdout.splitlines()]
    assert ["pdsh", "WRONG: not installed", "this machine"] in rows
    assert ["ssh", "answers", "all hosts"] in rows
    assert "all-reduce" not in done.stdout
    assert not Path(doctor.ENVIRONMENT).exists()


def test_what_training_would_refuse_is_found_before_it_starts(hosts: Hosts) -> None:
    assert look("a", "b", path=DIGITS).failures == []
    for overrides, said in (
        (("grid.submodule_ranks=4", "model.submodules=4"), "grid.submodule_ranks = 4 does not divide the 2 ranks"),
        (("run.global_batch=2000",), "run.global_batch = 2000 is more than the 1,150 training images"),
    ):
        (failure,) = look("a", "b", path=DIGITS, overrides=overrides).failures
        assert failure.startswith(f"{HERE}: training: {said}")


def test_what_the_doctor_wrote_is_said(hosts: Hosts) -> None:
    found = look("a", "b", path=DIGITS)
    assert found.wrote.startswith(f"wrote {Path(doctor.ENVIRONMENT).absolute()}, variables for every rank, which pins")
    assert "OMP_NUM_THREADS=" in found.wrote
    for line in Path(doctor.ENVIRONMENT).read_text().splitlines():
        assert line in found.wrote


def test_shared_memory_must_take_what_the_data_workers_hold_ready(hosts: Hosts, tmp_path: Path) -> None:
    data = data_set(tmp_path / "set", train=64, val=8)
    overrides = ("data.name=tiny", "data.classes=10", "data.image_size=128", f"data.root={data}", "data.test=val")
    overrides += ("data.workers=2", "data.eval_batch=36", "run.global_batch=64", "grid.submodule_ranks=1")
    needed = 2 * 2 * (36 + 32) * 3 * 128 * 128  # workers, batches of each, images, bytes of one
    hosts.answer("a", shared_memory=needed)
    hosts.answer("b", shared_memory=needed - 1)
    found = wrong(look("a", "b", path=DIGITS, overrides=overrides, slots=1))
    assert ("a", "shared memory") not in found
    assert ("b", "shared memory") in found
