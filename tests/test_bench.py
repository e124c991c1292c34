"""The benchmark: statistics, the gate (a wrong result is never timed), peers and outputs."""

import json
import math
import re
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from click.testing import CliRunner

from attn_ext.cli import bench_module, main
from attn_ext.testing import backends
from attn_ext.variants import VARIANTS
from attn_ext.variants.attention import reference
from attn_ext.variants.cases import AttentionCase, VarlenCase
from attn_ext.variants.local_attention import LocalCase
from attn_ext.variants.neighborhood_attention import NeighborhoodCase
from attn_ext.variants.record import Cost
from attn_ext.variants.topk_attention import TopkCase

block_masks, ceilings, correctness, machine, measure, memory = map(
    bench_module, ("block_masks", "ceilings", "correctness", "machine", "measure", "memory")
)
peers, run, suites = map(bench_module, ("peers", "run", "suites"))

SMALL = AttentionCase(b=1, hq=2, hkv=2, sq=33, sk=33, d=16, dv=16)
BENCH = ["bench", "--device", "cpu"]  # not also on a GPU that may be there
TINY = suites.Suite(
    "two small calls",
    (
        suites.BenchCase(SMALL, (torch.float32,)),
        suites.BenchCase(
            VarlenCase(q_lengths=(9, 5), k_lengths=(9, 5)), (torch.bfloat16,), "varlen_attention"
        ),
    ),
    rounds=4,
)


@pytest.fixture
def cpu_backend():
    return next(b for n, b in backends().items() if n.startswith("cpu-"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.SUITES, "quick", TINY)
    monkeypatch.setitem(ceilings.GEMM_SIZES, "cpu", (32,))
    monkeypatch.setitem(ceilings.READ_BYTES, "cpu", 1 << 20)


@pytest.fixture
def wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args, **kwargs):
        o, lse = reference(*args, **kwargs | {"return_lse": True})
        return (o * 1.01, lse) if kwargs.get("return_lse") else o * 1.01

    monkeypatch.setitem(VARIANTS, "attention", replace(VARIANTS["attention"], fn=wrong))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 20])
def test_quartiles_are_numpys(n: int):
    values = numpy.random.default_rng(n).random(n).tolist()
    expected = numpy.percentile(values, [25, 50, 75])
    assert measure.quartiles(values) == pytest.approx(expected.tolist())


def test_ratios_pair_the_rounds():
    assert measure.ratios([2.0, 6.0], [1.0, 2.0, 3.0]) == [2.0, 3.0]


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "flush", lambda device: order.append("flush"))
    order: list[str] = []
    calls = {n: lambda n=n: order.append(n) for n in "abc"}
    seconds = measure.interleave(calls, 4, cold=True, at_most={"c": 2})
    warm_up, rounds = order[:6], order[6:]
    assert sorted(warm_up) == list("aabbcc")
    assert rounds[::2] == ["flush"] * 10
    assert rounds[1::2] == list("abcabcabab")
    assert {n: len(s) for n, s in seconds.items()} == {"a": 4, "b": 4, "c": 2}


def test_time_limit_leaves_enough_rounds_for_quartiles():
    seconds = measure.interleave({"a": lambda: None}, 50, limit=0.0)
    assert len(seconds["a"]) == measure.MIN_ROUNDS


def test_roofline_is_the_longer_of_computing_and_reading():
    c = ceilings.Ceilings("cpu", 1, {"float32": 100.0}, read=10.0)
    assert c.seconds(Cost(flops=1000.0, bytes=10.0), torch.float32) == 10.0
    assert c.seconds(Cost(flops=100.0, bytes=50.0), torch.float32) == 5.0
    assert c.memory_bound(Cost(flops=100.0, bytes=50.0), torch.float32)


def test_names_tell_a_suites_cases_apart():
    for suite in suites.SUITES.values():
        names = [case.name for case in suite.cases]
        assert names and len(set(names)) == len(names)
        assert {case.variant for case in suite.cases} <= set(VARIANTS)


PEER_CASES = [
    SMALL,
    replace(SMALL, causal=True),
    replace(SMALL, sk=50, causal=True, align="bottom_right"),
    replace(SMALL, sk=50, causal=True, alibi=True),
    replace(SMALL, window=(5, 2), mask="bias"),
    replace(SMALL, causal=True, mask="key_padding"),
    replace(SMALL, hq=8, hkv=2, sq=1, scale=0.3),
    replace(SMALL, mask="infinite_bias", alibi=True),
]


