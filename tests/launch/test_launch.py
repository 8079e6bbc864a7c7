"""The scripts and manifests of launch/: what they say, and that a launcher forwards and reports."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from capjax.commands import distributed
from capjax.errors import RunAgain

LAUNCH = Path(__file__).parents[2] / "launch"
MANIFESTS = sorted((LAUNCH / "gke").glob("*.yaml"))

# The fields of JobSet v1alpha2 and of what it holds that ours use: name -> type, or fields within.
POD_RULE = {
    "action": str,
    "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
    "onPodConditions": [{"type": str, "status": str}],
}
CONTAINER = {
    "name": str,
    "image": str,
    "args": [str],
    "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
    "ports": [{"containerPort": int}],
    "resources": {"limits": {"google.com/tpu": int, "nvidia.com/gpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {
        "cloud.google.com/gke-tpu-accelerator": str,
        "cloud.google.com/gke-tpu-topology": str,
    },
    "containers": [CONTAINER],
    "volumes": [{"name": str, "emptyDir": {"medium": str}}],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": str,
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [POD_RULE]},
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {
        "name": str,
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str},
    },
    "spec": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def unknown(value, schema, where: str = "") -> list[str]:
    if isinstance(schema, dict) and isinstance(value, dict):
        return [
            problem
            for key, part in value.items()
            for problem in (
                unknown(part, schema[key], f"{where}.{key}")
                if key in schema
                else [f"{where}.{key}"]
            )
        ]
    if isinstance(schema, list) and isinstance(value, list):
        return [x for part in value for x in unknown(part, schema[0], f"{where}[]")]
    return [] if isinstance(schema, type) and type(value) is schema else [where]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_has_fields_that_there_are_and_restarts_what_was_stopped(path):
    jobset = yaml.safe_load(path.read_text())
    assert unknown(jobset, JOBSET) == []
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # The whole fails at once, with the reason for which the JobSet starts it again.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    (again,) = jobset["spec"]["failurePolicy"]["rules"]
    assert again["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert again["onJobFailureReasons"] == ["PodFailurePolicy"]
    codes, conditions = job["podFailurePolicy"]["rules"]
    assert codes["action"] == conditions["action"] == "FailJob"
    assert codes["onExitCodes"]["values"] == [RunAgain.status]
    assert codes["onExitCodes"]["containerName"] == container["name"]
    assert conditions["onPodConditions"][0]["type"] == "DisruptionTarget"
    names = {variable["name"]: variable.get("value") for variable in container.get("env", [])}
    if names:
        assert int(names["JAX_NUM_PROCESSES"]) == job["parallelism"] * replicated["replicas"]
        host = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
        port = container["ports"][0]["containerPort"]
        assert names["JAX_COORDINATOR_ADDRESS"] == f"{host}:{port}"
        assert "JAX_PROCESS_ID" in names


def test_the_check_above_sees_what_it_should():
    jobset = yaml.safe_load(MANIFESTS[0].read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["parallelism"] = "4"
    job["template"]["spec"]["containers"][0]["comand"] = ["x"]
    assert [name.rpartition(".")[2] for name in unknown(jobset, JOBSET)] == [
        "parallelism",
        "comand",
    ]


def run(script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


ARGUMENTS = ("l14", "train", "--config=cappa_l14", "--workdir=gs://b/a run")


def test_dry_runs_print_commands_that_keep_every_argument_whole():
    cloud = {"CLUSTER": "c", "TPU_TYPE": "v5litepod-16", "IMAGE": "i", "DRY_RUN": "1"}
    printed = run("gke/xpk.sh", *ARGUMENTS, **cloud).stdout
    words = run_words(printed)
    assert words[:3] == ["xpk", "workload", "create"]
    assert f"--restart-on-exit-codes={RunAgain.status}" in words
    command = words[-1].removeprefix("--command=exec ")
    assert run_words(command) == ["capjax", *ARGUMENTS[1:]]
    slice_ = {"ZONE": "z", "TYPE": "v6e-16", "RUNTIME": "r", "PACKAGE": "gs://b/p", "DRY_RUN": "1"}
    lines = [run_words(line) for line in commands(run("tpu_vm/queued.sh", *ARGUMENTS, **slice_))]
    assert [line[3:5] for line in lines] == [
        ["queued-resources", "create"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
        ["queued-resources", "delete"],
    ]
    last = next(word for word in lines[2] if word.startswith("--command="))
    assert run_words(last.partition("exec ")[2])[1:] == list(ARGUMENTS[1:])
    for script in ("gke/xpk.sh", "tpu_vm/queued.sh", "local.sh"):
        assert run(script).returncode == 2


def commands(result: subprocess.CompletedProcess) -> list[str]:
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def run_words(line: str) -> list[str]:
    """As a shell takes them apart."""
    script = f"printf '%s\\0' {line}"
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]


CHILD = """
trap 'echo "heard $JAX_PROCESS_ID"; exit 75' TERM
echo "place $JAX_PROCESS_ID $JAX_NUM_PROCESSES $JAX_LOCAL_DEVICE_IDS $JAX_COORDINATOR_ADDRESS"
case $1-$JAX_PROCESS_ID in fail-1) exit 3 ;; ok-*) exit 0 ;; esac
sleep 60 > /dev/null 2>&1 & wait
"""


def test_local_starts_all_and_says_which_failed():
    good = run("local.sh", "3", "bash", "-c", CHILD, "child", "ok")
    assert (good.returncode, good.stderr) == (0, "")
    lines = sorted(line.split()[1:] for line in good.stdout.splitlines())
    assert [line[:3] for line in lines] == [[str(i), "3", str(i)] for i in range(3)]
    assert len({line[3] for line in lines}) == 1
    assert re.fullmatch(r"127\.0\.0\.1:\d+", lines[0][3])
    bad = run("local.sh", "2", "bash", "-c", CHILD, "child", "fail", GRACE="0.5")
    assert bad.returncode == 3
    assert "process 1 of 2 ended with status 3" in bad.stderr
    assert "process 0 of 2 ended with status 137" in bad.stderr  # it did not follow


def test_local_forwards_a_signal_to_all():
    process = subprocess.Popen(
        ["bash", LAUNCH / "local.sh", "2", "bash", "-c", CHILD, "child", "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(2):
        assert process.stdout.readline().startswith("place")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert sorted(output.split("\n")[:-1]) == ["heard 0", "heard 1"]
    assert process.returncode == 75


def test_what_the_launchers_set_is_what_capjax_reads(monkeypatch):
    for script in ("local.sh", "gke/gpu.yaml"):
        text = (LAUNCH / script).read_text()
        for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            assert name in text and name in Path(distributed.__file__).read_text()
    sbatch = (LAUNCH / "slurm" / "train.sbatch").read_text()
    assert f"status == {RunAgain.status}" in sbatch
    assert re.search(r"^#SBATCH --signal=USR1@\d+$", sbatch, re.M)
