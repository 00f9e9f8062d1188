"""Long texts in windows: cut at paragraphs, else at lines, sentences, spaces."""


def windows_of(text: str, limit: int | None) -> list[str]:
    """The text in pieces of at most `limit` characters; None leaves it whole."""
    if limit is None or len(text) <= limit:
        return [text]
    windows = []
    rest = text
    while len(rest) > limit:
        cut = -1
        for mark in ("\n\n", "\n", ". ", " "):
            if cut < 0:
                cut = rest.rfind(mark, limit // 3, limit)
        cut = limit if cut < 0 else cut + 1
        windows.append(rest[:cut])
        rest = rest[cut:]
    if rest.strip():
        windows.append(rest)
    return [window.strip() for window in windows if window.strip()]
