"""A prompt is a text file: loaded, filled, hashed, and recognized again in a filled request."""

import functools
import hashlib
import re
import string
from dataclasses import dataclass
from pathlib import Path

from pretrain.config import ConfigError

PROMPTS = Path(__file__).parent / "prompts"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The two roles of one prompt file, with `{field}` places for values."""

    name: str
    system: str
    user: str
    sha256: str

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """The names of the places to fill, in order of first appearance."""
        parsed = [
            f for role in (self.system, self.user) for _, f, _, _ in string.Formatter().parse(role) if f
        ]
        return tuple(dict.fromkeys(parsed))

    def fill(self, **values: str) -> tuple[str, str]:
        """The system and the user message with every place filled; braces inside values are left alone.

        Raises:
          ValueError: a place without a value, or a value without a place.
        """
        if set(values) != set(self.fields):
            raise ValueError(f"prompt {self.name} has the fields {sorted(self.fields)}, got {sorted(values)}")
        return self.system.format(**values), self.user.format(**values)

    def extract(self, system: str, user: str) -> dict[str, str] | None:
        """The values with which `fill` made these messages, or None when another prompt made them."""
        values: dict[str, str] = {}
        for template, text in ((self.system, system), (self.user, user)):
            match = _pattern(template).fullmatch(text)
            if match is None:
                return None
            for name, value in match.groupdict().items():
                if values.setdefault(name, value) != value:
                    return None
        return values


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    seen: set[str] = set()
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(re.escape(literal))
        if name:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>.*)")
            seen.add(name)
    return re.compile("".join(parts), re.DOTALL)


@functools.cache
def load_prompt(name: str, folder: Path = PROMPTS) -> Prompt:
    """Read `<folder>/<name>.txt`: a `[system]` part, then a `[user]` part.

    Raises:
      ConfigError: there is no such prompt, or it has not both parts.
    """
    path = folder / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.txt")))
        where = "/".join(folder.parts[-2:])
        raise ConfigError(f"a prompt must be one of the files in {where}, got {name!r}; known: {known}")
    text = path.read_text(encoding="utf-8")
    match = re.fullmatch(r"\[system\]\n(.*)\n\[user\]\n(.*)\n", text, re.DOTALL)
    if match is None:
        raise ConfigError(f"{path.name} must be a [system] part followed by a [user] part")
    system, user = (part.strip("\n") for part in match.groups())
    return Prompt(name=name, system=system, user=user, sha256=hashlib.sha256(text.encode()).hexdigest())
