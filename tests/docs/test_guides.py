"""Guides keep their word: their Python runs, their commands name what is there, their links lead somewhere."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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
    words = shlex.split(line)
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
        assert apply_overrides(config, overrides) is not None


def test_links_lead_to_files():
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"
