"""Vectors by a server: one a text in order, a busy server is asked again, a wrong reply is an error."""

import hashlib
import json

import numpy as np
import pytest

pytest.importorskip("openai", reason="the [endpoint] extra is not installed")

from synth.llm.api import Overloaded  # noqa: E402
from synth.llm.endpoint import EndpointConfig  # noqa: E402
from synth.sbp.embed import AskedConfig  # noqa: E402


def vector(text):
    return [b / 255 for b in hashlib.sha256(text.encode()).digest()[:8]]


@pytest.fixture
def embedding_server(chat_server):
    """The chat server with another answer: embeddings, in reverse order, which the index repairs."""

    class Server(chat_server):
        drops = 0

        def _payload(self, body, fault):
            payload = super()._payload({**body, "messages": [{"content": ""}]}, fault)
            if fault != "ok":
                return payload
            items = [{"index": i, "embedding": vector(text)} for i, text in enumerate(body["input"])]
            return json.dumps({"data": items[self.drops :][::-1]}).encode(), 200, ""

    return Server


def embed(server, texts, **fields):
    endpoint = EndpointConfig(model="m", base_url=server.url, api_key_env="", concurrency=4)
    return AskedConfig(model=endpoint, texts_a_call=3, first_wait_s=0.01, **fields).build(None).vectors(texts)


TEXTS = [f"text {i}" for i in range(10)]


def test_each_text_gets_its_vector_also_from_a_busy_server(embedding_server, faults):
    with embedding_server(lambda body: "", faults(1, {"429": 0.4})) as server:
        found = embed(server, TEXTS)
        assert server.num_requests > 4
    assert found == pytest.approx(np.array([vector(t) for t in TEXTS], np.float32))


def test_a_server_that_stays_busy_is_an_error(embedding_server):
    with embedding_server(lambda body: "", lambda n, body: "429") as server, pytest.raises(Overloaded):
        embed(server, TEXTS, max_attempts=2)


def test_a_reply_without_a_vector_for_each_text_is_no_reply(embedding_server):
    embedding_server.drops = 1
    with embedding_server(lambda body: "") as server, pytest.raises(Overloaded, match="3 vectors"):
        embed(server, TEXTS, max_attempts=1)


def test_texts_are_cut(embedding_server):
    with embedding_server(lambda body: "") as server:
        found = embed(server, ["abcdef"], max_characters=3)
    assert found[0] == pytest.approx(np.array(vector("abc"), np.float32))
