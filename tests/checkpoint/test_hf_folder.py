"""Hugging Face folders: transformers alone generates our tokens from them, and they are read back.

transformers runs in a process of its own in which this package cannot be imported.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.contracts import data_of, make_tokenizer
from helpers.golden_ar import CASES, LOGIT_TOLERANCE, case_dir, case_io, max_difference
from safetensors.torch import load_file, save_file

from cosmos_posttrain.checkpoint import context, mapping
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.checkpoint.formats import hf
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.files import write_json
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.inference.engine import generate
from cosmos_posttrain.models.config import ModelConfig, YarnConfig
from cosmos_posttrain.models.reference_config import to_reference

BASE = ModelConfig(2, 32, 4, 2, 12, 48, 100, LatentShape(2, 2, 3), params_dtype="float32")
TEXT = dataclasses.replace(BASE, context_dim=20, context_len=8)

GROWN = LatentShape(3, 4, 3)
# A width that would change every frequency: it is the height that counts for both.
YARN = YarnConfig(LatentShape(2, 2, 30), scale=1.5)
GRIDS = {
    "interpolate": BASE.at_grid(GROWN, "interpolate"),
    "yarn": dataclasses.replace(BASE, latent_shape=GROWN, yarn=YARN),
    "text-interpolate": TEXT.at_grid(GROWN, "interpolate"),
    "text-yarn": dataclasses.replace(TEXT, latent_shape=GROWN, yarn=YARN),
}
MODELS = {
    f"{name}-{dtype}": dataclasses.replace(config, params_dtype=dtype)
    for name, config in GRIDS.items()
    for dtype in ("float32", "bfloat16")
}
NUM_GIVEN = 7
# Two steps of bfloat16 where logits reach 8.
ROUNDING = 2 * 2.0**-5

# What it does with each job: generates, scores the result, saves the model again; or says why not.
_PROGRAM = """
import json, sys
sys.modules["cosmos_posttrain"] = None  # importing it is an error
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for job in json.load(open(sys.argv[1])):
    options = {"dtype": job["dtype"], "trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(job["folder"], **options)
    inputs = load_file(job["inputs"])
    tokens = inputs.pop("tokens")
    try:
        clip = model.generate(tokens, **inputs, **job["options"])
        if "encoder_hidden_states" in inputs:  # several clips may have been made of one
            text = inputs["encoder_hidden_states"]
            inputs["encoder_hidden_states"] = text.repeat_interleave(len(clip) // len(tokens), 0)
        with torch.no_grad():
            logits = model(clip, **inputs).logits
            half = clip.shape[1] // 2
            cache = model(clip[:, :half], use_cache=True, **inputs).past_key_values
            rest = model(clip[:, half:], past_key_values=cache).logits  # the cache knows the text
    except ValueError as error:
        open(job["output"] + ".error", "w").write(str(error))
        continue
    save_file({"clip": clip, "logits": logits, "rest": rest}, job["output"])
    if job["saved"]:
        model.save_pretrained(job["saved"])
"""


@dataclass
class Job:
    """One call of ``generate``."""

    folder: Path
    inputs: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    saved: str = ""


def _convert(source: Path, target: Path, form: str = "hf", **options: Any) -> Path:
    convert(CheckpointConversionConfig(str(source), str(target), form, verify=True, **options))
    return target


def _make(folder: Path, config: ModelConfig) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, config.params_dtype)
    # Norms around one, matrices around zero.
    state = {
        name: (0.3 * torch.randn(shape, generator=generator) + len(shape) % 2).to(dtype)
        for name, shape in mapping.reference_shapes(config).items()
    }
    torch.save(state, folder / "model.pt")
    write_json(folder / "config.json", to_reference(config))
    return folder


def _inputs(config: ModelConfig, batch_size: int = 3) -> dict[str, torch.Tensor]:
    """Given tokens, and a text where the model takes one."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (batch_size, NUM_GIVEN), generator=generator)
    if config.context_dim is None:
        return {"tokens": tokens}
    tokens[:, 0] = config.bov_token
    text = torch.randn(batch_size, config.context_len, config.context_dim, generator=generator)
    return {"tokens": tokens, "encoder_hidden_states": text}


def _golden_inputs(name: str, num_tokens: int | None = None) -> dict[str, torch.Tensor]:
    """The first tokens of a case's two clips: those that are given there, or so many."""
    io, config = case_io(name), json.loads((case_dir(name) / "config.json").read_text())
    tokens = io["tokens"][:, : num_tokens or config["num_condition_tokens"]].long().contiguous()
    text = {"encoder_hidden_states": io["context"]} if "context" in io else {}
    return {"tokens": tokens, **text}


def _ours(folder: Path, inputs: dict[str, torch.Tensor], dtype: str = "float32") -> torch.Tensor:
    """The whole clips by this package, greedy."""
    model, tokens = load_model(folder, dtype=dtype), inputs["tokens"]
    missing = model.config.num_clip_tokens - tokens.shape[1]
    text = inputs.get("encoder_hidden_states")
    return torch.cat([tokens, generate(model, tokens, missing, temperature=0, context=text)], dim=1)


class World:
    """Converted folders, and what transformers makes of them, all in one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: dict[str, Job] = {}
        for name in CASES:
            target = _convert(case_dir(name), folder / f"golden-{name}")
            given = _golden_inputs(name)
            self.jobs[name] = Job(target, given)
            self.jobs[f"{name}-static"] = Job(target, given, {"cache_implementation": "static"})
            self.jobs[f"{name}-no-cache"] = Job(target, given, {"use_cache": False})
            all_but_one = case_io(name)["tokens"].shape[1] - 1
            self.jobs[f"{name}-logits"] = Job(target, _golden_inputs(name, all_but_one))
        for name, config in MODELS.items():
            source = _make(folder / name, config)
            target = _convert(source, folder / f"{name}-hf", max_shard_gb=8e-6)
            self.jobs[name] = Job(target, _inputs(config), saved=str(folder / f"{name}-saved"))
        self._add_calls()
        self._add_refusals()

    def _add_calls(self) -> None:
        base, text = (self.jobs[f"{name}-float32"] for name in ("yarn", "text-yarn"))
        beams = {"num_beams": 3, "num_return_sequences": 2, "max_length": 12}
        self.jobs["beams"] = dataclasses.replace(text, options=beams, saved="")
        self.jobs["rounded"] = dataclasses.replace(
            base, dtype="bfloat16", saved=str(self.folder / "rounded-saved")
        )

    def _add_refusals(self) -> None:
        base, text = (self.jobs[f"{name}-float32"] for name in ("yarn", "text-yarn"))
        tokens, rows = text.inputs["tokens"], text.inputs["encoder_hidden_states"]
        mask = torch.ones_like(tokens)
        mask[1, 0] = 0
        for name, job, inputs in (
            ("too long", base, {"tokens": torch.zeros(1, 37, dtype=torch.long)}),
            ("padded", base, {**base.inputs, "attention_mask": mask}),
            ("text for base", base, {**base.inputs, "encoder_hidden_states": rows}),
            ("no text", text, {"tokens": tokens}),
            ("narrow text", text, {**text.inputs, "encoder_hidden_states": rows[..., 1:].clone()}),
            ("no bov", text, {**text.inputs, "tokens": tokens - 1}),
        ):
            options = {"max_new_tokens": 2}
            self.jobs[name] = Job(job.folder, inputs, options)

    @cached_property
    def results(self) -> dict[str, dict[str, torch.Tensor] | str]:
        """Clips and their logits by job, or the error's text."""
        run = self.folder / "run"
        run.mkdir()
        described = []
        for number, job in enumerate(self.jobs.values()):
            inputs, output = run / f"{number}.inputs", run / f"{number}.output"
            save_file(job.inputs, inputs)
            named = {"folder": str(job.folder), "inputs": str(inputs), "output": str(output)}
            described.append(
                {"options": job.options, "dtype": job.dtype, "saved": job.saved} | named
            )
        write_json(run / "jobs.json", described)
        finished = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(run / "jobs.json")],
            env={**os.environ, "HF_HOME": str(run / "home"), "HF_HUB_OFFLINE": "1"},
            cwd=run,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == 0, finished.stderr
        outputs = [Path(entry["output"]) for entry in described]
        return {
            name: load_file(path) if path.exists() else Path(f"{path}.error").read_text()
            for name, path in zip(self.jobs, outputs, strict=True)
        }

    def result(self, name: str) -> dict[str, torch.Tensor]:
        """Clips and logits of a job that was done."""
        result = self.results[name]
        assert isinstance(result, dict), result
        return result


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("name", CASES)
def test_transformers_generates_the_golden_tokens(name: str, world: World) -> None:
    """Both clips of the case in one batch, with a growing cache, a static one and none."""
    given, io = _golden_inputs(name), case_io(name)
    wanted, golden = _ours(case_dir(name), given), io["greedy_tokens"].long().flatten()
    start = given["tokens"].shape[1]
    assert torch.equal(wanted[0, start : start + len(golden)], golden)
    for how in ("", "-static", "-no-cache"):
        assert torch.equal(world.result(name + how)["clip"], wanted), how
    seen = slice(0, io["tokens"].shape[1] - 1)  # the last token was generated
    logits, rest = (world.result(f"{name}-logits")[key] for key in ("logits", "rest"))
    assert max_difference(rest, logits[:, -rest.shape[1] :]) <= LOGIT_TOLERANCE
    assert max_difference(logits[:, seen], io["logits"][:, seen]) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_other_grids_and_dtypes(name: str, world: World) -> None:
    """Scaled positions: equal tokens in float32, in bfloat16 equal up to its rounding."""
    source, job, result = world.folder / name, world.jobs[name], world.result(name)
    assert len(list(job.folder.glob("*.safetensors"))) > 3
    clip, config = result["clip"], open_source(source).config
    assert clip.shape == (3, config.num_clip_tokens)
    if config.params_dtype == "float32":
        assert torch.equal(clip, _ours(source, job.inputs))
        return
    assert result["logits"].dtype == torch.bfloat16
    model = load_model(source, dtype="bfloat16")
    logits = model.logits(clip, job.inputs.get("encoder_hidden_states"))
    assert 4 < logits.abs().max() < 8
    assert max_difference(logits, result["logits"].float()) <= ROUNDING
    # Each token was the most likely one, or as likely as that within the rounding.
    logits, chosen = logits[:, NUM_GIVEN - 1 : -1], clip[:, NUM_GIVEN:]
    missed = logits.amax(-1) - logits.gather(-1, chosen[..., None]).squeeze(-1)
    assert missed.max() <= ROUNDING


def test_beams_have_their_text_each(world: World) -> None:
    """The likelihood of a clip's best beam is at least that of its greedy tokens."""
    beams, greedy = world.result("beams"), world.result("text-yarn-float32")
    assert beams["clip"].shape == (6, 12)
    text = world.jobs["beams"].inputs["encoder_hidden_states"]
    model = load_model(world.folder / "text-yarn-float32")

    def likelihood(clips: torch.Tensor) -> torch.Tensor:
        scores = model.logits(clips, text).log_softmax(-1)[:, NUM_GIVEN - 1 : -1]
        return scores.gather(-1, clips[:, NUM_GIVEN:, None]).sum((1, 2))

    best = likelihood(beams["clip"][::2])
    assert (best >= likelihood(greedy["clip"][:, :12]) - LOGIT_TOLERANCE).all()
    assert (best >= likelihood(beams["clip"][1::2])).all()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too long", r"^37 tokens do not fit the grid \(3, 4, 3\); a clip has 36"),
        ("padded", "cannot be padded; give a batch equally many"),
        ("text for base", "takes no text; leave out encoder_hidden_states"),
        ("no text", r"needs a text; give encoder_hidden_states, \(B, L, 20\)"),
        ("narrow text", r"has shape \(3, 8, 19\); give \(3, L, 20\)"),
        ("no bov", "must begin with <bov>, token 100"),
    ],
)
def test_what_a_folder_refuses(name: str, words: str, world: World) -> None:
    result = world.results[name]
    assert isinstance(result, str) and re.search(words, result), result


