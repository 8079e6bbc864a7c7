"""Where a process stands among others, as what started it says. Nothing is started here."""

import argparse
import os
import socket
from types import SimpleNamespace

import pytest

from capjax.commands import distributed, runtime
from capjax.errors import UserError
from capjax.training.peers import Peers

OF_CLUSTERS = ("SLURM", "OMPI_", "JAX_", "TPU_", "MEGASCALE", "KUBERNETES", "JOB_", "CUDA_")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    for name in os.environ:
        if name.startswith(OF_CLUSTERS):
            monkeypatch.delenv(name)


def place(*flags: str, together: bool = True, environ=None, monkeypatch=None):
    for name, value in (environ or {}).items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    runtime.add_arguments(parser)
    return distributed.find_place(parser.parse_args(flags), together)


SLURM = {  # srun -N2 --ntasks-per-node=2, as it comes to the fourth task
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
ALONE = {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}
SHELL = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.1.2.3:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}


def test_a_step_of_slurm(monkeypatch):
    found = place(environ=SLURM, monkeypatch=monkeypatch)
    assert found.coordinator.startswith("node007:")
    assert found[1:] == (4, 3, [1])  # a GPU for each task of a machine
    assert place("--coordinator=other:99").coordinator == "other:99"  # flags win, one by one
    assert place("--process_id=1").process_id == 1
    assert place("--num_processes=1") is None
    assert place(together=False) is None  # a command that knows of no others
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    assert place().coordinator == "node007:1234"


@pytest.mark.parametrize(
    ("change", "local"),
    [
        (ALONE, None),  # a task on each machine has all that is there
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2),2"}, [1]),
        ({"SLURM_GPUS_PER_TASK": "2"}, None),  # bound by Slurm: it sees no others
        ({"CUDA_VISIBLE_DEVICES": "3"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [1]),
    ],
)
def test_the_gpus_of_a_task(change, local, monkeypatch):
    assert place(environ=SLURM | change, monkeypatch=monkeypatch).local_device_ids == local


def test_a_shell_or_a_script_in_an_allocation_is_alone(monkeypatch):
    assert place(environ=SLURM | SHELL, monkeypatch=monkeypatch) is None
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    assert place() is None


def test_open_mpi(monkeypatch):
    found = place(environ=OPEN_MPI, monkeypatch=monkeypatch)
    assert found.coordinator.startswith("10.1.2.3:")
    assert found[1:] == (4, 2, None)
    # mpirun within an allocation: its own task on each machine is Slurm's step
    assert place(environ=SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, monkeypatch=monkeypatch) == found
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert place() is None


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX"])
def test_one_of_several_never_trains_alone(variable, monkeypatch):
    # Open MPI 5, and a Kubernetes job without JAX's package, do not say where process 0 is.
    with pytest.raises(UserError, match=rf"{variable}=2: one of several.*JAX_NUM_PROCESSES"):
        place(environ={variable: "2"}, monkeypatch=monkeypatch)
    named = {
        "JAX_COORDINATOR_ADDRESS": "job-0:8476",
        "JAX_NUM_PROCESSES": "3",
        "JAX_PROCESS_ID": "2",
    }
    assert place(environ=named, monkeypatch=monkeypatch) == ("job-0:8476", 3, 2, None)
    assert place("--num_processes=1") is None


def test_two_slices_of_tpus_on_gke(monkeypatch):
    for module in ("cloud_tpu_cluster", "cluster"):
        monkeypatch.setattr(f"jax._src.clusters.{module}.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.1")
    environ = {
        "TPU_WORKER_HOSTNAMES": "a-0,a-1,a-2,a-3",
        "TPU_WORKER_ID": "2",
        "TPU_SKIP_MDS_QUERY": "1",  # no machine here answers JAX's question where it is
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "job-slice-0-0.job:8080",
    }
    found = place(environ=environ, monkeypatch=monkeypatch)
    assert found == ("job-slice-0-0.job:8482", 8, 6, None)
    monkeypatch.setenv("TPU_WORKER_ID", "none")  # what JAX cannot read is said in one line
    with pytest.raises(UserError, match=r"GkeTpu seems to have started this process, but .*none"):
        place()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--coordinator=a:1"], "--num_processes=None"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "0 to the number less 1"),
        (["--coordinator=a", "--num_processes=2", "--process_id=0"], "expected HOST:PORT"),
        (["--initialization_timeout=0"], "--initialization_timeout=0.0: expected"),
        (["--heartbeat_timeout=0"], "--heartbeat_timeout=0: expected at least 1"),
    ],
)
def test_half_an_answer_is_none(flags, words):
    with pytest.raises(UserError, match=words):
        place(*flags)


def test_the_code_is_compared_by_its_bytes(tmp_path, monkeypatch):
    ours = distributed._versions()["capjax"]
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr("capjax.__file__", str(tmp_path / "__init__.py"))
    assert distributed._versions()["capjax"] != ours


def test_other_devices_are_refused_by_name_and_good_ones_are_shown_once(monkeypatch, capfd):
    def devices(*of_processes: list[str]) -> None:
        found = [
            SimpleNamespace(process_index=i, device_kind=kind)
            for i, kinds in enumerate(of_processes)
            for kind in kinds
        ]
        monkeypatch.setattr("jax.devices", lambda: found)

    monkeypatch.setattr(distributed, "_peers", Peers(hosts=("a", "b")))
    monkeypatch.setattr("jax.process_count", lambda: 2)
    devices(["H100"] * 8, ["H100"] * 8)
    distributed.check_devices()
    assert capfd.readouterr().err == "process 0 on a: 8 x H100\nprocess 1 on b: 8 x H100\n"
    for other, words in ((["H100"], "1 x H100"), (["A100"] * 8, "8 x A100"), ([], "no devices")):
        devices(["H100"] * 8, other)
        with pytest.raises(UserError, match=f"process 1 on b has {words}, process 0 on a has 8 x"):
            distributed.check_devices()
