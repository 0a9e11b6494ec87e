"""A SGLang whose steps take a set time: the scheduler is SGLang's own; the clock is held.

Loaded by `sitecustomize` when the environment has CRITRATE_STEP_TIME; `critrate_pace` keeps the time. A
step is one forward pass, of prompts or of decodes.
"""

from typing import Any

from critrate_hook import change_scheduler
from critrate_pace import Pace


def hold(scheduler: Any) -> None:
    """Wrap the methods of the class where steps are chosen, run and processed, and where it is idle."""
    start = scheduler.__init__
    choose = scheduler.get_next_batch_to_run
    run = scheduler.run_batch
    process = scheduler.process_batch_result

    def initialise(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        if self.enable_overlap:
            raise RuntimeError("steps of a set time come one at a time: --disable-overlap-schedule")
        self.critrate_pace = Pace()

    def get_next_batch_to_run(self: Any, *arguments: Any, **options: Any) -> Any:
        self.critrate_pace.begin()
        plan = choose(self, *arguments, **options)
        if plan.batch_to_run is None:
            self.critrate_pace.rest()
        return plan

    def run_batch(self: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        requests = batch.batch_size()
        tokens = batch.extend_num_tokens if batch.forward_mode.is_extend() else requests
        self.critrate_pace.set(tokens, int(batch.seq_lens_cpu.sum()), requests)
        return run(self, batch, *arguments, **options)

    def process_batch_result(self: Any, *arguments: Any, **options: Any) -> Any:
        self.critrate_pace.hold()
        return process(self, *arguments, **options)

    scheduler.__init__ = initialise
    scheduler.get_next_batch_to_run = get_next_batch_to_run
    scheduler.run_batch = run_batch
    scheduler.process_batch_result = process_batch_result


change_scheduler(hold, "CRITRATE_STEP_TIME")
