"""`rheostat` with vLLM's V2 model runner on a CPU: Triton interprets its kernels.

A process that is spawned imports the main module again, so all this holds in the engine as well.
"""

import importlib
import os
from types import SimpleNamespace
from typing import Any

# Triton and vLLM read them when they are imported.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
backends: Any = importlib.import_module("triton.backends").backends
# vLLM asks for Triton's compiler for CPUs, which no package has. The interpreter needs none.
backends["cpu"] = SimpleNamespace(compiler=None, driver=SimpleNamespace(is_active=lambda: True))
builder: Any = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder


def with_boolean_mask(access: Any, place: int) -> Any:
    """Wraps a masked access of the interpreter, which takes no mask of integers as a GPU does."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        mask = arguments[place]
        mask.data = mask.data.astype(bool)
        return access(*arguments, **options)

    return wrapped


builder.create_masked_load = with_boolean_mask(builder.create_masked_load, 2)
builder.create_masked_store = with_boolean_mask(builder.create_masked_store, 3)
rheostat: Any = importlib.import_module("rheostat")

if __name__ == "__main__":
    rheostat.main()
