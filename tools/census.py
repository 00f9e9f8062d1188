"""The size of the house, printed: files, functions, comments, the reading path. It never fails.

python -m tools.census
"""

import ast
import io
import statistics
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("pretrain", "synth", "research_env", "configs", "tools", "tests")
READING_PATH = ("main", "train", "step", "model/transformer")


def measure(path: Path) -> tuple[int, int, list[int]]:
    """(lines, comments, lines of each function) of a file."""
    text = path.read_text()
    comments = sum(t.type == tokenize.COMMENT for t in tokenize.generate_tokens(io.StringIO(text).readline))
    functions = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return len(text.splitlines()), comments, functions


def main() -> None:
    print(f"{'':14}{'files':>6}{'lines':>8}{'median':>8}{'longest':>9}{'function':>10}{'comments/100':>14}")
    for room in ROOMS:
        files = [p for p in sorted((ROOT / room).rglob("*.py")) if p.name != "__init__.py"]
        if not files:
            continue
        measured = [measure(path) for path in files]
        lines = [m[0] for m in measured]
        functions = [size for m in measured for size in m[2]] or [0]
        comments = 100 * sum(m[1] for m in measured) / max(1, sum(lines))
        print(
            f"{room:14}{len(files):6}{sum(lines):8}{statistics.median(lines):8.0f}{max(lines):9}"
            f"{statistics.median(functions):10.0f}{comments:14.1f}"
        )
    path = [ROOT / "pretrain" / f"{name}.py" for name in READING_PATH]
    total = sum(len(p.read_text().splitlines()) for p in path if p.exists())
    print(f"reading path {' -> '.join(READING_PATH)}: {total} lines")


if __name__ == "__main__":
    main()
