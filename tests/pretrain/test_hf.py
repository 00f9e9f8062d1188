"""What is exported is imported with the same bits, on any mesh; a folder that is not whole is refused in one line."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Raw

from pretrain.config import ConfigError
from pretrain.families import FAMILIES, different_fields, model_config
from pretrain.hf import HfFolder, Stated, export_model
from pretrain.model.layers import LinearScaling, Llama3Scaling, Rope
from pretrain.model.transformer import LayerKind, ModelConfig, abstract_params, forward, logits
from pretrain.pretrained import check_same_tokenizer, load_init, open_pretrained
from pretrain.safetensors_file import open_tensors, write_tensors
from pretrain.sharding import MeshConfig, OnMesh, make_mesh
from pretrain.tokenizer import BytesConfig, ByteTokenizer, FolderTokenizerConfig, stated_vocab_size

_SHAPE = {"num_layers": 3, "width": 16, "num_heads": 4, "num_kv_heads": 2, "head_width": 8, "hidden_width": 32, "dtype": "float32"}  # fmt: skip
_GEMMA = {
    "activation": "gelu_tanh",
    "embed_scale": True,
    "norm_plus_one": True,
    "post_norms": True,
    "tied_head": True,
}
_GLOBAL = LayerKind(rope=Rope(theta=1e6))

MODELS = {
    "llama": ModelConfig(**_SHAPE, qk_norm=False, layer_pattern=(LayerKind(rope=Rope(theta=5e5)),)),
    "llama_tied_scaled": ModelConfig(
        **_SHAPE,
        qk_norm=False,
        tied_head=True,
        layer_pattern=(
            LayerKind(rope=Rope(theta=5e5, scaling=Llama3Scaling(factor=4.0, original_length=16))),
        ),
    ),
    "qwen2": ModelConfig(**_SHAPE, qk_norm=False, qkv_bias=True, layer_pattern=(_GLOBAL,)),
    "qwen2_tied": ModelConfig(**_SHAPE, qk_norm=False, qkv_bias=True, tied_head=True, layer_pattern=(_GLOBAL,)),
    "qwen3": ModelConfig(**_SHAPE, layer_pattern=(_GLOBAL,)),
    "qwen3_tied": ModelConfig(**_SHAPE, tied_head=True, layer_pattern=(_GLOBAL,)),
    "gemma2": ModelConfig(
        **_SHAPE,
        **_GEMMA,
        qk_norm=False,
        attention_scale=16**-0.5,
        attention_softcap=5.0,
        final_softcap=3.0,
        layer_pattern=(LayerKind(window=4), LayerKind()),
    ),
    "gemma3": ModelConfig(
        **_SHAPE,
        **_GEMMA,
        attention_scale=16**-0.5,
        layer_pattern=(
            LayerKind(window=4),
            LayerKind(window=4),
            LayerKind(rope=Rope(theta=1e6, scaling=LinearScaling(factor=8.0))),
        ),
    ),
}  # fmt: skip


def random_params(model, vocab_size, seed=0):
    """As a trained model has them: norms and biases are not at their start."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = leaf.shape[-2] if len(leaf.shape) > 2 else 64
        return jax.numpy.asarray((0.5 + random.normal(size=leaf.shape)) * fan_in**-0.5, np.float32)

    return jax.tree.map(draw, abstract_params(model, vocab_size))


V = 260
TOKENIZER = ByteTokenizer()
# Small enough that every model takes several files.
SMALL_FILES = {"max_file_bytes": 8000}


def export(folder, name, **options):
    model = MODELS[name]
    params = random_params(model, V)
    return export_model(folder, params, model, TOKENIZER, **options), params, model


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder, params, model = export(tmp_path_factory.mktemp("export") / "qwen", "qwen3", **SMALL_FILES)
    return folder, params, model


