"""The check before a VM is started: can this host run one?"""

from __future__ import annotations

from godwit.host.kvm.probe import why_unusable

__all__ = ["why_unusable"]
