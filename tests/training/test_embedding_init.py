"""Runs that start with other rows for the new tokens, on another vocabulary."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.run_case import losses, make_config, run
from helpers.two_tokenizers import Coarse, prepare_pair

from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.files import write_json
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.training.config import TrainConfig, validate
from cosmos_posttrain.transfer.align import align
from cosmos_posttrain.transfer.config import COOCCURRENCE_INITS, AlignConfig

SPLIT = "3,1,1"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``old`` and ``new`` data, a run ``model`` on the old, and the co-occurrence ``pairs``."""
    folder = tmp_path_factory.mktemp("swap")
    old, new = prepare_pair(folder, Coarse())
    run(make_config(old, folder / "model", max_steps=3, global_batch_size=2))
    align(AlignConfig(str(old), str(new), str(folder / "pairs"), SPLIT))
    return folder


def swap(start: Path, log_dir: Path, init: str, **changes: Any) -> TrainConfig:
    """A run on the new tokens from the old model."""
    settings: dict[str, Any] = {"model__path": str(start / "model"), "model__embedding_init": init}
    if init in COOCCURRENCE_INITS:
        settings["model__cooccurrence_path"] = str(start / "pairs")
    settings |= {"max_steps": 2, "save_every_n_steps": 1, "global_batch_size": 2}
    return make_config(start / "new", log_dir, **(settings | changes))


def rows_at_start(config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's input embeddings and output rows before the first step."""
    from cosmos_posttrain.training.trainer import Trainer

    trainer = Trainer(config)
    trainer.close()
    model = trainer.model
    return model.embedding.word_embeddings.weight.data, model.output_layer.weight.data


def start_and_train(config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows_at_start``, then the run itself."""
    rows = [part.clone() for part in rows_at_start(config)]
    run(config)
    return rows[0], rows[1]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "init", ["reset", "mean", "aligned", "omp", pytest.param("digits", marks=pytest.mark.slow)]
)
def test_rows_do_not_depend_on_the_layout(start: Path, tmp_path: Path, init: str) -> None:
    config = swap(start, tmp_path / "one", init)
    alone = start_and_train(config)
    assert [part.shape for part in alone] == [(64, 192), (64, 192)]
    assert all(not part[40:].any() and part[:40].any() for part in alone)
    config = swap(start, tmp_path / "two", init)
    config.parallel.tensor_model_parallel_size = 2
    ranks = run_distributed(start_and_train, 2, config)
    for number, whole in enumerate(alone):
        assert torch.equal(torch.cat([rank[number] for rank in ranks]), whole)
    # Sums in another order in float32.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_everything_else_stays(start: Path, tmp_path: Path) -> None:
    from cosmos_posttrain.models.naming import parameters_by_disk_name
    from cosmos_posttrain.training.trainer import Trainer

    trainer = Trainer(swap(start, tmp_path / "run", "aligned"))
    trainer.close()
    before = dict(open_source(start / "model").open_weights().all_megatron())
    for name, parameter in parameters_by_disk_name(trainer.model):
        if "embedding" not in name and "output" not in name:
            assert torch.equal(parameter, before[name]), name


def test_resuming_needs_and_changes_no_rows(start: Path, tmp_path: Path) -> None:
    from cosmos_posttrain.training.trainer import Trainer

    (tmp_path / "pairs").write_bytes((start / "pairs").read_bytes())
    changes = {"model__cooccurrence_path": str(tmp_path / "pairs")}
    run(swap(start, tmp_path / "whole", "aligned", **changes))
    trainer = Trainer(swap(start, tmp_path / "run", "aligned", **changes))
    trainer.config.max_steps = 1
    trainer.fit()
    trainer.close()
    (tmp_path / "pairs").unlink()
    run(swap(start, tmp_path / "run", "aligned", **changes))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    for checkpoint in context.list_checkpoints(tmp_path / "run"):
        recorded = json.loads((checkpoint / "context" / "data.json").read_text())
        transfer = recorded["embedding_transfer"]
        assert transfer["init"] == "aligned" and transfer["old_tokenizer"]["id"] == "block-mean"
        assert transfer["cooccurrence"]["num_clips"] > 0
        began = recorded["started_from"]
        assert began["tokenizer"]["id"] == "block-mean" and began["model_path"] == str(
            start / "model"
        )
        assert began["embedding_start"].startswith("embedding_init aligned: every token")
        assert context.read_model_config(checkpoint).vocab_size == 40
        assert "embedding_init: aligned" in (checkpoint / "context" / "config.yaml").read_text()


def test_a_run_says_how_its_rows_start(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = swap(start, tmp_path / "run", "mean", max_steps=1)
    run(config)
    assert capsys.readouterr().out.count("embedding_init mean: all 40 tokens get") == 1
    config.max_steps = 2
    run(config)
    assert "embedding_init" not in capsys.readouterr().out
    run(
        make_config(start / "old", tmp_path / "same", model__path=str(start / "model"), max_steps=1)
    )
    assert "embedding_init" not in capsys.readouterr().out


def test_refusals(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --embedding_init aligned "):
        run(swap(start, tmp_path / "run", "keep"))
    with pytest.raises(ConfigError, match="fresh weights have nothing to transfer"):
        run(swap(start, tmp_path / "run", "reset", model__path="random:tiny"))
    with pytest.raises(ConfigError, match=r"new tokenizer coarse .* data set's is block-mean"):
        run(swap(start, tmp_path / "run", "aligned", data__path=str(start / "old")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("init", "path", "sentence"),
    [
        ("aligned", None, "aligned needs --cooccurrence_path"),
        ("keep", "file", "--cooccurrence_path has no effect with --embedding_init keep"),
        ("digits", "file", "has no effect with --embedding_init digits: give aligned or omp"),
        ("omp", None, "omp needs --cooccurrence_path"),
        ("best", None, "best is not one of keep, reset, mean, aligned, omp, digits"),
    ],
)
def test_settings_that_do_not_fit(init: str, path: str | None, sentence: str) -> None:
    config = TrainConfig(max_steps=0)
    config.data.path = "x"
    config.model.embedding_init, config.model.cooccurrence_path = init, path
    with pytest.raises(ConfigError) as error:
        validate(config, world_size=1)
    assert sentence in str(error.value) and "--max_steps 0" in str(error.value)


def test_a_larger_grid_is_scaled_once(start: Path, tmp_path: Path) -> None:
    """--rope_scaling reaches the model, and resuming does not scale again."""
    checkpoint = context.list_checkpoints(start / "model")[-1]
    small = dataclasses.replace(
        context.read_model_config(checkpoint), latent_shape=LatentShape(3, 1, 3)
    )
    shutil.copytree(checkpoint, tmp_path / "model")
    write_json(tmp_path / "model" / "context" / "model.json", small.to_json())
    config = make_config(
        start / "old",
        tmp_path / "run",
        model__path=str(tmp_path / "model"),
        max_steps=1,
        save_every_n_steps=1,
        model__rope_scaling="interpolate",
    )
    run(config)
    first = context.read_model_config(context.list_checkpoints(tmp_path / "run")[-1])
    assert first.position_scale == (1.0, 0.5, 1.0) and first.latent_shape == (3, 2, 3)
    config.max_steps = 2
    run(config)
    assert context.read_model_config(context.list_checkpoints(tmp_path / "run")[-1]) == first
