"""The NeMo-Run recipes: what is in them, what is handed over, and one run through NeMo-Run."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.distributed_run import REPOSITORY_DIR
from helpers.fake_slurm import directives
from helpers.prepared import write_data_set
from helpers.run_case import losses

from cosmos_posttrain.checkpoint.context import list_checkpoints
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.config import merge
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.nemo.recipe import RUNNER, command, finetune
from cosmos_posttrain.training.config import TrainConfig, validate

RECIPES = REPOSITORY_DIR / "recipes" / "nemo"
pytestmark = pytest.mark.skipif(
    find_spec("nemo_run") is None, reason="NeMo-Run is missing; see make nemo-env"
)


def run_program(words: list[str], folder: Path, timeout_seconds: int = 200) -> Any:
    """In this environment, whose torchrun NeMo-Run looks for in PATH."""
    variables = {
        "PYTHONPATH": f"{REPOSITORY_DIR}:{REPOSITORY_DIR / 'tests'}:{RECIPES}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NEMORUN_HOME": str(folder / "jobs"),
    }
    return subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        env={**os.environ, **variables},
        cwd=REPOSITORY_DIR,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )


def launch(flags: str, training: str, folder: Path) -> Any:
    words = [str(RECIPES / "launch.py"), *flags.split(), "--", *training.split()]
    return run_program(words, folder)


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipes' modules, by name; NeMo-Run warns as it is imported."""
    monkeypatch.syspath_prepend(str(RECIPES))

    def load(name: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)

    return load


def handed_over(words: list[str]) -> dict[str, Any]:
    """What a process of a job makes of the words that it is given, up to the run itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import fiddle
        from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
    assert words[-5:-3] == ["-m", RUNNER] and words[-3] == "-n"
    handed = fiddle.build(ZlibJSONSerializer().deserialize(words[-1]))
    assert handed.func is finetune
    values: dict[str, Any] = dict(handed.keywords)
    validate(values["config"], values["num_nodes"] * values["num_gpus_per_node"])
    return values


SHIPPED = {
    ("cosmos_4b", 1): "train_4b",
    ("cosmos_12b", 1): "train_12b",
    ("cosmos_12b", 8): "train_12b_64gpu",
    ("cosmos_5b_video2world", 2): "train_5b_video2world",
    ("cosmos_13b_video2world", 1): "train_13b_video2world",
}


@pytest.mark.parametrize(("name", "num_nodes"), SHIPPED)
def test_recipes_hold_the_shipped_configs(name: str, num_nodes: int, recipes: Any) -> None:
    recipe = recipes(name).finetune_recipe("/data", "/runs", "first", num_nodes=num_nodes)
    recipe.config.max_steps += 1
    handed = handed_over(command(recipe, "job"))
    file = REPOSITORY_DIR / "configs" / f"{SHIPPED[name, num_nodes]}.yaml"
    changed = {"data.path": "/data", "log_dir": "/runs/first", "async_save": False}
    changed |= {"parallel.overlap_param_gather": False}
    expected = merge(TrainConfig, file, list(changed.items()))
    expected.max_steps += 1
    assert handed["config"] == expected
    assert handed["takes_text"] is ("Video2World" in expected.model.path)
    assert (handed["num_nodes"], handed["num_gpus_per_node"]) == (num_nodes, 8)


def test_a_slurm_job_is_rendered(tmp_path: Path) -> None:
    flags = "cosmos_12b --executor slurm --account lab --partition gpu --nodes 2 --render"
    finished = launch(flags, "--data_path /d --log_dir /r", tmp_path)
    assert finished.returncode == 0, finished.stderr[-2000:]
    subprocess.run(["bash", "-n"], input=finished.stdout, text=True, check=True)
    options = directives(finished.stdout)
    assert (options["nodes"], options["gpus-per-node"], options["account"]) == ("2", "8", "lab")
    line = next(line for line in finished.stdout.splitlines() if " torchrun " in line)
    assert "--nnodes 2 --nproc-per-node 8" in line and f"--chdir={REPOSITORY_DIR}" in line
    handed = handed_over(shlex.split(line))
    assert handed["config"].parallel.tensor_model_parallel_size == 4  # as in train_12b_16gpu.yaml
    assert (handed["num_nodes"], handed["num_gpus_per_node"]) == (2, 8)


def test_a_train_job_is_rendered(tmp_path: Path) -> None:
    pytest.importorskip("kubernetes")
    flags = "--executor kubernetes --container_image registry/nemo:1 --volume data:/data --render"
    training = "--data_path /data/tokens --log_dir /data/runs --max_steps 70 --lr 2e-4"
    finished = launch(f"cosmos_5b_video2world {flags}", training, tmp_path)
    assert finished.returncode == 0, finished.stderr[-2000:]
    body = yaml.safe_load(finished.stdout)
    trainer = body["spec"]["trainer"]
    assert (body["kind"], trainer["numNodes"], trainer["numProcPerNode"]) == ("TrainJob", 1, 8)
    words = trainer["command"]
    assert words[:2] == ["env", "--chdir=/workspace/cosmos_posttrain"]
    assert words[words.index("torch.distributed.run") - 1] == "-m"
    handed = handed_over(words)
    assert handed["takes_text"] is True
    assert handed["config"].max_steps == 70 and handed["config"].optimizer.lr == 2e-4


@pytest.mark.parametrize(
    ("flags", "training", "words"),
    [
        ("cosmos_7b", "", "there is no recipe 'cosmos_7b'; name one of cosmos_4b, cosmos_12b"),
        ("cosmos_12b --gpus_per_node 6", "--data_path /d --log_dir /r", "needs a multiple of"),
        ("cosmos_4b", "--log_dir /r", "--data_path is missing"),
        ("cosmos_4b", "--data_path /d --log_dir /r --lora_rank 8", "--lora_rank 8 does not work"),
    ],
)
def test_one_sentence(
    flags: str, training: str, words: str, recipes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["launch.py", *flags.split(), "--", *training.split()])
    with pytest.raises(ConfigError, match=re.escape(words)):
        recipes("launch").main()


# As a user would, in the words of NeMo-Run's own guide.
RUNNING = """
import sys
import nemo_run as run
from cosmos_4b import finetune_recipe

