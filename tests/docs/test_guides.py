"""Guides and the front page keep their word: Python runs, commands name what is there or run, links lead somewhere."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import aot
from pretrain.config import ConfigError, apply_overrides, load_config

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
REFERENCE = {"kernels"}  # measurements, nothing to do
GUIDES = [path for path in PAGES if path.stem not in REFERENCE]
OF_EXTRAS = {"gguf", "safetensors", "openai", "ray", "submitit"}
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(path, language):
    return [body for found, body in BLOCK.findall(path.read_text()) if found == language]


def commands():
    for path in PAGES:
        for block in blocks(path, "bash"):
            for line in block.strip().splitlines():
                yield pytest.param(line, id=f"{path.stem}: {line[:60]}")


def readme_commands():
    """Every command of the front page as it stands there: lines of code blocks, and code inside the text."""
    text = (ROOT / "README.md").read_text()
    lines = [
        line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    code = [*lines, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))]
    found = [line.partition("  #")[0].strip() for line in code]
    return list(dict.fromkeys(line for line in found if re.match(r"(python|make|pytest|pip) ", line)))


# Seconds each; what they need is in the repository.
QUICK = ("python -m synth.main --config configs/synth/entigraph_smoke.py",)
MINUTES = (
    "python -m synth.main --config configs/synth/sbp_smoke.py",
    "python -m research_env.main --config configs/research_env/quickstart.py",
)


def test_there_is_a_guide_for_each_of_the_seven_things_users_do():
    assert [path.stem for path in GUIDES] == [
        "clusters",
        "models",
        "research",
        "rl",
        "scale",
        "synthesize",
        "train",
    ]


def test_the_python_of_all_guides_runs(tmp_path):
    """One interpreter for all: each guide's blocks in order, in a namespace of their own."""
    program = tmp_path / "guides.py"
    parts = []
    for path in GUIDES:
        code = "\n".join(blocks(path, "python"))
        assert code, f"{path.name} shows no Python"
        parts.append(f"exec(compile({code!r}, {str(path)!r}, 'exec'), {{'__name__': 'guide'}})")
    program.write_text("\n".join(parts))
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _environment():
    return {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_names_a_module_and_overrides_that_are_there(line):
    check_module(shlex.split(line))


def check_module(words):
    """`python -m MODULE`, its config loads, and takes the overrides."""
    assert words[:2] == ["python", "-m"]
    module = words[2]
    assert importlib.util.find_spec(module), module
    if "--config" in words:
        try:
            config = load_config(ROOT / words[words.index("--config") + 1])
        except ConfigError as error:
            missing = re.search(r"No module named '(\w+)'", str(error))
            if missing is None or missing[1] not in OF_EXTRAS:
                raise
            pytest.skip(f"an optional package is not installed: {missing[1]}")
        overrides = [word for word in words[3:] if "=" in word]
        if module == "pretrain.aot":  # has keys of its own beside the config's
            assert aot.parse(words[3:])[1].topology
            return
        assert apply_overrides(config, overrides) is not None


def test_the_front_page_shows_its_commands():
    found = readme_commands()
    assert {"make quickstart", "make test", *QUICK, *MINUTES} <= set(found)
    assert len(found) > 15


@pytest.mark.parametrize("line", readme_commands())
def test_a_command_of_the_front_page_names_what_is_there(line):
    words = shlex.split(line)
    if words[0] == "make":
        done = subprocess.run(
            ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words if word.endswith(".py"))
    else:
        check_module(words)


def run_as_typed(line, folder):
    """The command in a folder that has what a clone has, so that what it writes lies beside and not in the sources."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git") and not path.name.startswith(".venv"):
            (folder / path.name).symlink_to(path)
    words = shlex.split(line)
    assert words[0] == "python"
    environment = {**os.environ, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("line", [*QUICK, *(pytest.param(line, marks=pytest.mark.slow) for line in MINUTES)])
def test_a_command_of_the_front_page_runs_as_it_stands(line, tmp_path):
    assert line in readme_commands()
    done = run_as_typed(line, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "runs").is_dir()
    assert list((tmp_path / "runs").rglob("*.*"))


@pytest.mark.parametrize("module", ["pretrain.evaluate", "pretrain.sample", "pretrain.export"])
def test_a_verb_without_a_config_says_in_one_line_what_it_wants(module, tmp_path):
    assert (
        f"`{module}`" in (ROOT / "README.md").read_text()
        or f"-m {module}`" in (ROOT / "README.md").read_text()
    )
    done = run_as_typed(f"python -m {module}", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--config" in done.stderr


def test_links_lead_to_files():
    for path in [*PAGES, ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"
