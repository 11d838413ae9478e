"""The lossless audit: silent on equal outputs, `bug` for planted bugs, `tie-level` for ties."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import made_records
import pytest
import test_house
import tiny
import torch

from baselines import autoregressive
from bench import audit, cli
from bench.records import ids_sha, to_line
from bench.store import read_record
from bench.ties import Judge
from tidar_ref import tidar
from tidar_ref.decoding import generate
from tidar_ref.errors import UserError

LABEL = "tidar:block_len=4,beta=1"
Outputs = list[tuple[int, ...]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write(folder: Path, outputs: dict[str, Outputs], dtype: str = "float32") -> Path:
    """A record folder holding these outputs, three tokens a step."""
    problems = tuple(str(index) for index in range(len(outputs["ar"])))
    header = made_records.header(problems={"t": problems}, dtype=dtype)
    rows, steps = [], []
    for label, texts in outputs.items():
        for problem, text in zip(problems, texts, strict=True):
            row = made_records.row(
                decoder=label,
                problem=problem,
                output_tokens=len(text),
                token_ids_sha=ids_sha(text),
            )
            rows.append(row)
            past = (*text, 1, 2)  # committed past the cut
            parts = [past[i : i + 3] for i in range(0, len(past), 3)]
            ledger = made_records.steps_of(row, len(parts))
            steps += [replace(s, committed=p) for s, p in zip(ledger, parts, strict=True)]
    folder.mkdir(exist_ok=True)
    (folder / "header.json").write_text(json.dumps(asdict(header)))
    (folder / "measurements.jsonl").write_text("".join(map(to_line, rows)))
    (folder / "steps.jsonl").write_text("".join(map(to_line, steps)))
    return folder


def decoded(
    model: tiny.Tiny, prompts: list[list[int]], dtype: torch.dtype, *, leak: bool = False
) -> dict[str, Outputs]:
    """Outputs of `ar` and `tidar`, 20 tokens each; `leak` breaks tidar's mask."""
    backbone = tiny.model_of(model.config, model.state, dtype).to(dtype)
    dense = tidar.build(backbone, mask_token_id=tiny.MASK, block_len=4)
    if leak:
        dense.new_mask[0, 1] = True
    found = {}
    for label, decoder in (("ar", autoregressive.build(backbone)), (LABEL, dense)):
        found[label] = [generate(decoder, [p], max_new_tokens=20)[0].token_ids for p in prompts]
    return found


def judged(
    folder: Path, model: tiny.Tiny, prompts: list[list[int]], dtype: str = "float32"
) -> audit.Audit:
    record = read_record(folder)
    backbone = tiny.model_of(model.config, model.state).to(getattr(torch, dtype))
    by_id = {("t", str(index)): prompt for index, prompt in enumerate(prompts)}
    judge = Judge(backbone, dtype)
    found = list(audit.judged(folder, record, by_id, judge))
    return audit.summed(record, judge.wider, found)


def test_equal_outputs_pass(tmp_path: Path) -> None:
    model, prompts = tiny.trained_tiny(), tiny.prompts(4)
    folder = write(tmp_path / "r", decoded(model, prompts, torch.float32))
    assert audit.outputs(folder, read_record(folder))[LABEL, "t", "0", 0]
    made = judged(folder, model, prompts)
    assert made.divergences == () and made.bugs == 0
    assert made.decoders[0].compared == 4 and made.wider == "float64"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("position", [0, 7, 19])
def test_a_planted_bug_is_a_bug(tmp_path: Path, dtype: str, position: int) -> None:
    """One token of one output is the least likely one; what follows does not matter."""
    model, prompts = tiny.trained_tiny(), tiny.prompts(4)
    outputs = decoded(model, prompts, getattr(torch, dtype))
    outputs[LABEL] = list(outputs["ar"])
    text = outputs["ar"][2]
    logits = tiny.oracles.causal_logits(model.state, model.config, [*prompts[2], *text[:position]])[
        -1
    ]
    wrong = int(logits.argmin())
    outputs[LABEL][2] = (*text[:position], wrong, *text[position + 1 :])
    made = judged(write(tmp_path / "r", outputs, dtype), model, prompts, dtype)
    [found] = made.divergences
    assert (found.problem, found.position) == ("2", position)
    assert (found.ar_token, found.token, found.verdict) == (text[position], wrong, "bug")
    assert found.gap == pytest.approx(float(logits.max() - logits.min()), rel=0.02)
    assert found.gap > found.tolerance > 0
    assert (made.decoders[0].diverging, made.decoders[0].bugs, made.bugs) == (1, 1, 1)


def test_a_planted_tie_is_tie_level(tmp_path: Path) -> None:
    """Two tokens share one row of the head: which comes out is nobody's fault."""
    plain, prompts = tiny.random_tiny("llama"), tiny.prompts(4)
    state = {name: value.clone() for name, value in plain.state.items()}
    text = plain.greedy(prompts[1], 20)
    chosen, twin = text[5], (text[5] + 1) % tiny.MASK
    state["lm_head.weight"][twin] = state["lm_head.weight"][chosen]
    model = tiny.Tiny(plain.config, state)
    outputs = decoded(model, prompts, torch.float32)
    at = next(i for i, token in enumerate(outputs["ar"][1]) if token in (chosen, twin))
    other = {chosen: twin, twin: chosen}[outputs["ar"][1][at]]
    outputs[LABEL] = list(outputs["ar"])
    outputs[LABEL][1] = (*outputs["ar"][1][:at], other, *outputs["ar"][1][at + 1 :])
    made = judged(write(tmp_path / "r", outputs), model, prompts)
    [found] = made.divergences
    assert (found.position, found.verdict) == (at, "tie-level")
    assert found.gap == found.top_two == 0.0 and made.bugs == 0


