"""How well a model foresees held-out clips, beside what can be foreseen without one.

Flows in: a model on any layout and one split of a data set. Flows out: ``metrics.json``.

    clips --batch, forward--> Scores (B, T * H * W) --Tally--> nats, bits, ranks; by frame and place
    training split --count, fit--> baselines --the same clips--> the same figures
    both --bootstrap by source video--> confidence intervals, paired
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cosmos_posttrain import files, launch
from cosmos_posttrain.checkpoint.dist import quiet_megatron_logging
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import CosmosPosttrainError, PartialFailureError
from cosmos_posttrain.evaluation import baselines, tally, training_counts
from cosmos_posttrain.evaluation.config.loss import LossEvalConfig, validate
from cosmos_posttrain.evaluation.environment import environment
from cosmos_posttrain.evaluation.intervals import LEVEL, NUM_RESAMPLES, interval, resampled_means
from cosmos_posttrain.evaluation.loss_inputs import LossInputs, open_inputs, read_clips
from cosmos_posttrain.evaluation.result_folder import result
from cosmos_posttrain.evaluation.score_file import ScoreFile, partial_file
from cosmos_posttrain.evaluation.scoring import Scorer, Scores, of_clips
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.training.scores import gather_clips

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MODEL = "model"
_BASELINES = ("uniform", "unigram", "previous_frame", "bigram")
_MAX_ROWS = 1000  # clips and failures that are listed one by one


def run(config: LossEvalConfig) -> dict[str, Any]:
    """Evaluates a model, or continues an evaluation, or finds it complete; all ranks together.

    Returns:
        What ``metrics.json`` holds; nothing on other ranks than 0.

    Raises:
        UserError: bad settings or input; nothing was written.
        PartialFailureError: more than ``max_failures`` clips could not be read; the others are
            evaluated and written.
    """
    validate(config)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    quiet_megatron_logging()
    inputs = open_inputs(config)
    groups.start()
    with contextlib.ExitStack() as closing:
        file, metrics = None, None
        if launch.is_rank_zero():
            file = _file(config, inputs)

        def start() -> tuple[bool, int]:
            nonlocal metrics
            assert file is not None
            metrics = _start(config, file, closing)
            return metrics is not None, file.tallies[_MODEL].num_done

        is_complete, num_done = groups.decide(start)
        if is_complete:
            launch.say(f"{config.metrics_file} is complete already; nothing to do.")
        else:
            _announce(config, inputs)
            if num_done < len(inputs.numbers):
                _score_model(config, inputs, file, num_done)
            if file is not None:  # the others are not needed any more
                metrics = _finish(config, inputs, file)
        return _report(metrics, config) if metrics is not None else {}


def _file(config: LossEvalConfig, inputs: LossInputs) -> ScoreFile:
    return ScoreFile(
        config.metrics_file,
        inputs.settings(config),
        (_MODEL, *_BASELINES),
        len(inputs.numbers),
        inputs.clips.latent_shape.num_tokens,
    )


def _start(
    config: LossEvalConfig, file: ScoreFile, closing: contextlib.ExitStack
) -> dict[str, Any] | None:
    """Holds the file against other writers and takes up what is done."""
    folder, names = file.path.parent, [file.path.name, partial_file(file.path).name]
    files.check_writable(folder, "the folder of --output")
    closing.enter_context(files.locked(folder, file.path, only=names))
    return file.start(config.overwrite)


def _announce(config: LossEvalConfig, inputs: LossInputs) -> None:
    clips, sizes = inputs.clips, inputs.parallelism
    count = f"{len(inputs.numbers)} of {len(clips)}" if config.max_clips else f"{len(clips)}"
    launch.say(
        f"{count} clips of the {config.split} split (--split_string {inputs.split.split_string}, "
        f"--seed {inputs.split.seed}), {clips.seq_length} tokens {tuple(clips.latent_shape)} each; "
        f"TP {sizes.tensor} PP {sizes.pipeline} CP {sizes.context}"
    )
    for note in inputs.notes:
        launch.say(f"note: {note}.")


# The model.


def _score_model(
    config: LossEvalConfig, inputs: LossInputs, file: ScoreFile | None, num_done: int
) -> None:
    """Scores all clips that are not done, in order; ``file`` is rank 0's."""
    scorer = Scorer(inputs.build(config))
    rank, num_ranks = groups.data_parallel_place()
    micro, numbers = config.micro_batch_size, inputs.numbers
    if num_done:
        launch.say(f"continuing {config.metrics_file}: {num_done} clips are done.")
    progress = ProgressDisplay(len(numbers), "clips", _MODEL, done=num_done)
    for first in range(num_done, len(numbers), micro * num_ranks):
        # A last batch that is not full repeats a clip, so that all ranks do the same.
        wanted = [first + rank * micro + row for row in range(micro)]
        own = [numbers[min(number, len(numbers) - 1)] for number in wanted]
        scores, is_read = _score_clips(scorer, inputs, own)
        size = min(micro * num_ranks, len(numbers) - first)
        scores, is_read = scores.at(slice(size)), is_read[:size]
        if not np.isfinite(scores.nll[is_read][:, inputs.num_given :]).all():
            raise CosmosPosttrainError(
                f"the model's loss is not finite on clips {numbers[first]} to "
                f"{numbers[first + size - 1]} of the {config.split} split; look at its weights."
            )
        if file is not None:
            file.tallies[_MODEL].add(scores, is_read)
            file.save()
        progress.show(first + size)
    if file is not None:
        file.save(force=True)


