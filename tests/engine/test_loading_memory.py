"""Host memory while networks are loaded: each rank's shards, and one tensor at a time."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from torch import nn
from torch.distributed import TCPStore
from transformers import T5Config, T5EncoderModel

from senseflow.common.ranks import Ranks, start_ranks
from senseflow.config.sections import ParallelConfig, PrecisionConfig
from senseflow.engine import build as engine
from senseflow.engine.lora import build_roles
from senseflow.teachers.flux.family import FLUX
from senseflow.teachers.folder import TeacherSettings
from senseflow.teachers.text_encoders import T5, text_encoder
from senseflow.weights.lora import peft_config
from senseflow.weights.lora_settings import LoraSettings
from senseflow.weights.packed import pack

MIB = 2**20
FLUX_LIKE = dict(
    patch_size=1,
    in_channels=64,
    num_layers=6,
    num_single_layers=12,
    attention_head_dim=64,
    num_attention_heads=8,
    joint_attention_dim=512,
    pooled_projection_dim=512,
    guidance_embeds=True,
    axes_dims_rope=(16, 24, 24),
)
T5_LIKE = T5Config(d_model=512, d_kv=64, d_ff=2048, num_layers=8, num_heads=8, vocab_size=32128)
T5_LIKE.feed_forward_proj = "gated-gelu"


@dataclass
class Sizes:
    """Parameters of the three networks, and of the largest tensor among them."""

    student: int
    teacher: int
    t5: int
    largest: int


def save(folder: Path, dtype: torch.dtype) -> Sizes:
    """Write the networks, as a FLUX folder has them."""
    teacher, t5 = FluxTransformer2DModel(**FLUX_LIKE), T5EncoderModel(T5_LIKE)
    sizes = [p.numel() for network in (teacher, t5) for p in network.parameters()]
    guidance = sum(p.numel() for p in teacher.time_text_embed.guidance_embedder.parameters())
    whole = sum(p.numel() for p in teacher.parameters())
    teacher.to(dtype).save_pretrained(folder / "transformer")
    t5.to(dtype).save_pretrained(folder / "text_encoder_2")
    return Sizes(whole - guidance, whole, sum(sizes) - whole, max(sizes))


def whole_tensors(network: nn.Module, read, device: torch.device, offload: bool) -> None:
    """The old way to fill shards: every tensor of the files, which stay mapped, on every rank."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    network.to_empty(device=device)
    opened = {}
    with torch.no_grad():
        for key, value in network.state_dict().items():
            stored = read(key)
            if stored.file not in opened:
                opened[stored.file] = safe_open(str(stored.file), framework="pt")
            shape, offset = compute_local_shape_and_global_offset(
                value.shape, value.device_mesh, value.placements
            )
            rows = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
            value.to_local().copy_(opened[stored.file].get_tensor(stored.key)[rows])
    network.held = opened  # as a source's reader held them


def memory(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def load_all(folder: Path, ranks: Ranks) -> list[nn.Module]:
    """Teacher, student and T5, in the precision of the published recipes."""
    config = SimpleNamespace(precision=PrecisionConfig(), parallel=ParallelConfig())
    bfloat16 = torch.bfloat16
    settings = TeacherSettings(folder, (64, 64), 8, None, bfloat16, torch.float32)
    sources = (
        lambda: text_encoder(folder / "text_encoder_2", T5, bfloat16),
        lambda: FLUX.teacher(settings),
        lambda: FLUX.student(settings),
    )
    return [engine.build_network(source(), config, ranks) for source in sources]


def load_packed(folder: Path, ranks: Ranks) -> list[nn.Module]:
    """A teacher in 4 bits with a LoRA run's adapters."""
    config = SimpleNamespace(precision=PrecisionConfig(), parallel=ParallelConfig())
    lora = LoraSettings(4, 4.0, "B", ("to_q",), 0, "nf4")
    settings = TeacherSettings(folder, (64, 64), 8, None, torch.bfloat16, torch.float32, lora=lora)
    build = partial(engine.build_network, config=config, ranks=ranks)
    teacher, _, _ = build_roles(FLUX, settings, lora, {}, build, ranks.device)
    return [teacher.base.network]


def main(folder: Path, way: str) -> None:
    """One rank: prints the growth of its memory's high-water mark as JSON."""
    torch.set_num_threads(1)
    ranks = start_ranks()
    if way == "packed":  # libraries' own memory
        peft_config(LoraSettings(4, 4.0, "B", ("to_q",), 0, "nf4"), ["to_q"])
        pack(torch.ones(4, 64), "nf4")
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
    baseline = memory("VmRSS")
    if way == "packed":
        networks = load_packed(folder, ranks)
    elif way == "old":
        with patch.object(engine, "fill_shards", whole_tensors):
            networks = load_all(folder, ranks)
    else:
        networks = load_all(folder, ranks)
    peak, after = memory("VmHWM") - baseline, memory("VmRSS") - baseline
    held = sum(p.to_local().untyped_storage().nbytes() for n in networks for p in n.parameters())
    print(json.dumps({"peak": peak, "after": after, "held": held}))


def growth(folder: Path, num_ranks: int, way: str) -> list[dict[str, int]]:
    """What each of the ranks, processes of their own, says."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    command = [sys.executable, __file__, str(folder), way]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(num_ranks)
    ]
    printed = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * num_ranks
    return [json.loads(text.splitlines()[-1]) for text in printed]


def resettable() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.long
@pytest.mark.skipif(not resettable(), reason="the kernel lets no process reset its peak of memory")
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_a_ranks_memory_grows_by_its_shards_and_one_tensor(tmp_path, dtype, num_ranks):
    """Less than 1.2 x its shards and the largest tensor, as that is in the file."""
    sizes = save(tmp_path, dtype)
    assert 350 * MIB < 4 * sizes.student < 700 * MIB
    shards = (4 * sizes.student + 2 * sizes.teacher + 2 * sizes.t5) / num_ranks
    bound = 1.2 * shards + dtype.itemsize * sizes.largest
    new, old = (growth(tmp_path, num_ranks, way) for way in ("new", "old"))
    for rank in range(num_ranks):
        peak, before = new[rank]["peak"], old[rank]["peak"]
        print(
            f"{num_ranks} ranks, {dtype}, rank {rank}: shards {shards / MIB:.0f} MiB, bound "
            f"{bound / MIB:.0f}, peak {peak / MIB:.0f}, with whole tensors {before / MIB:.0f}"
        )
        assert shards <= new[rank]["held"] <= 1.01 * shards
        assert shards < peak < bound < before


@pytest.mark.long
@pytest.mark.skipif(not resettable(), reason="the kernel lets no process reset its peak of memory")
def test_a_base_in_4_bits_is_never_whole_in_16(tmp_path):
    """What stays, and what packing takes for its largest layer; in bfloat16 it would be more."""
    sizes = save(tmp_path, torch.bfloat16)
    (found,) = growth(tmp_path, 1, "packed")
    largest = 6 * 512 * 512  # the modulation of a block, below packed.AT_ONCE
    working = 40 * largest
    print({key: value // MIB for key, value in found.items()}, working // MIB)
    assert found["held"] < 0.7 * sizes.teacher < found["peak"] < found["held"] + working
    assert found["held"] + working < 2 * sizes.teacher


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
