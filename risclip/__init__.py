"""RISCLIP: a frozen CLIP, extended to find the thing that a phrase means.

The names below are loaded when they are first asked for, so that `import risclip` is light."""
# The one file of the package that no notebook writes; nbdev only renews its version.
__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from risclip.clip import load_clip
    from risclip.model import RISCLIP
    from risclip.predictor import Predictor
    from risclip.refer import Refer
    from risclip.settings import settings_of
    from risclip.training import train

__all__ = ['RISCLIP', 'Predictor', 'Refer', 'load_clip', 'settings_of', 'train']

_MODULES = dict(RISCLIP='model', Predictor='predictor', Refer='refer', load_clip='clip',
                settings_of='settings', train='training')


def __getattr__(name: str):
    "A name of `__all__`, from its module (PEP 562)."
    if name not in _MODULES: raise AttributeError(f"module 'risclip' has no attribute {name!r}")
    value = getattr(import_module(f'risclip.{_MODULES[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
