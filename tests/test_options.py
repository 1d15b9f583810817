"""Options: every wrong one gets one clear sentence; the rest reaches Inductor."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import hwbp_compile
from hwbp_compile import OptionError, Options, list_options
from hwbp_compile.options import parse_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iteration": 3}, "Option 'iteration' is unknown; did you mean 'iterations'?"),
        ({"max_autotun": True}, "did you mean 'max_autotune'?"),
        ({"zzzzzz": True}, "the options are apply, codegen, exact_tail, gamma"),
        ({"iterations": -1}, 'iterations must be an integer >= 0, "exact" or "auto", but is -1.'),
        ({"iterations": 2.0}, "but is 2.0."),
        ({"iterations": True}, "but is True."),
        ({"iterations": "all"}, "but is 'all'."),
        ({"gamma": 1.5}, "gamma must be a number in [0, 1], but is 1.5."),
        ({"gamma": "0.5"}, "but is '0.5'."),
        ({"group_size": 0}, "group_size must be an integer >= 1, but is 0."),
        ({"exact_tail": -1}, "exact_tail must be an integer >= 0"),
        ({"min_blocks": 0}, "min_blocks must be an integer >= 1"),
        ({"max_iterations": 0}, "max_iterations must be an integer >= 1"),
        ({"tolerance": -0.1}, "tolerance must be a number >= 0, but is -0.1."),
        ({"apply": "sometimes"}, "apply must be one of 'auto', 'always', 'never', but is 'sometimes'."),
        ({"codegen": "triton"}, "codegen must be one of 'inductor', 'eager'"),
        ({"max_autotune": 3}, "max_autotune (of Inductor) must be of type bool, but is 3."),
        ([("iterations", 3)], "options must be a dictionary"),
    ],
)
def test_wrong_options(options: Any, message: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_options(options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_option_is_reported_at_the_first_compile() -> None:
    model = torch.compile(nn.Linear(2, 2), backend="highway", options={"iteration": 3})
    with pytest.raises(Exception, match="did you mean 'iterations'"):
        model(torch.randn(1, 2))


def test_wrong_mode() -> None:
    with pytest.raises(OptionError, match="mode='fast' is unknown"):
        parse_options(None, "fast")


def test_defaults() -> None:
    ours, inductor = parse_options(None)
    assert ours == Options()
    assert inductor == {}
    assert (ours.iterations, ours.gamma, ours.group_size, ours.exact_tail) == ("auto", 0.0, 1, 0)


def test_exact_programs_rewrite_no_shorter_chains() -> None:
    assert Options(min_blocks=9, iterations=2, gamma=0.5).exact() == Options(
        min_blocks=9, iterations="exact", given=frozenset({"iterations"})
    )


def test_defaults_over_time() -> None:
    """They hold for what is not given, each on its own."""

    def over_time(**given: Any) -> tuple[Any, int]:
        options = parse_options(given)[0].over_time()
        return options.iterations, options.group_size

    assert over_time() == ("auto", 8)
    assert over_time(iterations=4) == (4, 8)
    assert over_time(group_size=1) == ("auto", 1)
    assert over_time(iterations="exact") == ("exact", 8)
    assert "given" not in list_options()
    assert "given" not in Options().to_dict()


def test_list_options() -> None:
    listed = list_options()
    assert set(listed) == {
        "iterations",
        "gamma",
        "group_size",
        "exact_tail",
        "min_blocks",
        "apply",
        "tolerance",
        "max_iterations",
        "codegen",
    }
    for entry in listed.values():
        assert entry["doc"]
        assert "\n" not in entry["doc"]
    assert listed["iterations"]["default"] == "auto"


def test_inductor_options_and_modes_pass_through() -> None:
    ours, inductor = parse_options({"iterations": 2, "triton.cudagraphs": True, "max-autotune": True})
    assert ours.iterations == 2
    assert inductor == {"triton.cudagraphs": True, "max_autotune": True}
    _, inductor = parse_options(None, "reduce-overhead")
    assert inductor["triton.cudagraphs"] is True


def test_they_reach_inductor() -> None:
    from hwbp_compile import _compat

    seen: dict[str, Any] = {}

    def compile_with_inductor(gm: Any, inputs: Any, patches: Any, graph_pass: Any) -> Any:
        seen.update(patches)
        return gm.forward

    with mock.patch.object(_compat, "compile_with_inductor", compile_with_inductor):
        torch.compile(nn.Linear(2, 2), backend="highway", options={"epilogue_fusion": False})(
            torch.randn(1, 2)
        )
    assert seen == {"epilogue_fusion": False}


def test_backend_is_found_without_importing_us() -> None:
    assert "highway" in torch._dynamo.list_backends()
    assert hwbp_compile.__version__


def test_unknown_keywords_of_newer_versions_are_accepted() -> None:
    from hwbp_compile.backend import highway

    class Tuple(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (2 * x,)

    x = torch.randn(1, 2)
    compiled = highway(torch.fx.symbolic_trace(Tuple()), [x], options={"codegen": "eager"}, name="region")
    torch.testing.assert_close(compiled(x)[0], 2 * x)
