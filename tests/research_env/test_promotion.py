"""The promotion rule on real runs in the jail: 100 candidates worth nothing and 100 worth two sigma0, over ten campaigns."""

import pytest

from research_env.choose import gain
from research_env.env import AIResearchEnv
from research_env.sandbox.ladder import probe
from research_env.search.campaign import ArmResult, confirm_best, measure_noise
from research_env.search.proposal import Proposal, Told

NUM_CAMPAIGNS, NUM_EACH = 10, 10
# DECAY at its optimum takes 0.04 off the loss, whose noise is 0.02. A null constant changes the noise that is drawn, nothing else.
HEAD = "--- a/settings.py\n+++ b/settings.py\n"
HUNK = "@@ -13,1 +13,1 @@\n-NULL_A = 1.0\n+NULL_A = {0}\n"
NULL = HEAD + HUNK
PLANTED = HEAD + "@@ -4,1 +4,1 @@\n-DECAY = 0.01\n+DECAY = 0.1\n" + HUNK


def play(env, diffs):
    """Screen and confirm every diff; (how many were promoted, the judge's true gains of all)."""
    noise, mean = measure_noise(env, 15)  # sixteen runs with the one on the screening seed
    nodes = [env.add(text) for text in diffs]
    told = []
    for candidate, result in zip(nodes, env.evaluate(nodes), strict=True):
        better_by = gain(result.metric, mean, env.task.higher_is_better)
        told.append(Told(Proposal(key=candidate.node.id, kind="explore"), candidate.node, result, better_by))
    arm = ArmResult("all", tuple(told), (), 0)
    found = confirm_best(env, arm, noise=noise, baseline_mean=mean, max_confirmed=len(told))
    promoted = sum(item.verdict.decision == "promote" for item in found.confirmed)
    return promoted, [3.0 - item.result.extra["true_loss"] for item in told]


@pytest.mark.slow
def test_of_100_null_diffs_at_most_5_and_of_100_planted_ones_at_least_80_are_promoted(
    tmp_path, record_property
):
    found = probe("unshare")
    if not found.is_held:
        pytest.skip("unshare does not hold on this host")
    nulls = planted = 0
    for campaign in range(NUM_CAMPAIGNS):
        with AIResearchEnv(
            codebase="planted", workdir=tmp_path / str(campaign), sandbox=found, seed=campaign
        ) as env:
            numbers = [2 + campaign * NUM_EACH + number for number in range(NUM_EACH)]
            count, gains = play(env, [NULL.format(number) for number in numbers])
            nulls += count
            assert gains == pytest.approx([0.0] * NUM_EACH)
            count, gains = play(env, [PLANTED.format(number) for number in numbers])
            planted += count
            assert gains == pytest.approx([0.04] * NUM_EACH)
    record_property("promoted", f"{nulls} of 100 nulls, {planted} of 100 planted")
    print(f"promoted: {nulls} of 100 nulls, {planted} of 100 planted")
    assert nulls <= 5
    assert planted >= 80