def _score_clips(
    scorer: Scorer, inputs: LossInputs, numbers: list[int]
) -> tuple[Scores, NDArray[np.bool_]]:
    """Scores of this rank's clips and those of the other data-parallel ranks, (clips, N)."""
    clips, errors = read_clips(inputs.clips, numbers)
    tokens = torch.stack([clip for clip, _ in clips])
    texts = [text for _, text in clips if text is not None]
    context = torch.stack(texts) if texts else None
    is_read = np.array([error is None for error in errors])
    weights = torch.from_numpy(is_read.astype(np.float32))
    batch = inputs.layout.batch(tokens, weights, context)
    scores = of_clips(scorer.score(batch), inputs.layout, inputs.clips.seq_length)
    return scorer.gather(scores), gather_clips(is_read.astype(np.uint8)).astype(bool)


# The baselines, on rank 0 alone, and the results.


def _score_baselines(config: LossEvalConfig, inputs: LossInputs, file: ScoreFile) -> dict[str, Any]:
    """Fits the baselines and scores the clips that are not done; what was fitted on what."""
    first, second, num_failures = training_counts.count_split(
        inputs.clips.other_split("train"), config.max_train_clips, config.max_pairs
    )
    fitted = baselines.fit(first, second)
    num_frames, is_read = inputs.clips.latent_shape.time, file.tallies[_MODEL].is_read
    num_done = file.tallies[_BASELINES[0]].num_done
    progress = ProgressDisplay(len(inputs.numbers), "clips", "baselines", done=num_done)
    for number in range(num_done, len(inputs.numbers)):
        clip = np.zeros(inputs.clips.seq_length, np.int64)
        if is_read[number]:
            clip = inputs.clips[inputs.numbers[number]].numpy()
        for name, baseline in fitted.items():
            scores = baseline.score(clip, num_frames)
            scores.rank[: inputs.num_given] = -1
            file.tallies[name].add(scores.at(None), is_read[number : number + 1])
        file.save()
        progress.advance()
    file.save(force=True)
    return {
        "num_training_clips": first.num_clips + second.num_clips,
        "num_training_failures": num_failures,
        "num_pairs": len(first.keys) + len(second.keys),
        "dropped_share": max(first.dropped_share, second.dropped_share),
        "fitted": {name: baseline.settings for name, baseline in fitted.items()},
    }


