"""The verb `train`: recipes end to end on a tiny model, cards, resume, distillation, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines import eagle3
from bench import cli
from bench.recipes import RECIPES, Recipe, Source, get_recipe
from bench.train import Outcome, rehearsal, train
from tidar_ref.checkpoint import load
from tidar_ref.errors import UserError
from tidar_ref.training.adapters import PRODUCTS
from tidar_ref.training.trainer import StepLog, Trainer

ROOT = Path(__file__).resolve().parents[1]


FAST = ("smollm2-tidar", "smollm2-tidar-full", "smollm2-tidar-gated", "smollm2-eagle3",
        "h100-qwen0.5b-k8")  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in sorted(RECIPES)]
)
def test_every_recipe_rehearses(name: str, tmp_path: Path) -> None:
    recipe = rehearsal(get_recipe(name))
    small = dataclasses.replace(
        recipe,
        train={**recipe.train, "steps": 2},
        mixture=(Source(name="templates", count=6),),
    )
    done = train(small, out=tmp_path / "run", data_dir=None, argv=["train"])
    assert done.finished and done.steps == 2
    log = [json.loads(line) for line in (tmp_path / "run" / "loss.jsonl").open()]
    assert [row["step"] for row in log] == [1, 2]
    assert all((row["flops"] is None) == (small.head is not None) for row in log)
    assert all(row["mfu"] is None for row in log)  # no peak is known for a CPU
    folder = tmp_path / "run" / ("adapter" if small.head is None else "head")
    card = (folder / "README.md").read_text()
    assert "2 steps" in card and "templates" in card and (folder / "loss.png").stat().st_size > 1000
    notes = json.loads((folder / "tidar.json").read_text())
    assert notes["steps"] == 2 and notes["recipe"]["name"] == small.name
    assert notes["corpus"]["sources"]["templates"]["hygiene"]["checked"]["own_math"]
    if small.head is not None:
        assert "Draft head" in card and log[1]["diffusion_loss"] < 1.1 * log[0]["diffusion_loss"]
        drafter = eagle3.build(load("random:tiny").model, head=str(folder)).drafter
        assert (
            drafter.sha256 and drafter.trained and len(drafter.target_ids) == notes["draft_vocab"]
        )
        return
    assert "GFLOP/s; no MFU" in card and notes["peak"] is None
    loaded = load(f"random:tiny+{folder}")
    assert loaded.source.adapters[0].startswith("adapter sha256 ")
    assert loaded.source.mask_token_id == 258


@pytest.mark.slow  # three processes; CI runs it after `make test`
def test_killed_run_goes_on_and_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "bench", "train", "--recipe", "smollm2-tidar", "--rehearse"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(out: Path, *, kill: bool = False) -> int:
        process = subprocess.Popen(
            [*words, "--out", str(out)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if kill:
            deadline = time.monotonic() + 120
            while not (out / "loss.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=180)
        return process.returncode

    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "broken", kill=True) in (0, 130)
    assert run(tmp_path / "broken") == 0
    losses = [
        [json.loads(line)["diffusion_loss"] for line in (tmp_path / name / "loss.jsonl").open()]
        for name in ("whole", "broken")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    weights = [tmp_path / n / "adapter" / "adapter_model.safetensors" for n in ("whole", "broken")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.fixture
def unfiltered(monkeypatch: pytest.MonkeyPatch) -> None:
    """No comparison with test sets: seconds of every run, and not what these tests are about."""
    report: dict[str, Any] = {"checked": {}, "sources": {}}
    monkeypatch.setattr("bench.train.hygiene", lambda _: lambda pairs: (list(pairs), report))


def full_recipe(**changes: Any) -> Recipe:
    recipe = rehearsal(get_recipe("smollm2-tidar-full"))
    return dataclasses.replace(
        recipe,
        train={**recipe.train, "steps": 3, "lr": 3e-3},
        mixture=(Source(name="templates", count=6),),
        **changes,
    )


@pytest.mark.usefixtures("unfiltered")
def test_a_full_fine_tune_leaves_what_it_learned(tmp_path: Path) -> None:
    """At full rank the adapter on the base is the trained model; at rank 1 the card says how far
    it is from it, and the share it names is the one computed from the checkpoint."""
    base = load("random:tiny", prepare=False).model.state_dict()
    for rank, close in ((128, True), (1, False)):
        out = tmp_path / str(rank)
        train(full_recipe(stored_rank=rank), out=out, data_dir=None, argv=["train"])
        tuned = torch.load(out / "state.pt", weights_only=True)["parameters"]
        assert {name.rpartition(".")[0].rpartition(".")[2] for name in tuned} == {*PRODUCTS, ""}
        stored = load(f"random:tiny+{out / 'adapter'}", prepare=False).model.state_dict()
        moved = kept = 0.0
        for name, value in tuned.items():
            if name == "mask_embedding":
                assert torch.equal(stored["embed.weight"][258], value)
                continue
            plain = name.replace(".base.", ".")
            step = value - base[plain]
            assert step.abs().max() > 1e-3, name
            error = (stored[plain] - value).norm() / step.norm()
            assert (error < 0.01) == close, (name, error)
            moved += float((step**2).sum())
            kept += float((torch.linalg.svdvals(step)[:rank] ** 2).sum())
        notes = json.loads((out / "adapter" / "tidar.json").read_text())
        assert notes["kept_share"] == pytest.approx(kept / moved, rel=1e-4)
        assert notes["outside_share"] == 0.0
        trained, held = notes["loss_as_trained"], notes["loss_as_stored"]
        assert all((abs(trained[k] - held[k]) < 1e-3) == close for k in ("ar", "draft")), notes
        card = (out / "adapter" / "README.md").read_text()
        assert f"rank {rank}" in card and f"{notes['kept_share']:.1%}" in card
        assert f"draft {trained['draft']:.4f} as trained" in card


@pytest.mark.usefixtures("unfiltered")
def test_what_a_difference_cannot_hold_is_named(tmp_path: Path) -> None:
    train(full_recipe(learn="all"), out=tmp_path / "run", data_dir=None, argv=["train"])
    folder = tmp_path / "run" / "adapter"
    notes = json.loads((folder / "tidar.json").read_text())
    assert 0.01 < notes["outside_share"] < 0.9
    card = (folder / "README.md").read_text()
    assert f"{notes['outside_share']:.1%} of what moved" in card and "norms and biases" in card
    with pytest.raises(UserError, match="'some'"):
        train(full_recipe(learn="some"), out=tmp_path / "no", data_dir=None, argv=["train"])


@pytest.mark.usefixtures("unfiltered")
def test_a_stopped_full_fine_tune_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the second step: the adapter of two steps lies there, the third one comes."""
    recipe = full_recipe()
    whole = train(recipe, out=tmp_path / "whole", data_dir=None, argv=["train"])
    step, out = Trainer.step, tmp_path / "broken"

    def stopped(self: Trainer) -> StepLog:
        if self.progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Trainer, "step", stopped)
    first = train(recipe, out=out, data_dir=None, argv=["train"])
    assert (first.finished, first.steps, whole.steps) == (False, 2, 3)
    assert json.loads((out / "adapter" / "tidar.json").read_text())["steps"] == 2
    monkeypatch.undo()
    assert train(recipe, out=out, data_dir=None, argv=["train"]).finished
    weights = [tmp_path / n / "adapter" / "adapter_model.safetensors" for n in ("whole", "broken")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_options_reach_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Recipe] = []

    def note(recipe: Recipe, **_: Any) -> Outcome:
        seen.append(recipe)
        return Outcome(folder=tmp_path, steps=0, finished=True)

    monkeypatch.setattr("bench.train.train", note)
    words = ["train", "--recipe", "smollm2-tidar"]
    more = ["--no-random-offset", "--alpha", "0.5", "--masking", "random", "--compile"]
    assert (
        cli.main([*words, *more]) == cli.main(words) == cli.main([*words, "--random-offset"]) == 0
    )
    own = get_recipe("smollm2-tidar").objective
    changes = {"random_offset": False, "alpha": 0.5, "masking": "random"}
    assert seen[0].objective == {**own, **changes} and seen[0].compiled
    assert seen[1] == get_recipe("smollm2-tidar")
    assert seen[2].objective == {**own, "random_offset": True}


