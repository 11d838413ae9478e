"""Decoders by name: a file `baselines/<name>.py` with `build` is a decoder, nothing to register."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tidar_ref.errors import UserError

if TYPE_CHECKING:
    from bench.profiles import DecoderSpec

# The two whose names differ from their files: the paper's word, and the method itself.
MODULES = {"ar": "baselines.autoregressive", "tidar": "tidar_ref.tidar"}


def decoder_names() -> tuple[str, ...]:
    """Every name --decoders accepts, without importing any of them."""
    import baselines

    taken = {module.rpartition(".")[2] for module in MODULES.values()} | {"__init__"}
    folder = Path(baselines.__file__).parent
    files = sorted(path.stem for path in folder.glob("*.py") if path.stem not in taken)
    return (*MODULES, *(name for name in files if not name.startswith("_")))


def decoder_module(name: str) -> ModuleType:
    """The module that builds this decoder; UserError lists the known names."""
    if name not in decoder_names():
        raise UserError(f"unknown decoder {name!r}; choose one of {', '.join(decoder_names())}")
    return importlib.import_module(MODULES.get(name, f"baselines.{name}"))


def build_decoder(spec: DecoderSpec, model: Any, *, mask_token_id: int | None) -> Any:
    """A Decoder on `model`, which has the spec's own weights if it names some.

    UserError for an unknown name, parameter or parameter value. A value that is not a number
    reaches only parameters the module names in TEXT_PARAMETERS.
    """
    module = decoder_module(spec.name)
    takes_text = getattr(module, "TEXT_PARAMETERS", ())
    for key, value in spec.own_params.items():
        if isinstance(value, str) and key not in takes_text:
            raise UserError(f"decoder parameter {key}={value!r} is not a number; give a number")
    return module.build(model, mask_token_id=mask_token_id, **spec.own_params)


def check_decoder(spec: DecoderSpec, model: Any, *, mask_token_id: int | None) -> None:
    """UserError for what no model could run, without the weights the decoder is for.

    Parameters that fit one target only are replaced by the module's STAND_INS.
    """
    stand_ins = getattr(decoder_module(spec.name), "STAND_INS", {})
    params = tuple((key, stand_ins.get(key, value)) for key, value in spec.params)
    build_decoder(replace(spec, params=params), model, mask_token_id=mask_token_id)
