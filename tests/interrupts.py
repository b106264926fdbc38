"""Ctrl-C at a chosen moment."""

import sys
import threading
from pathlib import Path

import gpuadam

PLACES = tuple(str(Path(path).resolve()) for package in (gpuadam, gpuadam.kernels) for path in package.__path__)


class Interrupt:
    """Raises KeyboardInterrupt before the n-th opcode of gpuadam's Python code, as a signal would; counts them if n is None.

    Of the thread that enters it: others may have their own. `function`: the name of the one that was interrupted.
    """

    function = ""

    def __init__(self, n=None):
        self.n, self.count = n, 0

    def __enter__(self):
        TRACING.start(self)
        return self

    def __exit__(self, *_):
        TRACING.stop()

    def opcode(self, code):
        self.count += 1
        if self.count == self.n:
            TRACING.stop()
            self.function = code.co_name
            raise KeyboardInterrupt


class ByTrace:
    """The opcodes of a thread by `sys.settrace`, which from Python 3.12 on leaves out code that was not traced before."""

    def start(self, interrupt):
        def of_frame(frame, event, _):
            if not frame.f_code.co_filename.startswith(PLACES):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return of_opcode

        def of_opcode(frame, event, _):
            if event == "opcode":
                interrupt.opcode(frame.f_code)
            return of_opcode

        sys.settrace(of_frame)

    def stop(self):
        sys.settrace(None)


class ByMonitoring:
    """The opcodes of all threads by `sys.monitoring`, which Python has from 3.12 on."""

    TOOL = 3  # of those that no debugger, profiler or coverage tool has

    def __init__(self):
        self._of_threads, self._lock = {}, threading.Lock()

    def start(self, interrupt):
        monitoring = sys.monitoring
        with self._lock:
            self._of_threads[threading.get_ident()] = interrupt
            if len(self._of_threads) == 1:
                monitoring.use_tool_id(self.TOOL, __name__)
                monitoring.register_callback(self.TOOL, monitoring.events.INSTRUCTION, self._opcode)
                monitoring.set_events(self.TOOL, monitoring.events.INSTRUCTION)
                monitoring.restart_events()

    def stop(self):
        with self._lock:
            if self._of_threads.pop(threading.get_ident(), None) and not self._of_threads:
                sys.monitoring.set_events(self.TOOL, 0)
                sys.monitoring.register_callback(self.TOOL, sys.monitoring.events.INSTRUCTION, None)
                sys.monitoring.free_tool_id(self.TOOL)

    def _opcode(self, code, offset):
        if not code.co_filename.startswith(PLACES):
            return sys.monitoring.DISABLE
        if interrupt := self._of_threads.get(threading.get_ident()):
            interrupt.opcode(code)
        return None


TRACING = ByMonitoring() if sys.version_info >= (3, 12) else ByTrace()
