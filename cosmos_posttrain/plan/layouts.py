"""Which layouts of a number of GPUs are possible, which fit, and which is fastest.

Flows in: what is trained, on how many GPUs of what memory. Flows out: ``Candidate``s, fastest
first, or a sentence that says what would fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.plan.config import RESERVE
from cosmos_posttrain.plan.memory import Layout, Memory, Workload, memory
from cosmos_posttrain.plan.speed import Hardware, Speed, speed

GIB = 2**30
# Nodes up to which a refusal looks for a number of GPUs that would do.
MAX_NODES = 64


@dataclass(frozen=True)
class Cluster:
    """The GPUs.

    Attributes:
        num_gpus: all of them.
        memory_bytes: of one.
        gpus_per_node: GPUs that are joined by fast links.
        hardware: their speed.
        reserve: share of the memory that must stay free.
    """

    num_gpus: int
    memory_bytes: float
    gpus_per_node: int
    hardware: Hardware
    reserve: float = RESERVE

    @property
    def usable_bytes(self) -> float:
        """Of one GPU, without the reserve."""
        return self.memory_bytes * (1 - self.reserve)

    @property
    def num_nodes(self) -> int:
        """Nodes that the GPUs fill."""
        return max(1, self.num_gpus // self.gpus_per_node)


@dataclass(frozen=True)
class Candidate:
    """A possible layout with its estimates."""

    layout: Layout
    memory: Memory
    speed: Speed


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _divides_model(work: Workload, tensor: int, pipeline: int) -> bool:
    """The model's own rules: heads, groups, SwiGLU width and vocabulary by TP, layers by PP."""
    try:
        work.model.check_tensor_parallel(tensor)
        work.model.check_pipeline_parallel(pipeline)
    except ConfigError:
        return False
    return True


def _trains_heads(work: Workload, pipeline: int, context: int) -> bool:
    """The trainer's rule for Medusa heads."""
    if not work.model.num_medusa_heads:
        return True
    return context == 1 and (pipeline == 1 or not work.heads_alone)


def sequence_divides(length: int, tensor: int, context: int, sequence_parallel: bool) -> bool:
    """The trainer's rule: TP pieces (sequence parallelism) of 2 * CP pieces (balanced split)."""
    pieces = (tensor if sequence_parallel else 1) * (2 * context if context > 1 else 1)
    return length % pieces == 0


def possible_layouts(work: Workload, num_gpus: int, gpus_per_node: int) -> Iterator[Layout]:
    """Every layout that divides the model, the clip, the batch and the GPUs.

    Tensor and context parallelism stay inside a node, since they wait for their transfers.
    Sequence parallelism is on wherever the clip's length allows: it costs nothing and saves memory.
    """
    length = work.model.seq_length
    for tensor in _divisors(math.gcd(num_gpus, work.model.num_query_groups)):
        for pipeline in _divisors(num_gpus // tensor):
            if not _divides_model(work, tensor, pipeline):
                continue
            for context in _divisors(num_gpus // tensor // pipeline):
                data = num_gpus // (tensor * pipeline * context)
                if not _trains_heads(work, pipeline, context):
                    continue
                if (
                    min(gpus_per_node, num_gpus) % (tensor * context)
                    or not sequence_divides(length, tensor, context, False)
                    or work.global_batch_size % (work.micro_batch_size * data)
                ):
                    continue
                split = tensor > 1 and sequence_divides(length, tensor, context, True)
                for recompute in (False, True):
                    yield Layout(tensor, pipeline, context, data, split, recompute)


def _order(candidate: Candidate) -> tuple:
    """Fastest first; among equals the one with fewer parts, then with less memory."""
    layout = candidate.layout
    parts = layout.tensor * layout.pipeline * layout.context
    return (-round(candidate.speed.tokens_per_second), parts, candidate.memory.total)


def search(work: Workload, cluster: Cluster) -> tuple[list[Candidate], Candidate]:
    """Estimates every possible layout.

    Returns:
        Those that fit, fastest first, and the one of all that needs least memory.

    Raises:
        ConfigError: no layout divides the model, the clip and the batch.
    """
    layouts = list(possible_layouts(work, cluster.num_gpus, cluster.gpus_per_node))
    if not layouts:
        raise ConfigError(
            f"no layout of {cluster.num_gpus} GPUs divides the model's {work.model.num_layers} "
            f"layers and {work.model.num_query_groups} query groups, a clip of "
            f"{work.model.seq_length} tokens and --global_batch_size {work.global_batch_size} with "
            f"--micro_batch_size {work.micro_batch_size}; use another number of GPUs, a power of "
            "two at best, or another batch size."
        )
    candidates = [
        Candidate(layout, memory(work, layout), speed(work, layout, cluster.hardware))
        for layout in layouts
    ]
    fitting = [c for c in candidates if c.memory.total <= cluster.usable_bytes]
    return sorted(fitting, key=_order), min(candidates, key=lambda c: c.memory.total)


def least_gpus(work: Workload, memory_bytes: float, gpus_per_node: int) -> int | None:
    """The smallest number of such GPUs that holds the job; None up to ``MAX_NODES`` nodes.

    Above one node only whole nodes are tried.
    """
    numbers = [*range(1, gpus_per_node + 1)]
    numbers += [nodes * gpus_per_node for nodes in range(2, MAX_NODES + 1)]
    for number in numbers:
        for layout in possible_layouts(work, number, gpus_per_node):
            if memory(work, layout).total <= memory_bytes:
                return number
    return None


def refusal(name: str, work: Workload, cluster: Cluster, smallest: Candidate) -> ConfigError:
    """One sentence: what does not fit, how much is needed, and what would do."""
    needed = math.ceil(smallest.memory.total / (1 - cluster.reserve) / GIB)
    number = least_gpus(work, cluster.usable_bytes, cluster.gpus_per_node)
    size = f"{cluster.memory_bytes / GIB:g} GB"
    choices = [] if number is None else [f"at least {number} GPUs of {size}"]
    choices.append(f"{cluster.num_gpus} of {needed} GB")
    return ConfigError(
        f"{name} cannot be trained on {cluster.num_gpus} GPU{'s' * (cluster.num_gpus > 1)} of "
        f"{size}: its smallest layout ({describe(smallest.layout)}) needs {needed} GB on each, "
        f"{cluster.reserve:.0%} of which stay free; use {' or '.join(choices)}."
    )


def describe(layout: Layout) -> str:
    """A layout in words, such as ``TP 4, PP 1, CP 1, DP 2, recompute``."""
    text = f"TP {layout.tensor}, PP {layout.pipeline}, CP {layout.context}, DP {layout.data}"
    return text + (", recompute" if layout.recompute else "")
