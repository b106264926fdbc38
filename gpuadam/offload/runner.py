"""A step in chunks: its jobs are cut to the budget and go through the stages, after the streams that wrote their arrays."""

import contextlib

from .. import backends
from ..kernels import streams
from . import chunks, pipeline
from .stages import OnDevice, OnHost

TORN = "parameters and state are of two different steps: load a checkpoint into both, with load_state_dict"


def rich_bar():
    """Return the class of rich's progress bars."""
    try:
        import rich.progress
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('progress=True needs the package rich: pip install "gpuadam[progress]"') from error
    return rich.progress.Progress


class Runner:
    """Runs steps. It keeps its slots from step to step, and with them their memory.

    gpu: the kernels of the GPU's backend, or None. device: of the parameters; None if they are on the host. on_device: whether
    the update runs on the GPU. budget: bytes. bar: `rich_bar`, or None to show nothing.
    """

    def __init__(self, gpu, device, on_device, budget, bar):
        self.gpu, self.device, self.on_device, self.budget, self.bar = gpu, device, on_device, budget, bar
        self.slots = chunks.SLOTS_ON_GPU
        if not on_device:
            self.slots = min(max(backends.load("numba-cpu").n_threads(), 2), chunks.MOST_SLOTS)
        self.stages = None
        self.n_chunks = self.room = 0  # of the last step

    def describe(self):
        """Return lines on the last step, if there was one."""
        if self.stages is None:
            return []
        size = f"{self.n_chunks} chunks of up to {self.room:,} bytes"
        return [f"the last step in {size}, {self.slots} of them under way at once"]

    def run(self, jobs, stream, begin):
        """Run the jobs of a step, and return when they are done. begin(): is called when nothing can be refused any more.

        Raises ValueError (the budget) or RuntimeError (a graph is captured) before that; RuntimeError, or what the disk or Ctrl-C
        raises, if the step is cut short.
        """
        room = chunks.room_of(jobs, self.budget, self.slots)
        work = list(chunks.cut(jobs, room))
        stages = self._stages_for(jobs, room)
        self.n_chunks, self.room, stages.alone = len(work), room, len(work) == 1
        for earlier in self._streams_before(jobs, stream):
            stages.after(earlier)
        begin()
        with self.bar(transient=True) if self.bar else contextlib.nullcontext() as bar:
            task = bar and bar.add_task("step", total=sum(job.size for job in jobs))

            def store(chunk, slot):
                stages.store(chunk, slot)
                if bar:
                    bar.advance(task, sum(piece.stop - piece.start for piece in chunk))

            try:
                pipeline.run(work, stages.fetch, stages.update, store, self.slots)
            except BaseException as error:
                for slot in range(self.slots):
                    stages.finish(slot)  # what was begun still uses memory that its owner may give up now
                # errors of the disk and Ctrl-C stay what they are; the driver's do not say what they were for
                if isinstance(error, Exception) and not isinstance(error, OSError):
                    raise RuntimeError(f"the step was cut short ({type(error).__name__}: {error}): {TORN}") from error
                raise

    def _stages_for(self, jobs, room):
        files = any(operand.mapping for job in jobs for operand in job.operands)
        if self.stages is None or self.stages.room < room or (files and not self.stages.files):
            self.stages = None  # gives its memory back first
            stages = OnDevice if self.on_device else OnHost
            copying = self.on_device or self.device is not None
            self.stages = stages(self.gpu if copying else None, self.device or 0, room, self.slots, files)
        return self.stages

    def _streams_before(self, jobs, stream):
        """Return the streams whose work a step has to wait for. stream: given by the caller, or None."""
        if self.device is None:
            return []
        named = [operand.view.stream for job in jobs for operand in job.operands if operand.view.device is not None]
        with self.gpu.on(self.device, None):
            target, others = streams.choose(streams.handle(stream), self.gpu.current_stream(), named)
            if self.gpu.is_capturing(target):
                raise RuntimeError(
                    "a graph is being captured on this stream, and no graph can hold a step of OffloadAdam, whose launches and "
                    "copies the host orders: take the step outside of the capture"
                )
        return [target, *others]
