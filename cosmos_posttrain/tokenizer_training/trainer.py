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
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_posttrain import config as config_module
from cosmos_posttrain import files, launch
from cosmos_posttrain.errors import CheckpointError, NonFiniteLossError, OutputFolderError
from cosmos_posttrain.runlog import wants_wandb
from cosmos_posttrain.tokenizer.weights_io import write_native
from cosmos_posttrain.tokenizer_training.adversarial import Adversary
from cosmos_posttrain.tokenizer_training.config import (
    TokenizerTrainConfig,
    batch_shape,
    validate,
)
from cosmos_posttrain.tokenizer_training.data import ClipSource
from cosmos_posttrain.tokenizer_training.losses import psnr, ssim
from cosmos_posttrain.tokenizer_training.model_step import (
    Autoencoder,
    last_layer,
    latent_shape,
    learning_rate,
    parameter_groups,
    recenter_latents,
    update_average,
)
from cosmos_posttrain.tokenizer_training.objective import Objective
from cosmos_posttrain.tokenizer_training.parallel import Ranks
from cosmos_posttrain.tokenizer_training.run_log import TokenizerRunLog
from cosmos_posttrain.tokenizer_training.start import (
    build_network,
    check_crops,
    check_lengths,
    load_start,
    seeded_generator,
    start_from_data,
)

CHECKPOINT = "checkpoint.pt"
RECORDED = "train.yaml"


def train(config: TokenizerTrainConfig) -> dict[str, float]:
    """Trains a tokenizer from the config, or continues a run that was interrupted.

    Nothing is written before everything that can be refused has been checked.

    Returns:
        The last validation's metrics; empty on other ranks than the first.

    Raises:
        UserError: if the config, the data or a weights file does not fit.
        OutputFolderError: if ``output_dir`` holds something else, or another run.
        NonFiniteLossError: if the loss becomes NaN or infinite.
    """
    ranks = Ranks.from_environment()
    validate(config, ranks.size)
    wants_wandb()
    torch.set_num_threads(config.num_threads)
    output = Path(config.output_dir)
    _check_output(output, config)
    trainer = _Trainer(config, ranks)
    ranks.start(trainer.device)
    if ranks.is_first:
        output.mkdir(parents=True, exist_ok=True)
        files.write_text(output / RECORDED, config_module.to_yaml(config))
    trainer.resume(output / CHECKPOINT)
    trainer.distribute()
    metrics = trainer.fit(output)
    ranks.stop()
    return metrics