@pytest.mark.parametrize("name", MODELS)
def test_folders_are_read_back(name: str, world: World, tmp_path: Path) -> None:
    """Ours, and what transformers saved after it had loaded one."""
    source = world.folder / name
    before = torch.load(source / "model.pt", weights_only=True)
    world.result(name)
    for folder in (world.jobs[name].folder, Path(world.jobs[name].saved)):
        found = open_source(folder)
        assert found.format is not None and found.format.name == "hf"
        assert found.config == open_source(source).config == MODELS[name]
        back = torch.load(
            _convert(folder, tmp_path / folder.name, "pt") / "model.pt", weights_only=True
        )
        assert list(back) == list(before)
        assert all(t.dtype == back[k].dtype and torch.equal(t, back[k]) for k, t in before.items())


def test_a_dtype_that_transformers_saved(world: World) -> None:
    world.result("rounded")
    saved = open_source(world.folder / "rounded-saved")
    assert saved.config == dataclasses.replace(MODELS["yarn-float32"], params_dtype="bfloat16")
    dtypes = {dtype for _, dtype in saved.open_weights().tensors().values()}
    assert dtypes == {torch.bfloat16}


def test_the_record_of_the_data_goes_along(tmp_path: Path) -> None:
    source = _make(tmp_path / "source", BASE)
    trained = _convert(source, tmp_path / "trained", "megatron")
    data = data_of(make_tokenizer("codes", 100))
    context.write_data(trained, data)
    folder = _convert(trained, tmp_path / "hf")
    assert open_source(folder).data == data
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "modeling_cosmos_ar.py"),
        *("README.md", "context", "conversion.json"),
    }
    card = (folder / "README.md").read_text()
    assert "library_name: transformers\n" in card and "clip = model.generate(tokens)\n" in card
    assert "| tokenizer | codes |" in card
    back = _convert(folder, tmp_path / "back", "megatron")
    assert open_source(back).data == data and open_source(back).config == BASE
    # Another format in its place leaves nothing of it.
    _convert(trained, folder, "pt", overwrite=True)
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.pt", "config.json", "conversion.json"}


def test_a_damaged_config(tmp_path: Path) -> None:
    folder = _convert(_make(tmp_path / "source", BASE), tmp_path / "hf")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        open_source(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="but no config"):
        open_source(folder)


def test_the_modelling_file_is_never_read(tmp_path: Path) -> None:
    folder = _convert(_make(tmp_path / "source", BASE), tmp_path / "hf")
    (folder / hf.MODELLING.name).write_text("raise SystemExit('executed')")
    assert load_model(folder).config == BASE


def test_the_modelling_file_stands_alone() -> None:
    imported = set()
    for node in ast.walk(ast.parse(hf.MODELLING.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}
