"""Pages of HTML without network and script, by day and by night, on a wide screen and on a narrow one."""

from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from data_pipeline.common.errors import printable

INK, SOFT, RULE = "#1b1f24", "#5b6570", "#dde2e8"
"""Colours by day: of text, of secondary text, of lines."""

_CSS = f"""
:root{{color-scheme:light dark;--ground:#fff;--ink:{INK};--soft:{SOFT};--rule:{RULE};--bad:#b42318}}
@media(prefers-color-scheme:dark){{:root{{--ground:#14171c;--ink:#e6e9ee;--soft:#9aa5b1;--rule:#2d343d;--bad:#ff9b8f}}}}
body{{margin:2rem auto;max-width:1440px;padding:0 1.5rem;background:var(--ground);color:var(--ink);
font:14px/1.5 system-ui,"DejaVu Sans",sans-serif}}
h1{{font-size:1.4rem;margin:0}}
h2{{font-size:1.1rem;margin:2rem 0 .4rem}}
p{{color:var(--soft);margin:.2rem 0 1.2rem}}
.table{{overflow-x:auto}}
table{{border-collapse:collapse}}
th,td{{padding:.45rem .8rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}}
th{{color:var(--soft);font-weight:600}}
td{{overflow-wrap:break-word;max-width:24rem}}
.number{{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}}
svg{{vertical-align:middle}}
small{{color:var(--soft);display:block;overflow-wrap:anywhere}}
.name{{min-width:9rem;overflow-wrap:anywhere}}
.name svg{{margin-right:.4rem}}
code{{font:12px/1.6 ui-monospace,"DejaVu Sans Mono",monospace;display:block;overflow-wrap:anywhere}}
.bad{{color:var(--bad)}}
@media(max-width:600px){{body{{margin:1rem auto;padding:0 .8rem}}
thead{{display:none}}table,tbody,tr,td{{display:block}}tr{{border-bottom:1px solid var(--rule);padding:.5rem 0}}
td,td.number{{border:0;max-width:none;padding:.1rem 0 .1rem 9rem;text-align:left;white-space:normal;
min-height:1.5em;position:relative}}
td::before{{content:attr(data-head);position:absolute;left:0;width:8.5rem;color:var(--soft)}}
td.name{{padding-left:0;font-weight:600}}td.name small{{font-weight:400}}td.name::before{{content:none}}}}
@media print{{body{{margin:0;max-width:none;font-size:11px}}.table{{overflow:visible}}
th,td{{padding:.25rem .5rem}}svg,tr{{break-inside:avoid}}h2{{break-after:avoid}}}}
"""

_BASE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{{ css }}</style></head><body><h1>{{ title }}</h1>
{% block body %}{% endblock %}
</body></html>
"""

_TABLES = """
{%- macro table(heads, rows) -%}
{# heads: (title, whether of figures); the first column names the row, on a narrow screen as a heading #}
<div class="table"><table><thead><tr>
{%- for head, figures in heads %}<th{{ kind(figures, loop.first) }}>{{ head }}</th>{% endfor -%}
</tr></thead><tbody>
{%- for row in rows %}
<tr>{% for cell in row %}{% set head, figures = heads[loop.index0] -%}
<td{{ kind(figures, loop.first) }} data-head="{{ head }}">{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}</tbody></table></div>
{%- endmacro -%}
{%- macro kind(figures, first) %}{% if first %} class="name"{% elif figures %} class="number"{% endif %}{% endmacro -%}
"""


def _text(value: Any) -> Any:
    """Make the value of a template's expression safe: text without control characters or lone surrogates."""
    return value if hasattr(value, "__html__") else printable(str(value))


def page(title: str, body: str, css: str = "", **values: Any) -> str:
    """Render a page with the template `body`, which may use `table(heads, rows)`; `css` adds to the style of all pages.

    All `values` are escaped, but for what is Markup.
    """
    templates = {
        "base": _BASE,
        "tables": _TABLES,
        "page": f"{{% extends 'base' %}}{{% from 'tables' import table %}}{{% block body %}}{body}{{% endblock %}}",
    }
    environment = Environment(
        loader=DictLoader(templates), autoescape=True, finalize=_text, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page").render(title=title, css=Markup(_CSS + css), **values) + "\n"
