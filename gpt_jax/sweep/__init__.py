"""Sweeps: many runs described as data, trained anywhere, stopped and resumed.

space.py    the words of a sweep file: combinators, search spaces, pruners, populations
plan.py     a sweep file becomes trials, all of them checked before the first starts
study.py    which trial is next, and what became of each; knows Optuna
engine.py   trials as processes on the workers of dask.distributed
worker.py   what a worker does with a trial
trial.py    what the trial's process does
checks.py   what is refused before the first trial starts
run.py      a sweep from its plan to its results
batch.py    trials that share a compiled program (population/)
choose.py   which engine suits, by what is measured
shard.py    a part of the points, beside other parts
after.py    what may be measured of a trial that is done
view.py     the table in the terminal
"""
