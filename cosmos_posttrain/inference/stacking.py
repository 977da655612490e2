"""Requests that are generated in one batch.

Flows in: requests, and the prompts that were made of them. Flows out: the tokens of their clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.geometry import ClipGeometry
from cosmos_posttrain.inference.engine import generate
from cosmos_posttrain.inference.head_drafts import HeadCounts
from cosmos_posttrain.inference.log_probs import LogProbs
from cosmos_posttrain.inference.request import Prompt, Request
from cosmos_posttrain.inference.watching import OnTokens, Watch, all_of
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.sequence import sequence_layout

_ALIKE = (
    *("temperature", "top_p", "top_k", "guidance_scale"),
    *("num_rollout_chunks", "rollout_overlap", "rollout_anchor", "with_log_probs"),
)


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


def continue_prompts(
    model: ARModel,
    geometry: ClipGeometry,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    *,
    decoding: str,
    window: int | None,
    cuda_graphs: bool,
    progress: Callable[[int], None] | None,
    on_tokens: OnTokens | None,
    head_counts: HeadCounts | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Generates the rest of each clip.

    Args:
        model: on its device.
        geometry: of the clips.
        prompts: what is given of each.
        requests: how each is sampled; see ``check_alike``.
        decoding: as ``generate`` takes it.
        window: likewise.
        cuda_graphs: likewise.
        progress: likewise.
        on_tokens: called with the tokens of a clip so far.
        head_counts: as ``generate`` takes it.

    Returns:
        (B, T * h * w) int64 and, where the requests ask for it, (B, T * h * w) float32
        log-probabilities, NaN for given tokens; both on the CPU.
    """
    batch, sampling = stacked(prompts), requests[0]
    tokens = batch.tokens
    num_tokens = geometry.seq_length - tokens.shape[1]
    prefix = torch.tensor([sequence_layout(model.config).prefix], dtype=torch.long)
    watch = log_probs = None
    if on_tokens is not None:
        frame = geometry.latent_shape.tokens_per_frame
        watch = Watch(tokens.to(model.device), num_tokens, frame, on_tokens)
    if sampling.with_log_probs:
        log_probs = LogProbs(len(tokens), num_tokens, model.device)
    generated = generate(
        model,
        torch.cat([prefix.expand(len(tokens), -1), tokens], dim=1),
        num_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=[request.seed for request in requests],
        items=[request.item for request in requests],
        samples=[request.sample for request in requests],
        context=batch.context,
        guidance_scale=sampling.guidance_scale,
        negative_context=batch.negative_context,
        decoding=decoding,
        window=window,
        cuda_graphs=cuda_graphs,
        progress=progress,
        observe=all_of(watch, log_probs),
        head_counts=head_counts,
    )
    found = None if log_probs is None else log_probs.of_clips(tokens.shape[1])
    return torch.cat([tokens, generated.cpu()], dim=1), found
