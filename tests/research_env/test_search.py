"""Campaigns: a resumed one equals the uninterrupted one, and the page shows hostile text as text."""

import html
import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from research_env.dashboards.live import LiveTable
from research_env.dashboards.page import write_page
from research_env.diff import PathPolicy, read_change
from research_env.env import AIResearchEnv
from research_env.ideator.mutate import MutationIdeas, cross
from research_env.ledger import Ledger
from research_env.main import main
from research_env.novelty import jaccard, syntax_digest, words
from research_env.records import Node, Result, Status
from research_env.search.islands import Islands
from research_env.search.makers import MutationMaker
from research_env.search.proposal import Proposal, Told
from research_env.search.tree import Tree
from research_env.task import open_task

_OK = Result(status=Status.OK, metric=0.8, device_s=2.0)
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\x1b[2J\ud800"
TREE = {
    "model.py": b'"""Doc."""\nRATE = 0.1\nON = False\nACT = "tanh"  # tanh, relu\nSIZE = 64\nf(depth=4)\n'
}
POLICY = PathPolicy(editable=("model.py",))


def test_every_mutation_applies_and_changes_something():
    ideator = MutationIdeas().build(0)
    operators = set()
    for i in range(200):
        idea = ideator.propose(str(i), TREE, POLICY, TREE, [])
        tree, _ = read_change(idea.diff, TREE, POLICY)
        assert tree != TREE
        compile(tree["model.py"], "model.py", "exec")
        operators.add(idea.operator)
    assert operators == {"scale", "toggle", "swap", "shape", "pair"}
    assert ideator.propose("7", TREE, POLICY, TREE, []) == ideator.propose("7", TREE, POLICY, TREE, [])


def test_what_does_not_compile_or_holds_no_constant_is_not_mutated(tmp_path, capsys):
    ideator = MutationIdeas().build(0)
    assert ideator.can_change(TREE, POLICY)
    assert not ideator.can_change({"model.py": TREE["model.py"] + b"x = (\n"}, POLICY)
    code = tmp_path / "code"
    code.mkdir()
    (code / "answer.txt").write_text("3\n")
    (code / "run.sh").write_text('cp answer.txt "$OUT"/answer.txt\n')
    (code / "eval.sh").write_text('read x < "$ARTIFACT/answer.txt"; echo "{\\"metric\\": $x}" > "$RESULT"\n')
    argv = ["--config", "configs/research_env/smoke.py", f"workdir={tmp_path / 'run'}", f"codebase={code}"]
    assert main([*argv, "noise_repeats=2"]) == 2
    assert "the editable files hold none" in capsys.readouterr().err


def test_a_tree_search_debugs_what_does_not_compile(tmp_path, isolation):
    with AIResearchEnv(codebase="planted", workdir=tmp_path, sandbox=isolation) as env:
        broken = "--- a/settings.py\n+++ b/settings.py\n@@ -5 +5 @@\n-WIDTH = 64\n+WIDTH = (\n"
        failed = env.add(broken, key="broken")
        assert env.evaluate([failed])[0].status is Status.BUILD_FAILED
        maker = MutationMaker(env, MutationIdeas(), 0, "tree")
        child = maker.make(Proposal(key="tree/0/9", kind="debug", base=failed.node.id), "tree/0/9")
        assert env.evaluate([child])[0].status is Status.OK


def test_crossing_takes_both_parents_changes():
    left = {"model.py": TREE["model.py"].replace(b"0.1", b"0.2")}
    right = {"model.py": TREE["model.py"].replace(b"64", b"128").replace(b"False", b"True")}
    idea = cross(TREE, left, right, POLICY)
    assert read_change(idea.diff, left, POLICY)[0]["model.py"] == right["model.py"].replace(b"0.1", b"0.2")


def test_comments_and_layout_are_not_news_but_values_are():
    same = {
        "model.py": TREE["model.py"].replace(b"RATE = 0.1", b"RATE  =  0.1  # better").replace(b"Doc", b"New")
    }
    assert syntax_digest(same) == syntax_digest(TREE)
    assert syntax_digest({"model.py": TREE["model.py"].replace(b"0.1", b"0.2")}) != syntax_digest(TREE)
    assert jaccard(words("Raise the rate"), words("raise the RATE")) == 1.0


def _told(proposal, gain):
    node = Node(id=proposal.key.replace("/", "-"), diff=f"+++ b/{len(proposal.key)}.py\n+x\n")
    result = Result(status=Status.RUN_CRASH) if gain is None else Result(status=Status.OK, metric=1.0 - gain)
    return Told(proposal, node, result, gain)


@pytest.mark.parametrize("make", [lambda: Islands(0), lambda: Tree(0, lambda g: g / 2)])
def test_a_search_is_a_function_of_what_it_was_told(make):
    def play(search):
        keys = []
        for i in range(12):
            wishes = search.ask(3)
            keys += [(w.key, w.kind, w.base) for w in wishes]
            search.tell(
                [_told(w, None if (i + j) % 4 == 0 else 0.01 * (i - j)) for j, w in enumerate(wishes)]
            )
        return keys

    first = play(make())
    assert first == play(make())
    assert {"explore", "exploit"} <= {kind for _, kind, _ in first}


def test_a_campaign_runs_and_running_it_again_costs_nothing(tmp_path):
    argv = [
        "--config",
        "configs/research_env/smoke.py",
        f"workdir={tmp_path}",
        "num_candidates=4",
        "noise_repeats=3",
    ]
    assert main(argv) == 0
    first = json.loads((tmp_path / "summary.json").read_text())
    page = (tmp_path / "index.html").read_bytes()
    assert main(argv) == 0
    assert json.loads((tmp_path / "summary.json").read_text()) == first
    assert (tmp_path / "index.html").read_bytes() == page
    assert [arm["told"] for arm in first["arms"]] == [4, 4]


def test_two_campaigns_do_not_share_a_folder(tmp_path, capsys):
    argv = [
        "--config",
        "configs/research_env/smoke.py",
        f"workdir={tmp_path}",
        "noise_repeats=2",
        "num_candidates=1",
    ]
    assert main(argv) == 0
    before = (tmp_path / "summary.json").read_bytes()
    assert main([*argv, "seed=1"]) == 2
    assert "holds the campaign with seed=0, got seed=1" in capsys.readouterr().err
    assert (tmp_path / "summary.json").read_bytes() == before


def test_a_budget_too_small_to_measure_the_noise_is_one_line(tmp_path, capsys):
    argv = ["--config", "configs/research_env/smoke.py", f"workdir={tmp_path}", "budget.max_runs=2"]
    assert main(argv) == 1
    assert "stopped, and what ran is kept: max_runs=2" in capsys.readouterr().out


def test_a_campaign_whose_device_seconds_are_used_up_resumes_to_the_same_end(tmp_path):
    argv = ["--config", "configs/research_env/smoke.py", f"workdir={tmp_path}", "noise_repeats=3"]
    assert main([*argv, "num_candidates=4"]) == 0
    spent = json.loads((tmp_path / "summary.json").read_text())["spent"]["device_s"]
    limited = [*argv, f"budget.max_device_s={spent}", "num_candidates=8"]
    assert main(limited) == 0
    first = json.loads((tmp_path / "summary.json").read_text())
    assert main(limited) == 0
    assert json.loads((tmp_path / "summary.json").read_text()) == first
    assert [arm["told"] for arm in first["arms"]] == [4, 4]
    assert first["arms"][0]["stopped"].startswith("max_device_s=")


def test_bad_input_is_one_line_and_exit_code_two(tmp_path, capsys):
    assert main(["--config", "configs/research_env/smoke.py", f"workdir={tmp_path}", "codebase=nanogpt"]) == 2
    assert "must be a folder or one of" in capsys.readouterr().err


def _page(tmp_path: Path, text: str) -> Path:
    """A page whose every foreign field is `text`."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    node = ledger.add_node(Node(id=text[:60], idea=text, diff=text, operator=text, cost_usd=0.01))
    ledger.enqueue("k", node=node.id, purpose="screen", tree="", seed=0, rung=1.0, resource="1xCPU")
    ledger.start("k")
    curve = ((1, 3.0), (2, 2.0))
    ledger.finish(
        "k", Result(status=Status.RUN_CRASH, reason=text, log_tail=text, isolation=text, curve=curve)
    )
    ledger.note("told", text[:50], json.dumps({"node": node.id, "run": "k", "device_s": 2.0}))
    summary = {
        "metric": text, "baseline": 1.0, "sigma0": 0.1, "noise_repeats": 3, "isolation": text, "winner": None,
        "arms": [{"arm": text}], "spent": ledger.spent(),
    }  # fmt: skip
    path = write_page(ledger, open_task("planted", tmp_path), tmp_path / "index.html", summary)
    ledger.close()
    return path


def test_hostile_text_stays_text(tmp_path):
    page = _page(tmp_path, HOSTILE).read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.slow
@pytest.mark.parametrize("text", [HOSTILE, "Lower the rate & warm up for 20 < 30 steps."])
def test_a_browser_shows_the_page_and_runs_nothing_in_it(tmp_path, text):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    page = _page(tmp_path, text)
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert "<title>planted</title>" in shown, "a script changed the title, or the page did not load"
    assert shown.count("<svg") == 4  # evaluations, device-seconds, dollars, the streamed loss
    assert "<script" not in shown
    assert "<img" not in shown
    assert html.escape(text.split("\x1b")[0], quote=False) in shown.replace("&quot;", '"')


def test_the_live_table_shows_hostile_ideas_as_text():
    told = Told(
        Proposal(key="k", kind="explore"), Node(id="n", idea=HOSTILE + "[bold]x[/bold]\n" * 3), _OK, 0.2
    )
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200, color_system=None)
    with LiveTable(console, metric="loss", baseline=1.0, num_candidates=9) as view:
        view.told("greedy", told)
    text = out.getvalue()
    assert "1/9" in text
    assert "+0.2000" in text
    assert "\x1b[2J" not in text, "a control sequence of an idea reached the terminal"
    assert "<script>" in text
