"""Experts against the dense model that costs as many operations per token, on the same text.

    python examples/moe_against_dense.py            a few steps, to see it run
    python examples/moe_against_dense.py 300        numbers to compare; docs/moe.md has some

Every token meets one expert as wide as the dense MLP, so both models multiply as much per token (the router aside); the
mixture has more parameters to choose from. What is compared is the validation loss after as many steps, and the time.
"""

import sys
import time

from dtrain.collectives import single
from dtrain.config import (
    AdamWConfig,
    CheckpointConfig,
    Config,
    CosineConfig,
    GPTConfig,
    MoEConfig,
    MoEGPTConfig,
    TextConfig,
    TrainConfig,
    ValidateConfig,
)
from dtrain.launch.assembly import assemble

SHAPE = {"layers": 4, "dim": 128, "heads": 4, "sequence": 64}


def configure(model: GPTConfig, steps: int) -> Config:
    """The same data, optimizer and number of steps for all."""
    return Config(
        name="moe-against-dense",
        model=model,
        data=TextConfig(path="stdlib"),
        optimizer=AdamWConfig(learning_rate=2e-3, betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0),
        schedule=CosineConfig(warmup_steps=min(20, steps)),
        train=TrainConfig(
            steps=steps, global_batch=16, micro_batch=16, validate=ValidateConfig(every=steps, batches=16)
        ),
        checkpoint=CheckpointConfig(every=0),
    )


def main() -> None:
    """Train one after the other."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    models = {
        "dense": GPTConfig(**SHAPE),
        "8 experts": MoEGPTConfig(**SHAPE),
        "8 experts, none dropped": MoEGPTConfig(**SHAPE, moe=MoEConfig(capacity=None)),
    }
    wanted = sys.argv[2:] or list(models)
    for name in wanted:
        trainer = assemble(configure(models[name], steps), single())
        started = time.perf_counter()
        *_, last = trainer.run()
        seconds = (time.perf_counter() - started) / steps
        dropped = last.details.get("dropped", [0.0])
        print(
            f"{name:<24} {trainer.num_parameters:>10,} parameters   validation loss {last.validation_loss:.4f}   "
            f"{1e3 * seconds:.0f} ms per step   dropped at the end {100 * sum(dropped) / len(dropped):.1f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
