"""The inspector's page: escaped, standalone, coloured by sign."""

import re

import torch

from qlearn.findings.credit import Credit
from qlearn.findings.objective import Objective
from qlearn.findings.precision import Noise
from qlearn.show import inspector
from qlearn.show.inspector import Inspected, Measure
from qlearn.show.pieces import Piece

PLAIN = Measure(Objective(0.1, "sigmoid", "--beta", ""))


def credit(*advantages):
    a = torch.tensor(advantages)
    return Credit(a - 1, -torch.ones_like(a), a, a.cumsum(0), torch.ones_like(a))


def page(tokens, prompt="p", policy="P", measure=PLAIN, advantages=None):
    advantages = advantages or ([0.5, -1.0] * len(tokens))[: len(tokens)]
    response = Inspected("chosen", [Piece(token, 1) for token in tokens], credit(*advantages))
    return inspector.html([response], prompt, measure, policy, "R")


def strengths(html):
    """The opacity of each token's colour, 0 where it has none."""
    tokens = re.findall(r'<span class="token"([^>]*) title', html)
    return [float(m[1]) if (m := re.search(r"([\d.]+)\)", token)) else 0.0 for token in tokens]


def test_claim_tokens_cannot_inject_markup():
    """A token <script> shows as text, in the map, the table and the prompt."""
    evil = "<script>alert(1)</script>"
    html = page([evil, '" onmouseover="x'], prompt=evil, policy=evil)
    assert "<script" not in html and html.count("&lt;script&gt;") >= 4
    assert 'title="+0.500"' in html and "onmouseover=&quot;x" in html


def test_claim_the_page_needs_nothing_else():
    html = page(["a", "b"])
    assert not re.search(r"(src|href)=|@import|url\(|https?://|<script", html)


def test_claim_sign_decides_the_colour_and_size_its_strength():
    html = page(["good", "bad", "best"], advantages=[0.25, -0.5, 1.0])
    colours = re.findall(r'class="token" style="background: rgba\(([^"]+)\)" title', html)
    good, bad, _ = colours
    assert good.startswith(inspector.PRAISE) and bad.startswith(inspector.BLAME)
    assert float(good.split(",")[-1]) < float(bad.split(",")[-1]) <= inspector.STRONGEST


def test_claim_one_outlier_does_not_set_the_scale():
    """Forty tokens near 1 and one at 50: the forty keep their colours; the page says the cap."""
    html = page(["a"] * 41, advantages=[1.0] * 40 + [-50.0])
    assert min(strengths(html)) > 0.9 * inspector.STRONGEST
    assert "95" in html


def test_claim_what_rounding_could_be_is_neutral():
    """A token below 95 % of the errors has no colour; sums carry their error."""
    noise = Noise(n_tokens=64, std=1.0, p95=2.0, sum_std=3.0, length=4.0)
    measure = PLAIN._replace(dtype="bfloat16", noise=noise)
    html = page(["a", "b"], measure=measure, advantages=[0.19, 0.21])  # β · p95 = 0.2
    neutral, coloured = strengths(html)
    assert neutral == 0 < coloured and "bfloat16" in html and "±" in html


def test_claim_a_log_ratio_is_not_called_an_advantage():
    unknown = Measure(Objective(None, "unknown", None, "no file says which loss it was"))
    html = page(["a"], measure=unknown)
    text = inspector.table(Inspected("x", [Piece("a", 1)], credit(0.5)), unknown)
    assert "log_ratio" in html and "log_ratio" in text and "β =" not in html
    assert "soft advantage" not in html and "advantage" not in text


def test_claim_the_table_has_a_line_a_token_and_the_sum():
    parts = [Piece("a\n", 1), Piece("b", 1)]
    text = inspector.table(Inspected("x", parts, credit(0.5, -1.0)), PLAIN)
    lines = text.splitlines()
    assert len(lines) == 4 and lines[1].startswith("'a\\n'") and "-0.500" in lines[3]
