"""Captured graphs of the stand-in: what a capture writes down, what it forbids, and the replay."""

import ctypes
import threading

GLOBAL, THREAD_LOCAL, RELAXED = range(3)


class Node:
    """An operation of a graph. needs: the nodes before it."""

    kernel = None  # the KernelLaunch, if it is one

    def __init__(self, run, what, needs):
        self.run, self.what, self.needs = run, what, list(needs)


class KernelLaunch:
    """What a graph knows of the launch of a kernel. copies: the bytes of its parameters, whose addresses are in `values`."""

    def __init__(self, function, grid, block, shared, copies):
        self.function, self.grid, self.block, self.shared = function, grid, block, shared
        self._kept = [ctypes.create_string_buffer(copy, len(copy)) for copy in copies]
        self.values = (ctypes.c_void_p * len(copies))(*map(ctypes.addressof, self._kept))


class Graph:
    def __init__(self, handle):
        self.handle, self.nodes = handle, []


class Capture:
    """A capture that has begun on a stream. invalid: whether something forbidden was done, so that no graph comes of it."""

    def __init__(self, origin, mode, graph):
        self.origin, self.mode, self.graph = origin, mode, graph
        self.thread = threading.get_ident()
        self.streams = {origin}
        self.invalid = False

    def add(self, stream, run, what, needs=()):
        node = Node(run, what, [*stream.captured, *needs])
        self.graph.nodes.append(node)
        stream.captured = [node]
        return node

    def join(self, stream, nodes):
        """Make a stream wait for nodes, and with that take part."""
        if stream.capture is None:
            stream.capture, stream.captured = self, []
            self.streams.add(stream)
        stream.captured = list(dict.fromkeys([*stream.captured, *nodes]))

    def unjoined(self):
        """Return whether something that another stream captured is not waited for by the stream that the capture began on."""
        reached, waiting = set(), list(self.origin.captured)
        while waiting:
            node = waiting.pop()
            if node not in reached:
                reached.add(node)
                waiting += node.needs
        return len(reached) < len(self.graph.nodes)

    def end(self):
        for stream in self.streams:
            stream.capture, stream.captured = None, []


class Executable:
    """A graph that can be launched. Its launches come one after the other."""

    def __init__(self, handle, graph):
        self.handle, self.nodes = handle, list(graph.nodes)
        self.last = None

    def launch(self, work, stream):
        before = [*work.before(stream), self.last]
        made, leaves = {}, {}
        for node in self.nodes:
            needs = [made[need] for need in node.needs] or before
            made[node] = work.operation(node.run, f"{node.what}, of a graph launched on {stream}", needs)
            leaves[node] = made[node]
            for need in node.needs:
                leaves.pop(need, None)
        self.last = work.enqueue(stream, None, "the end of a graph", leaves.values())