def _check_output(output: Path, config: TokenizerTrainConfig) -> None:
    """Empty or absent: start. The same run: continue. Anything else is refused."""
    recorded = output / RECORDED
    if recorded.is_file():
        # Merged with the defaults: options that a run's release did not have were off in it.
        before = config_module.to_dict(config_module.merge(TokenizerTrainConfig, recorded))
        changed = [k for k, value in config_module.to_dict(config).items() if before[k] != value]
        changed = [key for key in changed if key not in ("output_dir", "log_every")]
        if changed:
            raise OutputFolderError(
                f"{output} holds a run with another {', '.join(changed)}; "
                "choose another --output_dir, or repeat that run's settings to continue it."
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputFolderError(
            f"{output} holds something else than a tokenizer training; choose another --output_dir."
        )


class _Trainer:
    """Network, EMA copy, optimizers and the data, with one method per phase."""

    def __init__(self, config: TokenizerTrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.device = launch.device(config.device)
        network_config, weights = load_start(config)
        check_crops(config.data, network_config)
        self.objective = Objective(config.loss, self.device, config.precision, ranks)
        self.clips = ClipSource(config.data)
        check_lengths(self.clips, config.data.num_frames)
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
        lr = self._update(loss, step)
        if self.adversary is not None and discriminator_loss is not None:
            self.adversary.step(discriminator_loss)
        num_used = self._settle(self.ranks.gather(latents), step)
        self.completed_steps += 1
        return {"step": step, **row, "codes_used": num_used, "lr": lr, **details}

    def _means(self, step: int, values: dict[str, Tensor]) -> dict[str, float]:
        """Means over the processes, all of them finite.

        Raises:
            NonFiniteLossError: on every process at once.
        """
        means = {name: self.ranks.mean(value).item() for name, value in values.items()}
        for name, value in means.items():
            if not math.isfinite(value):
                raise NonFiniteLossError(f"the {name} is {value} at step {step}; lower the lr.")
        return means

    def _update(self, loss: Tensor, step: int) -> float:
        """Backward and optimizer; returns the learning rate."""
        lr = learning_rate(self.config.optimizer, step, self.config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimizer.clip_grad)
        self.optimizer.step()
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

    @torch.no_grad()
    def validate(self, log: TokenizerRunLog | None = None) -> dict[str, float]:
        """Quality of the EMA weights on clips that training never sees.

        Args:
            log: gets a picture of the first clip.
        """
        scores, counts = [], torch.zeros(self.ema.quantizer.vocab_size)
        for number, clip in enumerate(self.validation.split(1)):
            video = clip.to(self.device)
            indices = self.ema.encode(video)
            decoded = self.ema.decode(indices)
            scores.append(torch.stack([psnr(decoded, video)[0], ssim(decoded, video)[0]]))
            counts += torch.bincount(indices.flatten().cpu().long(), minlength=len(counts))
            if log is not None and number == 0:
                log.write_picture(video[0], decoded[0], self.completed_steps)
        shares = counts[counts > 0] / counts.sum()
        mean = torch.stack(scores).mean(0)
        return {
            "validation_psnr": mean[0].item(),
            "validation_ssim": mean[1].item(),
            "validation_codes_used": int((counts > 0).sum()),
            "validation_entropy_bits": -(shares * shares.log2()).sum().item(),
        }

    def fit(self, output: Path) -> dict[str, float]:
        """Runs to ``max_steps``, logging, validating and saving on the way; see :func:`train`."""
        config, last = self.config, self.config.max_steps
        first = self.ranks.is_first
        if self.completed_steps >= last:
            return self.validate() if first else {}
        metrics: dict[str, float] = {}
        with contextlib.ExitStack() as stack:
            log = TokenizerRunLog(config, output, self.completed_steps) if first else None
            if log is not None:
                stack.callback(log.close)
            while self.completed_steps < last:
                row = self.step()
                done = self.completed_steps
                if log is None:
                    continue
                if done % config.validate_every == 0 or done == last:
                    metrics = self.validate(log)
                    row |= metrics
                    print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()), flush=True)
                log.write(row)
                if done % config.save_every == 0 or done == last:
                    self.save(output)
        self.ranks.barrier()
        return metrics

    def save(self, output: Path) -> None:
        """Writes the shipped weights, then the checkpoint, each atomically."""
        write_native(output, self.ema, getattr(torch, self.config.dtype))
        state = {
            "completed_steps": self.completed_steps,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.adversary is not None:
            state["adversary"] = self.adversary.state_dict()
        with files.replacing(output / CHECKPOINT) as temporary:
            torch.save(state, temporary)

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint, if there is one.

        Raises:
            CheckpointError: if it is damaged.
        """
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.adversary is not None:
                self.adversary.load_state_dict(state["adversary"])
            self.completed_steps = state["completed_steps"]
        except (RuntimeError, ValueError, KeyError, OSError, EOFError, UnpicklingError) as error:
            reason = (str(error).strip() or "it ends early").splitlines()[0]
            raise CheckpointError(
                f"{path} cannot be read ({reason}); copy it again, or remove the run's folder to "
                "start anew."
            ) from error
        if self.ranks.is_first:
            is_complete = self.completed_steps >= self.config.max_steps
            said = "is complete already; nothing to do" if is_complete else "continues"
            print(f"{path.parent} {said} after step {self.completed_steps}.", flush=True)
