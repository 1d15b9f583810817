"""Measured rates: kept beside torch's caches, shared by processes, and never more than a help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hwbp_compile import _compat, rates, remembered
from hwbp_compile.__main__ import main
from hwbp_compile.rates import bandwidth, operator_seconds, product_rate
from hwbp_compile.remembered import SWITCH, Conditions, Found, Known, Rate, known_of

CPU = torch.device("cpu")
HERE = Conditions("a processor", 2, "1.0", "none", "a hash")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that rates are kept in, of a process that begins."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(SWITCH)
    begin()
    yield tmp_path / "hwbp_compile"
    begin()


def begin() -> None:
    """As if this were another process."""
    remembered.forget()


class Clock:
    """A rate that changes whenever it is measured, and counts how often."""

    def __init__(self, certain: bool = True) -> None:
        self.times = 0

        def ticks(device: torch.device, threads: int, size: int = 1) -> Found:
            self.times += 1
            return Found(float(self.times), certain)

        self.rate = Rate(ticks)


def test_measured_once_by_all_processes(cache: Path) -> None:
    clock = Clock()
    assert clock.rate(CPU, 1) == clock.rate(CPU, threads=1, size=1) == 1
    begin()
    assert clock.rate(CPU, 1) == 1
    assert clock.rate(CPU, 2) == 2
    assert clock.rate(CPU, 1, size=2) == 3
    begin()
    assert [clock.rate(CPU, 1), clock.rate(CPU, 2), clock.rate(CPU, 1, 2)] == [1, 2, 3]
    (file,) = cache.glob("*.json")
    assert json.loads(file.read_text())["conditions"]["torch"] == torch.__version__


def test_real_rates_are_the_same_in_the_next_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[float]:
        product = product_rate(8, 16, 8, torch.float32, CPU, 1)
        return [product, bandwidth(CPU, 1, 1 << 14, fresh=False), operator_seconds(CPU, 1)]

    monkeypatch.setattr(rates, "_interruptions", lambda: 0)
    first = found()
    assert all(value > 0 for value in first)
    begin()
    monkeypatch.setattr(rates, "best", lambda *_, **__: pytest.fail("measured again"))
    assert found() == first


@pytest.mark.parametrize(
    "change",
    [
        ("torch.__version__", "0.0"),
        ("hwbp_compile.remembered._method", lambda: "other"),
        ("hwbp_compile.remembered._hardware", lambda _: ("other", 1)),
        ("hwbp_compile._compat.precision_of_products", lambda: "other"),
    ],
    ids=lambda change: change[0],
)
def test_other_conditions_are_measured_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, Any]
) -> None:
    clock = Clock()
    clock.rate(CPU, 1)
    with monkeypatch.context() as m:
        m.setattr(*change)
        assert clock.rate(CPU, 1) == 2
    assert clock.rate(CPU, 1) == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"rates": []}',
        '{"rates": {"a": "b"}}',
        '{"rates": {"a": -1.0}}',
        '{"rates": {"a": NaN}}',
    ],
)
def test_a_broken_file_is_replaced(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / HERE.file).write_text(content)
    with caplog.at_level("DEBUG", "hwbp_compile"):
        assert Known(HERE, tmp_path).rate("a", lambda: Found(2.0)) == 2
    assert "cannot be read" in caplog.text
    assert Known(HERE, tmp_path).rates == {"a": 2.0}
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".lock"]


def test_without_a_folder_it_is_measured_by_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    known = Known(HERE, tmp_path / "file" / "folder")
    with caplog.at_level("DEBUG", "hwbp_compile"):
        assert known.rate("a", lambda: Found(2.0)) == known.rate("a", lambda: Found(3.0)) == 2
        assert known.rate("b", lambda: Found(4.0)) == 4
    assert caplog.text.count("in this process only") == 1


def test_whoever_waits_too_long_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_PATIENCE", 0.01)
    with _compat.file_lock((tmp_path / HERE.file).with_suffix(".lock"), 1.0):
        assert Known(HERE, tmp_path).rate("a", lambda: Found(2.0)) == 2
    assert not (tmp_path / HERE.file).exists()


def test_the_switch_and_torch_s_own_keep_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.setenv(SWITCH, "0")
        Clock().rate(CPU, 1)
    with torch._inductor.config.patch(force_disable_caches=True):
        Clock().rate(CPU, 1)
    assert not cache.exists()


def test_at_once(tmp_path: Path) -> None:
    """Of those that begin at the same time one measures, and all go by that; nothing gets lost."""
    begun, values = threading.Barrier(8), [dict[str, float]() for _ in range(8)]

    def process(i: int) -> None:
        known = Known(HERE, tmp_path)
        begun.wait()
        for key in ("a", "b", "c", str(i)):
            values[i][key] = known.rate(key, lambda: Found(i + 1.0))

    threads = [threading.Thread(target=process, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shared = [{k: v for k, v in found.items() if k in "abc"} for found in values]
    assert shared == [shared[0]] * 8
    assert Known(HERE, tmp_path).rates == shared[0] | {str(i): i + 1.0 for i in range(8)}


def test_what_is_disturbed_is_not_kept(cache: Path) -> None:
    clock = Clock(certain=False)
    assert clock.rate(CPU, 1) == clock.rate(CPU, 1) == 1
    begin()
    assert clock.rate(CPU, 1) == 2


def test_disturbed_runs_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ten are interrupted: there are as many runs afterwards as without them."""
    time, runs, threads = [0.0], [0], []
    monkeypatch.setattr(rates, "now", lambda _: time[0])
    monkeypatch.setattr(rates, "_interruptions", lambda: min(runs[0], 10))

    def run() -> None:
        runs[0] += 1
        threads.append(torch.get_num_threads())
        time[0] += 0.009

    assert rates.best(run, CPU) == Found(pytest.approx(0.009))
    assert runs[0] == 14
    # Always interrupted: patience ends, and one thread measures.
    monkeypatch.setattr(rates, "_interruptions", lambda: runs[0])
    threads_now = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads_now[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads_now.append)
    threads.clear()
    assert not rates.best(run, CPU).certain
    assert threads_now == [2, 1, 2]
    assert sorted(set(threads), reverse=True) == list(dict.fromkeys(threads)) == [2, 1]
    # One thread is faster, although some runs of both were undisturbed.
    monkeypatch.setattr(rates, "_interruptions", lambda: min(runs[0], before + 1))
    before = runs[0]

    def slow_together() -> None:
        run()
        time[0] += 0.01 * (threads_now[-1] == 2)

    assert rates.best(slow_together, CPU) == Found(pytest.approx(0.009), certain=False)


