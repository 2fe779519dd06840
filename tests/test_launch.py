"""Launch: devices under each launcher, the restart script, the checks before a run."""

import itertools
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import pytest
import yaml
from jax._src.clusters import ClusterEnv

from experiments.clusters import restart
from flm_jax.errors import RESTARTABLE, Exit, UserError
from flm_jax.runs import doctor
from flm_jax.runtime import clusters, processes
from flm_jax.runtime.stop import StopRequest
from tests.commands import ROOT, call, json_of

FILES = ROOT / "experiments" / "clusters"


def slurm(local, tasks, **more):
    """The environment of a task of a Slurm step on two nodes; this one is on the second node."""
    return {
        "SLURM_JOB_ID": "70001",
        "SLURM_STEP_NODELIST": "node[07-08]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x2)",
        "SLURM_NTASKS": str(2 * tasks),
        "SLURM_NODEID": "1",
        "SLURM_PROCID": str(tasks + local),
        "SLURM_LOCALID": str(local),
        **more,
    }


def open_mpi(local, tasks, **more):
    return {
        "OMPI_COMM_WORLD_SIZE": "16",
        "OMPI_COMM_WORLD_RANK": str(8 + local),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(tasks),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local),
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
        **more,
    }


EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE": "8"}
ALL = list(range(8))
MINE = {
    "one process per host": (slurm(0, 1, **EIGHT), ALL),
    "per host, only Slurm's count": (slurm(0, 1, SLURM_GPUS_ON_NODE="8"), ALL),
    "per host, nothing said": (slurm(0, 1), []),
    "per host, half of its GPUs": (slurm(0, 1, **EIGHT | {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}),
                                   [0, 1, 2, 3]),
    "one per GPU, all visible": (slurm(5, 8, **EIGHT), [5]),
    "one per GPU, each sees its own": (slurm(5, 8, **EIGHT | {"CUDA_VISIBLE_DEVICES": "0"}), [0]),
    "one per GPU, its own, no count": (slurm(5, 8, CUDA_VISIBLE_DEVICES="5"), [0]),
    "one per GPU, nothing said": (slurm(5, 8), [5]),
    "two per host, all visible": (slurm(1, 2, **EIGHT), [4, 5, 6, 7]),
    "two per host, each sees its four": (
        slurm(1, 2, **EIGHT | {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}), [0, 1, 2, 3]),
    "AMD": (slurm(0, 1, ROCR_VISIBLE_DEVICES="0,1,2,3"), [0, 1, 2, 3]),
    "no GPU": (slurm(0, 1, CUDA_VISIBLE_DEVICES=""), []),
    "Open MPI, per host": (open_mpi(0, 1, CUDA_VISIBLE_DEVICES="0,1"), [0, 1]),
    "Open MPI, per GPU": (open_mpi(3, 4, CUDA_VISIBLE_DEVICES="0,1,2,3"), [3]),
    "Open MPI inside Slurm": (open_mpi(1, 2, **slurm(0, 1, **EIGHT)), [4, 5, 6, 7]),
}  # fmt: skip


def told(monkeypatch, environment, group):
    """What JAX's own detection makes of what `joined` tells it: see `State.initialize` of jax."""
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **found: given.update(found))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(processes, "_LastWords", mock.Mock())
    with mock.patch.dict("os.environ", environment, clear=True):
        with processes.joined(group):
            pass
        return ClusterEnv.auto_detect_unset_distributed_params(
            *(given.get(name) for name in (
                "coordinator_address", "num_processes", "process_id", "local_device_ids",
                "cluster_detection_method", "initialization_timeout",
            ))
        )  # fmt: skip


@pytest.mark.parametrize(("environment", "mine"), MINE.values(), ids=MINE)
def test_every_process_uses_its_gpus_and_no_others(monkeypatch, environment, mine):
    """Fails where the devices are left to jax: it takes [SLURM_LOCALID], one GPU of eight."""
    address, count, index, ids = told(monkeypatch, environment, processes.Group(distributed=True))
    if "OMPI_COMM_WORLD_SIZE" in environment:
        assert (count, index) == (16, int(environment["OMPI_COMM_WORLD_RANK"]))
        assert address.startswith("10.96.0.1:")
    else:
        assert count == int(environment["SLURM_NTASKS"])
        assert index == int(environment["SLURM_PROCID"])
        assert address.startswith("node07:")
    assert ids == mine


