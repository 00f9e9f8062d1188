"""Unified diffs as values: read, check against a path policy, apply in memory, reverse, write.

Patch tools are not relied on: `git apply --unsafe-paths` writes outside the tree, and `patch` leaves reject files
and links behind. Here a tree is a mapping {path: bytes}, `apply_diff` returns a new mapping or raises, and nothing
touches a disk.

Reading is tolerant where language models are sloppy (fences, prose around the diff, wrong hunk counts, CRLF) and
strict where a header could mean something else than we understand (links, modes, renames, binary hunks).
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

Tree = Mapping[str, bytes]
NO_NEWLINE = "\\ No newline at end of file"


class DiffRefused(Exception):
    """Not a diff that we accept: the text is malformed, or a path or header breaks the policy."""


class DiffFailed(Exception):
    """A well-formed diff that does not apply to this tree."""


@dataclasses.dataclass(frozen=True)
class Hunk:
    """Lines are (tag, text) with tag ' ', '-', '+'; text ends with a newline unless the file's last line has none."""

    old_start: int
    new_start: int
    lines: tuple[tuple[str, str], ...]
    trusted: bool = dataclasses.field(default=True, compare=False)  # the header's counts fitted the body

    @property
    def old(self) -> list[str]:
        """The lines that must be there."""
        return [text for tag, text in self.lines if tag != "+"]

    @property
    def new(self) -> list[str]:
        """The lines that take their place."""
        return [text for tag, text in self.lines if tag != "-"]


@dataclasses.dataclass(frozen=True)
class FileDiff:
    """The change of one file; `old` is None for a new file, `new` is None for a deleted one."""

    old: str | None
    new: str | None
    hunks: tuple[Hunk, ...]

    @property
    def path(self) -> str:
        """The one path it touches."""
        path = self.new if self.new is not None else self.old
        assert path is not None
        return path


@dataclasses.dataclass(frozen=True)
class Diff:
    """A change of several files; empty is the baseline itself."""

    files: tuple[FileDiff, ...] = ()


# --- reading -----------------------------------------------------------------------------------------

_HUNK = re.compile(r"@@ -(\d{1,9})(?:,(\d{1,9}))? \+(\d{1,9})(?:,(\d{1,9}))? @@")
_LOOSE_HUNK = re.compile(r"@@(?: .*)?$")
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([A-Za-z]*)[ \t]*$")
_HARMLESS = re.compile(
    r"index [0-9a-fA-F]{4,64}\.\.[0-9a-fA-F]{4,64}( 100(644|755))?"
    r"|(new file|deleted file|old|new) mode 100(644|755)"
    r"|(dis)?similarity index \d{1,3}%"
)
# After the last hunk prose may follow, but nothing that a patch tool would act on.
_ACTIVE = re.compile(
    r"(rename|copy) (from|to) |(old|new|new file|deleted file) mode |Binary files |GIT binary patch|Subproject commit "
    r"|(literal|delta) \d|Index: |Prereq: |Only in |\*\*\* "
)


def parse_diff(text: str) -> Diff:
    """Read a unified diff, alone or inside a model's reply.

    Raises:
      DiffRefused: no diff in the text, or a header that is not understood.
    """
    lines = text.split("\n")
    first = next((line for line in lines if line.startswith(("+++ ", "@@ "))), "")
    if first.endswith("\r"):  # the transport turned newlines into CRLF; a CR inside hunks alone is content
        lines = [line.removesuffix("\r") for line in lines]
    lines = _unfence(lines)
    files: list[FileDiff] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.startswith("diff --git ") or _is_file_header(lines, at):
            file, at = _parse_file(lines, at)
            if file is not None:
                files.append(file)
        elif line.startswith("diff "):
            raise DiffRefused(
                f"only unified diffs are accepted, got {_quote(line)}; use '--- a/path' and '+++ b/path'"
            )
        elif line.startswith("@@ ") and _HUNK.match(line):
            raise DiffRefused(
                f"line {at + 1}: a hunk needs its '--- a/path' and '+++ b/path' lines before it"
            )
        elif _ACTIVE.match(line):
            raise DiffRefused(f"line {at + 1}: {_quote(line)} is not accepted; only text hunks of files are")
        else:
            at += 1
    if not files:
        raise DiffRefused(
            "no file header found: a diff has lines '--- a/path', '+++ b/path', '@@ -l,n +l,n @@'"
        )
    seen: set[str] = set()
    for file in files:
        if file.path in seen:
            raise DiffRefused(f"{file.path} is changed twice; put all hunks of a file under one header")
        seen.add(file.path)
    return Diff(tuple(files))


