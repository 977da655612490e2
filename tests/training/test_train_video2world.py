"""Training with texts: the same curve at every layout, and what does not go together."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.prompts import prepare_prompts, write_lines, write_prompt_data
from helpers.run_case import losses, make_config
from helpers.two_tokenizers import Coarse

from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.data.batch import Batch, BatchSizes, drops_prompt, training_batches
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.manifest import Manifest
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.models.naming import parameters_by_disk_name
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.models.sequence import sequence_layout
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.trainer import Trainer, train
from cosmos_posttrain.transfer.align import align
from cosmos_posttrain.transfer.config import AlignConfig

STEPS = 20
SETTINGS = {
    "model__path": "random:tiny-video2world",
    "max_steps": STEPS,
    "save_every_n_steps": 10,
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
    "pp2-interleaved": {
        "parallel__pipeline_model_parallel_size": 2,
        "parallel__virtual_pipeline_model_parallel_size": 2,
    },
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "tp2-sp")) for name in LAYOUTS],
)
def test_same_curve_at_every_layout(prompts, reference_run, tmp_path, layout) -> None:
    settings = SETTINGS
    expected = reference_run
    if layout.startswith("pp2"):
        # From a checkpoint, since fresh weights of later stages have other seeds.
        settings = SETTINGS | {"model__path": str(reference_run)}
        expected = tmp_path / "one"
        run(make_config(prompts, expected, **settings))
    config = make_config(prompts, tmp_path / "run", **settings, **LAYOUTS[layout])
    run_distributed(run, 2, config)
    assert largest_difference(losses(expected), losses(tmp_path / "run")) <= 1e-5


@pytest.mark.slow
@pytest.mark.distributed
def test_lora_beside_cross_attention(prompts, reference_run, tmp_path) -> None:
    """Its keys and values see the whole text on every rank; its queries, a part of the clip."""
    settings = SETTINGS | {"model__path": str(reference_run), "model__lora_rank": 3}
    settings |= {"optimizer__lr": 1e-2}
    run(make_config(prompts, tmp_path / "one", **settings))
    for name, more in (("tp2-sp", {"model__recompute": True}), ("pp2", {})):
        config = make_config(prompts, tmp_path / name, **settings, **LAYOUTS[name], **more)
        run_distributed(run, 2, config)
        assert largest_difference(losses(tmp_path / "one"), losses(tmp_path / name)) <= 1e-4
    before, after = (open_source(x).open_weights() for x in (reference_run, tmp_path / "one"))
    for name in ("linear_q", "linear_kv", "linear_proj"):
        key = f"decoder.layers.2.cross_attention.{name}.weight"
        assert not torch.equal(before.megatron(key), after.megatron(key)), key


def stopped_half_way(reference_run: Path, log_dir: Path) -> Path:
    """The run as it is when it is killed after its first checkpoint."""
    shutil.copytree(reference_run, log_dir)
    shutil.rmtree(next((log_dir / "default" / "checkpoints").glob("*step=19")))
    return log_dir


def test_resume_equals_uninterrupted(prompts, reference_run, tmp_path) -> None:
    run(make_config(prompts, stopped_half_way(reference_run, tmp_path / "run"), **SETTINGS))
    assert losses(tmp_path / "run") == losses(reference_run)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_moves_from_layout_to_layout(prompts, reference_run, tmp_path) -> None:
    """Ten steps at TP=2, then on from their checkpoint in one process, and at DP=2."""
    first = SETTINGS | LAYOUTS["tp2"]
    run_distributed(run, 2, make_config(prompts, tmp_path / "run", **first))
    for name, num_processes in (("one", 1), ("dp2", 2)):
        log_dir = stopped_half_way(tmp_path / "run", tmp_path / name)
        run_distributed(run, num_processes, make_config(prompts, log_dir, **SETTINGS))
        assert largest_difference(losses(reference_run), losses(log_dir)) <= 1e-5


def test_recomputed_activations_change_nothing(prompts, reference_run, tmp_path) -> None:
    run(make_config(prompts, tmp_path / "run", **SETTINGS, model__recompute=True))
    assert largest_difference(losses(reference_run), losses(tmp_path / "run")) <= 1e-6


def test_the_text_reaches_the_loss(prompts, reference_run, tmp_path) -> None:
    run(make_config(prompts, tmp_path / "run", **(SETTINGS | {"prompt_dropout": 0.0})))
    first, second = losses(reference_run), losses(tmp_path / "run")
    # Not the first: which texts are dropped there is chance.
    assert all(abs(a - b) / a > 1e-6 for a, b in zip(first[1:], second[1:], strict=True))


def test_there_is_no_loss_on_given_latents(prompts, tmp_path) -> None:
    """The losses with n latents given are means over parts of the same clips."""
    settings = SETTINGS | {"prompt_dropout": 0.0, "max_steps": 1, "save_every_n_steps": 1}
    totals = []
    for num_given in (0, 1, 2):
        settings["num_condition_latents"] = num_given
        config = make_config(prompts, tmp_path / str(num_given), **settings)
        with contextlib.closing(Trainer(config, takes_text=True)) as trainer:
            batches = next(trainer.batches())
            by_place = torch.cat([losses_by_place(trainer.model, batch) for batch in batches])
        run(config)
        (loss,) = losses(tmp_path / str(num_given))
        assert loss == pytest.approx(by_place[:, 6 * num_given : 18].mean().item(), rel=1e-5)
        totals.append(by_place)
    assert torch.equal(totals[0], totals[2])


def losses_by_place(model: CosmosGPTModel, batch: Batch) -> torch.Tensor:
    """(B, 18): nats of each token of the clips."""
    layout = sequence_layout(model.model_config)
    clips = batch.tokens[:, 1:19]
    whole = layout.batch(clips, torch.ones(len(clips)), batch.context)
    with torch.no_grad():
        losses = model(whole.tokens, None, None, labels=whole.labels, context=batch.context)
    return losses[:, :18]


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    """``new``, the data of ``prompts`` with 40 codes, and ``pairs`` of old and new tokens."""
    folder = tmp_path_factory.mktemp("swapped")
    lines = prompts.parent / "videos" / "prompts.jsonl"
    prepare_prompts(lines, folder / "new", Coarse())
    align(AlignConfig(str(prompts), str(folder / "new"), str(folder / "pairs"), "3,1,1"))
    return folder


@pytest.mark.parametrize("init", ["aligned", "mean"])
def test_another_tokenizer_keeps_what_is_not_of_tokens(
    swapped, reference_run, tmp_path, init
) -> None:
    settings = SETTINGS | {"model__path": str(reference_run), "model__embedding_init": init}
    if init == "aligned":
        settings["model__cooccurrence_path"] = str(swapped / "pairs")
    config = make_config(swapped / "new", tmp_path / "run", **settings)
    with contextlib.closing(Trainer(config, takes_text=True)) as trainer:
        model, before = (
            trainer.model,
            dict(open_source(reference_run).open_weights().all_megatron()),
        )
        assert (model.model_config.vocab_size, model.model_config.bov_token) == (40, 40)
        for name, parameter in parameters_by_disk_name(model):
            if "embedding" not in name and "output" not in name:
                assert torch.equal(parameter, before[name]), name
        rows = model.embedding.word_embeddings.weight
        old = before["embedding.word_embeddings.weight"]
        assert torch.equal(rows[40 : 40 + 64], old[64 : 64 + 64])  # <bov>, <pad> and their kin
        assert not rows[40 + 64 :].any() and rows[:40].any(dim=1).all()
    run(config)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    checkpoint = context.list_checkpoints(tmp_path / "run")[-1]
    recorded = context.read_data(checkpoint)
    assert recorded is not None and recorded.contract is not None
    assert recorded.contract.tokenizer.id == "coarse"
    assert recorded.contract.text_encoder == Manifest.load(swapped / "new").contract.text_encoder


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
        with pytest.raises(ConfigError, match=words) as caught:
            run(make_config(folder, tmp_path / "run", **settings))
        assert caught.value.exit_code == 2
        log_dir = tmp_path / f"resumed-{folder.name}"
        with pytest.raises(ConfigError, match="was trained on other data") as caught:
            stopped = stopped_half_way(reference_run, log_dir)
            run(make_config(folder, stopped, **SETTINGS))
        assert caught.value.exit_code == 2


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
