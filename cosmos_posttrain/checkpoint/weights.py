"""A model's tensors without the model: whole, one at a time, on the CPU.

Flows in: a way to read single tensors of a checkpoint. Flows out: the same tensors, whole (as at
tensor parallel size 1), in the reference's form or Megatron's, whichever form they lie in.

Every tensor is read when it is asked for, and layers of one kind, which lie stacked in one tensor
in torch_dist folders, are read one by one. So the memory needed is that of one layer's largest
tensor, whatever the size of the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from cosmos_posttrain.checkpoint import mapping
from cosmos_posttrain.checkpoint.tensor_bytes import Tensors, num_bytes
from cosmos_posttrain.models.config import ModelConfig


class WholeWeights(ABC):
    """The tensors of a checkpoint, their names and shapes compared with its config's.

    Attributes:
        config: the model's numbers.
    """

    config: ModelConfig

    @abstractmethod
    def megatron(self, name: str) -> Tensor:
        """One whole Megatron tensor, by its name on disk with a global layer number."""

    @abstractmethod
    def reference(self) -> Iterator[tuple[str, Tensor]]:
        """All reference tensors by name, in the order of the forward pass."""

    @abstractmethod
    def tensors(self) -> Tensors:
        """Shape and dtype of all reference tensors, in the same order; reads no weights."""

    def all_megatron(self) -> Iterator[tuple[str, Tensor]]:
        """All whole Megatron tensors by name, in the order of the forward pass."""
        for name in mapping.megatron_names(self.config):
            yield name, self.megatron(name)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(num_bytes(*entry) for entry in self.tensors().values())


class ReferenceWeights(WholeWeights):
    """Tensors under the reference's names.

    Args:
        read: returns a tensor by its name.
        shapes: of all tensors that are there.
        dtypes: theirs.
        config: the model's numbers.
        where: the file or folder, for messages.

    Raises:
        CheckpointError: tensors are missing, surplus or misshapen; all of them are named.
    """

    def __init__(
        self,
        read: Callable[[str], Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        config: ModelConfig,
        where: str,
    ) -> None:
        mapping.check_reference_shapes(shapes, config, where)
        self.config = config
        self._read, self._shapes, self._dtypes = read, shapes, dtypes

    def megatron(self, name: str) -> Tensor:
        return mapping.to_megatron(name, self._read, self.config)

    def reference(self) -> Iterator[tuple[str, Tensor]]:
        for name in mapping.reference_names(self.config):
            yield name, self._read(name)

    def tensors(self) -> Tensors:
        names = mapping.reference_names(self.config)
        return {name: (self._shapes[name], self._dtypes[name]) for name in names}
