"""``python -m cosmos_posttrain.text``: the encoder alone, the same by its hash."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import t5
from helpers.distributed_run import run_script

from cosmos_posttrain.errors import ConfigError, OutputFolderError
from cosmos_posttrain.text import load_text_encoder, weights_io
from cosmos_posttrain.text.config import TextEncoderConversionConfig
from cosmos_posttrain.text.convert import convert_text_encoder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["PyTorch's old file", "safetensors in parts"])
def test_a_whole_t5_becomes_its_encoder(tmp_path: Path, form: str) -> None:
    source, target = t5.write_t5(tmp_path / "source", form), tmp_path / "target"
    command = ["-m", "cosmos_posttrain.text", "--source", source, "--target", target]
    finished = run_script(command)
    assert finished.returncode == 0, finished.stderr
    first = load_text_encoder(source, device="cpu")
    encoder = load_text_encoder(target, device="cpu")
    assert first.sha256 == encoder.sha256 and first.sha256[:12] in finished.stdout
    assert torch.equal(encoder.embed(t5.PROMPTS), first.embed(t5.PROMPTS))
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert {path.name for path in target.iterdir()} == names
    # transformers itself reads it too, and finds the same.
    expected = t5.transformers_rows(target, t5.PROMPTS, encoder.context_len, padding=True)
    torch.testing.assert_close(encoder.embed(t5.PROMPTS), expected, rtol=0, atol=1e-6)


def test_in_bfloat16_and_in_parts_it_is_still_the_same_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_io.plan_parts, "__defaults__", (30_000,))
    source, target = t5.write_t5(tmp_path / "source"), tmp_path / "target"
    sha256 = convert_text_encoder(TextEncoderConversionConfig(str(source), str(target), "bfloat16"))
    encoder = load_text_encoder(target, device="cpu")
    assert encoder.sha256 == sha256 == load_text_encoder(source, device="cpu").sha256
    parts = sorted(target.glob("*.safetensors"))
    assert len(parts) > 2 and (target / "model.safetensors.index.json").is_file()
    num_parameters = sum(parameter.numel() for parameter in encoder._model.parameters())
    assert sum(part.stat().st_size for part in parts) < 2.2 * num_parameters


def test_targets(tmp_path: Path) -> None:
    def convert(target: Path, **settings: bool) -> str:
        return convert_text_encoder(TextEncoderConversionConfig("tiny", str(target), **settings))

    sha256 = convert(tmp_path / "new")
    with pytest.raises(OutputFolderError, match="holds a text encoder already"):
        convert(tmp_path / "new")
    assert convert(tmp_path / "new", overwrite=True) == sha256
    (tmp_path / "new" / "config.json").unlink()  # as if killed before the end
    assert convert(tmp_path / "new") == sha256
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputFolderError, match=r"holds something else \(thesis.tex\)"):
        convert(tmp_path / "thesis", overwrite=True)
    itself = TextEncoderConversionConfig(
        str(tmp_path / "new"), str(tmp_path / "new"), overwrite=True
    )
    with pytest.raises(OutputFolderError, match="the source and the target are"):
        convert_text_encoder(itself)
    assert load_text_encoder(tmp_path / "new", device="cpu").sha256 == sha256
    shutil.rmtree(tmp_path / "new")
    with pytest.raises(ConfigError, match="--dtype float16 is not one of bfloat16, float32"):
        convert_text_encoder(TextEncoderConversionConfig("tiny", str(tmp_path / "new"), "float16"))
    with pytest.raises(ConfigError, match=r"--source is missing: .*; --target is missing"):
        convert_text_encoder(TextEncoderConversionConfig())
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_next_run_starts_again(tmp_path: Path) -> None:
    program = (
        "import resource, sys, runpy\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"sys.argv = ['text', '--source', 'tiny', '--target', {str(tmp_path / 'new')!r}]\n"
        "runpy.run_module('cosmos_posttrain.text', run_name='__main__')"
    )
    finished = run_script(["-c", program])
    assert finished.returncode == 1
    assert finished.stderr.count("\n") == 1 and "cannot be written" in finished.stderr
    assert not (tmp_path / "new" / "config.json").exists()
    convert_text_encoder(TextEncoderConversionConfig("tiny", str(tmp_path / "new")))
    load_text_encoder(tmp_path / "new", device="cpu")


def test_help_and_prompts_that_are_only_checked_need_no_torch() -> None:
    program = (
        "import sys, runpy\n"
        "from cosmos_posttrain.text.prompts import prompt_problem\n"
        "assert prompt_problem('a ball') is None and prompt_problem(' ')\n"
        "sys.argv = ['text', '--help']\n"
        "try:\n"
        "    runpy.run_module('cosmos_posttrain.text', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    finished = run_script(["-c", program])
    assert finished.returncode == 0, finished.stderr
    for flag in ("--source", "--target", "--dtype {bfloat16,float32}", "--overwrite"):
        assert flag in finished.stdout
