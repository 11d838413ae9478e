"""The verb `train`: recipes end to end on a tiny model, cards, resume, distillation, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from baselines import eagle3
from bench import cli
from bench.recipes import RECIPES, Source, get_recipe
from bench.train import rehearsal, train
from tidar_ref.checkpoint import load
from tidar_ref.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


FAST = ("smollm2-tidar", "smollm2-tidar-gated", "smollm2-eagle3", "h100-qwen0.5b-k8")


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
    if small.adapter is None and small.head is None:
        return
    folder = tmp_path / "run" / ("adapter" if small.head is None else "head")
    card = (folder / "README.md").read_text()
    assert "2 steps" in card and "templates" in card and (folder / "loss.png").stat().st_size > 1000
    notes = json.loads((folder / "tidar.json").read_text())
    assert notes["steps"] == 2 and notes["recipe"]["name"] == small.name
    assert notes["corpus"]["sources"]["templates"]["hygiene"]["checked"]["own_math"]
    if small.head is not None:
        assert "Draft head" in card and log[1]["diffusion_loss"] < 1.1 * log[0]["diffusion_loss"]
        drafter = eagle3.build(load("random:tiny").model, head=str(folder)).drafter
        assert drafter.sha256 and drafter.trained and len(drafter.target_ids) == notes["draft_vocab"]
        return
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


def test_distilled_answers_are_the_models_own_and_are_kept(tmp_path: Path) -> None:
    from baselines.autoregressive import build
    from bench.corpora import mixture
    from bench.distil import ANSWERS_FILE, distilled
    from tidar_ref.decoding import generate

    recipe = dataclasses.replace(
        rehearsal(get_recipe("smollm2-tidar-gated")), mixture=(Source(name="templates", count=5),)
    )
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


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--recipe", "smollm3"], "smollm3"),
        (["--recipe", "smollm2-tidar", "--minutes", "0"], "--minutes 0"),
        (["--recipe", "smollm2-tidar", "--alpha", "-1", "--rehearse"], "alpha is -1"),
        (["--recipe", "smollm2-tidar", "--block-lens", "1", "--rehearse"], "(1,)"),
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
