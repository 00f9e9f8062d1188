"""The endpoint sorts what a server can do wrong, and every document ends in output or in the errors file."""

import asyncio
import dataclasses
import json
import time
from dataclasses import dataclass

import pytest

pytest.importorskip("openai", reason="the [endpoint] extra is not installed")

from pretrain.config import ConfigError  # noqa: E402
from synth.document import Document  # noqa: E402
from synth.entigraph.relations import EntiGraph  # noqa: E402
from synth.llm.api import BadRequest, LostCall, Overloaded, Request  # noqa: E402
from synth.llm.endpoint import EndpointConfig  # noqa: E402
from synth.recipe import RecipeConfig  # noqa: E402
from synth.shards import read_lines  # noqa: E402
from synth.stage import RunConfig, StageFailed  # noqa: E402

pytestmark = pytest.mark.slow

REQUEST = Request(system="be brief", user="say hello", max_tokens=20)


def ask(server, request=REQUEST, **fields):
    config = EndpointConfig(model="m", base_url=server.url, api_key_env="", timeout_s=1.0, **fields)

    async def one():
        llm = config.build()
        try:
            return await llm.generate(request)
        finally:
            await llm.close()

    return asyncio.run(one())


def test_a_reply_carries_text_usage_and_the_served_model(chat_server):
    with chat_server(lambda body: "hello there") as server:
        reply = ask(server)
    assert (reply.text, reply.finish, reply.model) == ("hello there", "stop", "served-model-1")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (7, 2)
    assert server.requests[0]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "say hello"},
    ]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("429", Overloaded),
        ("500", Overloaded),
        ("400", BadRequest),
        ("401", ConfigError),
        ("hang", LostCall),
        ("cut", LostCall),
        ("half", LostCall),
        ("garbage", LostCall),
        ("empty", LostCall),
        ("latin1", LostCall),
        ("surrogate", LostCall),
    ],
)
def test_every_fault_has_its_type(chat_server, fault, error):
    with chat_server(lambda body: "hello", lambda n, body: fault) as server, pytest.raises(error) as caught:
        ask(server)
    assert type(caught.value) is error


@pytest.mark.parametrize("fault", ["cut", "half"])
def test_a_reply_that_was_lost_is_charged_once_by_a_server_that_honors_keys(chat_server, fault):
    faults = iter([fault])
    with chat_server(
        lambda body: body["messages"][1]["content"], lambda n, body: next(faults, "ok"), honors_keys=True
    ) as server:
        with pytest.raises(LostCall):
            ask(server)
        assert ask(server).text == REQUEST.user
        assert ask(server, dataclasses.replace(REQUEST, seed=1)).text == REQUEST.user
    assert server.num_requests == 3
    assert sorted(server.charged.values()) == [1, 1]


def test_calls_without_a_request_have_keys_of_their_own(chat_server):
    async def call(llm):
        for text in ("a", "b", "a"):
            with pytest.raises(LostCall):  # the test server speaks chat only
                await llm.embed([text])
            with pytest.raises(NotImplementedError):
                await llm.score(text, "c")
        await llm.close()

    with chat_server(lambda body: "hello") as server:
        asyncio.run(call(EndpointConfig(model="m", base_url=server.url, api_key_env="").build()))
    assert sorted(server.keys.values()) == [1, 1, 2, 2]
    assert "" not in server.keys


def test_a_server_that_is_not_there_was_never_paid():
    config = EndpointConfig(model="m", base_url="http://127.0.0.1:9/v1", api_key_env="", timeout_s=1.0)
    with pytest.raises(Overloaded) as caught:
        asyncio.run(config.build().generate(REQUEST))
    assert not isinstance(caught.value, LostCall)


def test_what_the_server_asks_to_wait_is_kept(chat_server):
    with (
        chat_server(lambda body: "hello", lambda n, body: "429") as server,
        pytest.raises(Overloaded) as caught,
    ):
        ask(server)
    assert caught.value.retry_after_s == 0.01


@pytest.mark.parametrize("mode", ["schema", "object", "none"])
def test_a_schema_is_asked_for_in_the_mode_of_the_server(chat_server, mode):
    schema = {"type": "object", "properties": {}}
    request = Request(system="", user="", max_tokens=5, json_schema=schema)
    with chat_server(lambda body: "{}") as server:
        ask(server, request, json_mode=mode)
    sent = server.requests[0].get("response_format")
    assert (sent or {}).get("type") == {"schema": "json_schema", "object": "json_object", "none": None}[mode]


