"""What tests of exported files get."""

from functools import cache

import numpy as np
import pytest

from tests.needs import runtime_or_skip


@cache
def _saturates() -> bool:
    import onnx

    x, w = np.full((1, 64), 255, np.uint8), np.full((64, 8), 127, np.int8)
    tensors = [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in (("x", 2), ("y", 6))]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "g", tensors[:1], tensors[1:], [onnx.numpy_helper.from_array(w, "w")]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = runtime_or_skip("onnxruntime").InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return bool((session.run(None, {"x": x})[0] != 64 * 255 * 127).any())


@pytest.fixture(scope="session")
def exact_kernels() -> None:
    """For tests of bits: ONNX Runtime's kernels for CPUs without VNNI instructions saturate sums of two products at 16 bits."""
    pytest.importorskip("onnx")
    runtime_or_skip("onnxruntime")
    if _saturates():
        pytest.skip("ONNX Runtime's integer kernels saturate on this CPU")
