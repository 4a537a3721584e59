"""Running under Slurm: the job script (script.py), which rank a task is (tasks.py), the check of the nodes (nodes.py, collective.py), and
what happens when the ranks have ended (attempts.py). Nothing but collective.py imports torch; attempts.py and what it imports needs no package
at all, because a batch script runs it with the host's Python. docs/launch.md tells how they work together.
"""
