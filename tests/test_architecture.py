"""Imports point one way: the rules of the house as data, and a reader of `import` statements.

Every fault is printed as `file:line imports X; allowed: ...`. Only imports and a few names are looked at;
style and size are matters for review.
"""

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Rooms, first to last: a room may import itself and the rooms before it.
ROOMS = ("pretrain", "synth", "research_env")

# Layers of a room, first to last: a module may import earlier layers, and its own layer without a cycle.
# A folder stands for all modules below it.
LAYERS = {
    "pretrain": (
        "config rundir metrics wandb_sink plots tokenizer jobs compat distributed collectives roofline allocator origin",
        "sharding",
        "data kernels",
        "model",
        "loss optim health flops draw",
        "step",
        "checkpoint families safetensors_file hf gguf_import pretrained generate",
        "evals",
        "objective train seqio_bridge lm_eval_bridge",
        "rl scaling aot",
        "main prepare evaluate export sample",
    ),
    "synth": (
        "document question prompt training",
        "shards llm neighbors near_duplicates",
        "stage generator sources",
        "quality retrieval tokens worlds theory",
        "recipe",
        "entigraph baselines sbp tasks",
        "arms",
        "main",
    ),
    "research_env": (
        "records words",
        "diff task reward",
        "sandbox",
        "evaluate ledger",
        "worker choose novelty",
        "schedule",
        "env",
        "ideator executor",
        "search rl dashboards",
        "main doctor report",
    ),
}

# Methods of one layer that never import each other (a folder of single methods is listed by module).
SIBLINGS = {"synth": ("entigraph", "baselines.*", "sbp")}

# No path of imports leads from these modules to a package that imports jax.
LIGHT = tuple(
    """
    pretrain.config pretrain.rundir pretrain.origin pretrain.metrics pretrain.wandb_sink pretrain.plots pretrain.tokenizer
    pretrain.jobs.* pretrain.data.source pretrain.data.pack pretrain.data.rows pretrain.data.mixture
    pretrain.evals.tasks pretrain.evals.baselines pretrain.evals.interval
    synth.document synth.question synth.prompt synth.shards synth.stage synth.generator
    synth.sources synth.recipe synth.neighbors
    synth.near_duplicates synth.tokens synth.llm.api synth.llm.endpoint synth.llm.scripted synth.llm.cached
    synth.llm.budget synth.quality.* synth.retrieval.* synth.worlds.* synth.theory.* synth.entigraph.*
    synth.baselines.* synth.sbp.pair synth.sbp.synthesize synth.tasks.*
    research_env.doctor research_env.report research_env.records research_env.diff research_env.task
    research_env.reward research_env.sandbox.* research_env.evaluate.* research_env.ledger
    research_env.worker research_env.choose research_env.novelty research_env.schedule research_env.env
    research_env.ideator.* research_env.executor.* research_env.search.* research_env.dashboards.*
    """.split()
)
REACHES_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "chex"}

# From the trainer no path leads to these.
LEAN = "pretrain.train"
KEPT_OUT_OF_LEAN = {"seqio", "tensorflow", "ray", "submitit", "openai", "faiss", "wandb"}

# Optional packages: imported by one file each, and the program never imports that file; a config does.
OPTIONAL = {
    "seqio": "pretrain.seqio_bridge",
    "tensorflow": "pretrain.seqio_bridge",
    "ray": "pretrain.jobs.on_ray",
    "submitit": "pretrain.jobs.on_slurm",
    "wandb": "pretrain.wandb_sink",
    "datasets": "pretrain.data.hf_source",
    "pyarrow": "pretrain.data.parquet_source",
    "gguf": "pretrain.gguf_import",
    "lm_eval": "pretrain.lm_eval_bridge",
    "openai": "synth.llm.endpoint",
}
# Installed by default, and still the business of one file.
ONE_FILE = {"faiss": "synth.neighbors", "orbax": "pretrain.checkpoint", "datasketch": "synth.near_duplicates"}

# The only file with imports inside functions: attention back ends asked for by name.
INNER_IMPORTS = "pretrain.kernels.attention.api"

