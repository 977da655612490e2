"""An autoregressive model as users see it: tokens in, logits out.

Flows in: a built Megatron model. Flows out: logits over the real vocabulary, gathered from all
tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from cosmos_posttrain.distributed.cpu_device import cuda_calls_mean_cpu
from cosmos_posttrain.errors import GeometryError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.models.config import ModelConfig


class ARModel:
    """A Cosmos autoregressive world model, ready for inference.

    Args:
        module: this rank's part of the model.
        contract: the contract of the data that it was trained on (tokenizer, clip geometry), as the
            manifest has it; None where the checkpoint does not say.

    Attributes:
        config: the model's numbers.
        latent_shape: the token grid (T, H, W) of one clip.
    """

    def __init__(self, module: CosmosGPTModel, contract: dict[str, Any] | None = None) -> None:
        self.module = module.eval()
        self.config: ModelConfig = module.model_config
        self.contract = contract

    @property
    def latent_shape(self) -> LatentShape:
        """The token grid (T, H, W) of one clip."""
        return self.config.latent_shape

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    def _check(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise GeometryError(
                f"tokens have shape {tuple(tokens.shape)} and dtype {tokens.dtype}; give (B, S) "
                "int64."
            )
        if tokens.shape[1] > self.config.seq_length:
            raise GeometryError(
                f"{tokens.shape[1]} tokens do not fit the model's grid {tuple(self.latent_shape)}; "
                f"give at most {self.config.seq_length}."
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < (
            self.config.vocab_size
        ):
            raise GeometryError(
                f"a token is outside the vocabulary 0..{self.config.vocab_size - 1}; encode the "
                "clip with the tokenizer that the model was trained on."
            )

    @torch.no_grad()
    def logits(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """Scores the next token at every position.

        Args:
            tokens: (B, S) int64, S at most T * H * W, in [0, vocab_size).
            context: text embeddings; base models take none.

        Returns:
            (B, S, vocab_size) float32 on the model's device, the same on every rank.

        Raises:
            GeometryError: tokens that do not fit the grid or the vocabulary.
        """
        assert context is None, "base models take no text"
        self._check(tokens)
        with cuda_calls_mean_cpu():
            output = self.module(
                tokens.long().to(self.device), None, None, runtime_gather_output=True
            )
        return output[..., : self.config.vocab_size].float()

    @torch.no_grad()
    def next_token_logits(self, tokens: Tensor, cache: StaticInferenceContext) -> Tensor:
        """Feeds tokens behind those in the cache and scores the one after them.

        Args:
            tokens: (B, S) int64 on the model's device; the next S tokens.
            cache: the KV cache, moved on by S.

        Returns:
            (B, vocab_size) float32.
        """
        with cuda_calls_mean_cpu():
            output = self.module(
                tokens, None, None, inference_context=cache, runtime_gather_output=True
            )
        cache.sequence_len_offset += tokens.shape[1]
        cache.enable_decode_mode()
        return output[:, -1, : self.config.vocab_size].float()
