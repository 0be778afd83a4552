"""A guest that reads and writes anywhere: nothing but normal returns, and the VM lives."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit.hw.memory import GuestMemory
from godwit.spec.saved import decode, encode
from virtio_bench import ACK, DRIVER, DRIVER_OK, FEATURES_OK, Bench

_sizes = st.sampled_from([1, 2, 4])
_values = st.one_of(
    st.integers(0, 0xFFFFFFFF), st.sampled_from([0, 1, 2, 4, 15, 0x8000, 0xC000, 0xFFFFFFFF])
)
_bar = st.one_of(
    st.integers(0, 0x3FFF),
    st.integers(0, 0x37),
    st.integers(0x800, 0x810),
    st.integers(0x1000, 0x1040),
    st.integers(0x2000, 0x2010),
)
_access = st.one_of(
    st.tuples(st.just("read"), _bar, st.sampled_from([1, 2, 4, 8]), st.just(0)),
    st.tuples(st.just("write"), _bar, st.sampled_from([1, 2, 4, 8]), _values),
    st.tuples(st.just("in"), st.integers(0, 255), _sizes, st.just(0)),
    st.tuples(st.just("out"), st.integers(0, 255), _sizes, _values),
    st.tuples(st.just("kick"), st.integers(0, 3), _sizes, st.just(0)),
    st.tuples(st.just("ring"), st.integers(0, 2), st.integers(0, 200), _values),
    st.tuples(st.sampled_from(["pause", "move", "announce"]), st.just(0), st.just(0), st.just(0)),
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(probed=st.booleans(), accesses=st.lists(_access, max_size=60))
def test_random_accesses(
    memory: GuestMemory, probed: bool, accesses: list[tuple[str, int, int, int]]
) -> None:
    bench = Bench(memory)
    guest = bench.guest
    try:
        guest.write_config(4, 2, 6)
        if probed:
            guest.probe()
        for kind, at, size, value in accesses:
            limit = (1 << 8 * size) - 1
            if kind == "read":
                assert guest.read(at, size) >= 0
            elif kind == "write":
                guest.write(at, size, value & limit)
            elif kind == "in":
                assert 0 <= guest.read_config(at, size) <= limit
            elif kind == "out":
                guest.write_config(at, size, value & limit)
            elif kind == "kick":
                guest.kick(at, size)
            elif kind == "ring":
                memory.write(0x10_0000 * (at + 1) + 4 * size, value.to_bytes(4, "little"))
            elif kind == "announce":
                bench.net.announce()
            elif kind == "pause":
                bench.pci.pause()
                bench.pci.resume()
            else:
                # What a guest did must neither keep it from moving nor come out otherwise.
                state = bench.save()
                other = Bench(memory, resume=False)
                other.load(decode(encode(state), bench.pci.State))
                assert other.save() == state
                other.close()
                bench.pci.resume()
            guest.base = bench.pci.bar or guest.base
            bench.serve()
        guest.base = 0xE000_0000
        guest.write_config(0x10, 4, guest.base)
        guest.probe()
        assert guest.status == ACK | DRIVER | FEATURES_OK | DRIVER_OK
        assert guest.command(0, 0, b"\1") == 0
    finally:
        bench.close()
