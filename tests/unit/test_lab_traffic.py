"""The lab's pings: for how long a guest did not answer."""

from __future__ import annotations

import pytest

from lab.traffic import Answers


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        ([], 5.0),
        ([9.9, 10.1, 12.1, 12.2, 14.5, 15.0], 2.3),
        ([10.1, 11.0, 12.0, 13.0], 2.0),
        ([12.5, 13.0, 14.0], 2.5),
    ],
    ids=["never", "in between", "up to the end", "from the beginning"],
)
def test_the_longest_time_without_an_answer(times: list[float], seconds: float) -> None:
    answers = Answers(len(times), len(times), [(at, n) for n, at in enumerate(times)])
    assert answers.dark_s(10.0, 15.0) == pytest.approx(seconds)