BANNED_NAMES = {"utils", "common", "helpers", "misc", "base", "manager"}
OUTSIDE = ("configs", "tests", "tools")


@dataclasses.dataclass(frozen=True)
class Import:
    name: str  # a module of ours in full, a foreign package by its first name
    line: int
    inner: bool  # inside a function
    tried: bool  # inside a try block


@dataclasses.dataclass(frozen=True)
class Tree:
    root: Path
    files: dict[str, Path]  # module name -> file
    imports: dict[str, list[Import]]

    def fault(self, module: str, line: int, what: str, allowed: str) -> str:
        return f"{self.files[module].relative_to(self.root)}:{line} imports {what}; allowed: {allowed}"

    def reachable(self, module: str) -> dict[str, tuple[str, ...]]:
        """Everything imported from `module` on, each with a path that leads there."""
        paths, queue = {module: (module,)}, [module]
        while queue:
            current = queue.pop(0)
            for item in self.imports.get(current, ()):
                if item.name not in paths:
                    paths[item.name] = (*paths[current], item.name)
                    queue.append(item.name)
        return paths


def read_tree(root: Path) -> Tree:
    files = {}
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            # Baselines, locked files and fixtures of research tasks are programs of candidates, not ours.
            if parts[:2] != ("research_env", "tasks") or len(parts) < 4:
                files[".".join(parts).removesuffix(".__init__")] = path
    return Tree(root, files, {module: list(_imports(module, path, files)) for module, path in files.items()})


def _imports(module: str, path: Path, files: dict[str, Path]) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    stack: list[tuple[ast.AST, bool, bool]] = [(ast.parse(path.read_text(), str(path)), False, False)]
    while stack:
        node, inner, tried = stack.pop()
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            # `from pretrain.data import pack` names a module, `from pretrain.config import local` does not.
            names = [n if (n := f"{base}.{alias.name}") in files else base for alias in node.names]
        for name in dict.fromkeys(names):
            ours = name.partition(".")[0] in (*ROOMS, *OUTSIDE)
            yield Import(name if ours else name.partition(".")[0], node.lineno, inner, tried)
        inner = inner or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        tried = tried or isinstance(node, (ast.Try, ast.TryStar))
        stack.extend((child, inner, tried) for child in ast.iter_child_nodes(node))


def matches(module: str, patterns: tuple[str, ...]) -> bool:
    return any(module == p or (p.endswith(".*") and module.startswith(p[:-1])) for p in patterns)


def layer_of(module: str) -> int | None:
    """The index of a module's layer, None for a room's own `__init__` or a module in no layer."""
    room, _, rest = module.partition(".")
    noun = rest.partition(".")[0]
    return next((i for i, nouns in enumerate(LAYERS[room]) if noun in nouns.split()), None)


# --- the rules ---------------------------------------------------------------------------------------


def faults_of_rooms(tree: Tree) -> Iterator[str]:
    for module, imports in tree.imports.items():
        room = module.partition(".")[0]
        allowed = ROOMS[: ROOMS.index(room) + 1]
        for item in imports:
            if item.name.partition(".")[0] in set(ROOMS + OUTSIDE) - set(allowed):
                yield tree.fault(module, item.line, item.name, "the rooms " + ", ".join(allowed))


def faults_of_layers(tree: Tree) -> Iterator[str]:
    for module, path in tree.files.items():
        room, _, rest = module.partition(".")
        if not rest:
            continue
        own = layer_of(module)
        if own is None:
            yield f"{path.relative_to(tree.root)}:1 is in no layer; add {rest!r} to LAYERS in {Path(__file__).name}"
            continue
        for item in tree.imports[module]:
            other = layer_of(item.name) if item.name.startswith(f"{room}.") else None
            if other is not None and other > own:
                yield tree.fault(module, item.line, item.name, " | ".join(LAYERS[room][: own + 1]))


