"""How every test runs: eight fake CPU devices, strict jax, warnings are errors, `slow` only when asked for."""

import os
import shutil
import tempfile

import hypothesis
import pytest

# Read by jax when it is imported, hence set here, before any test module is. Subprocesses inherit them.
_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Eight devices share one pool of threads; two programs with collectives in flight must both find room in it.
os.environ.setdefault("PJRT_NPROC", "32")
# Many tests start the same small program anew, in this process or another: it is compiled once. Workers share what
# the process that started them made.
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not _IS_WORKER:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Compilation makes the first example slow and later ones fast, so a deadline would only measure the cache.
# Derandomized: a default test that fails must fail again on the next machine.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("default")

# Warnings of others that we can do nothing about: (filter, reason).
ALLOWED_WARNINGS: tuple[tuple[str, str], ...] = (
    ("ignore:Error writing persistent compilation cache:UserWarning", "tests that fill the disk meet it too"),
    (
        "ignore:Error reading persistent compilation cache:UserWarning",
        "a killed process left a part of an entry",
    ),
    (
        r"ignore:os\.fork\(\) was called:RuntimeWarning",
        "Ray and other libraries start programs by fork and exec, which is safe beside jax's threads",
    ),
    (
        "ignore:coroutine '.*(CheckpointHandler|cancellable|serialize|_create_paths|_save_fn).*' was never awaited:RuntimeWarning",
        "Orbax leaves them behind when a save fails, as tests that fill the disk make it",
    ),
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    for warning, _reason in ALLOWED_WARNINGS:
        config.addinivalue_line("filterwarnings", warning)
    # The default tests compile thousands of tiny programs and compute next to nothing: LLVM's optimizations would be
    # half of their time. Tests asked for by their mark run real models, compare with peers, compile for chips.
    if not config.getoption("markexpr"):
        os.environ["XLA_FLAGS"] += (
            " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        )
    # Only `device` tests may see an accelerator; the others compare bits and need the fake CPU devices.
    if "device" not in (config.getoption("markexpr") or ""):
        os.environ["JAX_PLATFORMS"] = "cpu"


def pytest_unconfigure(config: pytest.Config) -> None:
    if not _IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    expression = config.getoption("markexpr") or ""
    for name, remedy in (
        ("slow", "minutes, or an optional package: run with -m slow"),
        ("device", "needs an accelerator: run with -m device"),
        ("pods", "compiles for many chips, minutes each: run with -m pods"),
    ):
        if name not in expression:
            for item in items:
                if name in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=remedy))


@pytest.fixture(scope="session")
def isolation():
    """The first level of the sandbox that holds on this host, proved once."""
    from research_env.sandbox.ladder import probe  # here, since most tests need no sandbox

    for level in ("unshare", "bwrap", "landlock"):
        found = probe(level)
        if found.is_held:
            return found
    pytest.skip(f"no level of isolation holds on this host: {found.checks}")
