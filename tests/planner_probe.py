"""What networks on CPU ranks really allocate and save, beside which the planner's figures are laid (test_planner.py, benchmarks/planner.py).

Functions for tests/ranks.py. A case is (raw configuration, number of ranks); several run in one job.
"""


def kept(cases) -> list:
    """Of each case: bytes of parameters, gradients and optimizer state of this rank, and its places: (pp, dp * cp, expert dp)."""
    return [_of_network(raw, lambda network, run, place: kept_by(network, place)) for raw in cases]


def saved(cases, loss_block: int = 0) -> list:
    """Of each case: (pp rank, for each chunk bytes that autograd saves of one micro-batch but for parameters, bytes of its logits). loss_block:
    bytes of logits held where gradients are made in the forward pass, 0 as always."""
    from engine.loss_memory import BLOCK_BYTES

    usual = BLOCK_BYTES["cpu"]
    BLOCK_BYTES["cpu"] = loss_block or usual
    try:
        return [_of_network(raw, lambda network, run, place: (place.pp_rank, saved_by(network, run, place))) for raw in cases]
    finally:
        BLOCK_BYTES["cpu"] = usual


def _of_network(raw, measure):
    import torch.distributed as dist

    import parity_table
    from engine.config import validate
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel
    from engine.stage import Role

    run = validate(raw, dist.get_world_size())
    place = topology.start(run)
    network = ParallelModel(run, place, parity_table.CountTokens(), "policy", Role(head=run.model.head))
    return measure(network, run, place)


def kept_by(network, place):
    """(parameters, gradients, optimizer, places) of this rank, see `kept`."""
    from megatron.core import parallel_state as mpu

    parameters = {}
    for chunk in network.chunks:
        for parameter in chunk.parameters():
            storage = parameter.untyped_storage()
            parameters[storage.data_ptr()] = storage.nbytes()
    buffers = [buffer for chunk in network.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    gradients = sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)
    optimizer = 0
    for part in network.optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                is_view = main.untyped_storage().data_ptr() in parameters
                optimizer += (0 if is_view else main.nbytes) + sum(state.nbytes for state in part.optimizer.state[main].values())
    places = place.pp_rank, mpu.get_data_parallel_rank(with_context_parallel=True), mpu.get_expert_data_parallel_rank()
    return sum(parameters.values()), gradients, optimizer, places


def saved_by(network, run, place):
    """[(bytes saved, bytes of logits)] for each chunk of this rank."""
    import torch

    from engine.mcore import build, mtp

    batch_size, seq_len = run.train.micro_batch, run.train.seq_len
    text = torch.randint(0, run.model.vocab_size, (batch_size, seq_len + 1), generator=torch.Generator().manual_seed(1))
    batch = dict(tokens=text[:, :-1], labels=text[:, 1:], loss_mask=torch.ones(batch_size, seq_len),
                 position_ids=torch.arange(seq_len).expand(batch_size, seq_len))
    batch |= mtp.targets(batch, run.model.mtp.num_layers) if network.learns_further else {}
    batch = network._place({**batch, **network._proportions(batch)})
    own = {parameter.untyped_storage().data_ptr() for chunk in network.chunks for parameter in chunk.parameters()}
    stream = seq_len // place.cp // (place.tp if run.parallel.sequence_parallel else 1)
    found = []
    for chunk in network.chunks:
        chunk.train()
        if not build.bare(chunk).pre_process:
            build.bare(chunk).set_input_tensor(torch.randn(stream, batch_size, run.model.hidden_size, requires_grad=True))
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output, on_output = network._forward_step(iter([batch]), chunk, lambda *_: None)
        outputs = [output, on_output.args[0]["further_output"]] if "further_output" in on_output.args[0] else [output]
        found.append((sum(storages.values()), sum(map(_logits, outputs))))
    return found


def _logits(output) -> int:
    """Bytes of the logits, or of the weight's gradient, which linear_ce.py keeps beside what autograd knows of."""
    to_visit, seen = [output.grad_fn], set()
    while to_visit:
        node = to_visit.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "logits", None) is not None:
            return node.logits.untyped_storage().nbytes()
        if getattr(node, "made", None) is not None:
            return node.made[1].untyped_storage().nbytes()
        to_visit += [node for node, _ in node.next_functions]
    return 0
