"""One error tree of the lab's own.

::

    LabError               the message says what is missing or broken, and how to get it
    ├── AgentError         the guest's agent refused, or did not answer in time
    ├── LabCrashed         the emulated host died: the lab's failure, not the command's
    └── LabTimeout         the command did not end within its time limit

What a VM's client raises (``godwit.client.errors``) passes through as it is.
"""

from __future__ import annotations


class LabError(Exception):
    """Base of every error that the lab raises on purpose."""

    #: The exit status of ``python -m lab`` when this ends it.
    exit_code = 1


class AgentError(LabError):
    """The guest's agent refused a request, or did not answer in time."""


class LabCrashed(LabError):
    """The emulated host died without a result: the lab's failure, not the command's."""

    exit_code = 75  # EX_TEMPFAIL (sysexits.h)


class LabTimeout(LabError):
    """The command did not end within its time limit; it and the lab were ended."""
