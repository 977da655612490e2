"""Gradient buffers without a pass of zeros, and the update that clips, against plain torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_posttrain.config import merge
from cosmos_posttrain.data.indexed import ShardWriter
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.training import optimizer as optimizers
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.gradients import complete_gradients, forget_gradients
from cosmos_posttrain.training.norms import gradient_norms
from cosmos_posttrain.training.step import run_batches
from cosmos_posttrain.training.trainer import Trainer


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    """Two micro-batches of two short clips a step."""
    model = preset("tiny")
    generator = np.random.default_rng(0)
    with ShardWriter(tmp_path / "tokens.bin", tmp_path / "tokens.idx", "uint16") as shard:
        for _ in range(8):
            shard.add(generator.integers(0, model.vocab_size, 24, dtype=np.uint16))
        shard.finish()
    settings = {
        "data.path": str(tmp_path / "tokens"),
        "data.split_string": "1,0,0",
        "data.latent_shape": "2,3,4",
        "data.vocab_size": model.vocab_size,
        "model.path": "random:tiny",
        "parallel.tensor_model_parallel_size": 1,
        "log_dir": str(tmp_path / "run"),
        "global_batch_size": 4,
        "micro_batch_size": 2,
    }
    with contextlib.closing(Trainer(merge(TrainConfig, None, list(settings.items())))) as trainer:
        yield trainer


def _by_autograd(trainer: Trainer, batches: list) -> list[Tensor]:
    """Gradients of the mean loss, without Megatron's buffers."""
    parameters = list(trainer.model.parameters())
    buffers = [parameter.__dict__.pop("main_grad") for parameter in parameters]
    linears = [m for m in trainer.model.modules() if hasattr(m, "gradient_accumulation_fusion")]
    for linear in linears:
        linear.gradient_accumulation_fusion = False
    total = torch.zeros(())
    for batch in batches:
        losses = trainer.model(batch.tokens, None, None, labels=batch.labels)
        total = total + (losses * batch.loss_mask).sum()
    mean = total / sum(batch.loss_mask.sum() for batch in batches)
    found = torch.autograd.grad(mean, parameters)
    for parameter, buffer in zip(parameters, buffers, strict=True):
        parameter.main_grad = buffer  # type: ignore[attr-defined]
    for linear in linears:
        linear.gradient_accumulation_fusion = True
    return list(found)


def test_buffers_hold_one_steps_gradients(trainer: Trainer) -> None:
    """Of two micro-batches; an old step's are replaced, not added to."""
    batches = trainer.batches()
    for _ in range(2):
        wanted = next(batches)
        forget_gradients(trainer.ddp)
        run_batches(trainer.ddp, wanted)
        found = [parameter.main_grad.clone() for parameter in trainer.model.parameters()]
        for value, right in zip(found, _by_autograd(trainer, wanted), strict=True):
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-7)


def test_what_no_backward_pass_reaches_has_no_gradient(trainer: Trainer) -> None:
    run_batches(trainer.ddp, next(trainer.batches()))
    assert all(parameter.main_grad.any() for parameter in trainer.model.parameters())
    forget_gradients(trainer.ddp)
    complete_gradients(trainer.ddp)
    assert not any(parameter.main_grad.any() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
def test_an_update_is_that_of_torch(trainer: Trainer, clip: float) -> None:
    for part in optimizers.parts_of(trainer.optimizer.optimizer):
        part.config.clip_grad = clip
    settings = trainer.config.optimizer
    plain = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    decays = [parameter for parameter in plain if parameter.ndim > 1]
    rest = [parameter for parameter in plain if parameter.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": decays, "weight_decay": settings.weight_decay}, {"params": rest}],
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=0.0,
    )
    batches = trainer.batches()
    for _ in range(3):
        forget_gradients(trainer.ddp)
        run_batches(trainer.ddp, next(batches))
        for group in reference.param_groups:
            group["lr"] = trainer.optimizer.optimizer.param_groups[0]["lr"]
        for copy, parameter in zip(plain, trainer.model.parameters(), strict=True):
            copy.grad = parameter.main_grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(plain, clip or float("inf"))
        norm, _ = gradient_norms(trainer.optimizer.optimizer)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        reference.step()
        optimizers.apply_gradients(trainer.optimizer.optimizer, float(norm))
        trainer.schedule.step(increment=1)
    for copy, parameter in zip(plain, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), copy, rtol=1e-4, atol=1e-7)


def test_backward_passes_are_not_intercepted(trainer: Trainer) -> None:
    """Within ``cpu_device`` a tensor says that it is CUDA's; a backward pass is outside of it."""
    seen = []
    norm = trainer.model.decoder.final_layernorm.weight
    norm.register_hook(lambda _grad: seen.append(torch.zeros(1).type()))
    run_batches(trainer.ddp, next(trainer.batches()))
    assert seen == ["torch.FloatTensor"] * 2