def test_distilled_answers_are_the_models_own_and_are_kept(tmp_path: Path) -> None:
    from baselines.autoregressive import build
    from bench.corpora import mixture
    from bench.distil import ANSWERS_FILE, distilled
    from tidar_ref.decoding import generate

    recipe = dataclasses.replace(
        rehearsal(get_recipe("smollm2-tidar-own")), mixture=(Source(name="templates", count=5),)
    )
    assert get_recipe("smollm2-tidar-own").distil and recipe.distil == ("templates",)
    loaded = load("random:tiny", prepare=False)
    eos = loaded.source.eos_token_ids
    corpus = mixture.build(
        recipe, loaded.tokenizer, eos_id=eos[0], data_dir=None, clean=lambda p: (list(p), {})
    )
    made = distilled(corpus, loaded, recipe, tmp_path)
    decoder = build(loaded.model)
    for before, after in zip(corpus.examples, made.examples, strict=True):
        assert before.prompt == after.prompt
        wanted = generate(
            decoder, [before.prompt], max_new_tokens=recipe.answer_tokens, eos_ids=frozenset(eos)
        )[0]
        assert after.response == wanted.token_ids
    path = tmp_path / ANSWERS_FILE
    text = path.read_text()
    path.write_text(text[: text.rfind("\n", 0, -1) + 5])  # a kill in the middle of the last line
    again = distilled(corpus, loaded, recipe, tmp_path)
    assert again.examples == made.examples
    assert len(path.read_text().splitlines()) == 5
    untouched = dataclasses.replace(recipe, distil=("gsm8k-chains",))
    assert distilled(corpus, loaded, untouched, tmp_path / "other").examples == corpus.examples


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--recipe", "smollm3"], "smollm3"),
        (["--recipe", "smollm2-tidar", "--minutes", "0"], "--minutes 0"),
        (["--recipe", "smollm2-tidar", "--alpha", "-1", "--rehearse"], "alpha is -1"),
        (["--recipe", "smollm2-tidar", "--block-lens", "1", "--rehearse"], "(1,)"),
        (["--recipe", "smollm2-eagle3", "--compile", "--rehearse"], "--compile"),
        (["--recipe", "smollm2-tidar", "--weights", "random:tiny"], "gsm8k"),
        (["--recipe", "smollm2-tidar", "--weights", "random:tiny+nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TIDAR_BENCH_DATA", raising=False)
    assert cli.main(["train", *words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and named in error


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        rehearsal(get_recipe("smollm2-tidar")),
        train=dict(steps=1, batch=2, micro_batch=2),
        mixture=(Source(name="templates", count=4),),
    )
    train(recipe, out=tmp_path / "run", data_dir=None, argv=[])
    folder = tmp_path / "run" / "adapter"
    notes = json.loads((folder / "tidar.json").read_text())
    (folder / "tidar.json").write_text(json.dumps({**notes, "base_sha256": "0" * 64}))
    with pytest.raises(UserError, match="was trained on weights"):
        load(f"random:tiny+{folder}")


@pytest.mark.usefixtures("unfiltered")
def test_an_adapter_brings_those_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(
        rehearsal(get_recipe("smollm2-tidar")),
        train=dict(steps=2, batch=2, micro_batch=2, lr=1e-2),
        mixture=(Source(name="templates", count=4),),
    )
    shelf = tmp_path / "adapters"
    monkeypatch.setattr("tidar_ref.checkpoint.ADAPTERS", shelf)
    spec = "random:tiny"
    for name in ("first", "second"):
        train(dataclasses.replace(recipe, weights=spec), out=tmp_path, data_dir=None, argv=[])
        shutil.move(tmp_path / "adapter", shelf / name)
        (tmp_path / "state.pt").unlink()
        spec += f"+{name}"
    alone, stacked = load("random:tiny+second"), load("random:tiny+first+second")
    assert alone.source == stacked.source and len(alone.source.adapters) == 2
    for one, other in zip(alone.model.parameters(), stacked.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match=r"first was trained on top of the base alone; .* second"):
        load("random:tiny+second+first")
    shutil.move(shelf / "first", tmp_path / "first")
    with pytest.raises(UserError, match=r"second was trained on top of first sha256"):
        load("random:tiny+second")
    assert load(f"random:tiny+{tmp_path / 'first'}+second").source.adapters == alone.source.adapters
