"""Pages of HTML that need no network and run no script, by day and by night."""

import html

from data_pipeline.sources.quarantine import printable

CSS = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1f24;--soft:#5b6570;--rule:#dde2e8;--bad:#b42318}
@media(prefers-color-scheme:dark){:root{--ground:#14171c;--ink:#e6e9ee;--soft:#9aa5b1;--rule:#2d343d;--bad:#ff9b8f}}
body{margin:2rem auto;max-width:1440px;padding:0 1.5rem;background:var(--ground);color:var(--ink);
font:14px/1.5 system-ui,"DejaVu Sans",sans-serif}
h1{font-size:1.4rem;margin:0}
p{color:var(--soft);margin:.2rem 0 1.2rem}
.table{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{padding:.45rem .8rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
th{color:var(--soft);font-weight:600;white-space:nowrap}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td svg{vertical-align:middle;margin-right:.4rem}
small{color:var(--soft);display:block;overflow-wrap:anywhere}
.name{min-width:14rem}
.name,code{overflow-wrap:anywhere}
code{font:12px/1.6 ui-monospace,"DejaVu Sans Mono",monospace;display:block}
.bad{color:var(--bad)}
"""


def text(value: object) -> str:
    """The value as text of a page, whatever bytes are in it."""
    return html.escape(printable(str(value)))


def document(title: str, css: str, body: str) -> str:
    """A page that may load nothing: `css` adds to the style that all have, pictures lie in the page itself."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<style>{CSS}{css}</style></head><body><h1>{text(title)}</h1>{body}</body></html>\n"
    )
