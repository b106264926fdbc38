"""How measurements are drawn: gpuadam in blue, the limit in black and dashed, all others muted; every value is written out."""

from ...kernels import messages
from ...terminal import figures
from . import facts

OURS, LIMIT, OTHER = "#1261c9", "#111111", "#9aa3ad"


def save(figure, path, rows):
    """Write the figure, below it what the rows were measured on and with."""
    first = rows[0]
    versions = [f"{name} {first[name]}" for name in facts.versions() if first.get(name)]
    machine = dict.fromkeys((first["device"], first["cpu"], messages.how_many(int(first["cores"]), "core"), first["date"]))
    figures.save(figure, path, f"{', '.join(machine)}; {', '.join(versions)}")
