"""Output layer and loss on a device, several products and blocks, against log_softmax in fp64: logits kept, and gradients made in the forward pass.

    python tests/gpu/loss_probe.py cuda      # prints the largest relative errors of nll and gradients; test_gpu.py asks them to be small
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import engine.mcore  # noqa: E402, F401
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from engine.mcore import linear_ce  # noqa: E402

TOKENS, WIDTH, IDS, REAL = 512, 128, 1024, 1000


def errors(device: str, dtype, is_early: bool, softcap: float = 0.0) -> list[float]:
    """Of nll, the gradient of the hidden states and that of the weight."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, WIDTH, generator=generator).to(device, dtype) for rows in (TOKENS, IDS))
    weight /= WIDTH**0.5
    labels, mask = torch.randint(0, REAL, (TOKENS,), generator=generator).to(device), (torch.rand(TOKENS, generator=generator) < 0.8).float().to(device)
    exact_h, exact_w = (x.double().requires_grad_() for x in (hidden, weight))
    z = exact_h @ exact_w[:REAL].t()
    exact = F.cross_entropy(softcap * torch.tanh(z / softcap) if softcap else z, labels, reduction="none")
    (exact * mask).sum().mul(0.3).backward()
    hidden.requires_grad_(), weight.requires_grad_()
    nll = linear_ce.linear_cross_entropy(hidden, weight, labels, REAL, cap=(softcap, 1.0), proportions=mask if is_early else None)
    assert type(nll.grad_fn).__name__ == ("_GradientsInForwardBackward" if is_early else "_LogitsKeptBackward")
    (nll * mask).sum().mul(0.3).backward()
    pairs = (nll.detach(), exact.detach()), (hidden.grad, exact_h.grad), (weight.grad, exact_w.grad)
    return [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs]


def main(device: str) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        linear_ce.CHUNK_BYTES[device] = 48 * IDS * dtype.itemsize
        linear_ce._PRODUCT_ROWS[device] = 1
        linear_ce.BLOCK_BYTES[device] = 100 * IDS * dtype.itemsize
        for is_early in (False, True):
            for softcap in (0.0, 3.0):
                found[f"{dtype}, {'early' if is_early else 'kept'}, softcap {softcap:g}"] = errors(device, dtype, is_early, softcap)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
