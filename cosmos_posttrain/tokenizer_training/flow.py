"""The optical flow term: reconstructions have to move as the real clips do.

Flows in: real and reconstructed clips (B, 3, T, H, W) in [-1, 1], T > 1. Flows out: a scalar with
gradients to the reconstruction. x_t are real frames, y_t reconstructed ones, f(a, b) is the flow
that takes a pixel p of a to p + f(p) in b.

:class:`RaftFlowLoss`, with torchvision and RAFT's weights (Teed and Deng 2020), in which the flow
itself is differentiable:

    mean over t, p of | f(y_t, y_t+1)(p) - f(x_t, x_t+1)(p) |

:class:`WarpFlowLoss`, with OpenCV (DIS, Kroeger et al. 2016), in which only the real frames' flow
is needed, F_t = f(x_t, x_t+1) and back, G_t = f(x_t+1, x_t):

    sum over t, p of M_t(p) | y_t+1(p + F_t(p)) - y_t(p) | / (3 sum over t, p of M_t(p))

for each clip, then the mean over clips. M_t is 1 where the real pixel can be followed (Sundaram et
al. 2010, equation 5): p + F_t(p) lies in the frame and, with b = G_t(p + F_t(p)),
|F_t(p) + b|^2 < 0.01 (|F_t(p)|^2 + |b|^2) + 0.5. It asks for a stable picture along the motion;
as interpolation blurs, it is small but not zero for the real clip itself, so keep its weight low.
"""

from __future__ import annotations

import itertools
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.tokenizer_training.perceptual import read_weights

# RAFT correlates at 1/8, 1/16, 1/32 and 1/64 of the frame; the coarsest needs two pixels.
_RAFT_MULTIPLE, _RAFT_MIN_SIZE, _RAFT_UPDATES = 8, 128, 6


class FlowLoss(Protocol):
    """Reconstruction and real clip (B, 3, T, H, W) in [-1, 1] -> () float32."""

    def __call__(self, reconstruction: Tensor, video: Tensor) -> Tensor:
        """The term; gradients go to the reconstruction."""


def make_flow_loss(weights: str | None, device: torch.device) -> FlowLoss:
    """RAFT where its weights are given, else warping by OpenCV's flow.

    Raises:
        ConfigError: if the library that it needs is not installed, or the file does not fit.
    """
    if weights is not None:
        return RaftFlowLoss(Path(weights), device)
    return WarpFlowLoss()


def warp(frames: Tensor, flow: Tensor) -> Tensor:
    """Samples each frame at p + flow(p), bilinearly.

    Args:
        frames: (N, C, H, W).
        flow: (N, 2, H, W) in pixels, x before y.

    Returns:
        (N, C, H, W); places outside the frame take its border.
    """
    height, width = frames.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=flow.device),
        torch.arange(width, device=flow.device),
        indexing="ij",
    )
    # grid_sample with align_corners: pixel x of an image of width n lies at 2x/(n-1) - 1.
    grid = torch.stack(
        [2 * (x + flow[:, 0]) / (width - 1) - 1, 2 * (y + flow[:, 1]) / (height - 1) - 1], dim=-1
    )
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=True)


