"""Published model families: what their config.json says in ours, and where each of their tensors lies in ours.

A family is a row of data; the parameters of all of them are read by one loop and written by its inverse. A tensor
goes from its file to its devices a shard at a time: the host never holds more than one shard of one parameter.

Letters as in layers.py: D N K H F V L. A published matrix is [out, in], and heads are one dim with the head width.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from pretrain.config import ConfigError, to_json
from pretrain.health import named_leaves
from pretrain.model.layers import LinearScaling, Llama3Scaling, Rope
from pretrain.model.transformer import LayerKind, ModelConfig, Params, abstract_params, param_shardings

Json = Mapping[str, Any]
# Our parameter -> the name of its tensor, {} for the layer; gate and up are two tensors of one parameter.
Names = Mapping[str, str | tuple[str, ...]]

# Our parameter -> the dims of one layer of it, and the same dims as they lie in a published tensor.
_DIMS = {
    "embed.embedding": ("VD", "VD"),
    "head.kernel": ("DV", "VD"),
    "final_norm.scale": ("D", "D"),
    "blocks.attention_norm.scale": ("D", "D"),
    "blocks.attention.query": ("DNH", "NHD"),
    "blocks.attention.key": ("DKH", "KHD"),
    "blocks.attention.value": ("DKH", "KHD"),
    "blocks.attention.out": ("NHD", "DNH"),
    "blocks.attention.query_bias": ("NH", "NH"),
    "blocks.attention.key_bias": ("KH", "KH"),
    "blocks.attention.value_bias": ("KH", "KH"),
    "blocks.attention.query_norm.scale": ("H", "H"),
    "blocks.attention.key_norm.scale": ("H", "H"),
    "blocks.post_attention_norm.scale": ("D", "D"),
    "blocks.mlp_norm.scale": ("D", "D"),
    "blocks.mlp.gate_up": ("DF", "FD"),
    "blocks.mlp.down": ("FD", "DF"),
    "blocks.post_mlp_norm.scale": ("D", "D"),
}

_COMMON_NAMES: Names = {
    "embed.embedding": "model.embed_tokens.weight",
    "head.kernel": "lm_head.weight",
    "final_norm.scale": "model.norm.weight",
    "blocks.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "blocks.attention.query": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.attention.key": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.attention.value": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.attention.out": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.attention.query_bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks.attention.key_bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks.attention.value_bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks.attention.query_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.attention.key_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.mlp.gate_up": (
        "model.layers.{}.mlp.gate_proj.weight",
        "model.layers.{}.mlp.up_proj.weight",
    ),
    "blocks.mlp.down": "model.layers.{}.mlp.down_proj.weight",
}
# What others call post-attention norm is, without post norms, the norm before the feed-forward.
_PRE_NORM_NAMES: Names = _COMMON_NAMES | {
    "blocks.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
}
_POST_NORM_NAMES: Names = _COMMON_NAMES | {
    "blocks.post_attention_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.mlp_norm.scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "blocks.post_mlp_norm.scale": "model.layers.{}.post_feedforward_layernorm.weight",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: what it fixes, what its config.json leaves out, how its tensors are called."""

    model_type: str
    architecture: str
    names: Names
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]  # of keys of config.json
    activation_key: str = "hidden_act"
    local_theta: bool = False  # windowed layers rotate with a base of their own


