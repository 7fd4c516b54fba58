"""Ground floor: everything that can be enumerated, in float64, without a language model.

tree         the token MDP, level by level             (chapter 01)
soft         soft Bellman backups, objective, regret   (chapter 06; Eqs 2, 5, 6, 7, 10, 11)
preferences  Bradley-Terry and Plackett-Luce           (chapters 01 and 06; Eq. 1)
"""