def test_a_missing_key_is_an_error_before_any_call(monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="SOME_KEY is not set"):
        EndpointConfig(model="m", api_key_env="SOME_KEY").build()


def test_requests_are_spread_over_a_minute(chat_server):
    config = {"base_url": "", "api_key_env": "", "requests_per_minute": 1200}
    with chat_server(lambda body: "x") as server:

        async def five():
            llm = EndpointConfig(model="m", **{**config, "base_url": server.url}).build()
            await asyncio.gather(*(llm.generate(REQUEST) for _ in range(5)))
            await llm.close()

        started = time.monotonic()
        asyncio.run(five())
    assert time.monotonic() - started >= 4 * 0.05


@dataclass(frozen=True)
class Texts:
    """Stage: given documents."""

    count: int
    name: str = "sources"
    version: int = 1
    gather: bool = False
    needs: tuple[str, ...] = ()

    def identity(self):
        return {"count": self.count}

    def run(self, documents, *, shard):
        for i in range(self.count):
            yield Document(id=f"d{i}", text=f"Ada number {i} met Ben in Cork and spoke of Dublin.")


def answer(body):
    if body["messages"][0]["content"].startswith("You read one document closely and take stock"):
        return json.dumps({"summary": "Ada met Ben.", "entities": ["Ada", "Ben", "Cork", "Dublin"]})
    return "Ada and Ben met in Cork. " + str(body["seed"])


def recipe(server, workdir, **run):
    return RecipeConfig(
        sources=Texts(6),
        generator=EntiGraph(max_triples=4),
        llm=EndpointConfig(model="m", base_url=server.url, api_key_env="", timeout_s=0.5, concurrency=16),
        max_attempts=8,
        first_wait_s=0.01,
        run=RunConfig(workdir=str(workdir), **run),
    )


FAULTS = ("429", "500", "hang", "cut", "half", "garbage", "empty", "latin1")


def test_through_every_fault_no_document_is_lost_or_doubled(chat_server, faults, tmp_path):
    # With a share f of faults and 8 attempts a call fails for good with probability f^8, here 4e-5.
    rates = {fault: 0.035 for fault in FAULTS} | {"400": 0.02}
    with chat_server(answer, faults(3, rates)) as server:
        results = recipe(server, tmp_path, max_failed_fraction=0.5).execute(lambda line: None)
    prepare, write = results[1], results[2]
    assert prepare.counts["out"] + prepare.counts.get("failed", 0) == 6
    assert write.counts["out"] + write.counts.get("failed", 0) == 11 * prepare.counts["out"]
    ids = [d.id for d in write.documents()]
    assert len(set(ids)) == len(ids)
    listed = [json.loads(line) for path in tmp_path.glob("*/*.errors.jsonl") for line in read_lines(path)]
    assert len(listed) == prepare.counts.get("failed", 0) + write.counts.get("failed", 0)
    assert all(entry["reason"] in ("bad_request", "overloaded", "no_reply") for entry in listed)
    assert any(entry["reason"] == "bad_request" for entry in listed)


def test_the_run_stops_when_the_stated_share_of_failures_is_passed(chat_server, tmp_path):
    def fault(number, body):
        return "400" if "Write three" in body["messages"][0]["content"] else "ok"

    with chat_server(answer, fault) as server, pytest.raises(StageFailed, match="items failed"):
        recipe(server, tmp_path).execute(lambda line: None)
    listed = [json.loads(line) for path in tmp_path.glob("*/*.errors.jsonl") for line in read_lines(path)]
    assert len(listed) == 20
    assert all(entry["reason"] == "bad_request" for entry in listed)


def test_malformed_json_gets_three_attempts_and_one_record(chat_server, tmp_path):
    with chat_server(lambda body: "entities: Ada, Ben", lambda n, body: "ok") as server:
        with pytest.raises(StageFailed):
            recipe(server, tmp_path).execute(lambda line: None)
    assert server.num_requests == 6 * 3
    listed = [json.loads(line) for path in tmp_path.glob("*/*.errors.jsonl") for line in read_lines(path)]
    assert [entry["reason"] for entry in listed] == ["malformed"] * 6
