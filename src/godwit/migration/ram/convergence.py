"""The judge of the pre-copy's convergence: pure, fed with the numbers of each round.

A round sends the pages that got dirty during the one before. If a round takes so long that as many
get dirty again, rounds do not help: the guest writes faster than the connection takes. Then the
vCPUs are throttled, more after each such round, or the migration ends as the operator chose. A
change of the throttle is judged by the first round that ran wholly under the new throttle.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol

from godwit.hw.memory import PAGE
from godwit.spec.parameters import MOST_THROTTLED, ConvergenceParameters, OnNoConvergence

#: Rounds at one level of the throttle (none, at first) at the most. Rounds that help at all (see
#: below) leave by then a five-thousandth of what there was.
MAX_ROUNDS = 30
#: Rounds at the highest level that may fail to help. An unthrottled guest loses nothing by further
#: rounds, and may calm down; one that hardly runs should not be kept so.
MAX_FAILURES = 2
#: What may be left after the last round, as sending time in ms, even if further rounds could
#: shrink it, and whatever the downtime limit. A round costs as much again before it sends anything
#: (the logs are read, the guest faults anew on each page that it writes), and an idle guest always
#: leaves some hundred pages.
GOOD_ENOUGH_MS = 10.0
#: A round helps if it leaves less than this share of what it had to send.
_SHRINKS = 0.75
#: A round of fewer pages (half a message's) that took less time, ms, is only a lower bound of the
#: bandwidth: what takes its time is the waking of both ends.
_MEASURABLE = 1024
_MEASURABLE_MS = 100.0
#: Fewer pages than this, sent or left, are no measure of the connection, and take no time.
_FEW = 64


class Action(enum.Enum):
    """The next step after a round."""

    #: Stop the guest, and send the rest.
    STOP = "stop"
    #: Another round, with the verdict's throttle.
    ROUND = "round"
    #: Leave the guest where it is.
    ABORT = "abort"


class Verdict(NamedTuple):
    """The judgement of a round."""

    action: Action
    #: Share of the time for which vCPUs are kept out of the guest from now on, percent; 0: none.
    throttle: int
    #: The time for which a stop now would stop the guest for its RAM, ms.
    expected_ms: float


class Convergence:
    """The judge of one migration, round by round."""

    def __init__(self) -> None:
        #: The throttle now, percent.
        self.throttle = 0
        #: Rounds since the throttle was last changed.
        self._rounds = 0
        self._failures = 0
        self._previous: int | None = None
        self._per_page_ms: float | None = None

    def judge(
        self,
        sent: int,
        ms: float,
        dirty: int,
        downtime_limit: float,
        parameters: ConvergenceParameters,
    ) -> Verdict:
        """Judge a round that sent ``sent`` pages within ``ms`` and left ``dirty`` pages to be sent.

        ``downtime_limit`` is in ms. The limit and the parameters may change from round to round.
        """
        expected = self._expected(sent, ms, dirty)
        helped = self._previous is None or dirty < self._previous * _SHRINKS
        self._previous = dirty
        self._rounds += 1
        self._failures += not helped
        useless = not helped or self._rounds >= MAX_ROUNDS
        if expected <= GOOD_ENOUGH_MS or (useless and expected <= downtime_limit):
            return Verdict(Action.STOP, self.throttle, expected)
        level = self._level(useless, parameters)
        if level != self.throttle:
            self.throttle = level
            self._rounds = self._failures = 0
        elif self._exhausted(parameters):
            if parameters.on_no_convergence is OnNoConvergence.STOP_AND_COPY:
                return Verdict(Action.STOP, self.throttle, expected)
            return Verdict(Action.ABORT, 0, expected)
        return Verdict(Action.ROUND, self.throttle, expected)

    def _expected(self, sent: int, ms: float, dirty: int) -> float:
        """Return the time for the rest, in ms, by the connection's measured bandwidth."""
        known = self._per_page_ms
        if sent >= _MEASURABLE or (sent >= _FEW and ms >= _MEASURABLE_MS):
            self._per_page_ms = ms / sent
        elif sent >= _FEW and known is not None:
            self._per_page_ms = min(known, ms / sent)
        if self._per_page_ms is None:
            return ms * dirty / max(sent, 1) if dirty >= _FEW else 0.0
        return dirty * self._per_page_ms

    def _level(self, useless: bool, parameters: ConvergenceParameters) -> int:
        """Return the throttle for the next round."""
        if not parameters.auto_converge:
            return 0
        level = self.throttle
        if useless:
            level += parameters.cpu_throttle_increment
            if not self.throttle:
                level = parameters.cpu_throttle_initial
        return min(level, parameters.max_cpu_throttle)

    def _exhausted(self, parameters: ConvergenceParameters) -> bool:
        """Return whether all that may be tried was tried, where the level stays."""
        at_the_bound = self.throttle == parameters.max_cpu_throttle
        return self._rounds >= MAX_ROUNDS or (at_the_bound and self._failures >= MAX_FAILURES)


class Done(Protocol):
    """The numbers of the last round, which :class:`.report.Round` has."""

    @property
    def dirty(self) -> int:
        """Pages that are left to be sent."""

    @property
    def throttle(self) -> int:
        """The throttle during the round, percent."""


def why_not(
    verdict: Verdict,
    rounds: int,
    last: Done,
    downtime_limit: float,
    parameters: ConvergenceParameters,
) -> str:
    """Return why the migration was given up, and what its operator can change."""
    slowed = f" and with its vCPUs throttled by {last.throttle} percent" if last.throttle else ""
    if not parameters.auto_converge:
        further = "switch auto-converge on (migrate-set-capabilities), "
    elif parameters.max_cpu_throttle < MOST_THROTTLED:
        further = "raise max-cpu-throttle, "
    else:
        further = ""
    return (
        f"the guest writes faster than the connection takes: after {rounds} rounds{slowed}, "
        f"{last.dirty * PAGE / 1e6:.1f} MB are left, which would stop it for some "
        f"{verdict.expected_ms:.0f} ms, but downtime-limit is {downtime_limit:g} ms; {further}"
        "raise max-bandwidth or downtime-limit, or have it stopped regardless "
        "(on-no-convergence=stop-and-copy)"
    )