tokens, folder, num_processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
recipe = finetune_recipe(tokens, folder, "first", num_nodes=1, num_gpus_per_node=2)
config = recipe.config
config.model.path, config.model.dtype = "random:tiny", "float32"
config.data.split_string = "1,0,0"
config.max_steps, config.save_every_n_steps, config.optimizer.lr_warmup_steps = 4, 2, 1
config.global_batch_size, config.num_threads, config.val_check_interval = 2, 1, None
executor = run.LocalExecutor(ntasks_per_node=num_processes, launcher="torchrun")
with run.Experiment("recipe", executor=executor) as experiment:
    experiment.add(recipe, name="recipe", tail_logs=True)
    experiment.run(detach=False, tail_logs=True)
print([job.state.name for job in experiment.jobs])
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(find_spec("nemo.lightning") is None, reason="NeMo is missing")
def test_a_recipe_runs_through_the_local_executor(tmp_path: Path) -> None:
    tokens = write_data_set(tmp_path / "tokens", 2, 4)
    program = tmp_path / "start.py"
    program.write_text(RUNNING)
    words = [str(program), str(tokens), str(tmp_path / "runs")]
    finished = run_program([*words, "2"], tmp_path, 900)
    said = finished.stdout + finished.stderr
    assert "['SUCCEEDED']" in finished.stdout, said[-3000:]
    run = tmp_path / "runs" / "first"
    assert len(losses(run)) == 4
    newest = list_checkpoints(run)[-1]
    assert newest.name.endswith("-step=3")
    assert open_source(newest).open_weights().num_bytes > 0
    finished = run_program([*words, "1"], tmp_path, 900)
    said = finished.stdout + finished.stderr
    assert "['FAILED']" in finished.stdout and "is made for 2 processes, but 1" in said