def _unfence(lines: list[str]) -> list[str]:
    """The contents of the fenced blocks that hold a diff; all lines when no fence does."""
    kept: list[str] = []
    block: list[str] | None = None
    fence = ""
    for line in lines:
        match = _FENCE.match(line)
        if block is None:
            # A diff line that starts with a fence is context (it has a tag before it), so this is a real fence.
            if match and not line.startswith((" ", "\t")):
                block, fence = [], match[1]
        elif (
            match
            and match[1].startswith(fence[:3])
            and len(match[1]) >= len(fence)
            and not match[2]
            and line[:1] not in " +-"
        ):
            if any(item.startswith("--- ") for item in block):
                kept += block
            block = None
        else:
            block.append(line)
    if block is not None and any(item.startswith("--- ") for item in block):
        kept += block  # a reply that was cut off before its closing fence
    return kept or lines


def _is_file_header(lines: Sequence[str], at: int) -> bool:
    return lines[at].startswith("--- ") and at + 1 < len(lines) and lines[at + 1].startswith("+++ ")


def _parse_file(lines: list[str], at: int) -> tuple[FileDiff | None, int]:
    named: tuple[str, str] | None = None
    marks: set[str] = set()
    if lines[at].startswith("diff --git "):
        match = re.fullmatch(r"diff --git (\S+) (\S+)", lines[at].rstrip())
        if match is None:
            raise DiffRefused(
                f"line {at + 1}: {_quote(lines[at])} is not 'diff --git a/path b/path' with plain paths"
            )
        named = (match[1], match[2])
        at += 1
        while (
            at < len(lines) and not _is_file_header(lines, at) and not lines[at].startswith(("diff ", "@@"))
        ):
            line = lines[at].rstrip()
            if line and not _HARMLESS.fullmatch(line):
                raise DiffRefused(
                    f"line {at + 1}: header {_quote(line)} is not accepted; modes are 644 or 755, no links, renames or binaries"
                )
            marks.add(line.split(" mode")[0])
            at += 1
    if at >= len(lines) or not _is_file_header(lines, at):
        assert named is not None
        left, right = _strip_prefix(named[0], "a/"), _strip_prefix(named[1], "b/")
        if left != right:
            raise DiffRefused(
                f"'diff --git {named[0]} {named[1]}' names two paths; write a deletion and a new file"
            )
        if "new file" in marks:
            return FileDiff(None, right, ()), at  # an empty new file has no hunks
        if "deleted file" in marks:
            return FileDiff(left, None, ()), at
        if at < len(lines) and lines[at].startswith("@@"):
            raise DiffRefused(f"{left}: hunks need '--- a/path' and '+++ b/path' lines before them")
        raise DiffRefused(f"{left}: the change is empty (a mode alone cannot be changed)")
    old = _header_path(lines[at][4:], "a/", at)
    new = _header_path(lines[at + 1][4:], "b/", at + 1)
    at += 2
    if old is None and new is None:
        raise DiffRefused(f"line {at}: both sides are /dev/null")
    if old is not None and new is not None and old != new:
        raise DiffRefused(
            f"line {at}: {_quote(old)} becomes {_quote(new)}; write a rename as a deletion and a new file"
        )
    path = new if new is not None else old
    assert path is not None
    if named is not None and {_strip_prefix(named[0], "a/"), _strip_prefix(named[1], "b/")} != {path}:
        raise DiffRefused(f"line {at}: 'diff --git' and '---/+++' lines name different paths")
    hunks: list[Hunk] = []
    while at < len(lines):
        if _HUNK.match(lines[at]) or (lines[at].startswith("@@") and _LOOSE_HUNK.match(lines[at])):
            hunk, at = _parse_hunk(lines, at)
            hunks.append(hunk)
        elif lines[at].strip() == "" and at + 1 < len(lines) and lines[at + 1].startswith("@@"):
            at += 1
        else:
            break
    if not hunks:
        raise DiffRefused(f"{path}: no hunk follows the header; a hunk starts with '@@ -l,n +l,n @@'")
    return FileDiff(old, new, tuple(hunks)), at


