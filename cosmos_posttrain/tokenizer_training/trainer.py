"""The training loop of tokenizers: ``train -> _Trainer.fit -> _Trainer.step``.

Flows in: a :class:`TokenizerTrainConfig`. Flows out, in its ``output_dir``: ``config.json`` and
``model.safetensors`` (the EMA weights, what ``load_tokenizer`` reads), ``metrics.jsonl``,
``tb_logs/``, ``reconstructions/``, the resolved ``train.yaml``, and ``checkpoint.pt`` to continue
from. A killed run started again with the same command continues and ends with the same weights.

    clips --Autoencoder--> latents, reconstruction --Objective, Adversary--> loss --> weights, EMA

Under torchrun each process takes its share of the same batch, so losses are those of one process
up to rounding; rank 0 alone validates, writes and prints.
"""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_posttrain import files, launch
from cosmos_posttrain.errors import CheckpointError, NonFiniteLossError, StoppedError
from cosmos_posttrain.runlog import METRICS_FILE, read_rows, wants_wandb
from cosmos_posttrain.tokenizer_training import run_folder
from cosmos_posttrain.tokenizer_training.adversarial import Adversary
from cosmos_posttrain.tokenizer_training.config import (
    TokenizerTrainConfig,
    batch_shape,
    validate,
)
from cosmos_posttrain.tokenizer_training.data import ClipSource
from cosmos_posttrain.tokenizer_training.losses import psnr
from cosmos_posttrain.tokenizer_training.model_step import (
    Autoencoder,
    clip_gradients,
    last_layer,
    latent_shape,
    learning_rate,
    parameter_groups,
    recenter_latents,
    update_average,
)
from cosmos_posttrain.tokenizer_training.objective import Objective
from cosmos_posttrain.tokenizer_training.parallel import DataParallelRanks
from cosmos_posttrain.tokenizer_training.run_log import TokenizerRunLog
from cosmos_posttrain.tokenizer_training.start import (
    build_network,
    check_crops,
    check_material,
    load_start,
    seeded_generator,
    start_from_data,
)
from cosmos_posttrain.tokenizer_training.validation import measure


def train(config: TokenizerTrainConfig) -> dict[str, float]:
    """Trains a tokenizer from the config, or continues a run that was interrupted.

    Nothing is written before everything that can be refused has been checked.

    Returns:
        The last validation's metrics; empty on other ranks than the first.

    Raises:
        UserError: if the config, the data or a weights file does not fit.
        OutputFolderError: if ``output_dir`` holds something else, or another run, or is being
            written by another process.
        NonFiniteLossError: if a loss, gradient or weight becomes NaN or infinite.
        StoppedError: if a signal ended the run, after it was saved.
        SaveError: if it cannot be saved.
    """
    ranks = DataParallelRanks.from_environment()
    validate(config, ranks.size)
    wants_wandb()
    torch.set_num_threads(config.num_threads)
    output = Path(config.output_dir)
    files.check_writable(output, "--output_dir")
    with contextlib.ExitStack() as stack:
        if ranks.is_first:
            stack.enter_context(files.locked(output))
            run_folder.check(output, config)
        trainer = _Trainer(config, ranks)
        ranks.start(trainer.device)
        trainer.resume(output)
        if ranks.is_first:
            run_folder.start(output, config)
        trainer.distribute()
        metrics = trainer.fit(output)
        ranks.stop()
    if trainer.stop_reason is not None:
        raise StoppedError(
            f"stopped by {trainer.stop_reason} after {trainer.completed_steps} of "
            f"{config.max_steps} steps, saved in {output}; the same command goes on."
        )
    return metrics


