"""Generation: prompt tokens in, the tokens that follow them out, with a KV cache.

Flows in: an ``ARModel`` and the tokens of the first latent frames (B, P). Flows out: the next N
tokens (B, N), the same on every rank. The prompt goes through the model at once, then one token at
a time. With guidance each clip has two rows, (2 B, ...): one with its text and one with another;
both are fed the same tokens, and one is drawn from their scores together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from cosmos_posttrain.errors import ConfigError, CosmosPosttrainError, GeometryError
from cosmos_posttrain.inference.sampling import (
    check_guidance,
    check_sampling,
    draw_uniform,
    guide,
    sample,
)
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.builder import CosmosGPTModel

# Attributes by which Megatron's modules split their sequences over the tensor-parallel ranks.
_SEQUENCE_PARALLEL = (
    "sequence_parallel",
    "scatter_to_sequence_parallel",
    "reduce_scatter_embeddings",
)


def _check_prompt(model: ARModel, tokens: Tensor, num_tokens: int) -> None:
    model.check_tokens(tokens, "the prompt's tokens", "(B, P)")
    batch_size, length = tokens.shape
    if batch_size < 1 or length < 1 or num_tokens < 1:
        raise GeometryError(
            f"cannot generate {num_tokens} tokens from a prompt of shape ({batch_size}, {length}); "
            "the batch, the prompt and the tokens to generate must each be at least 1."
        )
    if length + num_tokens > model.config.num_clip_tokens:
        raise GeometryError(
            f"{length} prompt tokens and {num_tokens} to generate do not fit the model's grid "
            f"{tuple(model.latent_shape)}; together they can be at most "
            f"{model.config.num_clip_tokens}."
        )


def _contexts(
    context: Tensor | None, guidance_scale: float, negative_context: Tensor | None
) -> Tensor | None:
    """What the rows of the batch attend to: (B, L, C), or (2 B, L, C) with guidance."""
    check_guidance(guidance_scale, negative_context is not None)
    if guidance_scale == 1:
        return context
    if context is None:
        raise ConfigError(
            f"guidance_scale {guidance_scale} needs a text, and this is a base model, which takes "
            "none; leave it out."
        )
    if negative_context is None:
        return torch.cat([context, torch.zeros_like(context)])
    if negative_context.shape != context.shape:
        raise GeometryError(
            f"negative_context has shape {tuple(negative_context.shape)} and context "
            f"{tuple(context.shape)}; give the same number of clips and rows."
        )
    return torch.cat([context, negative_context.to(context)])


def _check_layout() -> None:
    for name, size in (
        ("pipeline", parallel_state.get_pipeline_model_parallel_world_size()),
        ("context", parallel_state.get_context_parallel_world_size()),
    ):
        if size > 1:
            raise ConfigError(
                f"tokens cannot be generated at {name} parallel size {size}; load the checkpoint "
                "with tensor parallelism only (any checkpoint can be)."
            )


@contextlib.contextmanager
def _whole_sequences(module: CosmosGPTModel) -> Iterator[None]:
    """Switches sequence parallelism off: one token cannot be split over ranks.

    Megatron's own switch keeps a list of modules by the model's id, which another model may get
    later, and switches on what was never on (the keys and values of the text).
    """
    changed: list[tuple[Any, str]] = []
    if module.config.sequence_parallel:
        changed.append((module.config, "sequence_parallel"))
    for child in module.modules():
        names = [name for name in _SEQUENCE_PARALLEL if getattr(child, name, None) is True]
        changed += [(child, name) for name in names]
    try:
        for owner, name in changed:
            setattr(owner, name, False)
        yield
    finally:
        for owner, name in changed:
            setattr(owner, name, True)


def _agree(tokens: Tensor) -> Tensor:
    """The first tensor-parallel rank's tokens, on all of them.

    The ranks' logits are equal, but a GPU's cumulative sums need not be to the last bit, and ranks
    that disagree once would fill their caches with different clips.
    """
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            tokens,
            parallel_state.get_tensor_model_parallel_src_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )
    return tokens


def _check_finite(logits: Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise CosmosPosttrainError(
            "the model's logits are not finite: the weights are damaged or their training diverged."
        )


def generate(
    model: ARModel,
    prompt_tokens: Tensor,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    context: Tensor | None = None,
    guidance_scale: float = 1.0,
    negative_context: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Continues clips of tokens. Every tensor-parallel rank calls it with the same arguments.

    Args:
        model: from ``load_model``; stays in evaluation mode.
        prompt_tokens: (B, P) int64 in [0, vocab_size), in (t h w) order; P at least 1. In a
            Video2World model the first is ``<bov>``.
        num_tokens: how many to generate; P + num_tokens at most T * H * W (1 more with ``<bov>``).
        temperature: 0 takes the most likely token, 1.0 the model's own distribution.
        top_p: draws among the most likely tokens before which at most this mass lies.
        top_k: draws among this many most likely tokens.
        seed: the same seed gives the same tokens, at any tensor parallel size up to rounding.
        context: (B, L, context_dim) text embeddings of a Video2World model.
        guidance_scale: tokens are drawn from ``other + guidance_scale * (given - other)``, the
            logits with ``context`` and those with ``negative_context``; 1 draws from the former,
            without computing the latter.
        negative_context: as ``context``; None is the null context, all zeros.
        progress: called with the number of tokens generated so far, after each.
        observe: called with the number of each token and the logits (B, vocab_size) float32 that it
            is drawn from, the same on every rank.

    Returns:
        (B, num_tokens) int64 on the model's device.

    Raises:
        GeometryError: a prompt that does not fit the model's grid or vocabulary, or lacks
            ``<bov>``; a text of another shape.
        ConfigError: sampling settings out of range, a text too many or too few, guidance without
            a text, or a layout that cannot generate.
        CosmosPosttrainError: logits that are not finite.
    """
    check_sampling(temperature, top_p, top_k)
    _check_prompt(model, prompt_tokens, num_tokens)
    model.check_context(context, prompt_tokens.shape[0])
    contexts = _contexts(context, guidance_scale, negative_context)
    _check_layout()
    model.module.eval()
    with torch.inference_mode(), _whole_sequences(model.module):
        generated = _decode(
            model,
            prompt_tokens.long().to(model.device),
            contexts,
            guidance_scale,
            draw_uniform(prompt_tokens.shape[0], num_tokens, seed).to(model.device),
            lambda logits, u: sample(logits, u, temperature=temperature, top_p=top_p, top_k=top_k),
            progress,
            observe,
        )
    # Tensors made in inference mode cannot take part in training; a copy of one can.
    return generated.clone()


