"""A run that nobody watches: started, looked after and started again, without Slurm; launch/supervise.py.

A launch flows down this list: options.py, supervisor.py (the one loop: start, watch, judge, wait), folder.py (what the run folder tells, the
log of events, and what an earlier supervisor left), nodes.py (several machines agree), ranks.py (the processes of this one and their output), console.py
(what a person sees of it), restarts.py (what exit codes mean, and whether to start again).

Nothing here imports torch: the supervisor starts in a fraction of a second and weighs some 25 MB. Left out: elastic training, that is, going on
with fewer machines; the layout of a run is its user's choice.
"""
