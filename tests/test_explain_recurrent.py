"""``explain`` on recurrent layers."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from hwbp_compile import explain


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(3, 5, bidirectional=True)
        self.decoder = nn.LSTM(10, 6)
        self.old = nn.RNN(6, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.encoder(x)
        y, _ = self.decoder(y)
        y, _ = self.old(y)
        for block in self.blocks:
            y = y + block(y)
        return y


def test_layers_and_chains() -> None:
    """The sweeps inside the groups of a recurrent layer look like a chain over depth; they are none."""
    explanation = explain(
        Model(), torch.randn(40, 2, 3), options={"iterations": 2, "apply": "always", "group_size": 8}
    )
    found = [(c.over, c.blocks, c.modules[0], c.applied) for c in explanation.chains]
    assert found == [
        *[("time", 40, "encoder", True)] * 2,
        ("time", 40, "decoder", True),
        ("time", 40, "old", False),
        ("depth", 5, "blocks.0", True),
    ]
    gru, lstm, rnn = explanation.chains[0], explanation.chains[2], explanation.chains[3]
    assert gru.residual == "gate"
    assert gru.shapes == ((2, 5),)
    assert gru.iterations == 2
    assert lstm.shapes == ((2, 6), (2, 6))
    assert "no residual path" in rnn.reason
    assert all("test_explain_recurrent.py" in line for line in gru.lines)
    text = str(explanation)
    assert "4 of 5 residual chains are rewritten" in text
    assert "2 iterations over time" in text
    json.dumps(explanation.to_dict())


def test_nothing_is_rewritten_where_all_is_exact() -> None:
    explanation = explain(
        nn.GRU(3, 5), torch.randn(12, 2, 3), options={"iterations": "exact", "apply": "always"}
    )
    (layer,) = explanation.chains
    assert not layer.applied
    assert "exact" in layer.reason


def test_a_packed_sequence_is_named() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    explanation = explain(nn.GRU(3, 5), packed)
    assert not any(c.applied for c in explanation.chains)
    (note,) = [n for n in explanation.notes if "in no graph" in n]
    assert "what is given a packed sequence runs as it is, with its exact gradient" in note


def test_a_module_that_does_not_run_is_told_from_one_that_is_given_a_packed_sequence() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.GRU(3, 5), nn.GRU(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)[0]

    explanation = explain(Unused(), torch.randn(6, 2, 3), options={"codegen": "eager"})
    (note,) = [n for n in explanation.notes if "in no graph" in n]
    assert note.startswith("unused is in no graph")
    assert "does not run" in note
    assert "packed" not in note
