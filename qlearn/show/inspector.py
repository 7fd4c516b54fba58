"""The token inspector: a table for the terminal and a standalone HTML heat map.

The HTML file needs nothing else: no script, no font, no network. All text from models and data is
escaped, so a token `<script>` shows as text.
"""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from qlearn.findings.credit import Credit

# Orange for blame and blue for credit: told apart by every common form of colour blindness.
BLAME, PRAISE = "230, 120, 20", "40, 110, 220"

COLUMNS = ("token", "log π", "log π_ref", "advantage", "value", "surprisal")

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>qlearn inspect</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.token {{ border-radius: 3px; padding: 2px 1px; margin: 0 1px; }}
.prompt {{ opacity: .7; max-height: 12rem; overflow: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #8884; }}
th:first-child, td:first-child {{ text-align: left; font-family: ui-monospace, monospace; }}
.wide {{ overflow-x: auto; }}
</style>
<h1>Token credit</h1>
<p>β = {beta:g} · policy <code>{policy}</code> · reference <code>{reference}</code></p>
<p>Each token is coloured by its soft advantage β (log π − log π_ref):
<span class="token" style="background: rgba({praise}, .6)">blue</span> where the policy has learned
that it helps, <span class="token" style="background: rgba({blame}, .6)">orange</span> where it
hurts, in units of reward; full colour is ±{scale:.3g}.</p>
<h2>Prompt</h2>
<p class="text prompt">{prompt}</p>
{sections}
</html>
"""


class Inspected(NamedTuple):
    """One response: what to call it, its tokens as text, their credit."""

    title: str
    tokens: Sequence[str]
    credit: Credit


def table(response: Inspected) -> str:
    """The credit of every token, one line each, with the totals below."""
    rows = _rows(response)
    width = max(len(COLUMNS[0]), *(len(row[0]) for row in rows))
    lines = [" ".join([COLUMNS[0].ljust(width), *(c.rjust(9) for c in COLUMNS[1:])])]
    lines += [" ".join([r[0].ljust(width), *(f"{x:9.3f}" for x in r[1:])]) for r in rows]
    c = response.credit
    sums = [f"{x.sum():9.3f}" for x in (c.logp, c.ref_logp, c.advantage)]
    lines.append(" ".join(["sum".ljust(width), *sums]))
    return "\n".join(lines)


def html(
    responses: Sequence[Inspected], prompt: str, beta: float, policy: str, reference: str
) -> str:
    """One page for one prompt: a heat map and a table for each response, on one colour scale."""
    scale = max(max(r.credit.advantage.abs().max().item() for r in responses), 1e-6)
    return PAGE.format(
        beta=beta, policy=escape(policy), reference=escape(reference), prompt=escape(prompt),
        scale=scale, praise=PRAISE, blame=BLAME,
        sections="\n".join(_section(r, scale) for r in responses),
    )  # fmt: skip


def _section(response: Inspected, scale: float) -> str:
    spans, body = [], []
    for token, *numbers in _rows(response, quote=False):
        advantage = numbers[2]
        colour = PRAISE if advantage > 0 else BLAME
        alpha = 0.8 * min(abs(advantage) / scale, 1.0)
        spans.append(
            f'<span class="token" style="background: rgba({colour}, {alpha:.3f})" '
            f'title="{advantage:+.3f}">{escape(token)}</span>'
        )
        cells = "".join(f"<td>{x:.3f}</td>" for x in numbers)
        body.append(f"<tr><td>{escape(repr(token))}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    total = response.credit.advantage.sum().item()
    return (
        f"<h2>{escape(response.title)}: implicit return {total:+.3f}</h2>\n"
        f'<p class="text">{"".join(spans)}</p>\n'
        f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(body) + "</table></div>"
    )


def _rows(response: Inspected, quote: bool = True) -> list[tuple]:
    columns = [x.tolist() for x in response.credit]
    names = [repr(token) if quote else token for token in response.tokens]
    return list(zip(names, *columns, strict=True))
