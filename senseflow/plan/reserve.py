"""What a GPU keeps for what no tensor holds, in GiB: estimates from sources, not measured here.

One GPU alone keeps 1.5:

- CONTEXT: driver and kernels, which are loaded as they are used. About 400 MB
  (pytorch/pytorch#109888); 426 MiB before a first kernel (unslothai/unsloth-zoo#1053).
- PRODUCTS: work spaces of cuBLAS and of cuBLASLt, 32 MiB each from Hopper on (cuBLAS' guide,
  cublasSetWorkspace; pytorch/pytorch#120925), for the thread of the forward and that of the
  backward, which have handles of their own.
- CONVOLUTIONS: work space of cuDNN, which torch does not bound; half a GiB is what a library that
  does allows by default (PaddlePaddle, FLAGS_conv_workspace_size_limit).
- FRAGMENTATION: what the allocator loses between blocks. Little: runs have expandable segments
  (`senseflow.launch.entry.settle_environment`), which blocks of all sizes share (torch's notes on
  CUDA semantics). An allowance.

Each of several ranks keeps besides:

- COMMUNICATOR, for each of NCCL's. A connection's buffers are 4 + 0.5 + 4.69 MiB for its three
  protocols (DEFAULT_BUFFSIZE, DEFAULT_LL_BUFFSIZE, DEFAULT_LL128_BUFFSIZE of NCCL's src/init.cc),
  10 MiB as they are mapped, and 2 for flags (NVIDIA/nccl#1685). A ring has one, a tree three, on
  32 channels between eight H100 (the same): 32 x 4 x 12 MiB. Four A100: 688 MB (NVIDIA/nccl#964).
- STREAMS: FSDP2 gathers and reduces on streams of its own, and what was freed on one stream is not
  given to another. An allowance: FLUX's largest unit is 0.63 GiB in bfloat16.
"""

CONTEXT, PRODUCTS, CONVOLUTIONS, FRAGMENTATION = 0.5, 0.125, 0.5, 0.375
COMMUNICATOR, STREAMS = 1.5, 1.0


def reserve(ranks: int, replicas: int = 1) -> float:
    """GiB of a GPU, one of `ranks`, that tensors cannot have; `replicas` as in parallel.replicas.

    HSDP has three communicators: of shards, of replicas, and of all.
    """
    alone = CONTEXT + PRODUCTS + CONVOLUTIONS + FRAGMENTATION
    if ranks == 1:
        return alone
    return alone + STREAMS + COMMUNICATOR * (3 if replicas > 1 else 1)