def test_flags_instead_of_detection_use_the_same_gpus(monkeypatch):
    group = processes.Group("localhost:1234", 0, 2)
    *_, ids = told(monkeypatch, slurm(0, 1, **EIGHT), group)
    assert ids == ALL
    # The user's own choice, which jax reads itself.
    assert clusters.devices(slurm(0, 1, JAX_LOCAL_DEVICE_IDS="3")) == {}
    assert clusters.devices({"TPU_WORKER_HOSTNAMES": "a,b"}) == clusters.devices({}) == {}


def test_the_processes_of_a_host_share_its_gpus_exactly():
    """Whatever Slurm shows: together all GPUs, each to one process."""
    for tasks in (1, 2, 4, 8):
        each = 8 // tasks
        shared = [clusters.local_devices(slurm(i, tasks, **EIGHT)) for i in range(tasks)]
        assert sorted(itertools.chain(*shared)) == ALL
        for i in range(tasks):
            ids = ",".join(map(str, range(i * each, (i + 1) * each)))
            bound = slurm(i, tasks, **EIGHT | {"CUDA_VISIBLE_DEVICES": ids})
            assert clusters.local_devices(bound) == list(range(each))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (slurm(1, 3, **EIGHT), ("3 processes", "8 GPUs", "do not divide")),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ("Kubernetes", "flm_jax[k8s]")),
        (open_mpi(0, 1) | {"OMPI_MCA_orte_hnp_uri": None}, ("JAX_COORDINATOR_ADDRESS",)),
        ({"SLURM_JOB_ID": "1"}, ("no group was found", "srun")),
    ],
    ids=lambda x: "",
)
def test_a_group_that_cannot_be_found_is_one_line(monkeypatch, environment, words):
    environment = {name: value for name, value in environment.items() if value is not None}
    monkeypatch.setattr(processes, "_LastWords", mock.Mock())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    group = processes.Group(distributed=True, join_within=1)
    with (
        mock.patch.dict("os.environ", environment, clear=True),
        pytest.raises(UserError) as error,
        processes.joined(group),
    ):
        pass
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_launch_files_are_well_formed():
    for path in FILES.glob("*.sh"):
        assert path.stat().st_mode & 0o111
        subprocess.run(["bash", "-n", path], check=True)
    for path in FILES.glob("*.yaml"):
        kinds = [document["kind"] for document in yaml.safe_load_all(path.read_text())]
        assert kinds[-1] in ("JobSet", "Job")


# --- Restarts ----------------------------------------------------------------------------------


def lives(folder, statuses, **given):
    """Runs a command that ends with these statuses in turn; returns the last one and the lives."""
    file = folder / "statuses"
    file.write_text("".join(f"{status}\n" for status in statuses))
    command = f'n=$(head -n1 "{file}"); sed -i 1d "{file}"; echo >> "{folder}/lives"; '
    command += 'if [ "$n" -lt 0 ]; then kill "$n" $$; fi; exit "$n"'
    defaults = {"most": 10, "first": 0.0, "last": 0.0, "steady": 600.0}
    with mock.patch.object(signal, "signal"):  # the test's process keeps its handlers
        status = restart.run(["bash", "-c", command], **defaults | given)
    return status, (folder / "lives").read_text().count("\n")


@pytest.mark.parametrize(
    ("statuses", "end"),
    [
        ([Exit.LOST, Exit.PREEMPTED, -signal.SIGKILL, Exit.FAILED, Exit.OK], (0, 5)),
        ([Exit.LOST, Exit.MISTAKE, Exit.OK], (2, 2)),
        ([Exit.LOST, Exit.NUMERICS, Exit.OK], (70, 2)),
        ([Exit.INTERRUPTED, Exit.OK], (130, 1)),
        ([Exit.LOST] * 9, (75, 4)),  # gives up after 3 restarts
        ([-signal.SIGSEGV] * 9, (139, 4)),
    ],
)
def test_restarts_while_it_can_help(tmp_path, statuses, end):
    assert lives(tmp_path, statuses, most=3 if end[1] == 4 else 10) == end


def test_a_life_that_lasted_starts_the_count_again(tmp_path):
    assert lives(tmp_path, [75] * 6 + [0], most=2, steady=0.0) == (0, 7)


