"""`python -m bench regress`, measuring half: counters and paired timings of every decoder.

A tiny float32 network with seeded weights and fixed prompts makes every count repeatable. A timing
is one turn ABABAB of AR and one decoder; the fastest of each three counts, because neighbours only
ever add time. `bench.compare.interleaved` starts this file as a program too, with another
checkout's packages on the path: it then imports nothing that an older checkout lacks, and both
sides are measured by the same code. Requests and answers are JSON lines on stdin and stdout.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidar_ref.errors import UserError

if TYPE_CHECKING:
    from tidar_ref.decoding import Decoder, GenerationTrace
    from tidar_ref.model import Transformer

REFERENCE = "ar"
# Beside every registered decoder with its defaults: other draft lengths, mixing, chosen outcomes.
VARIANTS = (
    "tidar:block_len=4,beta=1",
    "tidar:block_len=8,beta=0.5",
    "tidar:block_len=8,outcomes=1-4-8",
)
# Chosen so that every acceptance length from 1 to K occurs: see the histogram test.
VOCAB, SEED, WEIGHT_SCALE = 32, 2, 5.0
PROMPTS: Mapping[str, tuple[int, ...]] = {
    "rising": (1, 2, 3, 4, 5),
    "constant": (7, 7, 7),
    "alternating": (3, 9, 3, 9, 3, 9),
}
COUNTED_TOKENS = 48  # new tokens per prompt when counting
TIMED_TOKENS = 16  # new tokens per timed generation: some 15 ms, shorter than a scheduler's storm
TIMED_PROMPT = "rising"
REPEATS = 3  # AR and the decoder alternate this often in one turn


def tiny_model(device: str = "cpu") -> Transformer:
    """Two layers, 32 tokens, float32, random weights large enough for a varied text."""
    import torch

    from tidar_ref.config import ModelConfig
    from tidar_ref.model import Transformer

    config = ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=100000.0,
        norm_eps=1e-5,
        qkv_bias=False,
        qk_norm=False,
        tied_embeddings=False,
        max_position=2048,
    )
    model = Transformer(config).init_random(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(WEIGHT_SCALE)
    return model.to(device).eval().prepare()


class Measurer:
    """One checkout's decoders on the tiny model, ready to be counted and timed.

    words: decoders as --decoders takes them; None for all registered ones and VARIANTS. What cannot
    be built is kept in `not_measured` with its reason, unless it was asked for by name.
    """

    def __init__(
        self, *, device: str = "cpu", threads: int = 1, words: Sequence[str] | None = None
    ) -> None:
        import torch

        from bench.profiles import parse_decoders
        from bench.registry import build_decoder, decoder_names

        torch.set_num_threads(threads)
        self.device, self.threads = device, threads
        model = tiny_model(device)
        chosen = parse_decoders([*words] if words else [*decoder_names(), *VARIANTS])
        self.decoders: dict[str, Decoder] = {}
        self.not_measured: dict[str, str] = {}
        for spec in (*parse_decoders([REFERENCE]), *chosen):
            if spec.label in self.decoders:
                continue
            try:
                decoder = build_decoder(spec, model, mask_token_id=VOCAB - 1)
            except UserError as error:
                if words:
                    raise
                self.not_measured[spec.label] = str(error)
            else:
                self.decoders[spec.label] = decoder

    @property
    def labels(self) -> list[str]:
        """Decoders to time against AR."""
        return [label for label in self.decoders if label != REFERENCE]

    def facts(self) -> dict[str, Any]:
        """What a record says about this checkout and machine; `root` is for checking only."""
        import tidar_ref
        from bench import environment
        from bench.metrics import DEFINITIONS_VERSION

        root = Path(tidar_ref.__file__).resolve().parents[1]
        commit, dirty = environment.git_state(root)
        prompts = json.dumps({name: list(ids) for name, ids in PROMPTS.items()})
        return {
            "root": str(root),
            "definitions": DEFINITIONS_VERSION,
            "commit": commit,
            "dirty": dirty,
            "environment": environment.describe(self.device),
            "settings": {
                "model": f"llama 2x64, vocabulary {VOCAB}, weights x{WEIGHT_SCALE:g}",
                "seed": SEED,
                "dtype": "float32",
                "device": self.device.partition(":")[0],
                "prompts_sha": hashlib.sha256(prompts.encode()).hexdigest()[:16],
                "counted_tokens": COUNTED_TOKENS,
                "timed_tokens": TIMED_TOKENS,
                "timed_prompt": TIMED_PROMPT,
                "repeats": REPEATS,
            },
            "decoders": {
                label: {"name": decoder.name, "params": dict(decoder.params)}
                for label, decoder in self.decoders.items()
            },
            "not_measured": dict(self.not_measured),
        }

    def counters(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Decoder -> prompt -> counts; nothing in it depends on a clock."""
        from tidar_ref.decoding import generate

        return {
            label: {
                name: count(generate(decoder, [prompt], max_new_tokens=COUNTED_TOKENS)[0])
                for name, prompt in PROMPTS.items()
            }
            for label, decoder in self.decoders.items()
        }

    def turn(self, label: str, *, ar_first: bool) -> dict[str, list[float]]:
        """Decode seconds of AR and of one decoder, REPEATS of each, alternating."""
        from tidar_ref.decoding import generate

        seconds: dict[str, list[float]] = {REFERENCE: [], label: []}
        order = (REFERENCE, label) if ar_first else (label, REFERENCE)
        for name in order * REPEATS:
            [trace] = generate(
                self.decoders[name], [PROMPTS[TIMED_PROMPT]], max_new_tokens=TIMED_TOKENS
            )
            seconds[name].append(round(trace.decode_s, 7))
        return {"ar_s": seconds[REFERENCE], "own_s": seconds[label]}


