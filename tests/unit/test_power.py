"""Power off, power button, reset."""

import pytest

from godwit.hw.layout import KEYBOARD_COMMAND, RESET_PORT
from godwit.hw.power import Pm1, ResetPorts

STATUS, ENABLE, CONTROL = 0, 2, 4
BUTTON = 1 << 8


class Board:
    """PM1 with its line and its off switch."""

    def __init__(self) -> None:
        self.edges: list[bool] = []
        self.offs = 0
        self.pm1 = Pm1(self.edges.append, self._off)

    def _off(self) -> None:
        self.offs += 1


@pytest.fixture
def board() -> Board:
    return Board()


def test_acpi_mode_is_on_and_stays_on(board: Board) -> None:
    assert board.pm1.read(CONTROL, 2) == 1
    board.pm1.write(CONTROL, 2, 0)
    assert board.pm1.read(CONTROL, 2) == 1


def test_registers_in_any_width(board: Board) -> None:
    board.pm1.write(ENABLE, 2, 0x0120)
    assert board.pm1.read(ENABLE, 2) == 0x0120
    assert [board.pm1.read(ENABLE + i, 1) for i in (0, 1)] == [0x20, 0x01]
    assert board.pm1.read(STATUS, 4) == 0x0120_0000
    board.pm1.write(ENABLE + 1, 1, 0)
    assert board.pm1.read(ENABLE, 2) == 0x20
    assert board.pm1.read(6, 2) == 0
    board.pm1.write(6, 2, 0xFFFF)
    assert board.pm1.read(6, 2) == 0


def test_the_button_interrupts_until_it_is_acknowledged(board: Board) -> None:
    board.pm1.press()
    assert board.edges == []
    board.pm1.write(ENABLE, 2, BUTTON)
    assert board.edges == [True]
    assert board.pm1.read(STATUS, 2) == BUTTON
    board.pm1.write(STATUS, 2, 0xFFFF & ~BUTTON)
    assert board.edges == [True]
    board.pm1.write(STATUS, 2, BUTTON)
    assert board.edges == [True, False]
    board.pm1.press()
    board.pm1.press()
    assert board.edges == [True, False, True]


def test_s5_ends_the_vm_and_no_other_sleep_does(board: Board) -> None:
    for kind in (0, 1, 2, 3, 4, 6, 7):
        board.pm1.write(CONTROL, 2, kind << 10 | 1 << 13)
        assert board.pm1.read(CONTROL, 2) == kind << 10 | 1  # SLP_EN reads as 0
    board.pm1.write(CONTROL, 2, 5 << 10)
    assert board.offs == 0
    board.pm1.write(CONTROL, 2, 5 << 10 | 1 << 13)
    assert board.offs == 1


def test_s5_by_bytes(board: Board) -> None:
    board.pm1.write(CONTROL + 1, 1, 5 << 2 | 1 << 5)
    assert board.offs == 1


def test_state_moves(board: Board) -> None:
    board.pm1.write(ENABLE, 2, BUTTON)
    board.pm1.press()
    other = Board()
    other.pm1.load(board.pm1.save())
    assert other.pm1.save() == board.pm1.save()
    assert other.edges == []
    other.pm1.write(STATUS, 2, BUTTON)
    assert other.edges == [False]
    board.pm1.reset()
    assert board.pm1.save() == Board().pm1.save()


def test_the_reset_ports() -> None:
    resets: list[int] = []
    register = ResetPorts(RESET_PORT, lambda: resets.append(RESET_PORT))
    keyboard = ResetPorts(KEYBOARD_COMMAND, lambda: resets.append(KEYBOARD_COMMAND))
    assert (register.read(0, 1), keyboard.read(0, 1)) == (0, 0xFF)
    for value in (0, 2, 0xFB):
        register.write(0, 1, value)
    for value in (0, 4, 0xFF, 0xD1):
        keyboard.write(0, 1, value)
    assert resets == []
    register.write(0, 1, 6)
    keyboard.write(0, 1, 0xFE)
    assert resets == [RESET_PORT, KEYBOARD_COMMAND]


def test_an_event_interrupts_until_it_is_acknowledged(board: Board) -> None:
    pm1 = board.pm1
    pm1.raise_event(5)
    assert board.edges == []
    pm1.write(10, 2, 1 << 5)
    assert board.edges == [True]
    assert pm1.read(8, 2) == 1 << 5
    pm1.write(8, 1, 0xDF)
    assert board.edges == [True]
    pm1.write(8, 1, 0x20)
    assert board.edges == [True, False]


def test_the_button_and_an_event_share_a_line(board: Board) -> None:
    pm1 = board.pm1
    pm1.write(ENABLE, 2, BUTTON)
    pm1.write(10, 2, 1 << 5)
    pm1.press()
    pm1.raise_event(5)
    pm1.write(STATUS, 2, BUTTON)
    assert board.edges == [True]
    pm1.write(8, 2, 1 << 5)
    assert board.edges == [True, False]


def test_an_event_travels(board: Board) -> None:
    board.pm1.write(10, 2, 1 << 5)
    board.pm1.raise_event(5)
    other = Board()
    other.pm1.load(board.pm1.save())
    assert other.edges == []  # the level is in the interrupt controllers' state
    other.pm1.write(8, 2, 1 << 5)
    assert other.edges == [False]