def faults_of_cycles(tree: Tree) -> Iterator[str]:
    reachable = {module: tree.reachable(module) for module in tree.files}
    for module, imports in tree.imports.items():
        for item in imports:
            if item.name in tree.files and module in reachable[item.name]:
                way = " -> ".join(reachable[item.name][module])
                yield tree.fault(module, item.line, item.name, f"no cycle, and this closes {way}")


def faults_of_siblings(tree: Tree) -> Iterator[str]:
    def method(module: str) -> str | None:
        room, _, rest = module.partition(".")
        for name in SIBLINGS.get(room, ()):
            folder = name.removesuffix(".*")
            if rest == folder or rest.startswith(f"{folder}."):
                return rest if name.endswith(".*") and rest != folder else folder
        return None

    for module, imports in tree.imports.items():
        for item in imports:
            own, other = method(module), method(item.name)
            if own and other and own != other:
                yield tree.fault(
                    module, item.line, item.name, f"earlier layers and {own} itself; methods are apart"
                )


def faults_of_light(tree: Tree) -> Iterator[str]:
    for module in tree.files:
        if matches(module, LIGHT):
            paths = tree.reachable(module)
            for package in sorted(REACHES_JAX & paths.keys()):
                yield _path_fault(tree, paths[package], "what does not reach jax (the module is light)")


def faults_of_lean(tree: Tree) -> Iterator[str]:
    paths = tree.reachable(LEAN)
    for package in sorted(KEPT_OUT_OF_LEAN & paths.keys()):
        yield _path_fault(tree, paths[package], f"what keeps {LEAN} lean")


def _path_fault(tree: Tree, path: tuple[str, ...], allowed: str) -> str:
    line = next(item.line for item in tree.imports[path[0]] if item.name == path[1])
    way = f" (by way of {' -> '.join(path[1:-1])})" if len(path) > 2 else ""
    return tree.fault(path[0], line, path[-1] + way, allowed)


def faults_of_optional(tree: Tree) -> Iterator[str]:
    single = OPTIONAL | ONE_FILE
    bridges = set(OPTIONAL.values())
    for module, imports in tree.imports.items():
        for item in imports:
            if item.name in single and module != single[item.name]:
                yield tree.fault(module, item.line, item.name, f"only in {single[item.name]}")
            if item.name in bridges and module != item.name:
                yield tree.fault(module, item.line, item.name, "only a config file may name that module")
            if item.inner and module != INNER_IMPORTS:
                yield tree.fault(
                    module, item.line, f"{item.name} inside a function", "imports at the top of a file"
                )
            if item.tried:
                yield tree.fault(
                    module, item.line, f"{item.name} inside try", "imports that either work or fail"
                )


def faults_of_names(tree: Tree) -> Iterator[str]:
    for module, path in tree.files.items():
        where = path.relative_to(tree.root)
        if BANNED_NAMES & set(module.split(".")):
            yield f"{where}:1 has a name that says nothing; banned: {', '.join(sorted(BANNED_NAMES))}"
        if path.name == "__init__.py":
            body = ast.parse(path.read_text()).body
            if len(body) != 1 or ast.get_docstring(ast.Module(body, [])) is None:
                yield f"{where}:1 holds more or less than a docstring; allowed: a docstring and nothing else"
        elif not (path.parent / "__init__.py").exists():
            yield f"{where}:1 lies in a folder without __init__.py; add one with a docstring"


RULES = (
    faults_of_rooms,
    faults_of_layers,
    faults_of_cycles,
    faults_of_siblings,
    faults_of_light,
    faults_of_lean,
    faults_of_optional,
    faults_of_names,
)


@functools.cache
def our_tree() -> Tree:
    return read_tree(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule):
    faults = list(rule(our_tree()))
    assert not faults, "\n" + "\n".join(faults)


def test_the_whole_house_is_read():
    """An empty tree would pass every rule."""
    tree = our_tree()
    assert "pretrain.metrics" in tree.files
    assert Import("pretrain.config", 1, False, False).name in {
        i.name for i in tree.imports["pretrain.metrics"]
    }
    for pattern in (*OPTIONAL.values(), *ONE_FILE.values()):
        assert layer_of(pattern) is not None, f"{pattern} is in no layer"


