"""Greedy decoding that shows the scores of every token on its way.

Flows in: an ``ARModel`` and the tokens of the first latent frames (B, P). Flows out: the most
likely continuation, token by token, and before each token the logits (B, V) that it was taken from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from cosmos_posttrain.errors import CosmosPosttrainError
from cosmos_posttrain.models.ar_model import ARModel


@torch.inference_mode()
def roll_out(
    model: ARModel, prompt: Tensor, num_tokens: int, observe: Callable[[int, Tensor], None]
) -> Tensor:
    """Continues clips with the most likely token each time.

    The ranks that share the model call it together.

    Args:
        model: of a layout without sequence parallelism.
        prompt: (B, P) int64 in [0, vocab_size).
        num_tokens: how many to generate; P + num_tokens at most T * H * W.
        observe: called with the number of each token and the logits (B, V) float32 that it is taken
            from, the same on all of those ranks.

    Returns:
        (B, num_tokens) int64 on the model's device.

    Raises:
        GeometryError: a prompt that does not fit the model's grid or vocabulary.
        CosmosPosttrainError: logits that are not finite.
    """
    model.check_tokens(prompt, "the prompt's tokens", "(B, P)")
    tokens = prompt.long().to(model.device)
    cache = StaticInferenceContext(len(tokens), tokens.shape[1] + num_tokens - 1)
    generated = tokens.new_empty(len(tokens), num_tokens)
    is_finite = torch.ones((), dtype=torch.bool, device=model.device)
    for number in range(num_tokens):
        logits = model.next_token_logits(tokens, cache)
        is_finite &= torch.isfinite(logits).all()
        observe(number, logits)
        generated[:, number] = logits.argmax(-1)
        tokens = generated[:, number : number + 1]
    if not bool(is_finite):
        raise CosmosPosttrainError(
            "the model's logits are not finite: the weights are damaged or their training diverged."
        )
    return generated
