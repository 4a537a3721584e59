"""Recipes: training stages in order, each with gates, measured and recorded as they go; started by launch/recipe.py.

A recipe flows down this list: sections.py (what a user may write), plan.py (which stages, validated, with steps and time), execute.py (runs what
is not done, judges, remembers), launcher.py (one stage = one torchrun), outcome.py (numbers of a run, gates, loss spikes), lineage.py (where a
checkpoint comes from), report.py (the table and the page at the end). scaling.py stands apart: laws fitted to small runs.
Nothing here knows a rank or imports torch; stages run in processes of their own.
"""
