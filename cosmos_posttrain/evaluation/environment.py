"""With what figures were measured.

Flows in: nothing, or a device and a dtype. Flows out: the ``environment`` of a ``metrics.json``.
"""

from __future__ import annotations

from typing import Any

import torch

from cosmos_posttrain.environment import describe, processor


def environment(
    device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> dict[str, Any]:
    """What every job records, and the device that did the work.

    Args:
        device: that did the work.
        dtype: that it computed in; None where that is not one thing.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    found = describe() | {"device": device.type, "device_name": name}
    return found if dtype is None else found | {"dtype": str(dtype).removeprefix("torch.")}
