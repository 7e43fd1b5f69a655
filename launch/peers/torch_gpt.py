"""The GPT of a dtrain configuration in PyTorch, under DDP with Gloo: the peer of `dtrain bench step`.

    python torch_gpt.py SPEC.json REPORT.json          once per rank, RANK and WORLD_SIZE in the environment

The same layers, sizes, batch, optimizer and clipping, written as one would write them in PyTorch: attention through
scaled_dot_product_attention, AdamW, DDP with its defaults (none at one rank: nothing to reduce), gradient accumulation
under no_sync. `tuned` adds what a page on performance would advise: the fused optimizer (PyTorch's default on a CPU is
a loop over the parameters) and gradients as views of DDP's buckets. The batches are drawn before the clock starts.
Imports nothing of dtrain, so that any interpreter with PyTorch can run it; `launch/bench_step.py` starts it and reads
the reports.
"""

# mypy: allow-subclassing-any

import faulthandler
import json
import math
import os
import resource
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight, through PyTorch's own function."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


def norm(model: dict[str, Any]) -> nn.Module:
    """The configuration's norm."""
    return RMSNorm(model["dim"]) if model["norm"] == "rms" else nn.LayerNorm(model["dim"], bias=model["bias"])


class Attention(nn.Module):
    """Causal self-attention, one product for queries, keys and values."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.heads = model["heads"]
        self.kv_heads = model["kv_heads"] or model["heads"]
        self.size = model["dim"] // self.heads
        self.qkv = nn.Linear(model["dim"], (self.heads + 2 * self.kv_heads) * self.size, bias=model["bias"])
        self.out = nn.Linear(model["dim"], model["dim"], bias=model["bias"])
        self.rotary = model["position"] == "rotary"
        if self.rotary:
            frequencies = 10000.0 ** (-torch.arange(0, self.size, 2) / self.size)
            angles = torch.outer(torch.arange(model["sequence"]), frequencies)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        b, t, dim = x.shape
        heads, kv = self.heads, self.kv_heads
        packed = self.qkv(x).view(b, t, heads + 2 * kv, self.size).transpose(1, 2)
        q, k, v = packed.split([heads, kv, kv], dim=1)
        if self.rotary:
            q, k = self.rotate(q, t), self.rotate(k, t)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv)
        return self.out(y.transpose(1, 2).reshape(b, t, dim))

    def rotate(self, x: Tensor, t: int) -> Tensor:
        """Pairs (i, i + size/2) of (B, H, T, size) turned by their position."""
        a, b = x.chunk(2, dim=-1)
        cos, sin = self.cos[:t], self.sin[:t]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class MLP(nn.Module):
    """GELU or SwiGLU."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        dim, hidden = model["dim"], model["hidden"] or 4 * model["dim"]
        self.kind = model["mlp"]
        self.up = nn.Linear(dim, hidden, bias=model["bias"])
        self.gate = nn.Linear(dim, hidden, bias=model["bias"]) if self.kind == "swiglu" else None
        self.down = nn.Linear(hidden, dim, bias=model["bias"])

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.norm1, self.attention = norm(model), Attention(model)
        self.norm2, self.mlp = norm(model), MLP(model)
        self.dropout = nn.Dropout(model["dropout"]) if model["dropout"] else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Tokens (B, T) and targets (B, T) to the mean loss."""

    def __init__(self, model: dict[str, Any], recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.tokens = nn.Embedding(model["vocabulary"], model["dim"])
        learned = model["position"] == "learned"
        self.positions = nn.Embedding(model["sequence"], model["dim"]) if learned else None
        self.dropout = nn.Dropout(model["dropout"]) if model["dropout"] else nn.Identity()
        self.blocks = nn.ModuleList(Block(model) for _ in range(model["layers"]))
        self.norm = norm(model)
        self.head = nn.Linear(model["dim"], model["vocabulary"], bias=False)
        if model["tied"]:
            self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * model["layers"]) if residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy."""
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            if self.recompute:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        logits = self.head(self.norm(x))
        if logits.dtype.itemsize == 2:
            logits = logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_optimizer(
    config: dict[str, Any], model: nn.Module, fused: bool | None, sharded: bool = False
) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW with the configuration's values; weight decay on matrices alone, as dtrain has it."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    rate = config["learning_rate"]
    if config["kind"] == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=config["momentum"], nesterov=config["nesterov"], fused=fused)
    kind = torch.optim.AdamW if config["kind"] == "adamw" else torch.optim.Adam
    if sharded:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(
            groups, kind, lr=rate, betas=tuple(config["betas"]), eps=config["epsilon"], fused=fused
        )
    return kind(groups, lr=rate, betas=tuple(config["betas"]), eps=config["epsilon"], fused=fused)


def main(spec_path: str, report_path: str) -> None:
    """Train `steps` steps and write this rank's report."""
    spec = json.loads(Path(spec_path).read_text())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faulthandler.dump_traceback_later(spec["limit"] + 10, exit=True)  # nobody is left to wait for this rank then
    train = spec["train"]
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, train["dtype"]))
    torch.manual_seed(spec["seed"])
    gpt = GPT(spec["model"], train["recompute"])
    net: nn.Module = gpt
    tuned = spec["tuned"]
    if size > 1:
        store = dist.FileStore(spec["store"], size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
        if spec.get("parallel") == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (size,))
            for block in gpt.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(gpt, mesh=mesh)
        else:
            net = nn.parallel.DistributedDataParallel(gpt, gradient_as_bucket_view=tuned)
    sharded = size > 1 and spec.get("parallel") == "zero_redundancy"
    optimizer = make_optimizer(spec["optimizer"], gpt, tuned or None, sharded)
    micro = train["micro_batch"]
    portions = train["global_batch"] // size // micro
    sequence, vocabulary = spec["model"]["sequence"], spec["model"]["vocabulary"]
    generator = torch.Generator().manual_seed(rank)
    batches = torch.randint(0, vocabulary, (portions, micro, sequence + 1), generator=generator)
    clip = spec["optimizer"]["clip_norm"]

    seconds, first_step_end, loss = [], 0.0, math.nan
    for step in range(spec["steps"]):
        start = time.perf_counter()
        total = 0.0
        for i, batch in enumerate(batches):
            last = i == portions - 1
            with nullcontext() if last or size == 1 or not hasattr(net, "no_sync") else net.no_sync():
                part = net(batch[:, :-1], batch[:, 1:]) / portions
                part.backward()
            total += part.item()
        if clip is not None:
            nn.utils.clip_grad_norm_(gpt.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        loss = total
        seconds.append(time.perf_counter() - start)
        if step == 0:
            first_step_end = time.time()

    report = {
        "rank": rank,
        "first_step_end": first_step_end,
        "step_seconds": seconds,
        "memory_bytes": peak_memory(),
        "parameters": sum(p.numel() for p in gpt.parameters()),
        "loss": loss,
        "versions": {"torch": torch.__version__, "torch_python": ".".join(map(str, sys.version_info[:3]))},
    }
    Path(report_path).write_text(json.dumps(report))
    if size > 1:
        dist.destroy_process_group()


def peak_memory() -> int:
    """Largest resident memory of this program so far, in bytes."""
    try:  # getrusage would count the program that was this process before exec
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
