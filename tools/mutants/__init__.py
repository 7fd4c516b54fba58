"""Plants one fault at a time in qlearn and sees that a test notices it.

    python -m tools.mutants               the files that differ from main (make mutants)
    python -m tools.mutants --all         every module (make mutants-all)
    python -m tools.mutants --count       writes the counts of table.csv anew, runs nothing

faults.py says what can be broken and how, runs.py plants a fault and runs the tests that execute
the broken function, __main__.py is the command. table.csv is the record: how many faults of each
operator a module has (a test says so where there are fewer), and how the last run of each ended.
excluded.yml holds the faults that change nothing, each with its proof.

mutmut and cosmic-ray know Python's operators; most of what goes wrong here is of the domain (a
mean for a soft maximum, a KL the wrong way, a reference or a mask dropped), hence own code.
"""
