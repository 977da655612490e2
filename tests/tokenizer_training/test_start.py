"""Where a training starts: other weights, the full-size configs, precision, bad input."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.distributed_run import run_script
from helpers.tokenizer_training_case import read_rows, small_config, write_videos
from safetensors.torch import load_file

from cosmos_posttrain import config as config_module
from cosmos_posttrain import hub
from cosmos_posttrain.errors import GeometryError, TokenizerError, UserError
from cosmos_posttrain.tokenizer.export import export_torchscript
from cosmos_posttrain.tokenizer.network import DVConfig, DVNetwork
from cosmos_posttrain.tokenizer.weights_io import write_native
from cosmos_posttrain.tokenizer_training.config import (
    AdversarialConfig,
    LossConfig,
    TokenizerTrainConfig,
    batch_shape,
    validate,
)
from cosmos_posttrain.tokenizer_training.init import initialize
from cosmos_posttrain.tokenizer_training.start import build_network, load_start
from cosmos_posttrain.tokenizer_training.trainer import train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# name: patch_size, z_channels, latent frames of a clip, rounded millions of parameters
FULL_SIZE = {
    "dv4x8x8": (2, 256, 5, 113),
    "dv8x8x8": (4, 16, 3, 106),
    "dv8x16x16": (4, 16, 5, 111),
}


@pytest.fixture(scope="module")
def network(videos: Path) -> DVNetwork:
    config = DVConfig.from_dict(small_config(videos, Path("unused")).network)
    return build_network(config, None, seed=3)


@pytest.fixture(scope="module")
def sources(network: DVNetwork, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in both forms."""
    folder = tmp_path_factory.mktemp("sources")
    write_native(folder / "native", network)
    export_torchscript(network, folder / "script")
    return {name: folder / name for name in ("native", "script")}


@pytest.mark.parametrize("form", ["native", "script"])
def test_post_training_starts_from_the_given_weights(
    form: str, sources: dict[str, Path], network: DVNetwork, videos: Path, tmp_path: Path
) -> None:
    config = small_config(
        videos, tmp_path, init_from=str(sources[form]), network={}, max_steps=2, recenter_steps=0
    )
    config.optimizer.lr = 1e-9
    train(config)
    trained = load_file(tmp_path / "model.safetensors")
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-6, rtol=1e-5)
    assert len(read_rows(tmp_path)) == 2
    assert DVConfig.from_file(tmp_path / "config.json").compression.name == "4x8x8"


def test_a_seed_gives_the_same_weights_in_every_memory_layout(network: DVNetwork) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        plain = DVNetwork(network.config)
        for parameter in plain.parameters():
            parameter.data = parameter.data.contiguous()
        initialize(plain)
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in network.state_dict().items())


def test_a_shipped_tokenizer_and_a_hub_id_can_be_named(
    videos: Path, monkeypatch: pytest.MonkeyPatch, sources: dict[str, Path]
) -> None:
    shipped = small_config(videos, Path("run"), init_from="tiny-dv8x8x8", network={})
    assert load_start(shipped)[0].compression.name == "8x8x8"
    asked: list[str] = []

    def resolve(name: str, allow_patterns: object) -> Path:
        asked.append(name)
        return sources["script"]

    monkeypatch.setattr(hub, "resolve", resolve)
    hub_id = "nvidia/Cosmos-0.1-Tokenizer-DV4x8x8"
    config, weights = load_start(small_config(videos, Path("run"), init_from=hub_id))
    assert asked == [hub_id] and weights is not None
    assert config.compression.name == "4x8x8"


def test_files_and_tiny_are_taken_as_elsewhere(
    videos: Path, sources: dict[str, Path], network: DVNetwork
) -> None:
    file = str(sources["script"] / "encoder.jit")
    _, weights = load_start(small_config(videos, Path("run"), init_from=file))
    assert weights is not None
    assert all(torch.equal(tensor, network.state_dict()[n]) for n, tensor in weights.items())
    rate = {"temporal_compression": 8, "channels_mult": [1, 2, 2]}
    tiny = small_config(videos, Path("run"), init_from="tiny")
    tiny.network |= rate
    with pytest.raises(TokenizerError, match="not those of the 8x8x8 network"):
        load_start(tiny)  # the tiny one of the config's rate, which has other widths


@pytest.mark.parametrize("form", ["native", "script"])
def test_weights_of_another_rate_are_refused_with_both_rates(
    form: str, sources: dict[str, Path], videos: Path, tmp_path: Path
) -> None:
    config = small_config(videos, tmp_path / "run", init_from=str(sources[form]))
    config.network |= {"temporal_compression": 8, "channels_mult": [1, 2, 2]}
    config.data.num_frames = 9
    with pytest.raises(TokenizerError, match=r"by 4x8x8, but the config's network by 8x8x8"):
        train(config)
    assert not (tmp_path / "run").exists()


