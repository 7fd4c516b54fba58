"""qlearn: your language model is secretly a Q-function, in code.

Three floors; an import only ever points down.

floor     module               chapter  equations of the paper
exact     exact.tree           01       the token MDP
          exact.preferences    01, 06   Eq. 1
          exact.soft           06       Eqs 2, 5, 6, 7, 10, 11
          losses               06       Eqs 1, 4, 9
lm        lm.worlds            09       the slot-summary world, its exact truth
          lm.models, lm.data, lm.logprobs, lm.decode, lm.tree   09
train     train.sft, train.dpo, train.engine                    09
findings  findings.credit, findings.slot_world                  09       Eqs 10, 11
          findings.likelihood  09       Eq. 16

Beside them: show (pictures), recipes (settings of the book's runs), results (what they gave),
solutions and checker (exercises), cli (the command line).
"""

from qlearn.checker import check

__all__ = ["check"]
