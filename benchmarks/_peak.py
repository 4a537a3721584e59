"""Memory that torch allocates on a CPU at the worst moment of some work."""


def peak_bytes(act) -> tuple[int, object]:
    """(bytes, above what lay there before; what act() returns), by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = act()
    now = most = 0
    for event in sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, found
