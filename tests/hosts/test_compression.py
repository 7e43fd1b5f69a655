"""Compressed training on two hosts: it learns, and the link carries what the formula says."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.hosts.namespaces import Hosts

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parents[2]
STEPS = 20


def trained(hosts: Hosts, folder: Path, compression: str) -> tuple[str, list[float], int]:
    """What a run on 4 ranks told, its losses, and the bytes that the first host sent meanwhile."""
    before, name = hosts.bytes_sent(), f"run-{len(list(folder.iterdir()))}"
    done = hosts.run(
        4,
        *(sys.executable, "-m", "dtrain.launch", "run", str(ROOT / "configs" / "gpt_ddp.yaml")),
        *(f"output={folder}", f"name={name}", f"parallel.compression={compression}"),
        "model={kind: gpt, layers: 1, dim: 128, heads: 4, sequence: 16}",
        *(f"train.steps={STEPS}", "train.validate.every=0", "checkpoint.every=0", "log.every=1", "sample.tokens=0"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return done.stdout, losses, hosts.bytes_sent() - before


def test_less_goes_over_the_link_and_the_losses_are_near(hosts: Hosts, tmp_path: Path) -> None:
    _, plain, whole = trained(hosts, tmp_path, "{kind: none}")
    told, losses, bytes_sent = trained(hosts, tmp_path, "{kind: int8}")
    found = re.search(r"int8 between 2 nodes: this rank sends ([\d,]+) bytes a step, ([\d.]+)% of ([\d,]+)", told)
    assert found, told
    sent, plainly = (int(found[group].replace(",", "")) for group in (1, 3))
    saved = 2 * STEPS * (plainly - sent)  # by the two ranks of a host
    assert "in node" in told and re.search(r"of nodes +all_to_all", told), told  # the table of traffic
    assert whole - bytes_sent == pytest.approx(saved, rel=0.2), (whole, bytes_sent, saved)
    assert losses == pytest.approx(plain, rel=0.03)
