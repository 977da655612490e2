"""Scores of tokens: against plain softmax, and on every layout against the loss of training."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers.distributed_run import run_distributed

from cosmos_posttrain.data.batch import Batch
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.evaluation.scoring import Scorer, Scores, of_clips
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models import token_scores
from cosmos_posttrain.models.builder import build_model
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.models.sequence import sequence_layout
from cosmos_posttrain.training.building import wrap
from cosmos_posttrain.training.step import run_batches

SHAPE = LatentShape(3, 2, 4)


def plain_scores(logits: torch.Tensor, labels: torch.Tensor, num_top: int) -> list[torch.Tensor]:
    """The definitions, one row at a time, in float64."""
    rows = []
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda token: (-float(row[token]), token))
        p = row.softmax(0)
        rest = p[order[num_top:]].sum() if len(order) > num_top else p.new_zeros(())
        rows.append((-p[label].log(), order.index(label), rest.log()))
    nll, rank, rest = zip(*rows, strict=True)
    return [torch.stack(nll), torch.tensor(rank), torch.stack(rest)]


def scores_of_logits(logits: torch.Tensor, labels: torch.Tensor) -> Scores:
    """As a ``Scorer`` makes them: of (N, V) logits and (N,) labels."""
    scores = token_scores.score_logits(logits, labels)
    nll, rank, log_rest = (x.numpy() for x in (scores.nll, scores.rank, scores.log_rest))
    return Scores(nll, rank, log_rest, logits.shape[-1])


@pytest.mark.parametrize("num_top", [1, 5, 39, 40, 60])
def test_scores_are_those_of_a_plain_softmax(num_top: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 40, generator=generator)
    logits[10:30] = logits[10:30].round()  # many equal ones
    labels = torch.randint(0, 40, (50,), generator=generator)
    scores = token_scores.score_logits(logits, labels, num_top)
    nll, rank, rest = plain_scores(logits, labels, num_top)
    torch.testing.assert_close(scores.nll.double(), nll, rtol=1e-5, atol=1e-6)
    assert torch.equal(scores.rank.long(), rank)
    torch.testing.assert_close(scores.log_rest.double(), rest, rtol=1e-4, atol=1e-5)


def test_a_confident_model_leaves_an_exact_rest() -> None:
    """One minus the mass of the first 500 would be 0 in float32."""
    logits = torch.zeros(1, 1000)
    logits[0, 3] = 40.0
    scores = scores_of_logits(logits, torch.tensor([3]))
    assert scores.log_rest[0] == pytest.approx(math.log(500) - 40, abs=1e-4)


def test_top_cross_entropy_shares_the_rest_evenly() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(1, 700, generator=generator).expand(700, 700)
    scores = scores_of_logits(logits, torch.arange(700))
    probabilities = np.exp(-scores.top_cross_entropy())
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    is_top = scores.is_among(500)
    np.testing.assert_allclose(probabilities[is_top], np.exp(-scores.nll[is_top]), rtol=1e-6)
    assert np.ptp(probabilities[~is_top]) < 1e-9


def test_a_model_that_knows_nothing_takes_the_lowest_number() -> None:
    scores = scores_of_logits(torch.zeros(64, 64), torch.arange(64))
    assert scores.rank.tolist() == list(range(64))
    np.testing.assert_allclose(scores.nll, math.log(64), rtol=1e-6)
    np.testing.assert_allclose(scores.top_cross_entropy(), math.log(64), rtol=1e-6)


def test_scores_by_the_clips_tokens() -> None:
    def case(size: str, given: int) -> Scores:
        config = preset(size).at_grid(SHAPE)
        layout = sequence_layout(config, given)
        positions = np.arange(config.seq_length, dtype=np.float32)[None]
        scores = Scores(positions, positions.astype(np.int32), positions, 64)
        return of_clips(scores, layout, SHAPE.num_tokens)

    base = case("tiny", 0)
    assert np.isnan(base.nll[0, 0]) and base.rank[0, 0] == -1
    assert base.nll[0, 1:].tolist() == list(range(23))  # token i is foreseen at position i - 1
    text = case("tiny-video2world", 0)
    assert text.nll[0].tolist() == list(range(24))  # <bov> foresees the first
    assert np.isnan(case("tiny", 1).nll[0, :8]).all()
    assert case("tiny-video2world", 1).nll[0, 8:].tolist() == list(range(8, 24))


def make_case(size: str, parallelism: groups.Parallelism, sequence_parallel: bool) -> Any:
    """A model with weights that say something, and four clips."""
    import dataclasses

    config = dataclasses.replace(preset(size), vocab_size=700, latent_shape=SHAPE)
    groups.initialize(parallelism)
    module = build_model(
        config,
        dtype=torch.float32,
        sequence_parallel=sequence_parallel,
        calculate_per_token_loss=True,
    )
    with torch.no_grad():
        module_weights = [p for n, p in module.named_parameters() if "output_layer" in n]
        for weight in module_weights:
            weight *= 5
    generator = torch.Generator().manual_seed(3)
    clips = torch.randint(0, 700, (4, SHAPE.num_tokens), generator=generator)
    context = None
    if config.is_video2world:
        width = config.context_dim
        context = torch.randn(4, config.context_len, width, generator=generator)
    return module, sequence_layout(config).batch(clips, torch.ones(4), context)


def score_and_train_loss(
    size: str, tensor: int, context: int, sequence_parallel: bool
) -> tuple[Scores, float, Batch]:
    """At the top level for ``run_distributed``."""
    sizes = groups.Parallelism(tensor=tensor, context=context)
    module, batch = make_case(size, sizes, sequence_parallel)
    scores = Scorer(module).score(batch)
    ddp = wrap(module)
    ddp.eval()
    with torch.no_grad():
        loss, _ = run_batches(ddp, [batch], forward_only=True)
    return scores, float(loss), batch


def check_equal(scores: Scores, loss: float, batch: Batch) -> None:
    mask = batch.loss_mask.numpy() > 0
    # Float32 sums in another order.
    assert float(scores.nll[mask].mean(dtype=np.float64)) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("size", ["tiny", "tiny-video2world"])
def test_loss_is_that_of_training(size: str) -> None:
    scores, loss, batch = score_and_train_loss(size, 1, 1, False)
    check_equal(scores, loss, batch)
    assert loss > 6.7  # of random labels, with logits that say something


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, *_ = score_and_train_loss("tiny", 1, 1, False)
    monkeypatch.setattr(token_scores, "_AT_ONCE", 5 * 700)
    parts, *_ = score_and_train_loss("tiny", 1, 1, False)
    np.testing.assert_allclose(parts.nll, whole.nll, atol=1e-5)
    assert (parts.rank == whole.rank).mean() > 0.99  # equal but for rounding


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        ("tiny", (2, 1, False)),
        ("tiny", (2, 1, True)),
        ("tiny", (1, 2, False)),
        ("tiny-video2world", (2, 1, True)),
    ],
    ids=["tp2", "tp2-sequence-parallel", "cp2", "video2world-tp2"],
)
def test_every_layout_scores_alike(size: str, layout: tuple[int, int, bool]) -> None:
    alone, loss, batch = score_and_train_loss(size, 1, 1, False)
    mask = batch.loss_mask.numpy() > 0
    for scores, their_loss, _ in run_distributed(score_and_train_loss, 2, size, *layout):
        check_equal(scores, their_loss, batch)
        assert their_loss == pytest.approx(loss, abs=1e-5)
        np.testing.assert_allclose(scores.nll[mask], alone.nll[mask], rtol=2e-6, atol=1e-5)
        np.testing.assert_allclose(scores.log_rest[mask], alone.log_rest[mask], atol=1e-4)
        assert (scores.rank == alone.rank)[mask].mean() > 0.95


def test_the_first_so_many_ranks_count() -> None:
    values = np.zeros(4, np.float32)
    scores = Scores(values, np.array([0, 1, 4, 5], np.int32), values, 10)
    assert scores.is_among(1).tolist() == [True, False, False, False]
    assert scores.is_among(5).tolist() == [True, True, True, False]


MEMORY = """
import resource
from types import SimpleNamespace
import torch
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.models.token_scores import score_hidden

groups.initialize(groups.Parallelism())
module = SimpleNamespace(
    model_config=SimpleNamespace(vocab_size=64000),
    config=SimpleNamespace(sequence_parallel=False),
    output_layer=SimpleNamespace(weight=torch.randn(64000, 16)),
)
hidden, labels = torch.randn(12800, 1, 16), torch.randint(64000, (1, 12800))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    score_hidden(module, hidden, labels)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_of_a_clip_of_full_size_is_bounded() -> None:
    """12,800 tokens by 64,000 codes would be 3.3 GB in float32, once."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 800_000  # kB; 420,000 here
