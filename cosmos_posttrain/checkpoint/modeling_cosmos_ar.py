"""A Cosmos autoregressive world model for transformers: base, and Video2World with a text.

Lies in every Hugging Face folder that is converted, as it is here, and needs torch and transformers
alone (tested with 4.57 and 5.23). Flows in: tokens (B, S) of one clip each, the grid flattened in
(t h w) order, and for Video2World ``<bov>`` before them and ``encoder_hidden_states``. Flows out:
logits over the vocabulary.

The model: Llama's layers with RoPE over time, height and width (Cosmos World Foundation Model
Platform, section 5.2; YaRN: arXiv:2309.00071), RMSNorm on the queries and keys of each head, and in
Video2World cross-attention to the text in every layer and a fixed table of absolute positions that
is added before every layer.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    clip = model.generate(tokens)  # (B, P) -> (B, T * H * W), greedy

Clips of a batch have equally many given tokens: nothing is padded, for positions follow from the
grid. License: Apache-2.0 (this file; the weights have their own).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import CausalLMOutputWithPast

# The numbers of a model, in the field names of the public reference implementation (here: the 4B).
_FIELDS: dict[str, Any] = {
    "n_layers": 16,
    "dim": 4096,
    "n_heads": 32,
    "n_kv_heads": 8,
    "head_dim": 128,
    "ffn_hidden_size": 14336,
    "vocab_size": 64000,  # tokens that can be predicted
    "vocab_size_in": 64000,  # tokens that can be fed; in Video2World <bov> is token vocab_size
    "video_latent_shape": [5, 40, 64],  # the token grid (T, H, W) of one clip
    "max_seq_len": 12800,
    "rope_theta": 500000.0,
    "norm_eps": 1e-5,
    "apply_yarn": False,  # slows low frequencies down
    "original_latent_shape": [3, 40, 64],  # the grid before YaRN
    "yarn_scale": 2.0,
    "yarn_beta_fast": 4.0,  # rotations over the original grid above which a frequency stays
    "yarn_beta_slow": 1.0,  # rotations below which it is slowed down fully
    "position_scale": [1.0, 1.0, 1.0],  # what positions (t, h, w) are multiplied by
    "insert_cross_attn": False,  # whether the model takes a text
    "context_dim": 1024,  # width of the text's embeddings
    "context_len": 512,  # rows of them in training, zero rows behind the text counted in
}


class CosmosARConfig(PretrainedConfig):
    """The model's numbers: ``_FIELDS``, and what every config of transformers has."""

    model_type = "cosmos_ar"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012 (transformers' own shape)
        "num_hidden_layers": "n_layers",
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "norm_eps",
    }

    def __init__(self, **kwargs: Any) -> None:
        for name, default in _FIELDS.items():
            setattr(self, name, kwargs.pop(name, default))
        super().__init__(**{**kwargs, "tie_word_embeddings": False})

    @property
    def num_clip_tokens(self) -> int:
        """Tokens of one clip, ``<bov>`` counted in."""
        return math.prod(self.video_latent_shape) + int(self.insert_cross_attn)


