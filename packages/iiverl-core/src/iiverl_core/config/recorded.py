"""Load a configuration that a run recorded, perhaps with other values for some keys."""

from collections.abc import Iterable, Mapping
from typing import Any

from iiverl_core.config.defaults import DERIVED, backend_defaults
from iiverl_core.config.interpolation import Interpolation, UnresolvedError, nested
from iiverl_core.config.loading import Loaded, load_values
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.section import BACKEND
from iiverl_core.registry import BACKENDS


def load_recorded(values: Mapping[str, Any], file: str, overrides: Iterable[str] = ()) -> Loaded:
    """Load what `Config.model_dump(mode="json")` gave, with overrides.

    It has a value for every key. Those that the defaults give are left to the defaults, so that what follows or is derived
    from an overridden key does so here too. Keys that this version does not know are skipped.

    Args:
        file: where the values were recorded, for messages.
    """
    recorded = dict(_recorded(values))
    info = BACKENDS.get(recorded.get(BACKEND, ""))
    defaults = {path: key.default for path, key in keys().items()} | (backend_defaults(info) if info else {})
    derived = {each.key for each in DERIVED}
    kept = {*derived, BACKEND}  # other defaults depend on the backend
    own = {path: x for path, x in recorded.items() if path in kept or not _is(x, defaults[path], recorded)}
    base = load_values(nested({path: x for path, x in own.items() if path not in derived}), file)
    found = dict(_recorded(base.config.model_dump(mode="json")))
    own = {path: x for path, x in own.items() if path not in derived or x != found[path]}
    return load_values(nested(own), file, overrides)


def _recorded(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield each known key that has a value, and the value."""
    for path in keys():
        section: Any = values
        for name in path.split("."):
            if not isinstance(section, Mapping) or name not in section:
                break
            section = section[name]
        else:
            yield path, section


def _is(value: Any, default: Any, recorded: Mapping[str, Any]) -> bool:
    """Return whether a default gives a value, in which references are those to recorded values."""
    try:
        given = Interpolation({**recorded, "": default}).get("")
    except UnresolvedError:
        return False
    return value == (list(given) if isinstance(given, tuple) else given)
