"""The ``context`` folder of NeMo 2 checkpoints: parsed without NeMo, written for NeMo.

Flows in: ``context/io.json`` (a Fiddle configuration as JSON) or ``context/model.yaml``, which name
classes of the program that wrote them. Flows out: the model's numbers, in the field names of the
reference's ``config.json``. Nothing is imported: classes are only names here. The other way round,
a ``ModelConfig`` becomes both files, with ``cosmos_posttrain.nemo.CosmosModel`` as the class.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cosmos_posttrain.checkpoint.context import read_json
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.files import write_json, write_text
from cosmos_posttrain.models.config import VOCAB_SIZE_MULTIPLE, ModelConfig
from cosmos_posttrain.models.reference_config import to_reference

IO_FILE, YAML_FILE = "io.json", "model.yaml"
MODULE, MODEL_CLASS, CONFIG_CLASS = "cosmos_posttrain.nemo", "CosmosModel", "CosmosConfig"
_FIDDLE = "fiddle._src.config"

# NeMo's fields, and the reference's names of the same numbers.
_FIELDS = {
    "num_layers": "n_layers",
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_query_groups": "n_kv_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "ffn_hidden_size",
    "rotary_base": "rope_theta",
    "layernorm_epsilon": "norm_eps",
    "latent_shape": "video_latent_shape",
    "apply_yarn": "apply_yarn",
    "original_latent_shape": "original_latent_shape",
    "yarn_scale": "yarn_scale",
    "yarn_beta_fast": "yarn_beta_fast",
    "yarn_beta_slow": "yarn_beta_slow",
    "crossattn_emb_size": "context_dim",
    "context_len": "context_len",
    "position_scale": "position_scale",
}
# Rows of the embedding, and of the output layer where they differ. A tokenizer may name the former
# too, so they do not tell which object is the model's config.
_ROWS = ("vocab_size", "output_layer_vocab_size")
# What a model's config says in NeMo's words.
NAMES = (*_FIELDS, *_ROWS)
# A file that says these says all that it knows; the other need not be looked at.
_SIZES = {"num_layers", "hidden_size"}


def has_context(folder: Path) -> bool:
    """True where the folder's ``context`` is NeMo's."""
    return any((folder / "context" / name).is_file() for name in (IO_FILE, YAML_FILE))


def read(folder: Path) -> dict[str, Any]:
    """The numbers that a NeMo folder's context states, in the reference's field names.

    Not everything is in the files: the original program keeps some numbers as class attributes, and
    where it was given no config of the model, the files name none at all. The tensors' shapes tell
    most of the rest (``infer_config``).

    Raises:
        CheckpointError: a file is damaged.
    """
    context = folder / "context"
    found: dict[str, Any] = {}
    for name, from_file in ((IO_FILE, _from_fiddle), (YAML_FILE, _from_yaml)):
        if (context / name).is_file() and not found.keys() >= _SIZES:
            found = from_file(context / name) | found
    return reference_values(found)


def stated(tree: Any) -> dict[str, Any]:
    """The numbers that a tree of plain values states of a model, in the reference's field names."""
    return reference_values(_numbers(_mappings(tree)))


def reference_values(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is said in NeMo's field names, in the reference's."""
    values = {theirs: found[ours] for ours, theirs in _FIELDS.items() if ours in found}
    if "vocab_size" in found:
        values["vocab_size_in"] = found["vocab_size"]
    if "output_layer_vocab_size" in found:
        values["vocab_size"] = found["output_layer_vocab_size"]
    if "context_dim" in values:
        values |= {"insert_cross_attn": True, "apply_abs_pos_emb": True}
    return values


def _numbers(candidates: Iterable[Mapping[Any, Any]]) -> dict[str, Any]:
    """What is said by the object that says most of a model; nothing if none says anything.

    Classes have any name and lie at any depth, but only a model's config has a model's fields.
    """
    best: dict[str, Any] = {}
    for values in candidates:
        said = {name: values[name] for name in _FIELDS if values.get(name) is not None}
        if len(said) > len(best.keys() & _FIELDS.keys()):
            rows = {name: values[name] for name in _ROWS if values.get(name) is not None}
            best = said | rows
    return best


def _from_fiddle(path: Path) -> dict[str, Any]:
    objects = read_json(path).get("objects")
    if not isinstance(objects, dict):
        raise CheckpointError(f"{path} is not a configuration of NeMo's; copy it again.")
    return _numbers(_attributes(item, objects) for item in objects.values())


def _attributes(item: Any, objects: dict[str, Any]) -> dict[str, Any]:
    """The plain values among an object's attributes: leaves, and lists of leaves."""
    values = {}
    for label, entry in _items(item):
        if label.startswith("Attr(name='") and label.endswith("')"):
            values[label[len("Attr(name='") : -len("')")]] = _plain(entry, objects)
    return values


def _items(item: Any) -> Iterator[tuple[str, Any]]:
    pairs = item.get("items") if isinstance(item, dict) else None
    for pair in pairs if isinstance(pairs, list) else []:
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str):
            yield pair[0], pair[1]


def _plain(entry: Any, objects: dict[str, Any]) -> Any:
    if not isinstance(entry, dict):
        return entry
    if entry.get("type") == "leaf":
        return entry.get("value")
    if entry.get("type") == "ref":
        pairs = list(_items(objects.get(str(entry.get("key")))))
        if pairs and all(label.startswith("Index(") for label, _ in pairs):
            return [e.get("value") if isinstance(e, dict) else e for _, e in pairs]
    return None