def _frequencies(config: CosmosARConfig, dim: int, original_length: int) -> Tensor:
    """(dim / 2,) float32 inverse frequencies of one axis."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32)[: dim // 2] / dim
    frequencies: Tensor = config.rope_theta**-exponents
    if not config.apply_yarn:
        return frequencies
    high = 2 * math.pi * config.yarn_beta_fast / original_length
    low = 2 * math.pi * config.yarn_beta_slow / original_length
    keep = ((frequencies - low) / (high - low)).clamp(0, 1)
    return frequencies * ((1 - keep) / config.yarn_scale + keep)


def _over_grid(config: CosmosARConfig, axes: list[Tensor]) -> Tensor:
    """Rows (T, D_t), (H, D_h) and (W, D_w) of the axes -> (num_clip_tokens, D_t + D_h + D_w)."""
    shape = config.video_latent_shape
    spread = []
    for axis, rows in enumerate(axes):
        view = [1, 1, 1, rows.shape[1]]
        view[axis] = shape[axis]
        spread.append(rows.view(view).expand(*shape, -1))
    table = torch.cat(spread, dim=-1).flatten(0, 2)
    # <bov> has a row of zeros: it is not turned, and nothing is added to it.
    return nn.functional.pad(table, (0, 0, int(config.insert_cross_attn), 0))


def _positions(config: CosmosARConfig, axis: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(config.video_latent_shape[axis], dtype=dtype) * config.position_scale[axis]


def rotary_angles(config: CosmosARConfig) -> Tensor:
    """(num_clip_tokens, head_dim) float32 radians; the halves of the last axis are equal."""
    dim_space = config.head_dim // 6 * 2
    axes = []
    for axis, dim in enumerate((config.head_dim - 2 * dim_space, dim_space, dim_space)):
        # Height and width have the same frequencies, those of the height.
        original = config.original_latent_shape[min(axis, 1)]
        frequencies = _frequencies(config, dim, original)
        axes.append(torch.outer(_positions(config, axis, torch.float32), frequencies))
    half = _over_grid(config, axes)
    return torch.cat([half, half], dim=-1)


def absolute_positions(config: CosmosARConfig) -> Tensor:
    """(num_clip_tokens, dim) bfloat16 sines and cosines of time, height and width."""
    dim_space = config.dim // 6 * 2
    axes = []
    for axis, dim in enumerate((config.dim - 2 * dim_space, dim_space, dim_space)):
        exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim / 2)
        angles = torch.outer(_positions(config, axis, torch.float64), 10000.0**-exponents)
        axes.append(torch.cat([angles.sin(), angles.cos()], dim=1).to(torch.bfloat16))
    return _over_grid(config, axes)


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turns pairs of channels (i, i + D / 2) of (B, heads, S, D) by the angles of (S, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


def _attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """(B, heads, S, D) and (B, groups, S_k, D) -> (B, S, heads * D).

    Causally, the queries are the last S of S_k positions.
    """
    length, seen = query.shape[2], key.shape[2]
    if query.is_cuda and query.dtype == torch.float32:
        # There the kernel that takes grouped heads holds all scores in memory.
        heads_per_group = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(heads_per_group, 1)
        value = value.repeat_interleave(heads_per_group, 1)
    mask = None
    if causal and 1 < length < seen:
        mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(seen - length)
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and 1 < length == seen,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).flatten(2)


class CosmosARRMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, the first factor computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.type_as(x) * self.weight


class CosmosARAttention(nn.Module):
    """Attention with grouped keys and a norm on queries and keys; to the clip, or to a text.

    Args:
        config: the model's numbers.
        number: the layer's, from 0.
        source_dim: width of what the keys and values are made of.
    """

    def __init__(self, config: CosmosARConfig, number: int, source_dim: int) -> None:
        super().__init__()
        width = config.head_dim
        self.number, self.head_dim = number, width
        self.wq = nn.Linear(config.dim, config.n_heads * width, bias=False)
        self.wk = nn.Linear(source_dim, config.n_kv_heads * width, bias=False)
        self.wv = nn.Linear(source_dim, config.n_kv_heads * width, bias=False)
        self.wo = nn.Linear(config.n_heads * width, config.dim, bias=False)
        self.q_norm = CosmosARRMSNorm(width, config.norm_eps)
        self.k_norm = CosmosARRMSNorm(width, config.norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_norm(self._heads(self.wk(source))), self._heads(self.wv(source))

    def to_clip(self, x: Tensor, turns: Tensor, places: range, cache: Cache | None) -> Tensor:
        """Attends to the tokens before each and itself.

        Args:
            x: (B, S, dim).
            turns: (2, S, head_dim) cosines and sines of their positions.
            places: the S positions.
            cache: keys and values of those before, or None.
        """
        query = self.q_norm(self._heads(self.wq(x)))
        key, value = self._keys_and_values(x)
        query, key = _rotate(query, *turns), _rotate(key, *turns)
        if cache is not None:
            if cache.is_compileable:  # older static caches ask where to put them
                where = torch.arange(places.start, places.stop, device=x.device)
                key, value = cache.update(key, value, self.number, {"cache_position": where})
                # All places of the cache, those not yet filled too.
                key, value = key[:, :, : places.stop], value[:, :, : places.stop]
            else:
                key, value = cache.update(key, value, self.number)
        projected: Tensor = self.wo(_attend(query, key, value, causal=True))
        return projected

    def to_text(self, x: Tensor, text: Tensor | None, cache: EncoderDecoderCache | None) -> Tensor:
        """Attends to all rows of a text (B, L, context_dim); the cache keeps what is made of it."""
        query = self.q_norm(self._heads(self.wq(x)))
        if cache is not None and cache.is_updated.get(self.number):
            layer = cache.cross_attention_cache.layers[self.number]
            key, value = layer.keys, layer.values
        else:
            assert text is not None
            key, value = self._keys_and_values(text)
            if cache is not None:
                cache.cross_attention_cache.update(key, value, self.number)
                cache.is_updated[self.number] = True
        projected: Tensor = self.wo(_attend(query, key, value, causal=False))
        return projected


class CosmosARFeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, config: CosmosARConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_hidden_size, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden_size, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, dim) -> (B, S, dim)."""
        projected: Tensor = self.w2(silu(self.w1(x)) * self.w3(x))
        return projected


