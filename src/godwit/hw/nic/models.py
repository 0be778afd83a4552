"""The NIC models there are. A new one is a file with a class, and a line in the table here."""

from __future__ import annotations

from collections.abc import Callable

from godwit.errors import ConfigError
from godwit.hw.nic.e1000.state import E1000State
from godwit.hw.virtio.net.nic import VirtioNic, VirtioNicState
from godwit.spec.config import NicConfig

from .nic import Nic, Parts


def _e1000(config: NicConfig, parts: Parts) -> Nic:
    from godwit.hw.nic.e1000.nic import E1000  # a guest without one does not wait for its import

    return E1000(config, parts)


MODELS: dict[str, Callable[[NicConfig, Parts], Nic]] = {
    VirtioNic.model: VirtioNic,
    "e1000": _e1000,
}

#: The saved states of all models; each is tagged with its model's name.
NicState = VirtioNicState | E1000State


def make(config: NicConfig, parts: Parts) -> Nic:
    """A NIC of the configured model.

    Raises:
        ConfigError: there is no such model; the message lists them.
        HostError: its tap or backend is missing.
    """
    try:
        model = MODELS[config.model]
    except KeyError:
        known = ", ".join(MODELS)
        raise ConfigError(f"NIC model '{config.model}' is unknown; there is {known}") from None
    return model(config, parts)
