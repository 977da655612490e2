"""Golden logits of the Video2World cases, whose clips and texts came through a data set's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.golden_ar import LOGIT_TOLERANCE, case_dir, case_io, cases_of, max_difference
from helpers.prompts import write_prompt_data

from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.data.batch import BatchSizes, validation_batches
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cuda_calls_mean_cpu
from cosmos_posttrain.models.builder import build_model
from cosmos_posttrain.models.rope import context_parallel_positions
from cosmos_posttrain.models.sequence import sequence_layout

CASES = cases_of("video2world_5b_like", "video2world_13b_like")


def write_case(name: str, folder: Path) -> Path:
    """The case's clips and texts as a data set with the text's own number of rows."""
    io, source = case_io(name), open_source(case_dir(name))
    shape = tuple(source.config.latent_shape)
    return write_prompt_data(folder, io["tokens"][:, 1:], shape, io["context"], (8, 8, 8))


def difference(name: str, folder: Path, tensor: int, context: int) -> float:
    """How far this rank's logits of the data set's batch are from the reference's."""
    source = open_source(case_dir(name))
    groups.initialize(groups.Parallelism(tensor=tensor, context=context))
    module = build_model(source.config, dtype=torch.float32, sequence_parallel=tensor > 1).eval()
    source.load_weights(module)
    data = TokenDataset(folder, "all")
    layout = sequence_layout(source.config)
    ((batch,),) = validation_batches(data, layout, BatchSizes(len(data), len(data)), 1)
    golden = case_io(name)
    positions = torch.arange(batch.tokens.shape[1])
    assert batch.context is not None and torch.equal(batch.context, golden["context"])
    if context > 1:
        positions = context_parallel_positions(len(positions), torch.device("cpu"))
        batch = batch.at(positions)
    with torch.no_grad(), cuda_calls_mean_cpu():
        logits = module(batch.tokens, None, None, context=batch.context, runtime_gather_output=True)
    known = positions < golden["logits"].shape[1]
    vocab_size = source.config.vocab_size
    return max_difference(logits[:, known, :vocab_size], golden["logits"][:, positions[known]])


@pytest.mark.parametrize("name", CASES)
def test_one_process(name: str, tmp_path: Path) -> None:
    assert difference(name, write_case(name, tmp_path / "data"), 1, 1) <= LOGIT_TOLERANCE


@pytest.mark.distributed
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["tp2-sp", "cp2"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes(name: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    folder = write_case(name, tmp_path / "data")
    assert max(run_distributed(difference, 2, name, folder, *sizes)) <= LOGIT_TOLERANCE