BROKEN = [
    (faults_of_rooms, {"pretrain/config.py": "import synth.document"},
     "pretrain/config.py:1 imports synth.document; allowed: the rooms pretrain"),
    (faults_of_rooms, {"synth/main.py": "\nfrom tools import census"},
     "synth/main.py:2 imports tools; allowed: the rooms pretrain, synth"),
    (faults_of_layers, {"pretrain/config.py": "from pretrain import train", "pretrain/train.py": ""},
     "pretrain/config.py:1 imports pretrain.train; allowed: config rundir metrics wandb_sink plots tokenizer jobs compat"),
    (faults_of_layers, {"pretrain/novel.py": ""}, "pretrain/novel.py:1 is in no layer; add 'novel' to LAYERS"),
    (faults_of_cycles, {"pretrain/metrics.py": "import pretrain.plots", "pretrain/plots.py": "from . import metrics"},
     "pretrain/metrics.py:1 imports pretrain.plots; allowed: no cycle, and this closes pretrain.plots -> pretrain.metrics"),
    (faults_of_siblings, {"synth/baselines/repeat.py": "from synth.entigraph.entities import X", "synth/entigraph/entities.py": ""},
     "synth/baselines/repeat.py:1 imports synth.entigraph.entities; allowed: earlier layers and baselines.repeat itself"),
    (faults_of_siblings, {"synth/baselines/repeat.py": "from . import rephrase", "synth/baselines/rephrase.py": ""},
     "synth/baselines/repeat.py:1 imports synth.baselines.rephrase"),
    (faults_of_light, {"pretrain/plots.py": "x = 1\nimport pretrain.compat", "pretrain/compat.py": "from jax import numpy"},
     "pretrain/plots.py:2 imports jax (by way of pretrain.compat); allowed: what does not reach jax"),
    (faults_of_lean, {"pretrain/train.py": "import pretrain.metrics", "pretrain/metrics.py": "import wandb"},
     "pretrain/train.py:1 imports wandb (by way of pretrain.metrics); allowed: what keeps pretrain.train lean"),
    (faults_of_optional, {"pretrain/metrics.py": "import wandb"},
     "pretrain/metrics.py:1 imports wandb; allowed: only in pretrain.wandb_sink"),
    (faults_of_optional, {"pretrain/train.py": "import pretrain.wandb_sink", "pretrain/wandb_sink.py": "import wandb"},
     "pretrain/train.py:1 imports pretrain.wandb_sink; allowed: only a config file may name that module"),
    (faults_of_optional, {"pretrain/train.py": "def f():\n  import json"},
     "pretrain/train.py:2 imports json inside a function; allowed: imports at the top of a file"),
    (faults_of_optional, {"pretrain/train.py": "try:\n  import json\nexcept ImportError:\n  json = None"},
     "pretrain/train.py:2 imports json inside try; allowed: imports that either work or fail"),
    (faults_of_names, {"pretrain/data/utils.py": ""}, "pretrain/data/utils.py:1 has a name that says nothing"),
    (faults_of_names, {"pretrain/data/__init__.py": "from os import path"}, "pretrain/data/__init__.py:1 holds more or less"),
    (faults_of_names, {"pretrain/data/pack.py": ""}, "pretrain/data/pack.py:1 lies in a folder without __init__.py"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "files", "message"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_each_rule_finds_its_fault(tmp_path, rule, files, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    faults = list(rule(read_tree(tmp_path)))
    assert [fault for fault in faults if fault.startswith(message)], faults


def test_what_the_house_allows_is_no_fault(tmp_path):
    files = {
        "pretrain/__init__.py": '"""A room."""',
        "pretrain/config.py": "import dataclasses\nfrom pretrain import rundir",
        "pretrain/rundir.py": "import os",
        "pretrain/train.py": "import jax\nfrom pretrain.config import local",
        "synth/__init__.py": '"""A room."""',
        "synth/main.py": "from pretrain.train import train",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    tree = read_tree(tmp_path)
    assert [fault for rule in RULES for fault in rule(tree)] == []
