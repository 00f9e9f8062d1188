"""One HTML page that needs nothing else: pictures inside, no script, no request, all text escaped."""

import base64
import html
import re
from collections.abc import Sequence
from typing import Any

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# A browser asks for an icon unless the page holds one.
_ICON = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#1a1a1a}
h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2.2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.8em 0}
td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #eee}td:first-child,th:first-child{text-align:left}
pre{background:#f6f6f6;padding:.7em;overflow:auto;font-size:13px;white-space:pre-wrap}
img{max-width:100%}figure{margin:1em 0}figcaption,.note{color:#666}.doubt{color:#a33}
"""


def text(value: Any) -> str:
    """Escaped; characters that are no text in HTML are replaced."""
    kept = re.sub(r"[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "\ufffd", str(value))
    return html.escape(kept, quote=True)


def heading(title: str, level: int = 2) -> str:
    return f"<h{level}>{text(title)}</h{level}>"


def paragraph(content: str, kind: str = "") -> str:
    """A paragraph of plain text; `kind` note or doubt colors it."""
    return f"<p class='{kind}'>{text(content)}</p>" if kind else f"<p>{text(content)}</p>"


def code(content: str) -> str:
    return f"<pre>{text(content)}</pre>"


def figure(png: bytes, caption: str) -> str:
    """A PNG inside the page; the caption is also what a screen reader says."""
    data = base64.b64encode(png).decode()
    return f"<figure><img alt='{text(caption)}' src='data:image/png;base64,{data}'><figcaption>{text(caption)}</figcaption></figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Cells as they are given; numbers should come formatted."""
    head = "".join(f"<th>{text(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{text(v)}</td>" for v in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def page(title: str, parts: Sequence[str]) -> str:
    """The document."""
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{text(title)}</title>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="{_ICON}">'
        f"<style>{_STYLE}</style></head><body>{heading(title, 1)}\n" + "\n".join(parts) + "\n</body></html>\n"
    )
