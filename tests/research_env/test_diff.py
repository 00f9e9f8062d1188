"""Laws of diffs: nothing is applied by halves, what is written reads back, what is done can be undone."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_env.diff import (
    Diff,
    DiffFailed,
    DiffRefused,
    PathPolicy,
    apply_diff,
    check_diff,
    emit_diff,
    make_diff,
    parse_diff,
    read_change,
    reverse_diff,
)

POLICY = PathPolicy(editable=("model.py", "lib/", "conf.json"), locked=("lib/secret.py", "lib/locked/"))
BASE = {
    "model.py": b"import math\n\nRATE = 0.1\nSTEPS = 10\n\n\ndef f(x):\n    return math.tanh(x)\n",
    "lib/a.py": b"one\ntwo\nthree\nfour\nfive\nsix\nseven\n",
    "lib/secret.py": b"KEY = 1\n",
    "run.sh": b"python model.py\n",
}

# Lines that look like the syntax of a diff, or repeat, are the ones that break readers.
LINES = st.sampled_from(
    ["", "a", "b", "-- a/x", "++ b/x", "@@ -1 +1 @@", " ", "\\ No newline", "```", "--- a/f", "+++ b/f", "x\r", "y\x0c\x85z",
     "diff --git a/f b/f", "\ud83d".encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"), "é"]
)  # fmt: skip
CONTENTS = st.builds(
    lambda lines, end: ("\n".join(lines) + ("\n" if end and lines else "")).encode(
        "utf-8", "surrogateescape"
    ),
    st.lists(LINES, max_size=12),
    st.booleans(),
)
TREES = st.dictionaries(st.sampled_from(["f", "g.py", "d/h", "d/i"]), CONTENTS, max_size=4)


@given(TREES, TREES)
@settings(max_examples=300, deadline=None)
def test_emit_then_apply_gives_the_other_tree_and_reverse_gives_it_back(old, new):
    diff = make_diff(old, new)
    text = emit_diff(diff)
    if text:
        assert parse_diff(text) == diff
    else:
        assert old == new
    assert apply_diff(old, diff) == new
    assert apply_diff(new, reverse_diff(diff)) == old


@given(TREES, TREES, TREES)
@settings(max_examples=200, deadline=None)
def test_a_diff_for_another_tree_applies_whole_or_raises_and_never_touches_its_input(old, new, other):
    before = dict(other)
    diff = make_diff(old, new)
    try:
        result = apply_diff(other, diff)
    except DiffFailed:
        pass
    else:
        assert set(result) - set(other) <= {file.path for file in diff.files}
    assert other == before


def _mutated_diff(seed: int) -> str:
    """A real diff with bytes flipped, lines lost, doubled and swapped: what a damaged reply looks like."""
    rng = random.Random(seed)
    lines = emit_diff(
        make_diff(BASE, {**BASE, "model.py": BASE["model.py"].replace(b"0.1", b"0.2"), "lib/n.py": b"new\n"})
    ).split("\n")
    pieces = [
        "--- a/../../x",
        "+++ b/run.sh",
        "@@ -1,1 +1,1 @@",
        "@@",
        "rename from a",
        "new file mode 120000",
        "```",
        "\\ No",
        "\0",
        "diff --git a/x b/y",
        "+" * 50,
    ]
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(lines))
        action = rng.randrange(6)
        if action == 0:
            del lines[at]
        elif action == 1:
            lines.insert(at, rng.choice(pieces))
        elif action == 2:
            lines[at] = lines[at][: rng.randint(0, len(lines[at]))]
        elif action == 3:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif action == 4:
            lines[at] = "".join(chr(rng.randrange(1, 0x300)) for _ in range(rng.randint(0, 20)))
        else:
            lines[at] = rng.choice(" +-@") + lines[at][1:]
        lines = lines or [""]
    return "\n".join(lines)


def check_reader(text: str) -> str:
    """What every input must give: one of three outcomes, only editable files changed, base untouched."""
    before = dict(BASE)
    try:
        tree, canonical = read_change(text, BASE, POLICY)
    except DiffRefused:
        outcome = "refused"
    except DiffFailed:
        outcome = "failed"
    else:
        outcome = "applied"
        assert tree["run.sh"] == BASE["run.sh"]
        assert tree["lib/secret.py"] == BASE["lib/secret.py"]
        assert all(POLICY.refusal(path) is None for path in tree if tree.get(path) != BASE.get(path))
        if canonical:
            assert read_change(canonical, BASE, POLICY) == (tree, canonical)
        else:
            assert tree == BASE
    assert before == BASE
    return outcome


def test_damaged_diffs_are_refused_failed_or_applied_inside_the_policy():
    outcomes = [check_reader(_mutated_diff(seed)) for seed in range(2000)]
    assert {"refused", "failed", "applied"} == set(outcomes), "the generator must reach all three"


@pytest.mark.slow
def test_the_reader_survives_100_000_damaged_diffs():
    for seed in range(100_000):
        check_reader(_mutated_diff(1_000_000 + seed))


@given(st.text(max_size=400))
@settings(max_examples=300, deadline=None)
def test_any_text_is_refused_or_fails_or_applies(text):
    check_reader(text)


def test_a_reply_with_prose_fences_and_wrong_counts_is_read():
    text = """Sure! Here is my change:

```diff
--- a/model.py
+++ b/model.py
@@ -1,99 +1,99 @@
 import math

-RATE = 0.1
+RATE = 0.3
 STEPS = 10
```
It raises the rate.
"""
    tree, canonical = read_change(text, BASE, POLICY)
    assert b"RATE = 0.3" in tree["model.py"]
    assert canonical.startswith("diff --git a/model.py b/model.py\n--- a/model.py\n")


def test_crlf_transport_is_undone():
    text = "--- a/model.py\n+++ b/model.py\n@@ -3 +3 @@\n-RATE = 0.1\n+RATE = 0.3\n".replace("\n", "\r\n")
    assert b"RATE = 0.3\n" in read_change(text, BASE, POLICY)[0]["model.py"]


def test_a_hunk_that_fits_two_places_without_a_trusted_line_number_fails():
    base = {"model.py": b"a\nb\na\nb\n"}
    text = "--- a/model.py\n+++ b/model.py\n@@ -1,9 +1,9 @@\n-a\n+c\n"
    with pytest.raises(DiffFailed, match="2 places"):
        read_change(text, base, POLICY)
    assert read_change(text.replace("1,9", "3,1"), base, POLICY)[0]["model.py"] == b"a\nb\nc\nb\n"


def test_a_failed_hunk_names_the_line_that_is_missing_and_the_nearest_one():
    text = "--- a/model.py\n+++ b/model.py\n@@ -3 +3 @@\n-RATE = 0.15\n+RATE = 0.3\n"
    with pytest.raises(DiffFailed, match=r"no line 'RATE = 0.15'; the nearest is 'RATE = 0.1'"):
        read_change(text, BASE, POLICY)


def _new_file(path: str, mode: str = "100644") -> str:
    return f"diff --git a/{path} b/{path}\nnew file mode {mode}\n--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+x\n"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (_new_file("../out.py"), "component"),
        (_new_file("lib/../../out.py"), "component"),
        (_new_file("lib/./a2.py"), "component"),
        (_new_file("lib//a2.py"), "component"),
        (_new_file("/etc/cron.d/x.py"), "relative"),
        (_new_file("lib/.git/hooks/x.py"), "component"),
        (_new_file("lib/-rf.py"), "component"),
        (_new_file("lib/a\\b.py"), "component"),
        (_new_file("lib/x.so"), "suffix"),
        (_new_file("other.py"), "not editable"),
        (_new_file("lib/locked/x.py"), "locked"),
        (_new_file("lib/locked"), "locked"),
        (_new_file("lib/x.py", "120000"), "not accepted"),
        (_new_file("lib/x.py", "160000"), "not accepted"),
        (_new_file("lib/x.py", "104755"), "not accepted"),
        (_new_file("l" * 300 + ".py"), "200"),
        ("--- a/run.sh\n+++ b/run.sh\n@@ -1 +1 @@\n-python model.py\n+id\n", "not editable"),
        ("--- a/lib/secret.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-KEY = 1\n", "locked"),
        ("--- a/lib/secret.py\n+++ b/lib/b.py\n@@ -1 +1 @@\n-KEY = 1\n+x\n", "rename"),
        ("diff --git a/lib/a.py b/lib/b.py\nsimilarity index 100%\nrename from lib/a.py\nrename to lib/b.py\n", "not accepted"),
        ("diff --git a/lib/a.py b/lib/a.py\nold mode 100644\nnew mode 100755\n", "empty"),
        ("diff --git a/lib/a.bin b/lib/a.bin\nGIT binary patch\nliteral 3\n", "not accepted"),
        ("diff --git a/lib/a.py b/run.sh\n--- a/lib/a.py\n+++ b/lib/a.py\n@@ -1 +1 @@\n-one\n+x\n", "different paths"),
        ('--- "a/lib/a.py"\n+++ "b/lib/a.py"\n@@ -1 +1 @@\n-one\n+x\n', "quoted"),
        ("--- a/lib/a.py\n+++ b/lib/a.py\n", "no hunk"),
        ("--- /dev/null\n+++ /dev/null\n@@ -1 +1 @@\n-one\n+x\n", "both sides"),
        ("*** lib/a.py\n--- lib/a.py\n***************\n", "not accepted"),
        ("1c1\n< one\n---\n> x\n", "no file header"),
        ("I would rather lower the learning rate.", "no file header"),
        ("@@ -1 +1 @@\n-one\n+x\n", "before it"),
        ("--- a/lib/a.py\n+++ b/lib/a.py\n@@ -1 +1 @@\n-one\n+x\n" * 2, "twice"),
        (_new_file("lib/x.py").replace("+x", "+" + "x" * 5000), "characters"),
        (_new_file("lib/x.py").replace("+x", "+a\0b"), "NUL"),
        (_new_file("lib/x.py").replace("+x", "+\ud800"), "Unicode"),
        (_new_file("lib/x.py") + "rename from lib/a.py\n", "not accepted"),
    ],
)  # fmt: skip
def test_what_the_policy_refuses(text, rule):
    with pytest.raises(DiffRefused, match=rule):
        read_change(text, BASE, POLICY)


def test_caps_are_named():
    policy = PathPolicy(editable=("lib/",), max_files=1, max_hunks=1, max_diff_bytes=10_000)
    new = {**BASE, "lib/a.py": b"ONE\n" + b"x\n" * 20, "lib/b.py": b"x\n"}
    with pytest.raises(DiffRefused, match="at most 1 files, got 2; a diff has at most 1 hunks, got 2"):
        check_diff(make_diff(BASE, new), policy)
    with pytest.raises(DiffRefused, match="at most 10000 bytes"):
        read_change("x" * 20_000, BASE, policy)


def test_a_file_that_would_be_a_folder_fails():
    with pytest.raises(DiffFailed, match="a file and a folder"):
        read_change(_new_file("lib/a.py/x.py"), BASE, POLICY)


def test_empty_text_is_the_base():
    assert read_change("  \n", BASE, POLICY) == (BASE, "")
    assert emit_diff(Diff()) == ""


_BAD_PATHS = (
    "../out.py", "lib/../../out.py", "lib/../run.sh", "./lib/a.py", "lib/./x.py", "lib//x.py", "/etc/x.py", "//etc/x.py", "~/x.py",
    "lib/.git/config.py", ".bashrc.py", "lib/-x.py", "lib/a\\b.py", "lib/x.so", "lib/x.pth", "lib/x", "other.py", "run.sh", "eval.sh",
    "locked/evaluate.py", "lib/locked/x.py", "lib/secret.py", "task.toml", "data/train.bin", "lib/x\u202e.py", "lib/x .py",
)  # fmt: skip
_FORMS = {
    "new file": "diff --git a/{0} b/{0}\nnew file mode 100644\n--- /dev/null\n+++ b/{0}\n@@ -0,0 +1 @@\n+x\n",
    "edit": "--- a/{0}\n+++ b/{0}\n@@ -1 +1 @@\n-x\n+y\n",
    "deletion": "diff --git a/{0} b/{0}\ndeleted file mode 100644\n--- a/{0}\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n",
    "rename to": "diff --git a/lib/a.py b/{0}\nsimilarity index 100%\nrename from lib/a.py\nrename to {0}\n",
    "copy from": "diff --git a/{0} b/lib/c.py\nsimilarity index 100%\ncopy from {0}\ncopy to lib/c.py\n",
    "link": "diff --git a/{0} b/{0}\nnew file mode 120000\n--- /dev/null\n+++ b/{0}\n@@ -0,0 +1 @@\n+/etc/passwd\n\\ No newline at end of file\n",
    "hidden in a good diff": "--- a/lib/a.py\n+++ b/lib/a.py\n@@ -1 +1 @@\n-one\n+x\n--- a/{0}\n+++ b/{0}\n@@ -1 +1 @@\n-x\n+y\n",
}  # fmt: skip


@pytest.mark.parametrize("form", list(_FORMS))
def test_no_form_of_header_reaches_a_path_that_is_not_allowed(form, tmp_path, monkeypatch):
    """26 paths in each of 7 forms: 182 hostile diffs, all refused or failed, and no file appears anywhere near."""
    monkeypatch.chdir(tmp_path)
    for path in _BAD_PATHS:
        assert check_reader(_FORMS[form].format(path)) != "applied", path
    assert not list(tmp_path.parent.glob("out.py"))
    assert not list(tmp_path.iterdir())