class CosmosARLayer(nn.Module):
    """Absolute positions where there are some, self-attention, the text, the feed-forward."""

    def __init__(self, config: CosmosARConfig, number: int) -> None:
        super().__init__()
        self.attention_norm = CosmosARRMSNorm(config.dim, config.norm_eps)
        self.attention = CosmosARAttention(config, number, config.dim)
        self.takes_text = config.insert_cross_attn
        if self.takes_text:
            self.cross_attention_norm = CosmosARRMSNorm(config.dim, config.norm_eps)
            self.cross_attention = CosmosARAttention(config, number, config.context_dim)
        self.ffn_norm = CosmosARRMSNorm(config.dim, config.norm_eps)
        self.feed_forward = CosmosARFeedForward(config)

    def forward(
        self,
        x: Tensor,
        turns: Tensor,
        positions: Tensor | None,
        text: Tensor | None,
        places: range,
        cache: Cache | None,
    ) -> Tensor:
        """(B, S, dim) -> (B, S, dim); see ``CosmosARForCausalLM.forward``."""
        if positions is not None:
            x = x + positions
        pair = cache if isinstance(cache, EncoderDecoderCache) else None
        own = cache if pair is None else pair.self_attention_cache
        x = x + self.attention.to_clip(self.attention_norm(x), turns, places, own)
        if self.takes_text:
            normed = self.cross_attention_norm(x)
            x = x + self.cross_attention.to_text(normed, text, pair)
        return x + self.feed_forward(self.ffn_norm(x))


class CosmosARStack(nn.Module):
    """What the names of the weights stand for: embedding, layers, last norm, output."""

    def __init__(self, config: CosmosARConfig) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size_in, config.dim)
        self.layers = nn.ModuleList(CosmosARLayer(config, n) for n in range(config.n_layers))
        self.norm = CosmosARRMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)


class CosmosARForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole model; ``generate`` works with a dynamic or a static cache, beams and sampling."""

    config_class = CosmosARConfig
    _no_split_modules = ("CosmosARLayer",)
    _skip_keys_device_placement = ("cache",)
    _supports_sdpa = True

    def __init__(self, config: CosmosARConfig) -> None:
        super().__init__(config)
        self.model = CosmosARStack(config)
        # Made when they are first needed: a model may be built without memory behind its tensors.
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor | None]] = {}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the tokens."""
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces it."""
        self.model.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """The layer that scores the tokens."""
        return self.model.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces it."""
        self.model.output = new_embeddings

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As every model's, but the mask is only looked at with the first tokens."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, **kwargs
        )
        if past_key_values is None or int(past_key_values.get_seq_length()) == 0:
            inputs["attention_mask"] = attention_mask
        return inputs

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        encoder_hidden_states: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Scores the next token at every position.

        Args:
            input_ids: (B, S) int64, the tokens behind those in the cache. A Video2World clip begins
                with ``<bov>``, token ``vocab_size``.
            attention_mask: all ones or None; clips are never padded.
            past_key_values: what went before.
            encoder_hidden_states: (B, L, context_dim) the text's embeddings, of a Video2World
                model. Every row counts: those of training have ``context_len`` rows, zero ones
                behind the text. Not needed once the cache has seen them.
            use_cache: whether to return a cache.
            logits_to_keep: score the last positions only, so many or these; 0 means all.
            return_dict: False gives a tuple.
            **kwargs: what ``generate`` passes to every model; positions among it, which follow from
                the grid here.

        Returns:
            Logits (B, S, vocab_size) in the model's dtype, and the cache.

        Raises:
            ValueError: tokens that do not fit the grid, padding, or a text too many or too few.
        """
        cache, start = self._prepared(past_key_values, use_cache, encoder_hidden_states is not None)
        self._check(input_ids, attention_mask, encoder_hidden_states, start, cache)
        x = self.model.tok_embeddings(input_ids)
        places = range(start, start + x.shape[1])
        turns, positions = self._rows(x, places)
        text = None if encoder_hidden_states is None else encoder_hidden_states.to(x)
        for layer in self.model.layers:
            x = layer(x, turns, positions, text, places, cache=cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.output(self.model.norm(x[:, kept]))
        output = CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _prepared(
        self, cache: Cache | None, use_cache: bool | None, has_text: bool
    ) -> tuple[Cache | None, int]:
        """The cache to use, with a part for the text where there is one, and its length."""
        if cache is None and use_cache:
            cache = DynamicCache()
        pairs = self.config.insert_cross_attn and has_text
        if cache is not None and pairs and not isinstance(cache, EncoderDecoderCache):
            cache = EncoderDecoderCache(cache, DynamicCache())
        return cache, 0 if cache is None else int(cache.get_seq_length())

    def _check(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        text: Tensor | None,
        start: int,
        cache: Cache | None,
    ) -> None:
        config = self.config
        end = start + tokens.shape[1]
        if end > config.num_clip_tokens:
            raise ValueError(
                f"{end} tokens do not fit the grid {tuple(config.video_latent_shape)}; a clip has "
                f"{config.num_clip_tokens}."
            )
        if start == 0 and mask is not None and mask.ndim == 2 and not bool(mask.all()):
            raise ValueError("clips cannot be padded; give a batch equally many tokens of each.")
        if not config.insert_cross_attn:
            if text is not None:
                raise ValueError("this model takes no text; leave out encoder_hidden_states.")
            return
        if start == 0 and not bool((tokens[:, 0] == config.vocab_size).all()):
            raise ValueError(f"a clip must begin with <bov>, token {config.vocab_size}.")
        if text is None and not (
            isinstance(cache, EncoderDecoderCache) and any(cache.is_updated.values())
        ):
            raise ValueError(
                "this model needs a text; give encoder_hidden_states, "
                f"(B, L, {config.context_dim})."
            )
        wanted = (tokens.shape[0], config.context_dim)
        if text is not None and (text.ndim != 3 or (text.shape[0], text.shape[2]) != wanted):
            raise ValueError(
                f"encoder_hidden_states has shape {tuple(text.shape)}; give "
                f"({wanted[0]}, L, {wanted[1]})."
            )

    def _rows(self, x: Tensor, places: range) -> tuple[Tensor, Tensor | None]:
        """Cosines and sines (2, S, head_dim) and absolute positions (S, dim), like x."""
        place = (x.device, x.dtype)
        if place not in self._tables:
            with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
                angles = rotary_angles(self.config)
                turns = torch.stack([angles.cos(), angles.sin()]).to(*place)
                texts = self.config.insert_cross_attn
                added = absolute_positions(self.config).to(*place) if texts else None
            self._tables[place] = (turns, added)
        turns, added = self._tables[place]
        rows = slice(places.start, places.stop)
        return turns[:, rows], None if added is None else added[rows]
