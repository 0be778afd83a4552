"""The measurements of one guest, where each method is a part and returns its sample."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

from lab.addresses import LANS
from lab.errors import LabError
from lab.load import BOTH_WAYS, FROM_GUEST, PORT, TO_GUEST, Bulk, Receiver, round_trips, throughput
from lab.traffic import Flow, Ping, Sender

from . import machines, memory, plan, socketloop
from .guests import Guest

Sample = dict[str, Any]
#: After the answers are back, seconds: the announcement's later effects are still seen.
_TAIL_S = 0.6
#: Between the load's begin and the migration's, seconds.
_HEAD_S = 1.0
#: Between two pings, seconds, beside another load: enough to see the guest on the network.
_SLOW_PING = 0.05
#: Length of the guest's flows of numbered packets if nobody ends the flows, seconds.
_MANY_S = 120


class Measured(Guest):
    """A guest with its measured parts."""

    # --- a guest that stays -----------------------------------------------------------------------
    def boot(self) -> Sample:
        """Return the time from the process' start to the guest's init, seconds."""
        return {"seconds": round(self.boot_s, 3)}

    def memory(self) -> Sample:
        """Measure the process' memory beyond the guest's RAM, MB."""
        machines.settle()
        found = memory.measure(self.vm.pid)
        if not self.memory_mb <= found.ram / 1024 < self.memory_mb + 64:
            raise LabError(f"{found.ram} kB cannot be the guest's {self.memory_mb} MB of RAM")
        return {"pss_mb": found.pss / 1024, "rss_mb": found.rss / 1024}

    def network(self) -> Sample:
        """Measure TCP each way, bytes a second, and a ping's median round trip, milliseconds."""
        netns, address = self.net.client.netns, LANS[0].guest[0]
        machines.settle()
        took = round_trips(netns, address, self.rates.round_trips, 0.005)
        rates = throughput(netns, address, self.rates.stream_s, TO_GUEST)
        rates |= throughput(netns, address, self.rates.stream_s, FROM_GUEST)
        return {"round_trip_ms": median(took), "answers": len(took), **rates}

    # --- migrations -------------------------------------------------------------------------------
    def idle(self) -> Sample:
        """Migrate an idle guest of 128 MB under pings at the full rate."""
        return self._migrated(self.flows(2), self.rates.ping_interval)

    def idle_again(self) -> Sample:
        """Migrate an idle guest again, with pings in the next network."""
        return self._migrated(self.flows(2, later=1), self.rates.ping_interval)

    def udp(self) -> Sample:
        """Migrate under numbered packets in both directions, counted at both ends."""
        netns = self.net.client.netns
        flows = self.flows(self.rates.families_at_once)
        target, uri = self.target()
        self.agent.reset_flows()
        machines.settle()
        with (
            Receiver(netns, self.folder) as receiver,
            Sender(netns, self.folder, self.rates.udp_rate, flows) as sender,
        ):
            rate = self.rates.udp_rate
            for flow in flows:
                self.agent.udp_send(flow.client, PORT, flow.id, rate, rate * _MANY_S)
            time.sleep(_HEAD_S)
            before = self.agent.flows()
            migrated = machines.migrate(self.vm, target, uri)
            self.agent.ping(30)
            time.sleep(_TAIL_S)
            sender.stop()
            by_guest = self.agent.udp_stop()
            time.sleep(0.3)
            arrived = self.agent.flows()
            receiver.stop()
        self.arrive(target)
        counted, by_client = receiver.flows(), sender.counts()
        lost = {}
        for flow in flows:
            early, late, back = before[flow.id], arrived[flow.id], counted[flow.id]
            lost[_name(flow)] = {
                "to_guest": late.lost(by_client[flow.id]),
                # Lost before the migration began: the machine was too slow for the load.
                "to_guest_before": early.lost(early.max_seq + 1),
                "from_guest": back.lost(by_guest[flow.id]),
                "duplicates": [late.duplicates, back.duplicates],
                "reordered": [late.reordered, back.reordered],
                "gap_ms": [late.longest_gap_us / 1000, back.longest_gap_us / 1000],
            }
        return {**_reported(migrated), "udp": lost}

    def tcp(self) -> Sample:
        """Migrate under TCP in both directions at full speed."""
        address = LANS[0].guest[0]
        bulks: list[Bulk] = []

        def load() -> None:
            started = Bulk(self.net.client.netns, self.folder, address, BOTH_WAYS)
            bulks.append(self.stack.enter_context(started))

        sample = self._migrated(self.flows(1)[:1], _SLOW_PING, load)
        bulks[0].stop()
        return {**sample, **bulks[0].rates()}

    def hot(self) -> Sample:
        """Migrate a guest that writes 64 MB again and again."""

        def load() -> None:
            self.agent.hot_start(plan.HOT_MB)

        sample = self._migrated(self.flows(1)[:1], _SLOW_PING, load)
        self.agent.hot_check()
        return sample

    def large(self) -> Sample:
        """Migrate a guest of 2 GB with most memory in use."""
        self.agent.mem_fill(plan.POPULATED_MB)
        return self._migrated(self.flows(1)[:1], _SLOW_PING)

    def _migrated(
        self, flows: list[Flow], interval: float, load: Callable[[], None] | None = None
    ) -> Sample:
        """Migrate the guest under pings of these flows, and return the sample."""
        client = self.net.client.netns
        target, uri = self.target()
        with ExitStack() as stack:
            idle = machines.settle()
            if load is not None:
                load()
            pings = [
                stack.enter_context(Ping(client, flow, self.folder, interval)) for flow in flows
            ]
            for ping in pings:
                ping.wait_answer(0.0)
            time.sleep(_HEAD_S)
            migrated = machines.migrate(self.vm, target, uri)
            for ping in pings:
                ping.wait_answer(migrated.resumed)
            time.sleep(_TAIL_S)
        self.arrive(target)
        seen = {_name(ping.flow): ping.answers() for ping in pings}
        return {
            **_reported(migrated),
            "cpu_idle": idle,
            "gap_ms": {name: a.gap_ms(migrated.began, float("inf")) for name, a in seen.items()},
            "pings_lost": {name: a.sent - a.received for name, a in seen.items()},
        }


def limit() -> Sample:
    """Measure the plain socket loop three times, bytes a second, with the median as the rate."""
    machines.settle()
    tries = [socketloop.bytes_a_second(plan.LIMIT_MB) for _ in range(3)]
    return {"rate": median(tries), "tries": tries}


def _name(flow: Flow) -> str:
    return f"{flow.network} {flow.family}"


def _reported(migrated: machines.Migrated) -> Sample:
    """Return the VMM's own figures of its migration, milliseconds and bytes."""
    info = migrated.info
    # QEMU has whole milliseconds, and so had older checkouts no finer ones beside them.
    fine = info.get("godwit", {})
    return {
        "total_ms": fine.get("total-ms", info["total-time"]),
        "downtime_ms": fine.get("downtime-ms", info["downtime"]),
        "pause_ms": migrated.pause,
        "bytes": info["ram"]["transferred"],
        "passes": info["ram"]["dirty-sync-count"],
        "report": info.get("godwit", {}),
    }
