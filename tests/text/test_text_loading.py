"""One encoder in every form of folder is one encoder; what cannot be loaded is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import hub_server, t5
from helpers.distributed_run import run_script
from safetensors.torch import load_file, save_file

from cosmos_posttrain.errors import TextError, UserError
from cosmos_posttrain.text import DEFAULT_TEXT_ENCODER, load_text_encoder
from cosmos_posttrain.text.loading import computed_dtype
from cosmos_posttrain.text.prompts import read_tokenizer

SENTENCEPIECE_TEXT = Path(__file__).resolve().parents[2] / "recipes" / "tiny_text_encoder.txt"


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same T5 in every form."""
    folder = tmp_path_factory.mktemp("forms")
    return {form: t5.write_t5(folder / form, form) for form in t5.FORMS}


@pytest.mark.parametrize("form", t5.FORMS)
def test_every_form_is_the_same_encoder(forms: dict[str, Path], form: str) -> None:
    first = load_text_encoder(forms["safetensors"], device="cpu")
    encoder = load_text_encoder(forms[form], device="cpu")
    assert encoder.sha256 == first.sha256
    assert torch.equal(encoder.embed(t5.PROMPTS), first.embed(t5.PROMPTS))


def _change(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_hash_knows_one_weight_from_another_and_outlives_bfloat16(
    forms: dict[str, Path], tmp_path: Path
) -> None:
    sha256 = load_text_encoder(forms["safetensors"], device="cpu").sha256
    other = shutil.copytree(forms["safetensors"], tmp_path / "other")
    name = "encoder.block.2.layer.1.DenseReluDense.wo.weight"
    _change(other, lambda tensors: tensors[name][3, 4].mul_(1.01))
    assert load_text_encoder(other, device="cpu").sha256 != sha256
    rounded = shutil.copytree(forms["safetensors"], tmp_path / "rounded")
    _change(rounded, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    assert load_text_encoder(rounded, device="cpu").sha256 == sha256
    decoder = shutil.copytree(forms["safetensors"], tmp_path / "decoder")
    name = "decoder.block.0.layer.2.DenseReluDense.wo.weight"
    _change(decoder, lambda tensors: tensors[name].zero_())
    assert load_text_encoder(decoder, device="cpu").sha256 == sha256


def test_the_dtype_is_the_files_own_on_a_gpu_but_never_float16() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert computed_dtype(None, torch.bfloat16, cpu) == torch.float32
    assert computed_dtype(None, torch.bfloat16, gpu) == torch.bfloat16
    assert computed_dtype(None, torch.float32, gpu) == torch.float32
    assert computed_dtype(None, torch.float16, gpu) == torch.float32
    assert computed_dtype(torch.bfloat16, torch.float32, cpu) == torch.bfloat16


def test_t5s_own_vocabulary_file_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    import sentencepiece

    folder = t5.write_t5(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        input=str(SENTENCEPIECE_TEXT),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=400,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    _edit_config(folder, n_positions=100)
    encoder = load_text_encoder(folder, device="cpu")
    prompts = ["The red ball moves to the left.", "Put the metal pot on the blue cloth!"]
    processor = sentencepiece.SentencePieceProcessor(str(tmp_path / "spiece.model"))
    for prompt, tokens in zip(prompts, encoder.tokenize(prompts), strict=True):
        assert list(tokens.ids) == [*processor.encode(prompt), 1]
    expected = t5.transformers_rows(folder, prompts, 100, padding=True)
    torch.testing.assert_close(encoder.embed(prompts), expected, rtol=0, atol=3e-6)


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _cut_in_half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _without_a_part(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = ["encoder.final_layer_norm.weight", "shared.weight"]
    weight_map = {n: f"model-0000{i}-of-00002.safetensors" for i, n in enumerate(names, 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _index_that_leads_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    weight_map = {"shared.weight": "../model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


class Harmful:
    """Pickled, it would run code when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("harm done",))


def _pickled_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": Harmful()}, folder / "pytorch_model.bin")


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing; give the"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "another kind of model": (lambda f: _edit_config(f, model_type="bert"), "describes a bert"),
    "no length": (lambda f: _edit_config(f, n_positions="many"), "n_positions is 'many'"),
    "no size": (lambda f: _edit_config(f, d_model="wide"), "describes no T5 encoder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no encoder weights"),
    "weights of another size": (lambda f: _edit_config(f, d_ff=40), "has shape"),
    "fewer layers": (lambda f: _edit_config(f, num_layers=4), "lack tensor encoder.block.3"),
    "more layers": (lambda f: _edit_config(f, num_layers=2), "have the extra tensor encoder.bl"),
    "a decoder alone": (
        lambda f: _change(f, lambda t: [t.pop(n) for n in list(t) if not n.startswith("dec")]),
        "holds no T5 encoder",
    ),
    "half a file": (lambda f: _cut_in_half(f / "model.safetensors"), "not a readable safet"),
    "a part that is missing": (_without_a_part, "model-00002-of-00002.safetensors is missing"),
    "an index that leads out": (_index_that_leads_out, "names no files of an encoder in its"),
    "values that are no numbers": (
        lambda f: _change(f, lambda t: t["shared.weight"][0].fill_(float("nan"))),
        "tensor shared.weight in .* infinite or not a number",
    ),
    "quantised weights": (
        lambda f: _change(f, lambda t: t.update({"shared.weight": t["shared.weight"].char()})),
        "shared.weight in .* is int8",
    ),
    "code in a pickle": (_pickled_code, "no plain file of weights"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer"),
    "a damaged tokenizer": (lambda f: _cut_in_half(f / "tokenizer.json"), "not a readable tok"),
    "a tokenizer with more tokens": (lambda f: _small_vocabulary(f), "tokenizer of 1542 tokens"),
}


def _small_vocabulary(folder: Path) -> None:
    _edit_config(folder, vocab_size=1000)
    _change(folder, lambda t: t.update({"shared.weight": t["shared.weight"][:1000].clone()}))


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_loaded_is_one_sentence(
    case: str, forms: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, sentence = UNUSABLE[case]
    folder = shutil.copytree(forms["safetensors"], tmp_path / "t5")
    spoil(folder)
    with pytest.raises(TextError, match=sentence) as error:
        load_text_encoder(folder, device="cpu")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert "harm" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("no/such/folder/anywhere", "does not exist; give a folder, a Hugging Face id"),
        (__file__, "is a file; give the folder"),
        ("google-t5/t5-11b", "not in the Hugging Face cache"),
    ],
)
def test_a_path_that_is_none_is_one_sentence(path: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_text_encoder(path, device="cpu")


@pytest.mark.parametrize("package", ["transformers", "tokenizers"])
def test_without_the_extra_it_says_what_to_install(package: str) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"  # what an import of it then raises
        "from cosmos_posttrain.launch import run_cli\n"
        "from cosmos_posttrain.text import load_text_encoder\n"
        "run_cli(lambda: load_text_encoder('tiny', 'cpu') and None)"
    )
    finished = run_script(["-c", program])
    assert finished.returncode == 2
    assert finished.stderr == (
        f"error: prompts are encoded with the package {package}, which is not installed; run "
        "pip install '.[video2world]'.\n"
    )


LOAD = """
import sys
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.text import load_text_encoder
run_cli(lambda: print(load_text_encoder(sys.argv[1], "cpu").id))
"""


@pytest.mark.parametrize(
    "form", ["safetensors", pytest.param("PyTorch's file", marks=pytest.mark.slow)]
)
def test_from_a_hub_comes_what_is_needed_and_the_commit_is_the_name(
    forms: dict[str, Path], form: str, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in forms[form].iterdir()}
    if form == "safetensors":
        files["pytorch_model.bin"] = b"not wanted beside safetensors"
    files |= {"tf_model.h5": b"not wanted", "modeling_evil.py": b"print('harm done')"}
    with hub_server.serve({"acme/t5": files}) as hub:
        environment = hub.environment(tmp_path)
        finished = run_script(["-c", LOAD, "acme/t5@v1"], env=environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"acme/t5@{hub_server.COMMIT}\n"
    got = {path.name for path in tmp_path.rglob("snapshots/*/*")}
    assert not got & {"tf_model.h5", "modeling_evil.py"}
    assert ("pytorch_model.bin" in got) == (form != "safetensors")
    # Then without the hub, by the name that it gave itself.
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    again = run_script(["-c", LOAD, f"acme/t5@{hub_server.COMMIT}"], env=offline)
    assert again.stdout == finished.stdout, again.stderr


def test_the_default_is_pinned_to_a_commit() -> None:
    name, _, revision = DEFAULT_TEXT_ENCODER.partition("@")
    assert name == "google-t5/t5-11b" and len(revision) == 40
    assert int(revision, 16) > 0


def test_a_tokenizer_that_pads_and_cuts_by_itself_is_told_not_to(tmp_path: Path) -> None:
    value = json.loads((t5.TINY / "tokenizer.json").read_text())
    value["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    (tokens,) = read_tokenizer(tmp_path, 32, 1)(["the red ball moves to the left"])
    assert len(tokens.ids) == 8 and tokens.cut_at is None
