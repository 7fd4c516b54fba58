"""The inspector's page: escaped, standalone, coloured by sign."""

import re

import torch

from qlearn.findings.credit import Credit
from qlearn.show import inspector


def credit(*advantages):
    a = torch.tensor(advantages)
    return Credit(a - 1, -torch.ones_like(a), a, a.cumsum(0), torch.ones_like(a))


def page(tokens, prompt="p", policy="P"):
    response = inspector.Inspected(
        "chosen", tokens, credit(*([0.5, -1.0] * len(tokens))[: len(tokens)])
    )
    return inspector.html([response], prompt, 0.1, policy, "R")


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
    html = page(["good", "bad"])
    good, bad = re.findall(r'<span class="token" style="background: rgba\(([^"]+)\)" title', html)
    assert good.startswith(inspector.PRAISE) and bad.startswith(inspector.BLAME)
    assert float(good.split(",")[-1]) < float(bad.split(",")[-1]) <= 0.8


def test_claim_the_table_has_a_line_a_token_and_the_sum():
    text = inspector.table(inspector.Inspected("x", ["a\n", "b"], credit(0.5, -1.0)))
    lines = text.splitlines()
    assert len(lines) == 4 and lines[1].startswith("'a\\n'") and "-0.500" in lines[3]
