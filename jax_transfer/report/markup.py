"""Shared markup of the HTML pages. Each page is a single file without scripts or network requests."""

import html
import re

from jax_transfer.report import tables

CSS = """
:root { color-scheme: light dark; --text: #1d1f23; --quiet: #5b6068; --line: #d9dbdf; --page: #ffffff;
  --tint: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e7e8ea; --quiet: #a3a8b0; --line: #3b3f46; --page: #16181c; --tint: #1f2227; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h1, h2, h3, p, li, summary, figcaption { overflow-wrap: anywhere; }
p, li { max-width: 46rem; }
ul { padding-left: 1.2rem; }
li { margin: .5rem 0; }
.quiet, figcaption { color: var(--quiet); font-size: .875rem; }
.answer { font-size: 1.125rem; font-weight: 600; }
.table { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; vertical-align: baseline; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1px solid var(--text); }
td { border-bottom: 1px solid var(--line); }
td:not(.n) { white-space: normal; overflow-wrap: anywhere; min-width: 5.5rem; max-width: 20rem; }
th.n, td.n { text-align: right; padding-left: .75rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem; }
.figures + .figures { margin-top: 1.5rem; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figure svg { display: block; width: 100%; max-width: 30rem; height: auto; background: #fff; border-radius: 4px; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { margin-top: .4rem; max-width: 30rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--tint); padding: 1rem; border-radius: 4px; font-size: .8125rem; }
@media print { body { max-width: none; } .table { overflow: visible; } figure { break-inside: avoid; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
{body}
</body>
</html>
"""


def to_page(title: str, body: list[str]) -> str:
    """Returns the whole HTML document.

    Args:
      title: plain text, which is escaped.
      body: elements of the page as HTML, which are not escaped.

    >>> print(to_page("Birds & bees", ["<p>Hello</p>"]))
    <!DOCTYPE html>
    ...
    <title>Birds &amp; bees</title>
    ...
    <p>Hello</p>
    </body>
    </html>
    """
    return PAGE.format(title=escape(title), css=CSS, body="\n".join(body))


def escape(text: str, keep_lines: bool = False) -> str:
    """Escapes text for HTML and replaces the characters that HTML cannot contain.

    Args:
      text: plain text.
      keep_lines: whether to keep line breaks instead of replacing them.

    >>> escape("a < b\\nc"), escape("a < b\\nc", keep_lines=True)
    ('a &lt; b�c', 'a &lt; b\\nc')
    """
    return "\n".join(html.escape(tables.showable(line)) for line in (text.split("\n") if keep_lines else [text]))


def inline_svg(svg: str, prefix: str, label: str) -> str:
    """Turns an SVG document into an element of an HTML page, with a prefix for its ids and the references to them.

    Args:
      svg: the SVG document.
      prefix: prefix for the ids, unique on the page.
      label: description for screen readers.

    >>> inline_svg('<?xml version="1.0"?><svg><path id="a"/><use xlink:href="#a"/></svg>', "f1-", "Curves")
    '<svg role="img" aria-label="Curves"><path id="f1-a"/><use xlink:href="#f1-a"/></svg>'
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL
    )  # an inline <style> would apply to the whole page
    svg = re.sub(r'(<[^<>]*\sid=")', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
