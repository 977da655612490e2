"""TorchScript out and in: without this package, from the published forms, and by command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.reference import golden_folders
from safetensors.torch import load_file
from test_tokenizer_network import RATES, random_video, small_network
from torch import Tensor, nn

from cosmos_posttrain.errors import OutputFolderError, TokenizerError, UserError
from cosmos_posttrain.tokenizer import load_tokenizer, load_tokenizer_pair
from cosmos_posttrain.tokenizer.config import TokenizerConversionConfig
from cosmos_posttrain.tokenizer.convert import convert_tokenizer
from cosmos_posttrain.tokenizer.export import export_torchscript, import_torchscript
from cosmos_posttrain.tokenizer.native import load_native
from cosmos_posttrain.tokenizer.network import DVNetwork
from cosmos_posttrain.tokenizer.weights_io import write_native

GOLDEN = golden_folders("tokenizer")

# Runs where this package cannot be found: only torch reads the files.
_ALONE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file
folder, golden = sys.argv[1], load_file(sys.argv[2])
torch.set_num_threads(1)
encoder = torch.jit.load(folder + "/encoder.jit")
decoder = torch.jit.load(folder + "/decoder.jit")
with torch.no_grad():
    indices, codes, loss = encoder(golden["video"])
    video = decoder(indices)
assert "cosmos_posttrain" not in sys.modules
try:
    import cosmos_posttrain
except ImportError:
    pass
else:
    raise SystemExit("the package can be imported here")
assert indices.dtype == torch.int32 and torch.equal(indices, golden["indices"])
print((codes - golden["codes"]).abs().max().item())
print((video - golden["reconstruction"]).abs().max().item())
"""


