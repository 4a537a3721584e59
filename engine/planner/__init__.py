"""The planner: for a configuration and a cluster, which layouts are legal, what each needs of memory and time, and which to take.

    launch/plan.py -> report.py -> search.py -> layouts.py (which are legal: engine/checks.py says)
                                             -> memory.py  (weights.py, activations.py: bytes of one rank)
                                             -> time.py    (seconds of one step; constants.py: how well hardware is used)
    cluster.py: GPUs and networks; budget.py: tokens, days, cost, sizes

Everything is arithmetic on a RunConfig: no torch, no process group, no GPU. docs/planner.md has the formulas and how far they were checked.
Left out: stages of several networks (dpo, ppo, grpo, online_dpo), data loading, checkpoints, validation.
"""
