"""An autoregressive model as users see it: tokens in, logits out.

Flows in: a built Megatron model. Flows out: logits over the real vocabulary, gathered from all
tensor-parallel ranks.
"""

from __future__ import annotations

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.distributed.cpu_device import cuda_calls_mean_cpu
from cosmos_posttrain.errors import ConfigError, GeometryError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.models.config import ModelConfig


class ARModel:
    """A Cosmos autoregressive world model, ready for inference.

    Args:
        module: this rank's part of the model.
        contract: the contract of the data that it was trained on (tokenizer, clip geometry); None
            where the checkpoint does not say.

    Attributes:
        config: the model's numbers.
        latent_shape: the token grid (T, H, W) of one clip.
    """

    def __init__(self, module: CosmosGPTModel, contract: Contract | None = None) -> None:
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

    def check_tokens(self, tokens: Tensor, what: str = "tokens", dims: str = "(B, S)") -> None:
        """Refuses tokens that cannot be fed.

        Raises:
            GeometryError: they do not fit the grid or the vocabulary, or lack ``<bov>``.
        """
        config = self.config
        if tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise GeometryError(
                f"{what} have shape {tuple(tokens.shape)} and dtype {tokens.dtype}; give {dims} "
                "int64."
            )
        if tokens.shape[1] > config.num_clip_tokens:
            raise GeometryError(
                f"{tokens.shape[1]} tokens do not fit the model's grid {tuple(self.latent_shape)}; "
                f"give at most {config.num_clip_tokens}."
            )
        if config.is_video2world and tokens.numel():
            if not bool((tokens[:, 0] == config.bov_token).all()):
                raise GeometryError(
                    f"{what} of a Video2World model must start with <bov>, {config.bov_token}; put "
                    "it before the video's tokens."
                )
            tokens = tokens[:, 1:]
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size:
            raise GeometryError(
                f"{what} lie in [{int(tokens.min())}, {int(tokens.max())}], outside the model's "
                f"vocabulary 0..{config.vocab_size - 1}; encode the clip with the tokenizer that "
                "the model was trained on."
            )

    def check_context(self, context: Tensor | None, batch_size: int) -> None:
        """Refuses a text where the model takes none, and asks for one where it does.

        Raises:
            ConfigError: there is a text too many or too few.
            GeometryError: its shape or dtype is not that of text embeddings.
        """
        width = self.config.context_dim
        if width is None:
            if context is not None:
                raise ConfigError("this is a base model, which takes no text; leave out context.")
            return
        if context is None:
            raise ConfigError(
                f"this is a Video2World model, which needs a text; give context, (B, L, {width}) "
                "text embeddings."
            )
        wanted = context.ndim == 3 and context.shape[0] == batch_size and context.shape[1] > 0
        if not wanted or context.shape[2] != width or not context.is_floating_point():
            raise GeometryError(
                f"context has shape {tuple(context.shape)} and dtype {context.dtype}; give "
                f"({batch_size}, L, {width}) floating-point text embeddings."
            )

    @torch.no_grad()
    def logits(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """Scores the next token at every position.

        Args:
            tokens: (B, S) int64 in [0, vocab_size), S at most T * H * W; in a Video2World model
                ``<bov>`` comes before them.
            context: (B, L, context_dim) text embeddings of a Video2World model.

        Returns:
            (B, S, vocab_size) float32 on the model's device, the same on every rank.

        Raises:
            GeometryError: tokens that do not fit the grid or the vocabulary, or a text of another
                shape.
            ConfigError: a text too many or too few.
        """
        self.check_tokens(tokens)
        if not tokens.numel():
            raise GeometryError(
                f"tokens have shape {tuple(tokens.shape)}; give at least one token of one clip."
            )
        self.check_context(context, tokens.shape[0])
        length = tokens.shape[1]
        if self.config.is_video2world and self.module.config.sequence_parallel:
            # What ranks share out must divide; nothing sees the padding, attention is causal.
            surplus = -length % self.module.config.tensor_model_parallel_size
            tokens = torch.nn.functional.pad(tokens, (0, surplus), value=self.config.pad_token)
        with cuda_calls_mean_cpu():
            output = self.module(
                tokens.long().to(self.device),
                None,
                None,
                runtime_gather_output=True,
                **self._text(context),
            )
        return output[:, :length, : self.config.vocab_size].float()

    @torch.no_grad()
    def next_token_logits(
        self, tokens: Tensor, cache: StaticInferenceContext, context: Tensor | None = None
    ) -> Tensor:
        """Feeds tokens behind those in the cache and scores the one after them.

        Args:
            tokens: (B, S) int64 on the model's device; the next S tokens.
            cache: the KV cache, moved on by S.
            context: (B, L, context_dim) text embeddings of a Video2World model, with the first
                tokens; the cache keeps the keys and values made from them.

        Returns:
            (B, vocab_size) float32.
        """
        with cuda_calls_mean_cpu():
            output = self.module(
                tokens,
                None,
                None,
                inference_context=cache,
                runtime_gather_output=True,
                **self._text(context),
            )
        cache.sequence_len_offset += tokens.shape[1]
        cache.enable_decode_mode()
        return output[:, -1, : self.config.vocab_size].float()

    def _text(self, context: Tensor | None) -> dict[str, Tensor]:
        return {} if context is None else {"context": context.to(self.device)}
