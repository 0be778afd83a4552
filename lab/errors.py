"""The error tree of the lab alone.

::

    LabError               the message names what is missing or broken, and the remedy
    ├── AgentError         the guest's agent refused, or did not answer in time
    ├── LabCrashed         the emulated host died: the lab's failure, not the command's
    └── LabTimeout         the command did not exit within its time limit

Errors of a VM's client (``godwit.client.errors``) pass through unchanged.
"""

from __future__ import annotations


class LabError(Exception):
    """Base of every error that the lab raises on purpose."""

    #: The exit status of ``python -m lab`` after this error.
    exit_code = 1


class AgentError(LabError):
    """The guest's agent refused a request, or did not answer in time."""


class LabCrashed(LabError):
    """The emulated host died without a result: the lab's failure, not the command's."""

    exit_code = 75  # EX_TEMPFAIL (sysexits.h)


class LabTimeout(LabError):
    """The command did not exit within its time limit, and was killed with the lab."""
