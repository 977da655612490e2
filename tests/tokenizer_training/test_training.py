"""Training of tokenizers: it learns, resumes exactly, and refuses what it cannot do."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tokenizer_training_case import read_rows, small_config
from safetensors.torch import load_file
from torch import Tensor

from cosmos_posttrain import config as config_module
from cosmos_posttrain import files
from cosmos_posttrain.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteLossError,
    OutputFolderError,
    SaveError,
    StoppedError,
    UserError,
)
from cosmos_posttrain.tokenizer import load_tokenizer
from cosmos_posttrain.tokenizer_training import trainer
from cosmos_posttrain.tokenizer_training.config import (
    ExtraFootageConfig,
    LossConfig,
    TokenizerDataConfig,
    TokenizerOptimizerConfig,
    TokenizerTrainConfig,
    validate,
)
from cosmos_posttrain.tokenizer_training.data import ClipSource, augment_colors
from cosmos_posttrain.tokenizer_training.losses import (
    multiscale_gradient,
    psnr,
    reconstruction_loss,
    ssim,
    ssim_loss,
)
from cosmos_posttrain.tokenizer_training.objective import Losses, Objective
from cosmos_posttrain.tokenizer_training.trainer import train
from cosmos_posttrain.video import write_mp4

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_resumed_run_equals_an_uninterrupted_one(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_config(videos, tmp_path / "whole"))

    class Killed(BaseException):
        pass

    step = trainer._Trainer.step

    def step_until_killed(self: trainer._Trainer) -> dict[str, float]:
        if self.completed_steps == 5:
            raise Killed
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer._Trainer, "step", step_until_killed)
        train(small_config(videos, tmp_path / "killed"))
    assert len(read_rows(tmp_path / "killed")) == 5
    train(small_config(videos, tmp_path / "killed"))

    whole, resumed = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = read_rows(tmp_path / "killed")
    assert [row["step"] for row in rows] == list(range(6))
    assert rows == read_rows(tmp_path / "whole")
    assert "validation_psnr" in rows[2] and "validation_psnr" in rows[5]


def test_training_learns_and_writes_a_loadable_tokenizer(videos: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = small_config(videos, output, max_steps=60, save_every=60, validate_every=60)
    config.optimizer.warmup_steps = 5
    config.optimizer.ema_decay = 0.9
    train(config)
    losses = [row["loss"] for row in read_rows(output)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    tokenizer = load_tokenizer(output, device="cpu")
    assert tokenizer.vocab_size == 200
    assert tokenizer.encode(torch.zeros(1, 3, 5, 32, 32)).shape == (1, 2, 4, 4)
    # Finished: the same command again changes nothing.
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    train(config)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_noise_phase_and_start_from_weights(videos: Path, tmp_path: Path) -> None:
    train(small_config(videos, tmp_path / "first", noise_steps=3, max_steps=3))
    second = small_config(
        videos, tmp_path / "second", init_from=str(tmp_path / "first"), max_steps=1
    )
    second.optimizer.lr = 1e-9
    second.recenter_steps = 0
    train(second)
    first, last = (load_file(tmp_path / n / "model.safetensors") for n in ("first", "second"))
    for name, tensor in first.items():
        torch.testing.assert_close(last[name], tensor, atol=1e-6, rtol=1e-5)


def test_other_contents_and_another_run_are_not_overwritten(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(OutputFolderError, match="something else"):
        train(small_config(videos, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    output = tmp_path / "run"
    train(small_config(videos, output, max_steps=1))
    with pytest.raises(OutputFolderError, match="another seed"):
        train(small_config(videos, output, max_steps=1, seed=5))
    (output / "train.yaml").write_text("colour: blue")
    with pytest.raises(OutputFolderError, match=r"train\.yaml does not hold the settings"):
        train(small_config(videos, output, max_steps=1))


def test_a_complete_run_says_so_and_a_damaged_checkpoint_is_refused(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(videos, tmp_path / "run", max_steps=1)
    train(config)
    capsys.readouterr()
    train(config)
    assert "is complete already" in capsys.readouterr().out
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    for damaged in (checkpoint.read_bytes()[:1000], b"", b"garbage"):
        checkpoint.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="cannot be read") as error:
            train(config)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: 0} for name in ("num_threads", "log_every", "validate_every", "save_every")),
        {"num_validation_clips": 0},
        {"loss": LossConfig(gradient_scales=6)},
        {"optimizer": TokenizerOptimizerConfig(beta2=1.0)},
        {"data": TokenizerDataConfig(heights=[0])},
        {"data": TokenizerDataConfig(pan_probability=1.5)},
        {"data": TokenizerDataConfig(crop_sizes=[])},
        {"data": TokenizerDataConfig(extra=ExtraFootageConfig(share=1.5))},
        {"data": TokenizerDataConfig(extra=ExtraFootageConfig(max_stride=0))},
        {"optimizer": TokenizerOptimizerConfig(lr=float("nan"))},
        {"optimizer": TokenizerOptimizerConfig(warmup_steps=-1)},
        {"seed": -1},
    ],
)
def test_settings_that_would_fail_later_are_refused_first(
    changes: dict[str, Any], videos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"must"):
        validate(small_config(videos, tmp_path, **changes))


def test_a_non_finite_loss_stops_before_anything_is_saved(videos: Path, tmp_path: Path) -> None:
    config = small_config(videos, tmp_path / "run", loss=LossConfig(l2=1e38))
    with pytest.raises(NonFiniteLossError, match="the loss is inf at step 0; nothing was updated"):
        train(config)
    assert not (tmp_path / "run" / "model.safetensors").exists()


class BadGradient(Objective):
    """From the sixth call on the loss is as it was, but its gradient is not a number."""

    calls = 0

    def __call__(self, latents: Tensor, *args: Any) -> Losses:
        losses = super().__call__(latents, *args)
        BadGradient.calls += 1
        if BadGradient.calls < 6:
            return losses
        return replace(losses, total=losses.total + (0 * latents.sum()).sqrt())


def is_finite(folder: Path) -> bool:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    weights = load_file(folder / "model.safetensors")
    return all(bool(t.isfinite().all()) for t in (weights | state["network"]).values())


def test_a_non_finite_gradient_stops_the_run_which_goes_on_with_a_lower_lr(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(videos, tmp_path, save_every=2, max_steps=8)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Objective", BadGradient)
        with pytest.raises(NonFiniteLossError, match="gradient is nan at step 5; nothing was"):
            train(config)
    assert is_finite(tmp_path) and len(read_rows(tmp_path)) == 5
    before = [row["lr"] for row in read_rows(tmp_path)]
    config.optimizer.lr /= 10
    train(config)
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["lr"] for row in rows][:4] == before[:4]
    assert rows[4]["lr"] == pytest.approx(before[4] / 10)


def test_a_weight_that_is_not_finite_is_never_saved(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = trainer._Trainer._settle

    def spoil(self: trainer._Trainer, latents: Tensor, step: int) -> int:
        if step == 3:
            self.ema.quant_conv.conv3d.bias.data[0] = float("inf")
        return settle(self, latents, step)

    monkeypatch.setattr(trainer._Trainer, "_settle", spoil)
    with pytest.raises(NonFiniteLossError, match="a weight is not finite after step 5"):
        train(small_config(videos, tmp_path))
    assert is_finite(tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["completed_steps"] == 3


def test_a_signal_saves_and_ends_the_run_which_goes_on_with_nothing_lost(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_config(videos, tmp_path / "whole"))
    step = trainer._Trainer.step

    def step_and_signal(self: trainer._Trainer) -> dict[str, Any]:
        if self.completed_steps == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Trainer, "step", step_and_signal)
        with pytest.raises(StoppedError, match="stopped by SIGUSR1 after 4 of 6 steps") as caught:
            train(small_config(videos, tmp_path / "stopped"))
    assert caught.value.exit_code == 1
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    train(small_config(videos, tmp_path / "stopped"))
    assert read_rows(tmp_path / "stopped") == read_rows(tmp_path / "whole")
    whole, stopped = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.parametrize("last", [3, 6])
def test_a_run_killed_between_saving_and_logging_loses_no_row(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    train(small_config(videos, tmp_path / "whole"))
    report = trainer._Trainer._report

    def report_unless_killed(self: trainer._Trainer, log: Any) -> dict[str, float]:
        if self.completed_steps == last:
            raise KeyboardInterrupt
        return report(self, log)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer._Trainer, "_report", report_unless_killed)
        train(small_config(videos, tmp_path / "killed"))
    assert len(read_rows(tmp_path / "killed")) == last - 1
    train(small_config(videos, tmp_path / "killed"))
    assert read_rows(tmp_path / "killed") == read_rows(tmp_path / "whole")


def test_a_folder_is_trained_into_by_one_process(videos: Path, tmp_path: Path) -> None:
    with (
        files.locked(tmp_path / "run"),
        pytest.raises(OutputFolderError, match="being written"),
    ):
        train(small_config(videos, tmp_path / "run"))
    (tmp_path / "file").touch()
    with pytest.raises(OutputFolderError, match="is a file"):
        train(small_config(videos, tmp_path / "file"))


def test_a_full_disk_leaves_the_save_before_it(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, iter(range(10))

    def save_until_full(state: dict[str, Any], path: Path) -> None:
        save(state, path)
        if next(calls) == 1:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1")

    monkeypatch.setattr(torch, "save", save_until_full)
    with pytest.raises(SaveError, match=r"step 6 could not be saved in .*make room"):
        train(small_config(videos, tmp_path))
    assert not [path for path in tmp_path.iterdir() if files.is_leftover(path.name)]
    monkeypatch.undo()
    train(small_config(videos, tmp_path))
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(6))


def test_bad_settings_are_listed_at_once(videos: Path, tmp_path: Path) -> None:
    config = small_config(videos, tmp_path / "run", max_steps=0, dtype="int8")
    with pytest.raises(ConfigError, match=r"--max_steps 0 .*; dtype int8 is not one of"):
        train(config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no video"):
        ClipSource(TokenizerDataConfig(videos=str(tmp_path / "empty"), photographs=False))


def test_held_out_frames_are_never_trained_on(videos: Path) -> None:
    source = ClipSource(small_config(videos, Path("unused")).data)
    for training, held_out in zip(source.videos, source.validation_videos, strict=True):
        assert training.levels[0].shape[1] + held_out.levels[0].shape[1] == 24
        assert held_out.levels[0].shape[1] >= 5
    assert source.validation_clips(2).shape == (4, 3, 5, 32, 48)


def test_batches_depend_on_the_generator_alone(videos: Path) -> None:
    source = ClipSource(small_config(videos, Path("unused")).data)
    first, same, other = (
        source.batch(3, 5, (32, 40), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (3, 3, 5, 32, 40)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.abs().max() <= 1


def write_one_color(folder: Path, rgb: tuple[int, int, int], num_frames: int) -> Path:
    """A video of 40x56 pixels that is never anything else than one colour."""
    frames = torch.tensor(rgb, dtype=torch.uint8)[:, None, None, None]
    write_mp4(folder / "0.mp4", frames.expand(3, num_frames, 40, 56), fps=10)
    return folder


def test_extra_footage_has_its_share_and_its_own_colors(videos: Path, tmp_path: Path) -> None:
    extra = str(write_one_color(tmp_path, (200, 120, 40), num_frames=24))

    def num_extra(**changes: Any) -> int:
        data = small_config(videos, Path("unused")).data
        data.color_strength, data.desaturation = 1.0, 1.0
        data.extra = ExtraFootageConfig(videos=extra, **changes)
        clips = ClipSource(data).batch(40, 5, (32, 32), torch.Generator().manual_seed(0))
        wanted = torch.tensor([200.0, 120.0, 40.0]) / 127.5 - 1
        error = clips - wanted[:, None, None, None]
        return int((error.abs().flatten(1).amax(1) < 0.05).sum())

    assert num_extra(share=0.0) == 0
    assert num_extra(share=1.0) == 40
    assert 10 <= num_extra() <= 30
    assert num_extra(share=1.0, color_strength=1.0) < 5


def test_extra_footage_is_held_out_where_it_is_long_enough(videos: Path, tmp_path: Path) -> None:
    for num_frames, num_held_out in ((9, 2), (24, 3)):
        extra = write_one_color(tmp_path / str(num_frames), (200, 120, 40), num_frames)
        data = small_config(videos, Path("unused")).data
        data.extra = ExtraFootageConfig(videos=str(extra))
        source = ClipSource(data)
        assert len(source.validation_videos) == num_held_out
        most = max(video.levels[0].shape[1] for video in source.extra)
        assert most == (9 if num_held_out == 2 else 18)


def test_color_augmentation_keeps_the_range_and_can_be_off() -> None:
    clip = torch.rand(3, 2, 4, 4) * 2 - 1
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augment_colors(clip, 0.0, generator), clip)
    changed = augment_colors(clip, 1.0, generator)
    assert changed.abs().max() <= 1 and not torch.equal(changed, clip)


def test_losses_are_zero_for_a_perfect_reconstruction_and_see_motion() -> None:
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    assert reconstruction_loss(video, video, LossConfig()) == 0
    brighter = video + 0.1
    assert multiscale_gradient(brighter, video, 3) < 1e-6  # constant offsets are L1's business
    assert multiscale_gradient(video.roll(1, dims=2), video, 3) > 0.1


def test_psnr_and_ssim_match_scikit_image() -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    torch.manual_seed(0)
    video = torch.rand(1, 3, 2, 24, 32) * 2 - 1
    noisy = (video + 0.2 * torch.randn(video.shape)).clamp(-1, 1)
    pixels = [
        ((v[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
        for v in (video, noisy)
    ]
    expected = peak_signal_noise_ratio(*pixels)
    assert psnr(noisy, video).item() == pytest.approx(expected, abs=1e-3)
    scores = [structural_similarity(a, b, channel_axis=-1) for a, b in zip(*pixels, strict=True)]
    assert ssim(noisy, video).item() == pytest.approx(sum(scores) / 2, abs=1e-3)


def test_ssim_term_is_one_minus_ssim_with_gradients_everywhere() -> None:
    torch.manual_seed(0)
    video = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    noisy = (video * 0.9 + 0.1 * torch.randn(video.shape)).clamp(-1, 1).requires_grad_()
    term = ssim_loss(noisy, video)
    # The measure rounds to 8 bits, the term does not.
    assert term.item() == pytest.approx(1 - ssim(noisy, video).mean().item(), abs=2e-4)
    (gradient,) = torch.autograd.grad(term, noisy)
    assert (gradient != 0).all()
    assert ssim_loss(video, video) == pytest.approx(0, abs=1e-6)
    only = LossConfig(l1=0, l2=0, gradient=0, ssim=2.0)
    assert reconstruction_loss(noisy, video, only).item() == pytest.approx(2 * term.item())


def test_a_run_of_a_release_without_newer_options_can_be_continued(
    videos: Path, tmp_path: Path
) -> None:
    import yaml

    train(small_config(videos, tmp_path, max_steps=2))
    recorded = tmp_path / "train.yaml"
    values = yaml.safe_load(recorded.read_text())
    for key in ("adversarial", "precision", "compile"):
        del values[key]
    for key in ("ssim", "entropy", "perceptual", "flow"):
        del values["loss"][key]
    recorded.write_text(yaml.safe_dump(values))
    train(small_config(videos, tmp_path, max_steps=2))
    with pytest.raises(OutputFolderError, match="another loss"):
        train(small_config(videos, tmp_path, max_steps=2, loss=LossConfig(ssim=0.1)))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("tokenizer_*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    from cosmos_posttrain.tokenizer.network import DVConfig
    from cosmos_posttrain.tokenizer_training.config import validate

    config = config_module.merge(TokenizerTrainConfig, path, [("output_dir", "run")])
    validate(config)
    rate = DVConfig.from_dict(config.network).compression
    assert path.stem.removesuffix("_stage2").endswith(f"dv{rate.name}")