def test_products_in_turn_are_of_different_tensors(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as asked for, or as there is room for; the rate is that of all of them."""
    made: list[int] = []

    def best(run: Any, device: torch.device, **_: Any) -> Found:
        made.append(len({x.data_ptr() for x in run()}))
        return Found(float(made[-1]))

    monkeypatch.setattr(rates, "best", best)
    sizes = (3, 5, 7, torch.float32, CPU, 1)
    assert product_rate(*sizes) == product_rate(*sizes, turns=4) == 2 * 3 * 5 * 7
    monkeypatch.setattr(rates, "_ROOM", 2 * 4 * (3 * 5 + 5 * 7 + 3 * 7))
    assert product_rate(*sizes, turns=8) == 2 * 3 * 5 * 7
    assert made == [1, 4, 2]


def test_calibrate(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in use is measured again, with what many models need, and known from then on."""
    seconds = iter(range(1, 1000))
    monkeypatch.setattr(rates, "best", lambda *_, **__: Found(float(next(seconds))))
    odd = product_rate(3, 5, 7, torch.float64, CPU, 1)
    elsewhere = product_rate(3, 5, 7, torch.float64, CPU, 2)
    assert main(["calibrate", "--threads", "1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (again,) = [each for each in said if each["arguments"].get("rows") == 3]
    assert again["before"] == odd
    begin()
    assert product_rate(3, 5, 7, torch.float64, CPU, 1) == again["value"] != odd
    assert product_rate(3, 5, 7, torch.float64, CPU, 2) == elsewhere
    assert bandwidth(CPU, 1, 1 << 20) == next(
        each["value"]
        for each in said
        if each["arguments"].get("size") == 1 << 20 and each["arguments"]["fresh"]
    )
    assert main(["calibrate", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert f"1 thread; kept in {known_of(CPU).path}" in text
    assert "rows 3, inner 5, columns 7, dtype float64, batch 1, turns 1" in text


def test_calibrate_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--device", "nothing"], "there is no device 'nothing'"),
        (["--threads", "0"], "at least one thread"),
    ):
        assert main(["calibrate", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_two_processes_decide_by_the_same_rates(tmp_path: Path) -> None:
    script = (
        "import torch, hwbp_compile\n"
        "from hwbp_compile.rates import operator_seconds, bandwidth\n"
        "cpu = torch.device('cpu')\n"
        "print(operator_seconds(cpu, 1), bandwidth(cpu, 1, 4096))"
    )
    environment = {k: v for k, v in os.environ.items() if k != SWITCH}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run() -> str:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert run() == run()


def test_a_usual_run_is_no_lucky_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is new to a process is at times at hand."""
    clock = iter([0.0, *(t for i in range(1, 200) for t in (i, i + (0.001 if i == 2 else 0.01)))])
    monkeypatch.setattr(rates, "now", lambda _: next(clock))
    monkeypatch.setattr(rates, "_interruptions", lambda: 0)
    assert rates.best(lambda: None, CPU, usual=True).value == pytest.approx(0.01)