def _corrupt(folder: Path, sources: dict[str, Path]) -> None:
    (folder / "config.json").write_bytes((sources["native"] / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(b"garbage")


def _other_width(folder: Path, sources: dict[str, Path]) -> None:
    config = DVConfig.from_file(sources["native"] / "config.json")
    wider = DVNetwork(DVConfig(**(vars(config) | {"channels": 8})))
    write_native(folder, wider)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_corrupt, "is not a readable safetensors file"),
        (_other_width, "has a misshapen tensor"),
        (lambda folder, sources: None, "holds neither"),
    ],
)
def test_unusable_start_weights_are_refused_and_nothing_is_written(
    make: Callable[[Path, dict[str, Path]], None],
    message: str,
    sources: dict[str, Path],
    videos: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "start").mkdir()
    make(tmp_path / "start", sources)
    config = small_config(videos, tmp_path / "run", init_from=str(tmp_path / "start"))
    with pytest.raises(TokenizerError, match=message) as error:
        train(config)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_clips_that_do_not_fit_are_refused_and_nothing_is_written(
    videos: Path, tmp_path: Path
) -> None:
    config = small_config(videos, tmp_path / "run")
    config.data.num_frames = 6
    with pytest.raises(GeometryError, match="use 5 or 9"):
        train(config)
    config.data.num_frames, config.data.crop_sizes = 5, [[32, 36]]
    with pytest.raises(GeometryError, match="width 36"):
        train(config)
    (tmp_path / "short").mkdir()
    short = small_config(write_videos(tmp_path / "short", 3), tmp_path / "run")
    with pytest.raises(UserError, match="has 5 frames, but the longest video leaves 3"):
        train(short)
    extra = small_config(videos, tmp_path / "run")
    extra.data.extra.videos = str(tmp_path / "short")
    with pytest.raises(UserError, match="has 5 frames, but the longest video leaves 3"):
        train(extra)
    large = small_config(videos, tmp_path / "run")
    large.data.crop_sizes = [[32, 32], [32, 80]]
    with pytest.raises(UserError, match=r"mp4 is 64x40, smaller than the training crop 80x32"):
        train(large)
    assert not (tmp_path / "run").exists()


def test_command_line_says_one_sentence_and_exits_with_2(
    sources: dict[str, Path], videos: Path, tmp_path: Path
) -> None:
    result = run_script(
        [
            *("train_tokenizer.py", "--config", CONFIGS / "tokenizer_tiny_dv8x8x8.yaml"),
            *("--init_from", sources["native"], "--videos", videos),
            *("--output_dir", tmp_path / "run"),
        ]
    )
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*4x8x8.*8x8x8.*\n", result.stderr)
    assert not (tmp_path / "run").exists()


def commands(path: Path) -> list[list[str]]:
    """The ``key=value`` words of each command or hint in a config's head."""
    comment = "".join(
        line.lstrip("#").removesuffix("\\\n") + " "
        for line in path.read_text().splitlines(keepends=True)
        if line.startswith("#")
    )
    stages = re.split(r"torchrun|From scratch", comment)[1:]
    return [re.findall(r"(?<=\s)[a-z_.]+=[^\s,;]*\w", stage) for stage in stages]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_configs_build_the_published_networks(name: str) -> None:
    patch_size, z_channels, num_latents, millions = FULL_SIZE[name]
    path = CONFIGS / f"tokenizer_{name}.yaml"
    config = config_module.merge(TokenizerTrainConfig, path, [("output_dir", "run")])
    validate(config, num_processes=8)
    with torch.device("meta"):
        network = DVNetwork(DVConfig.from_dict(config.network))
        shape = batch_shape(config, 0)
        video = torch.empty(1, 3, shape.num_frames, shape.height, shape.width)
        latents = network.latents(video)
    side = shape.height // network.config.spatial_compression
    assert latents.shape == (1, num_latents, side, side, 6)
    assert network.decode_codes(latents).shape == video.shape
    assert network.quantizer.vocab_size == 64000
    tensors = network.state_dict()
    assert tensors["quant_conv.conv3d.weight"].shape == (6, z_channels, 1, 1, 1)
    assert tensors["encoder.conv_in.0.conv3d.weight"].shape == (128, 3 * patch_size**3, 1, 3, 3)
    count = sum(p.numel() for p in network.parameters())
    assert round(count / 1e6) == millions
    assert f"{millions}M parameters" in path.read_text()


@pytest.mark.parametrize("name", FULL_SIZE)
def test_overrides_in_the_full_size_configs_are_valid(name: str) -> None:
    path = CONFIGS / f"tokenizer_{name}.yaml"
    first, second, scratch = commands(path)
    assert not first and len(second) == 5 and len(scratch) == 3
    for words in (second, scratch):
        config = config_module.merge(TokenizerTrainConfig, path, [("output_dir", "run")], words)
        validate(config, num_processes=8)
        assert config != config_module.merge(TokenizerTrainConfig, path, [("output_dir", "run")])


def test_bfloat16_computes_close_to_float32_and_ships_finite_weights(
    videos: Path, tmp_path: Path
) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        config = small_config(videos, tmp_path / precision, precision=precision, max_steps=3)
        train(config)
        losses[precision] = [row["loss"] for row in read_rows(tmp_path / precision)]
    assert all(math.isfinite(loss) for loss in losses["bfloat16"])
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)
    weights = load_file(tmp_path / "bfloat16" / "model.safetensors")
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in weights.values())


@pytest.mark.slow
def test_compiled_training_equals_eager(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_module = torch.nn.Module.compile
    # Traces and differentiates as the default does, without its minutes of C++ compilation.
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compile_module(self, backend="aot_eager", **options),
    )
    rows = []
    for compiled in (False, True):
        config = small_config(
            videos,
            tmp_path / str(compiled),
            compile=compiled,
            max_steps=1,
            adversarial=AdversarialConfig(weight=0.1, channels=4),
            loss=LossConfig(entropy=0.1),
        )
        config.data.crop_sizes = [[32, 32]]
        train(config)
        rows.append(read_rows(tmp_path / str(compiled)))
    for eager, fast in zip(*rows, strict=True):
        assert fast["loss"] == pytest.approx(eager["loss"], abs=1e-5)
    torch._dynamo.reset()