@pytest.mark.parametrize("case", PEER_CASES, ids=lambda c: c.name)
def test_peers_compute_the_same(case: AttentionCase):
    x = case.inputs(torch.float64)
    found = peers.peers(x)
    expected = reference(**x)
    assert "torch" in found and ("torch packed" in found) == (case.hq != case.hkv)
    for call in found.values():
        torch.testing.assert_close(call(), expected)


def test_sdpa_on_each_kernel_that_takes_it_computes_the_same():
    inputs = SMALL.inputs(torch.float32)
    call = peers.sdpa(inputs)
    found = peers.kernels_that_take(call)
    assert set(found) == {"torch flash", "torch math"}, "the others have no kernel for a CPU"
    for pinned in found.values():
        torch.testing.assert_close(pinned(), call())
    assert peers.sdpa_kernels(inputs) == {}, "only a GPU has several to choose from"


def test_state_of_a_gpu_is_what_nvidia_smi_says(monkeypatch):
    assert machine.gpu_state() == {} or torch.cuda.is_available()
    said = ", ".join(str(i) for i in range(len(machine.GPU_STATE)))
    answer = subprocess.CompletedProcess([], 0, stdout=said + "\n")
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(subprocess, "run", lambda query, **_: asked.append(query) or answer)
    state = machine.gpu_state()
    assert state["driver_version"] == "0" and state["clocks.sm"] == "3"
    assert asked[0][:3] == ["nvidia-smi", "-i", "GPU-abc"]

    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert machine.gpu_state() == {}


def test_peers_of_packed_sequences_compute_the_same():
    case = VarlenCase(q_lengths=(7, 20), k_lengths=(9, 31), causal=True)
    x = case.inputs(torch.float64)
    found = peers.peers(x)
    torch.testing.assert_close(found["torch"](), VARIANTS["varlen_attention"].reference(**x))


SPARSE_CASES = {
    "block_sparse_attention": block_masks.MaskCase(
        hq=2, hkv=2, sq=300, sk=300, label="documents", build=block_masks.documents
    ),
    "local_attention": LocalCase(window=(5, 2), causal=True),
    "neighborhood_attention": NeighborhoodCase(
        6, 9, AttentionCase(hq=4, hkv=2, d=16, dv=16), kernel_size=(3, 5)
    ),
    "topk_attention": TopkCase(AttentionCase(), padding=0.0),
}


