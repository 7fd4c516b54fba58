"""qlearn: your language model is secretly a Q-function, in code.

Three floors; an import only ever points down.

floor   module                    chapter  equations of the paper
exact   exact.tree                01       the token MDP, Eq. 1
        exact.soft                06       Eqs 2, 5, 6, 7, 10, 11
        exact.preferences         01, 06   Eq. 1
        losses                    06       Eqs 1, 4, 9
"""