def visibility(forward: Tensor, backward: Tensor) -> Tensor:
    """M of the module docstring: (N, 2, H, W) twice -> (N, 1, H, W) of zeros and ones."""
    height, width = forward.shape[-2:]
    back = warp(backward, forward)
    gap = (forward + back).square().sum(1)
    size = forward.square().sum(1) + back.square().sum(1)
    x = torch.arange(width, device=forward.device) + forward[:, 0]
    y = torch.arange(height, device=forward.device)[:, None] + forward[:, 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return ((gap < 0.01 * size + 0.5) & inside).float()[:, None]


class WarpFlowLoss:
    """Warping with the real frames' flow, see the module docstring.

    Raises:
        ConfigError: if OpenCV is not installed.
    """

    def __init__(self) -> None:
        if find_spec("cv2") is None:
            raise ConfigError(
                "loss.flow without loss.flow_weights needs OpenCV, which is not installed; pip "
                "install opencv-python-headless, or set loss.flow=0."
            )
        import cv2

        # With one thread the flow is the same on every machine and in every run.
        cv2.setNumThreads(1)
        self._dis: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def real_flow(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Flow between consecutive frames, there and back.

        Args:
            video: (B, 3, T, H, W) in [-1, 1].

        Returns:
            Two (B, T - 1, 2, H, W) float32 in pixels, x before y, on the video's device.
        """
        luma = video.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)
        gray = ((video * luma).sum(1).clamp(-1, 1) + 1).mul(127.5).round()
        clips = gray.to("cpu", torch.uint8).numpy()
        flows = [
            [self._dis.calc(a, b, None), self._dis.calc(b, a, None)]
            for clip in clips
            for a, b in itertools.pairwise(clip)
        ]
        both = torch.stack([torch.stack([torch.from_numpy(f) for f in pair]) for pair in flows])
        both = both.permute(1, 0, 4, 2, 3).to(video.device)
        there, back = both.unflatten(1, (video.shape[0], -1)).unbind(0)
        return there, back

    def __call__(self, reconstruction: Tensor, video: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) in [-1, 1] -> () float32."""
        with torch.no_grad():
            there, back = self.real_flow(video)
            mask = visibility(there.flatten(0, 1), back.flatten(0, 1))
        frames = reconstruction.transpose(1, 2)
        moved = warp(frames[:, 1:].flatten(0, 1), there.flatten(0, 1))
        error = (moved - frames[:, :-1].flatten(0, 1)).abs() * mask
        error, mask = (v.unflatten(0, (len(video), -1)).flatten(1).sum(1) for v in (error, mask))
        return (error / (3 * mask).clamp_min(1)).mean()


class RaftFlowLoss:
    """The difference of RAFT-small's flows, see the module docstring.

    Args:
        path: torchvision's ``raft_small_C_T_V2-01064c6d.pth``, or another with its names.
        device: to run on.

    Raises:
        ConfigError: if torchvision is not installed, or the file does not fit.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if find_spec("torchvision") is None:
            raise ConfigError(
                "loss.flow_weights needs torchvision, which is not installed; install the build "
                "that goes with your torch, or leave loss.flow_weights out to use OpenCV."
            )
        remedy = "give torchvision's raft_small weights, or leave loss.flow_weights out"
        self.network = import_module("torchvision.models.optical_flow").raft_small(weights=None)
        try:
            self.network.load_state_dict(read_weights(path, remedy))
        except RuntimeError as error:
            raise ConfigError(f"{path} does not hold RAFT-small's weights; {remedy}.") from error
        self.network = self.network.to(device).requires_grad_(False).eval()

    def _flow(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B * (T - 1), 2, H', W'), the last refinement."""
        frames = video.transpose(1, 2)
        first, second = (self._resize(f.flatten(0, 1)) for f in (frames[:, :-1], frames[:, 1:]))
        flow: Tensor = self.network(first, second, num_flow_updates=_RAFT_UPDATES)[-1]
        return flow

    @staticmethod
    def _resize(frames: Tensor) -> Tensor:
        """To a size that RAFT takes: the next multiple of 8, at least 128."""
        height, width = (
            max(-(-n // _RAFT_MULTIPLE) * _RAFT_MULTIPLE, _RAFT_MIN_SIZE) for n in frames.shape[-2:]
        )
        if (height, width) == tuple(frames.shape[-2:]):
            return frames
        return F.interpolate(frames, (height, width), mode="bilinear", align_corners=False)

    def __call__(self, reconstruction: Tensor, video: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) in [-1, 1] -> () float32, in pixels."""
        with torch.no_grad():
            wanted = self._flow(video)
        return (self._flow(reconstruction) - wanted).abs().mean()
