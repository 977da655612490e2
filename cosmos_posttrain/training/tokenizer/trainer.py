"""The training loop of tokenizers: ``train -> _Trainer.step``.

Flows in: a :class:`TokenizerTrainConfig`. Flows out, in its ``output_dir``: ``config.json`` and
``model.safetensors`` (the EMA weights, what ``load_tokenizer`` reads), ``metrics.jsonl``, the
resolved ``train.yaml``, and ``checkpoint.pt`` to continue from. A killed run started again with the
same command continues and ends with the same weights.
"""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_posttrain import config as config_module
from cosmos_posttrain.errors import NonFiniteLossError, OutputFolderError
from cosmos_posttrain.tokenizer.network import DVConfig, DVNetwork
from cosmos_posttrain.tokenizer.weights_io import read_native, write_native
from cosmos_posttrain.training.tokenizer.config import TokenizerTrainConfig, validate
from cosmos_posttrain.training.tokenizer.data import ClipSource
from cosmos_posttrain.training.tokenizer.init import (
    initialize,
    initialize_decoder,
    initialize_quantizer,
)
from cosmos_posttrain.training.tokenizer.losses import psnr, reconstruction_loss, ssim

CHECKPOINT = "checkpoint.pt"


def train(config: TokenizerTrainConfig) -> dict[str, float]:
    """Trains a tokenizer from the config, or continues a run that was interrupted.

    Returns:
        The last validation's metrics.

    Raises:
        ConfigError: if the config does not fit.
        OutputFolderError: if ``output_dir`` holds something else, or another run.
        NonFiniteLossError: if the loss becomes NaN or infinite.
    """
    validate(config)
    torch.set_num_threads(config.num_threads)
    network_config = DVConfig.from_dict(config.network)
    output = Path(config.output_dir)
    _prepare_output(output, config)
    trainer = _Trainer(config, network_config, ClipSource(config.data))
    trainer.resume(output / CHECKPOINT)
    return trainer.fit(output)


def _prepare_output(output: Path, config: TokenizerTrainConfig) -> None:
    """Empty or absent: start. The same run: continue. Anything else is refused."""
    resolved = config_module.to_dict(config)
    recorded = output / "train.yaml"
    if recorded.is_file():
        from omegaconf import OmegaConf

        before = OmegaConf.to_container(OmegaConf.load(recorded))
        assert isinstance(before, dict)
        changed = [key for key, value in resolved.items() if before.get(key) != value]
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
    output.mkdir(parents=True, exist_ok=True)
    config_module.save_yaml(config, recorded)