def count(trace: GenerationTrace) -> dict[str, Any]:
    """Every count of one generation that must not change by itself."""
    from bench.records import ids_sha

    ledger = (trace.prefill, *trace.steps)
    committed = Counter(len(step.committed[0]) for step in trace.steps)
    widths = Counter(step.query_width for step in trace.steps)
    forwards = sum(step.target_forwards for step in trace.steps)
    # As in docs/metrics.md: a denoiser's prefill may commit no token, or several.
    decode_tokens = max(0, len(trace.token_ids) - len(trace.prefill.committed[0]))
    return {
        "output_tokens": len(trace.token_ids),
        "decode_tokens": decode_tokens,
        "tokens_generated": trace.tokens_generated,
        "token_ids_sha": ids_sha(trace.token_ids),
        "finish": trace.finish,
        "prefill_forwards": trace.prefill.target_forwards,
        "prefill_width": trace.prefill.query_width,
        "decode_forwards": forwards,
        "draft_forwards": sum(step.draft_forwards for step in ledger),
        "t_per_nfe": decode_tokens / forwards if forwards else None,
        "drafted": sum(step.drafted[0] for step in trace.steps),
        "accepted": sum(step.accepted[0] for step in trace.steps),
        "acceptance_histogram": [committed[r] for r in range(max(committed, default=-1) + 1)],
        "query_widths": {str(width): widths[width] for width in sorted(widths)},
        "kv_len_sha": ids_sha([step.kv_len[0] for step in trace.steps]),
    }


def answer(measurer: Measurer, request: Mapping[str, Any]) -> Any:
    """What `Measurer` says to one request: facts, counters, or a turn."""
    if request["do"] == "turn":
        return measurer.turn(request["label"], ar_first=request["ar_first"])
    return {"facts": measurer.facts, "counters": measurer.counters}[request["do"]]()


def _first(settings: Mapping[str, Any]) -> Measurer:
    """The measurer; UserError in one sentence where an older checkout lacks what it is made of."""
    try:
        return Measurer(**settings)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(
            f"this checkout cannot be measured by the gate as it is now ({error}); name a later "
            "commit as base"
        ) from error


def serve() -> None:
    """Answer requests until stdin ends; the first one holds the settings."""
    replies, sys.stdout = sys.stdout, sys.stderr  # a stray print must not break the protocol
    measurer: Measurer | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if measurer is None:
                measurer = _first(request)
                result: Any = measurer.labels
            else:
                result = answer(measurer, request)
            reply = {"result": result}
        except UserError as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), file=replies, flush=True)


def _only_the_path_provides() -> None:
    """Drop the finders of editable installs: they would fill a base's gaps with head's modules."""
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if not getattr(finder, "__module__", "").startswith("__editable__")
    ]


if __name__ == "__main__":
    _only_the_path_provides()
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches every process; one answers it
        serve()
