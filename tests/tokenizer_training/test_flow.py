"""The optical flow term, by OpenCV and by a (stand-in for a) flow network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from helpers.tokenizer_training_case import read_rows, small_config
from torch import Tensor, nn

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.tokenizer_training import flow
from cosmos_posttrain.tokenizer_training.config import LossConfig
from cosmos_posttrain.tokenizer_training.flow import (
    RaftFlowLoss,
    WarpFlowLoss,
    make_flow_loss,
    visibility,
    warp,
)
from cosmos_posttrain.tokenizer_training.trainer import train

CPU = torch.device("cpu")


def moving_texture(num_frames: int = 4, size: int = 64, speed: int = 2) -> Tensor:
    """(1, 3, T, size, size): a smooth random texture that moves ``speed`` pixels to the right."""
    torch.manual_seed(0)
    noise = torch.rand(1, 3, size // 8, size // 4)
    wide = F.interpolate(noise, (size, 2 * size), mode="bicubic").clamp(0, 1) * 2 - 1
    starts = [(num_frames - 1 - t) * speed for t in range(num_frames)]
    return torch.stack([wide[..., s : s + size] for s in starts], dim=2)


def test_warp_fetches_what_the_flow_points_at() -> None:
    frames = torch.rand(1, 2, 6, 8)
    there = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 6, 8)
    torch.testing.assert_close(warp(frames, there)[..., :-1, :-2], frames[..., 1:, 2:])


def test_pixels_that_leave_the_frame_or_are_covered_do_not_count() -> None:
    there = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 6, 8).clone()
    mask = visibility(there, -there)
    assert mask[..., :6].all() and not mask[..., 6:].any()
    back = -there
    back[..., 4] = 9.0  # the way back from column 4 does not lead to column 2
    assert visibility(there, back)[0, 0, 0].tolist() == [1, 1, 0, 1, 1, 1, 0, 0]


def test_opencv_finds_the_motion_there_and_back_and_always_the_same() -> None:
    video = moving_texture(speed=2)
    there, back = WarpFlowLoss().real_flow(video)
    assert there.shape == back.shape == (1, 3, 2, 64, 64)
    inner = (..., slice(16, -16), slice(16, -16))
    assert there[inner].mean((0, 1, 3, 4)).tolist() == pytest.approx([2, 0], abs=0.3)
    assert back[inner].mean((0, 1, 3, 4)).tolist() == pytest.approx([-2, 0], abs=0.3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(WarpFlowLoss().real_flow(video), (there, back), strict=True)
    )


def test_warp_term_prefers_the_steady_reconstruction() -> None:
    video, loss = moving_texture(), WarpFlowLoss()
    flicker = torch.tensor([0.2, -0.2, 0.2, -0.2]).view(1, 1, 4, 1, 1)
    unsteady = (video + flicker).requires_grad_()
    steady, worse = loss(video + 0.2, video), loss(unsteady, video)
    assert steady == pytest.approx(loss(video, video).item(), abs=1e-5)
    assert steady < 0.05 < 0.3 < worse
    (gradient,) = torch.autograd.grad(worse, unsteady)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    # Frozen frames move wrongly, though each looks right.
    assert loss(video[:, :, :1].expand_as(video), video) > 2 * steady


def test_pixels_that_cannot_be_followed_do_not_weigh() -> None:
    video, loss = moving_texture(num_frames=2, speed=6), WarpFlowLoss()
    there, back = (f.flatten(0, 1) for f in loss.real_flow(video))
    seen = visibility(there, back)
    assert 0.5 < seen.mean() < 0.99
    for mask, matters in ((seen, True), (1 - seen, False)):
        fake = video.clone()
        fake[:, :, 0] += 0.5 * mask  # frame 0 is only compared with, never warped
        assert (loss(fake, video) > 1.5 * loss(video, video)) == matters
        assert (loss(fake, video) != loss(video, video)) == matters


def test_each_clip_weighs_the_same() -> None:
    clips = torch.cat([moving_texture(speed=1), moving_texture(speed=6)])
    fake, loss = clips + 0.1 * torch.randn(clips.shape), WarpFlowLoss()
    parts = [loss(fake[i : i + 1], clips[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(loss(fake, clips), torch.stack(parts).mean())


def test_training_skips_the_term_on_image_batches(videos: Path, tmp_path: Path) -> None:
    train(small_config(videos, tmp_path, max_steps=3, loss=LossConfig(flow=0.1)))
    rows = read_rows(tmp_path)
    assert [row.get("loss_flow", 0) > 0 for row in rows] == [True, True, False]


def test_a_missing_library_is_named_with_what_to_install(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install opencv-python-headless"):
        train(small_config(videos, tmp_path / "run", loss=LossConfig(flow=0.1)))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="needs torchvision"):
        make_flow_loss("raft.pth", CPU)


class StandInRaft(nn.Module):
    """The call signature of torchvision's RAFT around one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 2, 5, padding=2)

    def forward(self, first: Tensor, second: Tensor, num_flow_updates: int = 12) -> list[Tensor]:
        assert min(first.shape[-2:]) >= 128 and not any(n % 8 for n in first.shape[-2:])
        coarse = self.conv(torch.cat([first, second], dim=1))
        return [coarse * (i + 1) for i in range(num_flow_updates)]


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("torchvision.models.optical_flow")
    module.raft_small = lambda weights: StandInRaft()  # type: ignore[attr-defined]
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(flow, "find_spec", lambda name: object())
    yield


@pytest.mark.usefixtures("torchvision")
def test_flow_network_term_compares_flows_and_is_differentiable(tmp_path: Path) -> None:
    raft = StandInRaft()
    torch.save(raft.state_dict(), tmp_path / "raft.pth")
    loss = make_flow_loss(str(tmp_path / "raft.pth"), CPU)
    assert isinstance(loss, RaftFlowLoss)
    video = torch.rand(2, 3, 3, 36, 40) * 2 - 1
    fake = torch.rand(video.shape).requires_grad_()
    term = loss(fake, video)
    (gradient,) = torch.autograd.grad(term, fake)
    assert gradient.abs().sum() > 0
    assert loss(video, video) == 0

    def flows(clips: Tensor) -> Tensor:
        frames = F.interpolate(clips.transpose(1, 2).flatten(0, 1), (128, 128), mode="bilinear")
        pairs = frames.unflatten(0, (2, 3))
        return raft(pairs[:, :-1].flatten(0, 1), pairs[:, 1:].flatten(0, 1))[5]

    torch.testing.assert_close(term, (flows(fake) - flows(video)).abs().mean())
    (tmp_path / "other.pth").write_bytes(b"")
    with pytest.raises(ConfigError, match="not a readable weights file"):
        make_flow_loss(str(tmp_path / "other.pth"), CPU)
    torch.save({"conv.bias": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="does not hold RAFT-small's weights"):
        make_flow_loss(str(tmp_path / "other.pth"), CPU)
