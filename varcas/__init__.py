"""varcas finds the best way to serve a language model on the GPUs you have.

import varcas

experiment = varcas.load_experiment("experiments/quickstart.yaml")
answer = varcas.sweep(experiment)
print(answer.headline, answer.deploy)
rows = varcas.Results("results").trials("quickstart")
limits = varcas.roofline_report(experiment, ["T4", "L4"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Results", "__version__", "load_experiment", "roofline_report", "run_phases", "sweep"]

if TYPE_CHECKING:
    from varcas.experiment import load_experiment
    from varcas.journey import run_phases
    from varcas.limits import roofline_report
    from varcas.results import Results
    from varcas.sweeper import sweep


def __getattr__(name: str) -> Any:
    """Imports on first use: `import varcas` alone loads no heavy library (PEP 562)."""
    import importlib

    homes = {
        "load_experiment": "varcas.experiment",
        "Results": "varcas.results",
        "roofline_report": "varcas.limits",
        "run_phases": "varcas.journey",
        "sweep": "varcas.sweeper",
    }
    if name not in homes:
        raise AttributeError(f"module 'varcas' has no attribute {name!r}")
    found = getattr(importlib.import_module(homes[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """What `__getattr__` would import stands there too."""
    return sorted({*globals(), *__all__})
