"""Batches whose numbers are not finite: left out, named, and counted over restarts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.run_case import make_config, run

from cosmos_posttrain.errors import NonFiniteLossError


def train_with_bad_batches(config: Any, bad_steps: set[int], bad_rank: int = 0) -> str:
    """Trains; at some steps one rank's gradient of one weight is infinite. Returns what it says."""
    from cosmos_posttrain.training.trainer import Trainer

    trainer = Trainer(config)

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        is_bad = trainer.completed_steps in bad_steps and torch.distributed.get_rank() == bad_rank
        return gradient * float("inf") if is_bad else gradient

    trainer.model.decoder.final_layernorm.weight.register_hook(spoil)
    try:
        trainer.fit()
    except NonFiniteLossError as error:
        return str(error)
    finally:
        trainer.close()
    return ""


def rows(log_dir: Path) -> list[dict[str, Any]]:
    text = (log_dir / "default" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def curve(log_dir: Path) -> list[tuple[Any, ...]]:
    keys = ("step", "reduced_train_loss", "lr", "consumed_samples")
    return [tuple(row[key] for key in keys) for row in rows(log_dir)]


def test_bad_batches_are_skipped_named_and_counted(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 8, "save_every_n_steps": 4, "skip_nonfinite": 2}
    assert not train_with_bad_batches(make_config(tokens, tmp_path / "whole", **settings), {2, 5})
    whole = rows(tmp_path / "whole")
    assert [row["step"] for row in whole if row["grad_norm"] is None] == [2, 5]
    said = capsys.readouterr().out
    sentence = "the norm of the gradient is (inf|nan) at step 2: batch 1 of at most 2 that are skip"
    assert re.search(sentence, said)
    assert len(whole[2]["skipped_clips"]) == 4
    assert all(f"{name}" in said for name in whole[2]["skipped_clips"] + whole[5]["skipped_clips"])
    assert "skipped_clips" not in whole[3]
    # The learning rates and the clips go on as if nothing had been left out.
    run(make_config(tokens, tmp_path / "plain", max_steps=8))
    plain = rows(tmp_path / "plain")
    assert [row["lr"] for row in whole] == [row["lr"] for row in plain]
    assert [r["consumed_samples"] for r in whole] == [r["consumed_samples"] for r in plain]
    assert [row["reduced_train_loss"] for row in whole[:3]] == [
        row["reduced_train_loss"] for row in plain[:3]
    ]
    assert whole[3]["reduced_train_loss"] != plain[3]["reduced_train_loss"]
    # Killed after step 6 and resumed from step 4, the count of the checkpoint goes on.
    again = tmp_path / "again"
    message = train_with_bad_batches(make_config(tokens, again, **settings), {2, 5, 6})
    assert "at step 6, after 2 skipped batches; nothing of it was applied" in message
    assert not train_with_bad_batches(make_config(tokens, again, **settings), {5})
    assert curve(again) == curve(tmp_path / "whole")
    settings["max_steps"], settings["optimizer__lr_decay_style"] = 12, "constant"
    message = train_with_bad_batches(make_config(tokens, again, **settings), {9})
    assert "at step 9, after 2 skipped batches" in message


def test_a_skipped_batch_leaves_weights_and_moments_alone(tokens: Path, tmp_path: Path) -> None:
    from cosmos_posttrain.training.callbacks.guard import Guard
    from cosmos_posttrain.training.trainer import Trainer

    config = make_config(tokens, tmp_path, skip_nonfinite=1)
    trainer = Trainer(config)
    batches = trainer.batches()
    trainer.train_step(next(batches))
    parts = [part for own in trainer.optimizer.own_parts() for part in own.state.values()]
    watched = [*trainer.model.parameters(), *parts]
    before = [tensor.detach().clone() for tensor in watched]
    norm = trainer.model.decoder.final_layernorm.weight
    hook = norm.register_hook(lambda gradient: gradient * float("nan"))
    row = trainer.train_step(next(batches))
    Guard(config).after_step(trainer, row)
    hook.remove()
    assert all(torch.equal(*pair) for pair in zip(before, watched, strict=True))
    assert trainer.completed_steps == 2 and row["consumed_samples"] == 8
    # Nothing of the bad gradient is left in the buffers of the next step.
    assert trainer.train_step(next(batches))["grad_norm"] < 1e3
    assert not any(torch.equal(*pair) for pair in zip(before[:3], watched[:3], strict=True))
    trainer.close()


@pytest.mark.distributed
@pytest.mark.parametrize("tensor", [1, 2])
def test_all_ranks_skip_what_one_rank_cannot_use(tokens: Path, tmp_path: Path, tensor: int) -> None:
    config = make_config(tokens, tmp_path, max_steps=5, skip_nonfinite=1)
    config.parallel.tensor_model_parallel_size = tensor
    messages = run_distributed(train_with_bad_batches, 2, config, {2, 4}, 1)
    assert all("at step 4, after 1 skipped batch" in message for message in messages)
    found = rows(tmp_path)
    assert [row["step"] for row in found if row["grad_norm"] is None] == [2]
    assert len(set(found[2]["skipped_clips"])) == 4
