"""Ground floor: everything that can be enumerated, in float64, without a language model.

tree         the token MDP, level by level; layered graphs     (chapters 01, 15)
chance       the same with random next states                  (chapter 08)
soft         soft Bellman backups, objective, regret, Jacobian (chapters 02, 03, 06; Eqs 2 to 11)
preferences  Bradley-Terry, Plackett-Luce, maximum likelihood  (chapters 01, 04; Eq. 1)
shaping      potentials, equivalence, the representative       (chapters 04, 07; Def. 1, Theorem 1)
training     DPO, policy gradients and PPO, exactly            (chapters 05, 06; Eqs 2, 3, 9)
leftovers    what remains when an assumption fails             (chapter 08)
search       guided decoding, beams, tilted policies           (chapters 12, 13; Eqs 12 to 15)
likelihood   the sign law of chosen rewards                    (chapter 07; Eq. 16)
optimise     the one optimiser of all exact fits
"""
