"""NeMo-Run's executors: the one file that imports it (the extra ``launch``).

Flows in: where a job is to run, and its command. Flows out: the text that would be handed over (a
command line, an sbatch script, a TrainJob's manifest), or a started job. Environment variables with
keys are never written: Slurm passes the caller's environment on, Kubernetes reads a secret.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import yaml

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.launch import say
from cosmos_posttrain.submit.config import SubmitConfig
from cosmos_posttrain.submit.job import TrainingJob

_RUN_DIR = "/nemo_run"
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
_KUBERNETES_GRACE_SECONDS = 30  # what a pod has, unless the runtime says otherwise


def render(config: SubmitConfig, job: TrainingJob) -> str:
    """What would be handed over; starts nothing.

    For Slurm NeMo-Run makes the folder that the script names, below NEMORUN_HOME.
    """
    with contextlib.redirect_stdout(sys.stderr):  # what NeMo-Run says meanwhile
        return _render(config, job)


def _render(config: SubmitConfig, job: TrainingJob) -> str:
    run = _nemo_run()
    if config.executor == "kubernetes":
        executor = _kubeflow(config, connect=False)
        body = executor.get_job_body(config.name, _torchrun(config, job))
        return str(yaml.safe_dump(body, sort_keys=False)).rstrip()
    if config.executor == "local":
        from nemo_run.run.torchx_backend.packaging import package

        # Otherwise it leaves files in the folder that it is called in.
        nothing = {"serialize_metadata_for_scripts": False}
        role = package(config.name, _script(run, job), _local(run, config), **nothing).roles[0]
        return " ".join([role.entrypoint, *role.args])
    _check_paths(run, config, job)
    with run.Experiment(config.name, executor=_slurm(run, config)) as experiment:
        experiment.add(_script(run, job), name=config.name)
        experiment.dryrun(log=False, delete_exp_dir=False)
        folder = Path(experiment.jobs[0].executor.experiment_dir)
    return next(folder.glob("*_sbatch.sh")).read_text(encoding="utf-8").rstrip()


def submit(config: SubmitConfig, job: TrainingJob) -> int:
    """Starts the job; waits for its end only on this machine. Returns the exit code."""
    run = _nemo_run()
    if config.executor == "kubernetes":
        executor = _kubeflow(config, connect=True)
        try:
            name, _ = executor.launch(config.name, _torchrun(config, job))
        except Exception as error:  # the cluster's answer, of a class of its client's
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"the cluster takes no TrainJob ({reason}); check --namespace and --runtime, that "
                "Kubeflow Trainer is there and that you may make jobs, or give --render."
            ) from error
        say(f"submitted the TrainJob {name} in the namespace {config.namespace}")
        return 0
    is_local = config.executor == "local"
    if not is_local:
        _check_paths(run, config, job)
    executor = _local(run, config) if is_local else _slurm(run, config)
    with run.Experiment(config.name, executor=executor) as experiment:
        experiment.add(_script(run, job), name=config.name, tail_logs=is_local)
        experiment.run(detach=not is_local, tail_logs=is_local)
    # Leaving the block has waited for what runs here.
    states = [job.state.name for job in experiment.jobs]
    return 0 if not is_local or set(states) == {"SUCCEEDED"} else 1


def _nemo_run() -> Any:
    try:
        import nemo_run
    except ImportError as error:
        raise ConfigError(
            f"NeMo-Run cannot be imported ({error}); run pip install '.[launch]', or start the run "
            "with torchrun or recipes/slurm/train.sbatch (docs/launching.md)."
        ) from error
    return nemo_run


def _check_paths(run: Any, config: SubmitConfig, job: TrainingJob) -> None:
    """Refuses paths that NeMo-Run would change: outside of containers it replaces /nemo_run.

    Raises:
        ConfigError: names the path.
    """
    if config.container_image is not None:
        return
    for path in (run.config.get_nemorun_home(), *job.command):
        if _RUN_DIR in path:
            raise ConfigError(
                f"{path} contains {_RUN_DIR}, which NeMo-Run replaces in a job's script; name "
                "another folder (of NeMo-Run itself: NEMORUN_HOME)."
            )


def _script(run: Any, job: TrainingJob) -> Any:
    """Called by torchrun once for each process."""
    first, *rest = job.command
    return run.Script(path=first, entrypoint=first, args=rest)


def _local(run: Any, config: SubmitConfig) -> Any:
    return run.LocalExecutor(ntasks_per_node=config.gpus_per_node, launcher="torchrun")


def _slurm(run: Any, config: SubmitConfig) -> Any:
    options = dict(item.split("=", 1) for item in config.sbatch_option)
    return run.SlurmExecutor(
        account=config.account,
        partition=config.partition,
        time=config.time,
        nodes=config.nodes,
        ntasks_per_node=config.gpus_per_node,  # torchrun's; the job has one task a node
        gpus_per_node=config.gpus_per_node,
        mem="0",
        exclusive=True,
        # To torchrun, which passes it on and waits; it must be done when Slurm kills.
        signal=f"USR1@{config.signal_seconds}",
        container_image=config.container_image,
        container_mounts=(config.container_mounts or "").split(",")
        if config.container_mounts
        else [],
        additional_parameters=options or None,
        env_vars=_environment(config.signal_seconds),
        retries=config.retries,
        launcher="torchrun",
        packager=run.Packager(),  # nothing is copied: the job runs in the repository's folder
        tunnel=run.LocalTunnel(job_dir=""),
    )


def _environment(grace_seconds: int) -> dict[str, str]:
    """What makes torchrun pass SIGUSR1 on, and wait for what its processes save."""
    return {
        "TORCHELASTIC_SIGNALS_TO_HANDLE": SIGNALS,
        "PET_SIGNALS_TO_HANDLE": SIGNALS,  # newer versions of torch put their flag over the other
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(grace_seconds - 10, 1)),
        "OMP_NUM_THREADS": "1",
    }


def _torchrun(config: SubmitConfig, job: TrainingJob) -> list[str]:
    """The command of a Kubeflow pod, whose runtime says in PET_ variables how the pods meet."""
    _, chdir, _, *rest = job.command
    restarts = f"--max-restarts={config.retries}"
    return ["env", chdir, config.python, "-m", "torch.distributed.run", restarts, *rest[1:]]


def _kubeflow(config: SubmitConfig, connect: bool) -> Any:
    """The executor; not connected, it needs no cluster."""
    try:
        from nemo_run.core.execution.kubeflow import KubeflowExecutor

        class Unconnected(KubeflowExecutor):
            def _load_kube_clients(self) -> None:
                pass

        return (KubeflowExecutor if connect else Unconnected)(**_kubeflow_settings(config))
    except ImportError as error:
        raise ConfigError(f"{error} (pip install '.[launch]' brings it.)") from error
    except Exception as error:
        if not connect:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"no Kubernetes cluster can be reached ({reason}); check KUBECONFIG, or give --render."
        ) from error


def _kubeflow_settings(config: SubmitConfig) -> dict[str, Any]:
    mounts, volumes = [], []
    for number, item in enumerate(config.volume):
        claim, _, folder = item.partition(":")
        name = f"volume-{number}"
        volumes.append({"name": name, "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": name, "mountPath": folder})
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})  # NCCL's, between processes
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    keys = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": config.secret, "key": name}}}
        for name in config.secret_env
    ]
    return {
        "runtime_ref": config.runtime,
        "namespace": config.namespace,
        "image": config.container_image,
        "num_nodes": config.nodes,
        "gpus_per_node": config.gpus_per_node,
        "volumes": volumes,
        "volume_mounts": mounts,
        "env_vars": _environment(_KUBERNETES_GRACE_SECONDS),
        "env_list": keys,
        "train_job_basename": config.name,
    }