def run_alone(code: str, *arguments: object, cwd: Path) -> list[str]:
    """Runs code in a python process that does not see this package; its output's lines."""
    # An editable install is found through site-packages: leave out the hooks of `site`, keep torch.
    paths = [str(Path(module.__file__ or "").parents[1]) for module in (torch,)]
    start = f"import sys; sys.path[:0] = {paths!r}\n"
    command = [sys.executable, "-I", "-S", "-c", start + code, *map(str, arguments)]
    result = subprocess.run(
        command, cwd=cwd, check=False, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize(
    "name",
    [
        # The same layers as of the tiny ones, and ten seconds each.
        pytest.param(name, marks=[pytest.mark.slow] * name.startswith("full-"))
        for name in GOLDEN
    ],
)
def test_golden_parity_of_the_export_and_of_its_import(name: str, tmp_path: Path) -> None:
    folder = GOLDEN[name]
    export_torchscript(load_native(folder, torch.device("cpu"), None).network, tmp_path)
    differences = run_alone(_ALONE, tmp_path, folder / "io.safetensors", cwd=tmp_path)
    # Sums of a few thousand float32 products in another order differ by about 1e-5.
    assert max(map(float, differences)) < 1e-4

    golden = load_file(folder / "io.safetensors")
    network = import_torchscript(tmp_path)
    with torch.no_grad():
        assert torch.equal(network.encode(golden["video"]), golden["indices"])
        video = network.decode(golden["indices"])
    torch.testing.assert_close(video, golden["reconstruction"], atol=1e-4, rtol=0)


class _Published(nn.Module):
    """A module of the published files' tensor names, buffers captured by TorchScript included."""

    def __init__(self, network: DVNetwork, parts: tuple[str, ...]) -> None:
        super().__init__()
        for name in parts:
            self.add_module(name, getattr(network, name))
        self.quantizer = network.quantizer
        self.register_buffer("table", torch.zeros(1000, 3))
        for name in parts:
            if name in ("encoder", "decoder"):
                self.get_submodule(name).register_buffer("wavelets", torch.ones(2))


class _Autoencoder(_Published):
    def forward(self, video: Tensor) -> Tensor:
        latents = self.quant_conv(self.encoder(video))
        codes = self.quantizer.quantize(latents)
        decoded: Tensor = self.decoder(self.post_quant_conv(codes))
        return decoded + 0 * self.table.sum() + 0 * self.encoder.wavelets.sum()


def write_autoencoder(network: DVNetwork, folder: Path) -> Path:
    """``autoencoder.jit`` as published: video to reconstruction, all tensors in its state dict."""
    parts = ("encoder", "decoder", "quant_conv", "post_quant_conv")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(
            _Autoencoder(network, parts), random_video(1, 3, 9, 32, 32), check_trace=False
        )
        torch.jit.save(script, folder / "autoencoder.jit")
    return folder / "autoencoder.jit"


@pytest.mark.parametrize(
    "rate", [pytest.param(rate, marks=[pytest.mark.slow] * (rate != "dv8x8x8")) for rate in RATES]
)
def test_autoencoder_alone_is_a_tokenizer(rate: str, tmp_path: Path) -> None:
    file = write_autoencoder(small_network(rate), tmp_path)
    # Hugging Face repositories hold such a file, which says nothing about the network.
    (tmp_path / "config.json").write_text('{"architectures": ["CosmosTokenizer"]}')
    video = random_video(1, 3, 17, 32, 48)
    with torch.no_grad():
        expected = small_network(rate).encode(video)
    for path in (tmp_path, file):
        tokenizer = load_tokenizer(path, device="cpu")
        assert tokenizer.is_native
        assert torch.equal(tokenizer.encode(video), expected)
        assert tokenizer.decode(expected).shape == video.shape
    assert tokenizer.levels == (8, 5, 5)
    write_native(tmp_path / "native", small_network(rate))
    assert tokenizer.sha256 == load_tokenizer(tmp_path / "native", device="cpu").sha256
    with pytest.raises(TokenizerError, match="can only run natively"):
        load_tokenizer(file, device="cpu", native=False)


def test_config_beside_torchscript_is_obeyed_when_it_is_complete(tmp_path: Path) -> None:
    write_autoencoder(small_network(), tmp_path)
    write_native(tmp_path, small_network())
    (tmp_path / "model.safetensors").unlink()
    assert load_tokenizer(tmp_path, device="cpu").compression.name == "4x8x8"
    write_native(tmp_path / "other", small_network("dv8x8x8"))
    shutil.copy(tmp_path / "other" / "config.json", tmp_path)
    with pytest.raises(TokenizerError, match="not those of the 8x8x8 network"):
        load_tokenizer(tmp_path, device="cpu")


def test_torchscript_runs_natively_unless_asked_not_to(tmp_path: Path) -> None:
    export_torchscript(small_network(), tmp_path)
    video = random_video(1, 3, 9, 32, 48)
    by_default, script = (
        load_tokenizer(tmp_path, device="cpu", native=native) for native in (None, False)
    )
    assert by_default.is_native and not script.is_native
    assert by_default.sha256 == script.sha256
    indices = script.encode(video)
    assert torch.equal(by_default.encode(video), indices)
    torch.testing.assert_close(by_default.decode(indices), script.decode(indices))
    with pytest.raises(TokenizerError, match="cannot be compiled"):
        script.compile()
    halves = (tmp_path / "encoder.jit", tmp_path / "decoder.jit")
    assert load_tokenizer_pair(*halves, device="cpu").is_native


def test_torchscript_of_another_network_runs_as_it_is(tmp_path: Path) -> None:
    """The right names and shapes, but another function: here, a mirrored frame."""

    class Mirrored(nn.Module):
        def __init__(self, network: DVNetwork) -> None:
            super().__init__()
            self.encoder, self.quant_conv = network.encoder, network.quant_conv
            self.quantizer = network.quantizer

        def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            codes = self.quantizer.quantize(self.quant_conv(self.encoder(video.flip(4))))
            return self.quantizer.codes_to_indices(codes), codes, codes.new_zeros(1)

    export_torchscript(small_network(), tmp_path)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(
            Mirrored(small_network()), random_video(1, 3, 9, 32, 32), check_trace=False
        )
        torch.jit.save(script, tmp_path / "encoder.jit")
    video = random_video(1, 3, 5, 32, 32)
    tokenizer = load_tokenizer(tmp_path, device="cpu")
    assert not tokenizer.is_native
    with torch.no_grad():
        assert torch.equal(tokenizer.encode(video), small_network().encode(video.flip(4)))
    with pytest.raises(TokenizerError, match="it is another network"):
        load_tokenizer(tmp_path, device="cpu", native=True)


def test_half_precision_file_keeps_its_dtype_through_conversion(tmp_path: Path) -> None:
    export_torchscript(small_network().to(torch.bfloat16), tmp_path / "jit")
    assert import_torchscript(tmp_path / "jit").quant_conv.conv3d.weight.dtype == torch.bfloat16
    tokenizer = load_tokenizer(tmp_path / "jit", device="cpu")
    assert tokenizer.is_native and tokenizer.dtype == torch.float32


@pytest.mark.slow
def test_conversion_command_both_ways(tmp_path: Path) -> None:
    native, script, again = (tmp_path / name for name in ("native", "script", "again"))
    write_native(native, small_network())
    convert_tokenizer(TokenizerConversionConfig(str(native), str(script), "torchscript"))
    command = [sys.executable, "-m", "cosmos_posttrain.tokenizer", "--source", str(script)]
    command += ["--target", str(again), "--target_format", "native"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, check=True, timeout=120, env=environment)
    before, after = (load_file(folder / "model.safetensors") for folder in (native, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_tokenizer(again, device="cpu").sha256 == load_tokenizer(native).sha256
    refused = subprocess.run(command, check=False, capture_output=True, timeout=120, text=True)
    assert refused.returncode == 2 and "exists; give another --target" in refused.stderr
    with pytest.raises(OutputFolderError):
        convert_tokenizer(TokenizerConversionConfig(str(native), str(script), "torchscript"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "", "target": ""}, "--source is missing.*--target is missing"),
        ({"target_format": "onnx"}, "--target_format onnx is not one of native, torchscript"),
        ({"source": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_a_conversion_that_cannot_be_is_one_sentence_and_writes_nothing(
    tmp_path: Path, changes: dict[str, str], words: str
) -> None:
    values = {"source": "tiny-dv4x8x8", "target": str(tmp_path / "new")} | changes
    with pytest.raises(UserError, match=words) as caught:
        convert_tokenizer(TokenizerConversionConfig(**values))
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
