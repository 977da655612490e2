"""Jobs before NeMo-Run sees them: what is refused, and the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cosmos_posttrain.config import merge
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.submit import __main__ as command_line
from cosmos_posttrain.submit.config import SubmitConfig, validate
from cosmos_posttrain.submit.job import REPOSITORY_DIR, make_job

TRAINING = "train_general.py --data_path D --log_dir L --tensor_model_parallel_size 2".split()


def config(**values: Any) -> SubmitConfig:
    return merge(SubmitConfig, None, list({"gpus_per_node": 2, **values}.items()))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"executor": "sge"}, "--executor sge is not one of local, slurm, kubernetes"),
        ({"executor": "slurm"}, "needs --account"),
        ({"nodes": 2}, "--nodes 2 needs --executor slurm or kubernetes"),
        ({"name": "My_Job"}, "--name My_Job must be"),
        ({"executor": "slurm", "account": "a", "sbatch_option": ["qos"]}, "qos must be name=value"),
        ({"executor": "kubernetes"}, "needs --container_image"),
        ({"executor": "slurm", "account": "a", "time": "43200"}, "HH:MM:SS; in YAML put it in qu"),
        ({"container_image": "i"}, "--container_image has no effect with --executor local"),
        ({"partition": "p"}, "--partition has no effect with --executor local"),
        ({"executor": "slurm", "account": "a", "volume": ["c:/d"]}, "--volume has no effect with"),
        (
            {"executor": "slurm", "account": "a", "container_mounts": "/d:/d"},
            "--container_mounts needs --container_image",
        ),
        (
            {"executor": "kubernetes", "container_image": "i", "volume": ["data"]},
            "--volume data must be CLAIM:/folder",
        ),
        (
            {"executor": "kubernetes", "container_image": "i", "secret_env": ["HF_TOKEN"]},
            "--secret_env needs --secret",
        ),
    ],
)
def test_bad_settings(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validate(config(**values))


def test_a_key_in_place_of_its_name_is_not_repeated() -> None:
    given = {"executor": "kubernetes", "container_image": "i", "secret": "s"}
    with pytest.raises(ConfigError, match="never its value") as caught:
        validate(config(**given, secret_env=["WANDB_API_KEY=0123abc"]))
    assert "0123abc" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is none; write"),
        (["infer.py"], "infer.py is none"),
        ([*TRAINING, "--dry_run"], "--dry_run needs no launcher"),
        ([*TRAINING, "--num_gpus", "2"], "--num_gpus has no effect without --dry_run"),
        ([*TRAINING, "--context_parallel_size", "2"], "2 x 1 x 2 needs a multiple of 4 processes"),
        (
            [*TRAINING, "--dtype", "float32", "--grad_reduce_in_bf16"],
            "this one is in float32",
        ),
        ([*TRAINING, "--lr", "-1"], "--lr -1.0 must be above 0"),
        ([*TRAINING, "--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
        ([*TRAINING, "--config", "absent.yaml"], "--config absent.yaml does not exist"),
    ],
)
def test_bad_training_commands(words: list[str], sentence: str) -> None:
    """Refused before the job waits in a queue."""
    with pytest.raises(ConfigError, match=sentence):
        make_job(config(), words)


def test_sizes_are_those_of_all_nodes() -> None:
    words = [*TRAINING, "--global_batch_size", "6"]
    make_job(config(executor="slurm", nodes=3), words)
    with pytest.raises(ConfigError, match="4 data-parallel ranks"):
        make_job(config(executor="slurm", nodes=4), words)


def test_the_command_is_called_in_the_repository() -> None:
    job = make_job(config(), TRAINING)
    assert job.command == ["env", f"--chdir={REPOSITORY_DIR}", "python", "-u", *TRAINING]
    assert make_job(config(repository="/code"), TRAINING).repository == "/code"
    inside = make_job(config(executor="slurm", container_image="i.sqsh"), TRAINING)
    assert inside.repository == "/workspace/cosmos_posttrain"


def test_the_time_of_a_yaml_file(tmp_path: Path) -> None:
    """There 12:00:00 without quotes is a number to the base of 60."""
    path = tmp_path / "job.yaml"
    for text, fits in (("12:00:00", False), ("'1-12:00:00'", True), ("'12:00:00'", True)):
        path.write_text(f"executor: slurm\naccount: a\ntime: {text}\n")
        if fits:
            validate(merge(SubmitConfig, path))
            continue
        with pytest.raises(ConfigError, match="time"):
            validate(merge(SubmitConfig, path))


def test_a_config_beside_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job runs in the repository's folder; in a container the path is the container's."""
    (tmp_path / "my.yaml").write_text("max_steps: 3\n")
    monkeypatch.chdir(tmp_path)
    expected = str(tmp_path / "my.yaml")
    assert make_job(config(), [*TRAINING, "--config", "my.yaml"]).words[-1] == expected
    words = make_job(config(), [*TRAINING, "--config=my.yaml"]).words
    assert words[-1] == f"--config={expected}"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    words = ["submit", "--gpus_per_node", "2", "--render", "--", *TRAINING]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(ConfigError, match=r"run pip install '\.\[launch\]'"):
        command_line.main()