def test_statuses_are_told_apart():
    assert {Exit.OK, Exit.MISTAKE, Exit.GATE, Exit.INTERRUPTED}.isdisjoint(RESTARTABLE)
    assert {Exit.DAMAGE, Exit.NUMERICS, Exit.DISK}.isdisjoint(RESTARTABLE)
    page = (ROOT / "docs" / "clusters.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    listed = {int(row[1]): row[3].strip() for row in rows if row[3].strip() in ("yes", "no")}
    assert set(listed) == {*Exit, *RESTARTABLE}
    assert {status for status, again in listed.items() if again == "yes"} == set(RESTARTABLE)


@pytest.mark.parametrize(
    ("pausing", "number"),
    [(False, signal.SIGTERM), (True, signal.SIGTERM), (False, signal.SIGUSR1)],
)
def test_a_signal_stops_the_command_and_the_restarts(tmp_path, pausing, number):
    begun = tmp_path / "begun"
    body = "exit 75" if pausing else "trap 'exit 143' TERM USR1; while :; do sleep 0.01; done"
    script = pathlib.Path(restart.__file__)
    process = subprocess.Popen(
        [sys.executable, script, "--first=60", "--last=60", "bash", "-c",
         f"trap 'exit 143' TERM USR1; echo >> {begun}; {body}"],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if pausing:
        assert "restart 1 of 10 in 60 s" in process.stderr.readline()
    while not begun.exists():
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=20) == (75 if pausing else 143)
    assert begun.read_text() == "\n"
    process.stderr.close()


def test_a_second_sigterm_does_not_break_the_save():
    """A scheduler may send it to every process, and a launcher forwards it; Ctrl-C twice ends."""
    # A shell's background jobs, and so these tests in one, inherit that SIGINT is ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            assert stop.requested == signal.SIGTERM
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)


# --- flm doctor --------------------------------------------------------------------------------


def seen(process=0, host="a", devices=8, **more):
    return {
        "process": process,
        "host": host,
        "launcher": "slurm",
        "platform": "gpu",
        "kind": "H100",
        "devices": devices,
        "installed": 8,
        "versions": {"jax": "1"},
        "unreachable": [],
        **more,
    }


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ([seen(), seen(1, "b")], ()),
        ([seen(i, "a", 1) for i in range(8)], ()),
        ([seen(devices=1), seen(1, "b", 1)], ("host a: 1 of 8", "host b: 1 of 8")),
        ([seen(), seen(1, "b", 7)], ("process 1 sees 7 devices, but process 0 sees 8",)),
        ([seen(platform="cpu", devices=1)], ("computes on the CPU, and 8 acc",)),
        ([seen(), seen(1, "b", versions={"jax": "2"})], ("differ in versions (process 0",)),
        ([seen(), seen(1, "b", kind="A100")], ("differ in kind (process 0: H100",)),
        ([seen(), seen(1, "b", unreachable=["workdir /x: no"])], ("process 1 on b: workdir /x",)),
        ([seen(installed=0, platform="cpu")], ()),
    ],
    ids=lambda x: "",
)
def test_problems_are_one_line_each(group, words):
    counts = {one["process"]: one["devices"] for one in group}
    found = doctor.problems(group, counts)
    assert len(found) == len(words)
    for line, word in zip(found, words, strict=True):
        assert word in line and "\n" not in line


def test_installed_devices_are_counted(tmp_path):
    assert doctor.installed({}, tmp_path / "nothing") == 0
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert doctor.installed({}, tmp_path) == 2
    assert doctor.installed({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert doctor.installed({"SLURM_GPUS_ON_NODE": "4"}, tmp_path) == 4
    (tmp_path / "tpu" / "vfio").mkdir(parents=True)
    for name in ("0", "1", "vfio"):
        (tmp_path / "tpu" / "vfio" / name).touch()
    assert doctor.installed({}, tmp_path / "tpu") == 2


def test_files_are_checked_and_nothing_is_written(tmp_path):
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert doctor.unreachable("workdir", str(tmp_path / "new" / "run"), True) == ""
    assert doctor.unreachable("data.path", str(tmp_path / "file"), False) == ""
    for path, write in (("file/run", True), ("nothing", False)):
        line = doctor.unreachable("data.path", str(tmp_path / path), write)
        assert f"data.path {tmp_path / path}" in line and "\n" not in line
    assert sorted(tmp_path.rglob("*")) == before


def test_doctor_of_this_machine():
    result = json_of("doctor", "--config=tests/tiny_chain.py")
    assert result["devices"] == 8 and not result["problems"]
    assert result["meshes"] == [{"data": 2, "fsdp": 2, "tensor": 2}] * 2
    status, out, err = call("doctor", "--config=tests/tiny_chain.py", "--config.mesh.fsdp=3")
    assert status == 1 and "problem: config.mesh is data 2 x fsdp 3" in out
    assert err.startswith("flm doctor: config.mesh")
