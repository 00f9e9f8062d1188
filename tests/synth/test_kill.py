"""SIGKILL at random moments of generation, restart: the bytes of the run never killed, and no kept reply paid again."""

import hashlib
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

pytest.importorskip("openai", reason="the [endpoint] extra is not installed")
pytestmark = pytest.mark.slow

RECIPE = """
from synth.entigraph.relations import EntiGraph
from synth.llm.endpoint import EndpointConfig
from synth.recipe import RecipeConfig
from synth.stage import RunConfig
from synth.worlds.niche import WorldDocuments
from synth.worlds.world import WorldConfig

def get_config():
    return RecipeConfig(
        sources=WorldDocuments(world=WorldConfig(seed=1, num_documents=3)),
        generator=EntiGraph(max_triples=20),
        llm=EndpointConfig(model="m", base_url="URL", api_key_env="", concurrency=8),
        first_wait_s=0.01,
        run=RunConfig(workdir="WORKDIR", num_shards=2),
    )
"""
NAMES = [f"{first}{second}" for first in ("Ada", "Ben", "Cork", "Dun") for second in ("a", "o", "u")]


def answer(body):
    system, user = (message["content"] for message in body["messages"])
    if "entities" in system and "JSON" in system:
        return json.dumps({"summary": "A summary.", "entities": NAMES})
    return hashlib.sha256((user + str(body["seed"])).encode()).hexdigest()


def outputs(workdir):
    return {p.relative_to(workdir).as_posix(): p.read_bytes() for p in sorted(workdir.glob("*/*.jsonl.zst"))}


def kept_keys(workdir):
    keys = set()
    for path in workdir.glob("*/*.replies.sqlite"):
        db = sqlite3.connect(path)
        if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'replies'").fetchone():
            keys |= {key for (key,) in db.execute("SELECT key FROM replies")}
        db.close()
    return keys


def command(tmp_path, server, workdir):
    config = tmp_path / f"{workdir.name}.py"
    config.write_text(RECIPE.replace("URL", server.url).replace("WORKDIR", str(workdir)))
    return [sys.executable, "-m", "synth.main", "--config", str(config)]


def kill_and_restart(chat_server, tmp_path, num_kills, seed):
    chance = random.Random(seed)
    with chat_server(answer, latency_s=0.01, honors_keys=True) as server:
        started = time.monotonic()
        whole = command(tmp_path, server, tmp_path / "whole")
        subprocess.run(whole, check=True, capture_output=True, timeout=120)
        longest_s = time.monotonic() - started
        num_calls = server.num_requests
        server.keys.clear()
        server.requests.clear()
        server.replies.clear()
        server.charged.clear()
        paid_again, kills_in_generation = 0, 0
        rounds = [tmp_path / "killed0"]
        kept: set[str] = set()
        before: dict[str, int] = {}
        for _ in range(num_kills):
            process = subprocess.Popen(
                command(tmp_path, server, rounds[-1]), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            try:
                process.communicate(timeout=chance.uniform(0.3, longest_s))
                assert process.returncode == 0
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                time.sleep(0.05)  # what was in flight reaches the server
            paid_again += sum(server.keys[key] != before.get(key, 0) for key in kept)
            kept, before = kept_keys(rounds[-1]), dict(server.keys)
            kills_in_generation += 0 < len(kept) < num_calls
            if process.returncode == 0:  # it got through: the next kill needs a new run
                rounds.append(tmp_path / f"killed{len(rounds)}")
                kept = set()
        for folder in rounds:
            subprocess.run(command(tmp_path, server, folder), check=True, capture_output=True, timeout=120)
        requests = sum(server.keys.values())
        charges = sum(server.charged.values())
    expected = outputs(tmp_path / "whole")
    for folder in rounds:
        assert outputs(folder) == expected
    assert paid_again == 0
    assert charges == num_calls  # what was in flight was sent again under the key that it had before
    assert kills_in_generation > 0
    in_flight = requests - num_calls * len(rounds)
    lost = sum(
        json.loads(path.read_bytes())["counts"].get("lost_calls", 0)
        for folder in rounds
        for path in folder.glob("*/*.done.json")
    )
    assert 0 <= in_flight <= lost <= 8 * num_kills
    return {
        "rounds": len(rounds),
        "kills_in_generation": kills_in_generation,
        "calls": num_calls,
        "asked_twice_because_in_flight": in_flight,
        "lost": lost,
    }


def test_killed_runs_end_with_the_bytes_of_a_run_never_killed(chat_server, tmp_path):
    kill_and_restart(chat_server, tmp_path, num_kills=5, seed=1)


def test_forty_kills(chat_server, tmp_path):
    print(kill_and_restart(chat_server, tmp_path, num_kills=40, seed=2))
