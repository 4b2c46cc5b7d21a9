"""What a compiled QLoRA step is made of, and that docs/design/graph.md says so."""

import graph_nodes


def test_the_document_is_current():
    text = graph_nodes.DOCUMENT.read_text()
    assert text == graph_nodes.with_table(text), "run python tests/graph_nodes.py"


def test_qkv_is_one_node_each_way():
    stock, patched = graph_nodes.projections(False), graph_nodes.projections(True)
    assert (stock["QuantizedMatmul"], stock["Matmul"]) == (6, 18)
    assert patched["mlx-fused's"] == 2
    assert set(patched) <= {"mlx-fused's", "views and reshapes"}
    assert patched.total() <= 8


def test_composed_adapters_share_products():
    nodes = graph_nodes.composed()
    # Forward x A, and a product by each B; backward that by all B, all dA, all dB, and the adapters' part
    # of dX.
    assert (nodes["QuantizedMatmul"], nodes["Matmul"]) == (6, 8)
    assert nodes["mlx-fused's"] == 0


def test_every_layer_is_alike_and_has_the_fused_products_less():
    stock, patched = graph_nodes.layer(False), graph_nodes.layer(True)
    assert stock == graph_nodes.step(4, False) - graph_nodes.step(3, False)
    assert patched == graph_nodes.step(4, True) - graph_nodes.step(3, True)
    # Seven projections of 2 + 6 products each, and attention's.
    assert (stock["QuantizedMatmul"], stock["Matmul"]) == (7 * 2, 6 + 7 * 6)
    assert (patched["QuantizedMatmul"], patched["Matmul"]) == (0, 0)
    # 10 of projections and the activation, attention both ways, and of each norm forward, backward and again.
    assert patched["mlx-fused's"] == 10 + 2 + 2 * 3
