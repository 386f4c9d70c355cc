"""The planner: its formulas beside simulations, its buckets beside torch's, its predictions beside real runs."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pandas as pd
import pytest
import torch.distributed as dist

from data_pipeline.common.errors import UserError
from tests.stress import shaped
from tests.support.runs import SOLO, dotted, images
from trainer.config import load
from trainer.model.resnet import ModelConfig, build_resnet
from trainer.plan.__main__ import main
from trainer.plan.allreduce_model import Link, fit_ring, ring_seconds, tree_seconds
from trainer.plan.cli import Cluster, plan, predict
from trainer.plan.measurements import (
    BUCKET_BYTES,
    FIRST_BUCKET_BYTES,
    Bucket,
    Parts,
    Step,
    bucket_up,
    measure_step,
    read,
    save,
)
from trainer.plan.options import gpu_images_of

LINK = Link(2e-5, 1e9)
PARTS = Parts(
    measured_on="a host",
    recipe="a network",
    epoch_images=10_000,
    steps=(Step(8, 0.02, 0.04, 0.01), Step(32, 0.05, 0.10, 0.01)),
    buckets=(Bucket(2 << 20, 2 << 20, 0.25), Bucket(30 << 20, 30 << 20, 0.5), Bucket(8 << 20, 8 << 20, 1.0)),
    loader_s=1e-3,
    shared_cores=False,
)
CLUSTER = Cluster(nodes=2, gpus_per_node=4, gpu_images=32, inside=Link(1e-5, 1e11), between=LINK)


# ---- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_ring_takes_as_long_as_its_messages(ranks: int) -> None:
    size, now_s = 1_000_000, [0.0] * ranks  # when each rank has what it needs for its next message
    for _ in range(2 * (ranks - 1)):
        now_s = [
            max(now_s[rank], now_s[rank - 1]) + LINK.latency_s + size / ranks / LINK.bytes_per_s
            for rank in range(ranks)
        ]
    assert ring_seconds(LINK, ranks, size) == pytest.approx(max(now_s))


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_a_tree_takes_as_long_as_with_the_best_segments(depth: int) -> None:
    size = 50_000_000

    def segmented(count: int) -> float:
        return 2 * (count + depth) * (LINK.latency_s + size / count / LINK.bytes_per_s)

    best = min(segmented(count) for count in range(1, 2000))
    assert tree_seconds(LINK.bytes_per_s, depth * LINK.latency_s, size) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("ranks", [2, 5])
def test_the_fit_finds_the_link(ranks: int) -> None:
    sizes = [4096, 1 << 15, 1 << 18, 1 << 21]
    found = fit_ring(sizes, [ring_seconds(LINK, ranks, size) for size in sizes], ranks)
    assert found == pytest.approx(LINK)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_buckets_are_those_of_ddp(name: str) -> None:
    parameters = list(build_resnet(ModelConfig(name=name), 1000).parameters())[::-1]
    ready = list(accumulate([1 / len(parameters)] * len(parameters)))
    theirs, _ = dist._compute_bucket_assignment_by_size([*parameters], [FIRST_BUCKET_BYTES, BUCKET_BYTES])
    wanted = [Bucket(sum(parameters[i].nbytes for i in group), 0, ready[max(group)]) for group in theirs]
    ours = bucket_up(parameters, ready, "none")
    assert [(bucket.size_bytes, bucket.ready) for bucket in ours] == [(each.size_bytes, each.ready) for each in wanted]
    assert [bucket.sent_bytes for bucket in ours] == [bucket.size_bytes for bucket in ours]


def test_compression_sends_less() -> None:
    parameters = list(build_resnet(ModelConfig(), 10).parameters())[::-1]
    ready = [1.0] * len(parameters)
    whole, half, thin = (bucket_up(parameters, ready, how) for how in ("none", "bf16", "powersgd"))
    assert [bucket.sent_bytes for bucket in half] == [bucket.size_bytes / 2 for bucket in whole]
    assert 0 < sum(bucket.sent_bytes for bucket in thin) < sum(bucket.size_bytes for bucket in whole) / 50


# ---- the model ------------------------------------------------------------------------------------------------------


def test_one_gpu_only_computes() -> None:
    predicted = predict(PARTS, Cluster(1, 1, 32, None, None))
    assert (predicted.network_s, predicted.exposed_s, predicted.efficiency) == (0, 0, pytest.approx(1))
    assert predicted.step_s == pytest.approx(0.16)
    assert predicted.epoch_s == pytest.approx(313 * 0.16)
    assert (predicted.limit, predicted.measured) == ("compute", True)


def test_a_slow_network_shows_what_the_backward_pass_does_not_hide() -> None:
    cluster = replace(CLUSTER, all_reduce="ring")
    times_s = [ring_seconds(LINK, 8, bucket.sent_bytes) for bucket in PARTS.buckets]
    predicted = predict(PARTS, cluster)
    # The second bucket waits for its gradients, the third for the second's end.
    assert 0.25 * 0.10 + times_s[0] < 0.5 * 0.10 and 0.5 * 0.10 + times_s[1] > 0.10
    end_s = 0.5 * 0.10 + times_s[1] + times_s[2]
    assert predicted.network_s == pytest.approx(sum(times_s))
    assert predicted.exposed_s == pytest.approx(end_s - 0.10)
    assert predicted.step_s == pytest.approx(0.16 + end_s - 0.10)
    assert predicted.limit == "compute"
    slower = predict(PARTS, replace(cluster, between=Link(0, 1e8)))
    assert slower.limit == "network" and slower.images_per_s < predicted.images_per_s


def test_a_fast_network_leaves_the_last_bucket() -> None:
    predicted = predict(PARTS, replace(CLUSTER, between=Link(0, 1e12), all_reduce="ring"))
    last_s = ring_seconds(Link(1e-5, 1e11), 8, PARTS.buckets[-1].sent_bytes)
    assert predicted.exposed_s == pytest.approx(last_s)


def test_a_tree_wins_where_rings_are_long() -> None:
    far = replace(CLUSTER, nodes=64, between=Link(1e-4, 1e9))
    ring, tree, best = (replace(far, all_reduce=how).all_reduce_s(1000) for how in ("ring", "tree", "best"))
    assert best == tree < ring


def test_the_loader_overlaps_unless_it_shares_the_cores() -> None:
    slow = replace(PARTS, loader_s=0.02)
    alone = Cluster(1, 1, 32, None, None)
    assert predict(slow, alone).step_s == pytest.approx(0.64)
    assert predict(slow, alone).limit == "loader"
    assert predict(replace(PARTS, shared_cores=True), alone).step_s == pytest.approx(0.16 + 0.032)
    # Sending takes the cores too, but a wait for the network is time to load.
    shared = replace(PARTS, shared_cores=True, host_s_per_byte=1e-9)
    fast = replace(CLUSTER, between=Link(0, 1e12))
    assert predict(shared, fast).step_s == pytest.approx(0.16 + 0.032 + (40 << 20) * 1e-9)
    waiting = replace(CLUSTER, between=Link(0, 1e8))
    assert predict(shared, waiting).step_s == predict(PARTS, waiting).step_s


def test_other_batches_are_extrapolated() -> None:
    alone = Cluster(1, 1, 20, None, None)
    between, beyond = predict(PARTS, alone), predict(PARTS, replace(alone, gpu_images=64))
    assert (between.compute_s, between.measured) == (pytest.approx(0.115), False)
    assert (beyond.compute_s, beyond.measured) == (pytest.approx(0.32), False)


def test_the_plan_prices_an_epoch() -> None:
    clusters = [CLUSTER, replace(CLUSTER, nodes=4)]
    planned = plan(PARTS, clusters, 3.6)
    assert planned.batch.tolist() == [256, 512]
    assert planned.epoch_cost.tolist() == pytest.approx([planned.epoch_s[0] * 8e-3, planned.epoch_s[1] * 16e-3])
    assert plan(PARTS, clusters, 3.6).equals(planned)


# ---- the measurement ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_taken_apart(accumulate: int, one_thread: None) -> None:
    cfg = load(["--data.size_px", "32", "--optim.accumulate", str(accumulate), "--engine.precision", "fp32"])
    step, buckets = measure_step(cfg, 10, SOLO, 4)
    assert step.images == 4 and min(step) > 0
    # All before the last backward pass is forward_s.
    assert (step.forward_s > step.backward_s) == (accumulate == 2)
    assert [bucket.ready for bucket in buckets] == sorted(bucket.ready for bucket in buckets)
    assert 0 < buckets[0].ready < buckets[-1].ready == pytest.approx(1)
    assert sum(bucket.size_bytes for bucket in buckets) == sum(
        parameter.nbytes for parameter in build_resnet(cfg.model, 10).parameters()
    )


def test_parts_survive_a_file(tmp_path: Path) -> None:
    parts = replace(PARTS, inside=LINK)
    save(parts, tmp_path / "parts.json")
    assert read(tmp_path / "parts.json") == parts
    for text in ("no JSON", "[]", '{"steps": 3}'):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(UserError, match=r"wrong\.json holds no parts"):
            read(tmp_path / "wrong.json")


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Output of `python -m trainer.plan` with these arguments, here in this process."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["plan", *arguments])
        main()
        return capsys.readouterr().out

    return run


def test_the_command_measures_and_plans_again_elsewhere(tmp_path: Path, command: Callable[..., str]) -> None:
    parts, between = tmp_path / "parts.json", dotted({"between_us": "50", "between_gb_per_s": "1.25"})
    layout = dotted(
        {"data.batch": "8", "nodes": "1,2", "gpus_per_node": "1", "data.size_px": "32", "model.width": "0.25"}
    )
    data = dotted({"data.path": str(images(tmp_path)), "engine.precision": "fp32"})
    first = command(*data, *layout, *between, "--save_parts", str(parts), "--out", str(tmp_path / "here"))
    assert "between nodes: 50 µs, 1.25 GB/s, as given" in first and "~" in first
    second = command(*layout, *between, "--parts", str(parts), "--out", str(tmp_path / "there"))
    assert second == first
    planned = [pd.read_csv(tmp_path / folder / "plan.csv") for folder in ("here", "there")]
    assert planned[0].equals(planned[1])
    assert planned[0].gpu_images.tolist() == [8, 4] and planned[0].measured.all()
    assert json.loads((tmp_path / "here/plan.json").read_text())["parts"] == json.loads(parts.read_text())
    plain = command(*dotted({"data.batch": "8", "data.size_px": "32"}), "--parts", str(parts))
    assert "link inside nodes: 50 µs, 2 GB/s, assumed: give yours by --inside_us" in plain and "between" not in plain
    with pytest.raises(UserError, match=r"plan\.csv exists and is kept"):
        command(*layout, *between, "--parts", str(parts), "--out", str(tmp_path / "here"))
    with pytest.raises(UserError, match="gradients sent as bf16; give the options"):
        command(*layout, *between, "--parts", str(parts), "--engine.compression", "bf16")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--nodes", "1,x"), "--nodes: 1,x does not fit"),
        (("--gpus_per_node", "0"), "--gpus_per_node: 0 is not positive"),
        (("--gpus_per_node", "two"), "--gpus_per_node: invalid int value: 'two'"),
        (("--parts", "absent.json"), r"--parts: absent\.json cannot be read"),
        (("--price", "3"), "--price: no such option"),
    ],
)
def test_a_mistake_is_told(arguments: tuple[str, ...], told: str, command: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=told):
        command("--data.batch", "64", *arguments)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    cfg = load(["--data.batch", "96", "--optim.accumulate", "2"])
    assert gpu_images_of(cfg, [8, 16], None) == [12, 6]
    assert gpu_images_of(cfg, [8, 64], 4) == [4, 4]
    with pytest.raises(UserError, match=r"data\.batch: 96 .* choose a multiple of 128, or give --gpu_batch"):
        gpu_images_of(cfg, [8, 64], None)
    with pytest.raises(UserError, match=r"--gpu_batch: 3"):
        gpu_images_of(cfg, [8], 3)


# ---- real runs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not shaped.possible(), reason="needs root, ip, tc, nsenter and unshare")
def test_predictions_hold_on_a_shaped_network() -> None:
    cases = [shaped.Case(200), shaped.Case(400)]
    with shaped.open_ranks(2, shaped.options_of(2, size_px=32, images=4)) as ranks:
        pids = [process.pid for process in ranks.processes]
        compared = shaped.compare(ranks, cases, images=4, rounds=2)
    assert compared.shaped_off.abs().max() < 0.25, compared.to_string()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
