"""varcas finds the best way to serve a language model on the GPUs you have.

import varcas

experiment = varcas.load_experiment("experiments/quickstart.yaml")
answer = varcas.sweep(experiment)
print(answer.headline, answer.deploy)
rows = varcas.Results("results").trials("quickstart")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Results", "__version__", "load_experiment", "sweep"]

if TYPE_CHECKING:
    from varcas.experiment import load_experiment
    from varcas.results import Results
    from varcas.sweeper import sweep


def __getattr__(name: str) -> Any:
    """Imports on first use: `import varcas` alone loads no heavy library (PEP 562)."""
    import importlib

    homes = {"load_experiment": "varcas.experiment", "Results": "varcas.results", "sweep": "varcas.sweeper"}
    if name not in homes:
        raise AttributeError(f"module 'varcas' has no attribute {name!r}")
    found = getattr(importlib.import_module(homes[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """What `__getattr__` would import stands there too."""
    return sorted({*globals(), *__all__})