def _strip_prefix(path: str, prefix: str) -> str:
    return path[2:] if path.startswith(prefix) else path


def _header_path(text: str, prefix: str, at: int) -> str | None:
    path = text.split("\t")[0].rstrip()
    if path == "/dev/null":
        return None
    if path.startswith('"'):
        raise DiffRefused(f"line {at + 1}: quoted paths are not accepted; use plain characters")
    if not path:
        raise DiffRefused(f"line {at + 1}: the header names no path")
    return _strip_prefix(path, prefix)


def _is_boundary(lines: Sequence[str], at: int) -> bool:
    return (
        at >= len(lines)
        or lines[at].startswith(("diff --git ", "@@ "))
        or _is_file_header(lines, at)
        or lines[at][:1] not in ("+", "-", " ", "\\")
    )


def _parse_hunk(lines: list[str], at: int) -> tuple[Hunk, int]:
    header = _HUNK.match(lines[at])
    start = at + 1
    if header is not None:
        old_start, new_start = int(header[1]), int(header[3])
        num_old = int(header[2]) if header[2] is not None else 1
        num_new = int(header[4]) if header[4] is not None else 1
        body, at = _take_counted(lines, start, num_old, num_new)
        if body is not None:
            return Hunk(old_start, new_start, tuple(body)), at
    else:
        old_start = new_start = 0
    body, at = _take_until_boundary(lines, start)
    if not body:
        raise DiffRefused(f"line {start}: the hunk is empty")
    return Hunk(old_start, new_start, tuple(body), trusted=False), at


def _take_counted(
    lines: list[str], at: int, num_old: int, num_new: int
) -> tuple[list[tuple[str, str]] | None, int]:
    """The hunk's lines when the header's counts fit exactly, else None."""
    body: list[tuple[str, str]] = []
    while num_old > 0 or num_new > 0:
        if at >= len(lines):
            return None, at
        line = lines[at]
        tag, content = line[:1], line[1:] + "\n"
        if tag == "\\" and body:
            body[-1] = (body[-1][0], body[-1][1].removesuffix("\n"))
            at += 1
            continue
        if tag == "" and at + 1 < len(lines):
            tag = " "  # editors strip the single space of an empty context line
        if tag not in (" ", "-", "+"):
            return None, at
        num_old -= tag in " -"
        num_new -= tag in " +"
        body.append((tag, content))
        at += 1
    if num_old < 0 or num_new < 0 or not body:
        return None, at
    if at < len(lines) and lines[at].startswith("\\"):
        body[-1] = (body[-1][0], body[-1][1].removesuffix("\n"))
        at += 1
    if not _is_boundary(lines, at):
        return None, at
    return body, at


def _take_until_boundary(lines: list[str], at: int) -> tuple[list[tuple[str, str]], int]:
    body: list[tuple[str, str]] = []
    while at < len(lines):
        line = lines[at]
        if line.startswith(("diff --git ", "@@")) or _is_file_header(lines, at):
            break
        if line.startswith("\\"):
            if body:
                body[-1] = (body[-1][0], body[-1][1].removesuffix("\n"))
        elif line == "":
            body.append((" ", "\n"))
        elif line[0] in " +-":
            body.append((line[0], line[1:] + "\n"))
        else:
            break
        at += 1
    while body and body[-1] == (" ", "\n"):
        body.pop()  # blank lines between the diff and the prose after it
    return body, at