class _Trainer:
    """Network, EMA copy, optimizer and the data, with one method per phase."""

    def __init__(
        self, config: TokenizerTrainConfig, network_config: DVConfig, clips: ClipSource
    ) -> None:
        self.config = config
        self.clips = clips
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = DVNetwork(network_config)
            initialize(self.network)
        if config.init_from is not None:
            self.network.load_state_dict(read_native(Path(config.init_from), network_config))
        self.network.to(self.device)
        self.completed_steps = 0
        if config.init_from is None:
            self._start_from_data()
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(),
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
        )
        self.validation = clips.validation_clips(config.num_validation_clips)

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The decoder's last layer learns slower: its outputs, wavelet bands, add up in a pixel."""
        last = list(self.network.decoder.conv_out.parameters())
        last_ids = {id(p) for p in last}
        rest = [p for p in self.network.parameters() if id(p) not in last_ids]
        slow = self.network.config.patch_size**-1.5
        return [{"params": rest, "lr_scale": 1.0}, {"params": last, "lr_scale": slow}]

    @torch.no_grad()
    def _recenter_latents(self, latents: Tensor) -> None:
        """Nudges ``quant_conv`` towards latents of zero mean, equal variance and no correlation.

        Without it, codes die in the first steps, when the encoder changes fastest. The step is
        that of adaptive decorrelation: W <- (I - rate / 2 (cov - I)) W.
        """
        rate = self.config.recenter_rate
        flat = latents.detach().float().flatten(0, 3)
        excess = torch.cov(flat.T) / self.config.latent_std**2 - torch.eye(
            flat.shape[1], device=flat.device
        )
        # A large excess must shrink the latents, not turn them around.
        excess = excess / (1 + torch.linalg.matrix_norm(excess, 2) * rate)
        step = torch.eye(flat.shape[1], device=flat.device) - rate / 2 * excess
        conv = self.network.quant_conv.conv3d
        assert conv.bias is not None
        conv.weight.copy_((step @ conv.weight.flatten(1)).view_as(conv.weight))
        conv.bias.copy_(step @ (conv.bias - rate * flat.mean(0)))

    def _start_from_data(self) -> None:
        """Closed-form starting weights of the quantizer's and the decoder's last layers."""
        size = max(8 * self.config.batch_size, 64)
        height, width = self.config.data.crop_sizes[0]
        images = self.clips.batch(size, 1, (height, width), self._generator(-1))
        initialize_quantizer(self.network, images.to(self.device), self.config.latent_std)
        num_frames = self.config.data.num_frames
        size = 3 * self.config.batch_size
        clips = self.clips.batch(size, num_frames, (height, width), self._generator(-2))
        initialize_decoder(self.network, clips.to(self.device))

    def _quantize(self, latents: Tensor, step: int) -> Tensor:
        """Rounds; in the first ``noise_steps``, adds noise of a rounding's width instead."""
        quantizer = self.network.quantizer
        if step >= self.config.noise_steps:
            return quantizer.quantize(latents)
        bounded = quantizer.bound(latents)
        noise = torch.rand(bounded.shape, generator=self._generator(step + 500_000_000))
        return (bounded + noise.to(bounded) - 0.5) / quantizer.width

    def _learning_rate(self, step: int) -> float:
        options = self.config.optimizer
        if step < options.warmup_steps:
            return options.lr * (step + 1) / options.warmup_steps
        share = (step - options.warmup_steps) / max(self.config.max_steps - options.warmup_steps, 1)
        low = options.min_lr_ratio
        return options.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share)))

    def _batch(self, step: int) -> Tensor:
        """Batches of images and of videos alternate at the configured frequency."""
        every = self.config.image_every
        is_image = every > 0 and step % every == every - 1
        sizes = self.config.data.crop_sizes
        height, width = sizes[step % len(sizes)]
        size = self.config.image_batch_size if is_image else self.config.batch_size
        size = max(round(size * sizes[0][0] * sizes[0][1] / (height * width)), 1)
        num_frames = 1 if is_image else self.config.data.num_frames
        clips = self.clips.batch(size, num_frames, (height, width), self._generator(step))
        return clips.to(self.device)

    def step(self) -> dict[str, float]:
        """One optimizer step.

        Raises:
            NonFiniteLossError: before the weights are touched.
        """
        step = self.completed_steps
        video = self._batch(step)
        latents = self.network.latents(video)
        reconstruction = self.network.decode_codes(self._quantize(latents, step))
        loss = reconstruction_loss(reconstruction, video, self.config.loss)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(f"the loss is {loss.item()} at step {step}; lower the lr.")
        lr = self._learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimizer.clip_grad)
        self.optimizer.step()
        if step < self.config.recenter_steps:
            self._recenter_latents(latents)
        self.completed_steps += 1
        decay = min(self.config.optimizer.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            pairs = zip(self.ema.parameters(), self.network.parameters(), strict=True)
            for average, weight in pairs:
                average.lerp_(weight, 1 - decay)
            codes = self.network.quantizer.quantize(latents.detach())
            indices = self.network.quantizer.codes_to_indices(codes)
        return {
            "step": step,
            "loss": loss.item(),
            "psnr": psnr(reconstruction.detach(), video).mean().item(),
            "codes_used": indices.unique().numel(),
            "lr": lr,
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Quality of the EMA weights on clips that training never sees."""
        scores, counts = [], torch.zeros(self.ema.quantizer.vocab_size)
        for clip in self.validation.split(1):
            video = clip.to(self.device)
            indices = self.ema.encode(video)
            decoded = self.ema.decode(indices)
            scores.append(torch.stack([psnr(decoded, video)[0], ssim(decoded, video)[0]]))
            counts += torch.bincount(indices.flatten().cpu().long(), minlength=len(counts))
        shares = counts[counts > 0] / counts.sum()
        mean = torch.stack(scores).mean(0)
        return {
            "validation_psnr": mean[0].item(),
            "validation_ssim": mean[1].item(),
            "validation_codes_used": int((counts > 0).sum()),
            "validation_entropy_bits": -(shares * shares.log2()).sum().item(),
        }

    def fit(self, output: Path) -> dict[str, float]:
        """Runs to ``max_steps``, logging, validating and saving on the way."""
        config, metrics = self.config, self.validate()
        last = config.max_steps
        log_path = output / "metrics.jsonl"
        _keep_lines_before(log_path, self.completed_steps)
        started, first = time.monotonic(), self.completed_steps
        with log_path.open("a", encoding="utf-8") as log:
            while self.completed_steps < last:
                row: dict[str, Any] = self.step()
                done = self.completed_steps
                if done % config.validate_every == 0 or done == last:
                    metrics = self.validate()
                    row |= metrics
                    print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()), flush=True)
                log.write(json.dumps(row) + "\n")
                log.flush()
                if done % config.log_every == 0 or done == last:
                    _print_progress(row, last, (done - first) / (time.monotonic() - started))
                if done % config.save_every == 0 or done == last:
                    self.save(output)
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
        temporary = output / (CHECKPOINT + ".tmp")
        torch.save(state, temporary)
        temporary.replace(output / CHECKPOINT)

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint, if there is one."""
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.completed_steps = state["completed_steps"]
        print(f"continuing after step {self.completed_steps}", flush=True)


def _keep_lines_before(path: Path, step: int) -> None:
    """Drops the lines of steps that will be run again, so that each step appears once."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _print_progress(row: dict[str, Any], max_steps: int, steps_per_second: float) -> None:
    done = row["step"] + 1
    eta = (max_steps - done) / steps_per_second
    print(
        f"step {done}/{max_steps}  loss {row['loss']:.4f}  psnr {row['psnr']:.2f} dB  "
        f"codes {row['codes_used']}  lr {row['lr']:.2e}  {steps_per_second:.2f} steps/s  "
        f"eta {eta / 60:.1f} min",
        flush=True,
    )