@pytest.mark.parametrize("name", MODELS)
def test_export_then_import_is_the_identity_on_any_mesh(tmp_path, name):
    folder, params, model = export(tmp_path / name, name, **SMALL_FILES)
    source = HfFolder(path=str(folder))
    assert different_fields(source.model_config(), model) == []
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same_bits(source.params(model), params)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    on_mesh = source.params(model, mesh)
    assert_same_bits(on_mesh, params)
    assert len(on_mesh["embed"]["embedding"].sharding.device_set) == 8
    # From the mesh back to a file: the same bytes.
    again = export_model(tmp_path / "again", on_mesh, model, TOKENIZER, **SMALL_FILES)
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_bfloat16_files_hold_every_bit_of_bfloat16_parameters(tmp_path):
    model = MODELS["llama"]
    params = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16).astype(np.float32), random_params(model, V))
    folder = export_model(tmp_path / "half", params, model, TOKENIZER, dtype="bfloat16")
    assert_same_bits(HfFolder(path=str(folder)).params(model), params)


def test_families_keep_apart_what_they_compute():
    """Each model is written as the first family that computes it, and only models that a family computes are."""
    for model in MODELS.values():
        others = [m for m in MODELS.values() if different_fields(m, model)]
        assert len(others) == len(MODELS) - 1
    assert len({f.model_type for f in FAMILIES}) == len(FAMILIES)


def test_a_folder_serves_as_init_and_is_told_from_a_checkpoint(qwen):
    folder, params, model = qwen
    loaded = load_init(str(folder), model, HfFolder(path=str(folder)).tokenizer(), None)
    assert_same_bits(loaded, params)
    assert open_pretrained(str(folder)) == HfFolder(path=str(folder))


def test_the_tokenizer_of_bytes_survives_export(qwen):
    tokenizer = HfFolder(path=str(qwen[0])).tokenizer()
    for text in ("h\u00e9llo <eos>\n\x00\u4f60", ""):
        assert tokenizer.encode(text) == TOKENIZER.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.sep_id) == (257, 258, 256, 259)
    check_same_tokenizer(HfFolder(path=str(qwen[0])), BytesConfig().build("", lambda n: iter(())))


def test_the_embedding_may_have_more_rows_than_the_tokenizer_ids(tmp_path):
    model = MODELS["qwen2_tied"]
    folder = export_model(tmp_path / "padded", random_params(model, 264), model, TOKENIZER)
    source = HfFolder(path=str(folder))
    assert source.vocab_size() == source.tokenizer().vocab_size == 264


