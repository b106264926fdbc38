"""Copies and memsets."""

from .driver import entry


@entry("cuMemcpy", "ppn", unsafe=True)
def memcpy(d, to, source, n_bytes):
    d.copy_async(to, source, n_bytes, 0, waits=True)


@entry("cuMemcpyHtoD_v2", "ppn", unsafe=True)
def memcpy_to_device(d, to, source, n_bytes):
    d.copy_async(to, source, n_bytes, 0, waits=True)


@entry("cuMemcpyDtoH_v2", "ppn", unsafe=True)
def memcpy_to_host(d, to, source, n_bytes):
    d.copy_async(to, source, n_bytes, 0, waits=True)


@entry("cuMemcpyDtoD_v2", "ppn", unsafe=True)
def memcpy_on_device(d, to, source, n_bytes):
    d.copy_async(to, source, n_bytes, 0, waits=True)


@entry("cuMemcpyAsync", "ppnp")
def memcpy_async(d, to, source, n_bytes, stream):
    d.copy_async(to, source, n_bytes, stream)


@entry("cuMemcpyHtoDAsync_v2", "ppnp")
def memcpy_to_device_async(d, to, source, n_bytes, stream):
    d.copy_async(to, source, n_bytes, stream)


@entry("cuMemcpyDtoHAsync_v2", "ppnp")
def memcpy_to_host_async(d, to, source, n_bytes, stream):
    d.copy_async(to, source, n_bytes, stream)


@entry("cuMemcpyDtoDAsync_v2", "ppnp")
def memcpy_on_device_async(d, to, source, n_bytes, stream):
    d.copy_async(to, source, n_bytes, stream)


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