class _Trainer:
    """Network, EMA copy, optimizers and the data, with one method per phase."""

    def __init__(self, config: TokenizerTrainConfig, ranks: DataParallelRanks) -> None:
        self.config, self.ranks = config, ranks
        self.device = launch.device(config.device)
        network_config, weights = load_start(config)
        check_crops(config.data, network_config)
        self.objective = Objective(config.loss, self.device, config.precision, ranks)
        self.clips = ClipSource(config.data)
        check_material(self.clips, config.data)
        self.validation = self.clips.validation_clips(config.num_validation_clips)
        self.network = build_network(network_config, weights, config.seed).to(self.device)
        if weights is None:
            start_from_data(self.network, self.clips, config, self.device)
        self.model: nn.Module = Autoencoder(self.network, config.precision)
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.network),
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
        )
        self.adversary: Adversary | None = None
        if config.adversarial.weight > 0:
            seed = config.seed + 1
            self.adversary = Adversary(
                config.adversarial, seed, self.device, config.precision, ranks
            )
        self.completed_steps = 0
        self.stop_reason: str | None = None
        self.row: dict[str, Any] = {}

    def distribute(self) -> None:
        """Compiles and data-parallelises the networks; the process group must exist."""
        if self.config.compile:
            if self.adversary is not None:
                # The adaptive weight goes through the compiled backward graph more than once.
                import torch._functorch.config

                torch._functorch.config.donated_buffer = False
            # Batches have few shapes; inductor (torch 2.13) fails on symbolic ones here.
            self.model.compile(dynamic=False)
        self.model = self.ranks.wrap(self.model, self.device)
        if self.adversary is not None:
            self.adversary.distribute(self.device)

    def _batch(self, step: int) -> Tensor:
        """This process's share of the step's clips.

        Every process draws the whole batch, which the clips' random numbers come from in turn.
        """
        shape = batch_shape(self.config, step)
        generator = seeded_generator(self.config.seed, step)
        crop = (shape.height, shape.width)
        clips = self.clips.batch(shape.size, shape.num_frames, crop, generator)
        return self.ranks.share(clips).to(self.device)

    def _noise(self, step: int, video: Tensor) -> Tensor | None:
        """In the first ``noise_steps``, noise of a rounding's width stands for the rounding."""
        if step >= self.config.noise_steps:
            return None
        whole = (len(video) * self.ranks.size, *video.shape[1:])
        generator = seeded_generator(self.config.seed, step + 500_000_000)
        noise = torch.rand(latent_shape(self.network, whole), generator=generator)
        return self.ranks.share(noise).to(self.device)

    def step(self) -> dict[str, Any]:
        """One optimizer step of the tokenizer, and of the discriminator where it takes part.

        Raises:
            NonFiniteLossError: before the weights are touched.
        """
        step = self.completed_steps
        video = self._batch(step)
        latents, reconstruction = self.model(video, self._noise(step, video))
        losses = self.objective(latents, reconstruction, video, self.network.quantizer)
        loss, terms = losses.total, losses.terms
        discriminator_loss: Tensor | None = None
        if self.adversary is not None and step >= self.config.adversarial.start_step:
            term, adaptive = self.adversary.generator_term(
                reconstruction, losses.reconstruction, last_layer(self.network)
            )
            loss = loss + term
            discriminator_loss = self.adversary.loss(reconstruction, video)
            terms |= {"adversarial": term, "discriminator": discriminator_loss}
            terms |= {"adaptive_weight": adaptive}
        row = self._means(step, {"loss": loss, "psnr": psnr(reconstruction.detach(), video).mean()})
        details = self._means(step, {f"loss_{name}": value for name, value in terms.items()})
        row["grad_norm"] = self._backward(step, loss, discriminator_loss)
        row["lr"] = self._update(step, discriminator_loss is not None)
        row["codes_used"] = self._settle(self.ranks.gather(latents), step)
        self.completed_steps += 1
        return {"step": step, **row, **details}

    def _means(self, step: int, values: dict[str, Tensor]) -> dict[str, float]:
        """Means over the processes, all of them finite.

        Raises:
            NonFiniteLossError: on every process at once.
        """
        means = {name: self.ranks.mean(value).item() for name, value in values.items()}
        for name, value in means.items():
            self._check_finite(step, name, value)
        return means

    def _check_finite(self, step: int, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the {name} is {value} at step {step}; nothing was updated or saved. Give the "
                "same command with a lower --lr to go on from the last save."
            )

    def _backward(self, step: int, loss: Tensor, discriminator_loss: Tensor | None) -> float:
        """Gradients of both networks; returns the tokenizer's norm before clipping.

        They are averages over the processes, so their norms are equal in all of them.

        Raises:
            NonFiniteLossError: on every process at once.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = self.config.optimizer.clip_grad
        norm = clip_gradients(self.network.parameters(), limit).item()
        self._check_finite(step, "norm of the gradient", norm)
        if self.adversary is not None and discriminator_loss is not None:
            other = self.adversary.backward(discriminator_loss).item()
            self._check_finite(step, "norm of the discriminator's gradient", other)
        return norm

    def _update(self, step: int, with_discriminator: bool) -> float:
        """One step of the optimizers; returns the learning rate."""
        lr = learning_rate(self.config.optimizer, step, self.config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        if self.adversary is not None and with_discriminator:
            self.adversary.step()
        return lr

    @torch.no_grad()
    def _settle(self, latents: Tensor, step: int) -> int:
        """What follows the optimizer, given the whole batch's latents (B, t, h, w, D).

        Returns:
            The number of different codes in the batch.
        """
        config = self.config
        if step < config.recenter_steps:
            recenter_latents(self.network, latents, config.recenter_rate, config.latent_std)
        update_average(self.ema, self.network, config.optimizer.ema_decay, step)
        quantizer = self.network.quantizer
        return quantizer.codes_to_indices(quantizer.quantize(latents)).unique().numel()

    def validate(self, log: TokenizerRunLog | None = None) -> dict[str, float]:
        """Quality of the EMA weights; ``log`` gets a picture of the first clip."""
        metrics, decoded = measure(self.ema, self.validation, self.device)
        if log is not None:
            log.write_picture(self.validation[0], decoded, self.completed_steps)
        return metrics

    def fit(self, output: Path) -> dict[str, float]:
        """Runs to ``max_steps``, saving, validating and logging on the way; see :func:`train`."""
        is_logged = self._is_logged(output)
        if self.is_complete and is_logged:
            return self.validate() if self.ranks.is_first else {}
        metrics: dict[str, float] = {}
        with contextlib.ExitStack() as stack:
            log = TokenizerRunLog(self.config, output, self.completed_steps)
            stack.callback(log.close)
            signals = launch.StopSignal()
            stack.callback(signals.close)
            if not is_logged:
                metrics = self._report(log)  # the run was killed between saving and logging
            while not self.is_complete and self.stop_reason is None:
                self.row = self.step()
                is_asked = self.ranks.any(signals.requested is not None, self.device)
                if is_asked and not self.is_complete:
                    self.stop_reason = signals.requested or "a signal to another process"
                if self._is_due(self.config.save_every) or self.stop_reason is not None:
                    self.save(output)
                metrics = self._report(log) or metrics
        self.ranks.barrier()
        return metrics

    @property
    def is_complete(self) -> bool:
        """True after the last step."""
        return self.completed_steps >= self.config.max_steps

    def _is_due(self, every: int) -> bool:
        return self.completed_steps % every == 0 or self.is_complete

    def _is_logged(self, output: Path) -> bool:
        """Whether the last step has its row; the first process alone needs to know."""
        if not self.row or not self.ranks.is_first:
            return True
        path = output / METRICS_FILE
        rows = read_rows(path) if path.is_file() else []
        return any(row["step"] == self.row["step"] for row in rows)

    def _report(self, log: TokenizerRunLog) -> dict[str, float]:
        """Validates where it is time, and logs the step; on the first process only.

        Who asks a run to end does not wait for a validation.
        """
        if not self.ranks.is_first:
            return {}
        due = self._is_due(self.config.validate_every) and self.stop_reason is None
        metrics = self.validate(log) if due else {}
        log.write(self.row | metrics)
        return metrics

    def save(self, output: Path) -> None:
        """Writes the shipped weights and the checkpoint.

        Raises:
            NonFiniteLossError: on every process at once; nothing was written.
            SaveError: on the first process, if they cannot be written.
        """
        state: dict[str, Any] = {
            "completed_steps": self.completed_steps,
            "row": self.row,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.adversary is not None:
            state["adversary"] = self.adversary.state_dict()
        if self.ranks.any(not run_folder.is_finite(state), self.device):
            raise NonFiniteLossError(
                f"a weight is not finite after step {self.completed_steps - 1}; it was not saved. "
                "Give the same command with a lower --lr to go on from the last save."
            )
        if self.ranks.is_first:
            run_folder.save(output, state, self.ema, getattr(torch, self.config.dtype))

    def resume(self, output: Path) -> None:
        """Continues from a checkpoint, if there is one.

        Raises:
            CheckpointError: if it is damaged, or the processes see different ones.
        """
        state = run_folder.load(output, self.device)
        if state:
            try:
                self.network.load_state_dict(state["network"])
                self.ema.load_state_dict(state["ema"])
                self.optimizer.load_state_dict(state["optimizer"])
                if self.adversary is not None:
                    self.adversary.load_state_dict(state["adversary"])
                self.completed_steps, self.row = state["completed_steps"], state.get("row", {})
            except (RuntimeError, ValueError, KeyError) as error:
                raise run_folder.damaged(output / run_folder.CHECKPOINT, error) from error
        seen = self.ranks.gather(torch.tensor([self.completed_steps], device=self.device))
        if len(seen.unique()) > 1:
            raise CheckpointError(
                f"the processes see different saves in {output} (steps {seen.tolist()}); it must "
                "be one folder for all machines."
            )
        if state:
            said = "is complete already; nothing to do" if self.is_complete else "continues"
            launch.say(f"{output} {said} after step {self.completed_steps}.")
