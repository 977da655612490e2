"""``evaluate.py onex``: a model on windows of the 1X World Model Challenge, v2.0.

Flows in: a set of windows and a model. Flows out, in the output folder: ``metrics.json`` with the
figures of ``parts.py``, each by itself, and the submission where it is asked for.

    set -> windows (or pairs) of one segment, evenly spread -> scores -> a row each -> figures

A killed evaluation is continued by the same command. Data-parallel ranks take items side by side;
rank 0 writes.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cosmos_posttrain import files, launch
from cosmos_posttrain.checkpoint.dist import quiet_megatron_logging
from cosmos_posttrain.checkpoint.source import CheckpointSource, open_source
from cosmos_posttrain.data.serial import to_plain
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import (
    CheckpointError,
    CosmosPosttrainError,
    DatasetError,
    TokenizerError,
    UserError,
)
from cosmos_posttrain.evaluation.config.onex import OnexEvalConfig, validate
from cosmos_posttrain.evaluation.environment import environment
from cosmos_posttrain.evaluation.intervals import resampled_means
from cosmos_posttrain.evaluation.onex.parts import Part, PartModel, batches
from cosmos_posttrain.evaluation.onex.submission import FOLDER, Submission
from cosmos_posttrain.evaluation.result_folder import ResultFolder, check_foreign, result
from cosmos_posttrain.evaluation.tally import COLUMNS, Tally, figures
from cosmos_posttrain.geometry import Compression
from cosmos_posttrain.inference.opening import look_up
from cosmos_posttrain.models.token_scores import NUM_TOP
from cosmos_posttrain.prepare.onex.windows import OnexWindows, open_windows
from cosmos_posttrain.runlog import ProgressDisplay

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class WindowSet:
    """One part and the windows that its items begin with."""

    part: Part
    starts: NDArray[np.int64]


def run(config: OnexEvalConfig) -> dict[str, Any]:
    """Evaluates a model, or continues an evaluation, or finds it complete.

    Returns:
        What ``metrics.json`` holds, on every rank.

    Raises:
        UserError: bad settings or input; nothing was written.
        SaveError: the disk is full.
    """
    validate(config)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    quiet_megatron_logging()
    windows = open_windows(config.input_tokens_dir, config.test_set)
    jobs = _jobs(config, windows)
    source = _open_model(config, windows)
    tensor_size = config.tensor_model_parallel_size or launch.world_size()
    source.config.check_tensor_parallel(tensor_size)
    groups.initialize(groups.Parallelism(tensor=tensor_size))
    evaluation = OnexEvaluation(config, windows, jobs, source, tensor_size)
    with ExitStack() as stack:
        return evaluation.run(stack)


def _jobs(config: OnexEvalConfig, windows: OnexWindows) -> list[WindowSet]:
    """What is measured where.

    Raises:
        DatasetError: no window, or no pair of windows, lies in one segment.
    """
    jobs = []
    for name in config.chosen_parts:
        part = Part.of(name, windows.latent_shape)
        starts = windows.starts(1 if config.test_set else part.num_windows)
        if not len(starts):
            what = "window" if part.num_windows == 1 else f"{part.num_windows} windows in a row"
            raise DatasetError(
                f"{config.input_tokens_dir} has no {what} of one segment, which {name} needs; give "
                "a longer set, or leave it out of --parts."
            )
        limit = config.max_rollouts if part.is_rollout else config.max_windows
        if config.test_set:
            limit = config.max_windows  # a submission is of all
        if limit is not None and limit < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, limit).round().astype(np.int64)]
        jobs.append(WindowSet(part, starts))
    return jobs


def _open_model(config: OnexEvalConfig, windows: OnexWindows) -> CheckpointSource:
    """The model, whose weights are not read yet.

    Raises:
        CheckpointError: there is no model, or it needs a text.
        TokenizerError: it was trained on another tokenizer's tokens.
    """
    source = open_source(look_up(config.ar_model_dir, config.checkpoint_dir))
    name, ours = config.ar_model_dir, windows.tokenizer
    if source.config.is_video2world:
        raise CheckpointError(
            f"{name} is a Video2World model, which needs a text, and 1X's windows have none; give "
            "a base model."
        )
    if source.is_fresh:
        source = source.at_grid(None, vocab_size=ours.vocab_size)
    if source.config.vocab_size != ours.vocab_size:
        raise TokenizerError(
            f"{name} predicts {source.config.vocab_size} tokens, but {config.input_tokens_dir} has "
            f"the {ours.vocab_size} of {ours.id}; post-train it on such tokens first."
        )
    known = None if source.contract is None else source.contract.tokenizer
    if known is None:
        if not source.is_fresh:
            launch.say(f"note: {name} does not say which tokenizer's tokens it was trained on")
        return source
    is_other = "" not in (known.sha256, ours.sha256) and known.sha256 != ours.sha256
    is_other |= tuple(known.compression) != tuple(ours.compression)
    is_other |= tuple(known.levels) != tuple(ours.levels)
    if is_other and not config.allow_tokenizer_mismatch:
        raise TokenizerError(
            f"{name} was trained on tokens of {known.id} ({Compression(*known.compression).name}), "
            f"but {config.input_tokens_dir} holds tokens of {ours.id} "
            f"({Compression(*ours.compression).name}); post-train it on them first, or measure "
            "anyway with --allow_tokenizer_mismatch."
        )
    return source


class OnexEvaluation:
    """One evaluation on all ranks.

    Args:
        config: the settings.
        windows: the set.
        jobs: what is measured where.
        source: the model.
        tensor_size: processes that share it.
    """

    def __init__(
        self,
        config: OnexEvalConfig,
        windows: OnexWindows,
        jobs: list[WindowSet],
        source: CheckpointSource,
        tensor_size: int,
    ) -> None:
        self._config, self._windows, self._jobs = config, windows, jobs
        self._source = source
        sums = {} if config.test_set else {job.part.name: _no_places(job.part) for job in jobs}
        self._folder = ResultFolder(config.output, self._settings(), [FOLDER], sums)
        self._model = PartModel(source, config, tensor_size)

    def run(self, stack: ExitStack) -> dict[str, Any]:
        """Everything; ``stack`` holds the lock of the output folder."""
        complete = groups.decide(lambda: self._start(stack))
        if complete is not None:
            launch.say(f"{self._config.output} is complete already; nothing to do.")
            self._report(complete)
            return complete
        try:
            for job in self._jobs:
                self._measure(job)
        except UserError:
            if launch.is_rank_zero():
                self._folder.abandon()
            raise
        metrics: dict[str, Any] = groups.decide(self._finish)
        self._report(metrics)
        return metrics

    def _start(self, stack: ExitStack) -> dict[str, Any] | None:
        config = self._config
        files.check_writable(config.output)
        stack.enter_context(files.locked(config.output))
        check_foreign(config.output, [FOLDER], config.overwrite)
        return self._folder.start(config.overwrite)

    def _settings(self) -> dict[str, Any]:
        """All that decides the figures; a folder with others is another evaluation."""
        config, source = self._config, self._source
        path = source.path
        sizes = [(str(file.name), file.stat().st_size) for file in source.files()]
        return {
            "command": "onex",
            "windows": self._windows.fingerprint,
            "tokenizer": to_plain(self._windows.tokenizer),
            "checkpoint": str(path.resolve()) if path else config.ar_model_dir,
            "checkpoint_files": files.sha256_of_json(sizes),
            "model": source.config.to_json(),
            "parts": {job.part.name: len(job.starts) for job in self._jobs},
            "latent_shape": list(self._windows.latent_shape),
            "test_set": config.test_set,
            "submission": config.submits,
            "rope_scaling": config.rope_scaling,
            "rope_scale": config.rope_scale,
            "layer_spec": config.layer_spec,
            "dtype": config.dtype,
            "device": launch.device().type,
        }

    # Measuring.

    def _measure(self, job: WindowSet) -> None:
        """Adds a row for every item of a part that has none yet."""
        part, submits = job.part, job.part.is_rollout and self._config.submits
        num_done: int = groups.decide(lambda: len(self._rows(part)))
        submission: Submission | None = None
        if submits and launch.is_rank_zero():
            submission = self._submission(job, num_done > 0)
        label = part.name.replace("_", " ")
        progress = ProgressDisplay(len(job.starts), "windows", label, done=num_done)
        rank, num_ranks = groups.data_parallel_place()
        todo = job.starts[num_done:].tolist()
        for everyone, own in batches(todo, self._config.batch_size, rank, num_ranks):
            tokens = np.stack([self._tokens(part, window) for window in own])
            scores, most_likely = self._model.measure(part, tokens, submits)
            if not np.isfinite(scores.nll[:, part.num_given :]).all():
                raise CosmosPosttrainError(
                    f"the model's loss is not finite on windows {everyone[0]} to {everyone[-1]} of "
                    f"{self._config.input_tokens_dir}; look at its weights."
                )
            if submission is not None and most_likely is not None:
                for item in range(len(everyone)):
                    submission.write(num_done + item, most_likely, item)
                submission.flush()
            if launch.is_rank_zero():
                for item, window in enumerate(everyone):
                    self._append(part, window, scores.at(slice(item, item + 1)))
                    progress.advance("")
            num_done += len(everyone)
        if submission is not None:
            submission.finish(job.starts.tolist(), self._settings())

    def _tokens(self, part: Part, window: int) -> NDArray[np.int64]:
        """An item's tokens; of a test set only what is given."""
        count = 1 if self._config.test_set else part.num_windows
        return np.concatenate([self._windows.tokens(window + n) for n in range(count)])

    def _submission(self, job: WindowSet, is_begun: bool) -> Submission:
        vocab_size = self._windows.tokenizer.vocab_size
        num_top = min(NUM_TOP, vocab_size)
        return Submission(
            self._config.output, job.part, len(job.starts), vocab_size, num_top, is_begun
        )

    def _rows(self, part: Part) -> list[dict[str, Any]]:
        return [row for row in self._folder.rows if row["part"] == part.name]

    def _append(self, part: Part, window: int, scores: Any) -> None:
        """One item's row: means over its predicted tokens."""
        row: dict[str, Any] = {"part": part.name, "window": window}
        row["source"] = self._windows.source(window)
        if self._config.test_set:
            self._folder.append(row)
            return
        tally = Tally.empty(1, part.shape.num_tokens)
        tally.add(scores, np.ones(1, bool))
        means = (tally.clips[0] / part.num_predicted).tolist()
        row |= dict(zip(COLUMNS, means, strict=True))
        self._folder.append(row, {part.name: tally.places})

    # The end.

    def _finish(self) -> dict[str, Any]:
        """Writes ``metrics.json``."""
        found = {}
        if not self._config.test_set:
            found = {job.part.name: self._figures(job.part) for job in self._jobs}
        device = launch.device()
        metrics = result(
            "onex",
            self._folder.settings,
            found,
            self._folder.rows,
            [],
            environment(device, self._config.dtype),
            self._folder.seconds,
        )
        self._folder.finish(metrics)
        return metrics

    def _figures(self, part: Part) -> dict[str, Any]:
        rows = self._rows(part)
        clips = np.array([[row[name] for name in COLUMNS] for row in rows]) * part.num_predicted
        tally = Tally(clips, self._folder.sums[part.name], len(rows))
        segments = self._windows.segments[[row["window"] for row in rows]]
        means = resampled_means(clips, segments)
        return {
            "num_windows": len(rows),
            "num_tokens": len(rows) * part.num_predicted,
            "decoding": "greedy rollout" if part.is_rollout else "teacher-forced",
            "num_given_tokens": part.num_given,
            "latent_shape": list(part.shape),
            **figures(tally, part.shape, part.num_given, means),
        }

    def _report(self, metrics: dict[str, Any]) -> None:
        name = f"top_{NUM_TOP}_cross_entropy"
        for part, found in metrics["figures"].items():
            launch.say(
                f"{part} ({found['decoding']}, {found['num_windows']} windows): "
                f"{found['nats_per_token']:.4f} nats a token, top-{NUM_TOP} cross-entropy "
                f"{found[name]:.4f}, top-1 {found['top_1']:.2%}"
            )
        if self._config.submits:
            launch.say(f"submission: {self._config.output / FOLDER}")
        launch.say(f"results: {self._config.output}")


def _no_places(part: Part) -> NDArray[np.float64]:
    return np.zeros((2, part.shape.num_tokens))
