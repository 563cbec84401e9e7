"""One file per mechanism. Importing this package registers all of them; nothing else imports methods by name."""

from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(m.name for m in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
