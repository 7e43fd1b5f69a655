"""The graph as data and as a picture."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import dtrain.functional as F
from dtrain import graph as graphs
from dtrain.autograd import GraphError, mode, scope, tracing
from dtrain.ops import OPS
from dtrain.tensor import Tensor

B, T, C, H, V = 2, 5, 8, 2, 11


def weight(*shape):
    return Tensor(np.ones(shape, np.float32), requires_grad=True)


def little_gpt(layers=4, recompute=False, swiglu=False):
    """A GPT in plain functions, with scopes as modules give them, and a tied head."""
    table, gain = weight(V, C), weight(C)

    def block(x, number):
        with scope(f"blocks.{number}"):
            with scope("attention"):
                h = F.packed_attention(F.linear(F.layer_norm(x, gain, None), weight(3 * C, C)), H, H)
                x = F.bias_residual(F.linear(h, weight(C, C)), None, x)
            with scope("mlp"):
                h = F.layer_norm(x, gain, None)
                up = F.linear(h, weight(4 * C, C))
                h = F.swiglu(F.linear(h, weight(4 * C, C)), up) if swiglu else F.gelu(up)
                return F.bias_residual(F.linear(h, weight(C, 4 * C)), None, x)

    x = F.embedding(table, np.zeros((B, T), int))
    for i in range(layers):
        x = F.checkpoint(lambda t, i=i: block(t, i), x) if recompute else block(x, i)
    return F.cross_entropy(F.linear(x, table), np.zeros((B, T), int), reduction="sum")


def traced(**options):
    with tracing():
        return graphs.capture(little_gpt(**options))


def test_lines_stand_in_an_order_that_can_be_executed():
    graph = traced()
    assert len(graph.lines) == 1 + 4 * 10 + 2
    for number, line in enumerate(graph.lines):
        assert line.number == number
        assert all(source < number for source in line.inputs if isinstance(source, int))
    assert graph.lines[0].op == "embedding" and graph.lines[-1].op == "cross_entropy"
    assert graph.lines[1].scope == "blocks.0.attention" and graph.lines[-2].scope == ""


def test_shapes_flops_and_bytes():
    graph = traced(layers=1)
    by_scope = {(line.scope, line.op, line.shape): line for line in graph.lines}
    qkv = by_scope["blocks.0.attention", "linear", (B, T, 3 * C)]
    assert qkv.flops == 2 * B * T * C * 3 * C and qkv.bytes == 4 * B * T * 3 * C and qkv.dtype == "float32"
    assert qkv.input_shapes == ((B, T, C), (3 * C, C))
    core = by_scope["blocks.0.attention", "packed_attention", (B, T, C)]
    assert core.flops == 4 * B * T * T * C + 13 * B * H * T * T
    assert graph.flops == sum([line.flops for line in graph.lines])
    products = 2 * B * T * (12 * C * C + V * C)  # 12 C^2 weights per layer, and the head
    assert sum([line.flops for line in graph.lines if line.op == "linear"]) == products
    assert graph.num_parameters == 12 * C * C + V * C + C  # the tied table and the shared gain once


def test_flops_by_hand():
    a, b = weight(5, 2, 3), weight(3, 4)
    assert graphs.capture(a @ b).flops == 2 * 5 * 2 * 3 * 4
    assert graphs.capture((a * 2).sum()).flops == 30 + 30
    assert graphs.capture(a.reshape(-1).T).flops == 0
    assert graphs.capture(F.linear(a, weight(7, 3), weight(7))).flops == 5 * 2 * 7 * (2 * 3 + 1)


def test_every_op_has_a_flop_count_of_whole_numbers():
    attributes = {"heads": 2, "kv_heads": 1, "rotary": None, "ids": np.zeros((2, 3), int)}
    for name, op in OPS.items():
        shapes = ((2, 3, 4, 6), (2, 3, 2, 6), (2, 3, 2, 6))
        output = (2, 3, 8) if name == "packed_attention" else (2, 3, 4, 6)
        assert isinstance(op.flops(shapes, output, attributes), int), name


def test_recomputed_segments_are_seen_while_tracing():
    assert [line.op for line in traced(recompute=True).lines] == [line.op for line in traced().lines]
    opaque = graphs.capture(little_gpt(recompute=True))
    assert [line.op for line in opaque.lines].count("checkpoint") == 4


def test_scopes_are_kept_only_while_tracing():
    x = weight(3)
    assert (x * 2).node.scope == "" and mode.scopes is None
    with pytest.raises(ZeroDivisionError), tracing(), scope("a"), scope("b.0"):
        assert (x * 2).node.scope == "a.b.0"
        _ = 1 / 0
    assert mode.scopes is None


def test_a_graph_that_is_gone_is_an_error():
    loss = little_gpt(layers=1)
    loss.backward()
    with pytest.raises(GraphError, match="freed"):
        graphs.capture(loss)
    with pytest.raises(GraphError, match="no graph"):
        graphs.capture(Tensor(1.0))


def test_the_table_has_a_line_per_op_and_the_totals():
    text = graphs.table(traced(layers=1)).splitlines()
    assert len(text) == 1 + 13 + 1
    assert re.match(r"#2\s+linear\s+#1 parameter\s+2×5×24\s+3.84k\s+960\s+blocks.0.attention", text[3])
    assert "13 ops" in text[-1]


@pytest.mark.parametrize(("count", "base", "text"), [(999, 1000, "999"), (1234567, 1000, "1.23M"), (2048, 1024, "2Ki")])
def test_short_numbers(count, base, text):
    assert graphs.short(count, base) == text


def boxes(root):
    """The (x, y) of every op, read back from the picture."""
    found = []
    for group in root.iter("{http://www.w3.org/2000/svg}g"):
        rect = group.find("{http://www.w3.org/2000/svg}rect")
        found.append((float(rect.get("x")), float(rect.get("y")), float(rect.get("width")), float(rect.get("height"))))
    return found


@pytest.mark.parametrize("swiglu", [False, True])
def test_the_picture_is_well_formed_and_no_boxes_overlap(tmp_path, swiglu):
    graph = traced(swiglu=swiglu)
    graphs.to_svg(graph, tmp_path / "graph.svg")
    root = ElementTree.fromstring((tmp_path / "graph.svg").read_text(encoding="utf-8"))
    found = boxes(root)
    assert len(found) == len(graph.lines)
    for i, (x, y, w, h) in enumerate(found):
        assert x >= 0 and x + w <= float(root.get("width")) and y + h <= float(root.get("height"))
        assert not any(abs(x - x2) < w and abs(y - y2) < h for x2, y2, *_ in found[:i])
    for line in graph.lines:  # top-down
        assert all(found[s][1] < found[line.number][1] for s in line.inputs if isinstance(s, int))
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"blocks.0", "blocks.0.attention", "blocks.3.mlp", "packed_attention", "2×5×24"} <= set(texts)
    assert "blocks" not in texts  # a list is no module
    assert len({x for x, *_ in found}) == (2 if swiglu else 1)


def test_the_edges_of_a_picture_never_run_through_a_box():
    """Vertical parts of all paths, against all boxes: random graphs with many skips and branches."""
    random = np.random.default_rng(0)
    for _ in range(20):
        pool = [weight(2)]
        for _ in range(25):
            a, b = random.integers(0, len(pool), 2)
            pool.append(pool[max(a, len(pool) - 3)] + pool[b])
        total = pool[0]
        for t in pool[1:]:
            total = total + t
        root = ElementTree.fromstring(graphs.svg(total.sum()))
        found = boxes(root)
        for path in root.iter("{http://www.w3.org/2000/svg}path"):
            if path.get("stroke") is None:
                continue
            for x, top, bottom in verticals(path.get("d")):
                for bx, by, w, h in found:
                    assert not (bx < x < bx + w and max(top, by) < min(bottom, by + h) - 0.5)


def test_a_late_source_does_not_land_on_an_old_box():
    w = weight(2)
    c = w * 1 + w * 2
    found = boxes(ElementTree.fromstring(graphs.svg((c + w * 3).sum())))  # w * 3 stands in the first row, like w * 2
    assert len({(x, y) for x, y, *_ in found}) == len(found) == 6


def verticals(way):
    """(x, top, bottom) of every straight vertical part."""
    numbers = lambda text: [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", text)]  # noqa: E731
    x = y = 0.0
    for command, text in re.findall(r"([MVHvQC])([^MVHvQC]*)", way):
        values = numbers(text)
        if command in "Vv":
            target = values[0] + (y if command == "v" else 0)
            yield x, min(y, target), max(y, target)
            y = target
        elif command == "H":
            x = values[0]
        else:
            x, y = values[-2:]


def test_names_are_escaped():
    x = weight(2)
    with tracing(), scope("<a&b>"):
        text = graphs.svg((x * 2).sum())
    ElementTree.fromstring(text)
    assert "&lt;a&amp;b&gt;" in text


def test_json_and_dot_have_every_op_and_every_arrow():
    x, w = Tensor(np.ones((2, 3))), Tensor(np.ones((3, 4)), requires_grad=True)
    y = F.relu(x @ w)
    graph = graphs.capture((y + y).sum())  # used twice: two arrows
    lines = json.loads(graphs.to_json(graph))
    assert [line["op"] for line in lines] == [line.op for line in graph.lines]
    assert lines[0]["shape"] == [2, 4] and lines[0]["inputs"][1]["trained"] is True
    inner = [source for line in lines for source in line["inputs"] if isinstance(source, int)]
    text = graphs.dot(graph)
    assert len(re.findall(r"^  \d+ \[label=", text, re.MULTILINE)) == len(lines)
    assert len(re.findall(r"^  \d+ -> \d+$", text, re.MULTILINE)) == len(inner) == 4
    assert text.startswith("digraph {") and text.rstrip().endswith("}")
