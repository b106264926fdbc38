"""Copies and memsets."""

from .driver import entry


def memcpy(d, to, source, n_bytes):
    d.copy_async(to, source, n_bytes, 0, waits=True)


def memcpy_async(d, to, source, n_bytes, stream):
    d.copy_async(to, source, n_bytes, stream)


# Where memory lies is seen from its address
for kinds in ("", "HtoD", "DtoH", "DtoD"):
    version = "_v2" if kinds else ""
    entry(f"cuMemcpy{kinds}{version}", "ppn", unsafe=True)(memcpy)
    entry(f"cuMemcpy{kinds}Async{version}", "ppnp")(memcpy_async)


@entry("cuMemcpyPeer", "ppppn", unsafe=True)
def memcpy_peer(d, to, to_context, source, source_context, n_bytes):
    d.copy_async(to, source, n_bytes, 0, waits=True)


@entry("cuMemcpyPeerAsync", "ppppnp")
def memcpy_peer_async(d, to, to_context, source, source_context, n_bytes, stream):
    d.copy_async(to, source, n_bytes, stream)


@entry("cuMemsetD8_v2", "pbn", unsafe=True)
def memset(d, to, value, n_bytes):
    d.fill(to, bytes([value]), n_bytes, 0)


@entry("cuMemsetD8Async", "pbnp")
def memset_async(d, to, value, n_bytes, stream):
    d.fill(to, bytes([value]), n_bytes, stream)


@entry("cuMemsetD32Async", "punp")
def memset_32_async(d, to, value, n, stream):
    d.fill(to, value.to_bytes(4, "little"), 4 * n, stream)
