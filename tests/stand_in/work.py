"""Streams and events of the stand-in: work is done as late as their order allows, and in an order that a seed chooses.

An operation waits in a graph of what has to be done before it. It is done when the host waits for it, or for something that comes
after it: not before. So a result that nothing waited for is not there, and work that nothing orders comes in the wrong order.
"""

import itertools
import random
import threading

LEGACY, PER_THREAD = 1, 2


class Operation:
    """Something to do on a device, once what it needs is done. always: also after an error, which ends all else."""

    __slots__ = ("always", "done", "needs", "number", "run", "what")

    def __init__(self, run, what, needs, number, always):
        self.run, self.what, self.number, self.always = run, what, number, always
        self.needs = [need for need in needs if need is not None and not need.done]
        self.done = False


class Stream:
    """A queue. last: its last operation, or None. blocking: whether it waits for the legacy default stream, and that for it.

    number: which no other stream has or had.
    """

    _numbers = itertools.count(1)

    def __init__(self, handle, device, blocking, priority=0):
        self.number = next(self._numbers)
        self.handle, self.device, self.blocking, self.priority = handle, device, blocking, priority
        self.last = None
        self.capture = None  # the Capture that it takes part in
        self.captured = []  # the nodes that come before what it captures next

    def __str__(self):
        names = {LEGACY: "the legacy default stream", PER_THREAD: "a thread's default stream"}
        return f"{names.get(self.handle) or f'stream {self.handle:#x}'} of device {self.device}"


class Event:
    """after: the operation it was last recorded behind; None if it never was. captured: (Capture, nodes) if it was in a graph."""

    def __init__(self, handle, device, flags):
        self.handle, self.device, self.flags = handle, device, flags
        self.after = self.captured = self.time = None


class Work:
    """All operations that are not done yet.

    seed 0 does what the host waits for and no more, in the order in which it was enqueued. Any other seed chooses at random among
    what could come next, and now and then does what nothing waits for yet.
    """

    def __init__(self, seed=0):
        self.pending = {}  # number -> Operation, in the order in which they were enqueued
        self.count = self.clock = 0
        self.streams = {}  # handle -> Stream
        self.legacy = {}  # device -> Stream
        self.of_threads = {}  # (device, thread) -> Stream
        self.reseed(seed)

    def reseed(self, seed):
        self.seed = seed
        self.random = random.Random(seed)
        self.eagerness = self.random.choice([0, 0.1, 0.5]) if seed else 0

    def stream(self, handle, device):
        """Return the Stream of a handle; that of a default stream depends on the device and the thread. None if there is none."""
        if handle in (0, LEGACY):
            if device not in self.legacy:
                self.legacy[device] = Stream(LEGACY, device, True)
            return self.legacy[device]
        if handle == PER_THREAD:
            key = device, threading.get_ident()
            if key not in self.of_threads:
                self.of_threads[key] = Stream(PER_THREAD, device, True)
            return self.of_threads[key]
        return self.streams.get(handle)

    def all_streams(self, device):
        everywhere = [*self.streams.values(), *self.of_threads.values(), *self.legacy.values()]
        return [stream for stream in everywhere if stream.device == device]

    def before(self, stream):
        """Return what has to be done before what comes next on a stream."""
        needs = [stream.last]
        if stream.handle == LEGACY:
            needs += [other.last for other in self.all_streams(stream.device) if other.blocking]
        elif stream.blocking and stream.device in self.legacy:
            needs.append(self.legacy[stream.device].last)
        return needs

    def operation(self, run, what, needs, always=False):
        self.count += 1
        number = self.count
        operation = self.pending[number] = Operation(run, what, needs, number, always)
        return operation

    def enqueue(self, stream, run, what, needs=(), always=False):
        """Put something on a stream, to be done after what is there and after other operations. Returns the Operation."""
        stream.last = self.operation(run, f"{what} on {stream}", [*self.before(stream), *needs], always)
        return stream.last

    def finish(self, operations):
        """Do these operations and what comes before them."""
        needed = {}
        waiting = [operation for operation in operations if operation is not None and not operation.done]
        while waiting:
            operation = waiting.pop()
            if operation.number not in needed:
                needed[operation.number] = operation
                waiting += [need for need in operation.needs if not need.done]
        followers = {number: [] for number in needed}
        missing = {}
        for number, operation in needed.items():
            before = {need.number for need in operation.needs if not need.done}
            missing[number] = len(before)
            for need in before:
                followers[need].append(number)
        ready = sorted(number for number, n in missing.items() if not n)

        def after(operation):
            for follower in followers.pop(operation.number, ()):
                missing[follower] -= 1
                if not missing[follower]:
                    ready.append(follower)

        while ready:
            k = self.random.randrange(len(ready)) if self.seed else 0
            operation = needed[ready.pop(k)]
            if not operation.done:
                self._do(operation)
            after(operation)
            if self.eagerness and self.random.random() < self.eagerness:
                self.progress()

    def progress(self, of=None):
        """Do one operation that could be done: one that comes before `of`, or any."""
        operation = of or (self.random.choice(list(self.pending.values())) if self.pending else None)
        while operation is not None and not operation.done:
            needs = [need for need in operation.needs if not need.done]
            if not needs:
                self._do(operation)
                return
            operation = self.random.choice(needs)

    def _do(self, operation):
        if operation.done:
            return
        operation.done = True
        self.pending.pop(operation.number, None)
        self.clock += 1
        run, operation.run, operation.needs = operation.run, None, []
        if run is not None:
            try:
                run()
            except Exception:
                self.abandon()
                raise

    def abandon(self):
        """Do nothing more of what is enqueued, as after an error on a GPU: the memory of the host that it names may be gone."""
        for operation in list(self.pending.values()):
            run, operation.done, operation.run, operation.needs = operation.run, True, None, []
            if operation.always and run is not None:
                run()
        self.pending.clear()
