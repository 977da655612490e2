"""A Cosmos model's numbers in the form that NeMo builds models from and writes into checkpoints.

Flows in: a ``ModelConfig``, or what a NeMo checkpoint's ``context`` says. Flows out: a Megatron
``TransformerConfig`` that knows the rest too, and the ``ModelConfig`` again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from cosmos_posttrain.checkpoint import nemo_context
from cosmos_posttrain.models.builder import build_model, transformer_config
from cosmos_posttrain.models.config import VOCAB_SIZE_MULTIPLE, ModelConfig
from cosmos_posttrain.models.gpt_model import CosmosGPTModel
from cosmos_posttrain.models.reference_config import from_reference
from cosmos_posttrain.nemo.bases import IOMixin


@dataclass
class CosmosConfig(TransformerConfig, IOMixin):
    """A Cosmos autoregressive model, base or Video2World.

    Attributes:
        latent_shape: the token grid (T, H, W) of one clip.
        vocab_size: rows of the embedding.
        output_layer_vocab_size: rows of the output layer, where they differ.
        make_vocab_size_divisible_by: what rows are padded to.
        seq_length: positions of a sequence.
        rotary_base: theta of the RoPE.
        rope_dim: kind of RoPE; 3D.
        position_scale: by what positions are multiplied along each axis; None means by 1.
        apply_yarn: slow low frequencies down, as the next four say.
        original_latent_shape: see ``models.config.YarnConfig``, as the next three.
        yarn_scale: see there.
        yarn_beta_fast: see there.
        yarn_beta_slow: see there.
        crossattn_emb_size: width of the text embeddings; None for a base model.
        context_len: rows of them.
        training_type: in the reference's words.
        pad_to_multiple_of: what a sequence's length is rounded up to.
        layer_spec: ``torch`` or ``te``.
        init_seed: of fresh weights.
        z_loss_coefficient: see ``TrainConfig``.
    """

    num_layers: int = 0
    hidden_size: int = 0
    num_attention_heads: int = 0
    normalization: str = "RMSNorm"
    qk_layernorm: bool = True
    gated_linear_unit: bool = True
    activation_func: Callable = torch.nn.functional.silu
    add_bias_linear: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    latent_shape: list[int] = field(default_factory=list)
    vocab_size: int = 0
    output_layer_vocab_size: int | None = None
    make_vocab_size_divisible_by: int = VOCAB_SIZE_MULTIPLE
    seq_length: int = 0
    rotary_base: float = ModelConfig.rotary_base
    rope_dim: str = "3D"
    position_scale: list[float] | None = None
    apply_yarn: bool = False
    original_latent_shape: list[int] | None = None
    yarn_scale: float | None = None
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None
    crossattn_emb_size: int | None = None
    context_len: int = ModelConfig.context_len
    training_type: str | None = None
    pad_to_multiple_of: int | None = None
    layer_spec: str = "torch"
    init_seed: int = 1234
    z_loss_coefficient: float = 0.0

    @classmethod
    def of(cls, model: ModelConfig, dtype: torch.dtype, **settings: Any) -> CosmosConfig:
        """The config of a model under the process groups that exist.

        Args:
            model: the model's numbers.
            dtype: of parameters and activations.
            **settings: any other field.
        """
        own = {item.name for item in dataclasses.fields(cls)}
        own -= {item.name for item in dataclasses.fields(TransformerConfig)}
        megatron = {name: settings.pop(name) for name in list(settings) if name not in own}
        base = transformer_config(model, dtype=dtype, **megatron)
        values = {item.name: getattr(base, item.name) for item in dataclasses.fields(base)}
        return cls(**(values | nemo_context.values_of(model) | settings))

    @property
    def model_config(self) -> ModelConfig:
        """The model's numbers.

        Raises:
            CheckpointError: a number is missing, or no Cosmos model has these.
        """
        found = {name: getattr(self, name) for name in nemo_context.NAMES}
        known = {name: value for name, value in found.items() if value is not None}
        values = nemo_context.reference_values(known)
        dtype = str(self.params_dtype).removeprefix("torch.")
        return from_reference(
            {"vocab_size": values.get("vocab_size_in"), "precision": dtype} | values
        )

    def configure(self, chunk: int | None = None) -> CosmosGPTModel:
        """Builds this rank's part of the model, with fresh weights.

        Args:
            chunk: which of this rank's parts, where the pipeline is interleaved; else None.
        """
        module = build_model(
            self.model_config,
            dtype=self.params_dtype,
            layer_spec=self.layer_spec,
            sequence_parallel=self.sequence_parallel,
            seed=self.init_seed,
            chunk=chunk,
            calculate_per_token_loss=self.calculate_per_token_loss,
            deterministic_mode=self.deterministic_mode,
            gradient_accumulation_fusion=self.gradient_accumulation_fusion,
            recompute_granularity=self.recompute_granularity,
            recompute_method=self.recompute_method,
            recompute_num_layers=self.recompute_num_layers,
            recompute_modules=self.recompute_modules,
        )
        module.z_loss_coefficient = self.z_loss_coefficient
        return module
