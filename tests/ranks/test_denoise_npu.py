"""The attention kernel for Ascend, which has not been run there: its name and arguments in the published torch_npu."""

import ast
from pathlib import Path

from distributed.denoise import attention
from tests.ranks.test_npu import wheel  # noqa: F401  a fixture


def call_of(name: str) -> ast.Call:
    """The one call of a function of this name in `attention`."""
    nodes = ast.walk(ast.parse(Path(attention.__file__).read_text()))
    (call,) = (node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == name)
    return call


def test_the_attention_kernel_takes_these_arguments_and_returns_the_result_first(wheel):  # noqa: F811
    source = wheel.read("torch_npu/op_plugin/meta/_meta_registrations.py").decode()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    registered = '@impl(m, "npu_fusion_attention")'
    (function,) = (
        node for node in functions if any(ast.unparse(d) in registered.replace('"', "'") for d in node.decorator_list)
    )
    call = call_of("npu_fusion_attention")
    names = [argument.arg for argument in function.args.args + function.args.kwonlyargs]
    assert names[: len(call.args)] == ["query", "key", "value"]
    assert {keyword.arg for keyword in call.keywords} == {"head_num", "input_layout", "scale"} <= set(names)
    layout = next(ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "input_layout")
    assert f'input_layout == "{layout}"' in ast.get_source_segment(source, function)
    assert "npu_fusion_attention" in wheel.read("torch_npu/_op_plugin_docs.py").decode()
    returned = next(node for node in ast.walk(function) if isinstance(node, ast.Return))
    assert "attention_score" in ast.unparse(returned.value.elts[0])
