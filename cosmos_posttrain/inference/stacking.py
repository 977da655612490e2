"""Requests that are generated in one batch.

Flows in: requests, and the prompts that were made of them. Flows out: one ``Prompt`` of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.geometry import ClipGeometry
from cosmos_posttrain.inference.request import Prompt, Request

_ALIKE = ("temperature", "top_p", "top_k", "guidance_scale")


def check_alike(requests: Sequence[Request], geometry: ClipGeometry) -> None:
    """Refuses requests that cannot be one batch.

    Raises:
        ConfigError: names what differs.
    """
    if not requests:
        raise ConfigError("there is no request; give at least one.")
    found = {name: {getattr(request, name) for request in requests} for name in _ALIKE}
    found["number of given frames"] = {request.num_given(geometry) for request in requests}
    for name, values in found.items():
        if len(values) > 1:
            raise ConfigError(
                f"requests of one batch have one {name}, not {' and '.join(map(str, values))}; "
                "generate them one after another."
            )


def stacked(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts of one batch, (B, ...); those without a negative text have the null context for it.

    What was found out about each input stays with its own prompt.
    """
    tokens = torch.cat([prompt.tokens for prompt in prompts])
    contexts = [prompt.context for prompt in prompts if prompt.context is not None]
    if not contexts:
        return Prompt(tokens)
    assert len(contexts) == len(prompts)
    negative = None
    if any(prompt.negative_context is not None for prompt in prompts):
        negatives = [
            own * 0 if prompt.negative_context is None else prompt.negative_context
            for prompt, own in zip(prompts, contexts, strict=True)
        ]
        negative = torch.cat(negatives)
    return Prompt(tokens, context=torch.cat(contexts), negative_context=negative)
