"""How well hardware is used, and what it takes for itself: the few numbers of the planner that are no arithmetic.

FITTED were fitted to five published rows, which docs/planner.md marks; the rows beside them there were predicted. ASSUMED come from the source
given or from common experience, and were not measured with this engine: benchmarks/planner.py compares them with a real run.
"""

GIB = 2**30

# FITTED
GEMM_SHARE = 0.66          # of the peak, by a large bf16 product on a GPU that keeps to its power limit
FP8_SHARE = 0.68           # the same of the FP8 peak, conversions included
GEMM_RAMP_K = 512          # a product whose smallest dim is this long runs at half speed
STRAGGLER_SHARE = 0.01     # of a step, for each doubling of nodes beyond the first: the slowest GPU, and the network's bad moments
KERNELS_OF_DISPATCH = 150  # forward, of a MoE layer's router and dispatcher
FP8_KERNELS_PER_EXPERT = 24    # forward, of each expert on a rank whose products are FP8: two products, and inputs quantized one expert at a time

# ASSUMED: speed
FP32_SHARE = 1 / 15        # of the bf16 rate, by fp32 products: torch does not take TF32 unasked (H100 data sheet: 67 of 989 TFLOP/s)
ATTENTION_SHARE = 0.45     # of the peak, forward and backward together (FlashAttention-3, arXiv 2407.08608: 75% forward, less backward)
TORCH_ATTENTION_SHARE = 0.35   # FlashAttention-2 in torch (arXiv 2307.08691), on Hopper
MEMORY_SHARE = 0.6         # of memory bandwidth, by elementwise kernels
LINK_SHARE = 0.75          # of NVLink's bandwidth, by collectives of large messages (NCCL's bus bandwidth on an HGX H100)
NETWORK_SHARE = 0.8        # of a network's bandwidth, likewise
LATENCY_S = 20e-6          # of a collective
LAUNCH_S = 5e-6            # of a kernel, on the host: what a small layer waits for
KERNELS_PER_EXPERT = 2     # the same in bf16: Transformer Engine's grouped product calls cuBLAS once per expert (gemm/cublaslt_gemm.cu)
KERNELS_PER_LAYER = {"te": 45, "torch": 70}      # forward and backward together are three times this
OVERLAPPED_TP = 0.3        # what tp_comm_overlap leaves exposed of the traffic of tp
BACKWARD_TP = 0.6          # what remains exposed of it in the backward pass without: weight gradients are computed meanwhile
OVERLAPPED_EP = 0.9        # of the traffic of experts, or of the time beside it, what a schedule that overlaps it hides
SMS_OF_DISPATCH = 20 / 132 # of a Hopper's multiprocessors, kept for that traffic meanwhile (arXiv 2412.19437, sec. 3.2.2)
OVERLAPPED_DP = 0.9        # of the time beside which gradients (weights) are moved, what hides them

# ASSUMED: memory
RUNTIME_BYTES = int(1.2 * GIB)         # CUDA context, loaded kernels, workspaces of cuBLAS and cuDNN
COMMUNICATOR_BYTES = int(0.3 * GIB)    # NCCL's buffers, for each axis of several ranks
FRAGMENTATION_SHARE = 0.04             # of all tensors, lost between them