_GEMMA = {
    "activation": "gelu_tanh",
    "embed_scale": True,
    "norm_plus_one": True,
    "post_norms": True,
    "qkv_bias": False,
}
FAMILIES = (
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        names=_PRE_NORM_NAMES,
        fixed={"qk_norm": False, "qkv_bias": False},
        defaults={"tie_word_embeddings": False, "rope_theta": 10_000.0},
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        names=_PRE_NORM_NAMES,
        fixed={"qk_norm": False, "qkv_bias": True},
        defaults={"tie_word_embeddings": False, "rope_theta": 10_000.0},
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        names=_PRE_NORM_NAMES,
        fixed={"qk_norm": True, "qkv_bias": False},
        defaults={"tie_word_embeddings": False, "rope_theta": 10_000.0, "head_dim": 128},
    ),
    Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        names=_POST_NORM_NAMES,
        fixed={"qk_norm": False, **_GEMMA},
        defaults={
            "tie_word_embeddings": True, "rope_theta": 10_000.0, "head_dim": 256, "sliding_window": 4096, "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        activation_key="hidden_activation",
    ),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        names=_POST_NORM_NAMES,
        fixed={"qk_norm": True, **_GEMMA},
        defaults={
            "tie_word_embeddings": True, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "head_dim": 256,
            "sliding_window": 4096, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
            "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh",
        },
        activation_key="hidden_activation",
        local_theta=True,
    ),
)  # fmt: skip
# Architectures of several models -> the one that reads and writes text: its config lies under `text_config`.
_TEXT_PARTS = {"gemma3": "gemma3_text"}
# How names of tensors in their files begin -> how they begin in files of the text model alone. transformers has
# written both orders; None: tensors of the other models.
_TEXT_PREFIXES: Mapping[str, str | None] = {
    "language_model.": "",
    "model.language_model.": "model.",
    "vision_tower.": None,
    "model.vision_tower.": None,
    "multi_modal_projector.": None,
    "model.multi_modal_projector.": None,
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def family_of(config: Json, where: str) -> Family:
    """The family that a config.json names.

    Raises:
      ConfigError: it names none that is known.
    """
    found = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == found:
            return family
    known = ", ".join([*(family.model_type for family in FAMILIES), *_TEXT_PARTS])
    raise ConfigError(f"{where} must be of a known architecture ({known}), got model_type {found!r}")


def text_part(config: Json) -> Json:
    """The config of the model that reads text: the whole one, unless it is of several models."""
    text, family = config.get("text_config"), _TEXT_PARTS.get(str(config.get("model_type")))
    if family is None or not isinstance(text, Mapping):
        return config
    # What ends a text is said of the whole; a text_config repeats the default there.
    said = {key: config[key] for key in ("eos_token_id",) if key in config}
    return {**config, **text, **said, "model_type": family}


def text_tensors(config: Json, stored: "Mapping[str, StoredTensor]") -> "Mapping[str, StoredTensor]":
    """The tensors of the model that reads text, called as in files of that model alone."""
    if str(config.get("model_type")) not in _TEXT_PARTS:
        return stored
    found = {}
    for name, tensor in stored.items():
        prefix = next((p for p in _TEXT_PREFIXES if name.startswith(p)), "")
        renamed = _TEXT_PREFIXES.get(prefix, "")
        if renamed is not None:
            found[renamed + name.removeprefix(prefix)] = tensor
    return found


# --- config.json -> ModelConfig ----------------------------------------------------------------------


def model_config(config: Json, where: str) -> ModelConfig:
    """The mathematics that a config.json describes, computed in float32 unless its field `dtype` is changed.

    Raises:
      ConfigError: an unknown architecture, a missing key, or something that this model does not do; all at once.
    """
    family = family_of(config, where)
    get = _Reader({**family.defaults, **config}, where)
    activation = get(
        family.activation_key, str, default="silu" if family.activation_key == "hidden_act" else None
    )
    if _ACTIVATIONS.get(activation) != family.fixed.get("activation", "silu"):
        get.fault(f"{family.activation_key} {activation!r}")
    for key, only in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("partial_rotary_factor", 1.0),
        ("use_bidirectional_attention", False),
    ):
        if key in config and config[key] is not None and config[key] != only:
            get.fault(f"{key} {config[key]!r}")
    if config.get("quantization_config"):
        get.fault("quantized tensors")
    width, num_heads = get("hidden_size", int), get("num_attention_heads", int)
    num_layers = get("num_hidden_layers", int)
    head_width = get("head_dim", int, default=None)
    scalar = get("query_pre_attn_scalar", float, default=None)
    values: dict[str, Any] = {
        "num_layers": num_layers,
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": get("num_key_value_heads", int, default=None) or num_heads,
        "head_width": width // num_heads if head_width is None else head_width,
        "hidden_width": get("intermediate_size", int),
        "layer_pattern": shortest_period(_layer_kinds(family, get, num_layers)),
        "tied_head": get("tie_word_embeddings", bool),
        "norm_eps": get("rms_norm_eps", float, default=1e-6),
        "attention_scale": None if scalar is None else float(scalar) ** -0.5,
        "attention_softcap": get("attn_logit_softcapping", float, default=None),
        "final_softcap": get("final_logit_softcapping", float, default=None),
    }
    get.check()
    return ModelConfig(**values, dtype="float32", **family.fixed)


