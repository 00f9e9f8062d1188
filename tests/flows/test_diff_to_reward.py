"""The third flow, end to end: a folder becomes a codebase, a diff becomes a number, the thesis' loop runs as it is written."""

import pytest

from research_env.env import AIResearchEnv
from research_env.records import Resource, Status
from research_env.reward import rank_rewards
from research_env.schedule import Devices
from research_env.search import researcher as thesis

RUN = """\
read steps < steps.txt
echo "step 1 loss 5.0"
echo "$steps $CUDA_VISIBLE_DEVICES" > "$OUT/model.txt"
"""
EVAL = """\
read steps devices < "$ARTIFACT/model.txt"
echo "{\\"metric\\": 1.$steps, \\"extra\\": {\\"devices\\": $(echo "$devices" | tr -cd , | wc -c)}}" > "$RESULT"
"""


def test_the_ten_lines_in_the_docstring_run_as_they_stand(tmp_path, isolation, monkeypatch, capsys):
    """Only the size is changed: the planted task for the toy, three turns for twenty."""
    monkeypatch.chdir(tmp_path)
    assert thesis.__doc__ is not None
    lines = thesis.__doc__.split("\n\n", 1)[1]
    assert len(lines.strip().splitlines()) <= 10
    small = lines.replace('"toy"', '"planted"').replace("range(20)", "range(3)")
    names = {
        "AIResearchEnv": lambda **fields: AIResearchEnv(sandbox=isolation, **fields),
        "Researcher": thesis.Researcher,
    }
    exec(compile(small, "the docstring", "exec"), names)
    names["env"].close()
    assert len(names["researcher"].history) == 3
    assert "Result(status=<Status.OK" in capsys.readouterr().out


def test_any_folder_is_a_codebase_and_its_resource_is_leased(tmp_path, isolation):
    code = tmp_path / "nanogpt"
    code.mkdir()
    (code / "run.sh").write_text(RUN)
    (code / "eval.sh").write_text(EVAL)
    (code / "steps.txt").write_text("50\n")
    host = Devices.of_this_host([Resource.parse("8xH100")])
    better = "--- a/steps.txt\n+++ b/steps.txt\n@@ -1 +1 @@\n-50\n+20\n"
    forged = better.replace("+20", '+20,"metric":0')
    with AIResearchEnv(
        codebase=str(code), resource="8xH100", workdir=tmp_path / "run", sandbox=isolation, devices=host
    ) as env:
        baseline, good, bad = env.value_many(["", better, forged])
    assert (baseline.metric, good.metric, bad.status) == (1.5, 1.2, Status.METRIC_INVALID)
    assert baseline.extra == {"devices": 7.0}  # commas between eight devices
    assert baseline.curve == ((1.0, 5.0),)
    assert baseline.device_s == pytest.approx(8 * baseline.wall_s)
    rewards = rank_rewards([baseline, good, bad])
    assert rewards[1] > rewards[0] > rewards[2] == 0.0
