"""What LoRA adds to a model, in plain numbers (Hu et al., 2021, arXiv:2106.09685). No torch.

Flows in: rank, alpha and the names of linear layers. Flows out: a ``LoraConfig``: a layer of that
name becomes ``W x + (alpha / rank) B A x``, with ``W`` frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cosmos_posttrain.errors import CheckpointError, ConfigError

# Linear layers by Megatron's names; ``linear_proj`` is self-attention's and cross-attention's.
BASE_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
TEXT_TARGETS = ("linear_q", "linear_kv")
LORA_TARGETS = BASE_TARGETS + TEXT_TARGETS
# Names of the factors, beside a layer's ``weight``.
LORA_A, LORA_B = "lora_a", "lora_b"
# Those whose inputs are shared out over the tensor-parallel ranks; of the others, the outputs are.
ROW_PARALLEL = ("linear_proj", "linear_fc2")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank factors beside frozen matrices; embedding and output rows are trained in full.

    Attributes:
        rank: rows of A and columns of B.
        alpha: the product counts ``alpha / rank`` times.
        targets: the linear layers that have factors, some of ``LORA_TARGETS`` in that order.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What the factors' product is multiplied by."""
        return self.alpha / self.rank

    def __str__(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}, {','.join(self.targets)}"

    @classmethod
    def from_json(cls, values: Any) -> LoraConfig:
        """Reads what ``dataclasses.asdict`` wrote.

        Raises:
            CheckpointError: values of another kind.
        """
        try:
            rank, alpha = int(values["rank"]), float(values["alpha"])
            targets = tuple(name for name in LORA_TARGETS if name in values["targets"])
            if rank < 1 or alpha <= 0 or len(targets) != len(values["targets"]):
                raise ValueError(f"lora {values}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the model config's lora is not one of ours ({error}); restore the checkpoint."
            ) from error
        return cls(rank, alpha, targets)


def parse_targets(text: str) -> tuple[str, ...]:
    """Names with commas between them, in the order of ``LORA_TARGETS``.

    Raises:
        ConfigError: a name that no linear layer has.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in LORA_TARGETS]
    if unknown or not names:
        raise ConfigError(
            f"--lora_targets {text!r} must name some of {', '.join(LORA_TARGETS)}, with commas "
            "between them."
        )
    return tuple(name for name in LORA_TARGETS if name in names)
