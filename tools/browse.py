"""Opens a page in a headless chromium and says what it saw: console lines, and the size of every picture.

    python -m tools.browse runs/thesis/index.html

Exit code 1 when the console says anything or a picture does not open. Our pages forbid scripts, so their pictures are
measured in a page of their own.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=10000",
)  # fmt: skip
_PROBE = """<!doctype html><link rel='icon' href='data:,'>{pictures}<script>window.onload = () => {{
document.body.innerHTML = '<p>' + [...document.images].map(i => i.naturalWidth + 'x' + i.naturalHeight).join(' ') + '</p>' }}
</script>"""


def find_browser() -> str | None:
    """The program, None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def look(page: Path, browser: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Console lines, and (width, height) of every picture; a picture that does not open is (0, 0)."""
    sources = re.findall(r"<img[^>]*\ssrc=['\"](data:[^'\"]+)['\"]", page.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch) / "probe.html"
        probe.write_text(_PROBE.format(pictures="".join(f"<img src='{source}'>" for source in sources)))
        console = _open(browser, page, Path(scratch) / "first")[1]
        shown = _open(browser, probe, Path(scratch) / "second")[0]
    sizes = [(int(w), int(h)) for w, h in re.findall(r"(\d+)x(\d+)", shown)]
    assert len(sizes) == len(sources), f"{len(sources)} pictures in the page, {len(sizes)} measured"
    return [line for line in console.splitlines() if ":CONSOLE" in line], sizes


def _open(browser: str, page: Path, profile: Path) -> tuple[str, str]:
    done = subprocess.run(
        [browser, *_FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.absolute().as_uri()],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return done.stdout, done.stderr


def main(argv: Sequence[str]) -> int:
    """The return value is the process' exit code (2: bad input)."""
    browser = find_browser()
    if len(argv) != 1 or not Path(argv[0]).is_file() or browser is None:
        print("error: tools.browse takes one HTML file, and needs chromium on the PATH", file=sys.stderr)
        return 2
    console, sizes = look(Path(argv[0]), browser)
    for line in console:
        print(line)
    print(f"{len(sizes)} pictures: {', '.join(f'{w}x{h}' for w, h in sizes)}; {len(console)} console lines")
    return 1 if console or (0, 0) in sizes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
