"""The token inspector: a table for the terminal and a standalone HTML heat map.

The HTML file needs nothing else: no script, no font, no network. All text from models and data is
escaped, so a token `<script>` shows as text.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from qlearn.findings.credit import Credit
from qlearn.findings.objective import Objective
from qlearn.findings.precision import AT_LEAST, Noise
from qlearn.show.pieces import Piece

# Orange for blame and blue for credit: told apart by every common form of colour blindness.
BLAME, PRAISE = "230, 120, 20", "40, 110, 220"
STRONGEST = 0.7  # opacity of full colour: text stays readable on it, in the dark too
PERCENTILE = 0.95

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>qlearn inspect</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto;
  padding: 0 1rem; }}
p {{ max-width: 60rem; }}
code {{ overflow-wrap: anywhere; }}
.pair {{ display: grid; gap: 0 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }}
.pair > section {{ min-width: 0; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.token {{ border-radius: 3px; padding: 2px 1px; margin: 0 1px; }}
.prompt {{ opacity: .7; max-height: 12rem; overflow: auto; }}
h2 {{ font-size: 1.15rem; }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #8884; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0;
  font-family: ui-monospace, monospace; }}
.wide {{ overflow-x: auto; }}
</style>
<h1>{heading}</h1>
<p>{beta} · policy <code>{policy}</code> · reference <code>{reference}</code> · {dtype}</p>
<p>{legend}</p>
<h2>Prompt</h2>
<p class="text prompt">{prompt}</p>
<div class="pair">
{maps}
</div>
<div class="pair">
{tables}
</div>
</html>
"""


class Inspected(NamedTuple):
    """One response: what to call it, its pieces of text, the credit of each piece."""

    title: str
    pieces: Sequence[Piece]
    credit: Credit


class Measure(NamedTuple):
    """What the numbers of a page are: of which objective, at which precision, with which noise.

    Where the objective makes it a soft advantage, credit is β log π/π_ref in units of reward;
    elsewhere it is the log-ratio itself, in nats, and never called an advantage.
    """

    objective: Objective
    dtype: str = "float32"
    noise: Noise | None = None

    @property
    def beta(self) -> float:
        """β of an advantage; 1 for a log-ratio."""
        return self.objective.beta if self.objective.is_advantage else 1.0

    @property
    def column(self) -> str:
        return "advantage" if self.objective.is_advantage else "log_ratio"

    @property
    def columns(self) -> tuple[str, ...]:
        running = "value" if self.objective.is_advantage else "sum so far"
        return ("token", "log π", "log π_ref", self.column, running, "surprisal")

    def is_noise(self, credit: float, n_tokens: int) -> bool:
        """Whether a piece's credit is smaller than 95 % of the errors of so many tokens."""
        if self.noise is None:
            return False
        return abs(credit) < self.beta * self.noise.p95 * n_tokens**0.5

    def error(self, n_tokens: int) -> float | None:
        """The error to expect of a sum of so many tokens' credit; None where there is no noise."""
        return None if self.noise is None else self.beta * self.noise.of_sum(n_tokens)


def number(x: float) -> str:
    """Three decimals, or three significant digits where there is nothing before the second.

    >>> number(-12.3456), number(0.5), number(0.0123456), number(-0.0000123456), number(0.0)
    ('-12.346', '0.500', '0.0123', '-1.23e-05', '0.000')
    """
    return f"{x:.3f}" if abs(x) >= 0.1 or x == 0 else f"{x:#.3g}"


def table(response: Inspected, measure: Measure) -> str:
    """The credit of every piece, one line each, with the totals below."""
    labels = [str(piece) for piece in response.pieces]
    columns = measure.columns
    width = max(map(_cells, (columns[0], *labels)))

    def line(label: str, cells: Iterable[str]) -> str:
        right = (cell.rjust(max(9, len(c))) for cell, c in zip(cells, columns[1:], strict=False))
        return " ".join([_padded(label, width), *right])

    lines = [line(columns[0], columns[1:])]
    for label, *numbers in zip(labels, *(x.tolist() for x in response.credit), strict=True):
        lines.append(line(label, map(number, numbers)))
    c = response.credit
    sums = (number(total(x)) for x in (c.logp, c.ref_logp, c.advantage))
    lines.append(line("sum", sums) + _plus_minus(response, measure))
    return "\n".join(lines)


