"""examples/my_strategy.py: one class trains; alone it is plain SGD, on ranks it communicates less and still learns."""

import importlib.util
from pathlib import Path

from dtrain.collectives import run_threads, single

PATH = Path(__file__).parents[2] / "examples" / "my_strategy.py"


def test_local_sgd(capsys):
    spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows = []
    for ranks in (1, 3):
        run_threads(ranks, example.main) if ranks > 1 else example.main(single())
        lines = capsys.readouterr().out.splitlines()
        rows.append([line.split("24: ")[1].split() for line in lines])
    (ddp, local), (ddp_on_3, local_on_3) = rows
    assert ddp[:4] == local[:4] == ddp_on_3[:4]
    assert local_on_3[0] == ddp[0] and local_on_3[1:4] != ddp[1:4]
    assert float(local_on_3[3]) < 4.2 < 5 < float(local_on_3[0])
    assert int(ddp_on_3[5]) - int(local_on_3[5]) == 24 - 24 // 4
