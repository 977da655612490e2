"""Memory of one GPU while clips are generated, in bytes, stage by stage. Plain numbers, no torch.

Flows in: a model, how its weights are stored, and the batch. Flows out: ``InferenceMemory``. The
stages of ``infer.py`` come one after another; what is not offloaded stays for all of them:

    text       the text encoder
    encode     the tokenizer, and what its widest layers hold
    load       the weights; as int8, and the matrix that is being rounded
    generate   the weights, keys and values of all tokens, and what one pass holds
    decode     as encode
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.plan.memory import FRAGMENTATION
from cosmos_posttrain.plan.parameters import layer_parameters, parameter_groups

# The CUDA context and cuBLAS's workspaces of one process; an assumption, not a measurement.
FRAMEWORK_BYTES = 2**30
STORED = ("bf16", "int8")
# Parameters of the published tokenizer DV8x16x16, and bytes that its widest layers hold for a
# pixel of the chunk that runs at once (docs/tokenizers.md), four of them at a time.
_TOKENIZER_PARAMETERS = 110_898_294
_TOKENIZER_BYTES_PER_PIXEL, _TOKENIZER_LAYERS = 16, 4
_CHUNK_PIXELS = 64 * 256 * 256
# T5-11B's encoder: 24 layers of 128 heads of 128 and 65,536 hidden units at width 1,024.
_T5_PARAMETERS = 24 * (4 * 1024 * 16384 + 2 * 1024 * 65536) + 32128 * 1024
_BF16 = 2


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes on one GPU.

    Attributes:
        weights: of the model.
        cache: keys and values of the whole batch, of the text's too.
        work: what a pass over the prompt holds.
        tokenizer: weights, and what its layers hold.
        text_encoder: weights; 0 of base models.
        loading: weights of the model while they are read, and what rounding a matrix holds.
    """

    weights: float
    cache: float
    work: float
    tokenizer: float
    text_encoder: float
    loading: float

    @property
    def together(self) -> float:
        """The peak where nothing is offloaded."""
        model = max(self.loading, self.weights + self.cache + self.work)
        return _with_overhead(self.text_encoder + self.tokenizer + model)

    @property
    def offloaded(self) -> float:
        """The peak where each stage has the GPU to itself (every ``--offload_*`` flag)."""
        generating = self.weights + self.cache + self.work
        return _with_overhead(max(self.text_encoder, self.tokenizer, self.loading, generating))


def _with_overhead(num_bytes: float) -> float:
    return FRAMEWORK_BYTES + num_bytes * (1 + FRAGMENTATION)


def inference_memory(
    model: ModelConfig, stored: str, batch_size: int = 1, num_condition_latents: int = 2
) -> InferenceMemory:
    """Memory of one GPU that holds the whole model.

    Args:
        model: the model's numbers, with the latent shape to generate.
        stored: ``bf16``, or ``int8``: the layers' matrices in one byte a weight, with a scale for
            each row, and the rest in bfloat16.
        batch_size: clips that are generated together; twice as many with guidance.
        num_condition_latents: latent frames that are given.
    """
    return InferenceMemory(
        weights=weight_bytes(model, stored),
        cache=cache_bytes(model, batch_size),
        work=_work_bytes(model, batch_size, num_condition_latents),
        tokenizer=_BF16 * _TOKENIZER_PARAMETERS
        + _TOKENIZER_LAYERS * _TOKENIZER_BYTES_PER_PIXEL * _CHUNK_PIXELS,
        text_encoder=_BF16 * _T5_PARAMETERS if model.is_video2world else 0,
        loading=weight_bytes(model, stored) + (_rounding_bytes(model) if stored == "int8" else 0),
    )


def weight_bytes(model: ModelConfig, stored: str) -> float:
    """All parameters as they are stored."""
    total = sum(parameter_groups(model).values())
    if stored == "bf16":
        return _BF16 * total
    matrices = model.num_layers * layer_parameters(model).matrices
    # A matrix of n inputs has one scale for n weights; n is the hidden size or more.
    return matrices + _BF16 * matrices / model.hidden_size + _BF16 * (total - matrices)


def _rounding_bytes(model: ModelConfig) -> float:
    """The largest matrix of a layer, gate and up: in bfloat16, and a copy of it in float32."""
    return (_BF16 + 4) * 2 * model.ffn_hidden_size * model.hidden_size


def cache_bytes(model: ModelConfig, batch_size: int) -> float:
    """Keys and values of every token, and of every row of the text, in bfloat16."""
    rows = model.seq_length + (model.context_len if model.is_video2world else 0)
    width = model.num_query_groups * model.kv_channels
    return _BF16 * 2 * model.num_layers * batch_size * rows * width


def _work_bytes(model: ModelConfig, batch_size: int, num_condition_latents: int) -> float:
    """The widest moment of the pass over the prompt: SwiGLU's halves, and the hidden states."""
    tokens = batch_size * num_condition_latents * model.latent_shape.tokens_per_frame
    queries = model.num_attention_heads * model.kv_channels
    widths = 3 * model.ffn_hidden_size + 3 * model.hidden_size + 2 * queries
    scores = 4 * batch_size * model.padded_vocab_size * 4
    return _BF16 * tokens * widths + scores
