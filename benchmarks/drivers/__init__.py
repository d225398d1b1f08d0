"""How each supervisor is configured, asked and stopped."""

from benchmarks.drivers.circus import Circus
from benchmarks.drivers.dinit import Dinit
from benchmarks.drivers.driver import PATIENCE, Client, Driver, Launch, Rotation, Rows, Setup, connected, look_for_peers_in
from benchmarks.drivers.floors import CFloor, TrioFloor, TrioPump
from benchmarks.drivers.ours import Ours
from benchmarks.drivers.runit import Runit
from benchmarks.drivers.s6 import S6
from benchmarks.drivers.supervisord import Supervisord

DRIVERS: dict[str, Driver] = {
    driver.name: driver
    for driver in (
        Ours("ours", output="null"),
        Ours("ours-capture", output="capture"),
        Ours("ours-full", output="capture", team=20),
        TrioFloor(),
        TrioPump("copy"),
        TrioPump("splice"),
        CFloor(),
        Supervisord(),
        Circus(),
        S6(),
        Runit(),
        Dinit(),
    )
}

__all__ = ["DRIVERS", "PATIENCE", "Client", "Driver", "Launch", "Rotation", "Rows", "Setup", "connected", "look_for_peers_in"]