def _finish(config: LossEvalConfig, inputs: LossInputs, file: ScoreFile) -> dict[str, Any]:
    """Scores the baselines and writes the metrics."""
    is_read = file.tallies[_MODEL].is_read
    failed = [inputs.numbers[i] for i in np.flatnonzero(~is_read)]
    reasons = read_clips(inputs.clips, failed[:_MAX_ROWS])[1]
    failures = [
        {"clip": number, "error": error or "could not be read"}
        for number, error in zip(failed, reasons, strict=False)
    ]
    if not is_read.any():
        raise PartialFailureError(f"none of the clips could be read: {failures[0]['error']}")
    described = _score_baselines(config, inputs, file)
    found = {
        "num_clips": int(is_read.sum()),
        "num_failures": len(failed),
        "num_predicted_tokens": int(is_read.sum()) * (inputs.clips.seq_length - inputs.num_given),
        **_figures(inputs, file),
        "baseline_settings": described,
    }
    used = environment(launch.device(), config.dtype) | {
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "context_parallel_size": config.context_parallel_size,
        "sequence_parallel": config.sequence_parallel,
        "micro_batch_size": config.micro_batch_size,
    }
    rows = _rows(inputs, file.tallies[_MODEL])
    metrics = result("loss", file.settings, found, rows, failures, used, file.seconds)
    metrics["notes"] = list(inputs.notes)
    file.finish(metrics)
    return metrics


def _figures(inputs: LossInputs, file: ScoreFile) -> dict[str, Any]:
    """Those of the model, and those of the baselines beside it."""
    shape, given = inputs.clips.latent_shape, inputs.num_given
    is_read = file.tallies[_MODEL].is_read
    sources = inputs.clips.source_numbers()[inputs.numbers][is_read]
    sums = np.hstack([item.clips[is_read] for item in file.tallies.values()])
    means, width = resampled_means(sums, sources), len(tally.COLUMNS)
    parts: list[NDArray[np.float64] | None] = [None] * len(file.tallies)
    if means is not None:
        parts = [means[:, i * width : (i + 1) * width] for i in range(len(parts))]
    found = {
        name: tally.figures(item, shape, given, part)
        for (name, item), part in zip(file.tallies.items(), parts, strict=True)
    }
    model = found.pop(_MODEL)
    for figures, part in zip(found.values(), parts[1:], strict=True):
        figures["nats_above_model"] = figures["nats_per_token"] - model["nats_per_token"]
        figures["nats_above_model_ci95"] = None
        if part is not None and parts[0] is not None:
            difference = (part[:, 0] - parts[0][:, 0]) / (shape.num_tokens - given)
            figures["nats_above_model_ci95"] = interval(difference)
    intervals = {
        "level": LEVEL,
        "num_resamples": NUM_RESAMPLES,
        "num_sources": len(np.unique(sources)),
    }
    return {**model, "intervals": intervals, "baselines": found}


def _rows(inputs: LossInputs, scored: tally.Tally) -> list[dict[str, Any]]:
    """The clips that were foreseen worst, and where they come from."""
    means = scored.clips / (inputs.clips.seq_length - inputs.num_given)
    worst = np.argsort(-np.nan_to_num(means[:, 0], nan=-1), kind="stable")[:_MAX_ROWS]
    rows = []
    for item in worst[scored.is_read[worst]]:
        number = inputs.numbers[item]
        row = inputs.clips.row(number)
        figures = dict(zip(tally.COLUMNS, means[item].tolist(), strict=True))
        rows.append(
            {"clip": number, "source": row.source, "first_frame": row.first_frame, **figures}
        )
    return rows


def _report(metrics: dict[str, Any], config: LossEvalConfig) -> dict[str, Any]:
    """Says what came out, and raises if too many clips failed."""
    found = metrics["figures"]
    lines = [f"{'':<15}{'nats/token':>10}  {'95% interval':<17}{'bits':>7}{'top-1':>8}{'top-5':>8}"]
    for name, row in {_MODEL: found, **found["baselines"]}.items():
        ends = row["ci95"]["nats_per_token"] if row["ci95"] else None
        between = f"[{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "-"
        lines.append(
            f"{name:<15}{row['nats_per_token']:>10.4f}  {between:<17}{row['bits_per_token']:>7.3f}"
            f"{row['top_1']:>8.2%}{row['top_5']:>8.2%}"
        )
    lines.append(
        f"{found['num_clips']} clips of {found['intervals']['num_sources']} videos, perplexity "
        f"{found['perplexity']:,.2f}: {config.metrics_file}"
    )
    launch.say("\n".join(lines))
    if found["num_failures"] > config.max_failures:
        raise PartialFailureError(
            f"{found['num_failures']} clips could not be read, and max_failures is "
            f"{config.max_failures}; the others are evaluated in {config.metrics_file}, which "
            f"names them; the first: {metrics['failures'][0]['error']}"
        )
    return metrics
