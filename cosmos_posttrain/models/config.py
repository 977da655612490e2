"""What a Cosmos autoregressive model is, in plain numbers. No torch, no Megatron.

Flows in: a checkpoint's ``context/model.json``, or numbers. Flows out: a ``ModelConfig``, and the
same thing back as JSON; what it becomes on another token grid; how many parameters it has.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from cosmos_posttrain.errors import CheckpointError, ConfigError
from cosmos_posttrain.geometry import LatentShape, parse_latent_shape
from cosmos_posttrain.models.lora_config import LoraConfig

# Embedding and output rows are padded to a multiple of this, whatever the tensor parallel size, so
# that a checkpoint's shapes do not depend on the layout that wrote it. 64000 and 64064 need none.
VOCAB_SIZE_MULTIPLE = 64

# Video2World models: rows behind the vocabulary that can be fed but not predicted (<bov> is the
# first, <pad> the third), and what the length of a sequence is rounded up to.
NUM_SPECIAL_TOKENS = 64
SEQ_LENGTH_MULTIPLE = 64

# Logits of one rank that stand side by side in the loss: 64 MB in float32; 512 MB on a GPU, whose
# matrix products want to be large.
LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 27}

# A damaged config must be refused, not have its tensors listed without end.
MAX_LAYERS, MAX_COUNT = 10_000, 2**31

# What weights are stored in; a model in memory has no float64.
PARAMS_DTYPES = ("bfloat16", "float16", "float32", "float64")

ROPE_SCALINGS = ("none", "interpolate", "yarn")
LAYER_SPECS = ("torch", "te")


class AxisScale(NamedTuple):
    """By what positions are multiplied, for each axis of the token grid."""

    time: float = 1.0
    height: float = 1.0
    width: float = 1.0


UNSCALED = AxisScale()


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (Peng et al., 2023, arXiv:2309.00071), applied to each axis of the 3D RoPE.

    Attributes:
        original_latent_shape: the grid (T, H, W) that the model was trained on before.
        scale: by how much the low frequencies are slowed down.
        beta_fast: rotations over the original length above which a frequency stays as it is.
        beta_slow: rotations below which it is slowed down fully.
    """

    original_latent_shape: LatentShape
    scale: float = 2.0
    beta_fast: float = 4.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A Cosmos autoregressive model (Llama-3 style, 3D RoPE), in Megatron's terms.

    A Video2World model is one with a ``context_dim``: it attends to a text in every layer, adds an
    absolute position embedding before every layer, and reads ``<bov>`` before the video's tokens.

    Attributes:
        num_layers: transformer layers.
        hidden_size: width of the hidden states.
        num_attention_heads: query heads.
        num_query_groups: key/value heads (grouped-query attention).
        kv_channels: width of one head.
        ffn_hidden_size: width of the SwiGLU's two branches.
        vocab_size: tokens that can be predicted (rows of the output layer).
        latent_shape: the token grid (T, H, W) of one clip; positions are taken from it.
        rotary_base: theta of the RoPE.
        layernorm_epsilon: epsilon of every RMSNorm.
        yarn: YaRN settings, or None.
        params_dtype: dtype of the stored weights, one of ``PARAMS_DTYPES``.
        context_dim: width of the text embeddings; None for a base model, which takes no text.
        context_len: rows of text embeddings of one prompt, padding counted in (512 for T5-11B).
        position_scale: what positions are multiplied by (position interpolation); see ``at_grid``.
        lora: low-rank factors beside frozen matrices, while a model is trained so; None elsewhere.
            Readers of checkpoints merge them.
        num_medusa_heads: heads that guess tokens further ahead; see ``medusa.py``.

    Raises:
        ConfigError: numbers that no model can have; lists all of them.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    latent_shape: LatentShape
    rotary_base: float = 500000.0
    layernorm_epsilon: float = 1e-5
    yarn: YarnConfig | None = None
    params_dtype: str = "bfloat16"
    context_dim: int | None = None
    context_len: int = 512
    position_scale: AxisScale = UNSCALED
    lora: LoraConfig | None = None
    num_medusa_heads: int = 0

    def __post_init__(self) -> None:
        wrong = _impossible_numbers(self)
        if not wrong and self.num_attention_heads % self.num_query_groups:
            wrong.append(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_query_groups {self.num_query_groups}"
            )
        if wrong:
            raise ConfigError(f"no model can be built from this config: {'; '.join(wrong)}.")

    @property
    def is_video2world(self) -> bool:
        """Whether the model takes a text."""
        return self.context_dim is not None

    @property
    def bov_token(self) -> int:
        """``<bov>``, the first token of every Video2World sequence."""
        return self.vocab_size

    @property
    def pad_token(self) -> int:
        """``<pad>``, behind the clip's tokens, where Video2World sequences are rounded up."""
        return self.vocab_size + 2

    @property
    def num_clip_tokens(self) -> int:
        """Tokens of one clip: T * H * W, and ``<bov>`` before them in a Video2World model."""
        return self.latent_shape.num_tokens + (1 if self.is_video2world else 0)

    @property
    def seq_length(self) -> int:
        """Positions of one training sequence: the clip's tokens, padded in a Video2World model."""
        length = self.num_clip_tokens
        return _round_up(length, SEQ_LENGTH_MULTIPLE) if self.is_video2world else length

    @property
    def input_vocab_size(self) -> int:
        """Tokens that can be fed (rows of the embedding)."""
        return self.vocab_size + (NUM_SPECIAL_TOKENS if self.is_video2world else 0)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the output layer in memory and in ``weights/``."""
        return _round_up(self.vocab_size, VOCAB_SIZE_MULTIPLE)

    @property
    def padded_input_vocab_size(self) -> int:
        """Rows of the embedding in memory and in ``weights/``."""
        return _round_up(self.input_vocab_size, VOCAB_SIZE_MULTIPLE)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model: without the rows that only pad the vocabulary."""
        hidden, width = self.hidden_size, self.kv_channels
        queries, keys = self.num_attention_heads * width, self.num_query_groups * width
        layer = hidden * (2 * queries + 2 * keys) + 2 * width  # self-attention
        layer += 3 * hidden * self.ffn_hidden_size + 2 * hidden  # feed-forward, two norms
        if self.context_dim is not None:
            layer += 2 * hidden * queries + 2 * self.context_dim * keys + 2 * width + hidden
        rows = self.input_vocab_size + self.vocab_size
        heads = self.num_medusa_heads * hidden * hidden
        return self.num_layers * layer + rows * hidden + hidden + heads

    @property
    def num_padding_parameters(self) -> int:
        """What a built model has on top of ``num_parameters``: rows that pad the vocabulary."""
        rows = self.padded_input_vocab_size - self.input_vocab_size
        return (rows + self.padded_vocab_size - self.vocab_size) * self.hidden_size

    def at_grid(
        self,
        latent_shape: LatentShape,
        rope_scaling: str = "none",
        rope_scale: float | None = None,
    ) -> ModelConfig:
        """The same weights on another token grid.

        Positions of a grid that is larger than the model's along an axis lie beyond what the
        weights have seen there. ``none`` extrapolates; ``interpolate`` multiplies the positions
        along that axis by old/new (position interpolation, Chen et al., 2023, arXiv:2306.15595);
        ``yarn`` slows the low frequencies of all axes down by the largest new/old, as the 12B model
        does (Peng et al., 2023, arXiv:2309.00071). Where no axis grows, nothing is scaled.

        Args:
            latent_shape: the grid (T, H, W) to use.
            rope_scaling: one of ``ROPE_SCALINGS``.
            rope_scale: replaces new/old; at least 1.

        Raises:
            ConfigError: an unknown scaling, or a scale below 1.
        """
        if rope_scaling not in ROPE_SCALINGS:
            raise ConfigError(
                f"there is no rope_scaling {rope_scaling!r}; use one of {', '.join(ROPE_SCALINGS)}."
            )
        if rope_scale is not None and not 1 <= rope_scale < float("inf"):
            raise ConfigError(
                f"rope_scale {rope_scale} must be at least 1; leave it out to take it from the "
                "two grids."
            )
        grown = [
            max(new / old, 1.0) for new, old in zip(latent_shape, self.latent_shape, strict=True)
        ]
        moved = dataclasses.replace(self, latent_shape=latent_shape)
        if max(grown) == 1 or rope_scaling == "none":
            return moved
        if rope_scaling == "yarn":
            scale = max(grown) if rope_scale is None else rope_scale
            return dataclasses.replace(moved, yarn=self._slowed(scale))
        factors = [
            factor / (ratio if rope_scale is None or ratio == 1 else rope_scale)
            for factor, ratio in zip(self.position_scale, grown, strict=True)
        ]
        return dataclasses.replace(moved, position_scale=AxisScale(*factors))

    def _slowed(self, scale: float) -> YarnConfig:
        """YaRN by ``scale``, on top of the model's own where it has one."""
        if self.yarn is not None:
            return dataclasses.replace(self.yarn, scale=self.yarn.scale * scale)
        seen = [
            max(1, round(size * factor))
            for size, factor in zip(self.latent_shape, self.position_scale, strict=True)
        ]
        return YarnConfig(LatentShape(*seen), scale)

    def check_tensor_parallel(self, size: int) -> None:
        """Refuses a tensor parallel size that does not divide the model.

        Raises:
            ConfigError: lists every number that it does not divide, and the sizes that fit.
        """
        names = ["num_attention_heads", "num_query_groups", "ffn_hidden_size", "padded_vocab_size"]
        if self.is_video2world:
            names.append("padded_input_vocab_size")
        wrong = [name for name in names if size < 1 or getattr(self, name) % size]
        if wrong:
            fitting = [
                n
                for n in range(1, self.num_query_groups + 1)
                if all(getattr(self, name) % n == 0 for name in names)
            ]
            raise ConfigError(
                f"--tensor_model_parallel_size {size} does not divide "
                + ", ".join(f"{name} {getattr(self, name)}" for name in wrong)
                + f"; use one of {', '.join(map(str, fitting))}."
            )

    def check_pipeline_parallel(self, size: int, num_chunks: int = 1) -> None:
        """Refuses a pipeline parallel size that does not divide the layers.

        Args:
            size: ranks that share the layers.
            num_chunks: parts on each of them.

        Raises:
            ConfigError: names the number of layers.
        """
        if size >= 1 and self.num_layers % size == 0 and self.num_layers % (size * num_chunks):
            raise ConfigError(
                f"--virtual_pipeline_model_parallel_size {num_chunks} does not divide the "
                f"{self.num_layers // size} layers of each of {size} pipeline stages; use a "
                f"divisor of {self.num_layers // size}."
            )
        if size < 1 or self.num_layers % size:
            raise ConfigError(
                f"--pipeline_model_parallel_size {size} does not divide the model's "
                f"{self.num_layers} layers; use a divisor of {self.num_layers}."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint's ``context/model.json``."""
        values = dataclasses.asdict(self)
        if self.lora is None:
            del values["lora"]
        if not self.num_medusa_heads:  # as it was before there were any
            del values["num_medusa_heads"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ModelConfig:
        """Reads what ``to_json`` wrote.

        Raises:
            CheckpointError: unknown or missing keys, or values of another type.
        """
        values = dict(values)
        try:
            values["latent_shape"] = parse_latent_shape(values["latent_shape"])
            if values.get("yarn") is not None:
                yarn = dict(values["yarn"])
                yarn["original_latent_shape"] = parse_latent_shape(yarn["original_latent_shape"])
                values["yarn"] = YarnConfig(**yarn)
            values["position_scale"] = AxisScale(*values.get("position_scale", UNSCALED))
            if values.get("lora") is not None:
                values["lora"] = LoraConfig.from_json(values["lora"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the model config is not one of ours ({error}); restore the checkpoint."
            ) from error


def positions_at_once(num_columns: int, device_type: str) -> int:
    """Positions whose logits stand side by side in the loss.

    Args:
        num_columns: of the vocabulary on this rank.
        device_type: ``cpu`` or ``cuda``.
    """
    return max(LOGITS_AT_ONCE[device_type] // num_columns, 1)


def _impossible_numbers(config: ModelConfig) -> list[str]:
    """What no model can have, one phrase each; numbers from a file can be of any type."""

    def is_count(value: object, least: int = 1) -> bool:
        return (
            isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_COUNT
        )

    def is_positive(value: object) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 < value < float("inf")  # type: ignore[operator]

    counts = ["num_layers", "num_attention_heads", "num_query_groups", "ffn_hidden_size"]
    counts += ["vocab_size", "context_len", *(["context_dim"] if config.is_video2world else [])]
    values = {name: getattr(config, name) for name in counts}
    wrong = [f"{n} {v!r} must be at least 1" for n, v in values.items() if not is_count(v)]
    if not wrong and config.num_layers > MAX_LAYERS:
        wrong.append(f"num_layers {config.num_layers} must be at most {MAX_LAYERS}")
    for name in ("hidden_size", "kv_channels"):
        value = getattr(config, name)
        # Positions along the three axes take even shares of them.
        if not is_count(value, 6) or value % 2:
            wrong.append(f"{name} {value!r} must be even and at least 6")
    if config.num_medusa_heads != 0 and not is_count(config.num_medusa_heads):
        wrong.append(f"num_medusa_heads {config.num_medusa_heads!r} must be at least 0")
    numbers: dict[str, object] = {
        "rotary_base": config.rotary_base,
        "layernorm_epsilon": config.layernorm_epsilon,
        **{f"position_scale {n}": v for n, v in config.position_scale._asdict().items()},
    }
    if config.yarn is not None:
        numbers |= {f"yarn {n}": getattr(config.yarn, n) for n in ("scale", "beta_slow")}
        # Frequencies between the two are blended: they must not coincide.
        numbers["yarn beta_fast - beta_slow"] = config.yarn.beta_fast - config.yarn.beta_slow
    wrong += [f"{n} {v!r} must be above 0" for n, v in numbers.items() if not is_positive(v)]
    if config.params_dtype not in PARAMS_DTYPES:
        known = ", ".join(PARAMS_DTYPES)
        wrong.append(f"params_dtype {config.params_dtype!r} must be one of {known}")
    return wrong


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
