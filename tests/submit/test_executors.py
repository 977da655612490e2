"""What NeMo-Run makes of a job: rendered, parsed, and run on this machine with two processes."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.distributed_run import REPOSITORY_DIR, free_port, kill_tree, run_script
from helpers.fake_slurm import FakeSlurm, directives
from helpers.prepared import write_data_set
from helpers.run_case import losses

pytestmark = pytest.mark.skipif(
    find_spec("nemo_run") is None, reason="NeMo-Run is not installed (the extra launch)"
)
KEY = "0123456789abcdef"


def training(folder: Path, steps: int = 4) -> list[str]:
    """A command of two processes; the data set is written."""
    tokens = write_data_set(folder / "tokens", 2, 4)
    arguments = f"""train_general.py --data_path {tokens} --model_path random:tiny
        --log_dir {folder / "run"} --tensor_model_parallel_size 2 --split_string 1,0,0
        --num_threads 1 --max_steps {steps} --save_every_n_steps {steps} --global_batch_size 2"""
    return arguments.split()


def render(folder: Path, flags: str, words: list[str]) -> str:
    """What --render prints, which holds no key."""
    finished = run_script(
        ["-m", "cosmos_posttrain.submit", *flags.split(), "--render", "--", *words],
        env={"NEMORUN_HOME": str(folder / "jobs"), "WANDB_API_KEY": KEY, "HF_TOKEN": KEY},
    )
    assert finished.returncode == 0, finished.stderr
    written = [p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file()]
    assert not any(KEY in text for text in [finished.stdout, *written])
    return finished.stdout


SLURM = "--executor slurm --account lab --partition gpu --time 01:00:00 --sbatch_option qos=high"
KUBERNETES = (
    "--executor kubernetes --container_image registry/image:1 --volume data:/data "
    "--secret keys --secret_env WANDB_API_KEY --secret_env HF_TOKEN --namespace lab"
)


def test_a_slurm_job_is_rendered(tmp_path: Path) -> None:
    words = ["train_general.py", "--config", "configs/train_12b_16gpu.yaml"]
    words += ["--data_path", "/data/my tokens", "--log_dir", "/runs/12b"]
    text = render(tmp_path, f"{SLURM} --nodes 2", words)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    options = directives(text)
    assert {name: options[name] for name in ("account", "partition", "qos", "time")} == {
        "account": "lab",
        "partition": "gpu",
        "qos": "high",
        "time": "01:00:00",
    }
    assert (options["nodes"], options["gpus-per-node"], options["ntasks-per-node"]) == (
        *("2", "8"),
        "1",
    )
    assert options["signal"] == "USR1@300"
    line = next(line for line in text.splitlines() if " torchrun " in line)
    assert "--rdzv-endpoint $head_node_ip:29500" in line
    assert "--nnodes 2 --nproc-per-node 8" in line
    assert shlex.split(line)[-len(words) :] == words


def test_a_slurm_job_in_a_container_is_rendered(tmp_path: Path) -> None:
    flags = f"{SLURM} --gpus_per_node 2 --container_image i.sqsh --container_mounts /d:/d,/r:/r"
    text = render(tmp_path, flags, training(tmp_path))
    line = next(line for line in text.splitlines() if " torchrun " in line)
    assert "--container-image i.sqsh --container-mounts /d:/d,/r:/r," in line
    assert "env --chdir=/workspace/cosmos_posttrain python -u train_general.py" in line


def test_a_train_job_is_rendered(tmp_path: Path) -> None:
    pytest.importorskip("kubernetes")
    words = training(tmp_path)
    flags = f"{KUBERNETES} --nodes 2 --gpus_per_node 1"
    body: dict[str, Any] = yaml.safe_load(render(tmp_path, flags, words))
    assert (body["apiVersion"], body["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert body["metadata"] == {"name": "cosmos-train", "namespace": "lab"}
    trainer = body["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 1)
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "1"}
    assert trainer["command"][-len(words) :] == words
    keys = [item for item in trainer["env"] if "valueFrom" in item]
    assert keys == [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": "keys", "key": name}}}
        for name in ("WANDB_API_KEY", "HF_TOKEN")
    ]
    pod = body["spec"]["podTemplateOverrides"][0]["spec"]
    claims = {
        item["persistentVolumeClaim"]["claimName"]: item["name"]
        for item in pod["volumes"]
        if "persistentVolumeClaim" in item
    }
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert mounts[claims["data"]] == "/data" and mounts["shm"] == "/dev/shm"


@pytest.mark.slow
@pytest.mark.distributed
def test_the_local_executor_trains(tmp_path: Path) -> None:
    """For real, through NeMo-Run; its exit code is the run's."""
    words = training(tmp_path)
    flags = ["-m", "cosmos_posttrain.submit", "--gpus_per_node", "2"]
    environment = {"NEMORUN_HOME": str(tmp_path / "jobs")}
    finished = run_script([*flags, "--", *words], env=environment, timeout_seconds=400)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(losses(tmp_path / "run")) == 4
    words[words.index("--model_path") + 1] = str(tmp_path / "absent")
    words[words.index("--log_dir") + 1] = str(tmp_path / "other")
    finished = run_script([*flags, "--", *words], env=environment, timeout_seconds=400)
    assert finished.returncode == 1
    assert "absent does not exist" in finished.stdout + finished.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_the_rendered_slurm_job_trains(tmp_path: Path) -> None:
    """Run as sbatch would run it; signalled, saved, queued again, and gone on with."""
    steps, log_dir = 40, tmp_path / "run"
    script = tmp_path / "job.sbatch"
    script.write_text(render(tmp_path, f"{SLURM} --gpus_per_node 2", training(tmp_path, steps)))
    tasks = int(directives(script.read_text())["ntasks-per-node"])
    slurm = FakeSlurm(tmp_path / "slurm", tasks)
    metrics = log_dir / "default" / "metrics.jsonl"
    for restarts in (0, 1):
        environment = {**slurm.environment(), "SLURM_RESTART_COUNT": str(restarts)}
        # In the rendered script the signal is for the steps, not for the shell.
        with subprocess.Popen(["bash", str(script)], env=environment) as job:
            try:
                while not restarts and (not metrics.is_file() or len(losses(log_dir)) < 3):
                    assert job.poll() is None
                    time.sleep(0.05)
                if not restarts:
                    steps_of_job = subprocess.run(
                        ["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True
                    )
                    os.kill(int(steps_of_job.stdout.split()[-1]), signal.SIGUSR1)
                code = job.wait(timeout=400)
            finally:
                kill_tree(job.pid)
        if restarts:
            assert code == 0 and len(losses(log_dir)) == steps
        else:
            assert code != 0 and slurm.asked == ["requeue 4711"]
            assert 3 <= len(losses(log_dir)) < steps
            assert list((log_dir / "default" / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.distributed
def test_the_command_of_a_pod_trains(tmp_path: Path) -> None:
    """With the variables that the Kubeflow runtime sets in each of two pods."""
    pytest.importorskip("kubernetes")
    flags = f"{KUBERNETES} --nodes 2 --gpus_per_node 1 --repository {REPOSITORY_DIR}"
    body = yaml.safe_load(render(tmp_path, flags, training(tmp_path)))
    trainer, port = body["spec"]["trainer"], free_port()
    plain = {item["name"]: item["value"] for item in trainer["env"] if "value" in item}
    pods = [
        subprocess.Popen(
            trainer["command"],
            env={
                **os.environ,
                **plain,
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
                "PET_NODE_RANK": str(rank),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(port),
            },
        )
        for rank in range(2)
    ]
    try:
        assert [pod.wait(timeout=400) for pod in pods] == [0, 0]
    finally:
        for pod in pods:
            kill_tree(pod.pid)
    assert len(losses(tmp_path / "run")) == 4


def test_a_path_that_nemo_run_would_change(tmp_path: Path) -> None:
    words = [*training(tmp_path), "--index_mapping_dir", "/data/nemo_runs"]
    command = ["-m", "cosmos_posttrain.submit", *SLURM.split(), "--gpus_per_node", "2", "--render"]
    environment = {"NEMORUN_HOME": str(tmp_path / "jobs")}
    finished = run_script([*command, "--", *words], env=environment)
    assert finished.returncode == 2
    assert "/data/nemo_runs contains /nemo_run, which NeMo-Run replaces" in finished.stderr


def test_render_says_nothing_else(tmp_path: Path) -> None:
    """So that it can be sent into a file; and no file is left where it is called."""
    before = sorted(REPOSITORY_DIR.rglob("*.yaml"))
    text = render(tmp_path, "--gpus_per_node 2", training(tmp_path))
    assert len(text.splitlines()) == 1 and text.startswith("torchrun ")
    assert re.search(r"--nnodes 1 --nproc-per-node 2 ", text)
    text = render(tmp_path / "slurm", f"{SLURM} --gpus_per_node 2", training(tmp_path / "slurm"))
    assert text.startswith("#!/bin/bash\n")
    assert sorted(REPOSITORY_DIR.rglob("*.yaml")) == before
