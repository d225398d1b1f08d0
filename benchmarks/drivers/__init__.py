"""How each supervisor is configured, asked and stopped."""

from benchmarks.drivers.circus import Circus
from benchmarks.drivers.driver import PATIENCE, Client, Driver, Launch, Rows, Setup, connected, look_for_peers_in
from benchmarks.drivers.floors import CFloor, TrioFloor
from benchmarks.drivers.ours import Ours
from benchmarks.drivers.runit import Runit
from benchmarks.drivers.s6 import S6
from benchmarks.drivers.supervisord import Supervisord

DRIVERS: dict[str, Driver] = {
    driver.name: driver
    for driver in (
        Ours("ours", output="null"),
        Ours("ours-capture", output="capture"),
        TrioFloor(),
        CFloor(),
        Supervisord(),
        Circus(),
        S6(),
        Runit(),
    )
}

__all__ = ["DRIVERS", "PATIENCE", "Client", "Driver", "Launch", "Rows", "Setup", "connected", "look_for_peers_in"]