@pytest.mark.parametrize(("name", "case"), SPARSE_CASES.items(), ids=SPARSE_CASES)
def test_peers_of_sparse_calls_compute_the_same(name, case):
    x = case.inputs(torch.float64)
    found = peers.peers(x)
    assert set(found) == {"torch"}  # FlexAttention has no float64
    torch.testing.assert_close(found["torch"](), VARIANTS[name].reference(**x))
    q, k, v = (x[n].flatten(2, -2) for n in ("query", "key", "value"))
    gqa = {"enable_gqa": q.shape[1] != k.shape[1]}
    torch.testing.assert_close(peers.dense(x)(), reference(q, k, v, **gqa))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_a_peer_where_it_can_be_compiled(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(peers, "_compiled_flex", lambda: flex_attention)  # no half a minute of it
    monkeypatch.setattr(peers.shutil, "which", lambda name: name)
    x = SPARSE_CASES["block_sparse_attention"].inputs(torch.float32)
    call = peers.peers(x)["torch flex"]
    torch.testing.assert_close(call(), VARIANTS["block_sparse_attention"].reference(**x))
    assert "torch flex" not in peers.peers(x | {"query": x["query"].clone().requires_grad_()})
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    assert set(peers.peers(x)) == {"torch"}


def test_torch_is_no_peer_of_dilated_windows():
    assert peers.peers(LocalCase(dilation=2).inputs(torch.float32)) == {}


@pytest.mark.parametrize("percent", [0, 2, 50, 100])
def test_random_blocks_are_as_many_as_said_and_full(percent):
    mask = block_masks.random_blocks(percent, 128 * 10)
    assert mask.num_full == percent and mask.num_partial == 0


def test_documents_are_ten_of_different_lengths():
    seen = block_masks.documents(1000).to_dense()[0, 0].sum(1)
    starts = (seen == 1).nonzero().flatten()
    assert starts[0] == 0 and len(starts) == len(starts.diff().unique()) + 1 == 10


@pytest.mark.parametrize("option", [{"softcap": 2.0}, {"sinks": True}])
def test_torch_is_no_peer_where_it_lacks_the_option(option: dict):
    assert peers.peers(replace(SMALL, **option).inputs(torch.float32)) == {}


SAMPLED_CASES = [
    SMALL,
    replace(SMALL, causal=True),
    replace(SMALL, sk=50, causal=True, align="bottom_right"),
    replace(SMALL, window=(5, 2)),
    replace(SMALL, mask="bool"),
    replace(SMALL, mask="key_padding", causal=True),
    replace(SMALL, mask="bias", causal=True),
]


@pytest.mark.parametrize("case", SAMPLED_CASES, ids=lambda c: c.name)
def test_large_calls_are_checked_on_some_rows(case, cpu_backend, monkeypatch):
    monkeypatch.setattr(correctness, "MAX_REFERENCE_SCORES", 2 * 10 * case.sk)
    verdict = correctness.verify(VARIANTS["attention"], case, torch.float32, cpu_backend)
    assert verdict.ok, verdict.message
    assert verdict.rows == 10


@pytest.mark.parametrize("name", ["block_sparse_attention", "local_attention", "topk_attention"])
def test_large_sparse_calls_are_checked_on_some_rows(name, cpu_backend, monkeypatch):
    monkeypatch.setattr(peers, "flex", lambda inputs: None)
    case, variant = SPARSE_CASES[name], VARIANTS[name]
    inputs = case.inputs(torch.float32)
    per_row = correctness.scores(inputs) // inputs["query"].shape[-2]
    monkeypatch.setattr(correctness, "MAX_REFERENCE_SCORES", 10 * per_row)
    verdict = correctness.verify(variant, case, torch.float32, cpu_backend)
    assert verdict.ok and verdict.rows == 10, verdict.message

    def wrong(**inputs):
        o, lse = variant.fn(**inputs)
        return o.index_fill(-2, torch.tensor([0]), 3.0), lse

    verdict = correctness.verify(replace(variant, fn=wrong), case, torch.float32, cpu_backend)
    assert "AssertionError: o:" in verdict.message


def test_scores_of_images_are_of_all_pixels():
    case = SPARSE_CASES["neighborhood_attention"]
    assert correctness.scores(case.inputs(torch.float32)) == 2 * 4 * (6 * 9) ** 2


@pytest.mark.usefixtures("wrong_attention")
@pytest.mark.parametrize("scores", [1 << 24, 200])
def test_wrong_results_are_refused(scores: int, cpu_backend, monkeypatch):
    monkeypatch.setattr(correctness, "MAX_REFERENCE_SCORES", scores)
    verdict = correctness.verify(VARIANTS["attention"], SMALL, torch.float32, cpu_backend)
    assert not verdict.ok and "AssertionError: o:" in verdict.message


def test_other_results_of_torch_are_refused(cpu_backend, monkeypatch):
    monkeypatch.setattr(peers, "sdpa", lambda inputs: lambda: inputs["value"])
    verdict = correctness.verify(VARIANTS["attention"], SMALL, torch.float32, cpu_backend)
    assert "torch computes something else" in verdict.message


@pytest.mark.usefixtures("tiny")
def test_bench_prints_and_writes_every_timing(tmp_path):
    result = CliRunner().invoke(main, [*BENCH, "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    assert "B1 H2 S33 D16" in result.output and "2 x S5..9" in result.output
    assert "fewer than the 20 that a claim needs" in result.output
    written = json.loads((tmp_path / "r.json").read_text())
    assert set(written) == {"machine", "suite", "rounds", "ceilings", "results"}
    assert {"cpu", "cores", "gpu", "torch", "commit"} <= set(written["machine"])
    assert written["ceilings"][0]["read"] > 0 and written["ceilings"][0]["gemm"]["float32"] > 0
    dense, packed = written["results"]
    assert dense["ok"] and dense["max_error"] <= dense["error_bound"]
    assert dense["threads"] == 1 and dense["checked_rows"] == "all" and dense["flops"] > 0
    for contender, rounds in {"attn_ext": 4, "torch": 4, "reference": 3}.items():
        assert len(dense["seconds"][contender]) == rounds
        assert all(s > 0 and math.isfinite(s) for s in dense["seconds"][contender])
    for quarters in (dense["ratios"]["torch"], packed["ratios"]["reference"]):
        assert 0 < quarters["q1"] <= quarters["median"] <= quarters["q3"]


@pytest.mark.usefixtures("tiny", "wrong_attention")
def test_bench_does_not_time_wrong_cases(tmp_path):
    result = CliRunner().invoke(main, [*BENCH, "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 1
    assert "WRONG" in result.output and "not timed B1 H2 S33 D16 float32" in result.output
    dense, packed = json.loads((tmp_path / "r.json").read_text())["results"]
    assert not dense["ok"] and dense["seconds"] == {} and "AssertionError" in dense["message"]
    assert packed["ok"] and packed["seconds"]


@pytest.mark.usefixtures("tiny")
def test_bench_compares_sparse_calls_with_dense_attention(tmp_path, monkeypatch):
    cases = tuple(
        suites.BenchCase(case, (torch.float32,), name, dense=True)
        for name, case in SPARSE_CASES.items()
    )
    monkeypatch.setitem(suites.SUITES, "sparse", suites.Suite("all", cases, rounds=3))
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)  # no FlexAttention
    args = [*BENCH, "--suite", "sparse", "--json", str(tmp_path / "r.json")]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    assert "vs dense" in result.output and "B2 H4:2 6x9 kernel 3x5 D16" in result.output
    assert "B2 H4:2 S37:53 top 20 D64" in result.output
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert all(len(r["seconds"]["dense"]) == 3 for r in results)
    blocks, *others = results
    assert blocks["visited_blocks"] == 5 / 9  # on the diagonal and next to it, of 3 x 3
    ratio = blocks["ratios"]["dense"]["median"]
    assert blocks["time_per_block"] == pytest.approx(9 / 5 / ratio)
    assert all(r["visited_blocks"] is r["time_per_block"] is None for r in others)


@pytest.mark.usefixtures("tiny")
def test_goals_are_reached_or_missed(tmp_path, monkeypatch):
    both = (torch.float32, torch.bfloat16)
    cases = (
        suites.BenchCase(SMALL, both, goals=(1e-9, 1e9)),
        suites.BenchCase(replace(SMALL, softcap=3.0), both, goals=(1e-9,), against="reference"),
    )
    monkeypatch.setitem(suites.SUITES, "quick", suites.Suite("goals", cases, rounds=3))
    path = tmp_path / "r.json"
    result = CliRunner().invoke(main, [*BENCH, "--json", str(path)])
    assert result.exit_code == 0, result.output
    for words in ("1e-09 reached", "1e+09 missed", "1e-09 vs reference reached", "2 of 3 reached"):
        assert words in result.output
    results = json.loads(path.read_text())["results"]
    assert [r["goal"] for r in results] == [1e-9, 1e9, 1e-9, None]


@pytest.mark.usefixtures("tiny")
def test_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "ratios.png"
    result = CliRunner().invoke(main, [*BENCH, "attention", "--rounds", "3", "--plot", str(path)])
    assert result.exit_code == 0, result.output
    assert "varlen" not in result.output
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[1] > 1000 and picture.std() > 0


@pytest.mark.usefixtures("tiny")
def test_threads_and_targets_are_grouped():
    args = [*BENCH, "attention", "--rounds", "3", "--target", "scalar"]
    result = CliRunner().invoke(main, [*args, "--threads", "1", "--threads", "2"])
    assert result.exit_code == 0, result.output
    titles = [line.strip() for line in result.output.splitlines()]
    assert "scalar, 1 thread" in titles and "scalar, 2 threads" in titles


def test_accuracy_compares_with_torch(monkeypatch):
    case = suites.BenchCase(SMALL, (torch.float32, torch.bfloat16))
    monkeypatch.setattr(bench_module("__main__"), "ACCURACY", (case,))
    result = CliRunner().invoke(main, [*BENCH, "--suite", "accuracy"])
    assert result.exit_code == 0, result.output
    assert result.output.count("B1 H2 S33 D16") == 2 and "e-07" in result.output


def test_peak_memory_counts_what_a_call_takes(cpu_backend):
    case = suites.BenchCase(AttentionCase(b=1, hq=1, hkv=1, sq=2048, sk=2048))
    place = run.Place(cpu_backend, 1)
    measured = memory.measure_memory(case, torch.float32, place)
    scores_bytes = 4 * 2048**2
    assert set(measured.extra) == {"attn_ext", "torch"}
    assert 0 <= measured.extra["attn_ext"] < scores_bytes / 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonesuch"], "no variant nonesuch; there are attention, varlen_attention"),
        (["varlen_attention", "--suite", "forward"], "suite forward has no case of"),
        (["--target", "vax"], "expected one of .*scalar.*; got vax"),
        (["--suite", "memory", "--plot", "x.png"], "--plot draws ratios"),
    ],
)
def test_bench_says_what_it_cannot_do(args: list[str], message: str):
    result = CliRunner().invoke(main, ["bench", *args])
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.output.split()))
