"""Where a number comes from: the commit is the checked-out one, a changed file shows, and without git it is unknown."""

import subprocess

from pretrain.origin import commit, origin


def git(folder, *words):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True
    )


def test_a_changed_tracked_file_marks_the_commit(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "--short=10", "HEAD").stdout.strip()
    (tmp_path / "untracked").write_text("2")
    assert commit(tmp_path) == head
    (tmp_path / "a").write_text("3")
    assert commit(tmp_path) == f"{head}+"


def test_a_folder_without_git_or_without_a_commit_is_unknown(tmp_path, monkeypatch):
    assert commit(tmp_path) == "unknown"
    git(tmp_path, "init", "-q")
    assert commit(tmp_path) == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) == "unknown"


def test_an_origin_names_machine_and_versions():
    found = origin()
    assert set(found) == {"commit", "hardware", "python", "jax", "time"}
    assert " x " in found["hardware"]
