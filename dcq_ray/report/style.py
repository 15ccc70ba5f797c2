"""How the page looks: its colours, light and dark, and its style sheet.

Okabe and Ito's colours, which colour-blind readers can tell apart, some of them darker on light paper and lighter on dark, so that
what is drawn has a contrast of 3 to the paper at least, and text one of 4.5 (WCAG 2.2, 1.4.3 and 1.4.11).
"""

from __future__ import annotations

from collections.abc import Mapping

LIGHT = {"paper": "#fcfcfb", "ink": "#1c2127", "soft": "#5b6570", "line": "#d9dde1", "accent": "#0072b2"}
DARK = {"paper": "#15181b", "ink": "#e7eaed", "soft": "#a2abb4", "line": "#363c42", "accent": "#56b4e9"}
# What plots are drawn in, and what stands for it on light and on dark paper.
SERIES = {
    "#0072b2": ("#0072b2", "#2a9be0"),
    "#e69f00": ("#b87a00", "#e69f00"),
    "#009e73": ("#008f68", "#00b585"),
    "#d55e00": ("#d55e00", "#f07a1f"),
    "#cc79a7": ("#b55f8f", "#d98ab6"),
    "#56b4e9": ("#3288bd", "#8fd0f5"),
    "#8a8a8a": ("#808080", "#8a8a8a"),
}


def themed(svg: str) -> str:
    """A plot whose colours are the page's variables, which a viewer of images alone does not know."""
    for number, color in enumerate(SERIES):
        svg = svg.replace(color, f"var(--series-{number}, {color})")
    return svg


def _variables(colors: Mapping[str, str], which: int) -> str:
    series = {f"series-{number}": pair[which] for number, pair in enumerate(SERIES.values())}
    return " ".join(f"--{name}: {color};" for name, color in {**colors, **series}.items())


STYLE = f""":root {{ color-scheme: light dark; {_variables(LIGHT, 0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK, 1)} }} }}
""" + """* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
.verdict { font-size: 1.15rem; border-left: 4px solid var(--accent); padding-left: .9rem; margin: 1rem 0 1.5rem; }
.status { color: var(--soft); margin: .2rem 0; }
.failed { border-color: #d55e00; }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
/* Beside a table that is wider than the page, its caption is not, and stays as the table scrolls. */
caption span { display: block; position: sticky; left: 0; max-width: min(67.5rem, 100vw - 2.5rem); }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody th { font-weight: inherit; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
td.text { white-space: normal; } td.text:last-child { min-width: 28rem; }
thead th { color: var(--soft); font-weight: 600; }
.scroll + .scroll { margin-top: 1.5rem; }
figure { margin: 1rem 0 0; color: var(--ink); } figure svg { width: 100%; height: auto; max-width: 38rem; }
figcaption { color: var(--soft); }
code { font-size: .9em; overflow-wrap: anywhere; }
@media (max-width: 32rem) { body { padding: 1.25rem .9rem 3rem; } th, td { padding: .35rem .4rem; } ul { padding-left: 1.2rem; } }
""".strip()