def _from_yaml(path: Path) -> dict[str, Any]:
    return _numbers(_mappings(read_yaml(path)))


def read_yaml(path: Path) -> Any:
    """What a YAML file holds whose tags and ``_target_`` mean nothing here.

    Raises:
        CheckpointError: it is not YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML whose unknown tags mean nothing."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not YAML; copy it again.") from error


def _mappings(tree: Any) -> Iterator[dict[Any, Any]]:
    """All dicts in a tree, the outer ones first."""
    waiting, seen = deque([tree]), set[int]()
    while waiting:
        node = waiting.popleft()
        if id(node) in seen:  # YAML may hold itself
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def write(folder: Path, config: ModelConfig) -> None:
    """Writes ``context/io.json`` and ``context/model.yaml`` into an existing folder."""
    import yaml

    values = values_of(config)
    context = folder / "context"
    context.mkdir(exist_ok=True)
    write_json(context / IO_FILE, _Fiddle().dump(values, config.params_dtype))
    settings = {"_target_": f"{MODULE}.{CONFIG_CLASS}", **values}
    settings["params_dtype"] = {"_target_": f"torch.{config.params_dtype}", "_call_": False}
    tree = {"_target_": f"{MODULE}.{MODEL_CLASS}", "config": settings}
    write_text(context / YAML_FILE, yaml.safe_dump(tree, sort_keys=False))


def values_of(config: ModelConfig) -> dict[str, Any]:
    """The config in NeMo's (and Megatron-Bridge's) field names, with plain values."""
    # Through JSON, which turns named tuples into lists.
    reference = json.loads(json.dumps(to_reference(config)))
    values = {
        ours: reference[theirs] for ours, theirs in _FIELDS.items() if theirs in reference
    } | {
        "seq_length": config.seq_length,
        "vocab_size": reference["vocab_size_in"],
        "make_vocab_size_divisible_by": VOCAB_SIZE_MULTIPLE,
        "qk_layernorm": True,
        "rope_dim": "3D",
    }
    if reference["insert_cross_attn"]:
        values["output_layer_vocab_size"] = reference["vocab_size"]
        values["training_type"] = reference["training_type"]
        values["pad_to_multiple_of"] = reference["pad_to_multiple_of"]
    return values


class _Fiddle:
    """Fiddle's JSON: a table of objects that refer to each other by key."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}
        self._references: dict[str, int] = {}

    def dump(self, values: dict[str, Any], params_dtype: str) -> dict[str, Any]:
        """The context of a trainer with a model and its config, as NeMo saves it."""
        config = "<root>.model.config"
        items = [[f"Attr(name='{k}')", self._value(v, f"{config}.{k}")] for k, v in values.items()]
        items.append(["Attr(name='params_dtype')", _pyref("torch", params_dtype)])
        of_config = self._buildable(MODULE, CONFIG_CLASS, items, config)
        model = [["Attr(name='config')", of_config]]
        of_model = self._buildable(MODULE, MODEL_CLASS, model, "<root>.model")
        root = [
            ["Attr(name='model')", of_model],
            ["Attr(name='trainer')", self._value(None, "<root>.trainer")],
            ["Attr(name='extra')", self._empty_dict("<root>.extra")],
        ]
        of_root = self._buildable("nemo.lightning.io.pl", "TrainerContext", root, "<root>")
        refcounts = self._references
        return {
            "root": of_root,
            "objects": self._objects,
            "refcounts": refcounts,
            "version": "0.0.1",
        }

    def _add(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        number = 1 + sum(key.rsplit("_", 1)[0] == name for key in self._objects)
        key = f"{name}_{number}"
        self._objects[key] = value
        self._references[key] = 1
        return {"type": "ref", "key": key}

    def _value(self, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, list):
            return {"type": "leaf", "value": value, "paths": [path]}
        items = [[f"Index(index={n})", self._value(v, f"{path}[{n}]")] for n, v in enumerate(value)]
        kind = _pyref("builtins", "list")
        return self._add("list", {"type": kind, "items": items, "metadata": None, "paths": [path]})

    def _empty_dict(self, path: str | None = None) -> dict[str, Any]:
        keys: dict[str, Any] = {"type": _pyref("builtins", "tuple"), "items": [], "metadata": None}
        value = {"type": _pyref("builtins", "dict"), "items": [], "metadata": keys}
        return self._add("dict", value | ({"paths": [path]} if path else {}))

    def _buildable(self, module: str, name: str, items: list[Any], path: str) -> dict[str, Any]:
        labels = [label[len("Attr(name='") : -len("')")] for label, _ in items]
        names = {
            "type": _pyref("builtins", "tuple"),
            "items": [[f"Index(index={n})", label] for n, label in enumerate(labels)],
            "metadata": None,
        }
        traverser = _pyref(_FIDDLE, "BuildableTraverserMetadata")
        about = [
            ["Attr(name='fn_or_cls')", _pyref(module, name)],
            ["Attr(name='argument_names')", self._add("tuple", names)],
            ["Attr(name='argument_tags')", self._empty_dict()],
            ["Attr(name='argument_history')", self._empty_dict()],
        ]
        metadata = {"type": traverser, "items": about, "metadata": traverser}
        value = {
            "type": _pyref(_FIDDLE, "Config"),
            "items": items,
            "metadata": self._add("buildable_traverser_metadata", metadata),
            "paths": [path],
        }
        snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
        return self._add(snake, value)


def _pyref(module: str, name: str) -> dict[str, str]:
    return {"type": "pyref", "module": module, "name": name}