def _decode(
    model: ARModel,
    prompt: Tensor,
    contexts: Tensor | None,
    guidance_scale: float,
    uniform: Tensor,
    draw: Callable[[Tensor, Tensor], Tensor],
    progress: Callable[[int], None] | None,
    observe: Callable[[int, Tensor], None] | None,
) -> Tensor:
    """The loop: feeds the prompt (B, P), then each drawn token; returns (B, N)."""
    batch_size, num_tokens = uniform.shape
    copies = 1 if guidance_scale == 1 else 2
    # The last token is never fed, so the cache needs no room for it.
    cache = StaticInferenceContext(copies * batch_size, prompt.shape[1] + num_tokens - 1)

    def score(tokens: Tensor, contexts: Tensor | None = None) -> Tensor:
        logits = model.next_token_logits(tokens.repeat(copies, 1), cache, contexts)
        return logits if copies == 1 else guide(logits, guidance_scale)

    generated = prompt.new_empty(batch_size, num_tokens)
    logits = score(prompt, contexts)
    _check_finite(logits)
    for position in range(num_tokens):
        if observe is not None:
            observe(position, logits)
        token = _agree(draw(logits, uniform[:, position]))
        generated[:, position] = token
        if progress is not None:
            progress(position + 1)
        if position + 1 < num_tokens:
            logits = score(token[:, None])
    # What is not finite stays so through the cache: the last logits speak for all.
    _check_finite(logits)
    return generated
