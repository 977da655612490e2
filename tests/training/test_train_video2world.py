"""Training with texts: the same curve at every layout, and what does not go together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.prompts import prepare_prompts, write_lines, write_prompt_data
from helpers.run_case import losses, make_config

from cosmos_posttrain.data.batch import BatchSizes, drops_prompt, training_batches
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.manifest import Manifest
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.models.sequence import sequence_layout
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.trainer import train

STEPS = 6
SETTINGS = {
    "model__path": "random:tiny-video2world",
    "max_steps": STEPS,
    "save_every_n_steps": 3,
    "num_condition_latents": 1,
    "prompt_dropout": 0.3,
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "videos").mkdir()
    prepare_prompts(write_lines(folder / "videos"), folder / "tokens")
    return folder / "tokens"


def run(config: TrainConfig) -> str:
    """Trains with texts; at the top level for ``run_distributed``."""
    return train(config, takes_text=True).name


@pytest.fixture(scope="module")
def reference_run(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    log_dir = tmp_path_factory.mktemp("reference") / "run"
    run(make_config(prompts, log_dir, **SETTINGS))
    return log_dir


def largest_difference(first: list[float], second: list[float]) -> float:
    assert len(first) == len(second) == STEPS
    return max(abs(a - b) / a for a, b in zip(first, second, strict=True))


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel__tensor_model_parallel_size": 2},
    "tp2-sp": {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True},
    "cp2": {"parallel__context_parallel_size": 2},
    "dp2": {},
    "pp2": {"parallel__pipeline_model_parallel_size": 2},
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_curve_at_every_layout(prompts, reference_run, tmp_path, layout) -> None:
    settings = SETTINGS
    expected = reference_run
    if layout == "pp2":  # from a checkpoint, since fresh weights of later stages have other seeds
        settings = SETTINGS | {"model__path": str(reference_run)}
        expected = tmp_path / "one"
        run(make_config(prompts, expected, **settings))
    config = make_config(prompts, tmp_path / "run", **settings, **LAYOUTS[layout])
    run_distributed(run, 2, config)
    assert largest_difference(losses(expected), losses(tmp_path / "run")) <= 1e-5


def test_resume_equals_uninterrupted(prompts, reference_run, tmp_path) -> None:
    settings = SETTINGS | {"optimizer__lr_decay_style": "constant"}
    settings |= {"optimizer__lr_warmup_steps": 0}
    run(make_config(prompts, tmp_path / "whole", **settings))
    run(make_config(prompts, tmp_path / "parts", **(settings | {"max_steps": 3})))
    run(make_config(prompts, tmp_path / "parts", **settings))
    assert largest_difference(losses(tmp_path / "whole"), losses(tmp_path / "parts")) <= 1e-6


def test_the_text_reaches_the_loss(prompts, reference_run, tmp_path) -> None:
    run(make_config(prompts, tmp_path / "run", **(SETTINGS | {"prompt_dropout": 0.0})))
    first, second = losses(reference_run), losses(tmp_path / "run")
    assert all(abs(a - b) / a > 1e-6 for a, b in zip(first[1:], second[1:], strict=True))


def test_dropped_texts_depend_on_the_place_alone(prompts: Path) -> None:
    data = TokenDataset(prompts, "all")
    layout = sequence_layout(preset("tiny-video2world", latent_shape=LatentShape(3, 2, 3)))

    def contexts(micro: int, consumed: int, num_steps: int) -> torch.Tensor:
        batches = training_batches(data, layout, BatchSizes(4, micro), consumed, 1, 0.5)
        steps = [step for _, step in zip(range(num_steps), batches, strict=False)]
        return torch.cat([b.context for step in steps for b in step if b.context is not None])

    whole = contexts(1, 0, 6)
    assert torch.equal(whole, contexts(4, 0, 6)) and torch.equal(whole[12:], contexts(2, 12, 3))
    dropped = [not row.any() for row in whole]
    assert dropped == [drops_prompt(position, 1, 0.5) for position in range(24)]
    assert 0 < sum(dropped) < 24


def test_dropout_has_its_probability() -> None:
    share = sum(drops_prompt(position, 7, 0.2) for position in range(5000)) / 5000
    assert 0.18 < share < 0.22
    assert not any(drops_prompt(position, 7, 0.0) for position in range(50))


def test_what_does_not_go_together(prompts: Path, tokens: Path, tmp_path: Path) -> None:
    def config(data: Path, **changes: Any) -> TrainConfig:
        return make_config(data, tmp_path / "run", **(SETTINGS | changes))

    no_dropout = {"prompt_dropout": 0.0}
    for settings, takes_text, words in (
        (config(prompts), False, "with prompts"),
        (config(tokens), True, "without prompts"),
        (config(tokens, **no_dropout), False, "the model takes a text"),
        (config(prompts, model__path="random:tiny"), True, "takes no text"),
        (config(tokens, model__path="random:tiny"), False, "--prompt_dropout 0.3 has no effect"),
        (config(prompts, num_condition_latents=3), True, "leaves nothing to predict"),
        (config(prompts, prompt_dropout=1.5), True, "prompt_dropout"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(settings, takes_text)
    assert not (tmp_path / "run").exists()


def test_a_text_of_another_size_or_encoder_is_refused(prompts, reference_run, tmp_path) -> None:
    def changed(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(prompts, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        contract = manifest["contract"]
        contract["context_len"] = changes.pop("context_len", contract["context_len"])
        contract["text_encoder"] |= changes
        (folder / "manifest.json").write_text(json.dumps(manifest))
        Manifest.load(folder)
        return folder

    for folder, words in (
        (changed("longer", context_len=40), "takes a text of 32 rows of 64"),
        (changed("other", sha256="0" * 64), "encoded by another"),
    ):
        settings = SETTINGS | {"model__path": str(reference_run)}
        with pytest.raises(ConfigError, match=words):
            run(make_config(folder, tmp_path / "run", **settings))


def test_every_id_of_the_full_vocabulary_reaches_the_embedding(tmp_path: Path) -> None:
    """64,000 codes, each of them once: file -> batch -> embedding rows of their own."""
    write_prompt_data(tmp_path / "data", torch.arange(64_000).view(4, 16_000), (4, 40, 100))
    data = TokenDataset(tmp_path / "data", "all")
    config = preset("tiny-video2world", latent_shape=LatentShape(4, 40, 100), vocab_size=64_000)
    layout = sequence_layout(config)
    batches = training_batches(data, layout, BatchSizes(4, 1), 0, 1)
    table = torch.arange(config.vocab_size + 64, dtype=torch.float64)[:, None]
    seen = []
    for batch in next(batches):
        assert batch.tokens[0, 0] == 64_000 and (batch.tokens[0, 16_001:] == 64_002).all()
        looked_up = torch.nn.functional.embedding(batch.tokens, table)[0, 1:16_001, 0]
        assert torch.equal(looked_up.long(), batch.labels[0][batch.loss_mask[0] > 0])
        seen.append(looked_up.long())
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(64_000))
