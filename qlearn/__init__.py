"""qlearn: your language model is secretly a Q-function, in code.

Four floors; an import only ever points down.

floor     module               chapter  equations of the paper
exact     exact.tree           01, 15   the token MDP
          exact.soft           02, 03   Eqs 2, 5, 6, 7, 10, 11
          exact.preferences    01, 04   Eq. 1
          exact.training       05, 06   Eqs 2, 3, 9
          exact.shaping        07       Def. 1, Theorem 1
          exact.likelihood     07       the sign law
          exact.chance, exact.leftovers 08
          exact.search         12, 13   Eqs 12 to 15
          exact.optimise       -        L-BFGS for all of them
          exact.check          -        what its functions refuse
          losses               06, 10   Eqs 1 to 4, 9
lm        lm.worlds, lm.grammar 09      embedded worlds, their exact truth
          lm.slots, lm.trips   09, 11   slot summaries; trips, the second world
          lm.models, lm.model_files, lm.tokenizers, lm.pretrained  09
          lm.rows, lm.hub, lm.data, lm.encoding, lm.check       09
          lm.logprobs, lm.tree 09
          lm.shared_prompt     -        one prompt for several completions
          lm.training_args     -        what TRL's runs record
          lm.cursor, lm.decode, lm.search 12   Eqs 12, 13
train     train.sft, train.dpo, train.engine                    09
          train.passes, train.masters  -        faster passes
          train.step_0         -        what rounding explains before the first update
          train.reward, train.rollout, train.steps, train.ppo   10       Eqs 1, 2, 3
findings  findings.credit      09       Eqs 10, 11
          findings.likelihood  09, 14   Eq. 16; what a run's own curves say
          findings.search      12       Eqs 12, 13
          findings.proxy       13       Eqs 14, 15
          findings.stats       -        intervals and tests
          findings.objective, findings.run_log, findings.precision  -  what a run says of itself
studies   studies.slot_world   09       credit against the exact advantage
          studies.rlhf         10       PPO and RLOO against the exact optimum
          studies.credit, studies.corruptions, studies.localisation, studies.heat_maps  11
          studies.search, studies.contrasts  12   decoders against each other
          studies.exactness, studies.proxy   13   when a borrowed advantage is exact
          studies.displacement 14       where probability goes; the sign law
          studies.runs, studies.one_post     shared trained models; one post for live runs

Beside them: show (pictures, the token inspector), recipes (settings of the book's runs), results
(what they gave), solutions and checker (exercises), cli (the command line), options (fields of a
configuration), errors (one class for each kind of fault).
"""

from qlearn.checker import check

__all__ = ["check"]
