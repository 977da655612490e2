"""LoRA beside Megatron's parallel linear layers (Hu et al., 2021, arXiv:2106.09685).

Flows in: a layer spec's linear class and a ``LoraConfig``. Flows out: a class that computes
``W x + (alpha / rank) B A x`` at any tensor and sequence parallel size, its ``W`` under its old
name.

Of a column-parallel layer every rank has all of A and its rows of B; of a row-parallel layer its
columns of A and all of B. Only ``A x``, of ``rank`` channels, passes between ranks.
"""

from __future__ import annotations

from typing import Any, ClassVar

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.functional import linear

from cosmos_posttrain.models.lora_config import LORA_A, LORA_B, LoraConfig


def is_factor(name: str) -> bool:
    """Whether a parameter is one of LoRA's factors."""
    return name.endswith((f".{LORA_A}", f".{LORA_B}"))


class _ColumnParallelWithFactors(ColumnParallelLinear):
    """``lora_a`` (rank, inputs), whole; ``lora_b`` (outputs / TP, rank).

    Where the outputs are several parts that lie one behind the other on every rank (SwiGLU's two
    branches), ``lora_b`` is (parts, outputs / parts / TP, rank), so that it is cut along one axis.
    """

    lora: ClassVar[LoraConfig]
    num_parts: ClassVar[int]

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **kwargs)
        rank, rows = self.lora.rank, len(self.weight)
        shape = (rows,) if self.num_parts == 1 else (self.num_parts, rows // self.num_parts)
        self._axis_of_b = len(shape) - 1
        self.lora_a = nn.Parameter(self.weight.new_zeros(rank, input_size))
        self.lora_b = nn.Parameter(self.weight.new_zeros(*shape, rank))
        set_tensor_model_parallel_attributes(self.lora_b, True, self._axis_of_b, 1)
        # Under sequence parallelism A sees this rank's tokens only: gradients are to be summed.
        self.lora_a.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's, and the factors' part on top."""
        output, bias = super().forward(input_, *args, **kwargs)
        narrow = linear(input_, self.lora_a)
        if self.sequence_parallel:
            narrow = gather_from_sequence_parallel_region(narrow, tensor_parallel_output_grad=True)
        else:
            narrow = copy_to_tensor_model_parallel_region(narrow)
        added = linear(narrow, self.lora_b.flatten(0, -2))
        return output.add(added, alpha=self.lora.scale), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As Megatron's, with the axis along which B is cut."""
        axes = {"weight": 0, "bias": 0, LORA_B: self._axis_of_b}
        return _sharded_tensors(self, prefix, axes, sharded_offsets)


class _RowParallelWithFactors(RowParallelLinear):
    """``lora_a`` (rank, inputs / TP); ``lora_b`` (outputs, rank), whole."""

    lora: ClassVar[LoraConfig]

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **kwargs)
        rank, columns = self.lora.rank, self.weight.shape[1]
        self.lora_a = nn.Parameter(self.weight.new_zeros(rank, columns))
        self.lora_b = nn.Parameter(self.weight.new_zeros(output_size, rank))
        set_tensor_model_parallel_attributes(self.lora_a, True, 1, 1)
        self.lora_b.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As Megatron's, and the factors' part on top."""
        output, bias = super().forward(input_)
        narrow = linear(input_, self.lora_a)
        if self.sequence_parallel:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow)
        else:
            narrow = reduce_from_tensor_model_parallel_region(narrow)
        return output.add(linear(narrow, self.lora_b), alpha=self.lora.scale), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As Megatron's, with the axis along which A is cut."""
        return _sharded_tensors(self, prefix, {"weight": 1, LORA_A: 1}, sharded_offsets)


def _sharded_tensors(
    layer: nn.Module, prefix: str, axes: dict[str, int], offsets: tuple
) -> dict[str, Any]:
    state = layer.state_dict(prefix="", keep_vars=True)
    found: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, axes, offsets)
    return found


def with_factors(base: type, lora: LoraConfig | None, name: str) -> type:
    """A linear class with LoRA's factors where the layer ``name`` is a target; else itself.

    A class, not a function: Megatron's specs take nothing else everywhere.
    """
    if lora is None or name not in lora.targets:
        return base
    if issubclass(base, ColumnParallelLinear):
        members = {"lora": lora, "num_parts": 2 if name == "linear_fc1" else 1}
        return type("LoraColumnParallelLinear", (_ColumnParallelWithFactors, base), members)
    assert issubclass(base, RowParallelLinear), base
    return type("LoraRowParallelLinear", (_RowParallelWithFactors,), {"lora": lora})