def html(
    responses: Sequence[Inspected], prompt: str, measure: Measure, policy: str, reference: str
) -> str:
    """One page for one prompt: the heat maps side by side on one colour scale, then the tables."""
    scale = colour_scale([x for r in responses for x in r.credit.advantage.tolist()])
    objective = measure.objective
    beta = f"β = {objective.beta:g}" if objective.is_advantage else "no β"
    return PAGE.format(
        heading="Token credit" if objective.is_advantage else "Token log-ratios",
        beta=beta, policy=escape(policy), reference=escape(reference), dtype=measure.dtype,
        legend=_legend(responses, measure, scale), prompt=escape(prompt),
        maps="\n".join(_map(r, measure, scale) for r in responses),
        tables="\n".join(_table(r, measure) for r in responses),
    )  # fmt: skip


def colour_scale(credit: Sequence[float]) -> float:
    """The |credit| that gets full colour: the 95th percentile, so that one outlier sets no scale.

    The percentile is a value that occurs, at least the second largest of three or more. Where it is
    0 the largest value counts, and 1 where all are 0.

    >>> colour_scale([0.1, -0.2, 0.3, 40.0])
    0.3
    """
    sizes = sorted(map(abs, credit))
    return sizes[int(PERCENTILE * (len(sizes) - 1))] or sizes[-1] or 1.0


def total(x) -> float:
    """The sum of a column, in float64."""
    return x.double().sum().item()


def _legend(responses: Sequence[Inspected], measure: Measure, scale: float) -> str:
    blue, orange = (
        f'<span class="token" style="background: rgba({colour}, {STRONGEST})">{word}</span>'
        for colour, word in ((PRAISE, "blue"), (BLAME, "orange"))
    )
    if measure.objective.is_advantage:
        meaning = (
            f"Each token is coloured by its soft advantage β (log π − log π_ref): {blue} where the "
            f"policy has learned that it helps, {orange} where it hurts, in units of reward."
        )
    else:
        meaning = (
            f"Each token is coloured by log π − log π_ref, in nats: {blue} where the policy writes "
            f"it more often than the reference, {orange} where less often. It is not scaled to a "
            f"reward: {escape(measure.objective.problem)}."
        )
    sizes = [abs(x) for r in responses for x in r.credit.advantage.tolist()]
    beyond = sum(size > scale for size in sizes)
    capped = (
        f"Full colour is ±{number(scale)}, the 95th percentile; the colour is capped there, and "
        f"{beyond} of {len(sizes)} pieces of text lie beyond, the farthest at {number(max(sizes))}."
    )
    return f"{meaning} {capped}{_noise_note(measure)}"


def _noise_note(measure: Measure) -> str:
    if measure.noise is None:
        return ""
    least, n_tokens = number(measure.beta * measure.noise.p95), measure.noise.n_tokens
    few = f", fewer than the {AT_LEAST} that it takes" if n_tokens < AT_LEAST else ""
    return (
        f" The models were read in {measure.dtype}: 95 % of its errors against float32, measured "
        f"on {n_tokens} tokens of yours{few}, are below {least}, and tokens below that stay "
        "without colour."
    )


def _map(response: Inspected, measure: Measure, scale: float) -> str:
    spans = []
    for piece, credit in zip(response.pieces, response.credit.advantage.tolist(), strict=True):
        colour = PRAISE if credit > 0 else BLAME
        alpha = STRONGEST * min(abs(credit) / scale, 1.0)
        if measure.is_noise(credit, piece.n_tokens):
            alpha = 0.0
        sign = "+" if credit >= 0 else ""
        spans.append(
            f'<span class="token" style="background: rgba({colour}, {alpha:.3f})" '
            f'title="{sign}{number(credit)}">{escape(piece.text)}</span>'
        )
    what = "implicit return" if measure.objective.is_advantage else "sum of log-ratios"
    sum_text = number(total(response.credit.advantage)) + _plus_minus(response, measure)
    return (
        f"<section><h2>{escape(response.title)}: {what} {sum_text}</h2>\n"
        f'<p class="text">{"".join(spans)}</p></section>'
    )


def _table(response: Inspected, measure: Measure) -> str:
    body = []
    for piece, *numbers in zip(
        response.pieces, *(x.tolist() for x in response.credit), strict=True
    ):
        cells = "".join(f"<td>{number(x)}</td>" for x in numbers)
        body.append(f"<tr><td>{escape(str(piece))}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(column)}</th>" for column in measure.columns)
    return (
        f"<section><h2>{escape(response.title)}</h2>\n"
        f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(body) + "</table></div></section>"
    )


def _plus_minus(response: Inspected, measure: Measure) -> str:
    error = measure.error(sum(piece.n_tokens for piece in response.pieces))
    return "" if error is None else f" ± {number(error)}"


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _cells(text))


def _cells(text: str) -> int:
    """How many columns of a terminal a text takes: CJK and emoji take two each."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
