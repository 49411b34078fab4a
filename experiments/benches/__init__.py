"""How fast gpt_jax is against what people would use instead, on the same machine.

A `Match` (match.py) is a row of the table: two sides, each a function in a process of
its own (worker.py) that waits for its turn, so that they run A-B-A-B and neither slows
the other. ours.py and peers.py hold the sides, race.py those that are whole processes,
machine.py the ceilings, report.py the lines and the pages. Importing this imports
nothing: a side loads its own libraries only.
"""