def _quote(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


# --- policy ------------------------------------------------------------------------------------------

_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathPolicy:
    """Which paths a diff may touch: an allow-list, so that a form nobody thought of is refused."""

    editable: tuple[str, ...]  # files, or folders ending in "/"; "" is the whole tree
    locked: tuple[str, ...] = ()  # files or folders that stay locked inside an editable folder
    suffixes: tuple[str, ...] = (".py", ".toml", ".json", ".txt", ".md", ".cfg", ".yaml", ".yml", ".sh")
    max_diff_bytes: int = 400_000
    max_files: int = 40
    max_hunks: int = 400
    max_line_bytes: int = 4_000
    max_file_bytes: int = 1_000_000

    def is_locked(self, path: str) -> bool:
        """Whether `path` is a locked file, lies in a locked folder, or would replace one by a file."""
        return any(
            path == lock.rstrip("/") or path.startswith(lock.rstrip("/") + "/") for lock in self.locked
        )

    def refusal(self, path: str) -> str | None:
        """Why this path may not be touched, or None."""
        if not path or len(path) > 200:
            return "paths have 1 to 200 characters"
        if path.startswith("/"):
            return "paths are relative to the codebase"
        for part in path.split("/"):
            if not _COMPONENT.fullmatch(part):
                return f"path component {_quote(part)} must match {_COMPONENT.pattern} (so no '..', no hidden files)"
        if self.is_locked(path):
            return "the path is locked"
        if not any(
            path == rule or rule == "" or (rule.endswith("/") and path.startswith(rule))
            for rule in self.editable
        ):
            return f"the path is not editable; editable are {', '.join(self.editable)}"
        if not path.endswith(self.suffixes):
            return f"the suffix is not allowed; allowed are {', '.join(self.suffixes)}"
        return None


def check_text(text: str, policy: PathPolicy) -> None:
    """Refuse by size before anything is parsed.

    Raises:
      DiffRefused: too many bytes, or a line that is too long.
    """
    num_bytes = len(text.encode("utf-8", "surrogatepass"))
    if num_bytes > policy.max_diff_bytes:
        raise DiffRefused(f"a diff has at most {policy.max_diff_bytes} bytes, got {num_bytes}")
    longest = max((len(line) for line in text.split("\n")), default=0)
    if longest > policy.max_line_bytes:
        raise DiffRefused(f"a line has at most {policy.max_line_bytes} characters, got {longest}")


def check_diff(diff: Diff, policy: PathPolicy) -> None:
    """Check every path any header names, and the counts.

    Raises:
      DiffRefused: the rule that is broken, for all files at once.
    """
    faults = []
    if len(diff.files) > policy.max_files:
        faults.append(f"a diff changes at most {policy.max_files} files, got {len(diff.files)}")
    num_hunks = sum(len(file.hunks) for file in diff.files)
    if num_hunks > policy.max_hunks:
        faults.append(f"a diff has at most {policy.max_hunks} hunks, got {num_hunks}")
    for file in diff.files:
        for path in {file.old, file.new} - {None}:
            assert path is not None
            if reason := policy.refusal(path):
                faults.append(f"{_quote(path)}: {reason}")
    if faults:
        raise DiffRefused("; ".join(faults))


# --- applying ----------------------------------------------------------------------------------------


def apply_diff(tree: Tree, diff: Diff) -> dict[str, bytes]:
    """The changed tree; the given one is never touched, so a failure leaves nothing behind.

    A hunk goes where its header says when its old lines stand there; otherwise they must occur exactly once.

    Raises:
      DiffFailed: with the file and the hunk that do not fit.
      DiffRefused: added text that is not valid Unicode.
    """
    result = dict(tree)
    for file in diff.files:
        path = file.path
        if file.old is None:
            if path in tree:
                raise DiffFailed(f"{path}: the diff creates it, but it exists")
            result[path] = _encode(_new_contents(file))
        else:
            if path not in tree:
                raise DiffFailed(f"{path}: no such file; files are {', '.join(sorted(tree)[:20])}")
            lines = _apply_hunks(path, split_lines(_decode(tree[path])), file.hunks)
            if file.new is not None:
                result[path] = _encode("".join(lines))
            elif lines and file.hunks:
                raise DiffFailed(f"{path}: the diff deletes it, but {len(lines)} lines would be left")
            else:
                del result[path]
    folders = {path.rsplit("/", i + 1)[0] for path in result for i in range(path.count("/"))}
    if clash := sorted(folders & result.keys()):
        raise DiffFailed(f"{clash[0]}: cannot be a file and a folder")
    return result


def reverse_diff(diff: Diff) -> Diff:
    """The diff that takes the change back."""
    swap = {" ": " ", "-": "+", "+": "-"}
    files = []
    for file in diff.files:
        hunks = tuple(
            Hunk(h.new_start, h.old_start, tuple((swap[tag], text) for tag, text in h.lines), h.trusted)
            for h in file.hunks
        )
        files.append(FileDiff(file.new, file.old, hunks))
    return Diff(tuple(files))


def _new_contents(file: FileDiff) -> str:
    lines: list[str] = []
    for hunk in file.hunks:
        if hunk.old:
            raise DiffFailed(f"{file.path}: a new file can only have added lines")
        lines += hunk.new
    if any(not line.endswith("\n") for line in lines[:-1]):
        raise DiffFailed(f"{file.path}: only the last line may lack its newline")
    return "".join(lines)


def _apply_hunks(path: str, lines: list[str], hunks: Sequence[Hunk]) -> list[str]:
    out: list[str] = []
    done = 0  # lines of the old file that are already copied
    for number, hunk in enumerate(hunks, 1):
        start = _find(path, lines, hunk, done, number)
        out += lines[done:start] + hunk.new
        done = start + len(hunk.old)
    out += lines[done:]
    if any(not line.endswith("\n") for line in out[:-1]):
        raise DiffFailed(
            f"{path}: a line without newline would stand inside the file; end added lines with a newline"
        )
    return out


def _find(path: str, lines: list[str], hunk: Hunk, done: int, number: int) -> int:
    old = hunk.old
    stated = hunk.old_start - 1 if old else hunk.old_start
    if hunk.trusted and done <= stated <= len(lines) and lines[stated : stated + len(old)] == old:
        return stated
    if not old:
        if not lines:
            return 0
        raise DiffFailed(
            f"{path}: hunk {number} has no context and its line number {hunk.old_start} does not fit"
        )
    places = [
        i
        for i in range(done, len(lines) - len(old) + 1)
        if lines[i] == old[0] and lines[i : i + len(old)] == old
    ]
    if len(places) == 1:
        return places[0]
    if places:
        raise DiffFailed(f"{path}: hunk {number} matches {len(places)} places; add context lines")
    raise DiffFailed(f"{path}: hunk {number} does not match; {_nearest_lines(lines, old)}")


def _nearest_lines(lines: list[str], old: list[str]) -> str:
    """The first expected line that the file lacks, with the file's nearest line: what a repair needs to see."""
    present = set(lines)
    for line in old:
        if line not in present:
            near = difflib.get_close_matches(line, lines[:4000], n=1, cutoff=0.5)
            hint = f"; the nearest is {_quote(near[0].rstrip())}" if near else ""
            return f"the file has no line {_quote(line.rstrip())}{hint}"
    return "each of its lines exists, but not in this order"


# --- writing -----------------------------------------------------------------------------------------


def make_diff(old: Tree, new: Tree, *, num_context: int = 3) -> Diff:
    """The canonical diff between two trees: files sorted, each hunk with enough context to match once."""
    files = []
    for path in sorted(set(old) | set(new)):
        if old.get(path) == new.get(path):
            continue
        before = split_lines(_decode(old[path])) if path in old else []
        after = split_lines(_decode(new[path])) if path in new else []
        hunks = _make_hunks(before, after, num_context)
        files.append(FileDiff(path if path in old else None, path if path in new else None, hunks))
    return Diff(tuple(files))


def _make_hunks(before: list[str], after: list[str], num_context: int) -> tuple[Hunk, ...]:
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    hunks = []
    for group in matcher.get_grouped_opcodes(num_context):
        body: list[tuple[str, str]] = []
        for op, i1, i2, j1, j2 in group:
            if op == "equal":
                body += [(" ", line) for line in before[i1:i2]]
            else:
                body += [("-", line) for line in before[i1:i2]]
                body += [("+", line) for line in after[j1:j2]]
        # An empty side counts from the line before it: "-0,0" for a new file.
        (_, i1, _, j1, _), (_, _, i2, _, j2) = group[0], group[-1]
        hunks.append(Hunk(i1 + (i2 > i1), j1 + (j2 > j1), tuple(body)))
    return tuple(hunks)


def emit_diff(diff: Diff) -> str:
    """The text of a diff; `parse_diff` reads it back to an equal value."""
    if not diff.files:
        return ""
    lines: list[str] = []
    for file in diff.files:
        lines.append(f"diff --git a/{file.path} b/{file.path}\n")
        if file.old is None:
            lines.append("new file mode 100644\n")
        if file.new is None:
            lines.append("deleted file mode 100644\n")
        if file.hunks:
            lines.append("--- /dev/null\n" if file.old is None else f"--- a/{file.old}\n")
            lines.append("+++ /dev/null\n" if file.new is None else f"+++ b/{file.new}\n")
        for hunk in file.hunks:
            lines.append(f"@@ -{hunk.old_start},{len(hunk.old)} +{hunk.new_start},{len(hunk.new)} @@\n")
            for tag, text in hunk.lines:
                lines.append(tag + text if text.endswith("\n") else f"{tag}{text}\n{NO_NEWLINE}\n")
    return "".join(lines)


def split_lines(text: str) -> list[str]:
    """Lines with their newline, split at \\n alone (str.splitlines also splits at form feeds and more)."""
    parts = text.split("\n")
    lines = [part + "\n" for part in parts[:-1]]
    return lines + [parts[-1]] if parts[-1] else lines


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise DiffRefused(
            f"the diff holds characters that are not valid Unicode text: {error.reason}"
        ) from error


def read_change(text: str, base: Tree, policy: PathPolicy) -> tuple[dict[str, bytes], str]:
    """The road every diff takes: size, parse, policy, apply, policy on the result; returns (tree, canonical diff).

    Empty text is the base itself.

    Raises:
      DiffRefused: PATCH_REJECTED.
      DiffFailed: PATCH_FAILED.
    """
    if not text.strip():
        return dict(base), ""
    check_text(text, policy)
    diff = parse_diff(text)
    check_diff(diff, policy)
    try:
        tree = apply_diff(base, diff)
    except UnicodeEncodeError as error:
        raise DiffRefused(
            f"the diff holds characters that are not valid Unicode text: {error.reason}"
        ) from error
    for path in changed_paths(base, tree):
        if len(tree.get(path, b"")) > policy.max_file_bytes:
            raise DiffRefused(f"{path}: a file has at most {policy.max_file_bytes} bytes")
        if b"\0" in tree.get(path, b""):
            raise DiffRefused(f"{path}: files are text, a NUL byte is not")
    return tree, emit_diff(make_diff(base, tree))


def changed_paths(old: Tree, new: Tree) -> Iterable[str]:
    """Paths whose bytes differ, sorted."""
    return (path for path in sorted(set(old) | set(new)) if old.get(path) != new.get(path))
