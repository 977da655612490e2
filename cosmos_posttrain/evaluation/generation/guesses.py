"""Continuations that know no model: what a generated clip has to beat.

Flows in: the given frames (3, T, H, W) uint8. Flows out: the whole clip (3, N, H, W) uint8, which
begins with them. Nothing moves any more, or everything goes on as it moved last.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

REPEAT, MOTION = "repeat_last_frame", "constant_motion"


def has_opencv() -> bool:
    """Whether motion can be found."""
    return find_spec("cv2") is not None


def repeat_last_frame(given: Tensor, num_frames: int) -> Tensor:
    """The last given frame again and again."""
    rest = num_frames - given.shape[1]
    return torch.cat([given, given[:, -1:].expand(-1, rest, -1, -1)], 1)


def constant_motion(given: Tensor, num_frames: int) -> Tensor:
    """Every pixel goes on at its last velocity, by optical flow between the last two given frames.

    What would come from outside the picture takes its border. Needs OpenCV; the flow is DIS
    (Kroeger et al. 2016).

    Args:
        given: (3, T, H, W), T at least 2.
        num_frames: of the whole clip.
    """
    import cv2

    # With one thread the flow is the same on every machine and in every run.
    cv2.setNumThreads(1)
    before, last = (_pixels(given[:, place]) for place in (-2, -1))
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (last, before)]
    finder: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = finder.calc(*gray, None)  # (H, W, 2) pixels, where each came from
    y, x = np.mgrid[: last.shape[0], : last.shape[1]].astype(np.float32)
    frames = [given]
    for step in range(1, num_frames - given.shape[1] + 1):
        origin = x + step * flow[..., 0], y + step * flow[..., 1]
        moved = cv2.remap(last, *origin, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        frames.append(torch.from_numpy(moved).permute(2, 0, 1)[:, None])
    return torch.cat(frames, 1)


def _pixels(frame: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(3, H, W) -> (H, W, 3)."""
    return np.ascontiguousarray(frame.permute(1, 2, 0).numpy())