# Types in a config.json: how a message calls them, and a value of each.
_KINDS: Mapping[type, tuple[str, Any]] = {
    int: ("a whole number", 1),
    float: ("a positive number", 1.0),
    bool: ("true or false", False),
    str: ("a text", ""),
    list: ("a list", []),
    dict: ("an object", {}),
}


class _Reader:
    """Values of a config.json; what is missing, of another type or not supported is collected."""

    def __init__(self, values: Json, where: str, faults: list[str] | None = None):
        self.values, self._where, self._faults = values, where, [] if faults is None else faults

    def __call__(self, key: str, kind: type, *, least: int = 1, **default: Any) -> Any:
        """The value of `key`, of a type in _KINDS. Whole numbers are at least `least`, others positive.

        Null is the default, where there is one. After a fault it is one that the reading can go on with.
        """
        value = self.values.get(key)
        if value is None and default:
            return default["default"]
        word, neutral = _KINDS[kind]
        if value is None:
            self._faults.append(f"{self._where} must state {key}, and does not")
            return neutral
        allowed = (int, float) if kind is float else kind
        right = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
        if right and kind is int:
            right = value >= least
        elif right and kind is float:
            right = value > 0
        if not right:
            number = f" of at least {least}" if kind is int else ""
            self._faults.append(f"{self._where} must state {key} as {word}{number}, got {value!r}")
            return default.get("default", neutral)
        return value

    def inside(self, key: str) -> "_Reader":
        """The object at `key`, empty where there is none."""
        return _Reader(self(key, dict, default=None) or {}, f"{self._where}, {key},", self._faults)

    def fault(self, what: str) -> None:
        self._faults.append(f"{self._where} asks for what this model does not do: {what}")

    def check(self) -> None:
        if self._faults:
            raise ConfigError(*self._faults)


def _layer_kinds(family: Family, get: _Reader, num_layers: int) -> list[LayerKind]:
    """The kind of every layer."""
    window = get("sliding_window", int, default=None)
    types = get("layer_types", list, default=None)
    if types is None:
        period = 1 if window is None else get("sliding_window_pattern", int, default=1)
        types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)]
        if get("use_sliding_window", bool, default=False):  # Qwen: the upper layers are windowed
            first = get("max_window_layers", int, least=0, default=0)
            types = [
                "sliding_attention" if window is not None and i >= first else "full_attention"
                for i in range(num_layers)
            ]
    unknown = sorted({str(t) for t in types} - {"sliding_attention", "full_attention"})
    if unknown or len(types) != num_layers:
        get.fault(f"layer_types of {len(types)} layers with {', '.join(unknown) or 'another count'}")
        return [LayerKind()]
    of_type = {
        "full_attention": LayerKind(rope=_rope(family, get, "full_attention")),
        "sliding_attention": LayerKind(window=window, rope=_rope(family, get, "sliding_attention")),
    }
    return [of_type[t] for t in types]


def _rope(family: Family, get: _Reader, layer_type: str) -> Rope:
    """Rotary embedding of a kind of layer: `rope_parameters`, or the older keys that it replaces."""
    local = family.local_theta and layer_type == "sliding_attention"
    inner = get.inside("rope_parameters")
    if layer_type in inner.values:
        inner, local = inner.inside(layer_type), False
    elif not inner.values and not local:
        inner = get.inside("rope_scaling")
    if local:
        return Rope(theta=float(get("rope_local_base_freq", float)))
    theta = float((inner if "rope_theta" in inner.values else get)("rope_theta", float))
    kind = inner("rope_type", str, default=None) or inner("type", str, default="default")
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, scaling=LinearScaling(factor=float(inner("factor", float))))
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=float(inner("factor", float)),
            low_frequency_factor=float(inner("low_freq_factor", float)),
            high_frequency_factor=float(inner("high_freq_factor", float)),
            original_length=inner("original_max_position_embeddings", int),
        )
        return Rope(theta=theta, scaling=scaling)
    get.fault(f"rotary scaling of type {kind!r}")
    return Rope(theta=theta)


