"""Tokenizers give back any text, never read special tokens in it, and are the same on every training."""

import pickle

import hypothesis
import hypothesis.strategies as st
import pytest
from tokenizers import Tokenizer, models, normalizers

from pretrain.config import ConfigError
from pretrain.tokenizer import (
    LOSSLESS_PROBES,
    SPECIAL_TOKENS,
    BpeConfig,
    BytesConfig,
    TokenizerFileConfig,
    check_lossless,
)

CORPUS = [f"def f_{i}(x):\n    return x + {i}  # the {i}th sum\n" for i in range(300)] + [
    "naïve café 你好 " * 20
]


def train(vocab_size=400, texts=CORPUS):
    return BpeConfig(vocab_size=vocab_size).build("", lambda max_bytes: iter(texts))


@pytest.fixture(scope="module")
def bpe():
    return train()


@pytest.fixture(params=["bytes", "bpe", "file"])
def tokenizer(request, bpe, tmp_path):
    if request.param == "bytes":
        return BytesConfig().build("", lambda n: iter(()))
    if request.param == "bpe":
        return bpe
    bpe.save(tmp_path / "tokenizer.json")
    return TokenizerFileConfig(path="tokenizer.json").build(str(tmp_path), lambda n: iter(()))


def specials(tokenizer):
    return {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.sep_id}


# Everything that UTF-8 can say: all code points but surrogates; and texts made of what is special somewhere.
any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*SPECIAL_TOKENS, *LOSSLESS_PROBES, "\r\n", " ", "Ġ", "▁", "\u0301"])
).map("".join)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(text=any_text)
def test_round_trip_is_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not specials(tokenizer) & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert sum(map(tokenizer.token_bytes, ids)) == len(text.encode())


def test_special_ids_are_four_and_vanish_in_text(tokenizer):
    assert len(specials(tokenizer)) == 4
    assert max(specials(tokenizer)) < tokenizer.vocab_size
    ids = [
        tokenizer.bos_id,
        *tokenizer.encode("a"),
        tokenizer.sep_id,
        *tokenizer.encode("b"),
        tokenizer.eos_id,
    ]
    assert tokenizer.decode(ids) == "ab"
    assert all(tokenizer.token_bytes(i) == 0 for i in specials(tokenizer))


def test_a_batch_is_its_texts_apart(tokenizer):
    texts = [*CORPUS[:7], "", "<eos>"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_a_sample_cut_inside_a_character_still_decodes(tokenizer):
    byte_ids = tokenizer.encode("\U0001f680")
    assert "\ufffd" in tokenizer.decode(byte_ids[:1])


def test_pickling_keeps_special_tokens_out_of_text(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("<bos> x <eos>") == tokenizer.encode("<bos> x <eos>")
    assert copy.sha256 == tokenizer.sha256


def test_training_is_deterministic_and_uses_the_whole_vocabulary(bpe):
    again = train()
    assert again.sha256 == bpe.sha256
    assert again.vocab_size == 400
    assert train(texts=CORPUS[:-1]).sha256 != bpe.sha256


def test_a_saved_bpe_is_the_same_tokenizer(bpe, tmp_path):
    bpe.save(tmp_path / "t.json")
    loaded = BpeConfig(vocab_size=400).load((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert loaded.sha256 == bpe.sha256
    assert loaded.encode(CORPUS[3]) == bpe.encode(CORPUS[3])


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 260.*got 100"):
        BpeConfig(vocab_size=100)


def test_the_text_given_to_training_is_limited():
    asked = []
    BpeConfig(vocab_size=300, max_train_bytes=123).build("", lambda n: asked.append(n) or iter(CORPUS))
    assert asked == [123]


# --- an existing tokenizer.json ----------------------------------------------------------------------


def file_config(tmp_path, tokenizer, **fields):
    tokenizer.save(str(tmp_path / "t.json"))
    config = TokenizerFileConfig(path="t.json", **fields)
    return config.build(str(tmp_path), lambda n: iter(()))


def raw_tokenizer(bpe):
    return Tokenizer.from_str(bpe._text)


def test_one_token_may_have_several_roles(bpe, tmp_path):
    raw = raw_tokenizer(bpe)
    raw.add_special_tokens(["<|endoftext|>"])
    end = "<|endoftext|>"
    tokenizer = file_config(tmp_path, raw, bos=end, eos=end, pad=end, sep=end)
    assert specials(tokenizer) == {tokenizer.bos_id}
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def test_a_missing_special_token_is_named(bpe, tmp_path):
    with pytest.raises(
        ConfigError, match=r"data.tokenizer.eos must be a token of the file, got '</s>'.*<bos>"
    ):
        file_config(tmp_path, raw_tokenizer(bpe), eos="</s>")


def test_a_tokenizer_that_changes_text_is_refused_unless_allowed(bpe, tmp_path):
    raw = raw_tokenizer(bpe)
    raw.normalizer = normalizers.NFC()
    with pytest.raises(ConfigError, match="must give back the text.*require_lossless=false"):
        file_config(tmp_path, raw)
    assert file_config(tmp_path, raw, require_lossless=False).encode("plain")


@pytest.mark.parametrize("content", [b"{}", b"not json", b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ConfigError, match="must be a tokenizer.json"):
        TokenizerFileConfig(path="t.json").build(str(tmp_path), lambda n: iter(()))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must name a readable file, got .*nope.json"):
        TokenizerFileConfig(path="nope.json").build(str(tmp_path), lambda n: iter(()))


def test_the_probes_catch_a_tokenizer_without_bytes(tmp_path):
    raw = Tokenizer(models.BPE({"a": 0, "<bos>": 1, "<eos>": 2, "<pad>": 3, "<sep>": 4}, []))
    raw.add_special_tokens(list(SPECIAL_TOKENS))
    with pytest.raises(ConfigError, match="must give back the text"):
        check_lossless(file_config(tmp_path, raw, require_lossless=False), "t.json")
