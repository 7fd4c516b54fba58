"""Search with a value function on a language model: Eq. 12 for beams, and a tree search.

The policy that is searched plays π_ref: it proposes tokens and is the prior. What a text is worth
is told by a forecast W = Σ r so far + V(s), the return one expects of it. Then the guided score
Σ [r + β log π_ref] + V of Eq. 12 is W + β Σ log π_ref, and the soft Bellman equation reads
W(s) = β log Σ_a π_ref(a|s) exp(W(s, a)/β), whatever part of W is reward and what part value.

With W of an optimal policy π itself (`implied_forecast`) the guided score is V(s₀) + β Σ log π, so
guided search is likelihood search on π (Eq. 13 with its sign mended).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlearn.lm.cursor import Cursor, Policy
from qlearn.lm.logprobs import Row, collate, completion_logits

# W (N,) of N rows (prompt ids, tokens so far): rewards earned plus the soft value of what follows,
# which is 0 where the tokens end with the end of text. In units of reward.
Forecast = Callable[[Sequence[Row]], Tensor]


class Guided:
    """The cursor of guided search: what each candidate adds to (W + β Σ log π_ref)/β, in nats.

    `logp` (N, V) is log π_ref(a|s) + (W(s, a) − W(s))/β for the policy's `candidates` best tokens
    of each row and −inf elsewhere, so that a row's total is its guided score, counted from V(s₀).

    Source: Eq. 12.
    """

    only_falls = False  # a forecast that is not the optimal one can rise

    def __init__(
        self, policy: Policy, prompts: Sequence[Sequence[int]], forecast: Forecast, *,
        beta: float, candidates: int, n_tokens: int,
    ):  # fmt: skip
        self.cursor = Cursor(policy, prompts, n_tokens)
        self.forecast, self.beta, self.candidates = forecast, beta, candidates
        self.rows: list[Row] = [(list(prompt), []) for prompt in prompts]
        self.worth = forecast(self.rows).to(self.cursor.logp)
        self._look()

    def append(self, tokens: Tensor) -> None:
        """Each row goes on with its token (N,)."""
        self.rows = [(x, [*y, a]) for (x, y), a in zip(self.rows, tokens.tolist(), strict=True)]
        self.worth = self.ahead.gather(1, tokens[:, None])[:, 0]
        self.cursor.append(tokens)
        self._look()

    def keep(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        self.cursor.keep(rows)
        self.rows = [self.rows[i] for i in rows.tolist()]
        self.logp, self.ahead, self.worth = self.logp[rows], self.ahead[rows], self.worth[rows]

    def _look(self) -> None:
        full = self.cursor.logp
        logp, tokens = full.topk(min(self.candidates, full.shape[1]))
        ahead = self.forecast(_children(self.rows, tokens)).to(full).view_as(logp)
        gain = logp + (ahead - self.worth[:, None]) / self.beta
        self.logp = torch.full_like(full, -torch.inf).scatter(1, tokens, gain)
        self.ahead = torch.zeros_like(full).scatter(1, tokens, ahead)


def implied_forecast(
    policy: PreTrainedModel, reference: PreTrainedModel, beta: float, eos: int, n_tokens: int,
    batch_size: int = 128,
) -> Forecast:  # fmt: skip
    """W of the reward and value that a policy's own logits ℓ imply.

    Q = β ℓ,  V = β log Σ_a exp(Q/β) with V = 0 after the end of text,
    r = Q − β log π_ref − V(s'),  W = Σ r + V.

    Any logits are the Q-function of this reward, so W(s) − V(s₀) is β log π/π_ref of the text.

    Source: Eq. 12 for the implied reward; `eq-logits-as-q`, `eq-reward-of-logits` in the book.
    """

    def forecast(rows: Sequence[Row]) -> Tensor:
        parts = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
        return torch.cat([worth(part) for part in parts])

    def worth(rows: Sequence[Row]) -> Tensor:
        # With one more token, the state after the last one has its logits too.
        longer = [(x, [*y, eos]) for x, y in rows]
        batch = collate(longer, policy.device)
        with torch.no_grad():
            own, ref = (completion_logits(m, batch)[:, :n_tokens] for m in (policy, reference))
        token = torch.tensor([a for _, y in longer for a in y], device=own.device)[:, None]
        q, log_ref = beta * own.gather(1, token), ref.log_softmax(-1).gather(1, token)
        row = torch.arange(len(rows), device=own.device).repeat_interleave(batch.completion_lengths)
        last = batch.completion_lengths.cumsum(0) - 1
        value = beta * own.logsumexp(-1)
        value[last] *= torch.tensor([y[-1:] != [eos] for _, y in rows], device=own.device)
        reward = (q - beta * log_ref)[:, 0] - value.roll(-1)
        reward[last] = 0.0  # of the token that was put after the text
        return value[last].index_add(0, row, reward).cpu()

    return forecast


class Node:
    """An unfinished text in a search tree, with its candidates: tokens, log π_ref and worth W.

    log_ref is renormalised over the candidates, so the search is exact on their tree.
    """

    def __init__(self, row: Row, tokens, log_ref, worth, done):
        self.row, self.tokens, self.log_ref, self.worth = row, tokens, log_ref, worth
        self.done = done  # nothing below is left to look at
        self.visits = [0] * len(tokens)
        self.below: list[Node | None] = [None] * len(tokens)

    def logp(self, beta: float) -> list[float]:
        """log π̂ of each candidate: log π_ref + (W(s, a) − W(s))/β."""
        top = self.value(beta) / beta
        return [p + w / beta - top for p, w in zip(self.log_ref, self.worth, strict=True)]

    def value(self, beta: float) -> float:
        """W(s) = β log Σ_a π_ref(a|s) exp(W(s, a)/β), by the soft Bellman equation."""
        terms = [p + w / beta for p, w in zip(self.log_ref, self.worth, strict=True)]
        top = max(terms)
        return beta * (top + math.log(math.fsum(math.exp(x - top) for x in terms)))

    def select(self, beta: float, exploration: float) -> int:
        """PUCT: the open candidate with the highest π̂ + exploration · π_ref √(1 + N)/(1 + n)."""
        n = math.sqrt(1 + sum(self.visits))
        scores = [
            (math.exp(p) + exploration * math.exp(q) * n / (1 + visits), -i)
            for i, (p, q, visits) in enumerate(
                zip(self.logp(beta), self.log_ref, self.visits, strict=True)
            )
            if not self.done[i]
        ]
        return -max(scores)[1]


def mcts(
    policy: Policy, prompts: Sequence[Sequence[int]], forecast: Forecast, *, beta: float,
    candidates: int, simulations: int, exploration: float, max_new_tokens: int, n_tokens: int,
    eos: int,
) -> list[tuple[list[int], float]]:  # fmt: skip
    """(tokens, Σ log π̂) of each prompt by tree search on soft values, all prompts in step.

    Before each token, `simulations` times: walk from the present text by `Node.select` to a text
    not yet looked at, ask policy and forecast about its `candidates` likeliest continuations, and
    back their worth up to the present text by the soft Bellman equation (not by an average). Then
    write the likeliest token of π̂ = π_ref exp((W(s, a) − W(s))/β). The tree below it is kept.

    A walk never enters what is fully known, so enough simulations give the exact soft optimum of
    the tree of candidates, whatever the forecast says of unfinished texts. A forecast that already
    solves the soft Bellman equation is changed by no simulation: the search is then greedy on π.
    """

    def expand(rows: Sequence[Row]) -> list[Node]:
        logp = Cursor(policy, [[*x, *y] for x, y in rows], n_tokens).logp.cpu()
        logp, tokens = logp.topk(min(candidates, logp.shape[1]))
        log_ref = logp.double().log_softmax(-1).tolist()
        worth = forecast(_children(rows, tokens)).double().view_as(tokens).tolist()
        return [
            Node(row, a, p, w, [x == eos or len(row[1]) + 1 == max_new_tokens for x in a])
            for row, a, p, w in zip(rows, tokens.tolist(), log_ref, worth, strict=True)
        ]

    def walk(root: Node) -> list[tuple[Node, int]]:
        path, node = [], root
        while node is not None:
            a = node.select(beta, exploration)
            path.append((node, a))
            node.visits[a] += 1
            node = node.below[a]
        return path

    def look_below(paths: list[list[tuple[Node, int]]]) -> None:
        leaves = expand([_child(*path[-1]) for path in paths]) if paths else []
        for path, leaf in zip(paths, leaves, strict=True):
            path[-1][0].below[path[-1][1]] = leaf
            for node, a in reversed(path):
                node.worth[a] = node.below[a].value(beta)
                node.done[a] = all(node.below[a].done)

    alive = dict(enumerate(expand([(list(prompt), []) for prompt in prompts])))
    written, total = [[] for _ in prompts], [0.0] * len(prompts)
    while alive:
        for _ in range(simulations):
            look_below([walk(root) for root in alive.values() if not all(root.done)])
        new = {}
        for i, root in alive.items():
            logp = root.logp(beta)
            a = max(range(len(logp)), key=logp.__getitem__)
            written[i].append(root.tokens[a])
            total[i] += logp[a]
            if root.tokens[a] != eos and len(written[i]) < max_new_tokens:
                new[i] = (root, a)
        look_below([[x] for x in new.values() if x[0].below[x[1]] is None])
        alive = {i: root.below[a] for i, (root, a) in new.items()}
    return list(zip(written, total, strict=True))


def _child(node: Node, a: int) -> Row:
    prompt, response = node.row
    return prompt, [*response, node.tokens[a]]


def _children(rows: Sequence[Row], tokens: Tensor) -> list[Row]:
    """Every row continued by each of its tokens (N, K): N · K rows."""
    return [
        (x, [*y, a]) for (x, y), row in zip(rows, tokens.tolist(), strict=True) for a in row
    ]  # fmt: skip