def shortest_period(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The shortest pattern that repeats to `kinds`."""
    for period in range(1, len(kinds)):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return tuple(kinds[:period])
    return tuple(kinds)


# --- ModelConfig -> config.json ----------------------------------------------------------------------


def config_json(model: ModelConfig, vocab_size: int, max_length: int) -> tuple[Family, dict[str, Any]]:
    """The family that computes exactly what `model` does, and its config.json.

    Raises:
      ConfigError: there is none; the message says in which fields the nearest family differs.
    """
    nearest: list[str] | None = None
    for family in FAMILIES:
        values = _write(family, model, vocab_size, max_length)
        differences = different_fields(model_config(values, "the written config"), model)
        if not differences:
            return family, values
        if nearest is None or len(differences) < len(nearest):
            nearest = [f"{family.model_type} has {line}" for line in differences]
    raise ConfigError(
        f"an exported model must be of a published family, got one that none computes ({'; '.join(nearest or [])})"
    )


def different_fields(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """Fields that change what a model computes, apart from the precision it computes in: 'name=x where ...'."""
    pair = [_mathematics(theirs), _mathematics(ours)]
    return [
        f"{key}={pair[0][key]} where model.{key} is {pair[1][key]}"
        for key in pair[0]
        if pair[0][key] != pair[1].get(key)
    ]


def _mathematics(model: ModelConfig) -> dict[str, Any]:
    """All identity fields but the precision; layer by layer and with defaults filled in, so that spelling is no matter."""
    filled = dataclasses.replace(
        model,
        dtype="float32",
        layer_pattern=tuple(model.kind(i) for i in range(model.num_layers)),
        attention_scale=model.head_width**-0.5 if model.attention_scale is None else model.attention_scale,
    )
    values = to_json(filled, identity_only=True)
    # The square root of a published integer and the one of a stated fraction may differ in the last bit.
    values["attention_scale"] = round(values["attention_scale"], 12)
    return values


def _write(family: Family, model: ModelConfig, vocab_size: int, max_length: int) -> dict[str, Any]:
    """The config.json of this family that is nearest to `model`."""
    kinds = [model.kind(i) for i in range(model.num_layers)]
    windowed = [kind for kind in kinds if kind.window is not None]
    full = next((kind for kind in kinds if kind.window is None), kinds[-1])
    activation = family.fixed.get("activation", "silu")
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_width,
        "intermediate_size": model.hidden_width,
        family.activation_key: next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == activation),
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_head,
        "max_position_embeddings": max_length,
        "rope_theta": full.rope.theta,
        "attention_bias": False,
    }
    if full.rope.scaling is not None:
        values["rope_scaling"] = _scaling_json(full.rope)
    if "query_pre_attn_scalar" in family.defaults:
        scale = model.head_width**-0.5 if model.attention_scale is None else model.attention_scale
        values["query_pre_attn_scalar"] = round(scale**-2)  # a published config holds an integer
        values["attn_logit_softcapping"] = model.attention_softcap
        values["final_logit_softcapping"] = model.final_softcap
    if "sliding_window" in family.defaults or (windowed and family.model_type.startswith("qwen")):
        values["layer_types"] = [
            "full_attention" if kind.window is None else "sliding_attention" for kind in kinds
        ]
        values["sliding_window"] = windowed[0].window if windowed else max_length
    if family.model_type.startswith("qwen"):
        values |= {"use_sliding_window": bool(windowed), "max_window_layers": 0}
    if family.local_theta and windowed:
        values["rope_local_base_freq"] = windowed[0].rope.theta
    return values


def _scaling_json(rope: Rope) -> dict[str, Any]:
    match rope.scaling:
        case LinearScaling(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as s:
            return {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_frequency_factor,
                "high_freq_factor": s.high_frequency_factor,
                "original_max_position_embeddings": s.original_length,
            }
    raise AssertionError(f"no published form of {rope.scaling}")


# --- tensors -----------------------------------------------------------------------------------------


class StoredTensor(Protocol):
    """A tensor in a file, read by rows of its first dim."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...  # float32


# (our parameter, block in the order of the file, the letters of its dims) -> the same, put right.
Adjust = Callable[[str, np.ndarray, str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Place:
    """One tensor of a file in one parameter of ours."""

    parameter: str
    name: str
    layer: int | None
    part: int | None  # 0 gate, 1 up


def _places(params: Params, names: Names) -> Iterator[_Place]:
    """Every tensor that `params` consist of, parameter by parameter."""
    for parameter, leaf in named_leaves(params).items():
        if parameter not in _DIMS or parameter not in names:
            raise ConfigError(
                f"published files have no place for the parameter {parameter}; it cannot be read or written"
            )
        found = names[parameter]
        layers = range(leaf.shape[0]) if parameter.startswith("blocks.") else (None,)
        for layer in layers:
            if isinstance(found, str):
                yield _Place(parameter, found.format(layer), layer, None)
            else:
                for part, name in enumerate(found):
                    yield _Place(parameter, name.format(layer), layer, part)


def _groups(dims: str) -> list[str]:
    """The dims of a published tensor: letters, heads together with their width."""
    return re.findall("NH|KH|.", dims)


def _sizes(parameter: str, shape: Sequence[int]) -> dict[str, int]:
    """Letter -> size, from the shape of our parameter (with layers and the middle dim of gate and up)."""
    ours = _DIMS[parameter][0]
    if parameter.startswith("blocks."):
        shape = shape[1:]
    if parameter == "blocks.mlp.gate_up":
        shape = (shape[0], shape[2])
    return dict(zip(ours, shape, strict=True))


def published_shape(parameter: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of each published tensor of a parameter of ours with this shape."""
    sizes = _sizes(parameter, shape)
    return tuple(int(np.prod([sizes[letter] for letter in group])) for group in _groups(_DIMS[parameter][1]))


def load_params(
    model: ModelConfig,
    vocab_size: int,
    names: Names,
    stored: Mapping[str, StoredTensor],
    mesh: Mesh | None,
    *,
    where: str,
    ignore: Sequence[str] = (),
    adjust: Adjust | None = None,
) -> Params:
    """Parameters of `model` in float32 from stored tensors, each shard read from its rows and put on its devices.

    Raises:
      ConfigError: tensors are missing, unknown or of another shape; one error lists them all.
    """
    abstract = abstract_params(model, vocab_size)
    places = list(_places(abstract, names))
    shapes = {name: leaf.shape for name, leaf in named_leaves(abstract).items()}
    _check(places, shapes, stored, where, ignore)
    of_parameter: dict[str, list[_Place]] = {}
    for place in places:
        of_parameter.setdefault(place.parameter, []).append(place)
    if mesh is None:
        one = SingleDeviceSharding(jax.local_devices()[0])
        layouts = jax.tree.map(lambda _: one, abstract)
    else:
        layouts = param_shardings(abstract, mesh)

    def load(path: Any, leaf: Any, layout: Any) -> jax.Array:
        parameter = ".".join(entry.key for entry in path)
        return _load_leaf(parameter, leaf.shape, of_parameter[parameter], stored, layout, adjust)

    return jax.tree_util.tree_map_with_path(load, abstract, layouts)


def _check(
    places: Sequence[_Place],
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
    where: str,
    ignore: Sequence[str],
) -> None:
    wanted = {place.name: published_shape(place.parameter, shapes[place.parameter]) for place in places}
    missing = [name for name in wanted if name not in stored]
    unknown = [name for name in stored if name not in wanted and name not in ignore]
    other = [
        f"{name} {list(stored[name].shape)} for {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and tuple(stored[name].shape) != shape
    ]
    faults = [
        f"{what}: {', '.join(lines)}"
        for what, lines in (("missing", missing), ("unknown", unknown), ("of another shape", other))
        if lines
    ]
    if faults:
        raise ConfigError(f"{where} must hold the tensors of its model, got {'; '.join(faults)}")


def _load_leaf(
    parameter: str,
    shape: tuple[int, ...],
    places: Sequence[_Place],
    stored: Mapping[str, StoredTensor],
    layout: Any,
    adjust: Adjust | None,
) -> jax.Array:
    devices_of: dict[tuple, list[Any]] = {}
    for device, index in layout.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    parts = []
    for bounds, devices in devices_of.items():
        block = _read_block(parameter, shape, places, stored, bounds, adjust)
        parts += [jax.device_put(block, device) for device in devices]
        # Before the next block is read: otherwise the host may hold all of them, still to be transferred.
        jax.block_until_ready(parts)
    return jax.make_array_from_single_device_arrays(shape, layout, parts)


def _read_block(
    parameter: str,
    shape: tuple[int, ...],
    places: Sequence[_Place],
    stored: Mapping[str, StoredTensor],
    bounds: tuple[tuple[int, int], ...],
    adjust: Adjust | None,
) -> np.ndarray:
    """The part of a parameter within `bounds`, in our order of dims."""
    ours, theirs = _DIMS[parameter]
    sizes = _sizes(parameter, shape)
    out = np.empty([stop - start for start, stop in bounds], np.float32)
    layer_start, layer_stop = bounds[0] if parameter.startswith("blocks.") else (0, 1)
    inner = bounds[1:] if parameter.startswith("blocks.") else bounds
    if parameter == "blocks.mlp.gate_up":
        inner = (inner[0], inner[2])
    bound = dict(zip(ours, inner, strict=True))
    first, *rest = _groups(theirs)
    row_width = sizes["H"] if len(first) > 1 else 1
    assert "H" not in theirs or bound["H"] == (0, sizes["H"]), "head width is never split"
    start, stop = bound[first[0]]
    letters_of_rest = "".join(rest)
    order = [theirs.index(letter) for letter in ours]
    for place in places:
        layer = place.layer or 0
        if not layer_start <= layer < layer_stop:
            continue
        rows = stored[place.name].read(start * row_width, stop * row_width)
        block = rows.reshape([stop - start, *[sizes[k] for k in first[1:] + letters_of_rest]])
        if adjust is not None:
            block = adjust(parameter, block, theirs)
        whole = (slice(None),) * len(first)
        block = block[(*whole, *[slice(*bound[letter]) for letter in letters_of_rest])].transpose(order)
        target = out[layer - layer_start] if place.layer is not None else out
        if place.part is None:
            target[...] = block
        else:
            target[:, place.part] = block
    return out


def published_tensors(
    params: Params, names: Names
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """(name, shape, function that brings it to the host in float32), layer by layer: the inverse of `load_params`."""
    leaves = named_leaves(params)
    for place in sorted(_places(params, names), key=lambda p: -1 if p.layer is None else p.layer):
        leaf = leaves[place.parameter]
        yield place.name, published_shape(place.parameter, leaf.shape), _Fetch(place, leaf)


@dataclasses.dataclass(frozen=True)
class _Fetch:
    place: _Place
    leaf: Any

    def __call__(self) -> np.ndarray:
        ours, theirs = _DIMS[self.place.parameter]
        value = self.leaf if self.place.layer is None else _layer(self.leaf, np.int32(self.place.layer))
        host = np.asarray(value, np.float32)
        host = host if self.place.part is None else host[:, self.place.part]
        order = [ours.index(letter) for letter in theirs]
        shape = published_shape(self.place.parameter, self.leaf.shape)
        return np.ascontiguousarray(host.transpose(order)).reshape(shape)


@jax.jit
def _layer(leaf: jax.Array, layer: jax.Array) -> jax.Array:
    """One layer of a stacked parameter; the index is an argument, so all layers are one program."""
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