def test_a_special_token_behind_the_vocabulary_needs_no_row(tmp_path):
    """As Gemma 3 publishes it: <image_soft_token> has the id after the last row, and no text is encoded to it."""
    folder, _, _ = export(tmp_path / "m", "gemma3")
    tokenizer = Raw.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image_soft_token>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    source = HfFolder(path=str(folder))
    assert source.tokenizer().vocab_size == source.vocab_size() == V
    text = "a <image_soft_token> b"
    assert source.tokenizer().encode(text) == TOKENIZER.encode(text)
    assert FolderTokenizerConfig(path=str(folder)).build("", lambda n: iter(())).vocab_size == V
    # One that text is encoded to does need its row, and so does one with a role.
    tokenizer.add_tokens(["word"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ConfigError, match="262 ids for an embedding of 260 rows"):
        source.tokenizer()


@pytest.mark.parametrize("order", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_of_several_modalities_is_imported(tmp_path, order):
    """The layout of the published Gemma 3 from 4B on, in both orders of names that there are."""
    model = dataclasses.replace(MODELS["gemma3"], num_heads=8, num_kv_heads=4)
    params = random_params(model, V)
    folder = export_model(tmp_path / "m", params, model, TOKENIZER)
    tensors = open_tensors(folder / "model.safetensors")
    renamed = {order + name.removeprefix("model."): t for name, t in tensors.items()}
    prefix = order.replace("language_model.", "").replace("model.", "") if order[0] == "l" else "model."
    renamed[prefix + "vision_tower.embeddings.weight"] = tensors["model.norm.weight"]
    renamed[prefix + "multi_modal_projector.mm_soft_emb_norm.weight"] = tensors["model.norm.weight"]
    values = [(name, t.shape, lambda t=t: t.read(0, t.shape[0])) for name, t in renamed.items()]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    with open(other / "model.safetensors", "wb") as file:
        write_tensors(file, values, "float32")

    def nest(values):
        text = {**values, "eos_token_id": 1}
        for left_to_the_default in ("num_attention_heads", "num_key_value_heads", "hidden_activation"):
            del text[left_to_the_default]
        whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [258, 10]}
        values.clear()
        values.update(whole)

    edit(other / "config.json", nest)
    (other / "generation_config.json").unlink()
    source = HfFolder(path=str(other))
    assert different_fields(source.model_config(), model) == []
    assert_same_bits(source.params(model), params)
    assert source.vocab_size() == source.tokenizer().vocab_size == V
    assert source.stated() == Stated(max_length=2048, eos_ids=(258, 10))


def test_the_vocabulary_of_gemma_3_is_that_of_its_family_where_it_states_none():
    assert (
        stated_vocab_size({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}) == 262_208
    )
    assert stated_vocab_size({"model_type": "gemma3", "text_config": {"vocab_size": 9}}) == 9
    assert stated_vocab_size({"model_type": "llama"}) is None


CHAT = {"default": "{{ messages[0]['content'] }}\n", "tools": "{% if tools %}x{% endif %}"}


@pytest.mark.parametrize("chat", [CHAT, {"default": CHAT["default"]}, {}])
def test_what_a_model_states_besides_its_mathematics_survives_export(tmp_path, chat):
    stated = Stated(max_length=8192, eos_ids=(258, 259), chat_templates=chat)
    folder, _, _ = export(tmp_path / "m", "llama", stated=stated)
    assert HfFolder(path=str(folder)).stated() == stated
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [258, 259]
    # As others lay it out: the list in config.json alone, templates in files.
    (folder / "generation_config.json").unlink()
    edit(folder / "tokenizer_config.json", lambda v: v.pop("chat_template", None))
    for name, text in chat.items():
        path = folder / (
            "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert HfFolder(path=str(folder)).stated() == stated


def test_an_exported_tokenizer_begins_texts_with_bos_where_the_model_was_trained_so(tmp_path):
    for add_bos, wanted in ((True, True), (False, False), (None, False)):
        folder, _, _ = export(tmp_path / str(add_bos), "llama", add_bos=add_bos)
        tokenizer = HfFolder(path=str(folder)).tokenizer()
        assert tokenizer.adds_bos == wanted
        assert tokenizer.encode("ab") == TOKENIZER.encode("ab")
        assert Raw.from_file(str(folder / "tokenizer.json")).encode("ab").ids == [257] * wanted + [97, 98]
    # And back: a file that asks for bos may be told not to.
    with_bos = HfFolder(path=str(tmp_path / "True")).tokenizer()
    assert with_bos.adding_bos(True) is with_bos
    assert not with_bos.adding_bos(False).adds_bos


# --- bad input ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(qwen, tmp_path):
    return shutil.copytree(qwen[0], tmp_path / "copy")


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refused(folder, model=MODELS["qwen3"]):
    with pytest.raises(ConfigError) as caught:
        HfFolder(path=str(folder)).params(model)
    return caught.value


def test_a_missing_file_is_named(folder):
    name = sorted(folder.glob("*.safetensors"))[1].name
    (folder / name).unlink()
    assert name in str(refused(folder))


def test_a_file_cut_short_is_named(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    for keep in (len(path.read_bytes()) - 1, 20, 5, 0):
        path.write_bytes(path.read_bytes()[:keep])
        error = refused(folder)
        assert len(error.faults) == 1
        assert path.name in error.faults[0]


def test_one_error_lists_every_tensor_that_is_missing_or_unknown(folder):
    index = folder / "model.safetensors.index.json"
    last = sorted(folder.glob("*.safetensors"))[-1]
    gone = [name for name, file in json.loads(index.read_text())["weight_map"].items() if file == last.name]
    edit(index, lambda v: [v["weight_map"].pop(name) for name in gone])
    (fault,) = refused(folder).faults
    assert all(name in fault for name in gone)
    assert "missing" in fault
    edit(folder / "config.json", lambda v: v.update(num_hidden_layers=2))
    model = model_config(json.loads((folder / "config.json").read_text()), "it")
    (fault,) = refused(folder, model).faults
    assert "unknown: " in fault
    assert all(f"model.layers.2.{name}.weight" in fault for name in ("input_layernorm", "mlp.down_proj"))


def test_a_tensor_of_another_shape_is_named(folder):
    edit(folder / "config.json", lambda v: v.update(intermediate_size=48))
    model = model_config(json.loads((folder / "config.json").read_text()), "it")
    (fault,) = refused(folder, model).faults
    assert "model.layers.0.mlp.gate_proj.weight [32, 16] for [48, 16]" in fault


def test_an_unknown_architecture_names_the_known_ones(folder):
    edit(folder / "config.json", lambda v: v.update(model_type="mamba"))
    (fault,) = refused(folder).faults
    assert "'mamba'" in fault
    assert "llama" in fault


def test_what_the_model_does_not_do_is_refused_all_at_once(folder):
    def change(values):
        values.update(hidden_act="relu", mlp_bias=True, rope_scaling={"rope_type": "yarn", "factor": 2.0})
        del values["rms_norm_eps"], values["hidden_size"]

    edit(folder / "config.json", change)
    with pytest.raises(ConfigError) as caught:
        HfFolder(path=str(folder)).model_config()
    text = str(caught.value)
    for word in ("relu", "mlp_bias", "yarn", "hidden_size"):
        assert word in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "16"}, ["hidden_size as a whole number of at least 1, got '16'"]),
        ({"num_attention_heads": 0, "rms_norm_eps": "small"}, ["num_attention_heads", "rms_norm_eps as a positive number"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings as true or false, got 1"]),
        ({"rope_theta": None, "rope_scaling": [8]}, ["rope_theta", "rope_scaling as an object, got [8]"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": "8"}}, ["rope_scaling, must state factor", "low_freq_factor, and does not"]),
        ({"layer_types": {"a": 1}}, ["layer_types as a list"]),
        ({"layer_types": [["full_attention"], 2, 3]}, ["layer_types of 3 layers"]),
        ({"vocab_size": "many"}, ["vocab_size as a positive whole number, got 'many'"]),
        ({"model_type": ["llama"]}, ["known architecture"]),
    ],
)  # fmt: skip
def test_a_config_of_the_wrong_types_is_refused_by_key_all_at_once(folder, changes, said):
    edit(folder / "config.json", lambda v: v.update(changes))
    source = HfFolder(path=str(folder))
    read = source.vocab_size if "vocab_size" in changes else source.model_config
    with pytest.raises(ConfigError) as caught:
        read()
    assert len(caught.value.faults) >= len(said)
    for words in said:
        assert words in str(caught.value)


def test_statements_of_the_wrong_types_are_refused(folder):
    edit(folder / "config.json", lambda v: v.update(max_position_embeddings="long"))
    edit(folder / "generation_config.json", lambda v: v.update(eos_token_id=["</s>"]))
    with pytest.raises(ConfigError) as caught:
        HfFolder(path=str(folder)).stated()
    assert len(caught.value.faults) == 2
    edit(folder / "tokenizer_config.json", lambda v: v.update(eos_token=7))
    with pytest.raises(ConfigError, match="names no eos token"):
        HfFolder(path=str(folder)).tokenizer()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"shape": [1], "data_offsets": [0, 4]}, "x needs dtype"),
        ({"dtype": "F32", "data_offsets": [0, 4]}, "x needs dtype"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "x needs dtype"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4]}, "x needs dtype"),
        ({"dtype": "F32", "shape": [1], "data_offsets": "04"}, "x needs dtype"),
        (7, "x has no object but 7"),
    ],
)
def test_a_header_that_lacks_what_a_tensor_needs_is_one_line(tmp_path, entry, said):
    path = tmp_path / "model.safetensors"
    header = json.dumps({"x": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ConfigError, match=f"a header that is damaged: {said}") as caught:
        open_tensors(path)
    assert len(caught.value.faults) == 1


def test_numbers_too_large_for_the_type_of_a_file_are_refused_by_the_name_of_their_tensor(tmp_path):
    model = MODELS["llama"]
    params = random_params(model, V)
    params["blocks"]["mlp"]["down"] = params["blocks"]["mlp"]["down"].at[1, 0, 0].set(-7e4)
    with pytest.raises(
        ConfigError, match=r"fit float16, at most 65504, got 70000 in model.layers.1.mlp.down_proj"
    ):
        export_model(tmp_path / "half", params, model, TOKENIZER, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    export_model(tmp_path / "brain", params, model, TOKENIZER, dtype="bfloat16")


def test_another_model_than_that_of_the_config_is_refused_field_by_field(folder):
    faults = refused(folder, ModelConfig(num_layers=4, width=16, num_heads=4, num_kv_heads=4, head_width=8, hidden_width=32)).faults  # fmt: skip
    assert any("num_layers=3 where model.num_layers is 4" in fault for fault in faults)
    assert any("num_kv_heads=2 where model.num_kv_heads is 4" in fault for fault in faults)


def test_another_tokenizer_than_the_models_is_refused(tmp_path, qwen):
    folder, _, model = qwen
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    # The same ids for other bytes: every text is another one.
    edit(other / "tokenizer.json", lambda v: v["model"]["vocab"].update({"a": 98, "b": 97}))
    with pytest.raises(ConfigError, match="must be that of"):
        load_init(str(folder), model, HfFolder(path=str(other)).tokenizer(), None)
    # More tokens than the embedding has rows.
    edit(other / "config.json", lambda v: v.update(vocab_size=200))
    with pytest.raises(ConfigError, match="260 ids for an embedding of 200 rows"):
        HfFolder(path=str(other)).tokenizer()


def test_a_gguf_file_needs_a_config_that_names_its_reader():
    with pytest.raises(ConfigError, match="GgufFile"):
        open_pretrained("model.gguf")


def test_an_export_is_whole_or_not_there(tmp_path):
    model = MODELS["llama"]
    odd = ModelConfig(num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=8, base_width=8)  # fmt: skip
    params = random_params(odd, V)
    with pytest.raises(ConfigError, match="must be of a published family"):
        export_model(tmp_path / "odd", params, odd, TOKENIZER)
    assert list(tmp_path.iterdir()) == []

    class Other:
        """A tokenizer without a tokenizer.json, found out after the tensors are written."""

        bos_id = eos_id = pad_id = sep_id = 0

    params = random_params(model, V)
    with pytest.raises(ConfigError, match="Other has none"):
        export_model(tmp_path / "other", params, model, Other())
    assert list(tmp_path.iterdir()) == []
    export_model(tmp_path / "whole", params, model, TOKENIZER)
    with pytest.raises(ConfigError, match="not there yet"):
        export_model(tmp_path / "whole", params, model, TOKENIZER)


def test_a_window_pattern_of_any_period_is_kept(tmp_path):
    pattern = (LayerKind(window=4), LayerKind(), LayerKind())
    model = ModelConfig(num_layers=7, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=8, layer_pattern=pattern)  # fmt: skip
    folder = export_model(tmp_path / "m", random_params(model, V), model, TOKENIZER)
    read = HfFolder(path=str(folder)).model_config()
    assert read.layer_pattern == pattern


def test_an_imported_model_computes_what_the_exported_one_did(qwen):
    folder, params, model = qwen
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) * 7 % V
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    both = [
        np.asarray(logits(forward(p, model, tokens, positions, None), p, model))
        for p in (params, HfFolder(path=str(folder)).params(model))
    ]
    np.testing.assert_array_equal(both[0], both[1])


# --- beside transformers -----------------------------------------------------------------------------

SENTENCE = "A window of four, and more than a few bytes."


@pytest.fixture
def torch():
    pytest.importorskip("transformers", reason="transformers and torch, the peer, are not installed")
    return pytest.importorskip("torch", reason="transformers and torch, the peer, are not installed")


def our_logits(source, model, ids, mesh=None):
    params = source.params(model, mesh)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    compute = OnMesh(jax.jit(lambda p, i, pos: logits(forward(p, model, i, pos, None), p, model)), mesh)
    return np.asarray(compute(params, ids, positions))


def their_logits(torch, peer, ids):
    with torch.no_grad():
        return peer.eval()(torch.tensor(ids.astype(np.int64))).logits.float().numpy()


def batch():
    ids = TOKENIZER.encode(SENTENCE)
    return np.stack([np.array(ids, np.int32), np.array(ids[::-1], np.int32)] * 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_what_was_exported(tmp_path, torch, name):
    transformers = pytest.importorskip("transformers")
    folder, _, model = export(tmp_path / name, name, **SMALL_FILES)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    ids = batch()
    np.testing.assert_allclose(
        our_logits(HfFolder(path=str(folder)), model, ids), their_logits(torch, peer, ids), atol=1e-4
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(SENTENCE, add_special_tokens=False)["input_ids"] == TOKENIZER.encode(SENTENCE)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (TOKENIZER.bos_id, TOKENIZER.eos_id)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_transformers_begins_with_bos_ends_at_every_eos_and_spells_chats(tmp_path, torch, name):
    transformers = pytest.importorskip("transformers")
    stated = Stated(max_length=512, eos_ids=(258, 10), chat_templates={"default": CHAT["default"]})
    folder, _, _ = export(tmp_path / "m", name, stated=stated, add_bos=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(SENTENCE)["input_ids"] == [TOKENIZER.bos_id, *TOKENIZER.encode(SENTENCE)]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert peer.generation_config.eos_token_id == [258, 10]
    assert peer.config.max_position_embeddings == tokenizer.model_max_length == 512
    # What transformers writes of it is read with the same statements.
    peer.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    source = HfFolder(path=str(tmp_path / "again"))
    assert source.stated() == stated
    assert source.tokenizer().adds_bos


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_wrote_is_computed_here_on_one_device_and_on_eight(tmp_path, torch, name):
    """With the config in the words of transformers, tensors of its own drawing, and its own split into files."""
    transformers = pytest.importorskip("transformers")
    folder, _, model = export(tmp_path / "first", name)
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    source = HfFolder(path=str(tmp_path / "theirs"))
    assert different_fields(source.model_config(), model) == []
    ids = batch()
    wanted = their_logits(torch, peer, ids)
    np.testing.assert_allclose(our_logits(source, model, ids), wanted, atol=1e-4)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    np.testing.assert_allclose(our_logits(source, model, ids, mesh), wanted, atol=1e-4)


@pytest.mark.slow
def test_transformers_and_we_read_the_same_text_model_in_a_gemma_of_several_modalities(tmp_path, torch):
    transformers = pytest.importorskip("transformers")
    folder, _, model = export(tmp_path / "text", "gemma3")
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=transformers.AutoConfig.from_pretrained(folder).to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=259,
    )
    torch.manual_seed(0)
    peer = transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).float()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    peer.save_pretrained(tmp_path / "theirs")
    source = HfFolder(path=str(tmp_path / "theirs"))
    assert different_fields(source.model_config(), model) == []
    ids = batch()
    np.testing.assert_allclose(our_logits(source, model, ids), their_logits(torch, peer, ids), atol=1e-4)


@pytest.mark.slow
def test_the_safetensors_package_reads_what_was_written_and_the_other_way_round(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="the [hf] extra is not installed")
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.float32([[1.5]])}
    with open(tmp_path / "ours.safetensors", "wb") as file:
        write_tensors(file, [(k, v.shape, lambda v=v: v) for k, v in tensors.items()], "float32")
    read = safetensors.load_file(tmp_path / "ours.safetensors")
    assert {k: v.tolist() for k, v in read.items()} == {k: v.tolist() for k, v in tensors.items()}
    safetensors.save_file(tensors, tmp_path / "theirs.safetensors")
    found = open_tensors(tmp_path / "theirs.safetensors")
    assert {k: t.read(0, t.shape[0]).tolist() for k, t in found.items()} == {k: v.tolist() for k, v in tensors.items()}  # fmt: skip
