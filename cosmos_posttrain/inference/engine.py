"""Generation: prompt tokens in, the tokens that follow them out, with a KV cache.

Flows in: an ``ARModel`` and the tokens of the first latent frames (B, P). Flows out: the next N
tokens (B, N), the same on every rank.

    model --DecodePlan, or its own modules--> NextScores --a way of decoding--> tokens

With guidance each clip has two rows, (2 B, ...): one with its text and one with another; both are
fed the same tokens, and one is drawn from their scores together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from cosmos_posttrain.errors import ConfigError, GeometryError
from cosmos_posttrain.inference.config import DECODINGS
from cosmos_posttrain.inference.decode_job import DecodeJob
from cosmos_posttrain.inference.decoding import Decoded
from cosmos_posttrain.inference.head_drafts import HeadCounts
from cosmos_posttrain.inference.noise import stream_keys
from cosmos_posttrain.inference.sampling import Draw, check_guidance, check_sampling
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


def generate(
    model: ARModel,
    prompt_tokens: Tensor,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | Sequence[int] = 0,
    items: Sequence[int] | None = None,
    samples: Sequence[int] | None = None,
    context: Tensor | None = None,
    guidance_scale: float = 1.0,
    negative_context: Tensor | None = None,
    decoding: str = "auto",
    window: int | None = None,
    cuda_graphs: bool = True,
    progress: Callable[[int], None] | None = None,
    observe: Callable[[Decoded], None] | None = None,
    head_counts: HeadCounts | None = None,
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
        seed: of all clips, or one of each. A token depends on the scores at its place and on (seed,
            item, sample, place) alone: the same at any tensor parallel size, batch size and way of
            decoding, up to rounding.
        items: number of each clip in its list, B of them; None counts from 0.
        samples: number of each clip among the samples of its item; None is 0 for all.
        context: (B, L, context_dim) text embeddings of a Video2World model.
        guidance_scale: tokens are drawn from ``other + guidance_scale * (given - other)``, the
            logits with ``context`` and those with ``negative_context``; 1 draws from the former,
            without computing the latter.
        negative_context: as ``context``; None is the null context, all zeros.
        decoding: ``sequential``, one token at a time; ``jacobi``, a window of drafts at a time;
            ``modules``, sequential through Megatron's own modules, slow, to compare with; ``auto``,
            the fastest of the first two.
        window: tokens that ``jacobi`` feeds at once; None chooses from pass to pass.
        cuda_graphs: on a GPU, record passes and replay them.
        progress: called with the number of tokens generated so far, as they come.
        observe: called with tokens as they are known and the scores that they were drawn from, the
            same on every rank.
        head_counts: filled with what the model's Medusa heads foretold, where ``jacobi`` asks them.

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
    _check_decoding(decoding, window)
    _check_layout()
    prompt = prompt_tokens.long().to(model.device)
    own_draw = Draw(
        _keys(len(prompt), seed, items, samples).to(model.device),
        1 if model.config.is_video2world else 0,
        temperature,
        top_p,
        top_k,
    )

    decoding = chosen_decoding(decoding)
    job = DecodeJob(
        model, prompt, num_tokens, own_draw, contexts, guidance_scale, progress, observe
    )
    model.module.eval()
    with torch.inference_mode(), _whole_sequences(model.module):
        generated = None
        # Heads are asked between passes, which a recorded step has no room for.
        has_heads = decoding == "jacobi" and model.config.num_medusa_heads > 0
        if cuda_graphs and model.device.type == "cuda" and decoding != "modules" and not has_heads:
            generated = job.by_graphs(decoding, window)
        if generated is None:
            generated = job.by_passes(decoding, window, head_counts)
    # Tensors made in inference mode cannot take part in training; a copy of one can.
    return generated.clone()


def chosen_decoding(decoding: str) -> str:
    """What ``auto`` means: windows, which become single tokens where drafts do not pay."""
    return "jacobi" if decoding == "auto" else decoding


def _check_decoding(decoding: str, window: int | None) -> None:
    if decoding not in DECODINGS:
        raise ConfigError(f"there is no decoding {decoding!r}; use {', '.join(DECODINGS)}.")
    if window is not None and window < 2:
        raise ConfigError(f"window {window} must be at least 2: a known token and a draft.")


def _keys(
    batch_size: int,
    seed: int | Sequence[int],
    items: Sequence[int] | None,
    samples: Sequence[int] | None,
) -> Tensor:
    """(B,) int64, see ``stream_keys``."""
    numbers = [
        [seed] * batch_size if isinstance(seed, int) else list(seed),
        list(range(batch_size) if items is None else items),
        [0] * batch_size if samples is None else list(samples),
    ]
    if any(len(some) != batch_size for some in numbers):
        raise ConfigError(
            f"seeds, items and samples must have a number for each of the {batch_size} clips."
        )
    return stream_keys(*map(torch.tensor, numbers))