def test_what_bfloat16_does_by_itself_is_tie_level(tmp_path: Path) -> None:
    """Real divergences of a right decoder: all near-ties; of a leaking one: bugs among them."""
    model, prompts = tiny.random_tiny("qwen3"), tiny.prompts(30, seed=9)
    outputs = decoded(model, prompts, torch.bfloat16)
    made = judged(write(tmp_path / "r", outputs, "bfloat16"), model, prompts, "bfloat16")
    assert made.divergences, "no two outputs differ: hollow proof"
    assert {d.verdict for d in made.divergences} == {"tie-level"}
    assert len(made.divergences) < len(prompts) / 4

    prompts = prompts[:12]
    outputs = decoded(model, prompts, torch.bfloat16, leak=True)
    made = judged(write(tmp_path / "s", outputs, "bfloat16"), model, prompts, "bfloat16")
    assert made.bugs >= 5


def test_an_attached_mask_adapter_is_no_hindrance() -> None:
    """It acts on mask rows; the judge evaluates text, in a dtype the adapter does not have."""
    model = tiny.random_tiny("llama")
    plain, adapted = (tiny.model_of(model.config, model.state) for _ in range(2))
    factors = {
        f"layers.{index}.{name}": (
            torch.ones(2, getattr(layer, name).in_features),
            torch.ones(getattr(layer, name).out_features, 2),
        )
        for index, layer in enumerate(adapted.layers)
        for name in ("qkv", "o", "gate_up", "down")
    }
    row = torch.ones(model.config.hidden_size)
    adapted.attach_mask_adapter(factors, 1.0, token_id=tiny.MASK, embedding=row)
    text = [3, 1, 4, 1, 5]
    assert Judge(adapted, "float32").gaps(text, [2, 7]) == pytest.approx(
        Judge(plain, "float32").gaps(text, [2, 7]), abs=1e-5
    )


def test_an_output_that_ends_elsewhere_is_a_bug(tmp_path: Path) -> None:
    model, prompts = tiny.trained_tiny(), tiny.prompts(2)
    outputs = decoded(model, prompts, torch.float32)
    outputs[LABEL][0] = outputs[LABEL][0][:9]
    [found] = judged(write(tmp_path / "r", outputs), model, prompts).divergences
    assert (found.position, found.token, found.gap, found.verdict) == (9, None, None, "bug")


def test_damaged_steps_are_refused(tmp_path: Path) -> None:
    outputs = {"ar": [(1, 2, 3, 4)], LABEL: [(1, 2, 3, 4)]}
    folder = write(tmp_path / "r", outputs)
    text = (folder / "steps.jsonl").read_text().replace('"committed": [1, 2, 3]', '"committed": []')
    (folder / "steps.jsonl").write_text(text)
    with pytest.raises(UserError, match="do not make the tokens"):
        audit.outputs(folder, read_record(folder))


def test_nothing_to_audit_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", {"ar": [(1,)], LABEL: [(1,)]})
    header = json.loads((folder / "header.json").read_text())
    header["decoders"][LABEL]["lossless"] = False
    (folder / "header.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match="nothing to audit"):
        audit.audit(folder)


def test_first_difference() -> None:
    assert audit.first_difference((1, 2), (1, 2)) is None
    assert audit.first_difference((1, 2, 3), (1, 4, 3)) == 1
    assert audit.first_difference((1, 2), (1, 2, 3)) == 2
    assert audit.first_difference((), ()) is None


def test_no_torch_to_read() -> None:
    _, foreign = test_house.reached("bench.audit")
    assert not foreign & test_house.HEAVY


# --- the verb ----------------------------------------------------------------------------------


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real run passes; with one token changed in its files the verb finds it and exits 1."""
    folder = tmp_path / "rec"
    words = ["run", "--profile", "smoke", "--tasks", "own_code", "--limit", "2", "--out"]
    assert cli.main([*words, str(folder), "--max-new-tokens", "8"]) == 0
    capsys.readouterr()
    assert cli.main(["audit", str(folder)]) == 0
    assert f"| {LABEL} | 2 | 0 | 0 % | 0 | 0 |" in capsys.readouterr().out
    assert json.loads((folder / "audit.json").read_text())["divergences"] == []

    record = read_record(folder)
    key = next(row.key for row in record.measurements if row.decoder == LABEL)
    tokens = list(audit.outputs(folder, record)[key])
    old_sha = ids_sha(tokens)
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    first = next(s for s in steps if (s["decoder"], s["problem"], s["index"]) == (LABEL, key[2], 0))
    tokens[0] = (tokens[0] + 100) % 256
    first["committed"][0] = tokens[0]
    (folder / "steps.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    rows = (folder / "measurements.jsonl").read_text().splitlines(keepends=True)
    rows = [r.replace(old_sha, ids_sha(tokens)) if LABEL in r and key[2] in r else r for r in rows]
    (folder / "measurements.jsonl").write_text("".join(rows))
    assert cli.main(["audit", str(folder), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert f"| {LABEL} | 2 | 1 | 50 % | 0 | 1 |" in out and "| bug |" in out
    assert json.loads((folder / "audit.json").read_text())["decoders"][0]["bugs"] == 1

    assert cli.main(["audit", str(folder), "--weights", "random:tiny-qwen2"]) == 2
    assert "name the record's weights with --weights" in capsys.readouterr().err
