"""Captures, and graphs."""

import ctypes
import threading

from . import graphs, work
from .driver import I32, U32, U64, Failure, entry
from .library import write


@entry("cuThreadExchangeStreamCaptureMode", "p", counted=False)
def exchange_mode(d, mode):
    mode = I32.from_address(mode)
    d.thread.mode, mode.value = mode.value, d.thread_mode


@entry("cuStreamBeginCapture_v2", "pi")
def begin_capture(d, handle, mode):
    stream = d.stream(handle)
    if stream.handle == work.LEGACY:
        raise Failure("STREAM_CAPTURE_UNSUPPORTED")
    if stream.capture is not None:
        raise Failure("INVALID_VALUE")
    graph = graphs.Graph(d.handle())
    d.graphs[graph.handle] = graph
    stream.capture, stream.captured = graphs.Capture(stream, mode, graph), []
    d.captures.append(stream.capture)


@entry("cuStreamEndCapture", "pp")
def end_capture(d, handle, out):
    stream = d.stream(handle)
    capture = stream.capture
    write(out, U64, 0)
    if capture is None:
        raise Failure("INVALID_VALUE")
    if capture.origin is not stream:
        capture.invalid = True
        raise Failure("STREAM_CAPTURE_UNMATCHED")
    if capture.mode != graphs.RELAXED and capture.thread != threading.get_ident():
        raise Failure("STREAM_CAPTURE_WRONG_THREAD")
    unjoined = capture.unjoined()
    d.captures.remove(capture)
    capture.end()
    if capture.invalid or unjoined:
        raise Failure("STREAM_CAPTURE_INVALIDATED" if capture.invalid else "STREAM_CAPTURE_UNJOINED")
    write(out, U64, capture.graph.handle)


@entry("cuStreamIsCapturing", "pp")
def is_capturing(d, handle, out):
    stream = d.stream(handle)
    if stream.handle == work.LEGACY and any(s.blocking for capture in d.captures for s in capture.streams):
        raise Failure("STREAM_CAPTURE_IMPLICIT")
    write(out, I32, 0 if stream.capture is None else 2 if stream.capture.invalid else 1)


@entry("cuStreamGetCaptureInfo_v2", "pppppp")
def capture_info(d, handle, status, identity, graph, dependencies, n):
    is_capturing(d, handle, status)
    capture = d.stream(handle).capture
    if capture is not None:
        write(identity, U64, id(capture))
        write(graph, U64, capture.graph.handle)
        write(n, U64, 0)


@entry("cuStreamGetCaptureInfo_v3", "ppppppp")
def capture_info_with_edges(d, handle, status, identity, graph, dependencies, edges, n):
    return capture_info(d, handle, status, identity, graph, dependencies, n)


@entry("cuGraphInstantiateWithFlags", "ppn")
def instantiate(d, out, graph, flags):
    if graph not in d.graphs:
        raise Failure("INVALID_VALUE")
    executable = graphs.Executable(d.handle(), d.graphs[graph])
    d.executables[executable.handle] = executable
    write(out, U64, executable.handle)


@entry("cuGraphLaunch", "pp")
def graph_launch(d, executable, handle):
    stream = d.stream(handle)
    if stream.capture is not None:
        raise Failure("NOT_SUPPORTED")
    if executable not in d.executables:
        raise Failure("INVALID_VALUE")
    d.executables[executable].launch(d.work, stream)


@entry("cuGraphUpload", "pp")
def graph_upload(d, executable, handle):
    pass


@entry("cuGraphGetNodes", "ppp")
def graph_nodes(d, graph, out, n):
    nodes = d.graphs[graph].nodes
    for k, node in enumerate(nodes if out else []):
        write(out + 8 * k, U64, id(node))
    write(n, U64, len(nodes))


def node_of(d, handle):
    """Return the node of a graph that is there."""
    nodes = [node for graph in d.graphs.values() for node in graph.nodes if id(node) == handle]
    if not nodes:
        raise Failure("INVALID_VALUE")
    return nodes[0]


KERNEL_NODE, HOST_NODE = 0, 3


@entry("cuGraphNodeGetType", "pp")
def node_type(d, node, out):
    write(out, I32, KERNEL_NODE if node_of(d, node).kernel else HOST_NODE)  # of the others nobody asks which


@entry("cuGraphKernelNodeGetParams_v2", "pp")
def kernel_node(d, node, out):
    kernel = node_of(d, node).kernel
    if kernel is None:
        raise Failure("INVALID_VALUE")
    write(out, U64, kernel.function)
    for k, number in enumerate((*kernel.grid, *kernel.block, kernel.shared)):
        write(out + 8 + 4 * k, U32, number)
    for k, address in enumerate((ctypes.addressof(kernel.values), 0, 0, 0)):
        write(out + 40 + 8 * k, U64, address)


@entry("cuGraphDestroy", "p")
def graph_destroy(d, graph):
    d.graphs.pop(graph, None)


@entry("cuGraphExecDestroy", "p")
def executable_destroy(d, executable):
    d.executables.pop(executable, None)
