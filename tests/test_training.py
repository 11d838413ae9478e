"""Training: the rows and mask against the paper's rules, the network against the dense oracle,
no leak, gradients, resume, learning. Adapters and ranks: test_adapters.py, test_ranks.py."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import tiny
import torch

from tidar_ref.errors import UserError
from tidar_ref.training.adapters import AdapterConfig
from tidar_ref.training.attention import attention
from tidar_ref.training.network import TrainingNetwork, objective_loss
from tidar_ref.training.rows import IGNORE, Example, Objective, Rows, build_rows, visible
from tidar_ref.training.trainer import LOG_FILE, Meter, StepLog, TrainConfig, Trainer

MASK = tiny.MASK
TIDAR3 = Objective(block_lens=(3,), random_offset=False)


def example(prompt: int, response: int, seed: int = 0) -> Example:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, MASK, (prompt + response,), generator=g).tolist()
    return Example(prompt=tuple(ids[:prompt]), response=tuple(ids[prompt:]))


def rows_of(examples: list[Example], objective: Objective, seed: int = 0) -> Rows:
    seeds = [seed + index for index in range(len(examples))]
    return build_rows(examples, objective, mask_token_id=MASK, seeds=seeds)


def network_of(model: tiny.Tiny) -> TrainingNetwork:
    """On a copy: the tiny models are shared between tests."""
    return TrainingNetwork(tiny.model_of(model.config, model.state), mask_token_id=MASK)


def logits_of(network: TrainingNetwork, rows: Rows) -> torch.Tensor:
    table = network.embed.weight if network.lm_head is None else network.lm_head.weight
    return network.hidden_states(rows) @ table.T


@pytest.mark.parametrize(("length", "k"), [(6, 3), (7, 3), (8, 4), (9, 2), (5, 16)])
def test_mask_is_the_papers_cell_by_cell(length: int, k: int) -> None:
    """Figure 3 left: S clean rows, then mask row i of block floor(i / K) at position i."""
    objective = Objective(block_lens=(k,), random_offset=False)
    rows = rows_of([example(0, length)], objective)
    allowed = visible(rows)
    padded = -(-length // k) * k
    assert rows.count == length + padded
    for q in range(length + padded):
        for key in range(length + padded):
            if q < length:
                right = key < length and key <= q
            elif key < length:
                right = key < k * ((q - length) // k)
            else:
                right = (q - length) // k == (key - length) // k
            assert bool(allowed[q, key]) == right, (q, key)
    assert rows.positions.tolist() == [*range(length), *range(padded)]
    tokens = example(0, length).tokens
    assert rows.labels[:length].tolist() == [*tokens[1:], IGNORE]
    assert rows.labels[length:].tolist() == [*tokens, *[IGNORE] * (padded - length)]
    assert rows.ids[length:].tolist() == [MASK] * padded


def test_response_only_and_offset_start_blocks_in_the_response() -> None:
    objective = Objective(block_lens=(4,), random_offset=True)
    begins = set()
    for seed in range(40):
        rows = rows_of([example(5, 9)], objective, seed)
        masks = rows.positions[rows.clean :]
        begin = int(masks[0])
        begins.add(begin)
        assert masks.tolist() == list(range(begin, begin + len(masks)))
        assert len(masks) % 4 == 0 and int(masks[-1]) >= 13 > int(masks[-1]) - 4
        assert (rows.clean_before[rows.clean :].view(-1, 4) == masks.view(-1, 4)[:, :1]).all()
        labels = rows.labels[: rows.clean]
        assert (labels[:4] == IGNORE).all() and (labels[4:13] != IGNORE).all()
    assert begins == {5, 6, 7, 8}


def test_packed_documents_do_not_meet_and_restart_their_positions() -> None:
    examples = [example(2, 5, 1), example(0, 7, 2), example(4, 3, 3)]
    rows = rows_of(examples, Objective(block_lens=(3, 4), grids=2))
    allowed = visible(rows)
    assert not (allowed & (rows.document[:, None] != rows.document[None, :])).any()
    for number, (clean, masks) in enumerate(rows.documents):
        assert rows.positions[clean].tolist() == list(range(len(examples[number].tokens)))
        assert (rows.document[clean] == number).all() and (rows.document[masks] == number).all()
    assert sum(b.stop - b.start + a.stop - a.start for a, b in rows.documents) == rows.count


def test_a_documents_rows_do_not_depend_on_its_company() -> None:
    examples = [example(2, 9, 1), example(3, 8, 2)]
    objective = Objective(block_lens=(3, 4), grids=2, masking="random")
    both = build_rows(examples, objective, mask_token_id=MASK, seeds=[5, 6])
    alone = build_rows(examples[1:], objective, mask_token_id=MASK, seeds=[6])
    clean, masks = both.documents[1]
    for name in ("ids", "positions", "labels", "clean_before", "is_mask", "weights"):
        joined = torch.cat([getattr(both, name)[clean], getattr(both, name)[masks]])
        assert torch.equal(joined, getattr(alone, name)), name


def test_block_diffusion_rows_are_block_causal() -> None:
    objective = Objective(kind="block_diffusion", block_lens=(3,), random_offset=False)
    rows = rows_of([example(2, 7)], objective)
    #            prompt   block 2..4  block 5..7  block 8
    assert rows.clean_before[: rows.clean].tolist() == [1, 2, 5, 5, 5, 8, 8, 8, 9]
    assert (rows.labels[: rows.clean] == IGNORE).all()
    masked = rows.is_mask[rows.clean :]
    inside = rows.positions[rows.clean :] < 9
    assert ((rows.labels[rows.clean :] != IGNORE) == (masked & inside)).all()


def test_random_masking_shows_real_tokens_and_scores_masks_only() -> None:
    objective = Objective(block_lens=(8,), masking="random", random_offset=False)
    shown = 0
    for seed in range(20):
        rows = rows_of([example(0, 16)], objective, seed)
        real = ~rows.is_mask[rows.clean :]
        shown += int(real.sum())
        assert torch.equal(rows.ids[rows.clean :][real], rows.ids[: rows.clean][real])
        assert ((rows.labels[rows.clean :] == IGNORE) == real).all()
    assert 100 < shown < 220  # 320 rows, ratios uniform: half of them on average


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", ["tidar", "block_diffusion", "ar"])
def test_logits_equal_the_dense_oracle(family: str, kind: str) -> None:
    """One oracle forward a document over its rows, under the mask rewritten from its meaning."""
    model = tiny.random_tiny(family)
    network = network_of(model)
    objective = Objective(kind=kind, block_lens=(3,), grids=1 if kind != "tidar" else 2)
    rows = rows_of([example(2, 6, 1), example(0, 9, 2), example(5, 4, 3)], objective)
    ours = logits_of(network, rows).detach()
    for clean, masks in rows.documents:
        index = torch.cat([torch.arange(s.start, s.stop) for s in (clean, masks)])
        allowed = torch.zeros(len(index), len(index), dtype=torch.bool)
        for a, q in enumerate(index.tolist()):
            for b, k in enumerate(index.tolist()):
                if rows.block[k] >= 0:
                    allowed[a, b] = rows.block[q] == rows.block[k]
                else:
                    allowed[a, b] = rows.positions[k] < rows.clean_before[q]
        wanted, _ = oracles.forward(
            model.state, model.config, rows.ids[index], rows.positions[index], allowed
        )
        torch.testing.assert_close(ours[index].double(), wanted, atol=2e-5, rtol=1e-4)


def test_chunks_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of([example(3, 40, 1), example(0, 21, 2)], Objective(block_lens=(4,), grids=2))
    g = torch.Generator().manual_seed(0)
    q = torch.randn(rows.count, 4, 8, generator=g)
    k, v = torch.randn(2, rows.count, 2, 8, generator=g)
    whole = attention(rows, kv_groups=2, dtype=torch.float32)(q, k, v)
    monkeypatch.setattr("tidar_ref.training.attention.CHUNK_ROWS", 7)
    cut = attention(rows, kv_groups=2, dtype=torch.float32)(q, k, v)
    torch.testing.assert_close(cut, whole)


def test_training_blocks_equal_what_decoding_drafts() -> None:
    """The logits of a training block that starts at s are those of a prefill's masks after s."""
    model = tiny.random_tiny("qwen3")
    network = network_of(model)
    doc = example(5, 8, 4)
    rows = rows_of([doc], Objective(block_lens=(4,), random_offset=False))
    ours = logits_of(network, rows).detach()[rows.clean :].view(-1, 4, 16)
    for number, start in enumerate((5, 9)):
        context = torch.tensor([doc.tokens[:start]])
        _, slots = oracles.prefill_logits(model.state, model.config, context, 4, MASK)
        real = torch.arange(16) != MASK  # the oracle bans the mask token
        torch.testing.assert_close(
            ours[number][:, real].double(), slots[0][:, real], atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("kind", ["tidar", "block_diffusion"])
def test_nothing_leaks(kind: str) -> None:
    """Changing token t changes no diffusion logit of its own block and no AR logit before t."""
    model = tiny.random_tiny("qwen3")
    network = network_of(model)
    doc = example(0, 12, 7)
    objective = Objective(kind=kind, block_lens=(4,), random_offset=False)
    # Under random masking tokens shown inside a block are inputs: keep those fixed, all masked.
    monkey = {} if kind == "tidar" else {"seed": next(s for s in range(999) if _all_masked(doc, s))}
    rows = rows_of([doc], objective, **monkey)
    before = logits_of(network, rows).detach()
    for t in range(12):
        tokens = list(doc.tokens)
        tokens[t] = (tokens[t] + 1) % MASK
        changed = rows_of([Example(prompt=(), response=tuple(tokens))], objective, **monkey)
        moved = (logits_of(network, changed).detach() - before).abs().amax(-1) > 1e-6
        clean, masks = moved[: rows.clean], moved[rows.clean :]
        block = t // 4
        assert not masks[: 4 * (block + 1)].any()
        assert masks[4 * (block + 1) :].all()  # later blocks do see it: the test can fail
        visible_from = t if kind == "tidar" else 4 * block
        assert not clean[:visible_from].any()
        assert clean[visible_from:].any()


def _all_masked(doc: Example, seed: int) -> bool:
    objective = Objective(kind="block_diffusion", block_lens=(4,), random_offset=False)
    rows = rows_of([doc], objective, seed)
    return bool(rows.is_mask[rows.clean :].all())


def test_ar_gradients_do_not_depend_on_the_masks() -> None:
    model = tiny.random_tiny("llama")
    network = network_of(model)
    examples = [example(2, 7, 1), example(1, 9, 2)]

    def gradients(objective: Objective) -> dict[str, torch.Tensor]:
        network.zero_grad(set_to_none=True)
        network(rows_of(examples, objective), objective).ar_sum.backward()
        return {n: p.grad.clone() for n, p in network.trained().items() if p.grad is not None}

    alone = gradients(Objective(kind="ar"))
    for objective in (TIDAR3, Objective(block_lens=(5,), grids=2)):
        beside = gradients(objective)
        assert beside.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(beside[name], value, atol=1e-5, rtol=1e-4)


def test_loss_is_the_papers() -> None:
    """alpha-weighted mean of two means, by hand from logits (section 2.4)."""
    model = tiny.random_tiny("qwen2")
    network = network_of(model)
    objective = Objective(block_lens=(3,), random_offset=False, alpha=0.8)
    rows = rows_of([example(0, 7)], objective)
    logits = logits_of(network, rows).detach()
    logits[:, MASK] = float("-inf")
    chosen = [(i, int(rows.labels[i])) for i in range(rows.count) if rows.labels[i] != IGNORE]
    nats = {i: float(torch.logsumexp(logits[i], 0) - logits[i, y]) for i, y in chosen}
    ar = [v for i, v in nats.items() if i < rows.clean]
    diffusion = [v for i, v in nats.items() if i >= rows.clean]
    assert (len(ar), len(diffusion)) == (6, 7)
    by_hand = (0.8 * sum(ar) / 6 + sum(diffusion) / 7) / 1.8
    losses = network(rows, objective)
    ours = objective_loss(losses, objective, ar_rows=6, diffusion_weight=7.0).detach()
    assert float(ours) == pytest.approx(by_hand, rel=1e-5)


def test_arrival_weighs_a_draft_by_those_it_stands_behind() -> None:
    """Against loops over the logits; gradients flow through the losses, not through the weights."""
    network = network_of(tiny.random_tiny("llama"))
    rows = rows_of([example(3, 9), example(2, 7, 1)], Objective(block_lens=(4,), grids=2))
    logits = logits_of(network, rows)
    logits[:, MASK] = float("-inf")
    log_p = logits.log_softmax(-1)
    by_hand, weights = torch.zeros(()), []
    for block in range(int(rows.block.max()) + 1):
        arrived = 1.0
        members = [i for i in range(rows.count) if rows.block[i] == block]
        for slot, row in enumerate(i for i in members if rows.labels[i] >= 0):
            by_hand = by_hand - arrived * log_p[row, rows.labels[row]]
            weights.append(arrived)
            if slot:
                arrived *= log_p[row, rows.labels[row]].exp().item()
    assert len(set(weights)) > 10 and min(weights) < 0.1  # a flat model: few arrive
    gradients = []
    objective = Objective(block_lens=(4,), weighting="arrival")
    for loss in (by_hand, network(rows, objective).diffusion_sum):
        network.zero_grad(set_to_none=True)
        loss.backward()
        gradients.append(network.embed.weight.grad.clone())
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", ["even", "arrival"])
def test_chunked_head_gives_the_same_loss_and_gradient(
    weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of(tiny.random_tiny("qwen2"))
    objective = Objective(block_lens=(4,), grids=2, weighting=weighting)
    rows = rows_of([example(0, 30)], objective)

    def run() -> tuple[float, torch.Tensor, int]:
        network.zero_grad(set_to_none=True)
        losses = network(rows, objective)
        (losses.ar_sum + losses.diffusion_sum).backward()
        return losses.diffusion_sum.item(), network.embed.weight.grad.clone(), losses.hits

    whole = run()
    monkeypatch.setattr("tidar_ref.training.network.KEPT_LOGITS", 0)
    monkeypatch.setattr("tidar_ref.training.network.HEAD_ROWS", 5)
    cut = run()
    assert cut[0] == pytest.approx(whole[0], rel=1e-6) and cut[2] == whole[2]
    torch.testing.assert_close(cut[1], whole[1])


def fresh(folder: Path, examples: list[Example] | None = None, **config: Any) -> Trainer:
    """A trainer on a fresh copy of the same tiny model."""
    state = oracles.random_state(oracles.tiny_config("qwen3", vocab=16), 3, std=0.1)
    model = tiny.model_of(oracles.tiny_config("qwen3", vocab=16), state)
    network = TrainingNetwork(model, mask_token_id=MASK)
    settings = {"steps": 6, "batch": 4, "micro_batch": 2, "lr": 3e-3, **config}
    return Trainer(
        network,
        examples or [example(2, 8, seed) for seed in range(9)],
        Objective(block_lens=(3, 4), grids=2),
        TrainConfig(**settings),
        folder,
    )


def test_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    whole = fresh(tmp_path / "whole")
    whole.run()
    first = fresh(tmp_path / "broken")
    for _ in range(2):
        first.step()
    first.save()
    second = fresh(tmp_path / "broken")
    assert second.resume() and second.progress.step == 2
    second.run()
    for name, value in whole.network.trained().items():
        assert torch.equal(value, second.network.trained()[name]), name
    assert not fresh(tmp_path / "elsewhere").resume()


def test_log_holds_every_step_once_after_a_kill_and_resume(tmp_path: Path) -> None:
    """Steps after the last checkpoint are lost with the process; their lines must not stay."""
    first = fresh(tmp_path, steps=3)
    first.run()
    with (tmp_path / LOG_FILE).open("a") as log:
        log.write('{"step": 4}\n{"st')
    second = fresh(tmp_path)
    second.resume()
    second.run()
    lines = (tmp_path / LOG_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_accumulation_does_not_change_the_step(tmp_path: Path) -> None:
    results = []
    for micro in (1, 2, 4):
        trainer = fresh(tmp_path / str(micro), micro_batch=micro)
        log = trainer.step()
        results.append((log, trainer.network.embed.weight.detach().clone()))
    for log, weight in results[1:]:
        assert log.ar_loss == pytest.approx(results[0][0].ar_loss, rel=1e-5)
        assert log.diffusion_loss == pytest.approx(results[0][0].diffusion_loss, rel=1e-5)
        torch.testing.assert_close(weight, results[0][1], atol=1e-5, rtol=1e-4)


def test_it_learns_text_and_not_shuffled_labels(tmp_path: Path) -> None:
    """Periodic text becomes certain; the same tokens with labels drawn at random do not."""
    text = [
        Example(prompt=(), response=tuple((start + i) % 5 for i in range(14))) for start in range(5)
    ]
    trainer = fresh(tmp_path / "text", text, steps=60, lr=1e-2)
    logs = []
    trainer.run(logs.append)
    assert logs[-1].ar_loss < 0.3 < 2 < logs[0].ar_loss
    assert logs[-1].draft_accuracy > 0.8

    noise = [example(0, 14, seed) for seed in range(200)]
    control = fresh(tmp_path / "noise", noise, steps=25, lr=1e-2)
    logs = []
    control.run(logs.append)
    assert min(log.ar_loss for log in logs) > 2.2  # log 15 = 2.71
    assert logs[-1].draft_accuracy < 0.3


def test_signal_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    import os
    import signal

    trainer = fresh(tmp_path, steps=1000)

    def stop(log: StepLog) -> None:
        if log.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.run(stop)
    assert trainer.stopping and trainer.progress.step == 2
    again = fresh(tmp_path, steps=1000)
    assert again.resume() and again.progress.step == 2


def test_schedule_and_epochs(tmp_path: Path) -> None:
    trainer = fresh(tmp_path, steps=100, warmup=0.1, min_lr_ratio=0.3)
    assert trainer.rate_at(0.05) == pytest.approx(0.5)
    assert trainer.rate_at(0.1) == pytest.approx(1.0)
    assert trainer.rate_at(1.0) == pytest.approx(0.3)
    seen = [i for step in range(9) for i in trainer.batch_indices(step)]  # 36 = 4 epochs of 9
    assert all(sorted(seen[9 * e : 9 * e + 9]) == list(range(9)) for e in range(4))
    assert seen[:9] != seen[9:18]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Objective(kind="tider"), "tider"),
        (lambda: Objective(masking="half"), "half"),
        (lambda: Objective(block_lens=(1,)), "(1,)"),
        (lambda: Objective(alpha=-1.0), "-1.0"),
        (lambda: Objective(weighting="late"), "late"),
        (lambda: Objective(weighting="arrival", masking="random"), "even ones"),
        (lambda: TrainConfig(), "no budget"),
        (lambda: TrainConfig(steps=1, batch=0), "batch 0"),
        (lambda: rows_of([Example(prompt=(1, 2), response=())], TIDAR3), "document 0"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
        make()


def test_flex_mask_gives_what_the_blocks_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's path with the uncompiled reference of Flex Attention, on a CPU: the same outputs."""
    from torch.nn.attention.flex_attention import flex_attention

    from tidar_ref.training import attention as module

    rows = rows_of([example(3, 20, 1), example(0, 17, 2)], Objective(block_lens=(4,), grids=2))
    g = torch.Generator().manual_seed(0)
    q = torch.randn(rows.count, 4, 16, generator=g)
    k, v = torch.randn(2, rows.count, 2, 16, generator=g)
    monkeypatch.setattr(module, "_FLEX", [flex_attention])
    ours = module._flex(rows)(q, k, v)
    torch.testing.assert_close(
        ours, attention(rows, kv_groups=2, dtype=torch.float32)(q, k, v), atol=1e-5, rtol=1e-4
    )


def test_rows_keep_their_meaning_on_another_device() -> None:
    rows = rows_of([example(3, 9)], TIDAR3)
    moved = rows.to("cpu")
    assert moved.clean == rows.clean and moved.documents == rows.documents
    assert torch.equal(moved.labels, rows.labels)


@pytest.mark.slow  # a C++ compiler at work
@pytest.mark.parametrize("placement", [None, "all", "mask"])
def test_compiled_equals_eager(placement: str | None) -> None:
    """Losses and gradients of batches of several sizes; one set of code serves all layers."""
    from torch._dynamo.utils import counters

    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip("no C++ compiler on this machine: torch.compile cannot work on its CPU")
    torch._dynamo.reset()  # the code of one case must not serve the next
    config = oracles.tiny_config("qwen3", vocab=16, layers=3)
    state = oracles.random_state(config, 3)
    settings = AdapterConfig(rank=3, placement=placement) if placement else None
    eager, compiled = (
        TrainingNetwork(
            tiny.model_of(config, state), mask_token_id=MASK, adapters=settings, compiled=choice
        )
        for choice in (False, True)
    )
    counters.clear()
    objective = Objective(block_lens=(3, 4), grids=2)
    for seed, length in enumerate((6, 9, 14)):
        rows = rows_of([example(2, length, seed), example(0, 9, seed + 1)], objective, seed)
        losses = []
        for network in (eager, compiled):
            network.zero_grad()
            sums = network(rows, objective)
            losses.append(objective_loss(sums, objective, ar_rows=15, diffusion_weight=30.0))
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
        for (name, a), b in zip(eager.trained().items(), compiled.trained().values(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-4, msg=name)
    # Before and after attention, and the loss; gated, clean rows have code without gradients.
    assert counters["stats"]["unique_graphs"] == (5 if placement == "mask" else 3)


def test_no_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            raise RuntimeError("no compiler found\nand forty lines more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"does not work here \(no compiler found\): leave it out"):
        TrainingNetwork(tiny.random_tiny("llama").model, mask_token_id=MASK, compiled=True)


def test_a_meter_adds_up_over_micro_batches(tmp_path: Path) -> None:
    model = tiny.random_tiny("llama")
    config = TrainConfig(steps=2, batch=4, micro_batch=2)
    meter = Meter(flops=lambda rows: 10.0 * rows.count, peak=1e6)
    trainer = Trainer(
        network_of(model), [example(2, 6, s) for s in range(4)], TIDAR3, config, tmp_path,
        meter=meter,
    )  # fmt: skip
    log = trainer.step()
    assert log.flops == 10 * log.rows
    assert log.mfu == pytest.approx(log.flops / log.seconds / 1e6)
    trainer.meter = Meter(flops=meter.flops)
    assert trainer.step().mfu is None
