"""The adversarial fine-tune: losses, adaptive weight, resume, and no trace while it is off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tokenizer_training_case import read_rows, small_config
from safetensors.torch import load_file

from cosmos_posttrain.errors import NonFiniteLossError
from cosmos_posttrain.tokenizer_training import trainer
from cosmos_posttrain.tokenizer_training.adversarial import Adversary, Discriminator, hinge_loss
from cosmos_posttrain.tokenizer_training.config import AdversarialConfig
from cosmos_posttrain.tokenizer_training.parallel import DataParallelRanks
from cosmos_posttrain.tokenizer_training.trainer import train

ON = AdversarialConfig(weight=0.5, start_step=2, lr=1e-3, channels=8)


def make_adversary(config: AdversarialConfig = ON) -> Adversary:
    return Adversary(config, 0, torch.device("cpu"), "float32", DataParallelRanks())


@pytest.mark.parametrize(
    ("clip", "patches"), [((17, 64, 64), (5, 10, 10)), ((1, 32, 48), (1, 6, 8))]
)
def test_discriminator_scores_patches_of_clips_and_images(
    clip: tuple[int, int, int], patches: tuple[int, int, int]
) -> None:
    network = Discriminator(8)
    scores = network(torch.rand(2, 3, *clip))
    assert scores.shape == (2, 1, *patches)
    # No clip's scores depend on the others in its batch.
    both = torch.rand(2, 3, *clip)
    torch.testing.assert_close(network(both)[1:], network(both[1:]), rtol=1e-4, atol=1e-5)


def test_hinge_loss_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 1.0))


def test_adaptive_weight_balances_the_gradients_at_the_last_layer() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 3, requires_grad=True)
    clip = torch.rand(1, 3, 5, 16, 16)
    reconstruction = torch.einsum("ij,bjthw->bithw", weight, clip)
    loss = 10 * (reconstruction - clip).abs().mean()
    adversary = make_adversary()
    term, adaptive = adversary.generator_term(reconstruction, loss, weight)
    scores = adversary.discriminator(reconstruction)
    torch.testing.assert_close(term, -0.5 * adaptive * scores.mean())
    pulls = [torch.autograd.grad(v, weight, retain_graph=True)[0].norm() for v in (term, loss)]
    # 1e-4 in the denominator keeps the two from being exactly weight : 1.
    assert (pulls[0] / pulls[1]).item() == pytest.approx(0.5, rel=0.05)
    term.backward()
    assert all(p.grad is None for p in adversary.discriminator.parameters())
    clamped = make_adversary(AdversarialConfig(weight=0.5, channels=8, adaptive_limit=0.01))
    again = torch.einsum("ij,bjthw->bithw", weight, clip)
    assert clamped.generator_term(again, (again - clip).abs().mean(), weight)[1] <= 0.01


def test_discriminator_learns_to_tell_real_from_reconstructed() -> None:
    torch.manual_seed(0)
    adversary = make_adversary()
    losses = []
    for _ in range(30):
        video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
        loss = adversary.loss(0.3 * video, video)
        adversary.backward(loss)
        adversary.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_resume_is_exact_with_the_discriminator(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_config(videos, tmp_path / "whole", adversarial=ON))

    class Killed(BaseException):
        pass

    step = trainer._Trainer.step

    def step_until_killed(self: trainer._Trainer) -> dict[str, float]:
        if self.completed_steps == 4:
            raise Killed
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer._Trainer, "step", step_until_killed)
        train(small_config(videos, tmp_path / "killed", adversarial=ON))
    train(small_config(videos, tmp_path / "killed", adversarial=ON))
    rows = read_rows(tmp_path / "killed")
    assert rows == read_rows(tmp_path / "whole")
    checkpoints = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["adversary"]
        for name in ("whole", "killed")
    ]
    for name, tensor in checkpoints[0]["discriminator"].items():
        assert torch.equal(tensor, checkpoints[1]["discriminator"][name])
    assert ["loss_discriminator" in row for row in rows] == [False] * 2 + [True] * 4
    assert all(row["loss_adaptive_weight"] > 0 for row in rows[2:])


def test_nothing_changes_before_it_starts_or_while_it_is_off(videos: Path, tmp_path: Path) -> None:
    off = small_config(videos, tmp_path / "off", max_steps=2)
    late = small_config(videos, tmp_path / "late", max_steps=2, adversarial=ON)
    for config in (off, late):
        train(config)
    assert read_rows(tmp_path / "off") == read_rows(tmp_path / "late")
    files = [load_file(tmp_path / n / "model.safetensors") for n in ("off", "late")]
    assert all(torch.equal(files[0][n], files[1][n]) for n in files[0])
    keys = torch.load(tmp_path / "off" / "checkpoint.pt", weights_only=True).keys()
    assert set(keys) == {"completed_steps", "row", "network", "ema", "optimizer"}


def test_non_finite_discriminator_loss_stops_before_any_weight_changes(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Adversary, "loss", lambda self, y, x: torch.tensor(float("nan"), requires_grad=True)
    )
    updates: list[int] = []
    monkeypatch.setattr(trainer._Trainer, "_update", lambda self, loss, step: updates.append(step))
    config = small_config(videos, tmp_path, adversarial=AdversarialConfig(weight=0.1, channels=4))
    with pytest.raises(NonFiniteLossError, match="loss_discriminator is nan at step 0"):
        train(config)
    assert not updates
